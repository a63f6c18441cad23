"""What `experiments.plan` says of a compiled step: bytes on a device, exchanges, FLOPs, time, a verdict."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from experiments.program_reading import Reading, read_program
from pallas_kernels import tpu
from videonsa_jax.training.compiling import compile_program

GIB = 2**30

HBM_BYTES = {"v5e": 16e9, "v5p": 95e9, "v6e": 32e9}
"""Device memory; https://docs.cloud.google.com/tpu/docs. The compiler keeps some of it for itself."""

LINK_BYTES_PER_SECOND = {"v5e": 1600e9 / 8, "v5p": 4800e9 / 8, "v6e": 3584e9 / 8}
"""Between chips, all links of one chip together (the same source)."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device that a step is planned for.

    Attributes:
      name: a key of `tpu.CHIPS`, or the device's kind.
      hbm_bytes: its memory.
      flops_per_second: bfloat16 peak; None where it is not known.
      clock_hz: cycles per second; None where the compiler estimates no cycles.
      hbm_bytes_per_second: bandwidth of its memory; None likewise.
      link_bytes_per_second: to other devices; None likewise.
    """

    name: str
    hbm_bytes: float
    flops_per_second: float | None
    clock_hz: float | None = None
    hbm_bytes_per_second: float | None = None
    link_bytes_per_second: float | None = None


def tpu_chip(name: str) -> Chip:
    """The chip of a TPU topology; `name` is a key of `tpu.CHIPS`."""
    chip = tpu.CHIPS[name]
    return Chip(
        name,
        HBM_BYTES[name],
        chip.bf16_flops_per_second,
        chip.clock_hz,
        chip.hbm_bytes_per_second,
        LINK_BYTES_PER_SECOND[name],
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a step, on one device.

    Attributes:
      temporary_bytes: device memory beside arguments and results; None where it does not fit.
      refused: what the compiler said if it does not fit, else "".
      needed_bytes: device memory that the compiler wanted in all, where it refused.
      compute_seconds: the compiler's cycles over the clock, with Pallas kernels at the larger of their stated FLOPs
        over the peak and their stated bytes over the bandwidth; None without a model of the device.
      collectives: by kind, how many exchanges a run makes, the bytes that a device receives in them, and in those of
        them that other operations may run beside.
      uncounted: operations for which the compiler states no cycles, taken at bytes over bandwidth.
    """

    temporary_bytes: int | None
    refused: str = ""
    needed_bytes: float | None = None
    compute_seconds: float | None = None
    collectives: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    uncounted: int = 0

    @property
    def received_bytes(self) -> int:
        """Of all collectives."""
        return sum(one["bytes"] for one in self.collectives.values())


_UNITS = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40, "": 1}


def program_of(lower: Callable[[], Any], chip: Chip, mesh: Mesh, *, sparse_cores: bool) -> Program:
    """Compiles a program as the loop does and reads what the compiler says of it.

    Args:
      lower: gives the lowered program.
      chip: what it is for.
      mesh: the devices.
      sparse_cores: as `train.sparse_cores`.
    """
    try:
        compiled = compile_program(lower(), mesh, sparse_cores=sparse_cores)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = re.search(r"[Uu]sed ([\d.]+)([KMGT]?)i?B? of", str(error))
        needed_bytes = float(needed[1]) * _UNITS[needed[2]] if needed else None
        return Program(None, refused=str(error).splitlines()[0][:300], needed_bytes=needed_bytes)
    memory = compiled.memory_analysis()
    if chip.clock_hz is None:
        return Program(memory.temp_size_in_bytes)
    # Ranks take different branches; a step takes as long as the slowest.
    reading = read_program(compiled.as_text(), one_branch=True)
    seconds, uncounted = compute_seconds(reading, chip)
    return Program(
        memory.temp_size_in_bytes,
        compute_seconds=seconds,
        collectives=_by_kind(reading),
        uncounted=uncounted,
    )


def compute_seconds(reading: Reading, chip: Chip) -> tuple[float, int]:
    """Seconds of a program as `Program.compute_seconds` has them, and how many operations state no cycles."""
    seconds, uncounted = 0.0, 0
    for operation in reading.operations:
        if operation.cycles is not None:
            seconds += operation.runs * operation.cycles / chip.clock_hz
        elif not operation.exchanges:
            seconds += operation.runs * operation.bytes / chip.hbm_bytes_per_second
            uncounted += 1
    for kernel in reading.kernels.values():
        least = kernel.get("flops", 0) / chip.flops_per_second, kernel.get("bytes", 0) / chip.hbm_bytes_per_second
        seconds += kernel["runs"] * max(least)
    return seconds, uncounted


def _by_kind(reading: Reading) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = {}
    for one in reading.collectives:
        seen = kinds.setdefault(one.kind, {"runs": 0, "bytes": 0, "asynchronous_bytes": 0})
        seen["runs"] += one.runs
        seen["bytes"] += one.runs * one.bytes
        seen["asynchronous_bytes"] += one.runs * one.bytes * one.asynchronous
    return kinds


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step on a topology; bytes are of one device.

    Attributes:
      config: name of the experiment.
      topology: as it was asked for.
      devices: how many.
      mesh: devices along each axis.
      visual_tokens: of a context.
      text_tokens: of a row.
      contexts: of a batch.
      accumulation: batches a step.
      chip: the device.
      parameter_bytes: of the parameters.
      optimizer_bytes: of the optimiser's state, float32 masters included, as far as it stays on the device.
      host_bytes: of its part that waits in the host's memory (`train.offload_optimizer`); the update's temporaries have
        what of it is on the device.
      gradient_bytes: of the gradients' sums.
      batch_bytes: of one batch.
      kept_bytes: activations that JAX hands to the backward pass, shared evenly among the devices; the compiler may
        keep fewer.
      programs: "gradient" (forward and backward of a batch) and "update".
      flops: of a batch's forward and backward pass, by the formula of docs/training.md; None in the dialect "released".
      compile_seconds: tracing and compiling both programs.
    """

    config: str
    topology: str
    devices: int
    mesh: dict[str, int]
    visual_tokens: int
    text_tokens: int
    contexts: int
    accumulation: int
    chip: Chip
    parameter_bytes: int
    optimizer_bytes: int
    host_bytes: int
    gradient_bytes: int
    batch_bytes: int
    kept_bytes: int
    programs: dict[str, Program]
    flops: float | None
    compile_seconds: float

    @property
    def peak_bytes(self) -> float | None:
        """The most that a device holds; None where the compiler refused without a figure."""
        held = self.parameter_bytes + self.optimizer_bytes + self.batch_bytes + self.gradient_bytes
        peaks = []
        for name, program in self.programs.items():
            if program.temporary_bytes is not None:
                peaks.append(held + program.temporary_bytes)
            elif program.needed_bytes is None:
                return None
            else:  # what the program itself holds: the gradient's has no optimiser
                peaks.append(program.needed_bytes + self.optimizer_bytes * (name == "gradient"))
        return max(peaks)

    @property
    def fits(self) -> bool:
        """Whether the compiler took both programs and all of it lies in a device's memory at once."""
        return self.peak_bytes is not None and self.peak_bytes <= self.chip.hbm_bytes and not self._refused

    @property
    def _refused(self) -> str:
        return next((program.refused for program in self.programs.values() if program.refused), "")

    @property
    def compute_seconds(self) -> float | None:
        """Of one optimiser step, exchanges left out."""
        times = [self.programs[name].compute_seconds for name in ("gradient", "update")]
        return None if None in times else self.accumulation * times[0] + times[1]

    @property
    def exchange_seconds(self) -> float | None:
        """Bytes that a device receives in one optimiser step, at half the rate of its links: the other half sends."""
        if self.chip.link_bytes_per_second is None or self._refused:
            return None
        received = self.accumulation * self.programs["gradient"].received_bytes + self.programs["update"].received_bytes
        return received / (self.chip.link_bytes_per_second / 2)

    @property
    def step_flops(self) -> float | None:
        """Of one optimiser step, all devices."""
        return None if self.flops is None else self.accumulation * self.flops

    def mfu(self, seconds: float) -> float | None:
        """Share of the devices' peak if a step took so long."""
        if self.step_flops is None or self.chip.flops_per_second is None:
            return None
        return self.step_flops / (seconds * self.devices * self.chip.flops_per_second)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.peak_bytes is None:
            return f"does not fit: {self._refused}"
        room = self.chip.hbm_bytes - self.peak_bytes
        if self.chip.hbm_bytes == math.inf:
            return f"the memory of a {self.chip.name} is not known"
        if self.fits:
            return f"fits, with {room / GIB:.1f} GiB of {self.chip.hbm_bytes / GIB:.1f} left"
        return (
            f"does not fit: {-room / GIB:.1f} GiB more than the {self.chip.hbm_bytes / GIB:.1f} of a {self.chip.name}"
        )


def shown(plan: Plan) -> str:
    """The plan as lines for a terminal."""
    gib = lambda value: "?" if value is None else f"{value / GIB:8.2f} GiB"  # noqa: E731
    temporary = plan.programs["gradient"].temporary_bytes
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    lines = [
        f"{plan.config} on {plan.topology}: {plan.devices} x {plan.chip.name}, mesh {mesh}",
        f"a step: {plan.accumulation} x {plan.contexts} contexts of {plan.visual_tokens} visual tokens, rows of "
        f"{plan.text_tokens} text tokens",
        "",
        "bytes on a device",
        f"  parameters            {gib(plan.parameter_bytes)}",
        f"  optimiser             {gib(plan.optimizer_bytes)}",
        *([f"  optimiser, host's     {gib(plan.host_bytes)}"] if plan.host_bytes else []),
        f"  gradients             {gib(plan.gradient_bytes)}",
        f"  batch                 {gib(plan.batch_bytes)}",
        f"  activations kept      {gib(plan.kept_bytes)}",
        f"  other temporaries     {gib(temporary and max(temporary - plan.kept_bytes, 0))}",
        f"  update's temporaries  {gib(plan.programs['update'].temporary_bytes)}",
        f"  peak                  {gib(plan.peak_bytes)}",
    ]
    for name, program in plan.programs.items():
        for kind, one in program.collectives.items():
            received, beside = one["bytes"] / GIB, one["asynchronous_bytes"] / GIB
            lines.append(
                f"{name}: {one['runs']:5} {kind}, {received:.2f} GiB received a run, {beside:.2f} asynchronously"
            )
    if plan.step_flops is not None:
        lines.append(f"FLOPs of a step: {plan.step_flops:.3e}")
    if plan.compute_seconds is not None and plan.exchange_seconds is not None:
        compute, exchange = plan.compute_seconds, plan.exchange_seconds
        lines.append(
            f"the compiler's estimate: {compute:.2f} s of operations, {exchange:.2f} s of exchanges at links' rate; "
            f"{max(compute, exchange):.2f} s if they overlap wholly (MFU {plan.mfu(max(compute, exchange)) or 0:.0%}), "
            f"{compute + exchange:.2f} s if not at all (MFU {plan.mfu(compute + exchange) or 0:.0%})"
        )
    lines.append(f"verdict: {plan.verdict}")
    return "\n".join(lines)


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan and what follows from it."""
    derived = ("peak_bytes", "fits", "compute_seconds", "exchange_seconds", "step_flops", "verdict")
    return dataclasses.asdict(plan) | {name: getattr(plan, name) for name in derived}
