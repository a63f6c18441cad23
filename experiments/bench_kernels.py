"""Checks and times the attention kernels: every operation, implementation and length beside its floor.

    python -m experiments.bench_kernels --json=OUT.json
    python -m experiments.bench_kernels --ops=nsa_attention,dense_attention --lengths=65536 --rho=0,0.8 --json=OUT.json
    python -m experiments.bench_kernels --ops=nsa_attention --tensors=RUN/selection.npz --json=OUT.json

Shapes are VideoNSA-7B's (28 query heads over 4 KV heads of 128, blocks of 64, n = 32, w = 256, bfloat16, batch 1).
Sampled queries of every result, and the gradients that come through them, are compared with the float32 reference
before anything is timed; what fails is not timed, and the exit status is 1. Times are medians of samples that rotate
among several inputs; the JSON keeps every sample, with figures drawn beside it (PNG).

`nsa_attention` is timed with blocks drawn at a stated similarity rho of neighbours (experiments/drawn_cases.py): the
importance and the top-n of its own choice are computed all the same, compared with the drawn blocks so that they cannot
be left out, and the drawn ones go to selection ("rho 0.8"). Beside it stands its own choice on random arrays ("own")
and on those of a trained model ("trained LAYER", --tensors; the clip is repeated up to each length).
Floors are those of an H100: experiments/kernel_floors.py.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import kernel_checks
from experiments.drawn_cases import trained_cases, union_size
from experiments.kernel_floors import Unions, floor
from experiments.kernel_operations import OPERATIONS, Arrays, Operation
from experiments.timing import median_ms, poison
from pallas_kernels import block_means, block_selection, compressed_attention
from pallas_kernels.specs import Spec
from videonsa_jax.training.environment import environment

PASSES = ("fwd", "fwdbwd")
ON_GPU = ("mosaic_gpu", "cudnn_dense", "mosaic_dense")
ELSEWHERE = ("xla", "xla_dense")
GPU_LENGTHS, OTHER_LENGTHS = (8192, 16421, 16384, 32768, 65536, 131072), (256, 512)


class WrongValues(Exception):
    """A result that is not what the reference says."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One operation on inputs of one shape.

    Attributes:
      name: of the operation.
      choice: how its blocks come about, "" where it has none.
      spec: the shape.
      inputs: arrays, several sets.
      unions: how alike the drawn choice is; None where there is none.
    """

    name: str
    choice: str
    spec: Spec
    inputs: list[Arrays]
    unions: Unions | None = None

    @property
    def operation(self) -> Operation:
        """What is run."""
        return OPERATIONS[self.name]


def cases(name: str, length: int, options: argparse.Namespace) -> Iterator[Case]:
    """The cases of an operation at one length, each drawn when it is asked for."""
    operation = OPERATIONS[name]
    spec = Spec(f"7B, {length}", queries=length, keys=length)

    def drawn(choice: float | None) -> list[Arrays]:
        return [operation.draw(spec, seed, choice) for seed in range(options.inputs)]

    if not operation.chooses:
        yield Case(name, "", spec, drawn(None))
        return
    for rho in options.rho:
        inputs = drawn(rho)
        yield Case(name, f"rho {rho:g}", spec, inputs, _unions(spec, inputs[0][-1]))
    if name == "nsa_attention":
        yield Case(name, "own", spec, drawn(None))
        for path in options.tensors:
            for trained, tensors in trained_cases(path, length).values():
                yield Case(name, trained.name, trained, [tensors])


def _unions(spec: Spec, block_indices: jax.Array) -> Unions:
    blocks = -(-spec.keys // spec.block_size)
    return Unions(*(union_size(block_indices, m, blocks) for m in (8, 16)))


@functools.lru_cache(maxsize=2)
def own_choice(case: Case, implementation: str) -> jax.Array:
    """The blocks that an implementation of `nsa_attention` chooses on the first inputs."""
    spec = case.spec

    @jax.jit
    def choose(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        shared = {"block_size": spec.block_size, "implementation": implementation}
        k_blocks, v_blocks = block_means(k, spec.block_size), block_means(v, spec.block_size)
        lse = compressed_attention(q, k_blocks, v_blocks, **shared)[1]
        return block_selection(q, k_blocks, lse, block_count=spec.block_count, **shared)

    return choose(*case.inputs[0][:3])


@functools.lru_cache(maxsize=8)
def compiled_pass(name: str, spec: Spec, implementation: str, gradient: bool, shapes: tuple[Any, ...]) -> Any:
    """Compiles an operation for arrays of these shapes.

    Returns:
      Arrays -> result; or, with the gradient, (arrays, cotangent) -> result and gradients.
    """
    count = OPERATIONS[name].differentiable
    call = functools.partial(OPERATIONS[name].call, spec, implementation, 0)
    if not gradient:
        return jax.jit(call).lower(*shapes).compile()

    def both(arrays: Arrays, do: Any) -> Any:
        result, pull = jax.vjp(lambda *first: call(*first, *arrays[count:]), *arrays[:count])
        return result, pull(do)

    return jax.jit(both).lower(shapes, jax.eval_shape(call, *shapes)).compile()


def shapes_of(arrays: Arrays) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes."""
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def memory(compiled: Any) -> dict[str, int]:
    """Bytes beyond the arguments: scratch, results, and both."""
    analysis = compiled.memory_analysis()
    scratch, results = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
    return {"scratch_bytes": scratch, "result_bytes": results, "extra_bytes": scratch + results}


@functools.lru_cache(maxsize=1)
def _expected(case: Case, implementation: str | None, gradient: bool) -> tuple[Any, kernel_checks.Expected]:
    """A cotangent of the sampled queries, and what the reference makes of it; `implementation` makes the choice."""
    operation, arrays = case.operation, case.inputs[0]
    if implementation is not None:
        arrays = (*arrays, own_choice(case, implementation))
    do = kernel_checks.only_sampled(operation, cotangent(case, seed=99)) if gradient else None
    return do, kernel_checks.expected_values(operation, case.spec, arrays, do)


def check(case: Case, implementation: str, gradient: bool, compiled: Any, *, with_gradients: bool) -> dict[str, float]:
    """Errors on the first inputs.

    Args:
      case: what was asked for.
      implementation: what computes.
      gradient: whether `compiled` returns gradients.
      compiled: from `compiled_pass`.
      with_gradients: whether the reference is to make gradients, for this pass or another one of the case.

    Returns:
      Relative errors by name.

    Raises:
      WrongValues: an error is too large.
    """
    operation, arrays = case.operation, case.inputs[0]
    if case.name == "block_selection":
        errors = kernel_checks.check_choice(case.spec, arrays, compiled(*arrays))
    else:
        chooses = operation.chooses and case.unions is None
        do, expected = _expected(case, implementation if chooses else None, with_gradients)
        poison(*arrays, *jax.tree.leaves(do))
        o, gradients = compiled(arrays, do) if gradient else (compiled(*arrays), ())
        errors = kernel_checks.errors_of(operation, expected, o, gradients)
    bounds = {"o": kernel_checks.FORWARD_BOUND, "choice": kernel_checks.CHOICE_BOUND}
    wrong = {n: e for n, e in errors.items() if not e <= bounds.get(n, kernel_checks.GRADIENT_BOUND)}
    if wrong:
        raise WrongValues(f"errors {wrong}")
    return errors


def cotangent(case: Case, seed: int) -> Any:
    """Normal values in the shape of the result."""
    call = functools.partial(case.operation.call, case.spec, "reference", 0)
    result = jax.eval_shape(call, *shapes_of(case.inputs[0]))
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed), x.shape, x.dtype), result)


def measure(case: Case, implementation: str, gradient: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Checks and times one pass."""
    compiled = compiled_pass(case.name, case.spec, implementation, gradient, shapes_of(case.inputs[0]))
    with_gradients = "fwdbwd" in options.passes and case.operation.differentiable > 0
    errors = check(case, implementation, gradient, compiled, with_gradients=with_gradients)
    inputs: list[Any] = case.inputs
    if gradient:
        inputs = [(arrays, cotangent(case, seed)) for seed, arrays in enumerate(inputs)]
    times = median_ms(compiled, inputs, options.samples)
    unions = case.unions
    if unions is None and case.operation.chooses:
        unions = _unions(case.spec, own_choice(case, implementation))
    least = floor(case.name, gradient, case.spec, unions)
    return {
        "errors": errors,
        "memory": memory(compiled),
        **times,
        "floor_ms": least.ms,
        "bound": least.bound,
        "unions": unions and dataclasses.asdict(unions),
    }


def run(options: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Measures everything asked for; `save` gets the records after each."""
    began = time.monotonic()
    records: list[dict[str, Any]] = []
    for length in options.lengths:
        for name in options.ops:
            known = OPERATIONS[name].implementations
            asked = [implementation for implementation in options.implementations if implementation in known]
            for case in cases(name, length, options) if asked else ():
                for implementation in asked:
                    for gradient in (p == "fwdbwd" for p in options.passes):
                        if gradient and not case.operation.differentiable:
                            continue
                        record = {
                            "operation": name,
                            "implementation": implementation,
                            "choice": case.choice,
                            "pass": PASSES[gradient],
                            "length": length,
                            "spec": dataclasses.asdict(case.spec),
                        }
                        records.append(record)
                        if time.monotonic() - began > options.budget:
                            record["skipped"] = f"{options.budget:g} s were over"
                        else:
                            record |= _attempt(functools.partial(measure, case, implementation, gradient, options))
                        print(line(record), flush=True)
                        save(records)
                # They hold a case's arrays.
                _expected.cache_clear()
                own_choice.cache_clear()
    return records


def _attempt(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return step()
    except NotImplementedError as reason:
        return {"skipped": str(reason)}
    except Exception as reason:
        # One operation's failure must not hide the others' figures; the exit status tells.
        return {"failed": f"{type(reason).__name__}: {str(reason)[:400]}"}


COLUMNS = (("operation", 21), ("implementation", 15), ("choice", 15), ("pass", 7))
NAMES = "".join(f"{name:{width}}" for name, width in COLUMNS)
HEADER = f"{'T':>7} {NAMES}{'ms':>9}{'floor':>9}{'x':>7} {'error':>8} GiB"


def line(record: dict[str, Any]) -> str:
    """One row of the table."""
    start = f"{record['length']:7} " + "".join(f"{record[name]:{width}}" for name, width in COLUMNS)
    for outcome in ("skipped", "failed"):
        if outcome in record:
            return f"{start} {outcome}: {record[outcome][:90]}"
    ms, least = record["median_ms"], record["floor_ms"]
    error, extra = max(record["errors"].values()), record["memory"]["extra_bytes"] / 2**30
    return f"{start}{ms:9.3f}{least:9.3f}{ms / least:7.1f} {error:8.1e} {extra:.2f}"


def speedups(records: Sequence[dict[str, Any]]) -> list[str]:
    """How many times as fast as the fastest dense attention the whole is, line by line."""
    timed = [record for record in records if "median_ms" in record]
    lines = []
    for record in timed:
        dense = [
            other["median_ms"]
            for other in timed
            if other["operation"] == "dense_attention" and all(other[n] == record[n] for n in ("length", "pass"))
        ]
        # A trained model's heads are fewer than the dense attention's.
        if record["operation"] == "nsa_attention" and dense and not record["choice"].startswith("trained"):
            what = " ".join(str(record[name]) for name in ("implementation", "choice", "pass"))
            ms = record["median_ms"]
            lines.append(f"{record['length']:7} {what}: {min(dense) / ms:.2f} times as fast as dense")
    return lines


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" with changes" if changed else "")


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        names = tuple(value.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(known)}")
        return names

    return parse


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(value: str) -> tuple[Any, ...]:
        return tuple(kind(part) for part in value.split(","))

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = sorted({name for operation in OPERATIONS.values() for name in operation.implementations})
    parser.add_argument("--ops", type=_names(tuple(OPERATIONS)), default=tuple(OPERATIONS), metavar="NAME,...")
    parser.add_argument("--implementations", type=_names(known), metavar="NAME,...", help=", ".join(known))
    parser.add_argument("--lengths", type=_numbers(int), metavar="T,...", help="tokens; default by device")
    parser.add_argument("--passes", type=_names(PASSES), default=PASSES, metavar="NAME,...", help=", ".join(PASSES))
    parser.add_argument("--rho", type=_numbers(float), default=(0.8,), metavar="RHO,...", help="default 0.8")
    parser.add_argument("--tensors", type=Path, nargs="+", default=[], metavar="NPZ", help="of measure_selection")
    parser.add_argument("--inputs", type=int, default=2, metavar="N", help="sets of arrays per case; default 2")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="samples per median; default 5")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="S", help="seconds; the rest is skipped")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every record and figures beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _parser().parse_args(arguments)
    on_gpu = jax.default_backend() == "gpu"
    options.implementations = options.implementations or (ON_GPU if on_gpu else ELSEWHERE)
    options.lengths = options.lengths or (GPU_LENGTHS if on_gpu else OTHER_LENGTHS)
    about = {"commit": _commit(), **environment()}

    def save(records: list[dict[str, Any]]) -> None:
        if options.json:
            partial = options.json.with_suffix(".tmp")
            partial.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")
            os.replace(partial, options.json)

    left_out = [name for name in (*ON_GPU, *ELSEWHERE) if name not in options.implementations]
    print(f"on {about['device']['kind']}; not asked for: {', '.join(left_out) or 'none'}\n{HEADER}")
    try:
        records = run(options, save)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json and importlib.util.find_spec("matplotlib"):
        from experiments.kernel_plots import draw

        draw(records, options.json)
    elif options.json:
        print(f"no matplotlib here: `python -m experiments.kernel_plots {options.json}` draws the figures elsewhere")
    print("\n".join(speedups(records)))
    return int(any("failed" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
