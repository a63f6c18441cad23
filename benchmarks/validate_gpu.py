"""Checks the whole `nsa_attention` on a Hopper GPU, as a caller gets it, in the cases that benchmarks leave out.

    python -m benchmarks.validate_gpu --json=OUT.json

Every case calls the public function with the default implementation, forward and backward, twice, and compares bits;
then output and gradients of q, k, v and gate logits with the float32 reference. The cotangent is 0 but on samples of 32
queries, so that the reference needs those alone and its sums over them are the whole gradients of k and v. The
reference takes the blocks that the kernels chose; that choice is checked by importances in float32. Past `lengths` q,
k, v, gate logits and cotangent hold NaN. Errors are relative norms, the largest of the samples'.

One process per case, side by side: a CUDA error ends its process alone. Nothing is timed.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from experiments import kernel_results
from experiments.drawn_cases import draw_choice
from experiments.kernel_checks import FORWARD_BOUND, GRADIENT_BOUND, ROWS, check_choice
from experiments.timing import poison, relative_distance
from pallas_kernels import (
    block_means,
    block_selection,
    compressed_attention,
    nsa_attention,
    nsa_attention_sharded,
    nsa_gpu,
    registry,
)
from pallas_kernels.specs import Spec
from videonsa_jax.training.environment import command_line

OPERATIONS = ("compressed_attention", "block_selection", "selected_attention", "window_attention")
NAMES = ("o", "dq", "dk", "dv", "dlogits")


@dataclasses.dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
      spec: its shape; a q_offset above 0 is traced.
      lengths: valid keys per row; None: all.
      sink: the blocks are drawn, and every query takes block 0; otherwise the call chooses for itself.
      inside: "sharded" (`nsa_attention_sharded` on a mesh of one device), "checkpoint" (`jax.checkpoint` that keeps
        `nsa_gpu.SAVED`), or neither.
    """

    spec: Spec
    lengths: tuple[int, ...] | None = None
    sink: bool = False
    inside: str = ""


def _square(name: str, length: int, **changes: Any) -> Spec:
    return Spec(name, queries=length, keys=length, **changes)


SHORT, LONG = 16384, 65536

CASES = {
    "ragged": Case(_square("ragged", SHORT + 37, batch=2), lengths=(SHORT + 37, 11003)),
    "later queries": Case(Spec("later", queries=8192, keys=40000, q_offset=29003)),
    "rows of padding": Case(_square("padding", 8192, batch=3), lengths=(5000, 0, 8192)),
    "no row with keys": Case(_square("nothing", 4096, batch=2), lengths=(0, 0)),
    "shorter than a block": Case(_square("few", 4096, batch=2), lengths=(63, 64)),
    "sink, 64K": Case(_square("sink", LONG), sink=True),
    "float16, 64K": Case(_square("float16", LONG, dtype="float16")),
    "own choice, 64K": Case(_square("own", LONG)),
    "D = 64": Case(_square("narrow", SHORT, head_dim=64)),
    "G = 1": Case(_square("group", SHORT, group_size=1)),
    "G = 4": Case(_square("group", SHORT, group_size=4)),
    "G = 8, N = 2": Case(_square("group", SHORT, kv_heads=2, group_size=8)),
    "shard_map": Case(_square("sharded", SHORT), inside="sharded"),
    "checkpoint": Case(_square("checkpoint", SHORT), inside="checkpoint"),
}


def starts(case: Case) -> tuple[int, ...]:
    """First queries of the samples: the first ones, some in the middle, the last ones, those around each length."""
    queries = case.spec.queries
    ends = [length - case.spec.q_offset for length in case.lengths or ()]
    wanted = [0, queries - ROWS, queries // 2 + 41, *(end - ROWS // 2 for end in ends), queries // 3 + 5]
    kept: list[int] = []
    for start in wanted:
        start = min(max(start, 0), queries - ROWS)
        if all(abs(start - other) >= ROWS for other in kept):
            kept.append(start)
    return tuple(sorted(kept))


def past_lengths(case: Case, count: int, first: int) -> jax.Array:
    """[B, count]: which indices from `first` on lie at or past their row's length."""
    lengths = jnp.asarray(case.lengths or (case.spec.keys,) * case.spec.batch)
    return first + jnp.arange(count) >= lengths[:, None]


@functools.partial(jax.jit, static_argnums=0)
def draw(case: Case) -> dict[str, Any]:
    """Arrays of a call, zeros past the lengths, and the same with NaN there."""
    spec = case.spec
    q, k, v, logits = spec.draw(7)
    do = jax.random.normal(jax.random.key(8), q.shape, q.dtype)
    sampled = jnp.zeros(spec.queries, bool)
    for start in starts(case):
        sampled = sampled.at[start : start + ROWS].set(True)
    do = jnp.where(sampled[:, None, None, None], do, 0)
    indices = draw_choice(spec, 0.8, 9, sink=True) if case.sink else None
    of_queries, of_keys = past_lengths(case, spec.queries, spec.q_offset), past_lengths(case, spec.keys, 0)

    def filled(value: float) -> tuple[jax.Array, ...]:
        def fill(x: jax.Array, past: jax.Array) -> jax.Array:
            return jnp.where(past.reshape(*past.shape, *(1,) * (x.ndim - 2)), jnp.asarray(value, x.dtype), x)

        return *(fill(x, p) for x, p in ((q, of_queries), (k, of_keys), (v, of_keys), (logits, of_queries))), fill(
            do, of_queries
        )

    lengths = None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32)
    return {"clean": filled(0.0), "given": filled(jnp.nan), "indices": indices, "lengths": lengths}


def call(case: Case, q: Any, k: Any, v: Any, logits: Any, indices: Any, lengths: Any, offset: Any) -> jax.Array:
    """What a caller writes."""
    options = case.spec.options | {"lengths": lengths}
    del options["q_offset"]
    if case.inside == "sharded":
        mesh = jax.make_mesh((1, 1, 1), ("data", "context", "tensor"), axis_types=(AxisType.Auto,) * 3)
        axes = {"data_axes": "data", "context_axis": "context", "tensor_axis": "tensor"}
        return nsa_attention_sharded(q, k, v, logits, mesh=mesh, **axes, **options)
    offset = offset if case.spec.q_offset else 0
    run = functools.partial(nsa_attention, block_indices=indices, q_offset=offset, **options)
    if case.inside == "checkpoint":
        run = jax.checkpoint(run, policy=nsa_gpu.save_attention)
    return run(q, k, v, logits)


def both(case: Case, arrays: tuple[Any, ...], indices: Any, lengths: Any, offset: Any) -> tuple[jax.Array, ...]:
    """Output and gradients."""
    *inputs, do = arrays
    o, pull = jax.vjp(lambda *x: call(case, *x, indices, lengths, offset), *inputs)
    return o, *pull(do)


def choose(case: Case, arrays: tuple[Any, ...], lengths: Any, offset: Any) -> tuple[jax.Array, ...]:
    """What the call chooses, the mean keys, and the compression branch's log-sum-exp."""
    q, k, v = arrays[:3]
    size = case.spec.block_size
    shared = {"block_size": size, "lengths": lengths, "q_offset": offset if case.spec.q_offset else 0}
    means = block_means(k, size), block_means(v, size)
    lse = compressed_attention(q, *means, **shared)[1]
    return block_selection(q, means[0], lse, block_count=case.spec.block_count, **shared), means[0], lse


def reference(case: Case, arrays: tuple[Any, ...], indices: Any, lengths: Any, start: Any) -> tuple[jax.Array, ...]:
    """As `both`, of the sampled queries from `start` on, in float32 with TF32 off."""
    q, k, v, logits, do = arrays
    rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=ROWS, axis=1)
    options = case.spec.options | {"lengths": lengths, "q_offset": case.spec.q_offset + start}
    with jax.default_matmul_precision("highest"):
        o, pull = jax.vjp(
            lambda *x: nsa_attention(*x, block_indices=rows(indices), implementation="reference", **options),
            *(x.astype(jnp.float32) for x in (rows(q), k, v, rows(logits))),
        )
        return o, *pull(rows(do).astype(jnp.float32))


def run_case(case: Case) -> dict[str, Any]:
    """Compiles, runs and checks one case."""
    spec = case.spec
    drawn, offset = draw(case), jnp.int32(spec.q_offset)
    given, clean, indices, lengths = (drawn[name] for name in ("given", "clean", "indices", "lengths"))
    arguments = (given, indices, lengths, offset)
    lowered = jax.jit(functools.partial(both, case)).lower(*arguments)
    with ThreadPoolExecutor(1) as pool:
        # Compiling takes as long as lowering: side by side.
        compiling = pool.submit(lowered.compile)
        chosen = jax.jit(functools.partial(choose, case))(given, lengths, offset) if indices is None else None
        compiled = compiling.result()
    record: dict[str, Any] = {"kernels": compiled.as_text().count('custom_call_target="mosaic_gpu')}
    if chosen is not None:
        indices, inputs = chosen[0], choice_inputs(case, clean[0], *chosen[1:])
        rule = {"block_size": spec.block_size, "q_offset": spec.q_offset, "lengths": lengths}
        record["choice"] = check_choice(indices, inputs, starts(case), **rule)
    poison(given[0], *given)
    first = compiled(*arguments)
    poison(*given)
    record |= {name: bool(value) for name, value in properties(case, first, compiled(*arguments)).items()}
    found = errors(case, first, clean, indices, lengths)
    record["errors"] = {name: float(error) for name, error in found.items()}
    bounds = {"o": FORWARD_BOUND}
    record["fine"] = (
        record["same_bits"]
        and record["finite"]
        and record["zero_past_lengths"]
        and record["kernels"] > 0
        and record.get("choice", {"fine": True})["fine"]
        and all(error <= bounds.get(name, GRADIENT_BOUND) for name, error in record["errors"].items())
    )
    return record


@functools.partial(jax.jit, static_argnums=0)
def choice_inputs(case: Case, q: jax.Array, means: jax.Array, lse: jax.Array) -> tuple[jax.Array, ...]:
    """What `check_choice` reads, without what stands past the lengths."""
    past = past_lengths(case, case.spec.queries, case.spec.q_offset)[..., None, None]
    return q, jnp.nan_to_num(means), jnp.where(past, 0.0, lse)


@functools.partial(jax.jit, static_argnums=0)
def properties(case: Case, first: tuple[jax.Array, ...], second: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    """Whether two runs agree to the bit, all is finite, and what lies past the lengths is 0."""
    o, dq, dk, dv, dlogits = first
    queries = past_lengths(case, o.shape[1], case.spec.q_offset)
    keys = past_lengths(case, dk.shape[1], 0)
    pairs = ((o, queries), (dq, queries), (dlogits, queries), (dk, keys), (dv, keys))
    not_zero = [(jnp.any(x != 0, axis=tuple(range(2, x.ndim))) & past).any() for x, past in pairs]
    every = lambda tests: jnp.stack(list(tests)).all()  # noqa: E731
    return {
        "same_bits": every((a == b).all() for a, b in zip(first, second, strict=True)),
        "finite": every(jnp.isfinite(x.astype(jnp.float32)).all() for x in first),
        "zero_past_lengths": ~jnp.stack(not_zero).any(),
    }


@functools.partial(jax.jit, static_argnums=0)
def errors(case: Case, actual: tuple[jax.Array, ...], clean: Any, indices: Any, lengths: Any) -> dict[str, jax.Array]:
    """Relative errors by name: of output and gradients of queries the largest of the samples'."""
    o, dq, dk, dv, dlogits = actual

    def sample(of_keys: tuple[jax.Array, jax.Array], start: jax.Array) -> Any:
        wanted = reference(case, clean, indices, lengths, start)
        rows = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=ROWS, axis=1)
        pairs = ((o, wanted[0]), (dq, wanted[1]), (dlogits, wanted[4]))
        seen = [relative_distance(rows(x), expected) for x, expected in pairs]
        return (of_keys[0] + wanted[2], of_keys[1] + wanted[3]), jnp.stack(seen)

    nothing = jnp.zeros(dk.shape, jnp.float32), jnp.zeros(dv.shape, jnp.float32)
    of_keys, seen = jax.lax.scan(sample, nothing, jnp.asarray(starts(case), jnp.int32))
    largest = dict(zip(("o", "dq", "dlogits"), seen.max(axis=0), strict=True))
    return largest | {name: relative_distance(x, y) for name, x, y in zip(("dk", "dv"), (dk, dv), of_keys, strict=True)}


def line(name: str, record: dict[str, Any]) -> str:
    """One row of the table."""
    if "errors" not in record:
        return f"{name:22} failed: {record.get('failed', 'no result')[:100]}"
    errors = " ".join(f"{record['errors'][name]:9.1e}" for name in NAMES)
    choice = record.get("choice")
    excess = f"{choice['excess']:9.1e}" if choice else f"{'drawn':>9}"
    flags = " ".join("yes" if record[name] else " NO" for name in ("same_bits", "finite", "zero_past_lengths"))
    verdict = "" if record["fine"] else "WRONG"
    return f"{name:22}{errors} {excess}  {flags}  {record['kernels']:7} {verdict}"


HEADER = f"{'case':22}" + " ".join(f"{name:>9}" for name in NAMES) + f" {'choice':>9}  bits finite zero  kernels"


def run_all(names: list[str], json_path: Path, limit: float) -> int:
    """One process per case; merges their records."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        parts = {name: Path(folder) / f"{i}.json" for i, name in enumerate(names)}
        command = [sys.executable, "-m", "benchmarks.validate_gpu"]
        # All cases' arrays fit the device together.
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        running = {
            name: subprocess.Popen(
                [*command, f"--case={name}", f"--json={part}"],
                stderr=part.with_suffix(".err").open("w"),
                env=environment,
            )
            for name, part in parts.items()
        }
        records: dict[str, Any] = {}
        about = {"device": device_name(), "jax": jax.__version__, "command": command_line()}
        print(HEADER, flush=True)
        for name, process in running.items():
            try:
                process.wait(timeout=max(1.0, limit - (time.monotonic() - began)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            part = parts[name]
            said = part.with_suffix(".err").read_text().strip().splitlines()
            last = said[-1] if said else f"not done after {limit:g} s"
            records[name] = json.loads(part.read_text()) if part.exists() else {"failed": last, "fine": False}
            print(line(name, records[name]), flush=True)
            kernel_results.write(about | {"cases": records}, json_path)
    wrong = [name for name, record in records.items() if not record["fine"]]
    print(f"{len(records) - len(wrong)} of {len(records)} cases right in {time.monotonic() - began:.0f} s")
    return int(bool(wrong))


def device_name() -> str:
    """The device's name, as the driver tells it: this process takes no device."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument(
        "--limit", type=float, default=600.0, metavar="S", help="seconds after which a case is given up"
    )
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is None:
        return run_all(options.cases, options.json, options.limit)
    # A fallback to another implementation warns.
    warnings.filterwarnings("error", message=".*falling back.*")
    chosen_by = {operation: registry.first_choice(operation, None) for operation in OPERATIONS}
    if set(chosen_by.values()) != {"mosaic_gpu"}:
        raise RuntimeError(f"the default implementations are {chosen_by}, expected mosaic_gpu on a Hopper GPU")
    record = run_case(CASES[options.case])
    options.json.write_text(json.dumps({"spec": dataclasses.asdict(CASES[options.case].spec)} | record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
