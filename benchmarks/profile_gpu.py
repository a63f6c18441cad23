"""Hardware counters of every GPU kernel of the whole, forward and backward: what bounds each.

    ncu --csv --clock-control none --kernel-name "regex:$(python -m benchmarks.profile_gpu --kernels)" \\
      --metrics $(python -m benchmarks.profile_gpu --metrics) \\
      python -m benchmarks.profile_gpu --run=65536 --implementation=mosaic_gpu > ncu.csv
    python -m benchmarks.profile_gpu --table=ncu.csv --json=OUT.json

`--run` launches each kernel once, in the order of `NAMES`: VideoNSA-7B's shapes, bfloat16, batch 1, choices drawn with
a similarity of neighbours of 0.8; of block selection the last chunk of queries, whose rows are the longest. `--table`
reads what ncu printed.
"""

import argparse
import csv
import functools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.drawn_cases import draw_choice
from pallas_kernels import nsa_gpu, nsa_triton
from pallas_kernels.block_selection import gpu_config, gpu_top_n, triton, triton_config
from pallas_kernels.block_selection.gpu_importance import importance
from pallas_kernels.block_words import WORD
from pallas_kernels.specs import Spec

METRICS = {
    "ms": "gpu__time_duration.sum",
    "matrix units": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "exponentials": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "issue slots": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "shared memory": "l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed",
    "L2": "lts__t_sectors.avg.pct_of_peak_sustained_elapsed",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
"""Columns of the table; all but the time and the registers in per cent of the peak."""

NAMES = (
    "importance",
    "top n",
    *(f"{branch} {kernel}" for branch in nsa_gpu.BRANCHES for kernel in ("forward", "dq", "dk, dv")),
)
"""In the order in which they are launched."""


KERNELS = "mosaic|^(forward|query_gradient|key_gradients|importance|choose)"
"""Names of the kernels on the device, Mosaic's and Triton's: none of XLA's."""

IMPLEMENTATIONS = {"mosaic_gpu": nsa_gpu.HOPPER, "triton": nsa_triton.TRITON}


def settings(spec: Spec, operations: nsa_gpu.Operations) -> nsa_gpu.Settings:
    """Of a call with all branches."""
    return nsa_gpu.Settings(
        block_size=spec.block_size,
        window_size=spec.window_size,
        block_count=spec.block_count,
        init_blocks=0,
        local_blocks=1,
        branches=nsa_gpu.BRANCHES,
        ragged=False,
        choose_anyway=False,
        complete_blocks=spec.keys // spec.block_size,
        operations=operations,
        interpret=None,
    )


def block_selection_kernels(spec: Spec, q: Any, k_blocks: Any) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Importances and choice of the last chunk, for log-sum-exps of 0."""
    config = gpu_config.heuristic(spec.head_dim)
    rows, blocks = spec.batch * spec.kv_heads, spec.keys // spec.block_size
    words = gpu_config.words_for(blocks + 1)
    columns = -(-words * gpu_config.LANES // gpu_config.COLUMNS) * gpu_config.COLUMNS
    chunk = config.chunk(spec.queries, rows, columns)
    start = jnp.array([spec.queries - chunk], jnp.int32)
    current = (jnp.arange(spec.queries, dtype=jnp.int32) // spec.block_size)[None]
    last = current[:, 63::64]
    lse = jnp.zeros((spec.batch, spec.kv_heads, spec.group_size, spec.queries), jnp.float32)
    scores = jax.random.uniform(jax.random.key(0), (rows, chunk, columns))
    choice = {"block_count": spec.block_count, "init_blocks": 0, "local_blocks": 1}

    def score(*arrays: jax.Array) -> jax.Array:
        return importance(config, None, *arrays, chunk, columns)

    def choose(scores: jax.Array, *arrays: jax.Array) -> jax.Array:
        return gpu_top_n.choose(config, None, scores, words, *arrays, **choice)

    return {
        "importance": (score, (q, k_blocks, lse, last, start)),
        "top n": (choose, (scores, current, last, start)),
    }


def triton_block_selection_kernels(
    spec: Spec, q: Any, k_blocks: Any
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """As `block_selection_kernels`, of Triton's."""
    config, rows, blocks = triton_config.Config(), spec.batch * spec.kv_heads, k_blocks.shape[1]
    width = -(-blocks // triton_config.LANES) * triton_config.LANES
    chunk = config.chunk(spec.queries, rows, width)
    start = jnp.array([spec.queries - chunk], jnp.int32)
    current = (jnp.arange(spec.queries, dtype=jnp.int32) // spec.block_size)[None]
    lse = jnp.zeros(q.shape[:-1], jnp.float32)
    scores = jax.random.uniform(jax.random.key(0), (rows, chunk, width))

    def score(*arrays: jax.Array) -> jax.Array:
        return triton.importance(config, *arrays, chunk, width)

    def choose(*arrays: jax.Array) -> jax.Array:
        return triton.choose(config, *arrays, -(-(blocks + 1) // WORD), spec.block_count, 0, 1)

    return {"importance": (score, (q, k_blocks, lse, current, start)), "top n": (choose, (scores, current, start))}


def branch_kernels(
    spec: Spec, operations: nsa_gpu.Operations, name: str, q: Any, k: Any, v: Any, do: Any
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The three kernels of a branch; results that a kernel does not give are left out with their kernel."""
    about, branch = settings(spec, operations), getattr(operations, name)
    choice = draw_choice(spec, 0.8, 0) if name == "selected" else None
    length = jnp.full(spec.batch, spec.keys, jnp.int32)
    prepare = jax.jit(functools.partial(branch.prepare, about))
    forward_work, backward_work = prepare(q, k, choice, length, jnp.int32(0))
    terms = jnp.zeros(q.shape[:-1], jnp.float32)

    def forward(q: Any, k: Any, v: Any, work: Any) -> jax.Array:
        return branch.forward(about, q, k, v, work)[0]

    def gradients(kept: slice, *arrays: Any) -> Any:
        return branch.backward(about, *arrays)[kept]

    backward = (q, k, v, do, terms + 5.0, terms, backward_work)
    return {
        f"{name} forward": (forward, (q, k, v, forward_work)),
        f"{name} dq": (functools.partial(gradients, slice(1)), backward),
        f"{name} dk, dv": (functools.partial(gradients, slice(1, 3)), backward),
    }


def kernels(spec: Spec, implementation: str) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every kernel as a function and its arrays."""
    operations = IMPLEMENTATIONS[implementation]
    q, k, v, _ = spec.draw(0)
    do = jax.random.normal(jax.random.key(1), q.shape, q.dtype)
    means = [x.reshape(1, -1, spec.block_size, *x.shape[2:]).mean(axis=2) for x in (k, v)]
    select = triton_block_selection_kernels if implementation == "triton" else block_selection_kernels
    jobs = select(spec, q, means[0])
    for name in nsa_gpu.BRANCHES:
        jobs |= branch_kernels(spec, operations, name, q, *(means if name == "compressed" else (k, v)), do)
    return jobs


def run(queries: int, implementation: str) -> None:
    """Launches each kernel once."""
    jobs = kernels(Spec("profiled", queries=queries, keys=queries), implementation)
    for name in NAMES:
        function, arrays = jobs[name]
        compiled = jax.jit(function).lower(*arrays).compile()
        count = len(re.findall(r'custom_call_target="(mosaic_gpu|triton_kernel_call)', compiled.as_text()))
        print(f"{name}: {count} kernels", file=sys.stderr)
        jax.block_until_ready(compiled(*arrays))


def table(path: Path) -> list[dict[str, Any]]:
    """What ncu wrote, one record per kernel.

    Raises:
      ValueError: the file holds another number of kernels.
    """
    lines = path.read_text().splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    columns = {metric: name for name, metric in METRICS.items()}
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[first:]):
        kernel = kernels.setdefault(row["ID"], {"grid": row["Grid Size"], "block": row["Block Size"]})
        if row["Metric Name"] in columns:
            value = float(row["Metric Value"].replace(",", ""))
            scale = {"ns": 1e-6, "us": 1e-3, "usecond": 1e-3, "nsecond": 1e-6}.get(row["Metric Unit"], 1.0)
            kernel[columns[row["Metric Name"]]] = value * scale
    if len(kernels) != len(NAMES):
        raise ValueError(f"{path} holds {len(kernels)} kernels, expected {len(NAMES)}: {', '.join(NAMES)}")
    return [{"kernel": name} | kernel for name, kernel in zip(NAMES, kernels.values(), strict=True)]


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--metrics", action="store_true", help="print the counters' names for ncu")
    what.add_argument("--kernels", action="store_true", help="print the kernels' names for ncu, a regular expression")
    what.add_argument("--run", type=int, metavar="T", help="launch the kernels at this length")
    what.add_argument("--table", type=Path, metavar="CSV", help="what ncu printed")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="mosaic_gpu", help="for --run")
    parser.add_argument("--json", type=Path, help="write the table")
    options = parser.parse_args()
    if options.metrics:
        print(",".join(METRICS.values()))
    elif options.kernels:
        print(KERNELS)
    elif options.run:
        run(options.run, options.implementation)
    else:
        records = table(options.table)
        if options.json:
            options.json.write_text(json.dumps(records, indent=1) + "\n")
        print("| kernel | " + " | ".join(METRICS) + " |\n|" + "---|" * (len(METRICS) + 1))
        for record in records:
            cells = [f"{record[name]:.3g}" if name in record else "-" for name in METRICS]
            print(f"| {record['kernel']} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
