"""What a run says while it runs: JSON lines always, TensorBoard files on request, a progress bar or plain lines."""

import io
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def keep_metrics_until(path: Path, step: int) -> None:
    """Drops the lines past a step: those that an interrupted run wrote after its last checkpoint."""
    if not path.exists():
        return
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)


class MetricsWriter:
    """Writes a run's metrics to `metrics.jsonl`, and to TensorBoard if asked."""

    def __init__(self, workdir: Path, *, tensorboard: bool, enabled: bool = True):
        """Opens the files.

        Args:
          workdir: folder of the run.
          tensorboard: write TensorBoard files too.
          enabled: False on all processes but the first, which write nothing.

        Raises:
          ValueError: TensorBoard is wanted and tensorboardX is not installed.
        """
        self._jsonl = self._board = None
        if not enabled:
            return
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError as error:
                raise ValueError(
                    'train.tensorboard needs tensorboardX, which is not installed: pip install "videonsa-jax[eval]"'
                ) from error
            self._board = SummaryWriter(str(workdir / "tensorboard"))
        self._jsonl = (workdir / METRICS_FILE).open("a")

    def write(self, kind: str, step: int, values: Mapping[str, int | float | None]) -> None:
        """Appends one line; None is null, and values that JSON has no number for (nan, inf) are strings."""
        if self._jsonl is None:
            return
        known = {name: value for name, value in values.items() if value is not None}
        numbers = dict(values) | {name: str(value) for name, value in known.items() if not math.isfinite(value)}
        self._jsonl.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")
        self._jsonl.flush()
        if self._board is not None:
            for name, value in known.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._board is not None:
            self._board.close()


@dataclass(frozen=True)
class StepTime:
    """Where a step's time went, as one process sees it.

    Attributes:
      seconds: of the whole step, compilation apart.
      waiting: of them, waiting for input.
      host: of them, until the devices had all they needed: waiting, and handing the work over.
      loading: CPU seconds of the loader's threads or processes for the step's input, whenever they were spent.
    """

    seconds: float
    waiting: float
    host: float
    loading: float


class StepClock:
    """Time, tokens and FLOPs since the last metric line.

    Processes end a step together, for its collectives do: one that is late with its part shows in its own `host`
    seconds, and in the `seconds` of all.
    """

    def __init__(self, gather: Callable[[np.ndarray], np.ndarray], peak_flops_per_second: float | None):
        """Starts the clock.

        Args:
          gather: a row of figures of this process to the rows of all, `[n] -> [processes, n]`; a collective.
          peak_flops_per_second: of all devices together; None where it is not known.
        """
        self._gather, self._peak = gather, peak_flops_per_second
        self._start()

    def _start(self) -> None:
        self._steps = self._visual = self._text = 0
        self._seconds = self._waiting = self._host = self._loading = self._flops = 0.0

    def add(self, time: StepTime, *, visual_tokens: int, text_tokens: int, flops: float | None) -> None:
        """Counts one step; tokens of all processes, `flops` of this one's batches, None if they are not counted."""
        self._steps += 1
        self._seconds += time.seconds
        self._waiting += time.waiting
        self._host += time.host
        self._loading += time.loading
        self._visual += visual_tokens
        self._text += text_tokens
        self._flops += math.nan if flops is None else flops

    def read_and_reset(self) -> dict[str, float | None]:
        """The figures since the last call (docs/training.md, "Metrics"), and starts anew; all processes call it."""
        steps, seconds = max(self._steps, 1), max(self._seconds, 1e-9)
        own = np.array([self._seconds, self._waiting, self._host, self._loading, self._flops]) / steps
        step, waiting, host, loading, flops = self._gather(own).T
        rate = float(flops.sum()) * steps / seconds
        figures = {
            "step_seconds": self._seconds / steps,
            "wait_share": self._waiting / seconds,
            "wait_seconds": float(waiting.max()),
            "loading_seconds": float(loading.sum()),
            "straggler": float(step.max() / max(np.median(step), 1e-9)),
            "straggler_process": int(host.argmax()),
            "straggler_seconds": float(host.max() - np.median(host)),
            "visual_tokens_per_second": self._visual / seconds,
            "text_tokens_per_second": self._text / seconds,
            "flops_per_second": None if math.isnan(rate) else rate,
            "mfu": None if self._peak is None or math.isnan(rate) else rate / self._peak,
        }
        self._start()
        return figures


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


class Progress:
    """A bar on a terminal, a line per metric line in a log; silent on all processes but the first."""

    def __init__(self, total: int, done: int, *, enabled: bool = True, stream: io.TextIOBase | None = None):
        """Shows a run of `total` steps of which `done` are done; `stream` defaults to stderr."""
        self._stream = sys.stderr if stream is None else stream
        self._enabled, self._total = enabled, total
        on_terminal = enabled and self._stream.isatty()
        self._bar = (
            tqdm(total=total, initial=done, unit="step", file=self._stream, dynamic_ncols=True) if on_terminal else None
        )

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._enabled:
            print(line, file=self._stream, flush=True)

    def step(self) -> None:
        """Moves the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, values: Mapping[str, int | float | None]) -> None:
        """Shows a metric line's values."""
        rate = f"{values['visual_tokens_per_second']:,.0f}+{values['text_tokens_per_second']:,.0f} tok/s"
        if values["mfu"] is not None:
            rate = f"MFU {values['mfu']:.1%}, {rate}"
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['loss']:.4f}, {rate}, wait {values['wait_share']:.0%}")
            return
        self.say(
            f"step {step}/{self._total}  loss {values['loss']:.4f}  grad norm {values['grad_norm']:.3f}  "
            f"lr {values['learning_rate']:.2e}  {values['step_seconds']:.3f} s/step  {rate} (visual+text)  "
            f"waiting {values['wait_share']:.0%}  ETA {_duration(values['step_seconds'] * (self._total - step))}"
        )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
