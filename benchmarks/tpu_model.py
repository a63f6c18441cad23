"""A time from a compiled program: bundles by trip counts over the clock, against bytes over bandwidth.

It is a model: nothing of it was timed. What it leaves out: waits of the vector units for memory banks and matrix
results beyond what the compiler schedules, the first fetch of each kernel, and overlap of XLA's own operations with
anything but their asynchronous copies, which count as free.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from benchmarks import tpu_bundles, tpu_compile, tpu_trips
from benchmarks.tpu_bundles import Region, Schedule
from benchmarks.tpu_trips import Work
from pallas_kernels.tpu import CHIPS, Chip

TRANSFER_SECONDS = 0.35e-6
"""Least time of a grid step that waits for a block: 91.84 ms / 64^3 steps of the published product in 128 tiles."""

_PIPELINE_STEPS = 2  # a grid's loop runs so much longer than the grid, to fill and drain its pipeline


@dataclasses.dataclass(frozen=True)
class KernelTime:
    """A kernel's modelled time.

    Attributes:
      name: the HLO instruction's.
      seconds: the largest of the three below.
      compute: bundles over clock.
      memory: bytes over bandwidth.
      latency: steps that wait for a transfer by `TRANSFER_SECONDS`.
      bundles: code size.
      vmem_bytes: used.
      spills: register loads and stores in the code.
      cores: on which the grid is split.
      use: share of the slots of the matrix, vector, cross-lane, transcendental, load and store units in the bundles of
        the loop (or branch) that takes the most time.
    """

    name: str
    seconds: float
    compute: float
    memory: float
    latency: float
    bundles: int
    vmem_bytes: int
    spills: int
    cores: int
    use: dict[str, float]

    @property
    def bound(self) -> Literal["compute", "memory", "latency"]:
        """Which of the three is the largest."""
        return max(("compute", "memory", "latency"), key=lambda part: getattr(self, part))


@dataclasses.dataclass(frozen=True)
class ProgramTime:
    """A program's modelled time.

    Attributes:
      kernels: of the Pallas kernels.
      xla_seconds: of everything else, by the compiler's own estimates.
      uncounted: operations for which the compiler states no cycles, taken at bytes over bandwidth.
      code_bytes: of the program.
      temporary_bytes: of device memory.
    """

    kernels: tuple[KernelTime, ...]
    xla_seconds: float
    uncounted: tuple[str, ...]
    code_bytes: int
    temporary_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole program."""
        return self.xla_seconds + sum(kernel.seconds for kernel in self.kernels)


def program_time(program: tpu_compile.Program, case: str, chip_name: str, rho: float = 0.8) -> ProgramTime:
    """Models a compiled case.

    Args:
      program: as compiled with schedules.
      case: its name.
      chip_name: a key of `pallas_kernels.tpu.CHIPS`.
      rho: how alike neighbours choose.

    Returns:
      The time and its parts.
    """
    chip = CHIPS[chip_name]
    runs = {name: kernel["runs"] for name, kernel in program.kernels.items()}
    works = tpu_trips.works(case, chip_name, runs, rho)
    kernels = []
    for name, kernel in program.kernels.items():
        schedule = tpu_bundles.from_json(kernel["schedule"])
        kernels.append(kernel_time(schedule, works[name], runs[name], kernel["vmem_bytes"], chip))
    seconds, uncounted = 0.0, []
    for operation in program.operations:
        if operation.name.startswith(("copy-start", "slice-start", "async-start")):
            continue
        if operation.cycles is None:
            uncounted.append(operation.name)
            seconds += operation.runs * operation.bytes / chip.hbm_bytes_per_second
        else:
            seconds += operation.runs * operation.cycles / chip.clock_hz
    return ProgramTime(tuple(kernels), seconds, tuple(uncounted), program.code_bytes, program.temporary_bytes)


def kernel_time(schedule: Schedule, work: Work, runs: int, vmem_bytes: int, chip: Chip) -> KernelTime:
    """Models a kernel.

    Args:
      schedule: its bundles.
      work: of all its runs together.
      runs: how often the program runs it.
      vmem_bytes: used, to be passed on.
      chip: the TPU.

    Returns:
      The time and its parts.

    Raises:
      ValueError: a kernel with other loops than `work` counts.
    """
    grid = next((region for region in schedule.body.inner if region.kind == "loop"), None)
    limit = grid.limit if grid is not None else None
    cores = max(1, round(work.steps / runs / max(limit - _PIPELINE_STEPS, 1))) if limit else 1
    counts = list(region_runs(schedule, work, runs))
    compute = sum(count * region.own for region, count in counts) / cores / chip.clock_hz
    memory = work.hbm_bytes / chip.hbm_bytes_per_second
    latency = work.transfers * TRANSFER_SECONDS / cores
    busiest = max(counts, key=lambda pair: pair[0].own * pair[1])[0]
    units = ("MXU", "VALU", "XLU", "EUP", "VLOAD", "VSTORE")
    return KernelTime(
        name=schedule.name,
        seconds=max(compute, memory, latency),
        compute=compute,
        memory=memory,
        latency=latency,
        bundles=schedule.bundles,
        vmem_bytes=vmem_bytes,
        spills=schedule.spills,
        cores=cores,
        use={unit: round(schedule.use(busiest, unit), 3) for unit in units},
    )


def region_runs(schedule: Schedule, work: Work, runs: int) -> Iterator[tuple[Region, float]]:
    """How often each region of a kernel runs, on all cores together.

    Args:
      schedule: the kernel's.
      work: of all its runs.
      runs: of the kernel.

    Yields:
      Regions and their runs.

    Raises:
      ValueError: a kernel with other loops or products than `work` counts.
    """
    loops, products = list(work.loops), list(work.products)

    def take(counts: list[float], what: str, region: Region) -> float:
        if not counts:
            raise ValueError(
                f"{schedule.name} has more {what} than {len(getattr(work, what))}, one at bundle {region.start}: "
                "benchmarks/tpu_trips.py must count them"
            )
        return counts.pop(0)

    def visit(region: Region, count: float) -> Iterator[tuple[Region, float]]:
        yield region, count
        for inner in region.inner:
            if inner.kind == "loop":
                yield from visit(inner, take(loops, "loops", inner))
            elif any(part.kind == "loop" for part in inner.walk()):
                yield from visit(inner, count)
            elif inner.multiplies:
                yield from visit(inner, take(products, "products", inner))
            elif any(part.multiplies for part in inner.walk()):
                yield from visit(inner, count)
            else:
                yield from visit(inner, min(count, work.rows) if inner.computes else count)

    yield schedule.body, runs
    grid = [region for region in schedule.body.inner if region.kind == "loop"][:1]
    for region in schedule.body.inner:
        if region in grid:
            yield from visit(region, work.steps + _PIPELINE_STEPS * runs)
        else:
            yield from visit(dataclasses.replace(region, kind="branch"), runs)
    if loops or products:
        raise ValueError(
            f"{schedule.name} has {len(work.loops) - len(loops)} loops and {len(work.products) - len(products)} "
            f"products, benchmarks/tpu_trips.py counts {len(work.loops)} and {len(work.products)}"
        )
