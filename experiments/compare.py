"""Compares two groups of finished runs, seed by seed.

    python -m experiments.compare --runs A/report.json B/report.json --baselines C/report.json D/report.json

A run is paired with the baseline of its seed: the same questions in the same order. Prints each pair's held-out
accuracies, the mean difference and its 95 % interval (Student's t over the seeds), and writes them with --json.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from videonsa_jax.training.environment import environment
from videonsa_jax.training.errors import UsageError, usage_errors

# What must agree for two runs to have seen the same questions in the same order.
_ORDER = (
    "data.source",
    "data.clips",
    "data.questions_per_context",
    "data.questions_per_row",
    "data.contexts_per_batch",
    "train.accumulation",
    "train.steps",
)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--runs", "--baselines"):
        parser.add_argument(name, nargs="+", required=True, type=Path, metavar="REPORT", help="report.json of a run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result there")
    parser.add_argument("--any-order", action="store_true", help="allow runs that saw other questions than baselines")
    return parser


def _field(report: Mapping[str, Any], path: str) -> Any:
    value: Any = report["config"]
    for name in path.split("."):
        value = value[name]
    return value


def _read(paths: Sequence[Path]) -> dict[int, dict[str, Any]]:
    reports = {}
    for path in paths:
        try:
            report = json.loads(path.read_text())
            seed = report["config"]["seed"]
            float(report["accuracy"]["overall"]["accuracy"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not the report of a finished run ({error!r})") from error
        if seed in reports:
            raise ValueError(f"{path}: a second run with seed {seed}, expected one a group")
        reports[seed] = report
    return reports


def _check_order(run: Mapping[str, Any], baseline: Mapping[str, Any], seed: int) -> None:
    for path in _ORDER:
        ours, theirs = _field(run, path), _field(baseline, path)
        if ours != theirs:
            raise ValueError(f"seed {seed}: {path} is {ours} in the run and {theirs} in its baseline, expected equal")


def compare(runs: Sequence[Path], baselines: Sequence[Path], *, any_order: bool = False) -> dict[str, Any]:
    """The paired comparison.

    Args:
      runs: report.json of finished runs, one a seed.
      baselines: likewise; the same seeds.
      any_order: do not require that pairs saw the same questions in the same order.

    Returns:
      seeds, each one's accuracies and difference; mean, worst (lowest) and 95 % interval of the differences (Student's
      t; None for a single seed); by family the mean difference.

    Raises:
      ValueError: a file is no report, or the groups do not pair.
    """
    ours, theirs = _read(runs), _read(baselines)
    if set(ours) != set(theirs):
        raise ValueError(f"seeds are {sorted(ours)} in the runs and {sorted(theirs)} in the baselines, expected equal")
    seeds = sorted(ours)
    if not any_order:
        for seed in seeds:
            _check_order(ours[seed], theirs[seed], seed)
    pairs = [{"seed": seed, "run": _overall(ours[seed]), "baseline": _overall(theirs[seed])} for seed in seeds]
    for pair in pairs:
        pair["difference"] = pair["run"] - pair["baseline"]
    differences = [pair["difference"] for pair in pairs]
    half = None
    if len(seeds) > 1:
        half = student.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / math.sqrt(len(seeds))
    mean = statistics.mean(differences)
    families = ours[seeds[0]]["accuracy"]["families"]
    return {
        "run": ours[seeds[0]]["name"],
        "baseline": theirs[seeds[0]]["name"],
        "pairs": pairs,
        "mean_run": statistics.mean(pair["run"] for pair in pairs),
        "mean_baseline": statistics.mean(pair["baseline"] for pair in pairs),
        "mean_difference": mean,
        "worst_difference": min(differences),
        "interval_95": None if half is None else [mean - half, mean + half],
        "mean_difference_by_family": {
            family: statistics.mean(_family(ours[seed], family) - _family(theirs[seed], family) for seed in seeds)
            for family in families
        },
    }


def _overall(report: Mapping[str, Any]) -> float:
    return report["accuracy"]["overall"]["accuracy"]


def _family(report: Mapping[str, Any], family: str) -> float:
    return report["accuracy"]["families"][family]["accuracy"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with usage_errors():
            result = compare(options.runs, options.baselines, any_order=options.any_order)
            if options.json:
                options.json.write_text(json.dumps(result | environment(), indent=1) + "\n")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"seed  {result['run']:>16}  {result['baseline']:>16}  difference")
    for pair in result["pairs"]:
        print(f"{pair['seed']:4}  {pair['run']:16.3f}  {pair['baseline']:16.3f}  {pair['difference']:+10.3f}")
    interval = result["interval_95"]
    shown = "" if interval is None else f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
    print(f"mean difference {result['mean_difference']:+.3f}{shown}, worst {result['worst_difference']:+.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
