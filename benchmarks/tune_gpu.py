"""Times configurations of the Hopper kernels of selected attention and writes the fastest into the repository.

    python -m benchmarks.tune_gpu --lengths 8192 16384 32768 65536 131072 --json=OUT.json

Shapes and drawn blocks as in benchmarks/selected_gpu.py, rho 0.8. Every configuration's output is compared with the
first one's (the same sums in another order) before it may win. `pallas_kernels/gpu_table.json` keeps the fastest of
each kernel and length, with all times beside it; entries of other kernels and lengths stay.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.selected_gpu import (
    BLOCK,
    GROUP,
    HEADS,
    SIZE,
    draw_choice,
    draw_tensors,
    relative_error,
    report,
    watch,
)
from pallas_kernels import gpu, gpu_table
from pallas_kernels.selected_attention import gpu_config, mosaic_gpu, mosaic_gpu_backward
from pallas_kernels.selected_attention.gpu_lists import block_lists, tile_lists, visible_choice

RHO = 0.8
FORWARD = (
    {"stages": 5, "consumers": 3, "q_registers": 64, "parts": 2},
    {"stages": 5, "consumers": 3, "q_registers": 64, "parts": 1},
    {"stages": 4, "consumers": 3, "q_registers": 64, "parts": 2},
)
DQ = (
    {"stages": 4, "consumers": 2, "q_registers": 0},
    {"stages": 4, "consumers": 2, "q_registers": 64},
)
DKDV = (
    {"stages": 4, "pieces": 16},
    {"stages": 4, "pieces": 32},
)
NAMES = ("selected_forward", "selected_dq", "selected_dkdv")

AGREE = 1e-2
"""Relative norm up to which two configurations agree: bfloat16 rounds probabilities at other running maxima."""

TURNS, CALLS = 11, 2
"""How often each configuration is timed, and calls each time."""


def kernels(
    queries: int, names: Collection[str]
) -> Iterator[tuple[str, dict[str, int], Callable[..., Any], tuple[Any, ...]]]:
    """Every (kernel, fields, compiled function, arguments) to time at one length, of the kernels named."""
    q, k, v, do = draw_tensors(queries, 0)
    zero, length = jnp.int32(0), jnp.array([queries], jnp.int32)
    chosen = jax.jit(lambda i: visible_choice(i, length, zero, queries, BLOCK))(draw_choice(queries, RHO, 0))

    @functools.cache
    def listed(tokens: int) -> Any:
        return jax.jit(lambda x: tile_lists(x, length, zero, queries, BLOCK, tokens))(chosen)

    share = gpu_config.heuristic(queries, HEADS, SIZE, GROUP).forward.share
    for fields in FORWARD:
        config = gpu_config.TileConfig(share=share, **fields)
        fn = jax.jit(functools.partial(mosaic_gpu.forward, config, None))
        yield NAMES[0], fields, fn, (q, k, v, listed(config.tokens))
    if not set(names) & set(NAMES[1:]):
        return
    o, lse = fn(q, k, v, listed(config.tokens))
    delta = gpu.delta_of(o, do, jnp.zeros_like(lse))
    terms = mosaic_gpu_backward.row_terms(lse, delta)
    for fields in DQ:
        config = gpu_config.TileConfig(**fields)
        fn = jax.jit(functools.partial(mosaic_gpu_backward.query_gradient, config, None))
        yield NAMES[1], fields, fn, (q, k, v, do, *terms, listed(config.tokens))
    for fields in DKDV:
        part = max(1024, queries // fields["pieces"])
        config = gpu_config.BlockConfig(fields["stages"], part)
        lists = jax.jit(lambda x, part=part: block_lists(x, zero, queries, BLOCK, part))(chosen)
        fn = jax.jit(functools.partial(mosaic_gpu_backward.key_gradients, config, None))
        yield NAMES[2], fields, fn, (q, k, v, do, *terms, lists)


def tune(queries: int, names: Collection[str]) -> list[dict[str, Any]]:
    """The table's entries for one length and these kernels; a configuration that differs is printed and cannot win."""
    agreeing: dict[str, list[tuple[dict[str, int], Callable[[], Any]]]] = {}
    first: dict[str, Any] = {}
    for kernel, fields, fn, arguments in kernels(queries, names):
        if kernel not in names:
            continue
        out = jax.tree.leaves(fn(*arguments))
        error = max(relative_error(a, b) for a, b in zip(out, first.setdefault(kernel, out), strict=True))
        report({}, f"{queries} {kernel} {fields}", f"differs by {error:.1e}")
        if error <= AGREE:
            agreeing.setdefault(kernel, []).append((fields, functools.partial(fn, *arguments)))
    first.clear()
    entries = []
    for kernel, calls in agreeing.items():
        times = medians_in_turns([call for _, call in calls])
        seen = [{"fields": fields, "median_ms": round(ms, 4)} for (fields, _), ms in zip(calls, times, strict=True)]
        for one in seen:
            report({}, f"{queries} {kernel} {one['fields']}", one)
        best = min(seen, key=lambda one: one["median_ms"])
        entries.append(
            {"kernel": kernel, "head_dim": SIZE, "queries": queries, "fields": best["fields"], "times": seen}
        )
    return entries


def medians_in_turns(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Each call's median in ms. They take turns: under load a GPU lowers its clock, so that the first would win."""
    seen: list[list[float]] = [[] for _ in calls]
    for _ in range(TURNS):
        for call, samples in zip(calls, seen, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready([call() for _ in range(CALLS)])
            samples.append(1e3 * (time.perf_counter() - begin) / CALLS)
    return [statistics.median(samples) for samples in seen]


def main() -> None:
    """Tunes each length and writes the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(8192, 16384, 32768, 65536, 131072))
    parser.add_argument("--json", default=os.fspath(gpu_table.FILE), help="table to write; default: the repository's")
    parser.add_argument("--kernels", nargs="+", default=NAMES, choices=NAMES)
    args = parser.parse_args()
    watch(60)
    about = {
        "command": "python -m benchmarks.tune_gpu --lengths "
        + " ".join(map(str, args.lengths))
        + (" --kernels " + " ".join(args.kernels) if tuple(args.kernels) != NAMES else ""),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"B": 1, "N": HEADS, "D": SIZE, "rho": RHO},
    }
    entries = json.loads(gpu_table.FILE.read_text())["entries"]
    for queries in args.lengths:
        new = tune(queries, args.kernels)
        same = {(entry["kernel"], entry["head_dim"], entry["queries"]) for entry in new}
        kept = [entry for entry in entries if (entry["kernel"], entry["head_dim"], entry["queries"]) not in same]
        entries = kept + new
        partial = args.json + ".tmp"
        with open(partial, "w") as file:
            file.write(json.dumps(about | {"entries": entries}, indent=1) + "\n")
        os.replace(partial, args.json)


if __name__ == "__main__":
    main()
