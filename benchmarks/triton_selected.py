"""Checks and times the Triton kernels of selected attention, configuration by configuration, beside Mosaic GPU's.

    python -m benchmarks.triton_selected --json=OUT.json

Shapes and drawn blocks as in benchmarks/selected_gpu.py. Every task is a process of its own (a kernel that breaks takes
nothing else along): all compile side by side and take turns on the device. A configuration's results are compared with
the Mosaic kernel's of the same process before it is timed.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks.selected_gpu import (
    BLOCK,
    GROUP,
    HEADS,
    PLACES,
    SIZE,
    Attend,
    check,
    check_other_shape,
    check_ragged,
    draw_choice,
    draw_tensors,
)
from experiments.timing import median_ms, poison, relative_error
from pallas_kernels import gpu
from pallas_kernels.selected_attention import (
    gpu_config,
    mosaic_gpu,
    mosaic_gpu_backward,
    triton,
    triton_config,
    triton_token_major,
)
from pallas_kernels.selected_attention.gpu_lists import block_lists, tile_lists, visible_choice
from pallas_kernels.selected_attention.triton_config import BlockConfig, Config, TileConfig
from videonsa_jax.training.environment import command_line

LONG = 65536
TASKS = (
    "values:triton",
    "values:triton_token_major",
    f"forward:{LONG}",
    f"dq:{LONG}",
    f"dkdv:{LONG}",
    f"token_major:{LONG}",
    "forward:131072",
    f"whole:{LONG}",
    "whole:131072",
    "whole:32768",
    "whole:8192",
)
DESIGNS = {"triton": triton, "triton_token_major": triton_token_major}
HEURISTICS = {"triton": triton_config.heuristic, "triton_token_major": triton_config.token_major_heuristic}
# With the most registers; None: as many as ptxas takes.
FORWARD = (
    (TileConfig(8, 4, 3), None),
    (TileConfig(8, 4, 2), None),
    (TileConfig(16, 8, 3), None),
    (TileConfig(16, 8, 2), 128),
)
DQ = (
    (TileConfig(8, 4, 2), None),
    (TileConfig(8, 4, 3), None),
    (TileConfig(16, 8, 3), None),
)
DKDV = ((8, 4, 2, None), (8, 4, 3, None), (4, 4, 3, None), (8, 8, 3, None))
ONE_TOKEN = ((2, 2), (4, 2), (4, 3))
AGREE = 1e-2
"""Relative norm up to which two kernels agree: bfloat16 rounds probabilities at other running maxima."""


@contextlib.contextmanager
def turn(lock: Path) -> Iterator[None]:
    """Holds the device: one task at a time draws, checks and times."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def registers(most: int | None) -> Iterator[None]:
    """Kernels compiled meanwhile use at most so many registers: Triton has the option, jax_triton does not pass it."""
    if most is None:
        yield
        return
    import jax_triton.triton_lib as library
    from triton.backends.nvidia.compiler import CUDABackend

    parse = CUDABackend.parse_options
    with (
        mock.patch.object(CUDABackend, "parse_options", lambda self, given: parse(self, given | {"maxnreg": most})),
        mock.patch.object(library, "_COMPILED_KERNEL_CACHE", {}),
    ):
        yield


def inputs_of(queries: int) -> tuple[tuple[jax.ShapeDtypeStruct, ...], jax.ShapeDtypeStruct]:
    """Shapes of q, k, v, do and of the chosen blocks."""
    q = jax.ShapeDtypeStruct((1, queries, HEADS, GROUP, SIZE), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, queries, HEADS, SIZE), jnp.bfloat16)
    return (q, k, k, q), jax.ShapeDtypeStruct((1, queries, HEADS, PLACES), jnp.int32)


def attempt(record: dict[str, Any], name: str, step: Callable[[], Any]) -> Any:
    """Runs a step; keeps and shows why it failed where it does."""
    try:
        return step()
    except Exception as reason:
        traceback.print_exc(limit=3)
        record[name] = {"failed": f"{type(reason).__name__}: {str(reason)[:300]}"}
        return None


Variant = tuple[str, Callable[..., Any], int | None]
"""Name, function, most registers; the name up to its first space says which arguments it takes."""


def race(
    record: dict[str, Any],
    lock: Path,
    variants: list[Variant],
    arguments: Callable[[], dict[str, tuple[Any, ...]]],
    shapes: dict[str, Any],
) -> None:
    """Compiles variants, then compares each with the first one of the same results and times it.

    Args:
      record: where errors and times go, by variant.
      lock: see `turn`.
      variants: what to compile.
      arguments: draws the arguments.
      shapes: theirs.
    """
    ready = {}
    for name, function, most in variants:
        begin = time.monotonic()
        with registers(most):
            built = attempt(record, name, lambda: jax.jit(function).lower(*shapes[name.split()[0]]).compile())  # noqa: B023
        if built is not None:
            ready[name] = built, time.monotonic() - begin
    with turn(lock):
        drawn = arguments()
        firsts: dict[Any, list[jax.Array]] = {}
        for name, (built, seconds) in ready.items():
            own = drawn[name.split()[0]]

            def measure(built: Any = built, own: Any = own) -> tuple[Any, ...]:
                out = jax.tree.leaves(built(*own))
                first = firsts.setdefault(tuple(x.shape for x in out), out)
                return [relative_error(a, b) for a, b in zip(out, first, strict=True)], median_ms(built, [own])

            done = attempt(record, name, measure)
            if done is None:
                continue
            errors, times = done
            record[name] = {"compile_s": seconds, "differs": max(errors), **times}
            shown = "" if max(errors) <= AGREE else f"  DIFFERS by {max(errors):.3g}"
            print(f"{name:44} {times['median_ms']:8.3f}{shown}", flush=True)


def prepared(queries: int, rho: float = 0.8) -> dict[str, Any]:
    """What every kernel reads: tensors, choice, output, row terms; drawn and computed by Mosaic's kernels."""
    q, k, v, do = draw_tensors(queries, 0)
    chosen = chosen_of(draw_choice(queries, rho, 0))
    config = gpu_config.heuristic(queries, HEADS, SIZE)
    o, lse = mosaic_gpu.forward(config.forward, None, q, k, v, tiles_of(config.forward.tokens)(chosen))
    return {"q": q, "k": k, "v": v, "do": do, "chosen": chosen, "lse": lse, "delta": gpu.delta_of(o, do, lse * 0)}


def chosen_of(index: jax.Array) -> jax.Array:
    """`visible_choice` of whole sequences."""
    queries = index.shape[1]
    return visible_choice(index, jnp.array([queries]), jnp.int32(0), queries, BLOCK)


def tiles_of(tokens: int) -> Callable[..., Any]:
    """Chosen blocks -> lists of tiles of that many tokens."""

    @jax.jit
    def build(chosen: jax.Array) -> Any:
        queries = chosen.shape[2]
        return tile_lists(chosen, jnp.array([queries]), jnp.int32(0), queries, BLOCK, tokens)

    return build


def blocks_of(part: int) -> Callable[..., Any]:
    """Chosen blocks -> lists of blocks."""
    return jax.jit(lambda chosen: block_lists(chosen, jnp.int32(0), chosen.shape[2], BLOCK, part))


def shaped(queries: int) -> tuple[Any, ...]:
    """Shapes of q, k, v, do, row terms and chosen blocks."""
    (q, k, v, do), index = inputs_of(queries)
    return q, k, v, do, jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32), jax.eval_shape(chosen_of, index)


def name_of(config: TileConfig | BlockConfig, most: int | None) -> str:
    """Of a configuration, for people."""
    limit = f", {most} registers" if most else ""
    return f"{config.tokens} tokens, {config.warps} warps, {config.stages} stages{limit}"


def forward(queries: int, record: dict[str, Any], lock: Path) -> None:
    """Configurations of the forward kernel."""
    q, k, v, _, _, chosen = shaped(queries)
    mosaic = gpu_config.heuristic(queries, HEADS, SIZE).forward
    unused = triton_config.heuristic(queries, HEADS, SIZE)
    sizes = {"mosaic": mosaic.tokens, "t16": 16, "t8": 8}
    variants: list[Variant] = [("mosaic forward", functools.partial(mosaic_gpu.forward, mosaic, None), None)]
    for tile, most in FORWARD:
        config = dataclasses.replace(unused, forward=tile)
        name = f"t{tile.tokens} forward {name_of(tile, most)}"
        variants.append((name, functools.partial(triton.forward, config), most))
    shapes = {name: (q, k, v, jax.eval_shape(tiles_of(tokens), chosen)) for name, tokens in sizes.items()}

    def arguments() -> dict[str, tuple[Any, ...]]:
        at = prepared(queries)
        poison(at["q"])
        return {name: (at["q"], at["k"], at["v"], tiles_of(tokens)(at["chosen"])) for name, tokens in sizes.items()}

    race(record, lock, variants, arguments, shapes)


def dq(queries: int, record: dict[str, Any], lock: Path) -> None:
    """Configurations of dq's kernel; Mosaic's time includes the padding of its row terms."""
    q, k, v, do, term, chosen = shaped(queries)
    mosaic = gpu_config.heuristic(queries, HEADS, SIZE).dq
    unused = triton_config.heuristic(queries, HEADS, SIZE)
    sizes = {"mosaic": mosaic.tokens, "t16": 16, "t8": 8}

    def by_mosaic(q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, lists: Any) -> Any:
        return mosaic_gpu_backward.query_gradient(
            mosaic, None, q, k, v, do, *mosaic_gpu_backward.row_terms(lse, delta), lists
        )

    variants: list[Variant] = [("mosaic dq", by_mosaic, None)]
    for tile, most in DQ:
        config = dataclasses.replace(unused, dq=tile)
        name = f"t{tile.tokens} dq {name_of(tile, most)}"
        variants.append((name, functools.partial(triton.query_gradient, config), most))
    shapes = {
        name: (q, k, v, do, term, term, jax.eval_shape(tiles_of(tokens), chosen)) for name, tokens in sizes.items()
    }

    def arguments() -> dict[str, tuple[Any, ...]]:
        at = prepared(queries)
        tensors = tuple(at[name] for name in ("q", "k", "v", "do", "lse", "delta"))
        poison(at["q"])
        return {name: (*tensors, tiles_of(tokens)(at["chosen"])) for name, tokens in sizes.items()}

    race(record, lock, variants, arguments, shapes)


def dkdv(queries: int, record: dict[str, Any], lock: Path) -> None:
    """Configurations of dk's and dv's kernel; Mosaic's time includes the gathering of its row terms."""
    q, k, v, do, term, chosen = shaped(queries)
    mosaic = gpu_config.heuristic(queries, HEADS, SIZE).dkdv
    unused = triton_config.heuristic(queries, HEADS, SIZE)

    def by_mosaic(q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any, lists: Any) -> Any:
        return mosaic_gpu_backward.key_gradients(
            mosaic, None, q, k, v, do, *mosaic_gpu_backward.row_terms(lse, delta), lists
        )

    variants: list[Variant] = [("all mosaic dk, dv", by_mosaic, None)]
    for *fields, most in DKDV:
        config = dataclasses.replace(unused, dkdv=BlockConfig(*fields, mosaic.part))
        name = f"all dk, dv {name_of(config.dkdv, most)}"
        variants.append((name, functools.partial(triton.key_gradients, config), most))
    lists = jax.eval_shape(blocks_of(mosaic.part), chosen)

    def arguments() -> dict[str, tuple[Any, ...]]:
        at = prepared(queries)
        tensors = tuple(at[name] for name in ("q", "k", "v", "do", "lse", "delta"))
        poison(at["k"], at["k"])
        return {"all": (*tensors, blocks_of(mosaic.part)(at["chosen"]))}

    race(record, lock, variants, arguments, {"all": (q, k, v, do, term, term, lists)})


def token_major(queries: int, record: dict[str, Any], lock: Path) -> None:
    """Configurations of the token-major kernels."""
    q, k, v, do, term, chosen = shaped(queries)
    offset = jax.ShapeDtypeStruct((1,), jnp.int32)
    part = triton_config.part_of(queries, HEADS)

    def arguments() -> dict[str, tuple[Any, ...]]:
        at = prepared(queries)
        tensors = tuple(at[name] for name in ("q", "k", "v", "do", "lse", "delta"))
        choice = at["chosen"], jnp.zeros((1,), jnp.int32)
        return {
            "fwd": (*tensors[:3], choice),
            "dq": (*tensors, choice),
            "dkdv": (*tensors, blocks_of(part)(at["chosen"])),
        }

    terms = (q, k, v, do, term, term)
    lists = jax.eval_shape(blocks_of(part), chosen)
    shapes = {"fwd": (q, k, v, (chosen, offset)), "dq": (*terms, (chosen, offset)), "dkdv": (*terms, lists)}
    run = {
        "fwd": triton_token_major.forward,
        "dq": triton_token_major.query_gradient,
        "dkdv": triton_token_major.key_gradients,
    }
    variants: list[Variant] = []
    for kind, function in run.items():
        for warps, stages in ONE_TOKEN:
            if kind == "dkdv" and warps < 4:
                continue
            tile = TileConfig(1, warps, stages)
            config = Config(tile, tile, BlockConfig(1, warps, stages, part))
            name = f"{kind} token-major, {warps} warps, {stages} stages"
            variants.append((name, functools.partial(function, config), None))
    race(record, lock, variants, arguments, shapes)


def attend_of(name: str) -> Callable[..., Any]:
    """The operation by name, without the choice of an implementation."""
    return mosaic_gpu.selected_attention if name == "mosaic_gpu" else DESIGNS[name].selected_attention


def whole_of(name: str, **options: Any) -> Callable[..., Attend]:
    """Chosen blocks and lengths -> the operation as a function of q, k and v."""

    def whole(index: jax.Array, lengths: jax.Array | None = None) -> Attend:
        shared = {"block_size": BLOCK, "q_offset": 0, "lengths": lengths}
        return lambda q, k, v: attend_of(name)(q, k, v, index, **shared, **options)

    return whole


def whole(queries: int, record: dict[str, Any], lock: Path) -> None:
    """The operation, its lists included, forward and with the backward, checked against float32 attention."""
    tensors, index = inputs_of(queries)
    ready: dict[tuple[str, str], Any] = {}
    for name in ("mosaic_gpu", *DESIGNS):

        def both(q: Any, k: Any, v: Any, do: Any, index: Any, name: str = name) -> Any:
            o, back = jax.vjp(lambda *x: whole_of(name)(index)(*x)[0], q, k, v)
            return o, *back(do)

        def one(q: Any, k: Any, v: Any, do: Any, index: Any, name: str = name) -> Any:
            del do
            return whole_of(name)(index)(q, k, v)[0]

        for kind, function in (("forward", one), ("forward + backward", both)):
            built = attempt(
                record,
                f"{name} {kind}",
                lambda: jax.jit(function).lower(*tensors, index).compile(),  # noqa: B023
            )
            if built is not None:
                ready[name, kind] = built
    with turn(lock):
        drawn = draw_tensors(queries, 0)
        for rho in (0.8, 0.0, 0.98) if queries == LONG else (0.8,):
            choice = draw_choice(queries, rho, 0)
            if rho == 0.8 and queries >= LONG:
                for name in DESIGNS if queries == LONG else ("triton",):
                    seen = attempt(
                        record,
                        f"{name} errors",
                        lambda: check(whole_of(name), drawn, choice),  # noqa: B023
                    )
                    if seen:
                        record[f"{name} errors"] = seen
                        show(f"{queries} {name}", seen)
            for (name, kind), built in ready.items():
                if rho != 0.8 and kind != "forward":
                    continue
                seen = attempt(record, f"{name} {kind} {rho}", lambda: median_ms(built, [(*drawn, choice)]))  # noqa: B023
                if seen:
                    record[f"{name} {kind} {rho}"] = seen
                    print(f"{queries} {name} {kind} rho {rho}".ljust(53), f"{seen['median_ms']:8.3f}", flush=True)


def profile(queries: int, record: dict[str, Any], lock: Path) -> None:
    """Launches each kernel once, for a profiler: forward, dq, dk and dv, of the tile-union design first."""
    drawn, choice = draw_tensors(queries, 0), draw_choice(queries, 0.8, 0)
    for name in DESIGNS:

        def both(q: Any, k: Any, v: Any, do: Any, index: Any, name: str = name) -> Any:
            o, back = jax.vjp(lambda *x: whole_of(name)(index)(*x)[0], q, k, v)
            return o, *back(do)

        with turn(lock):
            jax.block_until_ready(jax.jit(both)(*drawn, choice))
        record[name] = "ran"


def show(name: str, errors: dict[str, Any]) -> None:
    """One line of errors."""
    parts = (f"{key} {value if isinstance(value, bool) else format(value, '.1e')}" for key, value in errors.items())
    print(f"{name}: {', '.join(parts)}", flush=True)


def values(name: str, record: dict[str, Any], lock: Path) -> None:
    """A design's checks on short inputs: ragged, split lists, sink, batch, group 4, head size 64, float16, q_offset."""
    queries = 2048 + 21
    split = dataclasses.replace(HEURISTICS[name](queries, HEADS, SIZE))
    split = dataclasses.replace(split, dkdv=dataclasses.replace(split.dkdv, part=256))
    with turn(lock):
        tensors = draw_tensors(queries, 7)
        steps = {
            "odd length": lambda: check(whole_of(name), tensors, draw_choice(queries, 0.5, 7, places=8)),
            "sink, split": lambda: check(
                whole_of(name, config=split), tensors, draw_choice(queries, 0.5, 8, places=8, sink=True)
            ),
            "ragged": lambda: check_ragged(whole_of(name), tensors, draw_choice(queries, 0.5, 9, places=8)),
            "other shape": lambda: check_other_shape(attend_of(name)),
        }
        for what, step in steps.items():
            seen = attempt(record, what, step)
            if seen:
                record[what] = seen
                show(f"{name}, {what}", seen)


def main() -> None:
    """Runs one task, or all of them as processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which what still runs is ended")
    parser.add_argument("--one", metavar="TASK", help="run this task alone, in this process")
    args = parser.parse_args()
    lock = args.json.with_suffix(".lock")
    if args.one:
        kind, _, argument = args.one.partition(":")
        task = {
            "forward": forward,
            "dq": dq,
            "dkdv": dkdv,
            "token_major": token_major,
            "whole": whole,
            "profile": profile,
        }
        record: dict[str, Any] = {}
        if kind == "values":
            values(argument, record, lock)
        else:
            task[kind](int(argument), record, lock)
        own = args.json.with_name(f"{args.json.stem}.{kind}.{argument}.json")
        own.write_text(json.dumps(record))
        return

    base = [sys.executable, "-m", "benchmarks.triton_selected", f"--json={args.json}"]
    begin = time.monotonic()
    processes = {task: subprocess.Popen([*base, f"--one={task}"]) for task in args.tasks}
    result: dict[str, Any] = {
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"N": HEADS, "G": GROUP, "D": SIZE, "s": BLOCK, "n": PLACES, "B": 1, "dtype": "bfloat16"},
        "tasks": {},
    }
    for task, process in processes.items():
        try:
            status = process.wait(max(0.0, args.limit - (time.monotonic() - begin)))
        except subprocess.TimeoutExpired:
            process.kill()
            status = f"none in {args.limit:g} s"
        kind, _, argument = task.partition(":")
        own = args.json.with_name(f"{args.json.stem}.{kind}.{argument}.json")
        result["tasks"][task] = json.loads(own.read_text()) if own.exists() else {"failed": f"exit status {status}"}
        own.unlink(missing_ok=True)
        args.json.write_text(json.dumps(finite(result), indent=1) + "\n")


def finite(x: Any) -> Any:
    """x with None for what JSON has no number for."""
    if isinstance(x, dict):
        return {key: finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


if __name__ == "__main__":
    main()
