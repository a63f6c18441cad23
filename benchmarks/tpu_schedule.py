"""Models the time of every TPU kernel from the compiler's final schedule, beside JAX's splash attention.

    python -m benchmarks.tpu_schedule --programs=DIR     # needs libtpu (requirements-tpu.txt), no TPU

compiles every case of `tpu_cases` and the published ones of `tpu_calibration` ahead of time for v5e, v5p and v6e,
writes benchmarks/results/tpu_schedule.json and the tables between the markers of docs/tpu.md. Nothing runs on a TPU.
With --programs, a case that lowers to the same program as last time is not compiled again.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jaxlib

from benchmarks import tpu_calibration, tpu_cases, tpu_compile, tpu_model, tpu_trips

ROOT = Path(__file__).parents[1]
CHIPS = tuple(tpu_compile.TOPOLOGIES)
BASELINE = "splash"
DRAWN = ("selected", "nsa")

type Record = dict[str, Any]


def model_case(program: tpu_compile.Program | str, case: str, chip: str) -> Record:
    """One case on one chip: what the compiler says and the modelled time, per rho where lists are drawn."""
    if isinstance(program, str):
        return {"refused": program}
    rhos = tpu_trips.RHOS if case.split()[0] in DRAWN else (None,)
    times = {rho: tpu_model.program_time(program, case, chip, 0.8 if rho is None else rho) for rho in rhos}
    first = next(iter(times.values()))
    return {
        "code_bytes": first.code_bytes,
        "temporary_bytes": first.temporary_bytes,
        "xla_ms": 1e3 * first.xla_seconds,
        "without_estimate": first.uncounted,
        "ms": {str(rho): 1e3 * time.seconds for rho, time in times.items()},
        "kernels": {
            kernel.name: {
                **{field.name: getattr(kernel, field.name) for field in dataclasses.fields(kernel)},
                "bound": kernel.bound,
                "ms": {str(rho): 1e3 * time.kernels[i].seconds for rho, time in times.items()},
            }
            for i, kernel in enumerate(times[0.8].kernels if 0.8 in times else first.kernels)
        },
    }


def calibration_rows(programs: dict[str, dict[str, tpu_compile.Program | str]]) -> list[Record]:
    """Published against modelled times."""
    rows = []
    for name, published in tpu_calibration.CASES.items():
        program = programs[published.chip].get(name, "not compiled")
        row: Record = {"case": name, "chip": published.chip, "published_ms": published.milliseconds}
        row["source"] = published.source
        if isinstance(program, str):
            row["refused"] = program
        else:
            time = tpu_model.program_time(program, name, published.chip)
            row["modelled_ms"] = 1e3 * time.seconds
            row["error"] = row["modelled_ms"] / published.milliseconds - 1
            row["bound"] = [kernel.bound for kernel in time.kernels] or ["XLA's estimate"]
        rows.append(row)
    return rows


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _milliseconds(x: float) -> str:
    return f"{x:.3g}" if x < 100 else f"{x:.0f}"


def whole_times(cases: Record) -> Record:
    """Milliseconds of the whole attention per rho and of the baseline, by case and chip.

    The baseline takes, kernel by kernel, the quickest of `tpu_cases.SPLASH_TILES`.
    """
    times: Record = {}
    for direction in tpu_cases.DIRECTIONS:
        for tokens in tpu_cases.TOKENS:
            name = f"{direction} {tokens}"
            for chip in CHIPS:
                sparse = cases.get(f"nsa {name}", {}).get(chip, {})
                if "ms" in sparse:
                    times.setdefault(f"nsa {name}", {})[chip] = sparse["ms"]
                tiles = [cases.get(f"{BASELINE} {name} {tiles}", {}).get(chip, {}) for tiles in tpu_cases.SPLASH_TILES]
                found = [record for record in tiles if "ms" in record]
                if found:
                    kernels = [_by_label(record) for record in found]
                    quickest = [min(_sum(x[label]) for x in kernels) for label in kernels[0]]
                    total = min(record["xla_ms"] for record in found) + sum(quickest)
                    times.setdefault(f"{BASELINE} {name}", {})[chip] = {"None": total}
    return times


def _sum(kernels: list[Record]) -> float:
    return sum(kernel["ms"]["None"] for kernel in kernels)


def verdict_table(cases: Record, times: Record) -> str:
    """NSA beside splash attention: time and ratio per rho."""
    rows = []
    for direction in tpu_cases.DIRECTIONS:
        for tokens in tpu_cases.TOKENS:
            for chip in CHIPS:
                dense, sparse = (times.get(f"{x} {direction} {tokens}", {}).get(chip) for x in (BASELINE, "nsa"))
                if dense is None or sparse is None:
                    continue
                base = dense["None"]
                ratios = [f"{_milliseconds(ms)} ({base / ms:.2f}x)" for ms in sparse.values()]
                temporary = f"{cases[f'nsa {direction} {tokens}'][chip]['temporary_bytes'] / 2**30:.2f}"
                rows.append([direction, tokens, chip, _milliseconds(base), *ratios, temporary])
    rhos = [f"NSA, rho {rho}" for rho in tpu_trips.RHOS]
    return table(["direction", "T", "chip", "splash, ms", *rhos, "NSA's HBM temporaries, GiB"], rows)


def _label(kernel: str) -> str:
    return re.sub(r"^(transpose_)?(jvp_?)*_*|_*(\.\d+)?$", "", kernel)


def _by_label(record: Record) -> dict[str, list[Record]]:
    kernels: dict[str, list[Record]] = {}
    for name, kernel in record.get("kernels", {}).items():
        kernels.setdefault(_label(name), []).append(kernel)
    return kernels


def _kernel_cell(parts: list[Record]) -> str:
    """Of one kernel, in as many instances as the program holds of it (a first chunk of keys and later ones)."""
    sums = [sum(times) for times in zip(*(part["ms"].values() for part in parts), strict=True)]
    longest = max(parts, key=lambda part: part["seconds"])
    times = " / ".join(map(_milliseconds, dict.fromkeys(sums)))
    size = f"{longest['bundles']} bundles, {max(part['vmem_bytes'] for part in parts) / 2**20:.1f} MiB"
    use = " / ".join(f"{100 * longest['use'][unit]:.0f}" for unit in ("MXU", "VALU", "VSTORE"))
    return f"**{times}** {longest['bound']}, {size}, {longest['spills']} spills, {use} %"


def _xla_cell(record: Record) -> str:
    if "ms" in record:
        return f"{_milliseconds(record['xla_ms'])}, code of all {record['code_bytes'] / 2**20:.1f} MiB"
    return f"refused: {record['refused'].splitlines()[0][:80]}" if "refused" in record else ""


def kernel_table(cases: Record) -> str:
    """Code, VMEM, slots used and modelled time of each kernel."""
    rows = []
    operations = {
        "nsa": "",
        "prefix": "",
        **{f"{BASELINE}, tiles {tiles}": f" {tiles}" for tiles in tpu_cases.SPLASH_TILES},
    }
    for operation, tiles in operations.items():
        for tokens in tpu_cases.TOKENS:
            chips = cases.get(f"{operation.split(',')[0]} train {tokens}{tiles}", {})
            kernels = {chip: _by_label(record) for chip, record in chips.items()}
            for label in dict.fromkeys(label for found in kernels.values() for label in found):
                cells = [
                    _kernel_cell(found[label]) if label in (found := kernels.get(chip, {})) else "" for chip in CHIPS
                ]
                rows.append([label, tokens, *cells])
            parts = [_xla_cell(chips.get(chip, {})) for chip in CHIPS]
            if any(parts):
                rows.append([f"XLA's part of {operation}", tokens, *parts])
    return table(["kernel", "T", *CHIPS], rows)


def calibration_table(rows: list[Record]) -> str:
    """Published times, modelled times and the error."""
    return table(
        ["call", "chip", "published, ms", "modelled, ms", "error", "bound by", "source"],
        (
            [
                row["case"],
                row["chip"],
                row["published_ms"],
                f"{row['modelled_ms']:.3f}" if "modelled_ms" in row else row["refused"].splitlines()[0][:60],
                f"{100 * row['error']:+.0f} %" if "error" in row else "",
                ", ".join(row.get("bound", [])),
                row["source"],
            ]
            for row in rows
        ),
    )


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a file.

    Args:
      path: the file.
      name: of the markers.
      text: put between them.

    Raises:
      ValueError: the file lacks the markers.
    """
    before = path.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in before or end not in before:
        raise ValueError(f"{path} has no markers {start.strip()} and {end}, expected both")
    head, rest = before.split(start, 1)
    after = head + start + text + end + rest.split(end, 1)[1]
    partial = path.with_suffix(".partial")
    partial.write_text(after)
    partial.replace(path)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, help="folder that keeps what was compiled; default a temporary one")
    parser.add_argument("--compiled", action="store_true", help="compile nothing: take what lies in --programs")
    parser.add_argument("--cases", default="", help="only cases that contain one of these, comma-separated")
    parser.add_argument("--workers", type=int, default=1, help="chips that compile at the same time")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/tpu_schedule.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/tpu.md", help="file with the tables' markers")
    options = parser.parse_args(arguments)
    wanted = [part for part in options.cases.split(",") if part]
    names = [name for name in tpu_cases.names() if not wanted or any(part in name for part in wanted)]

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.workers) as pool:
        folder = options.programs or Path(temporary)

        def compile_all(chip: str) -> dict[str, tpu_compile.Program | str]:
            wished = [name for name, case in tpu_calibration.CASES.items() if case.chip == chip] + names
            if not options.compiled:
                tpu_compile.compile_cases(wished, chip, folder)
            return tpu_compile.read_cases(wished, chip, folder)

        programs = dict(zip(CHIPS, pool.map(compile_all, CHIPS), strict=True))

    cases = {
        name: {chip: model_case(programs[chip][name], name, chip) for chip in CHIPS if name in programs[chip]}
        for name in names
    }
    calibration = calibration_rows(programs)
    whole = whole_times(cases)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    record = {
        "what": "modelled from ahead-of-time compiles; nothing was timed on a TPU",
        "command": "python -m benchmarks.tpu_schedule",
        "commit": head.stdout.strip(),
        "versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "libtpu": _libtpu_version()},
        "calibration": calibration,
        "whole": whole,
        "cases": cases,
    }
    partial = options.json.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(options.json)
    write_between(options.docs, "verdict", verdict_table(cases, whole))
    write_between(options.docs, "kernels", kernel_table(cases))
    write_between(options.docs, "calibration", calibration_table(calibration))
    print(verdict_table(cases, whole))
    print(calibration_table(calibration))


def _libtpu_version() -> str:
    from importlib import metadata

    return metadata.version("libtpu")


if __name__ == "__main__":
    main()
