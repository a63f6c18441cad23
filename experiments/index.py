"""Reads once what an experiment's videos hold, and says which questions it will train on.

    python -m experiments.index --config=nsa_video_7b --set data.source='LLaVA-Video-178K/*_v0_1' \\
        --set data.tokenizer=tokenizer.json

Every video's header is read by one of --workers processes and noted in the file that data.video_index names; stopped or
killed, the same command goes on where it was, and later it reads only files that are new or have changed. Then it
prints what is left out, by reason, and the batches that remain, and writes the same beside the index
(INDEX.summary.json). Training with the same config reads the index, not the headers.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import configs
from experiments.overrides import apply_overrides
from videonsa_jax.data.pipeline import Pipeline, build_pipeline, split_records
from videonsa_jax.data.records import DataError
from videonsa_jax.data.video_index import Progress, build_video_index
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.errors import UsageError, usage_errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a registered name")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="as training will be given")
    cores = os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=2 * cores, metavar="N", help="processes; default 2 a core")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="time limit for one file; default 20")
    parser.add_argument("--every", type=float, default=10.0, metavar="S", help="seconds between lines; default 10")
    return parser


def _experiment(name: str, overrides: Sequence[str]) -> Experiment:
    experiment = apply_overrides(configs.get(name), overrides)
    missing = [f"data.{path}" for path in configs.missing_fields(experiment.data)]
    if missing:
        raise ValueError(f"config {name} needs {', '.join(missing)}: add --set {missing[0]}=...")
    if not experiment.data.video_index:
        raise ValueError("data.video_index is empty, expected the index to build: add --set data.video_index=FILE")
    return experiment


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _left(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name} left"
    return f"{seconds:.0f} s left"


def _show(progress: Progress) -> None:
    rate = progress.read / progress.seconds if progress.seconds > 0 else 0.0
    line = f"{progress.done:,} of {progress.total:,} videos ({_share(progress.done, progress.total)})"
    if progress.read:
        line += f", {rate:.0f} a second"
        if progress.done < progress.total:
            line += f", {_left((progress.total - progress.done) / rate)}"
    unusable = ", ".join(f"{count:,} {reason}" for reason, count in sorted(progress.unusable.items()))
    print(line + (f"; {unusable}" if unusable else ""), flush=True)


def _summary(pipeline: Pipeline, records: int, files: Counter[str], experiment: Experiment) -> dict[str, Any]:
    """What is kept and what is not, ready for JSON."""
    kept_videos = {record.video for record in pipeline.records}
    return {
        "config": experiment.name,
        "data": dataclasses.asdict(experiment.data),
        "read": {"records": records + sum(files.values())},
        "left_out_of_files": dict(files),
        "left_out": {
            reason: {"records": count, "videos": pipeline.dropped_videos.get(reason)}
            for reason, count in pipeline.dropped.items()
            if reason not in files
        },
        "kept": {
            "records": len(pipeline.records),
            "videos": len(kept_videos),
            "records_per_video": len(pipeline.records) / len(kept_videos),
        },
        "buckets": [
            {
                "visual_tokens": shape.visual_tokens,
                "frames": shape.frames,
                "patches": shape.patches,
                "contexts": contexts,
            }
            for shape, contexts in zip(pipeline.shapes, pipeline.contexts_per_bucket, strict=True)
        ],
        "text_tokens": pipeline.shapes[0].text_tokens,
        "padding": dataclasses.asdict(pipeline.padding),
        "batches_per_epoch": pipeline.steps_per_epoch,
    }


def _print_summary(summary: dict[str, Any]) -> None:
    def row(name: str, records: int, videos: int | None = None) -> None:
        print(f"{name:48}{records:>12,}" + (f"{videos:>10,}" if videos is not None else ""))

    print(f"\n{'':48}{'records':>12}{'videos':>10}")
    row("in the files", summary["read"]["records"])
    for reason, count in summary["left_out_of_files"].items():
        row(f"- {reason}", count)
    for reason, count in summary["left_out"].items():
        row(f"- {reason}", count["records"], count["videos"])
    kept, padding = summary["kept"], summary["padding"]
    row("= kept", kept["records"], kept["videos"])
    print(f"{'records of a video':48}{kept['records_per_video']:>12.2f}")
    print(f"\n{'visual tokens':>14}{'frame pairs':>13}{'patches':>9}{'contexts':>10}")
    for bucket in summary["buckets"]:
        print(f"{bucket['visual_tokens']:>14,}{bucket['frames']:>13,}{bucket['patches']:>9,}{bucket['contexts']:>10,}")
    print(
        f"padding: {padding['visual_tokens']:.1%} of visual tokens, {padding['patches']:.1%} of patches, "
        f"{padding['text_tokens']:.1%} of text rows of {summary['text_tokens']} tokens, {padding['rows']:.1%} of rows; "
        f"{summary['batches_per_epoch']:,} batches an epoch"
    )


def _write(path: Path, summary: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(summary, indent=1) + "\n")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0 done, 2 what you can mend, 130 stopped by Ctrl-C or SIGTERM."""
    options = _parser().parse_args(arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what has been read is saved
    try:
        with usage_errors():
            if options.workers < 1 or not 0 < options.seconds < math.inf:
                raise ValueError(
                    f"--workers is {options.workers} and --seconds {options.seconds}, expected more than 0"
                )
            experiment = _experiment(options.config, options.set)
        data = experiment.data
        splits = {
            split: split_records(data, split) for split in ("train", "heldout") if split == "train" or data.heldout
        }
        build_video_index(
            data.video_index,
            [record.video for records, _ in splits.values() for record in records],
            workers=options.workers,
            seconds_limit=options.seconds,
            report=_show,
            report_seconds=options.every,
        )
        with usage_errors():
            pipeline = build_pipeline(data, experiment.model, split="train", seed=experiment.seed)
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {data.video_index} holds what was read, the same command goes on", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    records, files = splits["train"]
    summary = _summary(pipeline, len(records), files, experiment)
    _print_summary(summary)
    _write(Path(f"{data.video_index}.summary.json"), summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
