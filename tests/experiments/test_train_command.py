"""`python -m experiments.train` as a user runs it: real clips, real signals, exit statuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.train import main
from videonsa_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
STEPS = 12
SETTINGS = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.save_every": 3,
    "data.clips.train_clips": 8,
    "data.clips.heldout_clips": 8,
    "data.clips.seconds": "8",
    "data.contexts_per_batch": 2,
    "data.questions_per_context": 2,
    "data.buckets": 256,
    "model.vision.depth": 1,
    "model.vision.fullatt_block_indexes": "0",
    "model.text.num_hidden_layers": 2,
}


@pytest.fixture(autouse=True)
def devices_are_in_use() -> None:
    """`main` in this process must not split the CPU into devices for the tests that follow."""
    jax.devices()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train_command")


def arguments(folder: Path, workdir: str, *more: str, **changes: object) -> list[str]:
    settings = SETTINGS | {"data.cache_dir": folder / "datasets"} | changes
    return [
        "--config=nsa_video",
        f"--workdir={folder / workdir}",
        *(f"--set={path}={value}" for path, value in settings.items()),
        *more,
    ]


def start(folder: Path, workdir: str, *more: str, **changes: object) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),  # every start after the first is quick
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-W", "error", "-m", "experiments.train", *arguments(folder, workdir, *more, **changes)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def expect_status(process: subprocess.Popen, status: int) -> None:
    _, said = process.communicate(timeout=400)
    assert process.returncode == status, said
    assert "Warning" not in said, said


def losses(workdir: Path) -> dict[int, tuple[float, float]]:
    lines = read_metrics(workdir / "metrics.jsonl")
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"}


def send_at_step(process: subprocess.Popen, workdir: Path, step: int, number: signal.Signals) -> None:
    while max(losses(workdir), default=0) < step:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)


def test_a_run_that_was_killed_and_stopped_ends_like_one_that_was_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = folder / "whole", folder / "parts"
    expect_status(start(folder, "whole"), 0)
    killed = start(folder, "parts")
    send_at_step(killed, parts, 5, signal.SIGKILL)
    expect_status(killed, -signal.SIGKILL)
    assert not (parts / "report.json").exists()
    stopped = start(folder, "parts")
    send_at_step(stopped, parts, 7, signal.SIGTERM)
    expect_status(stopped, 75)
    assert max(losses(parts)) < STEPS
    expect_status(start(folder, "parts"), 0)
    assert list(losses(parts)) == list(range(1, STEPS + 1))
    assert losses(parts) == losses(whole)
    reports = [json.loads((run / "report.json").read_text()) for run in (parts, whole)]
    assert all(report["command"][:3] == ["python", "-m", "experiments.train"] for report in reports)
    assert reports[0]["accuracy"] == reports[1]["accuracy"]

    # What the run left: it learned, and its report adds up.
    assert np.mean([losses(whole)[step][0] for step in (10, 11, 12)]) < 0.8 * losses(whole)[1][0]
    report = reports[1]
    assert report["steps"] == STEPS
    assert report["accuracy"]["overall"]["n"] == sum(row["n"] for row in report["accuracy"]["families"].values()) > 0
    assert report["versions"]["jax"]
    assert (whole / "report.png").stat().st_size > 10_000

    # A complete run is left alone; another config is refused.
    before = (whole / "report.json").stat().st_mtime_ns
    assert main(arguments(folder, "whole")) == 0
    assert (whole / "report.json").stat().st_mtime_ns == before
    capsys.readouterr()
    assert main(arguments(folder, "whole", **{"seed": 1, "data.fps": 2})) == 2
    assert "data.fps was 4.0 and is 2.0; seed was 0 and is 1; use another --workdir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--config=nsa_vidio"], "unknown config 'nsa_vidio'; did you mean nsa_video"),
        (["--config=nsa_video", "--set=train.stebs=3"], "no field 'train.stebs'; did you mean train.steps"),
        (["--config=nsa_video", "--set=train.steps=x"], "'x' is not what train.steps expects: an integer"),
        (
            ["--config=nsa_video_7b", "--set=pretrained=", "--set=data.tokenizer=t.json"],
            "config nsa_video_7b needs data.source: add --set data.source=...",
        ),
        (["--config=nsa_video", "--set=pretrained=weights"], "pretrained is 'weights', expected a local Hugging"),
        (["--config=nsa_video", "--set=mesh.data=3"], "does not fit"),
        (["--config=nsa_video", "--set=mesh.tensor=0"], "mesh.tensor is 0"),
        (["--config=nsa_video", "--set=data.source=nowhere.json"], "nowhere.json: no such file"),
        (["--config=nsa_video", "--set=model.text.vocab_size=100"], "expected at most the model's vocab_size 100"),
        (["--config=nsa_video", "--profile=3-1"], "--profile is '3-1', expected the numbers of steps"),
        (["--config=nsa_video", "--multihost=here"], "--multihost is 'here', expected HOST:PORT,COUNT,INDEX"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], command: list[str], message: str
) -> None:
    clips = [setting for setting in arguments(folder, "") if "clips" in setting or "cache_dir" in setting]
    assert main([*command[:1], *clips, *command[1:], f"--workdir={folder / 'wrong'}"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")
    assert message in said
    assert said.count("\n") == 1 + said.count("making clips")


def test_debug_shows_where_an_error_comes_from(folder: Path) -> None:
    with pytest.raises(Exception, match="unknown config"):
        main(["--config=x", "--debug"])


def test_help_lists_the_configs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config=help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("nsa_video ") and "tiny model" in line for line in lines)


def test_a_command_without_a_config_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "context"])  # contexts of their own, or parts of the same
def test_two_processes_train_as_one_and_stop_together(folder: Path, axis: str) -> None:
    expect_status(start(folder, "one"), 0)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workdir, mesh = f"hosts_{axis}", {"mesh.data": 1, f"mesh.{axis}": 2}
    processes = [start(folder, workdir, f"--multihost=localhost:{port},2,{index}", **mesh) for index in range(2)]
    send_at_step(processes[1], folder / workdir, 4, signal.SIGTERM)
    for process in processes:
        expect_status(process, 75)
    assert max(losses(folder / workdir)) < STEPS
    expect_status(start(folder, workdir), 0)  # one process takes over from two
    one, two = losses(folder / "one"), losses(folder / workdir)
    # 1e-4: sums of float32 numbers in another order, through twelve updates.
    np.testing.assert_allclose([two[step] for step in one], list(one.values()), rtol=1e-4)
