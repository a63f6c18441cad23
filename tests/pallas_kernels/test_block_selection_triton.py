"""The Triton kernels of block selection: interpreted on the CPU against the reference, compiled without a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter

from pallas_kernels import block_selection
from pallas_kernels.block_selection import reference, triton
from pallas_kernels.block_selection.choice import choose_blocks
from pallas_kernels.block_selection.triton_config import Config, power_of_two
from pallas_kernels.block_words import WORD, indices_of
from pallas_kernels.common import EMPTY_LSE

pytest.importorskip("triton", reason="Triton comes with the extra 'gpu', for Linux on x86-64 alone")

BLOCK = 8


def draw(batch, queries, heads, group, size, q_offset, dtype):
    """Queries, block means and the compression branch's log-sum-exp."""
    rng = np.random.default_rng([batch, queries, group, size])
    blocks = (queries + q_offset) // BLOCK
    q = jnp.asarray(rng.standard_normal((batch, queries, heads, group, size)), dtype)
    means = jnp.asarray(rng.standard_normal((batch, blocks, heads, size)), dtype)
    logits = jnp.einsum("btngd,bmnd->btngm", q.astype(jnp.float32), means.astype(jnp.float32)) * size**-0.5
    t = q_offset + jnp.arange(queries)
    seen = ((jnp.arange(blocks) + 1) * BLOCK - 1 <= t[:, None])[:, None, None]
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return q, means, jnp.where(seen.any(-1), lse, EMPTY_LSE)


def test_ragged_rows_later_queries_and_several_chunks():
    batch, queries, offset, lengths = 2, 20, 530, (545, 532)
    q, means, lse = draw(batch, queries, 1, 7, 64, offset, jnp.bfloat16)
    options = {
        "block_size": BLOCK,
        "block_count": 5,
        "init_blocks": 1,
        "local_blocks": 2,
        "q_offset": jnp.int32(offset),
        "lengths": jnp.asarray(lengths, jnp.int32),
    }
    expected = reference.block_selection(q, means, lse, **options)
    past = (offset + np.arange(queries) >= np.asarray(lengths)[:, None])[:, :, None, None]
    q, lse = jnp.where(past[..., None], jnp.nan, q), jnp.where(past, jnp.nan, lse)
    config = Config(tokens=16, columns=32, row_values=8, score_bytes=4 * 2 * 96 * 16)
    assert config.chunk(queries, batch, 96) == 16
    with triton_interpreter.interpreted():
        chosen = jax.block_until_ready(triton.block_selection(q, means, lse, **options, config=config))
    np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize(("init", "local", "places"), [(0, 1, 4), (2, 3, 5), (1, 2, 32)])
def test_the_best_of_any_scores(init, local, places):
    blocks, queries = 100, 6
    rng = np.random.default_rng(places)
    kinds = [
        rng.random((queries, blocks)),
        np.exp(rng.uniform(-80, 60, (queries, blocks))),
        rng.integers(0, 3, (queries, blocks)) / 8,
        np.where(rng.random((queries, blocks)) < 0.03, rng.random((queries, blocks)), 0.0),
        np.full((queries, blocks), 0.25),
        np.zeros((queries, blocks)),
    ]
    score = np.stack(kinds).astype(np.float32)
    current = jnp.asarray(rng.integers(-1, blocks, queries), jnp.int32)[None]
    expected = choose_blocks(
        jnp.asarray(score).swapaxes(0, 1)[None],
        current,
        current >= 0,
        block_size=1,
        block_count=places,
        init_blocks=init,
        local_blocks=local,
    )
    words = -(-blocks // WORD)
    padded = jnp.asarray(np.pad(score, [(0, 0), (0, 0), (0, words * WORD - blocks)], constant_values=np.nan))
    with triton_interpreter.interpreted():
        chosen = triton.choose(
            Config(row_values=8), padded, current, jnp.zeros(1, jnp.int32), words, places, init, local
        )
        chosen = jax.block_until_ready(chosen)
    np.testing.assert_array_equal(indices_of(chosen, places), expected)


def test_the_published_shape_compiles_for_hopper():
    q = jax.ShapeDtypeStruct((1, 65_536, 4, 7, 128), jnp.bfloat16)
    means = jax.ShapeDtypeStruct((1, 1024, 4, 128), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
    options = {"block_size": 64, "block_count": 32, "init_blocks": 0, "local_blocks": 1, "q_offset": 0, "lengths": None}
    launches = triton_interpreter.launches(lambda *x: triton.block_selection(*x, **options), q, means, lse)
    importance, choose = map(triton_interpreter.compiled, launches)
    assert "wgmma.mma_async" in importance.ptx
    assert importance.shared_memory <= 227 * 1024
    assert importance.spills == choose.spills == 0


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
    options = {"block_size": 64, "block_count": 2, "init_blocks": 0, "local_blocks": 1, "q_offset": 0, "lengths": None}
    with pytest.raises(NotImplementedError, match=message):
        triton.block_selection(q, q[:, :, :, 0], jnp.zeros(q.shape[:-1]), **options)


def test_another_device_is_named():
    q = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU of compute capability 8\.0 or more"):
        block_selection(
            q, q[:, :0, :, 0], jnp.zeros(q.shape[:-1]), block_size=64, block_count=1, implementation="triton"
        )


def test_queries_before_the_first_complete_block_and_no_queries():
    q = jnp.zeros((1, 3, 1, 2, 64), jnp.bfloat16)
    options = {"block_size": 64, "block_count": 2, "init_blocks": 0, "local_blocks": 1, "q_offset": 0, "lengths": None}
    lse = jnp.full(q.shape[:-1], EMPTY_LSE)
    with triton_interpreter.interpreted():
        chosen = jax.block_until_ready(triton.block_selection(q, q[:, :0, :, 0], lse, **options))
    np.testing.assert_array_equal(chosen, np.broadcast_to([0, -1], (1, 3, 1, 2)))
    assert triton.block_selection(q[:, :0], q[:, :0, :, 0], lse[:, :0], **options).shape == (1, 0, 1, 2)


def test_chunks_are_whole_tiles_within_the_memory_asked_for():
    tile = 4 * 4 * 256 * 64
    assert Config(tokens=64, score_bytes=8 * tile).chunk(64 * 7 + 1, 4, 256) == 64 * 8
    assert Config(tokens=64, score_bytes=7 * tile).chunk(64 * 7 + 1, 4, 256) == 64 * 4
    assert Config(tokens=64, score_bytes=1).chunk(300, 4, 256) == 64
    assert [power_of_two(x) for x in (0, 1, 2, 33)] == [1, 1, 2, 64]
