"""The benchmark of the kernels: its inputs, its checks, its floors and figures, and the command on a CPU."""

import argparse
import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import bench_kernels, kernel_checks, kernel_plots
from experiments.drawn_cases import draw_choice, trained_tensors, union_size
from experiments.kernel_floors import Unions, floor
from experiments.kernel_operations import OPERATIONS
from pallas_kernels.specs import Spec


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is most of these tests' time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


SMALL = Spec("small", queries=150, keys=150, kv_heads=2, group_size=2, head_dim=16, block_size=16, block_count=4)
LONG = Spec("64K", queries=65536, keys=65536)


@pytest.mark.parametrize("sink", [False, True])
def test_a_drawn_choice_is_what_it_says(sink):
    index = np.asarray(draw_choice(SMALL, 0.5, 0, sink=sink))
    assert index.shape == (1, 150, 2, 4)
    for _, t, n in np.ndindex(index.shape[:3]):
        current, taken = t // 16, index[0, t, n]
        assert sorted(set(taken[taken >= 0])) == list(taken[: min(current + 1, 4)])
        assert (taken[min(current + 1, 4) :] == -1).all()
        assert current in taken
        assert not sink or 0 in taken


def test_similar_queries_take_similar_blocks():
    blocks = 10
    alike, unlike = (draw_choice(SMALL, rho, 0) for rho in (1.0, 0.0))
    # Of two neighbours inside one block; 8 of 16 tokens of a block agree wholly.
    assert union_size(alike, 8, blocks) < union_size(unlike, 8, blocks)
    groups = np.asarray(unlike)[0, :144].reshape(18, 8, 2, 4).swapaxes(1, 2).reshape(36, 32)
    own = [len(set(group[group >= 0])) for group in groups]
    assert union_size(unlike[:, :144], 8, blocks) == pytest.approx(np.mean(own) / 4)


def test_trained_tensors_are_read_and_repeated(tmp_path):
    draw = np.random.default_rng(0)
    shapes = {"query": (5, 1, 2, 16), "key": (5, 1, 16), "value": (5, 1, 16), "gate_logits": (5, 1, 2, 3)}
    arrays = {f"layer{i}/{name}": draw.standard_normal(x, np.float32) for i in (1, 0) for name, x in shapes.items()}
    np.savez(tmp_path / "s.npz", **arrays)
    spec = dataclasses.replace(SMALL, queries=12, keys=12, kv_heads=3)
    tensors = trained_tensors(tmp_path / "s.npz", spec)
    for x, shape in zip(tensors, spec.shapes, strict=True):
        assert (x.shape, x.dtype) == (shape.shape, shape.dtype)
    logits = np.asarray(tensors[3])[0]
    for head, layer in enumerate((0, 1, 0)):
        np.testing.assert_array_equal(logits[:5, head], arrays[f"layer{layer}/gate_logits"][:, 0])
        np.testing.assert_array_equal(logits[10:, head], arrays[f"layer{layer}/gate_logits"][:2, 0])
    with pytest.raises(ValueError, match=r"\[G, D\] = \(2, 16\), expected \(2, 8\)"):
        trained_tensors(tmp_path / "s.npz", dataclasses.replace(spec, head_dim=8))
    np.savez(tmp_path / "none.npz", x=np.zeros(1))
    with pytest.raises(ValueError, match="no array named LAYER/query"):
        trained_tensors(tmp_path / "none.npz", spec)


@pytest.mark.parametrize(
    ("operation", "gradient", "ms"),
    [
        ("dense_attention", False, 38.58),
        ("compressed_attention", False, 0.602),
        ("window_attention", False, 0.358),
        ("block_selection", False, 0.301),
        ("gated_sum", False, 0.626),
        ("block_means", False, 0.0447),
        ("selected_attention", False, 5.55),
        ("selected_attention", True, 5.55 + 7.35 + 6.25),
    ],
)
def test_floors_at_64k(operation, gradient, ms):
    """Computed apart from the code: 30.79 TFLOP of dense attention, 1.07 GB of its arrays, and so on."""
    assert floor(operation, gradient, LONG, Unions(2.0, 3.0)).ms == pytest.approx(ms, rel=5e-3)


def test_a_floor_names_what_bounds_it():
    assert floor("selected_attention", False, LONG, Unions(2.0, 3.0)).bound == "cache"
    assert floor("decode", False, LONG).bound == "memory"
    with pytest.raises(ValueError, match="unions is None"):
        floor("selected_attention", False, LONG)
    with pytest.raises(ValueError, match="'nsa'"):
        floor("nsa", False, LONG)


def test_samples_do_not_overlap():
    for queries in (1, 40, 70, 150, 1000, 65536 + 37):
        starts, rows = kernel_checks.sampled_starts(queries), kernel_checks.ROWS
        assert starts[0] == 0
        assert all(b - a >= rows for a, b in itertools.pairwise(starts))
        # The last query is among them unless it falls into the first sample or just behind it.
        assert starts[-1] == queries - rows or queries < 2 * rows


@pytest.mark.parametrize("wrong", [None, "o", "d0", "d1"])
def test_wrong_values_are_not_timed(monkeypatch, wrong):
    operation = OPERATIONS["window_attention"]

    def call(spec, implementation, q_offset, q, k, v):
        if implementation != "reference" and wrong == "d0":
            q = q * 0.97 + 0.03 * jax.lax.stop_gradient(q)
        if implementation != "reference" and wrong == "d1":
            k = k.at[:, 70:80].set(jax.lax.stop_gradient(k[:, 70:80]))
        o = operation.call(spec, implementation, q_offset, q, k, v)
        return o * 1.02 if implementation != "reference" and wrong == "o" else o

    monkeypatch.setitem(OPERATIONS, "window_attention", dataclasses.replace(operation, call=call))
    spec = dataclasses.replace(SMALL, window_size=20)
    case = bench_kernels.Case("window_attention", spec)
    bench_kernels.compiled_pass.cache_clear()
    ready = bench_kernels.programs(case, "xla", True, argparse.Namespace(passes=("fwdbwd",)))
    check = functools.partial(bench_kernels.check, case, case.draw(1)[0], ready)
    if wrong is None:
        assert set(check()) == {"o", "d0", "d1", "d2"}
    else:
        with pytest.raises(bench_kernels.WrongValues, match=wrong):
            check()


@pytest.mark.parametrize(("name", "implementation"), [("nsa_layer", "xla"), ("dense_layer", "xla_dense")])
def test_a_layer_and_its_parameters_gradients_are_checked(name, implementation):
    operation, spec = OPERATIONS[name], dataclasses.replace(SMALL, queries=70, keys=70, dtype="float32")
    arrays = operation.draw(spec, 0, 0.5)
    assert len(arrays) == len(operation.query_axes)
    assert sum(x.ndim == 1 for x in arrays) == (5 if name == "nsa_layer" else 3)
    case = bench_kernels.Case(name, spec, "rho 0.5", 0.5)
    ready = bench_kernels.programs(case, implementation, True, argparse.Namespace(passes=("fwdbwd",)))
    errors = bench_kernels.check(case, arrays, ready)
    assert set(errors) == {"o", *(f"d{i}" for i in range(operation.differentiable))}
    # float32 against float32; a gradient of 0 but for rounding is the key bias' alone (see BIAS_BOUND).
    assert max(errors.values()) <= 1e-3
    assert floor(name, True, LONG, Unions(2.0, 3.0)).ms > floor(name, False, LONG, Unions(2.0, 3.0)).ms


def test_a_choice_against_the_rule():
    spec = dataclasses.replace(SMALL, dtype="float32")
    arrays = OPERATIONS["block_selection"].draw(spec, 0, None)
    chosen = OPERATIONS["block_selection"].call(spec, "xla", 0, *arrays)
    starts = kernel_checks.sampled_starts(spec.queries)
    check = functools.partial(kernel_checks.check_choice, arrays=arrays, starts=starts, block_size=spec.block_size)
    found = check(chosen)
    assert found["fine"]
    assert found["excess"] <= 1e-5
    t = 149
    left = next(j for j in range(9) if j not in np.asarray(chosen[0, t, 0]))
    swapped = jnp.sort(chosen.at[0, t, 0, 0].set(left), axis=-1)
    assert check(swapped)["excess"] > 1e-4
    assert not check(swapped)["fine"]
    for row, broken in (
        (chosen[0, t, 0].at[0].set(-1), "count"),
        (chosen[0, t, 0].at[0].set(chosen[0, t, 0, 1]), "count"),
        (chosen[0, t, 0, ::-1], "not ascending"),
        (chosen[0, t, 0].at[-1].set(left), "forced left out"),
    ):
        found = check(chosen.at[0, t, 0].set(row))
        assert found[broken] == 1
        assert not found["fine"]
    assert check(chosen.at[0, 0, 0, 0].set(1))["no candidate taken"] == 1


def test_a_choice_with_an_importance_that_is_not_a_number_is_not_fine():
    spec = dataclasses.replace(SMALL, dtype="float32")
    q, k_blocks, lse = OPERATIONS["block_selection"].draw(spec, 0, None)
    chosen = OPERATIONS["block_selection"].call(spec, "xla", 0, q, k_blocks, lse)
    arrays, starts = (q, k_blocks.at[:, 0].set(jnp.nan), lse), kernel_checks.sampled_starts(spec.queries)
    assert not kernel_checks.check_choice(chosen, arrays, starts, block_size=spec.block_size)["fine"]


def test_the_crossover_lies_between_two_lengths():
    assert kernel_plots.crossover([1024, 4096], [0.5, 2.0]) == pytest.approx(2048)
    assert kernel_plots.crossover([1024, 4096], [1.5, 2.0]) is None
    assert kernel_plots.crossover([1024, 4096], [2.0, 0.5]) is None


def test_the_command_checks_times_and_draws(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--ops=window_attention,block_selection,dense_attention", "--lengths=64", "--inputs=1", "--samples=1"]
    arguments += ["--implementations=xla,cudnn_dense,mosaic_gpu", f"--json={out}", f"--share={tmp_path / 'turns'}"]
    status = bench_kernels.main(arguments)
    result = json.loads(out.read_text())
    timed = [record for record in result["records"] if "median_ms" in record]
    assert [(record["operation"], record["pass"]) for record in timed] == [
        ("window_attention", "fwd"),
        ("window_attention", "fwdbwd"),
        ("block_selection", "fwd"),
    ]
    for record in timed:
        assert record["samples_ms"]
        assert record["memory"]["extra_bytes"] > 0
        assert record["floor_ms"] > 0
    assert {"commit", "versions", "device", "command"} <= set(result)
    assert all((tmp_path / f"out_{name}.png").stat().st_size > 1000 for name in ("times", "parts", "speedup"))
    shown = capsys.readouterr().out
    # cuDNN raises what it likes on a CPU; the kernels refuse it by name.
    assert status == int(any("failed" in record for record in result["records"]))
    assert "mosaic_gpu" in shown
    assert "cudnn_dense" in shown


def test_bad_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_kernels.main(["--ops=nsa"])
    assert "'nsa' is not one of" in capsys.readouterr().err
