"""The Hopper kernels of block selection: interpreted on the CPU against the reference, and lowered without a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels import block_selection, gpu
from pallas_kernels.block_selection import gpu_config, gpu_top_n, mosaic_gpu, reference
from pallas_kernels.block_selection.choice import choose_blocks
from pallas_kernels.block_words import WORD, indices_of, words_of
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.specs import SPECS

BLOCK = 8


def config(stages=2, tiles=1, rows=1, **changes):
    """A chunk has `tiles` tiles of 64 queries, for rows of 128 scores."""
    return gpu_config.Config(stages=stages, score_bytes=4 * rows * 128 * 64 * tiles, **changes)


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


def compare(
    dtype,
    group,
    size,
    *,
    batch=1,
    heads=1,
    queries,
    q_offset,
    places,
    init=0,
    local=1,
    lengths=None,
    config,
    races=False,
):
    q, means, lse = draw(batch, queries, heads, group, size, q_offset, dtype)
    options = {
        "block_size": BLOCK,
        "block_count": places,
        "init_blocks": init,
        "local_blocks": local,
        "lengths": None if lengths is None else jnp.asarray(lengths, jnp.int32),
    }
    expected = reference.block_selection(q, means, lse, q_offset=q_offset, **options)
    if lengths is not None:
        past = (q_offset + np.arange(queries) >= np.asarray(lengths)[:, None])[:, :, None, None]
        q, lse = jnp.where(past[..., None], jnp.nan, q), jnp.where(past, jnp.nan, lse)
    interpret = plgpu.InterpretGPUParams(detect_races=races)

    @jax.jit
    def run(q, means, lse, offset):
        return mosaic_gpu.block_selection(q, means, lse, q_offset=offset, config=config, interpret=interpret, **options)

    np.testing.assert_array_equal(run(q, means, lse, q_offset), expected)
    if races:
        assert not gpu_callbacks.get_races().races_found


def test_ragged_rows_later_queries_and_several_chunks():
    compare(
        jnp.bfloat16,
        7,
        64,
        batch=2,
        queries=70,
        q_offset=1030,
        places=5,
        init=1,
        local=2,
        lengths=(1085, 1050),
        config=config(rows=4, programs=3),
    )


def test_no_races_where_one_thread_block_takes_several_tiles():
    tiles = config(3, 2, columns=64, consumers=2, programs=1)
    compare(jnp.bfloat16, 2, 64, queries=72, q_offset=1000, places=3, config=tiles, races=True)


def test_wide_heads_and_several_rows():
    compare(jnp.float16, 1, 128, heads=2, queries=66, q_offset=0, places=4, config=config(3, 2, 2, columns=64))


def choose(score, current, places, init=0, local=1, row_values=8, variants=4):
    """The choosing kernel on made-up scores [N, T, M] of T = 64, as indices."""
    blocks = score.shape[2]
    words = gpu_config.words_for(blocks)
    score = np.pad(score, [(0, 0), (0, 0), (0, words * WORD - blocks)], constant_values=np.nan)
    current = jnp.asarray(current, jnp.int32)[None]
    chosen = gpu_top_n.choose(
        gpu_config.Config(stages=2, row_values=row_values, variants=variants),
        plgpu.InterpretGPUParams(),
        jnp.asarray(score, jnp.float32),
        words,
        current,
        current.max(axis=1, keepdims=True),
        jnp.zeros(1, jnp.int32),
        block_count=places,
        init_blocks=init,
        local_blocks=local,
    )
    return indices_of(chosen, places)


@pytest.mark.parametrize(("init", "local", "places"), [(0, 1, 4), (2, 3, 5), (1, 2, 32)])
def test_the_best_of_any_scores(init, local, places):
    blocks, queries = 100, 64
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
    current = rng.integers(-1, blocks, queries)
    expected = choose_blocks(
        jnp.asarray(score).swapaxes(0, 1)[None],
        jnp.asarray(current)[None],
        jnp.asarray(current >= 0)[None],
        block_size=1,
        block_count=places,
        init_blocks=init,
        local_blocks=local,
    )
    np.testing.assert_array_equal(choose(score, current, places, init, local), expected)


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.name.startswith("7B, 128K") or "3B" in s.name], ids=lambda s: s.name
)
def test_the_published_shapes_lower_for_hopper(spec):
    q, k, _, _ = spec.shapes
    means = jax.ShapeDtypeStruct((k.shape[0], k.shape[1] // spec.block_size, *k.shape[2:]), k.dtype)
    lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)

    def run(q, means, lse, offset):
        return block_selection_of(spec)(q, means, lse, q_offset=offset)

    offset = jax.ShapeDtypeStruct((), jnp.int32)
    text = jax.jit(run).trace(q, means, lse, offset).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2


def block_selection_of(spec):
    return functools.partial(
        mosaic_gpu.block_selection,
        block_size=spec.block_size,
        block_count=spec.block_count,
        init_blocks=0,
        local_blocks=1,
        lengths=None,
    )


def test_shared_memory_holds_what_the_heuristic_asks_for():
    for size in (64, 128):
        assert gpu_config.heuristic(size).shared_memory(8, size) <= gpu.SHARED_MEMORY - 1024


def test_chunks_are_whole_tiles_within_the_memory_asked_for():
    tile = 4 * 4 * 256 * 64
    assert gpu_config.Config(stages=2, score_bytes=8 * tile).chunk(64 * 7 + 1, 4, 256) == 64 * 8
    assert gpu_config.Config(stages=2, score_bytes=7 * tile).chunk(64 * 7 + 1, 4, 256) == 64 * 4
    assert gpu_config.Config(stages=2, score_bytes=1).chunk(300, 4, 256) == 64
    # 132 thread blocks of 4 rows are 33 tiles.
    assert gpu_config.Config(stages=2, score_bytes=70 * tile).chunk(64 * 100, 4, 256) == 64 * 66
    assert gpu_config.Config(stages=2, score_bytes=60 * tile).chunk(64 * 100, 4, 256) == 64 * 33


def test_words_hold_the_blocks_and_give_them_back_in_order():
    rng = np.random.default_rng(0)
    for blocks, places in ((1, 1), (33, 40), (200, 16)):
        indices = np.full((6, places), -1)
        for row in indices:
            some = rng.permutation(blocks)[: rng.integers(0, places + 1)]
            row[: len(some)] = np.sort(some)
        words = words_of(jnp.asarray(rng.permuted(indices, axis=1)), blocks)
        assert words.shape == (6, -(-blocks // WORD))
        bits = (np.asarray(words)[:, :, None] >> np.arange(WORD)) & 1
        for row, found in zip(indices, bits.reshape(6, -1), strict=True):
            np.testing.assert_array_equal(np.nonzero(found)[0], row[row >= 0])
        np.testing.assert_array_equal(indices_of(words, places), indices)


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
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.block_selection(
            q,
            q[:, :, :, 0],
            jnp.zeros(q.shape[:-1]),
            block_size=64,
            block_count=2,
            init_blocks=0,
            local_blocks=1,
            q_offset=0,
            lengths=None,
        )


def test_another_device_is_named():
    q = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .compute capability 9.0., not platform 'cpu'"):
        block_selection(
            q, q[:, :0, :, 0], jnp.zeros(q.shape[:-1]), block_size=64, block_count=1, implementation="mosaic_gpu"
        )


def test_queries_before_the_first_complete_block_and_no_queries():
    q = jnp.zeros((1, 3, 1, 2, 64), jnp.bfloat16)
    options = {"block_size": 64, "block_count": 2, "init_blocks": 0, "local_blocks": 1, "q_offset": 0, "lengths": None}
    options |= {"config": config(), "interpret": plgpu.InterpretGPUParams()}
    lse = jnp.full(q.shape[:-1], EMPTY_LSE)
    chosen = mosaic_gpu.block_selection(q, q[:, :0, :, 0], lse, **options)
    np.testing.assert_array_equal(chosen, np.broadcast_to([0, -1], (1, 3, 1, 2)))
    assert mosaic_gpu.block_selection(q[:, :0], q[:, :0, :, 0], lse[:, :0], **options).shape == (1, 0, 1, 2)
