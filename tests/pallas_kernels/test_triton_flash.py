"""The Triton kernels of interval attention: interpreted on the CPU against the references, compiled without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter

from pallas_kernels import compressed_attention, prefix_attention, triton_flash, window_attention
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.compressed_attention import reference as compressed_reference
from pallas_kernels.compressed_attention import triton as compressed_triton
from pallas_kernels.prefix_attention import reference as prefix_reference
from pallas_kernels.prefix_attention import triton as prefix_triton
from pallas_kernels.triton_flash_config import Config, KeyConfig, QueryConfig, heuristic
from pallas_kernels.window_attention import reference as window_reference
from pallas_kernels.window_attention import triton as window_triton

pytest.importorskip("triton", reason="Triton comes with the extra 'gpu', for Linux on x86-64 alone")


def small_config(parts=1, key_parts=1):
    query = QueryConfig(rows=32, keys=16, warps=4, stages=2, parts=parts)
    return Config(forward=query, dq=query, dkdv=KeyConfig(16, 32, 4, 2, key_parts))


def draw(shape, seed, dtype, end=None):
    """Normal values, NaN from `end[b]` on along the second axis."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    if end is not None:
        x[np.arange(shape[1])[None] >= np.asarray(end)[:, None]] = np.nan
    return jnp.asarray(x, dtype)


def compare(attend, reference, q, k, v, do, dlse):
    """Compares output, log-sum-exp and gradients with those of the reference on the same values, NaN as 0."""

    def both(attend, q, k, v, do, dlse):
        results, back = jax.vjp(attend, q, k, v)
        return *results, *back((do, dlse))

    with triton_interpreter.interpreted():
        actual = jax.block_until_ready(both(attend, q, k, v, do, dlse))
    finite = [jnp.nan_to_num(x.astype(jnp.float32)) for x in (q, k, v, do, dlse)]
    expected = jax.jit(functools.partial(both, reference))(*finite)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.shape == y.shape, name
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(x).all(), f"{name} is not finite"
        if name == "lse":
            np.testing.assert_array_equal(x == EMPTY_LSE, y == EMPTY_LSE)
            x, y = (np.where(z == EMPTY_LSE, 0, z) for z in (x, y))
        seen = np.linalg.norm(x - y) / np.linalg.norm(y)
        # bfloat16 keeps 8 bits: 2e-3 for one rounding; probabilities and dS are rounded once more.
        limit = 1e-6 if name == "lse" else 6e-3 if q.dtype == jnp.bfloat16 else 1e-3
        assert seen <= limit, f"{name} is off by {seen}"


def test_window_of_ragged_rows_and_later_queries():
    batch, queries, heads, group, size, keys, offset = 2, 21, 2, 7, 64, 70, 45
    lengths = (63, 49)
    past = np.asarray(lengths) - offset
    rows = (batch, queries, heads, group, size)
    q, do = (draw(rows, seed, jnp.float16, past) for seed in (0, 3))
    k, v = (draw((batch, keys, heads, size), seed, jnp.float16, lengths) for seed in (1, 2))
    dlse = draw(rows[:-1], 4, jnp.float32, past)
    options = {"window_size": 19, "q_offset": jnp.int32(offset), "lengths": jnp.asarray(lengths, jnp.int32)}
    compare(
        functools.partial(window_triton.window_attention, **options, config=small_config()),
        functools.partial(window_reference.window_attention, **options),
        q,
        k,
        v,
        do,
        dlse,
    )


def test_compressed_with_split_keys_and_queries():
    batch, queries, heads, group, size, blocks = 1, 30, 2, 3, 128, 75
    rows = (batch, queries, heads, group, size)
    q, do = (draw(rows, seed, jnp.bfloat16) for seed in (0, 3))
    k, v = (draw((batch, blocks, heads, size), seed, jnp.bfloat16) for seed in (1, 2))
    dlse = draw(rows[:-1], 4, jnp.float32)
    options = {"block_size": 2, "q_offset": 100, "lengths": None}
    compare(
        functools.partial(compressed_triton.compressed_attention, **options, config=small_config(2, 3)),
        functools.partial(compressed_reference.compressed_attention, **options),
        q,
        k,
        v,
        do,
        dlse,
    )


def test_prefix_of_few_tokens():
    batch, texts, queries, heads, group, size, keys = 2, 1, 3, 1, 7, 64, 59
    rows = (batch, texts, queries, heads, group, size)
    lengths = (59, 40)
    q, do = (draw(rows, seed, jnp.float16) for seed in (0, 3))
    # The third query of the first row sees no key.
    q, do = (x.at[0, 0, 2].set(jnp.nan) for x in (q, do))
    k, v = (draw((batch, keys, heads, size), seed, jnp.float16, lengths) for seed in (1, 2))
    dlse = draw(rows[:-1], 4, jnp.float32)
    visible = jnp.array([[[59, 20, 0]], [[30, 1, 50]]])
    arguments = (visible, jnp.array(lengths))
    compare(
        lambda q, k, v: prefix_triton.prefix_attention(q, k, v, *arguments, config=small_config(parts=2)),
        lambda q, k, v: prefix_reference.prefix_attention(q, k, v, *arguments),
        q,
        k,
        v,
        do,
        dlse,
    )


def built(name):
    """The launches of the 7B shapes at 64K tokens (decode: 128K keys), traced."""
    tokens, keys = (1, 131_072) if name == "decode" else (65_536, 65_536)
    q = jax.ShapeDtypeStruct((1, tokens, 4, 7, 128), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, keys // 64 if name == "compressed" else keys, 4, 128), jnp.bfloat16)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)

    def attend(q, k, v, length):
        if name == "compressed":
            return compressed_triton.compressed_attention(q, k, v, block_size=64, q_offset=0, lengths=length)
        if name == "window":
            return window_triton.window_attention(q, k, v, window_size=256, q_offset=0, lengths=length)
        return prefix_triton.prefix_attention(q[:, None], k, v, length[:, None, None], length)

    def both(q, k, v, do, length):
        (o, lse), back = jax.vjp(lambda q, k, v: attend(q, k, v, length), q, k, v)
        return o, lse, *back((do.reshape(o.shape), lse))

    return triton_interpreter.launches(both, q, k, k, q, length)


@pytest.mark.parametrize("name", ["compressed", pytest.param("window", marks=pytest.mark.slow), "decode"])
def test_the_published_shapes_compile_for_hopper(name):
    for launch in built(name):
        kernel = triton_interpreter.compiled(launch)
        assert "wgmma.mma_async" in kernel.ptx
        assert kernel.shared_memory <= 227 * 1024
        # A few words around the loops.
        assert kernel.spills <= 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "bfloat16 and float16, not float32"),
        ({"size": 32}, "head sizes 64 and 128, not 32"),
        ({"group": 9}, "at most 8 query heads per KV head, not 9"),
    ],
)
def test_calls_that_the_kernels_do_not_cover_say_why(change, message):
    sizes = {"dtype": jnp.bfloat16, "size": 64, "group": 7} | change
    q = jnp.zeros((1, 4, 1, sizes["group"], sizes["size"]), sizes["dtype"])
    k = jnp.zeros((1, 4, 1, sizes["size"]), sizes["dtype"])
    with pytest.raises(NotImplementedError, match=message):
        window_triton.window_attention(q, k, k, window_size=2, q_offset=0, lengths=None)


def test_another_device_is_named():
    q, k = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    message = "needs an NVIDIA GPU of compute capability 8.0 or more, not platform 'cpu'"
    with pytest.raises(NotImplementedError, match=message):
        window_attention(q, k, k, window_size=2, implementation="triton")
    with pytest.raises(NotImplementedError, match=message):
        compressed_attention(q, k, k, block_size=2, implementation="triton")
    with pytest.raises(NotImplementedError, match=message):
        prefix_attention(q[None], k, k, jnp.ones((1, 1, 4), jnp.int32), implementation="triton")


def test_nothing_to_attend_to():
    q, k = jnp.zeros((1, 3, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 0, 1, 64), jnp.bfloat16)
    o, lse = window_triton.window_attention(q, k, k, window_size=2, q_offset=0, lengths=jnp.array([0]))
    assert not o.any()
    assert (lse == EMPTY_LSE).all()


@pytest.mark.parametrize("window", [None, 100])
def test_tiles_of_queries_hold_those_that_see_the_keys(window):
    queries, keys, group = 300, 410, 7
    end = np.clip(np.arange(queries) + 90, 0, keys)
    end[280:] = 0
    start = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
    config = KeyConfig(64, 128, 8, 2)
    tiles = np.asarray(triton_flash.query_tiles(config, group, jnp.asarray(end, jnp.int32)[None], window, keys))[0]
    token = np.arange(queries)
    for origin, (first, last) in zip(range(0, keys, 64), tiles, strict=True):
        seen = (start < origin + 64) & (end > origin)
        inside = (token // 18 >= first) & (token // 18 < last)
        assert not (seen & ~inside).any()
        assert first == last or seen[token // 18 == first].any()


def test_few_queries_take_small_tiles_and_split_the_keys():
    few, many = heuristic(1, 131_072, 4, 7, None), heuristic(65_536, 65_536, 4, 7, 256)
    assert few.forward.rows == 64
    assert few.forward.parts == 33
    assert many.forward.parts == many.dkdv.parts == 1
