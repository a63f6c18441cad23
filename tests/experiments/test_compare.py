"""The paired comparison of finished runs."""

import json
from pathlib import Path

import pytest

from experiments import compare

DATA = {"source": "clips", "clips": {"seed": 0}, "questions_per_row": 1, "contexts_per_batch": 8}


def report(path: Path, seed: int, accuracy: float, **data: object) -> Path:
    config = {
        "seed": seed,
        "data": DATA | {"questions_per_context": 1} | data,
        "train": {"steps": 10, "accumulation": 1},
    }
    families = {"count": {"accuracy": accuracy / 2}}
    accuracies = {"overall": {"accuracy": accuracy}, "families": families}
    path.write_text(json.dumps({"name": path.stem, "config": config, "accuracy": accuracies}))
    return path


@pytest.fixture
def groups(tmp_path):
    runs = [report(tmp_path / f"run{seed}.json", seed, value) for seed, value in ((0, 0.5), (1, 0.6), (2, 0.55))]
    baselines = [report(tmp_path / f"base{seed}.json", seed, value) for seed, value in ((2, 0.45), (0, 0.3), (1, 0.45))]
    return runs, baselines


def test_pairs_are_of_one_seed_and_the_interval_is_students(groups):
    result = compare.compare(*groups)
    assert [round(pair["difference"], 6) for pair in result["pairs"]] == [0.2, 0.15, 0.1]
    assert result["mean_difference"] == pytest.approx(0.15)
    assert result["worst_difference"] == pytest.approx(0.1)
    # t(0.975, 2) = 4.3027, standard deviation 0.05.
    half = 4.3027 * 0.05 / 3**0.5
    assert result["interval_95"] == pytest.approx([0.15 - half, 0.15 + half], abs=1e-4)
    assert result["mean_difference_by_family"] == {"count": pytest.approx(0.075)}


def test_the_command_prints_and_writes(groups, tmp_path, capsys):
    runs, baselines = ([str(path) for path in group] for group in groups)
    assert compare.main(["--runs", *runs, "--baselines", *baselines, "--json", str(tmp_path / "out.json")]) == 0
    assert "mean difference +0.150, 95 % interval" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["worst_difference"] == pytest.approx(0.1)


def test_runs_that_do_not_pair_are_refused(groups, tmp_path, capsys):
    runs, baselines = groups
    grouped = report(tmp_path / "grouped.json", 0, 0.5, questions_per_context=5)
    broken = tmp_path / "broken.json"
    broken.write_text('{"name": "x"}')
    for ours, theirs, sentence in (
        (runs[:2], baselines, r"seeds are [0, 1] in the runs and [0, 1, 2] in the baselines, expected equal"),
        ([grouped], [baselines[1]], "data.questions_per_context is 5 in the run and 1 in its baseline"),
        ([runs[0], runs[0]], baselines, "a second run with seed 0, expected one a group"),
        ([broken], baselines, "broken.json: not the report of a finished run (KeyError('config'))"),
        ([tmp_path / "none.json"], baselines, "none.json"),
    ):
        assert compare.main(["--runs", *map(str, ours), "--baselines", *map(str, theirs)]) == 2
        assert sentence in capsys.readouterr().err
    assert compare.compare([grouped], [baselines[1]], any_order=True)["interval_95"] is None
