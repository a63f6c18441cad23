"""Two processes of this machine train one toy model; tests/experiments has the command with real clips (slow)."""

import json
from pathlib import Path

import numpy as np
from together import run_together

from videonsa_jax.training.metrics import read_metrics

TRAIN = """
import dataclasses, os, signal, sys
from pathlib import Path
import jax
from training_fakes import (
    FakePipeline, random_batch, tiny_experiment, toy_init_state, toy_make_forward, toy_make_losses,
)
from videonsa_jax.models import placement
from videonsa_jax.streams import TrainBatch, slice_batch
from videonsa_jax.training import loop, processes

processes.join(None)
placement.MIN_SHARDED_SIZE = 1
loop.init_state, loop.make_forward, loop.make_losses = toy_init_state, toy_make_forward, toy_make_losses


def build_pipeline(*_, split, shard_index, shard_count, **__):
    def own_rows(index):
        if index == {stop_at} and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        rows = 8 // shard_count
        own = slice(shard_index * rows, (shard_index + 1) * rows)
        batch = random_batch(index, 8)
        parts = {{field.name: getattr(batch, field.name)[own] for field in dataclasses.fields(batch)[1:]}}
        return TrainBatch(inputs=slice_batch(batch.inputs, own), **parts)

    return FakePipeline(split, own_rows, 8 // shard_count)


loop.build_pipeline = build_pipeline
experiment = tiny_experiment(steps=6, save_every=0)
experiment = dataclasses.replace(
    experiment,
    mesh=dataclasses.replace(experiment.mesh, data=1, fsdp=-1),
    data=dataclasses.replace(experiment.data, contexts_per_batch=8, heldout=""),
)
sys.exit(loop.train(experiment, Path({workdir!r})))
"""


def test_two_processes_train_as_one_and_stop_at_a_step_that_both_agree_on(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    ((status, said),) = run_together([TRAIN.format(stop_at=-1, workdir=str(one))])
    assert status == 0, said
    stopped = run_together([TRAIN.format(stop_at=3, workdir=str(two))] * 2)  # SIGTERM to the second of them
    assert [status for status, _ in stopped] == [75, 75], stopped
    step = max(line["step"] for line in read_metrics(two / "metrics.jsonl"))
    assert [path.name for path in (two / "checkpoints").iterdir()] == [str(step)]
    assert f"stopped by a signal after step {step}, saved" in stopped[0][1]
    assert step < 6
    resumed = run_together([TRAIN.format(stop_at=-1, workdir=str(two))] * 2)
    assert [status for status, _ in resumed] == [0, 0], resumed
    assert f"steps {step} to 6" in resumed[0][1]
    assert "steps" not in resumed[1][1]  # the second process says nothing (gloo does)

    lines = [[line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"] for run in (one, two)]
    for name in ("loss", "grad_norm", "visual_tokens", "flops_per_second"):
        alone, together = (np.array([line[name] for line in run]) for run in lines)
        if name == "flops_per_second":  # rates differ; the FLOPs of both processes' rows are those of the whole batch
            alone, together = (
                rate * [line["step_seconds"] for line in run]
                for rate, run in zip((alone, together), lines, strict=True)
            )
        # 1e-5: sums of float32 numbers in another order, through six updates.
        np.testing.assert_allclose(together, alone, rtol=1e-5, err_msg=name)
    assert {line["straggler_process"] for line in lines[1]} <= {0, 1}
    assert json.loads((two / "report.json").read_text())["device"]["processes"] == 2


SHARE = """
import dataclasses, sys
from pathlib import Path
import jax
import numpy as np
from training_fakes import (
    CONTEXTS, FakeIterator, FakePipeline, random_batch, tiny_experiment, toy_init_state, toy_make_forward,
    toy_make_losses,
)
from videonsa_jax.data.examples import clear_context
from videonsa_jax.training import loop, processes

processes.join(None)
loop.init_state, loop.make_forward, loop.make_losses = toy_init_state, toy_make_forward, toy_make_losses


class BrokenOnce(FakeIterator):
    def __next__(self):
        batch = super().__next__()
        self.failed_rows = np.zeros(CONTEXTS, bool)
        if self.position == 3 and jax.process_index() == {breaks}:
            clear_context(batch, 1)
            self.failed_rows[1] = True
        return batch


class Shared(FakePipeline):
    def iterator(self):
        return super().iterator() if self.split == "heldout" else BrokenOnce(random_batch, None)


def build_pipeline(*_, split, shard_index, shard_count, **__):
    assert (shard_index, shard_count) == (0, 1)
    return Shared(split)


loop.build_pipeline = build_pipeline
experiment = tiny_experiment(steps=6, save_every=0)
mesh = dataclasses.replace(experiment.mesh, data=1, context=-1)
sys.exit(loop.train(dataclasses.replace(experiment, mesh=mesh), Path({workdir!r})))
"""


def test_processes_that_share_contexts_drop_what_one_of_them_cannot_load(tmp_path: Path) -> None:
    runs = {}
    for name, processes, breaks in (("one", 1, 0), ("two", 2, 1), ("whole", 1, -1)):
        workdir = tmp_path / name
        ended = run_together([SHARE.format(workdir=str(workdir), breaks=breaks)] * processes)
        assert [status for status, _ in ended] == [0] * processes, ended
        runs[name] = [line for line in read_metrics(workdir / "metrics.jsonl") if line["kind"] == "train"]
    one, two, whole = ({key: [line[key] for line in run] for key in run[0]} for run in runs.values())
    for name in ("loss", "grad_norm", "answer_tokens", "visual_tokens"):
        # 1e-5: sums of float32 numbers in another order, through six updates.
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, err_msg=name)
    assert [a < b for a, b in zip(two["answer_tokens"], whole["answer_tokens"], strict=True)] == [
        step == 3 for step in two["step"]
    ]
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
