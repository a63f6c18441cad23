"""Figures of what `experiments.bench_kernels` wrote.

    python -m experiments.kernel_plots OUT.json
    python -m experiments.kernel_plots A.json B.json --merge=OUT.json

Writes OUT_times.png (time against length, one line per implementation, floors dashed), OUT_parts.png (what the whole is
made of) and OUT_speedup.png (the whole against dense attention, with the length at which it overtakes) beside it.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from experiments import kernel_results
from experiments.kernel_operations import DENSE_OF, PARTS

PASSES = {"fwd": "forward", "fwdbwd": "forward and backward"}
REST = "means, gates and sums"

Records = Sequence[dict[str, Any]]


def _label(record: dict[str, Any]) -> str:
    parts = record["operation"].removesuffix("_attention"), record["choice"], record["implementation"]
    return ", ".join(part for part in parts if part)


def _axes() -> tuple[Any, dict[str, Any]]:
    figure, axes = plt.subplots(1, len(PASSES), figsize=(13, 5), layout="constrained")
    for ax, title in zip(axes, PASSES.values(), strict=True):
        ax.set(xlabel="tokens", title=title)
    return figure, dict(zip(PASSES, axes, strict=True))


def _lines(records: Records) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Records of one (pass, label), by length."""
    lines: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["length"]):
        lines.setdefault((record["pass"], _label(record)), []).append(record)
    return lines


def _lengths_axis(ax: Any, records: Records) -> None:
    lengths = sorted({record["length"] for record in records})
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [_shown(length) for length in lengths], rotation=45)
    ax.minorticks_off()
    ax.grid(True, alpha=0.3)


def _shown(length: int) -> str:
    return f"{length / 1024:.3g}K" if length >= 1024 else str(length)


def _legend(figure: Any, axes: dict[str, Any]) -> None:
    """One legend below, for all axes."""
    entries = {}
    for ax in axes.values():
        entries |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    if entries:
        figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, fontsize=8)


def draw_times(records: Records, path: Path) -> None:
    """Time against length, both logarithmic."""
    figure, axes = _axes()
    labels = sorted({_label(record) for record in records})
    for (name, label), line in _lines(records).items():
        colour = f"C{labels.index(label) % 10}"
        style = ("o-", "s-", "^-")[labels.index(label) // 10 % 3]
        lengths = [record["length"] for record in line]
        axes[name].plot(lengths, [record["median_ms"] for record in line], style, color=colour, label=label, ms=4)
        axes[name].plot(lengths, [record["floor_ms"] for record in line], ":", color=colour, lw=1)
    for ax in axes.values():
        _lengths_axis(ax, records)
        ax.set(yscale="log", ylabel="ms (dotted: floor)")
    _legend(figure, axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def parts_of(records: Records, name: str) -> dict[int, dict[str, float]]:
    """Milliseconds of the whole's parts by length; `REST` is what the operations do not account for.

    Args:
      records: of one similarity and of implementations of NSA.
      name: of the pass; operations without a gradient take part with their forward.

    Returns:
      By length the parts, for lengths at which every operation and the whole were timed.
    """
    times: dict[int, dict[str, float]] = {}
    for record in records:
        only_forward = record["operation"] == "block_selection"
        if record["pass"] == ("fwd" if only_forward else name):
            times.setdefault(record["length"], {})[record["operation"]] = record["median_ms"]
    parts = {}
    for length, seen in sorted(times.items()):
        if {*PARTS, "nsa_attention"} <= set(seen):
            parts[length] = {part: seen[part] for part in PARTS}
            parts[length][REST] = max(seen["nsa_attention"] - sum(parts[length].values()), 0.0)
    return parts


def draw_parts(records: Records, path: Path) -> None:
    """Stacked bars, one per length, of the first similarity timed."""
    whole = [record["choice"] for record in records if record["choice"].startswith("rho")]
    ours = ("mosaic_gpu", "xla")
    implementation = next((x for x in ours if any(record["implementation"] == x for record in records)), None)
    chosen = [
        record
        for record in records
        if record["choice"] in ("", *whole[:1]) and record["implementation"] == implementation
    ]
    figure, axes = _axes()
    for name, ax in axes.items():
        bars = parts_of(chosen, name)
        names, totals = [_shown(length) for length in bars], [sum(seen.values()) for seen in bars.values()]
        bottom = [0.0] * len(bars)
        for i, part in enumerate((*PARTS, REST)):
            share = [seen[part] / total for seen, total in zip(bars.values(), totals, strict=True)]
            ax.bar(names, share, bottom=bottom, color=f"C{i}", label=part)
            bottom = [a + b for a, b in zip(bottom, share, strict=True)]
        for place, total in enumerate(totals):
            ax.text(place, 1.01, f"{total:.3g} ms", ha="center", fontsize=8)
        ax.set(ylabel=f"share of the whole ({', '.join([str(implementation), *whole[:1]])})", ylim=(0, 1.06))
    _legend(figure, axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def crossover(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The length at which the ratio passes 1 for good, between two measured ones on a log-log line; None if never."""
    if not lengths or ratios[-1] < 1:
        return None
    below = [i for i, ratio in enumerate(ratios) if ratio < 1]
    if not below:
        return None
    a, b = below[-1], below[-1] + 1
    share = -math.log(ratios[a]) / (math.log(ratios[b]) - math.log(ratios[a]))
    return math.exp(math.log(lengths[a]) + share * (math.log(lengths[b]) - math.log(lengths[a])))


def draw_speedup(records: Records, path: Path) -> None:
    """The fastest dense one's time over that of NSA, of the attention and of the layer."""
    dense: dict[tuple[str, str, int], float] = {}
    for record in records:
        key = record["operation"], record["pass"], record["length"]
        dense[key] = min(dense.get(key, math.inf), record["median_ms"])

    def beside(record: dict[str, Any]) -> float | None:
        return dense.get((DENSE_OF.get(record["operation"], ""), record["pass"], record["length"]))

    whole = [record for record in records if beside(record)]
    figure, axes = _axes()
    labels = sorted({_label(record) for record in whole})
    for (name, label), line in _lines(whole).items():
        colour = f"C{labels.index(label) % 10}"
        lengths = [record["length"] for record in line]
        ratios = [beside(record) / record["median_ms"] for record in line]
        axes[name].plot(lengths, ratios, "o-", color=colour, label=label)
        place = crossover(lengths, ratios)
        if place is not None:
            axes[name].axvline(place, color=colour, ls=":", lw=1)
            axes[name].annotate(
                f"{place / 1024:.1f}K", (place, 1), xytext=(3, 3), textcoords="offset points", color=colour, fontsize=8
            )
    for ax in axes.values():
        if whole:
            _lengths_axis(ax, whole)
        ax.axhline(1, color="black", lw=0.8)
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter("{x:g}")
        ax.set(ylabel="times as fast as the fastest dense one")
    _legend(figure, axes)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw(records: Records, path: Path) -> list[Path]:
    """Draws what was timed.

    Args:
      records: of `experiments.bench_kernels`.
      path: its JSON file; figures go beside it.

    Returns:
      The figures' paths.
    """
    # A ragged length stands in the table, not between two others on a line.
    ragged = [record["length"] >= 1024 and record["length"] % 1024 > 0 for record in records]
    timed = [record for record, odd in zip(records, ragged, strict=True) if "median_ms" in record and not odd]
    drawn = []
    for name, figure in (("times", draw_times), ("parts", draw_parts), ("speedup", draw_speedup)):
        target = path.with_name(f"{path.stem}_{name}.png")
        figure(timed, target)
        drawn.append(target)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.kernel_plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("json", type=Path, nargs="+", metavar="JSON", help="written by experiments.bench_kernels")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="write all records there; figures beside it")
    options = parser.parse_args(arguments)
    try:
        result = kernel_results.merged([kernel_results.read(path) for path in options.json])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.merge:
        kernel_results.write(result, options.merge)
    for figure in draw(result["records"], options.merge or options.json[0]):
        print(figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
