import json
from pathlib import Path

import pytest
from training_fakes import FakeRecord

from videonsa_jax.training.report import accuracies, wilson_interval, write_report


@pytest.mark.parametrize(
    ("correct", "total", "expected"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: the score method's published examples.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        (29, 29, (0.8830, 1.0)),
        (0, 0, (0.0, 1.0)),
    ],
)
def test_intervals_are_wilsons(correct: int, total: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(correct, total) == pytest.approx(expected, abs=5e-5)


def test_accuracies_are_counted_by_family_against_their_own_chance() -> None:
    records = [FakeRecord("colour")] * 4 + [FakeRecord("count", ("1", "2", "3", "4"))] * 2 + [FakeRecord("")]
    result = accuracies({0: True, 1: True, 2: True, 3: False, 5: True, 6: False}, records)
    colour, count = result["families"]["colour"], result["families"]["count"]
    assert (colour["n"], colour["correct"], colour["accuracy"], colour["chance"]) == (4, 3, 0.75, 0.5)
    assert colour["ratio_over_chance"] == 1.5
    assert (count["n"], count["chance"], count["ratio_over_chance"]) == (1, 0.25, 4.0)
    assert result["families"]["unnamed"]["accuracy"] == 0
    overall = result["overall"]
    assert overall["accuracy"] == 4 / 6
    assert overall["chance"] == pytest.approx((4 * 0.5 + 0.25 + 0.5) / 6)
    assert overall["interval_95"] == list(wilson_interval(4, 6))


@pytest.mark.parametrize("asked", [True, False])
def test_the_report_is_written_as_json_and_as_a_figure(tmp_path: Path, asked: bool) -> None:
    accuracy = accuracies({0: True, 1: False}, [FakeRecord("colour")] * 2) if asked else None
    metrics = [{"kind": "train", "step": step, "loss": 3 / step} for step in range(1, 50)]
    metrics += [{"kind": "train", "step": 50, "loss": "nan"}, {"kind": "eval", "step": 50, "accuracy": 0.5}]
    write_report(tmp_path, {"name": "test", "accuracy": accuracy}, metrics)
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"] == accuracy
    figure = (tmp_path / "report.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]
