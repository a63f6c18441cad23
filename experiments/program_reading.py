"""Reads the scheduled HLO text of a program compiled ahead of time for a TPU: what runs, how often, what it moves."""

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "after-all"}
_BITS = {"pred": 8, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Operation:
    """One scheduled operation that XLA made.

    Attributes:
      name: the HLO instruction's.
      runs: how often the program runs it.
      cycles: the compiler's estimate of one run; None where it states none.
      bytes: of operands and results of one run.
      exchanges: whether it is part of a collective, whose cycles no compiler states.
    """

    name: str
    runs: int
    cycles: int | None
    bytes: int
    exchanges: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      runs: how often the program runs it.
      bytes: that one device receives in one run.
      asynchronous: other operations may run between its start and its end.
    """

    kind: str
    runs: int
    bytes: int
    asynchronous: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program runs.

    Attributes:
      kernels: Pallas kernels by HLO instruction, with `runs`, `vmem_bytes` and, where stated, `flops` and `bytes`.
      operations: everything else that takes time.
      collectives: exchanges between devices, those inside fusions included.
    """

    kernels: dict[str, dict[str, Any]]
    operations: tuple[Operation, ...]
    collectives: tuple[Collective, ...]


def array_bytes(text: str) -> int:
    """Bytes of the arrays whose types occur in a piece of HLO text."""
    return sum(_sizes(text))


def read_program(text: str, *, one_branch: bool = False) -> Reading:
    """What a scheduled HLO module runs, loops counted by their known trip counts.

    Args:
      text: `compiled.as_text()`.
      one_branch: of a conditional only the branch with the most cycles counts; else all of them do.

    Returns:
      Kernels, operations and collectives.

    Raises:
      ValueError: a loop whose trip count the compiler does not know.
    """
    bodies, entry = _computations(text)

    def visit(computation: str, runs: int) -> _Found:
        found = _Found({}, [], {})
        types = {name: re.split(r" [a-z][a-z0-9-]*\(", rest)[0] for name, rest in bodies[computation]}
        for name, rest in bodies[computation]:
            opcode = re.search(r" ([a-z][a-z0-9-]*)\(", rest)
            kind = opcode[1] if opcode else ""
            if kind in _FREE:
                continue
            exchanged = dict(_collectives(bodies, computation, name, rest, kind, runs))
            starts = kind.endswith("-start") or name.startswith("async-collective-start")
            for key, one in exchanged.items():
                earlier = found.exchanges.get(key, one)
                found.exchanges[key] = dataclasses.replace(one, asynchronous=starts or earlier.asynchronous)
            if kind.endswith("-done") or kind == "call-update":
                continue
            if kind == "while":
                found.add(visit(re.search(r"body=%?([^,\s]+)", rest)[1], runs * _trip_count(bodies, name, rest)))
            elif kind == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", rest)
                names = listed[1].split(",") if listed else re.findall(r"_computation=%?([^,\s]+)", rest)
                branches = [visit(branch.strip().lstrip("%"), runs) for branch in names]
                for branch in [max(branches, key=_Found.cycles)] if one_branch else branches:
                    found.add(branch)
            elif kind == "call":
                found.add(visit(re.search(r"to_apply=%?([^,\s]+)", rest)[1], runs))
            elif "tpu_custom_call" in rest:
                found.kernels[name] = {"runs": runs, **_kernel(rest)}
            else:
                estimate = re.search(r'"estimated_cycles":"(\d+)"', rest)
                arguments = re.findall(r"%([^\s,()]+)", rest.split("), ", 1)[0][opcode.end() :]) if opcode else []
                size = array_bytes(types[name]) + sum(array_bytes(types.get(x, "")) for x in arguments)
                cycles = int(estimate[1]) if estimate else None
                found.operations.append(Operation(name, runs, cycles, size, bool(exchanged)))
        return found

    found = visit(entry, 1)
    return Reading(found.kernels, tuple(found.operations), tuple(found.exchanges.values()))


@dataclasses.dataclass(frozen=True)
class _Found:
    """What one computation runs; exchanges by a key that their parts share."""

    kernels: dict[str, dict[str, Any]]
    operations: list[Operation]
    exchanges: dict[str, Collective]

    def add(self, other: "_Found") -> None:
        self.kernels.update(other.kernels)
        self.operations.extend(other.operations)
        self.exchanges.update(other.exchanges)

    def cycles(self) -> int:
        return sum(x.runs * (x.cycles or 0) for x in self.operations)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Instructions (name, rest of the line) by computation, and the entry's name."""
    bodies: dict[str, list[tuple[str, str]]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (head := _COMPUTATION.match(line)) and not line.startswith("HloModule"):
            current = head[2]
            bodies[current] = []
            entry = current if head[1] else entry
        elif _END.match(line):
            current = None
        elif current is not None and (instruction := _INSTRUCTION.match(line)):
            bodies[current].append((instruction[1], instruction[2]))
        elif current is not None and bodies[current]:
            name, rest = bodies[current][-1]
            bodies[current][-1] = (name, rest + line)
    return bodies, entry


def _sizes(text: str) -> Iterator[int]:
    for dtype, sizes in _ARRAY.findall(text):
        bits = _BITS.get(dtype, int(dtype[1:] or 8) if dtype[1:].isdigit() else 8)
        yield math.prod(int(size) for size in sizes.split(",") if size) * bits // 8


def _trip_count(bodies: dict[str, list[tuple[str, str]]], name: str, rest: str) -> int:
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', rest):
        return int(stated[1])
    condition = bodies[re.search(r"condition=%?([^,\s]+)", rest)[1]]
    limits = [re.search(r"[su]32\[\]\S* constant\((\d+)\)", line) for _, line in condition]
    limits = [int(limit[1]) for limit in limits if limit]
    if len(limits) != 1 or not any("direction=LT" in line for _, line in condition):
        raise ValueError(f"{name} is a loop of unknown length, expected one that counts from 0 to a constant")
    return limits[0]


def _kernel(rest: str) -> dict[str, Any]:
    used = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', rest)
    stated = {name: re.search(rf'"{key}":"?(\d+)"?', rest) for name, key in _COSTS.items()}
    costs = {name: int(found[1]) for name, found in stated.items() if found}
    return {"vmem_bytes": int(used[1]) if used else 0, **costs}


_COSTS = {"flops": "flops", "bytes": "bytes_accessed"}


def _collectives(
    bodies: dict[str, list[tuple[str, str]]], computation: str, name: str, rest: str, kind: str, runs: int
) -> Iterator[tuple[str, Collective]]:
    """Of one instruction, with a key that the parts of an asynchronous exchange (start, fusions, done) share."""
    # What a SparseCore exchanges is a computation that is called asynchronously.
    attribute = {"fusion": "calls", "call-start": "to_apply"}.get(kind)
    called = re.search(rf"{attribute}=%?([^,\s]+)", rest) if attribute else None
    if called:
        scatters = "reduce-scatter" in called[1]
        for inner, inner_rest in bodies.get(called[1], ()):
            opcode = re.search(r" ([a-z][a-z0-9-]*)\(", inner_rest)
            for key, one in _collectives(bodies, computation, inner, inner_rest, opcode[1] if opcode else "", runs):
                if scatters and one.kind == "all-reduce":
                    one = dataclasses.replace(one, kind="reduce-scatter", bytes=one.bytes // 2)
                yield key, one
    base = next((x for x in COLLECTIVES if kind in (x, f"{x}-start")), None)
    if base is None:
        return
    result, operands = rest.split(f" {kind}(", 1)
    # Of these starts, a tuple of operand, result and contexts: the largest array is the result. Other tuples are
    # exchanges that the compiler joined.
    has_operand = kind in ("all-gather-start", "collective-permute-start")
    size = max(_sizes(result), default=0) if has_operand else sum(_sizes(result))
    members = _group_size(rest)
    parts = {"all-reduce": 2.0, "reduce-scatter": float(members), "collective-permute": members / max(members - 1, 1)}
    moved = int(size * parts.get(base, 1.0) * (members - 1) / members)
    yield f"{computation}/{_exchange(name, operands)}", Collective(base, runs, moved)


def _exchange(name: str, operands: str) -> str:
    """What the parts of one asynchronous exchange share."""
    if chain := re.search(r'chain_id="(\d+)"', operands):
        return f"chain {chain[1]}"
    channel = re.search(r"channel_id=(\d+)", operands)
    # All collectives that `shard_map` makes are on channel 1.
    return f"channel {channel[1]}" if channel and channel[1] != "1" else name


def _group_size(rest: str) -> int:
    """Devices that exchange with one another."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        axes = re.findall(r"'([^']+)'", named[2] or "")
        return math.prod(sizes[axis] for axis in axes) if axes else math.prod(sizes.values())
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    return 2
