"""Reads the TPU compiler's final schedule: which instructions issue together, in which loop and behind which branch.

`final_bundles.txt` holds one line per VLIW bundle, which issues in one cycle unless a transfer is waited for, and names
the targets of branches; `static-per-bundle-utilization.txt` holds the slots that each bundle uses. A branch is taken
four bundles after its own.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:")
_REGION_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_BRANCH = re.compile(r"sbr\.rel(?:\.[a-z]+)*\s*\(([^)]*)\)\s*target = \$region(\d+)")
_LOOP_EXIT = re.compile(r"totalorder %s\S+, (\d+) /\* loop exit test")
_DELAY_SLOTS = 4
_MATMUL = "MXU"


@dataclasses.dataclass(frozen=True)
class Region:
    """A kernel, or a loop body or a branch's body inside it.

    Attributes:
      kind: what it is; a branch's body may be skipped.
      start: its first bundle.
      end: one past its last bundle.
      own: bundles outside its inner regions.
      slots: uses of each unit's slots in the own bundles.
      transfers: own bundles that start a transfer between memories.
      limit: what the loop's counter is compared with, where that is a constant.
      inner: loops and branches directly inside.
    """

    kind: Literal["kernel", "loop", "branch"]
    start: int
    end: int
    own: int
    slots: dict[str, int]
    transfers: int
    limit: int | None
    inner: tuple["Region", ...]

    @property
    def multiplies(self) -> bool:
        """Whether its own bundles use the matrix units."""
        return self.slots.get(_MATMUL, 0) > 0

    @property
    def computes(self) -> bool:
        """Whether its own bundles use the vector units at all."""
        return any(self.slots.get(unit, 0) for unit in (_MATMUL, "VALU", "XLU", "EUP", "VSTORE"))

    def walk(self) -> Iterator["Region"]:
        """Yields the region and all inside, in program order."""
        yield self
        for region in self.inner:
            yield from region.walk()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The final schedule of one kernel.

    Attributes:
      name: the HLO instruction's.
      bundles: length of the program.
      capacity: slots per bundle of each unit.
      slots: slots used by each unit in the whole program.
      body: the program.
    """

    name: str
    bundles: int
    capacity: dict[str, int]
    slots: dict[str, int]
    body: Region

    @property
    def spills(self) -> int:
        """Stores and loads of vector registers that found no place."""
        return self.slots.get("VSTORE:SPILL", 0) + self.slots.get("VLOAD:FILL", 0)

    def static_cycles(self) -> int | None:
        """Bundles by the loops' constant limits, every branch taken; None where a loop has no such limit."""

        def count(region: Region, runs: int) -> int:
            return runs * region.own + sum(count(x, runs * (x.limit if x.kind == "loop" else 1)) for x in region.inner)

        if any(region.kind == "loop" and region.limit is None for region in self.body.walk()):
            return None
        return count(self.body, 1)

    def use(self, region: Region, unit: str) -> float:
        """Share of a unit's slots that the region's own bundles use."""
        return region.slots[unit] / (self.capacity[unit] * max(region.own, 1))


_BUNDLES, _USE = r"\d+-final_bundles\.txt", r"\d+-final_hlo-static-per-bundle-utilization\.txt"


def is_dumped(folder: Path, name: str) -> bool:
    """Whether the compiler dumped the schedule of an HLO instruction."""
    return bool(_dumps(folder, name, _BUNDLES))


def read_schedules(folder: Path, names: set[str]) -> dict[str, Schedule]:
    """Reads the dumps of the named kernels.

    Args:
      folder: where the compiler wrote to.
      names: HLO instructions.

    Returns:
      A schedule per name.

    Raises:
      FileNotFoundError: a kernel without dumps.
      ValueError: a dump of an unknown form.
    """
    schedules = {}
    for name in sorted(names):
        bundles, use = (_dumps(folder, name, suffix) for suffix in (_BUNDLES, _USE))
        if not bundles or not use:
            raise FileNotFoundError(f"{folder} holds no final bundles of {name}: did the compiler dump its schedule?")
        schedules[name] = parse_schedule(name, bundles[-1].read_text(), use[-1].read_text())
    return schedules


def _dumps(folder: Path, name: str, suffix: str) -> list[Path]:
    pattern = re.compile(rf"\d+-{re.escape(name)}-{suffix}")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def parse_schedule(name: str, bundles: str, utilization: str) -> Schedule:
    """Builds the tree of loops and branches of one kernel, with the slots that each uses.

    Args:
      name: the kernel's.
      bundles: text of `final_bundles.txt`.
      utilization: text of `final_hlo-static-per-bundle-utilization.txt`.

    Returns:
      The schedule.

    Raises:
      ValueError: texts that do not belong together, or branches that cross.
    """
    lines = [line for line in bundles.splitlines() if _BUNDLE.match(line)]
    header, *rows = [line for line in utilization.splitlines() if line and not line.startswith("==")]
    units = [unit.strip() for unit in header.split(",")]
    capacity = dict(zip(units, map(int, rows[0].split()), strict=True))
    used = [tuple(map(int, row.split())) for row in rows[1:]]
    if len(used) != len(lines):
        raise ValueError(f"{name}: {len(lines)} bundles but utilization of {len(used)}, expected as many")

    places = {int(number): i for i, line in enumerate(lines) for number in _REGION_START.findall(line)}
    spans: list[tuple[int, int, Literal["loop", "branch"]]] = []
    for i, line in enumerate(lines):
        for predicate, target in _BRANCH.findall(line):
            place, after = places[int(target)], min(i + 1 + _DELAY_SLOTS, len(lines))
            if place > i:
                spans.append((min(after, place), place, "branch"))
            else:
                spans.append((place, after, "loop"))
            if not predicate:
                raise ValueError(f"{name}: branch without a predicate at bundle {i}")

    spans.sort(key=lambda span: (span[0], -span[1]))
    position = 0

    def build(kind: Literal["kernel", "loop", "branch"], start: int, end: int) -> Region:
        nonlocal position
        inner = []
        while position < len(spans) and spans[position][0] < end:
            first, last, inside = spans[position]
            if last > end:
                raise ValueError(f"{name}: {inside} of bundles {first} to {last} crosses the end of a {kind} at {end}")
            position += 1
            inner.append(build(inside, first, last))
        covered = {i for region in inner for i in range(region.start, region.end)}
        own = [i for i in range(start, end) if i not in covered]
        limits = [int(x) for i in own for x in _LOOP_EXIT.findall(lines[i])] if kind == "loop" else []
        return Region(
            kind=kind,
            start=start,
            end=end,
            own=len(own),
            slots={unit: sum(used[i][n] for i in own) for n, unit in enumerate(units)},
            transfers=sum("dma." in lines[i] and "dma.done" not in lines[i] for i in own),
            limit=limits[-1] if limits else None,
            inner=tuple(inner),
        )

    body = build("kernel", 0, len(lines))
    totals = {unit: sum(row[n] for row in used) for n, unit in enumerate(units)}
    return Schedule(name=name, bundles=len(lines), capacity=capacity, slots=totals, body=body)


def to_json(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain containers."""
    return dataclasses.asdict(schedule)


def from_json(record: dict[str, Any]) -> Schedule:
    """Inverse of `to_json`."""

    def region(record: dict[str, Any]) -> Region:
        return Region(**{**record, "inner": tuple(region(inner) for inner in record["inner"])})

    return Schedule(**{**record, "body": region(record["body"])})
