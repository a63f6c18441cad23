"""Compressed, window and prefix attention and block selection on TPU, interpreted, against the float64 oracle.

The checks and their bounds are test_attention_operations': float32 products are exact to some roundings here too.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CORNERS, Case, assert_close
from jax.experimental.pallas import tpu as pltpu
from test_attention_operations import (
    check_compressed,
    check_prefix,
    check_selection,
    check_window,
    values_and_gradients,
)

from pallas_kernels import (
    block_selection,
    compressed_attention,
    prefix_attention,
    tpu,
    tpu_flash,
    tpu_layout,
    window_attention,
)
from pallas_kernels.compressed_attention import mosaic_tpu as compressed_tpu
from pallas_kernels.prefix_attention import mosaic_tpu as prefix_tpu
from pallas_kernels.window_attention import mosaic_tpu as window_tpu

MODULES = {"compressed": compressed_tpu, "window": window_tpu, "prefix": prefix_tpu}

# The kernels' head sizes are 64 and 128. Below 128 queries, heads and tokens share the lanes.
FEW_QUERIES = {name: dataclasses.replace(CORNERS[name], D=64) for name in ("ragged", "queries without keys")}
# Two tiles of queries, the second one partial, the tiles of keys below, partial blocks and rows that end early.
TILED = Case(B=2, T=150, S=420, N=1, G=3, D=64, s=2, n=5, w=100, q_offset=250, lengths=(391, 260), init=1, local=2)
SEVEN_HEADS = Case(B=1, T=130, S=130, N=1, G=7, D=128, s=4, n=4, w=7)


@contextlib.contextmanager
def small_tiles(operation, queries=128, keys=128, chunk=128):
    with mock.patch.object(MODULES[operation], "_TILES", tpu_flash.Tiles(queries, keys, chunk)):
        yield


@pytest.mark.parametrize("case", FEW_QUERIES.values(), ids=FEW_QUERIES)
@pytest.mark.parametrize("check", [check_compressed, check_window], ids=["compressed", "window"])
def test_few_queries(case, check):
    check(case, "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CORNERS if name not in FEW_QUERIES])
@pytest.mark.parametrize("check", [check_compressed, check_window, check_selection], ids=lambda x: x.__name__)
def test_other_corners(name, check):
    check(dataclasses.replace(CORNERS[name], D=64), "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", CORNERS)
def test_corners_of_prefix_attention(name):
    check_prefix(dataclasses.replace(CORNERS[name], D=64), "mosaic_tpu", rows=2, own_keys=True, length_per_row=True)


def test_few_queries_of_several_rows():
    check_prefix(FEW_QUERIES["ragged"], "mosaic_tpu", rows=2, own_keys=False, length_per_row=False)


def test_a_decoded_token_reads_its_keys_in_place():
    """Rows of 2 heads x 150 keys make three tiles, the last one cut off; NaN lies past what the queries see."""
    case = Case(B=1, T=1, S=150, N=2, G=7, D=64, lengths=(141,))
    with mock.patch.object(prefix_tpu, "_IN_PLACE", tpu_flash.Tiles(128, 128, 128)):
        check_prefix(case, "mosaic_tpu", rows=3, own_keys=True, length_per_row=True)
        q, k, v = case.draw(1, 3, 1, 2, 7, 64), *(x.copy() for x in case.draw(2, 1, 150, 2, 64))
        for x in (k, v):
            x[:, 100:] = np.nan
        visible = np.asarray([[[1], [0], [100]]], np.int32)
        results = prefix_attention(q, k, v, visible, implementation="mosaic_tpu")
    expected = prefix_attention(q, k, v, visible, implementation="reference")
    for x, y in zip(results, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_several_tiles_of_compressed_attention():
    with small_tiles("compressed"):
        check_compressed(TILED, "mosaic_tpu")


def test_keys_that_fit_one_tile_take_one_pass_for_all_gradients():
    check_compressed(TILED, "mosaic_tpu")


def test_several_tiles_of_window_attention():
    with small_tiles("window"):
        check_window(TILED, "mosaic_tpu")


def test_chunks_of_window_attention():
    check_window(dataclasses.replace(SEVEN_HEADS, w=64), "mosaic_tpu")


def test_several_tiles_of_prefix_attention():
    with small_tiles("prefix", keys=256):
        check_prefix(TILED, "mosaic_tpu", rows=1, own_keys=False, length_per_row=True)


@pytest.mark.parametrize(
    "case",
    [FEW_QUERIES["ragged"], dataclasses.replace(CORNERS["more places than blocks"], D=64), TILED],
    ids=["ragged", "more places than blocks", "tiled"],
)
def test_block_selection(case):
    check_selection(case, "mosaic_tpu")


def test_selection_over_several_chunks():
    """700 blocks: three chunks, 22 words."""
    check_selection(Case(B=1, T=140, S=1400, N=1, G=2, D=64, s=2, n=9, q_offset=1255), "mosaic_tpu")


def test_equal_importance_takes_the_lower_block():
    q, k_blocks = np.ones((1, 160, 1, 2, 64), np.float32), np.ones((1, 10, 1, 64), np.float32)
    lse = np.ones((1, 160, 1, 2), np.float32)
    chosen = block_selection(q, k_blocks, lse, block_size=16, block_count=4, implementation="mosaic_tpu")
    np.testing.assert_array_equal(chosen[0, 150, 0], [0, 1, 2, 9])
    np.testing.assert_array_equal(chosen[0, 20, 0], [0, 1, -1, -1])


def test_an_offset_may_be_traced():
    case = Case(B=1, T=23, S=120, N=1, G=2, D=64, q_offset=90)
    q, (k, v) = case.queries(), case.keys()

    def run(offset, implementation="mosaic_tpu"):
        return window_attention(q, k, v, window_size=20, q_offset=offset, implementation=implementation)

    for x, expected in zip(jax.jit(run)(case.q_offset), run(case.q_offset, "reference"), strict=True):
        assert_close(x, expected, 1e-5, "traced offset")


def test_bfloat16_keeps_float32_sums():
    """2e-2 is some roundings of bfloat16 (4e-3) in the probabilities, the output and the products of the gradient."""
    case = dataclasses.replace(SEVEN_HEADS, T=40, S=40, w=64)
    q, (k, v) = case.queries(), case.keys()
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    visible = oracle.window_visible(q, case.S, window_size=64, q_offset=0, lengths=case.oracle_lengths)
    do, dlse = case.cotangents()

    def run(q, k, v):
        return window_attention(q, k, v, window_size=64, implementation="mosaic_tpu")

    (o, lse), gradients = values_and_gradients(run, arrays, (jnp.asarray(do, jnp.bfloat16), dlse))
    arrays64 = [np.asarray(x, np.float64) for x in arrays]
    expected_o, expected_lse = oracle.attend(*arrays64, visible)
    assert o.dtype == jnp.bfloat16
    assert_close(o, expected_o, 1e-2, "o")
    assert_close(lse, expected_lse, 1e-5, "lse")
    expected = oracle.attend_gradient(*arrays64, visible, do.astype(np.float64), dlse.astype(np.float64))
    for x, y in zip(gradients, expected, strict=True):
        assert_close(x, y, 2e-2, "gradient")


@contextlib.contextmanager
def race_detection():
    """Memory, copies and semaphores of a TPU are simulated; uninitialised memory holds NaN."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


TINY = Case(B=1, T=1, S=200, N=1, G=1, D=64, s=1, n=2, w=150, q_offset=199)


def test_no_races_where_gradients_of_queries_and_keys_are_apart():
    with race_detection(), small_tiles("window"):
        check_window(TINY, "mosaic_tpu")


def test_no_races_where_gradients_share_a_pass():
    with race_detection():
        check_compressed(dataclasses.replace(TINY, S=20, q_offset=19), "mosaic_tpu")


def test_no_races_where_keys_lie_in_place():
    case = dataclasses.replace(TINY, S=150, N=2)
    with race_detection(), mock.patch.object(prefix_tpu, "_IN_PLACE", tpu_flash.Tiles(128, 128, 128)):
        check_prefix(case, "mosaic_tpu", rows=1, own_keys=False, length_per_row=False)


def test_no_races_between_layouts():
    draw = np.random.default_rng(0).standard_normal
    q, do = (jnp.asarray(draw((1, 130, 1, 2, 64)), jnp.float32) for _ in range(2))
    gates, valid = jnp.asarray(draw((2, 1, 1, 2, 256)), jnp.float32), jnp.asarray([129])

    def run(q, gates):
        rows = tpu_layout.group_major(130, q, valid)
        return tpu_layout.gated_sum(130, (rows, -rows), tuple(gates), valid)

    with race_detection():
        o, pull = jax.vjp(run, q, gates)
        dq, dgates = pull(do)
    seen = jnp.arange(130)[:, None, None, None] < 129
    weight = jnp.moveaxis((gates[0] - gates[1])[..., :130], 3, 1)[..., None]
    # A difference of two products, each rounded once.
    np.testing.assert_allclose(o, jnp.where(seen, weight * q, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dq, jnp.where(seen, weight * do, 0), rtol=1e-5, atol=1e-6)
    expected = jnp.where(seen, q * do, 0).sum(-1)
    np.testing.assert_allclose(dgates[0, ..., :130], jnp.moveaxis(expected, 1, 3), rtol=1e-5, atol=1e-5)


def test_no_races_in_block_selection():
    case = dataclasses.replace(TINY, S=20, q_offset=19)
    q, (k, _) = case.queries(), case.keys()
    lse = np.zeros(q.shape[:-1], np.float32)
    options = {"block_size": 1, "block_count": 2, "q_offset": 19}
    with race_detection():
        chosen = block_selection(q, k, lse, implementation="mosaic_tpu", **options)
    expected = block_selection(q, k, lse, implementation="reference", **options)
    np.testing.assert_array_equal(chosen, expected)


CALLS = {
    "compressed_attention": lambda q, k, **options: compressed_attention(q, k, k, block_size=4, **options),
    "window_attention": lambda q, k, **options: window_attention(q, k, k, window_size=4, **options),
    "prefix_attention": lambda q, k, **options: prefix_attention(
        q[:, None], k, k, jnp.zeros((1, 1, q.shape[1]), jnp.int32), **options
    ),
    "block_selection": lambda q, k, **options: block_selection(
        q, k, jnp.zeros(q.shape[:-1]), block_size=4, block_count=2, **options
    ),
}


@pytest.mark.parametrize("operation", CALLS)
def test_unsupported_sizes_and_types_name_the_supported(operation):
    def run(D=64, G=2, dtype=jnp.bfloat16):
        q, k = jnp.zeros((1, 8, 1, G, D), dtype), jnp.zeros((1, 8, 1, D), dtype)
        return CALLS[operation](q, k, implementation="mosaic_tpu")

    with pytest.raises(NotImplementedError, match=f"{operation} on TPU has D = 32, supported are 64 and 128"):
        run(D=32)
    with pytest.raises(NotImplementedError, match=f"{operation} on TPU has G = 9, supported are 1 to 8"):
        run(G=9)
    with pytest.raises(NotImplementedError, match=f"{operation} on TPU has dtype float16, supported are bfloat16 and"):
        run(dtype=jnp.float16)


def test_block_means_beyond_the_vector_memory_are_refused_with_the_sum():
    q, k = jax.ShapeDtypeStruct((1, 8, 1, 8, 128), jnp.float32), jax.ShapeDtypeStruct((1, 2**16, 1, 128), jnp.float32)
    sum_of_buffers = (
        r"needs [\d.]+ MiB of VMEM \(queries [\d.]+ \+ block means 64.25 \+ .*v5p has 64 MiB.*may use 57.60"
    )
    with tpu.compiling_for("v5p"), pytest.raises(NotImplementedError, match=f"block_selection {sum_of_buffers}"):
        jax.eval_shape(functools.partial(CALLS["block_selection"], implementation="mosaic_tpu"), q, k)


def test_a_tile_beyond_the_vector_memory_is_refused_with_the_sum():
    q = jax.ShapeDtypeStruct((1, 1, 128, 1, 8, 128), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 2**17, 1, 128), jnp.float32)
    visible = jax.ShapeDtypeStruct((1, 1, 128), jnp.int32)

    def run(q, k, visible):
        return prefix_attention(q, k, k, visible, implementation="mosaic_tpu")

    with (
        tpu.compiling_for("v5e"),
        small_tiles("prefix", keys=2**17, chunk=2**14),
        pytest.raises(NotImplementedError, match=r"prefix_attention needs .* MiB of VMEM \(.*logits.*v5e has 128 MiB"),
    ):
        jax.eval_shape(run, q, k, visible)


def test_an_unknown_chip_lists_the_known_ones():
    with pytest.raises(ValueError, match="chip is 'v3', expected one of v5e, v5p, v6e"), tpu.compiling_for("v3"):
        pass
