"""A trace of some steps, to be looked at with xprof or TensorBoard."""

import re
from pathlib import Path
from typing import Any

import jax

PROFILE_FOLDER = "profile"


def parse_steps(text: str) -> range:
    """Reads "100-103" or "100", numbers of steps; ValueError if it is something else."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(f"--profile is {text!r}, expected the numbers of steps, STEP or FIRST-LAST, from 1 on")
    return range(first, last + 1)


class StepProfiler:
    """Writes a trace of some steps into the run's folder, one file per start of the run."""

    def __init__(self, steps: range, workdir: Path, *, enabled: bool = True):
        """Nothing happens before the first of the steps.

        Args:
          steps: their numbers; those that an earlier start of the run has done are left out.
          workdir: folder of the run.
          enabled: False on all processes but one: they run the same program.
        """
        self._steps, self._folder = (steps if enabled else range(0)), workdir / PROFILE_FOLDER
        self._annotation: Any = None
        self._tracing = False

    def begin(self, step: int) -> None:
        """A step begins."""
        if step not in self._steps:
            return
        if not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
        self._annotation.__enter__()

    def end(self, step: int) -> Path | None:
        """A step is over, on the devices too; the trace's folder if it was the last of them."""
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if not self._tracing or step + 1 in self._steps:
            return None
        self._stop()
        return self._folder

    def _stop(self) -> None:
        self._tracing = False
        jax.profiler.stop_trace()

    def close(self) -> None:
        """Writes what has been traced, where the run ends among the steps."""
        if self._tracing:
            self._stop()
