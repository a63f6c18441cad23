"""The loop in this process, on random batches; tests/experiments runs the command on real clips."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from training_fakes import (
    CONTEXTS,
    HELDOUT_BATCHES,
    QUESTIONS,
    FakePipeline,
    random_batch,
    tiny_experiment,
    toy_init_state,
    toy_make_forward,
    toy_make_losses,
)

from videonsa_jax.data.sources import DataError
from videonsa_jax.streams import BATCH_AXIS_SECOND, TrainBatch
from videonsa_jax.training import compiling, loop, spikes
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.errors import UsageError
from videonsa_jax.training.frozen import split_params
from videonsa_jax.training.mesh import make_mesh
from videonsa_jax.training.metrics import read_metrics
from videonsa_jax.training.step import accumulate, sums_like


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def run(
        experiment: Experiment, workdir: Path, make_batch: Any = random_batch, *, toy: bool = True, **options: Any
    ) -> int:
        contexts = experiment.data.contexts_per_batch
        monkeypatch.setattr(loop, "build_pipeline", lambda *_, split, **__: FakePipeline(split, make_batch, contexts))
        if toy:
            monkeypatch.setattr(loop, "init_state", toy_init_state)
            monkeypatch.setattr(loop, "make_forward", toy_make_forward)
            monkeypatch.setattr(loop, "make_losses", toy_make_losses)
        return loop.train(experiment, workdir, **options)

    return run


def losses(workdir: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"}


def at_batch(number: int, action: Callable[[TrainBatch], None]) -> Callable[[int], TrainBatch]:
    """Batches of which one is tampered with, the first time only that it is read."""
    seen = []

    def make(index: int) -> TrainBatch:
        batch = random_batch(index)
        if index == number and not seen:
            seen.append(index)
            action(batch)
        return batch

    return make


def test_a_run_trains_evaluates_and_reports(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_experiment(eval_every=3, eval_contexts=CONTEXTS), tmp_path) == 0
    lines = read_metrics(tmp_path / "metrics.jsonl")
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert train[0]["answer_tokens"] == random_batch(0).loss_weights.sum()
    assert {"visual_tokens_per_second", "text_tokens_per_second", "step_seconds", "wait_share"} <= train[0].keys()
    assert {"loading_seconds", "peak_gigabytes"} <= train[0].keys()
    every = HELDOUT_BATCHES * CONTEXTS * QUESTIONS - 1  # the last row only fills up
    # On the way eval_contexts are asked, one batch of three; at the end all.
    evaluations = [(line["step"], line["n"]) for line in lines if line["kind"] == "eval"]
    assert evaluations == [(3, CONTEXTS * QUESTIONS), (6, every)]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["accuracy"]["overall"]["n"] == every
    assert set(report["accuracy"]["families"]) == {"colour", "count"}
    assert report["steps"] == 6
    assert report["config"]["train"]["eval_contexts"] == CONTEXTS
    assert {"data_seconds", "compile_seconds", "train_seconds"} <= report["spent"].keys()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "step 6/6  loss" in capsys.readouterr().err

    assert run(tiny_experiment(eval_every=3, eval_contexts=CONTEXTS), tmp_path) == 0
    assert "nothing to do" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_run_goes_on(run, tmp_path: Path, number: signal.Signals) -> None:
    assert run(tiny_experiment(save_every=0), tmp_path / "whole") == 0
    stopping = at_batch(3, lambda _: os.kill(os.getpid(), number))
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run(tiny_experiment(save_every=0), tmp_path / "parts", stopping) == loop.EXIT_PREEMPTED == 75
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    stopped_after = max(losses(tmp_path / "parts"))
    assert 1 <= stopped_after < 6
    assert not (tmp_path / "parts" / "report.json").exists()
    assert run(tiny_experiment(save_every=0), tmp_path / "parts") == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_the_status_of_a_stopped_run_can_be_chosen(run, tmp_path: Path) -> None:
    stopping = at_batch(1, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tiny_experiment(), tmp_path, stopping, preempt_exit_code=99) == 99


def test_a_signal_before_there_is_anything_to_save_ends_the_run(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "build_pipeline", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        loop.train(tiny_experiment(), tmp_path)
    assert stopped.value.code == 75


def spoil(batch: TrainBatch) -> None:
    batch.loss_weights[2, 1, -1] = np.nan


def test_a_loss_that_is_not_finite_stops_names_the_samples_and_leaves_a_good_state(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tiny_experiment(save_every=0), tmp_path / "whole") == 0
    parts = tmp_path / "parts"
    capsys.readouterr()
    assert run(tiny_experiment(save_every=0), parts, at_batch(3, spoil)) == loop.EXIT_NOT_FINITE == 3
    # Batch 3 is step 4; row (2, 1) of a 4 x 2 batch holds sample 5.
    assert "step 4: loss nan" in (said := capsys.readouterr().err)
    assert "samples [305]; saved the state after step 3" in said
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == ["3"]
    # The sample is sound the second time: the run goes on as if nothing had happened.
    assert run(tiny_experiment(save_every=0), parts) == 0
    assert losses(parts) == losses(tmp_path / "whole")


def test_a_loss_that_jumps_is_logged_with_its_samples(run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(spikes, "WARM_UP", 4)

    def mislabel(batch: TrainBatch) -> None:
        batch.targets[1, 0] = (batch.inputs.text_tokens[1, 0] + 1) % 2
        batch.loss_weights[:] = 0
        batch.loss_weights[1, 0] = 50

    parts = tmp_path / "parts"
    assert run(tiny_experiment(steps=8), tmp_path / "whole") == 0
    assert not (tmp_path / "whole" / "spikes.jsonl").exists()
    experiment = tiny_experiment(steps=8, spike_sigmas=3.0)
    assert run(experiment, parts, at_batch(5, mislabel)) == 0
    spike = json.loads((parts / "spikes.jsonl").read_text().splitlines()[0])
    assert spike["step"] == 6
    assert spike["samples"][0]["record"] == "question 502"  # row (1, 0) of batch 5
    assert spike["loss"] == losses(parts)[6] > spike["median"]


def test_steps_are_traced_on_demand(run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny_experiment(steps=4), tmp_path, profile=range(2, 4)) == 0
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
    assert "step 3: wrote a trace, see it with: xprof" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"--profile names step 5, expected at most train.steps \(4\)"):
        run(tiny_experiment(steps=4), tmp_path, profile=range(2, 6))


def two_in_one(index: int) -> TrainBatch:
    """Batches 2 i and 2 i + 1 as one."""
    halves = random_batch(2 * index), random_batch(2 * index + 1)

    def join(path: tuple, *arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays, axis=1 if path[-1].name in BATCH_AXIS_SECOND else 0)

    return jax.tree_util.tree_map_with_path(join, *halves)


def test_accumulated_batches_equal_one_large_batch(run, tmp_path: Path) -> None:
    large = tiny_experiment(steps=3)
    large = dataclasses.replace(large, data=dataclasses.replace(large.data, contexts_per_batch=2 * CONTEXTS))
    assert run(large, tmp_path / "large", two_in_one) == 0
    assert run(tiny_experiment(steps=3, accumulation=2), tmp_path / "parts") == 0
    lines = [read_metrics(tmp_path / name / "metrics.jsonl")[:3] for name in ("large", "parts")]
    for one, other in zip(*lines, strict=True):
        assert one["answer_tokens"] == other["answer_tokens"]
        # 1e-5: sums of float32 numbers in another order; the later steps see the earlier updates.
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=1e-5)
        np.testing.assert_allclose(other["grad_norm"], one["grad_norm"], rtol=1e-4)


def test_an_offloaded_optimizer_state_lives_on_the_host_and_changes_nothing(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kinds = []

    def spy(*args: Any) -> None:
        kinds.append({leaf.sharding.memory_kind for leaf in jax.tree.leaves(args[2].opt_state) if leaf.ndim})
        return save(*args)

    save = loop.checkpoints.save
    monkeypatch.setattr(loop.checkpoints, "save", spy)
    assert run(tiny_experiment(steps=4), tmp_path) == 0
    expected = losses(tmp_path)
    # Where it lives is no part of a checkpoint: the same run goes on.
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    assert run(tiny_experiment(steps=4, offload_optimizer=True, save_every=1), tmp_path) == 0
    assert kinds == [{"device"}] * 3 + [{"pinned_host"}] * 3  # the last step's is asked for twice
    assert losses(tmp_path) == expected


def test_another_config_is_refused_and_the_field_named(run, tmp_path: Path) -> None:
    assert run(tiny_experiment(), tmp_path) == 0
    with pytest.raises(UsageError, match=r"train\.steps was 6 and is 7; use another --workdir"):
        run(tiny_experiment(steps=7), tmp_path)
    # Fields that change nothing in the result may differ.
    assert run(tiny_experiment(log_every=3, save_every=1, kernel="xla"), tmp_path) == 0


def test_data_that_fails_on_the_way_is_told_after_saving(run, tmp_path: Path) -> None:
    def fail(_: TrainBatch) -> None:
        raise DataError("v.mp4: cannot be decoded")

    with pytest.raises(DataError, match="cannot be decoded"):
        run(tiny_experiment(save_every=0), tmp_path, at_batch(3, fail))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": "mosaic_tpu"}, "on TPU has D = 16, supported are 64 and 128"),
        ({"kernel": "triton"}, "the Triton kernel needs an NVIDIA GPU"),
        ({"kernel": "fast"}, "implementation is 'fast', expected"),
    ],
)
def test_what_cannot_run_is_told_in_one_sentence(run, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tiny_experiment(**changes), tmp_path, toy=False)


def test_tensorboard_that_is_not_installed_is_told(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UsageError, match="needs tensorboardX, which is not installed: pip install"):
        run(tiny_experiment(tensorboard=True), tmp_path)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_update_expects_the_sums_that_batches_give(accumulation: int) -> None:
    experiment = tiny_experiment(accumulation=accumulation, param_dtype="bfloat16", frozen=("embedding",))
    config, mesh = experiment.train, make_mesh(experiment.mesh)
    params = jax.eval_shape(lambda: toy_init_state(experiment.model, config, 0, optax.sgd(0.1)).params)
    params = jax.tree.map(lambda leaf: leaf.update(dtype=jax.numpy.bfloat16), params)
    trained, _ = split_params(params, config.frozen)
    sharding = NamedSharding(mesh, PartitionSpec())
    expected = loop.expected_sums(trained, accumulation, sums_like(jax.tree.map(lambda _: sharding, trained), sharding))
    add_batch = functools.partial(accumulate, toy_make_losses(experiment.model, config, mesh), config)
    found, _ = jax.eval_shape(add_batch, params, None, random_batch(0))
    assert compiling.signature((expected,)) == compiling.signature((found,))
