"""The end of a run: accuracy per question family with intervals, as JSON and as a figure."""

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

REPORT_FILE = "report.json"
FIGURE_FILE = "report.png"
Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927); unlike the normal one it stays inside [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, Z_95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _accuracy(right: Sequence[bool], chances: Sequence[float]) -> dict[str, Any]:
    correct, total = sum(right), len(right)
    chance = float(np.mean(chances))
    return {
        "n": total,
        "correct": correct,
        "accuracy": correct / total,
        "interval_95": list(wilson_interval(correct, total)),
        "chance": chance,
        "ratio_over_chance": correct / total / chance,
    }


def accuracies(right: Mapping[int, bool], records: Sequence[Any]) -> dict[str, Any]:
    """Accuracy overall and per question family.

    Args:
      right: for each evaluated sample id whether the prediction was right; at least one.
      records: the split's records by sample id, each with `family` and `options`.

    Returns:
      {"overall": ..., "families": {family: ...}}, each with n, correct, accuracy, its 95 % interval, chance (the mean
      of 1 / options) and the ratio of accuracy to chance.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for sample_id in right:
        groups[records[sample_id].family or "unnamed"].append(sample_id)

    def of(sample_ids: Sequence[int]) -> dict[str, Any]:
        return _accuracy([right[i] for i in sample_ids], [1 / len(records[i].options) for i in sample_ids])

    return {"overall": of(list(right)), "families": {family: of(groups[family]) for family in sorted(groups)}}


def write_report(workdir: Path, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Writes `report.json` and `report.png`, the JSON last: where it is, the run is complete.

    Args:
      workdir: folder of the run.
      report: JSON values; "accuracy" is what `accuracies` returns, or None where nothing was asked.
      metrics: the lines of `metrics.jsonl`.
    """
    _plot(workdir / FIGURE_FILE, report, metrics)
    temporary = workdir / f"{REPORT_FILE}.tmp"
    temporary.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(temporary, workdir / REPORT_FILE)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _plot(path: Path, report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    lines = [line for line in metrics if line["kind"] == "train"]
    steps = np.array([line["step"] for line in lines])
    losses = np.array([float(line["loss"]) for line in lines])
    loss_axes.plot(steps, losses, color="C0", alpha=0.3, label="one step")
    loss_axes.plot(steps, _running_mean(losses, max(len(losses) // 20, 1)), color="C0", label="running mean")
    loss_axes.set(xlabel="step", ylabel="cross-entropy per answer token (nats)", title="training loss")
    loss_axes.legend()

    accuracy = report["accuracy"]
    if accuracy is None:
        accuracy_axes.set_axis_off()
        accuracy_axes.text(0.5, 0.5, "no held-out question", ha="center")
    else:
        rows = {"overall": accuracy["overall"], **accuracy["families"]}
        places = np.arange(len(rows))
        means = np.array([row["accuracy"] for row in rows.values()])
        bounds = np.array([row["interval_95"] for row in rows.values()])
        accuracy_axes.bar(places, means, color=["C1"] + ["C0"] * (len(rows) - 1))
        # Rounding can put a bound of 0 or 1 a hair on the wrong side of its mean.
        spread = np.maximum(np.abs(bounds.T - means), 0)
        accuracy_axes.errorbar(places, means, yerr=spread, fmt="none", color="black", capsize=3)
        for place, row in zip(places, rows.values(), strict=True):
            label = "chance" if place == 0 else None
            accuracy_axes.hlines(row["chance"], place - 0.45, place + 0.45, "C3", linestyles="dashed", label=label)
        names = [f"{name} ({row['n']})" for name, row in rows.items()]
        accuracy_axes.set_xticks(places, names, rotation=30, ha="right")
        accuracy_axes.set(ylim=(0, 1), ylabel="accuracy, 95 % Wilson interval", title="held-out accuracy")
        accuracy_axes.legend()
    figure.suptitle(report["name"])
    figure.savefig(path, dpi=120)
    plt.close(figure)
