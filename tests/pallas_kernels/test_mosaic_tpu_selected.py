"""Selected attention for TPU, interpreted, against the reference in float32.

Values to 1e-5 and gradients to 1e-4 of the largest entry: some hundred roundings of float32 (6e-8).
"""

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CORNERS, Case, assert_close
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from benchmarks import tpu_cases, tpu_trips
from pallas_kernels import nsa_attention, nsa_tpu, selected_attention, tile_lists, tpu
from pallas_kernels.selected_attention import mosaic_tpu_forward, mosaic_tpu_steps

CHECK = Path(__file__).with_name("sharded_tpu_check.py")


@pytest.fixture(autouse=True)
def short_steps(request):
    """Compiling an interpreted step takes longer the more blocks it holds."""
    with mock.patch.object(mosaic_tpu_steps, "STEP_KEYS", 1024 if "whole_steps" in request.keywords else 128):
        yield


@contextlib.contextmanager
def vmem(bytes_):
    with mock.patch.object(tpu, "_SMALLEST", dataclasses.replace(tpu.CHIPS["v5p"], vmem_bytes=bytes_)):
        yield


CASES = {
    "ragged": Case(B=2, T=77, S=150, N=1, G=2, D=64, s=32, n=3, q_offset=70, lengths=(150, 101)),
    "group of 7, T not a multiple": Case(B=1, T=150, S=150, N=2, G=7, D=64, s=64, n=2),
    "empty row": Case(B=2, T=35, S=35, N=1, G=1, D=64, s=32, n=2, lengths=(0, 35)),
    "wide blocks": Case(B=1, T=20, S=300, N=1, G=8, D=64, s=128, n=2, q_offset=280),
}


def chosen(case, *, sinks=False, duplicates=False):
    """Any blocks, the current one among them or not, with holes; the future ones are to be ignored."""
    generator = np.random.default_rng(case.seed)
    blocks = -(-case.S // case.s)
    indices = np.full((case.B, case.T, case.N, case.n), -1, np.int32)
    for row in np.ndindex(*indices.shape[:3]):
        taken = generator.permutation(blocks)[: generator.integers(0, case.n + 1)]
        indices[row][: len(taken)] = taken
    if sinks:
        indices[..., 0] = 0
    if duplicates:
        indices[..., -1] = indices[..., 0]
    return indices


def prepared(case, indices, implementation, dtype=jnp.float32):
    """A function that gives o, lse, dq, dk and dv, compiled on its first call."""
    arrays = [jnp.asarray(x, dtype) for x in (case.queries(), *case.keys())]
    do, dlse = case.cotangents()
    cotangents = jnp.asarray(do, dtype), jnp.asarray(dlse)

    @jax.jit
    def compiled(arrays, cotangents, q_offset):
        def run(q, k, v):
            options = {"q_offset": q_offset, "lengths": case.array_lengths, "implementation": implementation}
            return selected_attention(q, k, v, indices, block_size=case.s, **options)

        results, pull = jax.vjp(run, *arrays)
        return *results, *pull(cotangents)

    return lambda: compiled(arrays, cotangents, case.q_offset)


def check(case, indices, dtype=jnp.float32, value=1e-5, gradient=1e-4):
    actual = prepared(case, indices, "mosaic_tpu", dtype)()
    expected = prepared(case, indices, "reference", dtype)()
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, gradient if name[0] == "d" else value, name)
    np.testing.assert_array_equal(actual[1] == -1e30, expected[1] == -1e30)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case):
    check(case, chosen(case))


@pytest.mark.slow
@pytest.mark.parametrize("name", CORNERS)
def test_corners(name):
    case = dataclasses.replace(CORNERS[name], D=64, s=32)
    check(case, chosen(case))


@pytest.mark.slow
@pytest.mark.whole_steps
def test_steps_of_released_length():
    case = Case(B=1, T=40, S=240, N=1, G=7, D=128, s=64, n=3, q_offset=200)
    check(case, chosen(case))


def test_a_block_that_every_query_chose_and_one_named_twice():
    case = CASES["ragged"]
    check(case, chosen(case, sinks=True, duplicates=True))


def test_keys_in_several_chunks():
    """The memory of two chunks of 256 keys forward, and of four of 128 backward."""
    case = Case(B=1, T=150, S=400, N=1, G=2, D=64, s=32, n=5, q_offset=250, lengths=(390,))
    q = jnp.zeros((1, 150, 1, 2, 64))
    with vmem(1_720_000):
        chunks = [mosaic_tpu_steps.make_plan("test", q, 400, 13, 32, backward=x).chunks for x in (False, True)]
        assert chunks == [2, 4]
        check(case, chosen(case, sinks=True))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("keys", [1000, 1025, 5000])
def test_every_chunk_holds_keys(keys, backward):
    with vmem(1_200_000):
        plan = mosaic_tpu_steps.make_plan("test", jnp.zeros((1, 8, 1, 1, 64)), keys, 5, 32, backward=backward)
    assert plan.chunks > 1
    assert (plan.chunks - 1) * plan.chunk_keys < keys <= plan.chunks * plan.chunk_keys


def test_queries_before_a_chunk_of_keys():
    """The first 128 queries read nothing of the last chunks: their results pass through."""
    case = Case(B=2, T=270, S=270, N=1, G=1, D=64, s=32, n=3, lengths=(270, 120))
    with vmem(1_000_000):
        q = jnp.zeros((1, 270, 1, 1, 64))
        chunks = [mosaic_tpu_steps.make_plan("test", q, 270, 9, 32, backward=x).chunks for x in (False, True)]
        assert chunks == [2, 3]
        check(case, chosen(case))


def test_four_steps_a_body(monkeypatch):
    """The loop of v6e, which the interpreter does not aim at by itself."""
    monkeypatch.setattr(mosaic_tpu_forward, "body_steps", lambda: 4)
    check(CASES["ragged"], chosen(CASES["ragged"], sinks=True))


def test_bfloat16_keeps_float32_sums():
    """2e-2 is some roundings of bfloat16 (4e-3) in the queries' scale, the weights, the output and the products."""
    check(CASES["empty row"], chosen(CASES["empty row"]), jnp.bfloat16, value=2e-2, gradient=2e-2)


@pytest.mark.parametrize(("T", "S", "n"), [(0, 40, 2), (3, 0, 2), (5, 40, 0)])
def test_nothing_to_attend_to(T, S, n):
    q, k = jnp.ones((1, T, 2, 3, 64)), jnp.ones((1, S, 2, 64))
    o, lse = selected_attention(
        q, k, k, jnp.full((1, T, 2, n), -1), block_size=32, q_offset=S, implementation="mosaic_tpu"
    )
    np.testing.assert_array_equal(o, np.zeros(q.shape))
    np.testing.assert_array_equal(lse, np.full(q.shape[:-1], np.float32(-1e30)))


def test_results_are_the_same_bits_twice():
    case = CASES["ragged"]
    run = prepared(case, chosen(case, sinks=True), "mosaic_tpu")
    jax.tree.map(np.testing.assert_array_equal, run(), run())


@contextlib.contextmanager
def race_detection():
    """Runs kernels by the simulator of transfers, which fills what nobody wrote with NaN."""
    try:
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            yield
        assert not interpreter.races.races_found
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def test_no_races():
    case = Case(B=1, T=3, S=40, N=1, G=1, D=64, s=32, n=2, q_offset=37)
    with race_detection():
        check(case, chosen(case))


@pytest.mark.slow
def test_no_races_between_chunks():
    case = Case(B=1, T=3, S=200, N=1, G=1, D=64, s=32, n=3, q_offset=197)
    with vmem(1_100_000), race_detection():
        assert mosaic_tpu_steps.make_plan("test", jnp.zeros((1, 3, 1, 1, 64)), 200, 7, 32, backward=True).chunks > 1
        check(case, chosen(case))


def test_tile_lists():
    generator = np.random.default_rng(0)
    indices = generator.integers(-1, 9, (2, 37, 2, 5)).astype(np.int32)
    readable = (indices >= 0) & (generator.random(indices.shape) < 0.8)
    lists = jax.jit(lambda x, y: tile_lists.build(x, y, blocks=9))(indices, readable)
    assert lists.entries.shape == (2, 2, 3, 9)
    for b, n, tile in np.ndindex(2, 2, 3):
        masks = {}
        for t in range(16 * tile, min(16 * tile + 16, 37)):
            for block in indices[b, t, n][readable[b, t, n]]:
                masks[block] = masks.get(block, 0) | 1 << (t % 16)
        expected = [block << 16 | masks[block] for block in sorted(masks)]
        assert lists.counts[b, n, tile] == len(expected)
        np.testing.assert_array_equal(lists.entries[b, n, tile], expected + [0] * (9 - len(expected)))
        assert lists.before(4)[b, n, tile] == sum(block < 4 for block in masks)


def test_the_whole_attention():
    case = Case(B=1, T=75, S=75, N=1, G=2, D=64, s=32, n=2, w=20, lengths=(70,))
    q, (k, v) = case.queries(), case.keys()
    gates, do = case.draw(1, 75, 1, 2, 3), case.poison(case.draw(*q.shape)[::-1].copy(), 0)

    def run(name):
        def loss(*arrays):
            options = {"block_size": 32, "block_count": 2, "window_size": 20, "lengths": case.array_lengths}
            o = nsa_attention(*arrays, implementation=name, **options)
            return (o * np.nan_to_num(do)).sum(), o

        (_, o), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(q, k, v, gates)
        return o, *gradients

    for name, x, y in zip(("o", "dq", "dk", "dv", "dgates"), run("mosaic_tpu"), run("reference"), strict=True):
        assert_close(x, y, 1e-4, name)


@pytest.mark.parametrize("branches", [("compressed", "selected", "window"), ("selected",)], ids=["all", "selected"])
def test_the_whole_attention_on_one_copy_of_the_queries(branches):
    """Two tiles of the layout and a part of a third, keys before the first query, rows past their lengths."""
    case = Case(B=2, T=260, S=270, N=2, G=2, D=64, s=32, n=2, w=20, lengths=(270, 200), q_offset=10)
    q, (k, v) = case.queries(), case.keys()
    gates, do = case.draw(2, 260, 2, 2, 3), case.poison(case.draw(*q.shape)[::-1].copy(), 10)

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, q_offset):
        def attention(*arrays):
            options = {"block_size": 32, "block_count": 2, "window_size": 20, "lengths": case.array_lengths}
            return nsa_attention(*arrays, implementation=name, branches=branches, q_offset=q_offset, **options)

        o, pull = jax.vjp(attention, q, k, v, gates)
        return o, *pull(jnp.asarray(do))

    with mock.patch.object(nsa_tpu, "attention", wraps=nsa_tpu.attention) as composed:
        actual = run("mosaic_tpu", 10)
    composed.assert_called_once()
    for name, x, y in zip(("o", "dq", "dk", "dv", "dgates"), actual, run("reference", 10), strict=True):
        assert_close(x, y, 1e-4, name)


@pytest.mark.slow
def test_two_devices_compute_what_one_does():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(CHECK.parents[2]),
    }
    result = subprocess.run(
        [sys.executable, str(CHECK)], env=environment, capture_output=True, text=True, timeout=550, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["context", "tensor"]


def kernels_in(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation.params
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernels_in(inner)


@pytest.mark.parametrize(("case", "count"), [("nsa train 8192", 13), ("prefix train 8192", 3)])
def test_every_kernel_states_its_cost(case, count):
    """All name the bytes they move, and those that compute at least one product of D = 128 per exponential."""
    with tpu.compiling_for("v6e"):
        function, shapes = tpu_cases.build(case)
        kernels = list(kernels_in(jax.make_jaxpr(function)(*shapes).jaxpr))
    assert len(kernels) == count
    for kernel in kernels:
        cost, moves_only = kernel["cost_estimate"], kernel["name"] in {*tpu_trips.LAYOUT_ARRAYS, "tile_lists"}
        moved = sum(x.size * x.dtype.itemsize for x in kernel["out_avals"])
        assert cost.bytes_accessed > moved
        assert moves_only or cost.flops >= 2 * 128 * cost.transcendentals > 0


def trace(T=8, S=64, G=2, D=64, n=2, block_size=32, dtype=jnp.bfloat16):
    q, k = jax.ShapeDtypeStruct((1, T, 1, G, D), dtype), jax.ShapeDtypeStruct((1, S, 1, D), dtype)
    indices = jax.ShapeDtypeStruct((1, T, 1, n), jnp.int32)

    def run(q, k, v, indices):
        return selected_attention(q, k, v, indices, block_size=block_size, implementation="mosaic_tpu")

    return jax.eval_shape(run, q, k, k, indices)


def test_what_is_not_covered_is_refused_with_what_is():
    with pytest.raises(NotImplementedError, match="selected_attention on TPU has D = 32, supported are 64 and 128"):
        trace(D=32)
    with pytest.raises(NotImplementedError, match="has dtype float16, supported are bfloat16 and float32"):
        trace(dtype=jnp.float16)
    with pytest.raises(NotImplementedError, match="has G = 9, supported are 1 to 8"):
        trace(G=9)
    with pytest.raises(NotImplementedError, match="has block_size 16, supported are 32, 64, 128"):
        trace(block_size=16)
    with pytest.raises(NotImplementedError, match="has 40000 blocks of keys, supported are at most 32767"):
        trace(S=40_000 * 32)


def test_memory_that_a_chip_lacks_is_refused_with_the_sum():
    with pytest.raises(NotImplementedError, match=r"needs \d+ bytes of SMEM for twice 8 lists of \d+ places, v5p has"):
        trace(S=32_000 * 32, n=700)
    with (
        vmem(2**20),
        pytest.raises(NotImplementedError, match=r"needs [\d.]+ MiB of VMEM \(queries and outputs [\d.]+ \+ a step"),
    ):
        trace(G=8, D=128)
