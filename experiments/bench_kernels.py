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
and on those of a trained model ("trained", --tensors: the clip repeated up to each length, its layers as KV heads).
Floors are those of an H100: experiments/kernel_floors.py.
"""

import argparse
import dataclasses
import functools
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import kernel_checks, kernel_results
from experiments.drawn_cases import mean_union, trained_tensors, union_size
from experiments.kernel_floors import Unions, floor
from experiments.kernel_operations import DENSE_OF, OPERATIONS, Arrays, Operation
from experiments.timing import floating_shapes, median_ms, nans, poison, turn
from pallas_kernels import block_means, block_selection, compressed_attention
from pallas_kernels.common import Scalar
from pallas_kernels.specs import Spec
from videonsa_jax.training.environment import environment

PASSES = ("fwd", "fwdbwd")
ON_GPU = ("mosaic_gpu", "triton", "triton_token_major", "cudnn_dense", "mosaic_dense")
ELSEWHERE = ("xla", "xla_dense")
GPU_LENGTHS, OTHER_LENGTHS = (8192, 16421, 16384, 32768, 65536, 131072), (256, 512)


class WrongValues(Exception):
    """A result that is not what the reference says."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on inputs of one shape.

    Attributes:
      name: of the operation.
      spec: the shape.
      choice: how its blocks come about, "" where it has none.
      rho: similarity of neighbours' drawn blocks; None where none are drawn.
      tensors: file of a trained model's tensors to run on; None for drawn ones.
    """

    name: str
    spec: Spec
    choice: str = ""
    rho: float | None = None
    tensors: Path | None = None

    @property
    def operation(self) -> Operation:
        """What is run."""
        return OPERATIONS[self.name]

    @property
    def chooses(self) -> bool:
        """Whether the operation makes its own choice of blocks."""
        return self.operation.chooses and self.rho is None

    @functools.cached_property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of its arrays."""
        return jax.eval_shape(functools.partial(_drawn, self.operation, self.spec, self.rho), 0)

    @functools.cached_property
    def result(self) -> Any:
        """Shape and dtype of the result, or of each."""
        return jax.eval_shape(functools.partial(self.operation.call, self.spec, "reference", 0), *self.shapes)

    @property
    def choice_shape(self) -> jax.ShapeDtypeStruct:
        """Shape of a choice of blocks."""
        spec = self.spec
        return jax.ShapeDtypeStruct((spec.batch, spec.queries, spec.kv_heads, spec.block_count), jnp.int32)

    def draw(self, sets: int) -> list[Arrays]:
        """Arrays, several sets of them but of the trained ones."""
        if self.tensors:
            return [trained_tensors(self.tensors, self.spec)]
        return [_drawn(self.operation, self.spec, self.rho, seed) for seed in range(sets)]


def cases(name: str, length: int, options: argparse.Namespace) -> Iterator[Case]:
    """The cases of an operation at one length."""
    spec = Spec(f"7B, {length}", queries=length, keys=length)
    if not OPERATIONS[name].chooses:
        yield Case(name, spec)
        return
    further = tuple(rho for at, rho in options.also if at == length and name != "nsa_layer")
    for rho in options.rho[:1] if name == "nsa_layer" else options.rho + further:
        yield Case(name, spec, f"rho {rho:g}", rho)
    if name == "nsa_attention" and not options.drawn_only:
        yield Case(name, spec, "own")
        if options.tensors:
            yield Case(name, spec, "trained", tensors=options.tensors)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _drawn(operation: Operation, spec: Spec, rho: float | None, seed: Scalar) -> Arrays:
    return operation.draw(spec, seed, rho)


NEIGHBOURS = (9, 27)
"""Queries of a tile of the selected attention, of its backward and its forward kernels."""


def _unions(spec: Spec, block_indices: jax.Array) -> Unions:
    blocks = -(-spec.keys // spec.block_size)
    return Unions(*(union_size(block_indices, m, blocks) for m in NEIGHBOURS))


@functools.lru_cache(maxsize=32)
def _choice(spec: Spec, implementation: str, shapes: tuple[Any, ...]) -> Any:
    """Compiles what `nsa_attention` chooses: q, k, v -> blocks."""

    def choose(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        shared = {"block_size": spec.block_size, "implementation": implementation}
        k_blocks, v_blocks = block_means(k, spec.block_size), block_means(v, spec.block_size)
        lse = compressed_attention(q, k_blocks, v_blocks, **shared)[1]
        return block_selection(q, k_blocks, lse, block_count=spec.block_count, **shared)

    return jax.jit(choose).lower(*shapes).compile()


@functools.lru_cache(maxsize=32)
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


def memory(compiled: Any) -> dict[str, int]:
    """Bytes beyond the arguments: scratch, results, and both."""
    analysis = compiled.memory_analysis()
    scratch, results = analysis.temp_size_in_bytes, analysis.output_size_in_bytes
    return {"scratch_bytes": scratch, "result_bytes": results, "extra_bytes": scratch + results}


@dataclasses.dataclass(frozen=True)
class Programs:
    """What one pass of a case calls, compiled.

    Attributes:
      gradient: whether the pass has a backward one.
      differentiable: how many of the first arrays the reference differentiates.
      compiled: from `compiled_pass`.
      choose: q, k, v -> the blocks that `compiled` chooses; None where the inputs hold them.
      seconds: how long all this took to compile.
    """

    gradient: bool
    differentiable: int
    compiled: Any
    choose: Any
    seconds: float


def programs(case: Case, implementation: str, gradient: bool, options: argparse.Namespace) -> Programs:
    """Compiles one pass of a case, and all that `measure` calls beside it, so that the device works without a pause."""
    began, operation, spec, shapes = time.monotonic(), case.operation, case.spec, case.shapes

    def compile_only(function: Any, *arguments: Any) -> None:
        function.lower(*arguments).compile()

    compiled = compiled_pass(case.name, spec, implementation, gradient, shapes)
    choose = _choice(spec, implementation, shapes[:3]) if case.chooses else None
    differentiable = operation.differentiable if "fwdbwd" in options.passes else 0
    compile_only(_drawn, operation, spec, case.rho, 0)
    if operation.chooses:
        for m in NEIGHBOURS:
            compile_only(mean_union, case.choice_shape, m, -(-spec.keys // spec.block_size))
    if case.name == "block_selection":
        starts = jnp.asarray(kernel_checks.sampled_starts(spec.queries), jnp.int32)
        compile_only(kernel_checks.choice_errors, case.result, shapes, starts, jnp.int32(0), None, spec.block_size)
    else:
        do, known = case.result, (*shapes, case.choice_shape) if case.chooses else shapes
        expected = functools.partial(kernel_checks.expected_values, operation, spec, differentiable)
        compile_only(kernel_checks.cotangent, do, 0)
        compile_only(kernel_checks.only_sampled, operation, do)
        compile_only(kernel_checks.expected_values, operation, spec, differentiable, known, do)
        compile_only(nans, floating_shapes(*shapes, *jax.tree.leaves(do)))
        gradients = shapes[: operation.differentiable] if gradient else ()
        compile_only(kernel_checks.compared, operation, jax.eval_shape(expected, known, do), do, gradients)
    return Programs(gradient, differentiable, compiled, choose, time.monotonic() - began)


def check(case: Case, arrays: Arrays, ready: Programs, choice: jax.Array | None = None) -> dict[str, float]:
    """Errors of one pass.

    Args:
      case: what was asked for.
      arrays: a set of its inputs.
      ready: of the pass.
      choice: the blocks that it chooses, where the arrays hold none.

    Returns:
      Relative errors by name.

    Raises:
      WrongValues: an error is too large, or a choice breaks the rule.
    """
    operation = case.operation
    if case.name == "block_selection":
        starts = kernel_checks.sampled_starts(case.spec.queries)
        found = kernel_checks.check_choice(ready.compiled(*arrays), arrays, starts, block_size=case.spec.block_size)
        if not found["fine"]:
            raise WrongValues(f"choice {found}")
        return {"choice": max(0.0, found["excess"])}
    do = kernel_checks.only_sampled(operation, kernel_checks.cotangent(case.result, 99))
    known = arrays if choice is None else (*arrays, choice)
    expected = kernel_checks.expected_values(operation, case.spec, ready.differentiable, known, do)
    poison(*arrays, *jax.tree.leaves(do))
    o, gradients = ready.compiled(arrays, do) if ready.gradient else (ready.compiled(*arrays), ())
    errors = kernel_checks.errors_of(operation, expected, o, gradients)
    biases = {f"d{i}": kernel_checks.BIAS_BOUND for i, x in enumerate(arrays) if x.ndim == 1}
    bounds = {"o": kernel_checks.FORWARD_BOUND} | biases
    wrong = {n: e for n, e in errors.items() if not e <= bounds.get(n, kernel_checks.GRADIENT_BOUND)}
    if wrong:
        raise WrongValues(f"errors {wrong}")
    return errors


def measure(case: Case, inputs: list[Arrays], ready: Programs, options: argparse.Namespace) -> dict[str, Any]:
    """Checks and times one pass."""
    began = time.monotonic()
    choice = ready.choose(*inputs[0][:3]) if ready.choose else None
    errors = check(case, inputs[0], ready, choice)
    given: list[Any] = inputs
    if ready.gradient:
        given = [(arrays, kernel_checks.cotangent(case.result, seed)) for seed, arrays in enumerate(inputs)]
    times = median_ms(ready.compiled, given, options.samples)
    unions = None
    if case.operation.chooses:
        unions = _unions(case.spec, inputs[0][-1] if choice is None else choice)
    least = floor(case.name, ready.gradient, case.spec, unions)
    return {
        "errors": errors,
        "memory": memory(ready.compiled),
        **times,
        "floor_ms": least.ms,
        "bound": least.bound,
        "unions": unions and dataclasses.asdict(unions),
        "seconds": {"compile": ready.seconds, "device": time.monotonic() - began},
    }


def run(options: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Measures everything asked for; `save` gets the records after each.

    Where the device is shared, everything is compiled before the first turn, which lasts to the end: a process keeps
    the device's memory that it once had.
    """
    began = time.monotonic()
    records: list[dict[str, Any]] = []
    jobs = [(length, name) for length in options.lengths for name in options.ops]
    for together in [jobs] if options.share else [[job] for job in jobs]:
        planned: list[tuple[Case, dict[str, Any], Programs | None]] = []
        for length, name in together:
            if time.monotonic() - began > options.budget:
                records.append({"operation": name, "length": length, "skipped": f"{options.budget:g} s were over"})
                print(f"{length:7} {name}: skipped, {options.budget:g} s were over", flush=True)
                continue
            planned += _planned(name, length, options)
        with turn(options.share):
            drawn: tuple[Case, list[Arrays]] | None = None
            for case, record, ready in planned:
                records.append(record)
                if ready:
                    if drawn is None or drawn[0] != case:
                        drawn = None  # before the next ones are made
                        drawn = case, case.draw(options.inputs)
                    record |= _attempt(functools.partial(measure, case, drawn[1], ready, options))
                print(line(record), flush=True)
                save(records)
    return records


def _planned(
    name: str, length: int, options: argparse.Namespace
) -> Iterator[tuple[Case, dict[str, Any], Programs | None]]:
    """Every pass of an operation at one length: its record so far, and its programs unless the record says why not."""
    operation = OPERATIONS[name]
    for case in cases(name, length, options):
        for implementation in (x for x in options.implementations if x in operation.implementations):
            for gradient in (p == "fwdbwd" for p in options.passes if p == "fwd" or operation.differentiable):
                record = {
                    "operation": name,
                    "implementation": implementation,
                    "choice": case.choice,
                    "pass": PASSES[gradient],
                    "length": length,
                    "spec": dataclasses.asdict(case.spec),
                }
                ready = _attempt(functools.partial(programs, case, implementation, gradient, options))
                if isinstance(ready, Programs):
                    yield case, record, ready
                else:
                    yield case, record | ready, None


def _attempt(step: Callable[[], Any]) -> Any:
    """What the step gives, or a part of a record that says why it gave nothing."""
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
    """How many times as fast as the fastest dense one the whole attention and the layer are, line by line."""
    timed = [record for record in records if "median_ms" in record]
    lines = []
    for record in timed:
        dense = [
            other["median_ms"]
            for other in timed
            if other["operation"] == DENSE_OF.get(record["operation"])
            and all(other[n] == record[n] for n in ("length", "pass"))
        ]
        if dense:
            what = " ".join(str(record[name]) for name in ("operation", "implementation", "choice", "pass"))
            ratio = min(dense) / record["median_ms"]
            lines.append(f"{record['length']:7} {what}: {ratio:.2f} times as fast as dense")
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


def _places(value: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(at), float(rho)) for at, rho in (part.split(":") for part in value.split(",")))


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
    parser.add_argument(
        "--also", type=_places, default=(), metavar="T:RHO,...", help="further similarities at single lengths"
    )
    parser.add_argument("--drawn-only", action="store_true", help="nsa_attention with drawn blocks only")
    parser.add_argument("--tensors", type=Path, metavar="NPZ", help="of experiments.measure_selection")
    parser.add_argument("--inputs", type=int, default=2, metavar="N", help="sets of arrays per case; default 2")
    parser.add_argument("--samples", type=int, default=5, metavar="N", help="samples per median; default 5")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), metavar="S", help="seconds after which no operation is begun"
    )
    parser.add_argument(
        "--share",
        type=Path,
        metavar="FILE",
        help="several of these commands with the same FILE compile side by side and take turns on one device",
    )
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
            kernel_results.write(about | {"records": records}, options.json)

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
