"""The Hopper kernels of interval attention: interpreted on the CPU against the references, lowered without a GPU."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import compressed_attention, gpu, gpu_flash_plan, prefix_attention, window_attention
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.compressed_attention import mosaic_gpu as compressed_gpu
from pallas_kernels.compressed_attention import reference as compressed_reference
from pallas_kernels.gpu_flash_config import MULTIPROCESSORS, Config, KeyConfig, QueryConfig, heuristic, split
from pallas_kernels.gpu_flash_plan import Tiles
from pallas_kernels.prefix_attention import mosaic_gpu as prefix_gpu
from pallas_kernels.prefix_attention import reference as prefix_reference
from pallas_kernels.window_attention import mosaic_gpu as window_gpu
from pallas_kernels.window_attention import reference as window_reference


def small_config(tokens=64, consumers=2, parts=1, key_parts=1):
    forward = QueryConfig(128, 2, consumers, parts, buffers=1 if parts > 1 else 2)
    dq = QueryConfig(64, 2, consumers, parts)
    return Config(tokens=tokens, forward=forward, dq=dq, dkdv=KeyConfig(2, key_parts), programs=2)


def draw(shape, seed, dtype, end=None):
    """Normal values, NaN from `end[b]` on along the second axis."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    if end is not None:
        x[np.arange(shape[1])[None] >= np.asarray(end)[:, None]] = np.nan
    return jnp.asarray(x, dtype)


def compare(attend, reference, q, k, v, do, dlse, *, races=False):
    """Compares output, log-sum-exp and gradients with those of the reference on the same values, NaN as 0."""
    attend = functools.partial(attend, interpret=plgpu.InterpretGPUParams(detect_races=races))

    def both(attend, q, k, v, do, dlse):
        results, back = jax.vjp(attend, q, k, v)
        return *results, *back((do, dlse))

    actual = both(attend, q, k, v, do, dlse)
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
    if races:
        assert not gpu_callbacks.get_races().races_found


def test_window_of_ragged_rows_and_later_queries_without_races():
    batch, queries, heads, group, size, keys, offset = 2, 72, 1, 2, 64, 130, 50
    lengths = (121, 60)
    past = np.asarray(lengths) - offset
    rows = (batch, queries, heads, group, size)
    q, do = (draw(rows, seed, jnp.bfloat16, past) for seed in (0, 3))
    k, v = (draw((batch, keys, heads, size), seed, jnp.bfloat16, lengths) for seed in (1, 2))
    dlse = draw(rows[:-1], 4, jnp.float32, past)
    options = {"window_size": 40, "q_offset": jnp.int32(offset), "lengths": jnp.asarray(lengths, jnp.int32)}
    compare(
        functools.partial(window_gpu.window_attention, **options, config=small_config()),
        functools.partial(window_reference.window_attention, **options),
        q,
        k,
        v,
        do,
        dlse,
        races=True,
    )


def test_thread_blocks_pass_many_tiles_that_see_nothing():
    """One thread block: 6 items of work with nothing to see, then some with keys, 3 with none, some again."""
    batch, queries, group, size = 5, 192, 2, 64
    lengths = (0, 0, 190, 0, 20)
    rows = (batch, queries, 1, group, size)
    q, do = (draw(rows, seed, jnp.bfloat16, lengths) for seed in (0, 3))
    k, v = (draw((batch, queries, 1, size), seed, jnp.bfloat16, lengths) for seed in (1, 2))
    options = {"window_size": 40, "q_offset": 0, "lengths": jnp.asarray(lengths, jnp.int32)}
    compare(
        functools.partial(
            window_gpu.window_attention, **options, config=dataclasses.replace(small_config(), programs=1)
        ),
        functools.partial(window_reference.window_attention, **options),
        q,
        k,
        v,
        do,
        draw(rows[:-1], 4, jnp.float32, lengths),
    )


def test_compressed_with_split_keys_and_queries():
    batch, queries, heads, group, size, blocks = 1, 75, 2, 1, 128, 150
    rows = (batch, queries, heads, group, size)
    q, do = (draw(rows, seed, jnp.float16) for seed in (0, 3))
    k, v = (draw((batch, blocks, heads, size), seed, jnp.float16) for seed in (1, 2))
    dlse = draw(rows[:-1], 4, jnp.float32)
    options = {"block_size": 2, "q_offset": 190, "lengths": None}
    compare(
        functools.partial(compressed_gpu.compressed_attention, **options, config=small_config(parts=2, key_parts=2)),
        functools.partial(compressed_reference.compressed_attention, **options),
        q,
        k,
        v,
        do,
        dlse,
    )


def test_prefix_of_few_tokens_whose_heads_share_a_tile():
    batch, texts, queries, heads, group, size, keys = 2, 1, 3, 1, 7, 64, 139
    rows = (batch, texts, queries, heads, group, size)
    lengths = (139, 100)
    q, do = (draw(rows, seed, jnp.bfloat16) for seed in (0, 3))
    # The third query of the first row sees no key.
    q, do = (x.at[0, 0, 2].set(jnp.nan) for x in (q, do))
    k, v = (draw((batch, keys, heads, size), seed, jnp.bfloat16, lengths) for seed in (1, 2))
    dlse = draw(rows[:-1], 4, jnp.float32)
    visible = jnp.array([[[139, 50, 0]], [[70, 1, 120]]])
    arguments = (visible, jnp.array(lengths))
    compare(
        lambda q, k, v, interpret: prefix_gpu.prefix_attention(
            q, k, v, *arguments, config=small_config(tokens=8, consumers=1, parts=2), interpret=interpret
        ),
        lambda q, k, v: prefix_reference.prefix_attention(q, k, v, *arguments),
        q,
        k,
        v,
        do,
        dlse,
    )


def lowered(attend, q, k):
    """The text of the forward and backward pass, lowered for CUDA."""

    def both(q, k, v, do, length):
        results, back = jax.vjp(lambda q, k, v: attend(q, k, v, length), q, k, v)
        return *results, *back((do, results[1]))

    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    return jax.jit(both).trace(q, k, k, q, length).lower(lowering_platforms=("cuda",)).as_text()


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)


@pytest.mark.parametrize("operation", ["compressed", "window", "decode"])
def test_the_published_shapes_lower_for_hopper(operation):
    tokens = 131_072

    def attend(q, k, v, length):
        if operation == "compressed":
            return compressed_gpu.compressed_attention(q, k, v, block_size=64, q_offset=length[0], lengths=length)
        if operation == "window":
            return window_gpu.window_attention(q, k, v, window_size=256, q_offset=length[0], lengths=length)
        return prefix_gpu.prefix_attention(q, k, v, length[None, None], length)

    q = shape(1, 1, 1, 4, 7, 128) if operation == "decode" else shape(1, tokens, 4, 7, 128)
    k = shape(1, tokens // 64 if operation == "compressed" else tokens, 4, 128)
    assert lowered(attend, q, k).count("mosaic_gpu") >= 3


def test_shared_memory_holds_what_the_heuristic_asks_for():
    for size in (64, 128):
        for queries, keys, window in ((65536, 65536, 256), (65536, 1024, None), (256, 131072, None), (1, 131072, None)):
            config = heuristic(queries, keys, 4, 7, size, window)
            statistics = 3 * 1024
            assert max(config.shared_memory(size).values()) + statistics <= gpu.SHARED_MEMORY


def test_work_is_split_so_that_hardly_a_multiprocessor_waits():
    assert split(100_000, 64) == 1
    # One decoded token of 4 KV heads: 33 parts of each fill the device once.
    assert split(4, 256) == 33
    parts = split(56, 256)
    assert -(-56 * parts // MULTIPROCESSORS) * MULTIPROCESSORS <= 1.03 * 56 * parts


@pytest.mark.parametrize("tokens", [64, 8])
def test_tiles_hold_one_value_per_query(tokens):
    tiles = Tiles(batch=2, queries=70, heads=2, group=3, tokens=tokens)
    x = jnp.arange(2 * 70 * 2 * 3, dtype=jnp.float32).reshape(2, 70, 2, 3) + 1
    packed = tiles.pack(x, 0.0)
    assert packed.shape == (4, tiles.count, 64)
    np.testing.assert_array_equal(tiles.unpack(packed), x)
    np.testing.assert_array_equal(packed[1] == 0, tiles.absent_rows())
    assert int((packed != 0).sum()) == x.size
    ends = tiles.row_ends(jnp.arange(140).reshape(2, 70))
    token = (np.asarray(packed[0]).reshape(tiles.stripes, tiles.heads_apart, 64)[:, 0] - 1) // 6
    there = token >= 0
    np.testing.assert_array_equal(np.asarray(ends[0])[there], token[there])


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_hold_each_visible_pair_once_and_masks_where_they_are_needed(window, parts):
    queries, keys, group = 300, 410, 2
    tiles = Tiles(batch=1, queries=queries, heads=1, group=group, tokens=64)
    end = np.clip(np.arange(queries) + 90, 0, keys)
    end[280:] = 0
    start = np.zeros_like(end) if window is None else np.maximum(end - window, 0)
    key = np.arange(keys)
    sees = (key < end[:, None]) & (key >= start[:, None])
    ends = tiles.row_ends(jnp.asarray(end)[None])

    count = np.zeros((queries, group, keys), int)
    config = QueryConfig(128, 2, 2, parts)
    items = np.asarray(gpu_flash_plan.query_items(config, tiles, ends, window))
    for place, (begin, steps, whole_from, whole_to, full) in enumerate(items):
        for c in range(2):
            tile = tiles.count - 1 - place // parts * 2 - c
            if tile < 0:
                continue
            token = slice(tile // group * 64, tile // group * 64 + 64)
            assert 0 <= whole_from <= whole_to <= full <= steps
            for step in range(steps):
                column = slice(begin + 128 * step, begin + 128 * step + (128 if step < full else 64))
                count[token, tile % group, column] += 1
                if whole_from <= step < whole_to:
                    assert sees[token, column].all()
    assert (count[sees[:, None].repeat(group, 1)] == 1).all()

    count[:] = 0
    items = np.asarray(gpu_flash_plan.key_items(KeyConfig(2, parts), tiles, ends, window, keys))
    for place, (first, steps, *places) in enumerate(items):
        for c in range(2):
            column = slice((place // parts * 2 + c) * 64, (place // parts * 2 + c + 1) * 64)
            begin, whole_from, whole_to, last = places[4 * c : 4 * c + 4]
            assert 0 <= begin <= whole_from <= whole_to <= last <= steps
            for step in range(begin, last):
                tile = first + step
                token = slice(tile // group * 64, tile // group * 64 + 64)
                count[token, tile % group, column] += 1
                if whole_from <= step < whole_to:
                    assert sees[token, column].all()
    assert (count[sees[:, None].repeat(group, 1)] == 1).all()


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
        window_gpu.window_attention(q, k, k, window_size=2, q_offset=0, lengths=None)


def test_another_device_is_named():
    q, k = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    message = r"needs a Hopper GPU .compute capability 9.0., not platform 'cpu'"
    with pytest.raises(NotImplementedError, match=message):
        window_attention(q, k, k, window_size=2, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=message):
        compressed_attention(q, k, k, block_size=2, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=message):
        prefix_attention(q[None], k, k, jnp.ones((1, 1, 4), jnp.int32), implementation="mosaic_gpu")


def test_nothing_to_attend_to():
    q, k = jnp.zeros((1, 3, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 0, 1, 64), jnp.bfloat16)
    o, lse = window_gpu.window_attention(q, k, k, window_size=2, q_offset=0, lengths=jnp.array([0]))
    assert not o.any()
    assert (lse == EMPTY_LSE).all()
