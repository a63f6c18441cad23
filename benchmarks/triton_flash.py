"""Checks and times the Triton kernels of every operation but selected attention, beside the Mosaic GPU ones.

    python -m benchmarks.triton_flash --json=OUT.json
    python -m benchmarks.triton_flash --only window_forward whole_65536 --json=OUT.json

Shapes are VideoNSA-7B's: 28 query heads over 4 KV heads of 128, blocks of 64, a window of 256, bfloat16, batch 1. Each
task is a process: all compile side by side and make their first calls, then take turns on the device. Errors are
relative norms: at short lengths against float32 references, at long ones against the Mosaic GPU kernels' results.
"""

import argparse
import dataclasses
import fcntl
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.drawn_cases import draw_choice
from experiments.timing import median_ms, poison, relative_error
from pallas_kernels import gpu_flash, gpu_flash_config, gpu_flash_plan, nsa, triton_flash
from pallas_kernels.block_selection import mosaic_gpu as selection_gpu
from pallas_kernels.block_selection import reference as selection_reference
from pallas_kernels.block_selection import triton as selection_triton
from pallas_kernels.block_selection.triton_config import Config as SelectionConfig
from pallas_kernels.compressed_attention import mosaic_gpu as compressed_gpu
from pallas_kernels.compressed_attention import reference as compressed_reference
from pallas_kernels.compressed_attention import triton as compressed_triton
from pallas_kernels.gpu import delta_of
from pallas_kernels.prefix_attention import reference as prefix_reference
from pallas_kernels.prefix_attention import triton as prefix_triton
from pallas_kernels.specs import Spec
from pallas_kernels.triton_flash_config import KeyConfig, QueryConfig, heuristic
from pallas_kernels.window_attention import mosaic_gpu as window_gpu
from pallas_kernels.window_attention import reference as window_reference
from pallas_kernels.window_attention import triton as window_triton
from videonsa_jax.training.environment import command_line

HEADS, GROUP, SIZE, BLOCK, WINDOW, PLACES = 4, 7, 128, 64, 256, 32
PREPARE_SECONDS = 55
"""After so long the tasks that are ready are timed, whether or not the others are."""

ALL_SECONDS = 84
"""After so long what is not done is given up."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One function to check and time.

    Attributes:
      name: what it is, with its configuration.
      function: of the arrays.
      arrays: its arguments.
      expected: arrays that the results are compared with; None: nothing is.
      timed: whether it is timed.
      compare: (result, expected) -> an error; None: the relative norm.
    """

    name: str
    function: Callable[..., Any]
    arrays: tuple[Any, ...]
    expected: Any = None
    timed: bool = True
    compare: Callable[[Any, Any], float] | None = None


def normal(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    """Normal values."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def label(config: Any) -> str:
    """A configuration's fields."""
    return " ".join(f"{value}" for value in dataclasses.astuple(config))


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """(q, k, v, do, dlse) -> output, log-sum-exp, dq, dk, dv."""

    def run(q: Any, k: Any, v: Any, do: Any, dlse: Any) -> Any:
        results, back = jax.vjp(attend, q, k, v)
        return *results, *back((do, dlse))

    return run


def operands(name: str, tokens: int) -> tuple[Any, ...]:
    """q, k, v, do, the operation's ends and its window."""
    if name in ("text", "decode"):
        queries, keys = (256 if name == "text" else 1), tokens
        visible = gpu_flash.Visible(jnp.full((1, queries), keys, jnp.int32), None, jnp.full((1,), keys, jnp.int32))
    else:
        queries, keys = tokens, tokens // BLOCK if name == "compressed" else tokens
        if name == "compressed":
            visible = compressed_gpu.visible_blocks(1, tokens, keys, BLOCK, 0, None)
        else:
            visible = window_gpu.visible_window(1, tokens, keys, 0, None)._replace(query_length=None)
    q, do = (normal(seed, 1, queries, HEADS, GROUP, SIZE) for seed in (0, 3))
    k, v = (normal(seed, 1, keys, HEADS, SIZE) for seed in (1, 2))
    return q, k, v, do, visible, WINDOW if name == "window" else None


def rule_of(name: str, q: jax.Array, k: jax.Array, window: int | None, **kernels: Any) -> triton_flash.Rule:
    """The heuristic's configuration with some kernels' replaced."""
    config = heuristic(q.shape[1], k.shape[1], HEADS, GROUP, window)
    return triton_flash.Rule(name, window, dataclasses.replace(config, **kernels))


def mosaic(name: str, q: Any, k: Any, window: int | None, visible: Any) -> tuple[Callable[..., Any], ...]:
    """The Mosaic GPU forward and backward passes of an operation, log-sum-exps by query."""
    config = gpu_flash_config.heuristic(q.shape[1], k.shape[1], HEADS, GROUP, SIZE, window)
    rule = gpu_flash.Rule(name, window, config)
    tiles = gpu_flash_plan.Tiles(*q.shape[:4], config.tokens)

    def forward(q: Any, k: Any, v: Any) -> Any:
        o, lse = gpu_flash.attend(rule, q, k, v, visible)
        return o, tiles.unpack(lse)

    def backward(q: Any, k: Any, v: Any, do: Any, lse: Any, delta: Any) -> Any:
        return gpu_flash.gradients(rule, q, k, v, visible, do, tiles.pack(lse, -1e30), delta)

    return forward, backward


def forward(name: str, tokens: int, configs: list[tuple[int, ...]]) -> Iterator[Case]:
    """The forward pass by configuration, beside Mosaic's."""
    q, k, v, _, visible, window = operands(name, tokens)
    theirs, _ = mosaic(name, q, k, window, visible)
    yield Case("mosaic", jax.jit(theirs), (q, k, v))
    expected = jax.jit(theirs)(q, k, v)
    for fields in configs:
        rule = rule_of(name, q, k, window)
        config = QueryConfig(*fields, parts=rule.config.forward.parts) if fields else rule.config.forward
        rule = rule_of(name, q, k, window, forward=config)
        run = jax.jit(lambda q, k, v, rule=rule: triton_flash.attend(rule, q, k, v, visible))
        yield Case(label(config), run, (q, k, v), expected)


def backward_arrays(name: str, tokens: int) -> tuple[Any, ...]:
    """q, k, v, do, log-sum-exp and delta, the ends, the window and Mosaic's backward pass."""
    q, k, v, do, visible, window = operands(name, tokens)
    theirs, back = mosaic(name, q, k, window, visible)
    o, lse = jax.jit(theirs)(q, k, v)
    delta = jax.jit(delta_of)(o, do, jnp.zeros_like(lse))
    arrays = (q, k, v, do, lse, delta)
    return arrays, visible, window, jax.jit(back)


def query_gradient(name: str, tokens: int, configs: list[tuple[int, ...]]) -> Iterator[Case]:
    """dq by configuration."""
    arrays, visible, window, back = backward_arrays(name, tokens)
    expected = back(*arrays)[0]
    for fields in configs:
        rule = rule_of(name, *arrays[:2], window)
        rule = rule_of(name, *arrays[:2], window, dq=QueryConfig(*fields, parts=rule.config.dq.parts))
        run = jax.jit(lambda q, k, v, *rest, rule=rule: triton_flash.query_gradient(rule, q, k, v, visible, *rest))
        yield Case(label(rule.config.dq), run, arrays, expected)


def key_gradients(name: str, tokens: int, configs: list[tuple[int, ...]]) -> Iterator[Case]:
    """dk and dv by configuration, beside Mosaic's whole backward pass."""
    arrays, visible, window, back = backward_arrays(name, tokens)
    yield Case("mosaic: dq, dk, dv", back, arrays)
    expected = back(*arrays)[1:]
    for fields in configs:
        rule = rule_of(name, *arrays[:2], window, dkdv=KeyConfig(*fields))
        run = jax.jit(lambda q, k, v, *rest, rule=rule: triton_flash.key_gradients(rule, q, k, v, visible, *rest))
        yield Case(label(rule.config.dkdv), run, arrays, expected)


def operation(name: str, tokens: int) -> Iterator[Case]:
    """An operation as it is called, forward and with its backward pass, in both languages."""
    q, k, v, do, _, window = operands(name, tokens)
    dlse = jnp.zeros(q.shape[:-1], jnp.float32)
    options: dict[str, Any] = {"q_offset": 0, "lengths": None}
    options |= {"block_size": BLOCK} if window is None else {"window_size": window}
    modules = {
        "compressed": (compressed_gpu.compressed_attention, compressed_triton.compressed_attention),
        "window": (window_gpu.window_attention, window_triton.window_attention),
    }
    expected: Any = [None, None]
    for language, attend in zip(("mosaic", "triton"), modules[name], strict=True):
        attend = functools.partial(attend, **options)
        forward, both = jax.jit(attend), jax.jit(with_gradients(attend))
        if language == "mosaic":
            expected = forward(q, k, v), both(q, k, v, do, dlse)
        yield Case(f"{language}: forward", forward, (q, k, v), expected[0])
        yield Case(f"{language}: forward + backward", both, (q, k, v, do, dlse), expected[1])


def checks(name: str, dtype: Any, size: int) -> Iterator[Case]:
    """Output, log-sum-exp and gradients of ragged rows with NaN past them, later queries."""
    batch, queries, offset, lengths = 2, 700, 333, (1033, 601)
    keys = 1033
    past = np.asarray(lengths) - offset
    length = jnp.asarray(lengths, jnp.int32)
    rows = (batch, queries, HEADS, GROUP, size)

    def beyond(x: Any, end: Any) -> Any:
        hidden = np.arange(x.shape[1])[None] >= np.asarray(end)[:, None]
        return jnp.where(hidden.reshape(hidden.shape + (1,) * (x.ndim - 2)), jnp.nan, x)

    options: dict[str, Any] = {"q_offset": jnp.int32(offset), "lengths": length}
    if name == "window":
        ours, theirs = window_triton.window_attention, window_reference.window_attention
        options["window_size"] = 100
    elif name == "compressed":
        ours, theirs = compressed_triton.compressed_attention, compressed_reference.compressed_attention
        options["block_size"] = 4
    else:
        queries, past = {"text": 90, "decode": 1}[name], np.full(2, 90)
        rows = (batch, queries, HEADS, GROUP, size)
        visible = jnp.asarray(np.random.default_rng(0).integers(0, 1034, (batch, 1, queries)), jnp.int32)
        visible = visible.at[0, 0, 0].set(5)
        call = (visible, length)
        ours = lambda q, k, v: prefix_triton.prefix_attention(q[:, None], k, v, *call)  # noqa: E731
        theirs = lambda q, k, v: prefix_reference.prefix_attention(q[:, None], k, v, *call)  # noqa: E731
        options = {}
    q, do = (beyond(normal(seed, *rows, dtype=dtype), past) for seed in (0, 3))
    key_end = np.asarray(lengths) // 4 if name == "compressed" else lengths
    count = keys // 4 if name == "compressed" else keys
    k, v = (beyond(normal(seed, batch, count, HEADS, size, dtype=dtype), key_end) for seed in (1, 2))
    dlse = beyond(normal(4, *rows[:-1], dtype=jnp.float32), past)
    if name in ("text", "decode"):
        do, dlse = do[:, None], dlse[:, None]
    finite = [jnp.nan_to_num(x.astype(jnp.float32)) for x in (q, k, v, do, dlse)]
    expected = jax.jit(with_gradients(functools.partial(theirs, **options)))(*finite)
    run = jax.jit(with_gradients(functools.partial(ours, **options)))
    yield Case(f"{jnp.dtype(dtype).name} {size}", run, (q, k, v, do, dlse), expected, timed=False)


def rows_that_differ(chosen: jax.Array, expected: jax.Array) -> float:
    """Share of rows that are not equal."""
    return float((chosen != expected).any(axis=-1).mean())


def selection_arrays(tokens: int) -> tuple[Any, ...]:
    """Queries, block means, log-sum-exp."""
    q, k, v, _, visible, _ = operands("compressed", tokens)
    _, lse = jax.jit(mosaic("compressed", q, k, None, visible)[0])(q, k, v)
    return q, k, lse


SELECTION = {"block_size": BLOCK, "block_count": PLACES, "init_blocks": 0, "local_blocks": 1, "q_offset": 0}


def selection_checks() -> Iterator[Case]:
    """Chosen blocks beside the float32 reference's: near-ties may differ."""
    q, k, lse = selection_arrays(4096)
    for name, dtype, options in (
        ("plain", jnp.bfloat16, {}),
        (
            "forced, ragged",
            jnp.bfloat16,
            {"init_blocks": 1, "local_blocks": 2, "lengths": jnp.array([3000], jnp.int32)},
        ),
        ("float16", jnp.float16, {}),
    ):
        how = SELECTION | {"lengths": None} | options
        arrays = (q.astype(dtype), k.astype(dtype), lse)
        expected = jax.jit(functools.partial(selection_reference.block_selection, **how))(*arrays)
        run = jax.jit(functools.partial(selection_triton.block_selection, **how))
        yield Case(f"rows that differ: {name}", run, arrays, expected, timed=False, compare=rows_that_differ)


def selection(tokens: int, configs: list[dict[str, int]]) -> Iterator[Case]:
    """The whole operation by configuration, beside Mosaic's."""
    arrays = selection_arrays(tokens)
    options = SELECTION | {"lengths": None}
    theirs = jax.jit(functools.partial(selection_gpu.block_words, **options))
    yield Case("mosaic, words", theirs, arrays)
    expected = theirs(*arrays)[..., : tokens // BLOCK // 32]
    for fields in configs:
        run = functools.partial(selection_triton.block_words, config=SelectionConfig(**fields), **options)
        run = jax.jit(lambda *arrays, run=run: run(*arrays)[..., : tokens // BLOCK // 32])
        yield Case(f"words {fields}", run, arrays, expected, compare=rows_that_differ)


def choosing(tokens: int, row_values: tuple[int, ...]) -> Iterator[Case]:
    """The choice of the last 8,192 queries; each beside the first configuration's."""
    blocks = tokens // BLOCK
    scores = jax.random.exponential(jax.random.key(0), (HEADS, 8192, blocks), jnp.float32)
    current = jnp.arange(tokens, dtype=jnp.int32)[None] // BLOCK
    expected = None
    for values in row_values:
        config = SelectionConfig(row_values=values)
        run = jax.jit(
            lambda scores, config=config: selection_triton.choose(
                config, scores, current, jnp.full(1, tokens - 8192, jnp.int32), blocks // 32 + 1, PLACES, 0, 1
            )
        )
        expected = run(scores) if expected is None else expected
        yield Case(f"choose, {values} scores a thread", run, (scores,), expected, compare=rows_that_differ)


MIXED = dict.fromkeys(nsa._OPERATIONS, "triton") | {"selected_attention": "mosaic_gpu"}


def whole(tokens: int, gradients: bool, implementations: tuple[Any, ...] = ("mosaic_gpu", "triton")) -> Iterator[Case]:
    """NSA with drawn blocks of rho 0.8 beside its own choice."""
    spec = Spec("whole", tokens, tokens)
    q, k, v, do, _, _ = operands("window", tokens)
    gates = normal(5, *q.shape[:-1], 3, dtype=jnp.float32)
    drawn = draw_choice(spec, 0.8, 0)
    expected = None
    for implementation in implementations:
        options = spec.options | {"implementation": implementation, "choose_anyway": True}

        def run(options: Any, q: Any, k: Any, v: Any, gates: Any, drawn: Any, do: Any) -> Any:
            attend = functools.partial(nsa.nsa_attention, **options, block_indices=drawn)
            return jax.vjp(attend, q, k, v, gates)[1](do) if gradients else attend(q, k, v, gates)

        run = jax.jit(functools.partial(run, options))

        arrays = (q, k, v, gates, drawn, do)
        expected = run(*arrays) if expected is None else expected
        yield Case("mixed" if implementation is MIXED else implementation, run, arrays, expected)


_FORWARD = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3)]
_DQ = [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 4, 3)]
_DKDV = [(64, 128, 8, 2), (64, 64, 4, 2)]
_SPLIT = [(*fields, parts) for fields in _DKDV for parts in (32, 64)]
_LENGTHS = (8192, 32768, 65536, 131072)

TASKS: dict[str, Callable[[], Iterator[Case]]] = {
    "mixed": lambda: whole(65536, False, ("mosaic_gpu", MIXED)),
    "check_compressed": lambda: checks("compressed", jnp.bfloat16, 128),
    "check_compressed_64": lambda: checks("compressed", jnp.float16, 64),
    "check_window": lambda: checks("window", jnp.bfloat16, 128),
    "check_text": lambda: checks("text", jnp.bfloat16, 128),
    "check_decode": lambda: checks("decode", jnp.bfloat16, 128),
    "check_selection": selection_checks,
    "compressed_forward": lambda: forward("compressed", 65536, _FORWARD),
    "compressed_dq": lambda: query_gradient("compressed", 65536, _DQ),
    "compressed_dkdv": lambda: key_gradients("compressed", 65536, _SPLIT),
    "window_forward": lambda: forward("window", 65536, _FORWARD),
    "window_dq": lambda: query_gradient("window", 65536, _DQ),
    "window_dkdv": lambda: key_gradients("window", 65536, _DKDV),
    "text": lambda: forward("text", 131072, [(), (64, 64, 4, 2)]),
    "decode": lambda: forward("decode", 131072, [()]),
    "selection_rows": lambda: selection(65536, [{"row_values": 64}]),
}
for _tokens in _LENGTHS:
    TASKS[f"whole_{_tokens}"] = functools.partial(whole, _tokens, False)
    if _tokens <= 65536:
        TASKS[f"whole_both_{_tokens}"] = functools.partial(whole, _tokens, True)
    TASKS[f"selection_{_tokens}"] = functools.partial(selection, _tokens, [{}])
    for _name in ("compressed", "window"):
        TASKS[f"{_name}_{_tokens}"] = functools.partial(operation, _name, _tokens)


def error_of(case: Case, result: Any) -> float | list[float]:
    """How far results are from what is expected."""
    if case.compare:
        return case.compare(result, case.expected)

    def seen(x: jax.Array) -> jax.Array:
        # Log-sum-exps of rows without keys are equal, and too large to be squared.
        return jnp.where(x <= -1e29, 0, x) if x.dtype == jnp.float32 else x

    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(case.expected), strict=True)
    return [relative_error(seen(x), seen(y)) for x, y in pairs]


def prepare(case: Case) -> dict[str, Any]:
    """Compiles and calls: the error, and whether two calls give the same bits."""
    begin = time.monotonic()
    compiled = case.function.lower(*case.arrays).compile()
    seconds = time.monotonic() - begin
    record: dict[str, Any] = {"case": case.name, "compile_s": round(seconds, 1)}
    poison(*jax.tree.leaves(jax.eval_shape(case.function, *case.arrays)))
    result = compiled(*case.arrays)
    if case.expected is not None:
        record["error"] = error_of(case, result)
        again = compiled(*case.arrays)
        record["same_bits"] = all(
            bool(jnp.array_equal(x, y, equal_nan=x.dtype != jnp.int32))
            for x, y in zip(jax.tree.leaves(result), jax.tree.leaves(again), strict=True)
        )
    return record


def work(task: str, share: Path, count: int) -> None:
    """Prepares a task's cases, waits for the other tasks, then times its own in turn."""
    began = float((share / "began").read_text())
    ready = []
    for case in TASKS[task]():
        try:
            ready.append((case, prepare(case)))
        except Exception as reason:
            ready.append((None, {"case": case.name, "failed": f"{type(reason).__name__}: {reason}"[:300]}))
    write(share, task, [record for _, record in ready])
    (share / f"{task}.ready").touch()
    while len(list(share.glob("*.ready"))) < count and time.time() - began < PREPARE_SECONDS:
        time.sleep(0.2)
    records = []
    with (share / "device").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for case, record in ready:
            if case is not None and case.timed:
                record |= median_ms(case.function, [case.arrays])
            records.append(record)
    write(share, task, records)


def write(share: Path, task: str, records: list[dict[str, Any]]) -> None:
    """Leaves a task's records for the main process."""
    part = share / f"{task}.part"
    part.write_text(json.dumps([{"task": task} | record for record in records]))
    part.replace(share / f"{task}.json")


def line(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    if "failed" in record:
        return f"{record['task']:20} {record['case']:34} {record['failed'][:120]}"
    error = record.get("error", [])
    error = error if isinstance(error, list) else [error]
    time_ms = f"{record['median_ms']:9.3f}" if "median_ms" in record else " " * 9
    errors = " ".join(f"{x:.1e}" for x in error) + ("" if record.get("same_bits", True) else " BITS DIFFER")
    return f"{record['task']:20} {record['case']:34} {time_ms} {record['compile_s']:5.1f} {errors}"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=TASKS, help="tasks")
    parser.add_argument("--json", type=Path, help="file for the records")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        work(arguments.task, arguments.share, int(os.environ["TASKS"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        share = Path(folder)
        began = time.time()
        (share / "began").write_text(str(began))
        command = [sys.executable, "-m", "benchmarks.triton_flash", "--share", folder, "--task"]
        environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TASKS": str(len(arguments.only))}
        running = {task: subprocess.Popen([*command, task], env=environment) for task in arguments.only}
        records: list[dict[str, Any]] = []
        for task, process in running.items():
            try:
                process.wait(timeout=max(0.1, began + ALL_SECONDS - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
            file = share / f"{task}.json"
            done = json.loads(file.read_text()) if file.exists() else [{"task": task, "case": "", "failed": "it ended"}]
            records += done
            print("\n".join(map(line, done)), flush=True)
            if arguments.json:
                about = {"command": command_line(), "records": records}
                arguments.json.write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
