"""The Hopper kernels of selected attention: interpreted on the CPU against the reference, and lowered without a GPU."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from selected_cases import BLOCK, compare, draw, draw_choice

from pallas_kernels import gpu, selected_attention
from pallas_kernels.block_words import words_of
from pallas_kernels.selected_attention import gpu_config, gpu_lists, mosaic_gpu
from pallas_kernels.specs import SPECS


def small_config(consumers=2, part=8, registers=0, share=8):
    tiles = gpu_config.TileConfig(2, consumers, registers)
    forward = gpu_config.TileConfig(2, consumers, registers, share)
    return gpu_config.Config(forward=forward, dq=tiles, dkdv=gpu_config.BlockConfig(2, part))


def compare_interpreted(*shape, config, races=False, **sizes):
    interpret = plgpu.InterpretGPUParams(detect_races=races)
    compare(functools.partial(mosaic_gpu.selected_attention, config=config, interpret=interpret), *shape, **sizes)
    if races:
        assert not gpu_callbacks.get_races().races_found


def test_ragged_rows_later_queries_and_split_lists():
    compare_interpreted(
        jnp.bfloat16,
        7,
        64,
        batch=2,
        queries=21,
        keys=150,
        places=2,
        q_offset=129,
        lengths=(150, 139),
        config=small_config(),
    )


def test_no_races():
    compare_interpreted(
        jnp.bfloat16,
        7,
        64,
        queries=18,
        keys=90,
        places=2,
        q_offset=70,
        config=small_config(registers=64),
        races=True,
    )


def test_three_warpgroups():
    compare_interpreted(
        jnp.float16,
        1,
        64,
        heads=2,
        queries=40,
        keys=200,
        places=3,
        q_offset=150,
        config=small_config(consumers=3),
        races=True,
    )


def test_tokens_without_gaps_between_their_rows():
    compare_interpreted(
        jnp.bfloat16,
        7,
        128,
        batch=2,
        queries=29,
        keys=150,
        places=2,
        q_offset=110,
        lengths=(139, 131),
        config=small_config(share=9),
        races=True,
    )


def test_wide_heads_and_whole_lists():
    compare_interpreted(
        jnp.bfloat16,
        8,
        128,
        queries=33,
        keys=97,
        places=1,
        q_offset=64,
        config=small_config(part=64),
    )


@pytest.mark.parametrize("others", [0, 2])
def test_the_output_is_summed_with_other_branches(others):
    """The gated sum of the kernel's own output, unrounded, and of others'."""
    queries, keys, length = 21, 130, jnp.array([126])
    q, *outputs = (draw((1, queries, 1, 7, 64), seed, jnp.bfloat16) for seed in range(others + 1))
    k, v = (mosaic_gpu.whole_blocks(draw((1, keys, 1, 64), seed, jnp.bfloat16), None) for seed in (5, 6))
    gates = tuple(jnp.abs(draw(q.shape[:-1], 10 + i, jnp.float32)) for i in range(others + 1))
    index = jnp.asarray(draw_choice(1, queries, 1, 2, keys - queries, keys, 3))
    chosen = gpu_lists.visible_choice(index, length, keys - queries, keys, BLOCK)
    config = small_config(registers=64 * (others > 0), share=9).forward
    lists = gpu_lists.tile_lists(chosen, length, keys - queries, keys, BLOCK, config.tokens)
    run = jax.jit(
        functools.partial(mosaic_gpu.forward, config, plgpu.InterpretGPUParams(detect_races=others > 0)),
    )
    o, lse = run(q, k, v, lists)
    total, same_lse = run(q, k, v, lists, mosaic_gpu.Gated(gates, tuple(outputs)))
    expected = sum(gate[..., None] * x.astype(jnp.float32) for gate, x in zip(gates, (o, *outputs), strict=True))
    np.testing.assert_array_equal(lse, same_lse)
    # bfloat16 keeps 8 bits: one rounding of the sum, one of the own output in what it is compared with.
    assert jnp.linalg.norm(total.astype(jnp.float32) - expected) <= 6e-3 * jnp.linalg.norm(expected)
    assert not gpu_callbacks.get_races().races_found


def lowered(spec, config=None):
    q, k, v, _ = spec.shapes
    index = jax.ShapeDtypeStruct((*q.shape[:3], spec.block_count), jnp.int32)

    def both(q, k, v, index, do, offset):
        results, back = jax.vjp(
            lambda q, k, v: mosaic_gpu.selected_attention(
                q, k, v, index, block_size=spec.block_size, q_offset=offset, lengths=None, config=config
            ),
            q,
            k,
            v,
        )
        return *results, *back((do, results[1]))

    offset = jax.ShapeDtypeStruct((), jnp.int32)
    return jax.jit(both).trace(q, k, v, index, q, offset).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("tiles", [(5, 3, 0), (4, 2, 128), (4, 3, 64)])
def test_other_configurations_lower_for_hopper(tiles):
    spec = next(spec for spec in SPECS if spec.name.startswith("7B, 128K"))
    stages, consumers, q_registers = tiles
    tile = gpu_config.TileConfig(stages, consumers, q_registers)
    held = min(q_registers, 64)
    dq = gpu_config.TileConfig(3, consumers, held)
    config = gpu_config.Config(tile, dq, gpu_config.BlockConfig(4, 4096))
    assert lowered(spec, config).count("mosaic_gpu") >= 3


@pytest.mark.parametrize(
    "spec", [s for s in SPECS if s.name.startswith("7B, 128K") or "3B" in s.name], ids=lambda s: s.name
)
def test_the_published_shapes_lower_for_hopper(spec):
    text = lowered(spec)
    assert text.count("mosaic_gpu") >= 3


def test_shared_memory_holds_what_the_heuristic_asks_for():
    for size in (64, 128):
        config = gpu_config.heuristic(4096, 4, size)
        assert max(config.shared_memory(size).values()) <= gpu.SHARED_MEMORY


def test_blocks_of_a_tile_ascend_and_carry_the_masks():
    index = np.full((1, 20, 1, 3), -1, np.int32)
    index[0, :, 0, 0] = 1
    index[0, 3, 0, 1] = 0
    index[0, 17, 0, 1:] = (0, 2)
    chosen = gpu_lists.visible_choice(jnp.asarray(index), jnp.array([90]), 70, 90, BLOCK)
    lists = gpu_lists.tile_lists(chosen, jnp.array([90]), 70, 90, BLOCK, tokens=16)
    first, second = np.asarray(lists.entries).reshape(2, -1)[:, :6]
    np.testing.assert_array_equal(first, [0, 1 << 3, 1, 0xFFFF, 0, 0])
    # Block 2 begins past the last query and past the last key.
    np.testing.assert_array_equal(second, [0, 1 << 1, 1, 0b1111, 0, 0])
    # Counts, blocks seen whole, first absolute query, last query below the length.
    np.testing.assert_array_equal(lists.tiles[0], [[2, 1, 70, 19], [2, 1, 86, 19]])


@pytest.mark.parametrize("tokens", [16, 24])
def test_lists_from_words_are_those_from_indices(tokens):
    batch, queries, heads, places, offset, keys = 2, 53, 2, 3, 2100, 2150
    index = draw_choice(batch, queries, heads, places, offset, keys, 5)
    length = jnp.array([2150, 2120])
    chosen = gpu_lists.visible_choice(jnp.asarray(index), length, offset, keys, BLOCK)
    words = jnp.swapaxes(words_of(chosen, -(-keys // BLOCK)), 1, 2)
    expected = gpu_lists.tile_lists(chosen, length, offset, keys, BLOCK, tokens)
    actual = gpu_lists.tile_lists_from_words(words, places, length, offset, keys, BLOCK, tokens)
    np.testing.assert_array_equal(actual.entries, expected.entries)
    np.testing.assert_array_equal(actual.tiles, expected.tiles)


@pytest.mark.parametrize("one_sort", [True, False])
def test_lists_of_a_block_hold_its_queries_in_order(monkeypatch, one_sort):
    if not one_sort:
        monkeypatch.setattr(gpu_lists, "SORT_KEYS", 0)
    batch, queries, heads, places, keys, part = 2, 150, 2, 2, 150, 16
    index = draw_choice(batch, queries, heads, places, 0, keys, 1)
    length = jnp.array([150, 101])
    chosen = gpu_lists.visible_choice(jnp.asarray(index), length, 0, keys, BLOCK)
    lists = gpu_lists.block_lists(chosen, 0, keys, BLOCK, part)
    found = {}
    slots = []
    for row, block, begin, end, partial_end, slot, origin in np.asarray(lists.items).tolist():
        if row < 0:
            continue
        assert end - begin <= part
        assert origin == block * BLOCK
        tokens = np.asarray(lists.tokens)[begin:end].tolist()
        assert [t < origin + BLOCK - 1 for t in tokens] == [begin + i < partial_end for i in range(len(tokens))]
        found.setdefault((row, block), []).extend(tokens)
        slots.append(slot)
    for b, n, block in np.ndindex(batch, heads, 3):
        expected = [t for t in range(int(length[b])) if block in index[b, t, n]]
        assert found[b * heads + n, block] == expected
    used = sorted(slot for slot in slots if slot >= 0)
    assert used == list(range(len(used)))
    assert len(used) <= lists.slots


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, "bfloat16 and float16, not float32"),
        ({"size": 32}, "head sizes 64 and 128, not 32"),
        ({"group": 9}, "at most 8 query heads per KV head, not 9"),
        ({"block": 32}, "block_size 64, not 32"),
    ],
)
def test_calls_that_the_kernels_do_not_cover_say_why(change, message):
    sizes = {"dtype": jnp.bfloat16, "size": 64, "group": 7, "block": 64} | change
    q = jnp.zeros((1, 4, 1, sizes["group"], sizes["size"]), sizes["dtype"])
    k = jnp.zeros((1, 4, 1, sizes["size"]), sizes["dtype"])
    with pytest.raises(NotImplementedError, match=message):
        mosaic_gpu.selected_attention(
            q, k, k, jnp.zeros((1, 4, 1, 1), jnp.int32), block_size=sizes["block"], q_offset=0, lengths=None
        )


def test_another_device_is_named():
    q, k = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"needs a Hopper GPU .compute capability 9.0., not platform 'cpu'"):
        selected_attention(q, k, k, jnp.zeros((1, 4, 1, 1), jnp.int32), block_size=64, implementation="mosaic_gpu")


def test_registers_that_the_assembler_loses_are_refused():
    q, k = jnp.zeros((1, 4, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 4, 1, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="q_registers 64 at head size 64"):
        mosaic_gpu.selected_attention(
            q,
            k,
            k,
            jnp.zeros((1, 4, 1, 1), jnp.int32),
            block_size=64,
            q_offset=0,
            lengths=None,
            config=small_config(registers=64),
        )


def test_nothing_to_attend_to():
    q, k = jnp.zeros((1, 3, 1, 2, 64), jnp.bfloat16), jnp.zeros((1, 0, 1, 64), jnp.bfloat16)
    o, lse = mosaic_gpu.selected_attention(
        q, k, k, jnp.zeros((1, 3, 1, 1), jnp.int32), block_size=64, q_offset=0, lengths=jnp.array([0])
    )
    assert not o.any()
    assert (lse == -1e30).all()
