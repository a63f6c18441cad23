"""Times block selection on Hopper beside XLA's top_k and its own floors, after checking it.

    python -m benchmarks.choose_gpu --checks --json=CHECKS.json
    python -m benchmarks.choose_gpu --lengths 65536 131072 --pieces=65536 --json=TIMES.json

Shapes are VideoNSA-7B's (28 query heads over 4 KV heads of 128, blocks of 64, 32 places, bfloat16, batch 1). Three
kinds of block means: `flat`, means of 64 normal keys (all blocks nearly alike); `normal`; `sharp`, normal times 3.
A choice is checked by importances in float32, not by indices: no block left out may have more than the least of those
taken, within 1e-4. A step that fails is reported and the next one runs; a step that stands still ends the program.
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.selected_gpu import BLOCK, GROUP, HEADS, PLACES, SIZE, attempt, median_ms, poison, report, watch
from experiments.kernel_checks import ROWS, check_choice, importances
from pallas_kernels import block_words
from pallas_kernels.block_selection import gpu_config, gpu_top_n, mosaic_gpu
from pallas_kernels.block_selection.gpu_importance import importance
from pallas_kernels.common import EMPTY_LSE, query_indices
from videonsa_jax.training.environment import command_line

SPREADS = {"flat": 0.125, "normal": 1.0, "sharp": 3.0}
LENGTHS = (65536, 131072, 8192, 16384 + 37, 32768)

_began = time.monotonic()


def draw(
    queries: int,
    seed: int,
    spread: float,
    heads: int = HEADS,
    group: int = GROUP,
    size: int = SIZE,
    offset: int = 0,
    dtype: Any = jnp.bfloat16,
    batch: int = 1,
) -> tuple[jax.Array, ...]:
    """Queries, block means and the compression branch's log-sum-exp."""
    key_q, key_k = jax.random.split(jax.random.key(seed))
    q = jax.random.normal(key_q, (batch, queries, heads, group, size), dtype)
    means = spread * jax.random.normal(key_k, (batch, (queries + offset) // BLOCK, heads, size), jnp.float32)
    means = means.astype(dtype)
    step = 1024
    chunks = -(-queries // step)
    padded = jnp.pad(q, [(0, 0), (0, chunks * step - queries), (0, 0), (0, 0), (0, 0)])

    @jax.jit
    def normalizer(q: jax.Array, means: jax.Array) -> jax.Array:
        def one(chunk: Any) -> jax.Array:
            rows, start = chunk
            logits = _logits(rows, means)
            t = query_indices(step, start + offset)
            seen = (jnp.arange(means.shape[1]) + 1) * BLOCK - 1 <= t[:, None]
            lse = jax.nn.logsumexp(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
            return jnp.where(seen.any(-1)[:, None, None], lse, EMPTY_LSE)

        rows = jnp.moveaxis(q.reshape(batch, chunks, step, *q.shape[2:]), 1, 0)
        lse = jax.lax.map(one, (rows, jnp.arange(chunks) * step))
        return jnp.moveaxis(lse, 0, 1).reshape(batch, chunks * step, heads, group)

    return q, means, normalizer(padded, means)[:, :queries]


def _logits(q: jax.Array, means: jax.Array) -> jax.Array:
    dot = functools.partial(jnp.einsum, "btngd,bmnd->btngm", preferred_element_type=jnp.float32)
    return dot(q, means) * q.shape[-1] ** -0.5


def check(chosen: jax.Array, inputs: tuple[jax.Array, ...], **rule: Any) -> dict[str, float | bool]:
    """`check_choice` in 384 queries, from the first to the last."""
    return check_choice(chosen, inputs, np.linspace(0, chosen.shape[1] - ROWS, 12, dtype=int), block_size=BLOCK, **rule)


def check_small() -> dict[str, Any]:
    """7B heads, ragged T."""
    inputs = draw(2048 + 21, 3, 1.0)
    chosen = jax.jit(functools.partial(select, places=8))(*inputs)
    return check(chosen, inputs)


def check_other_shape() -> dict[str, Any]:
    """Two batch rows, four query heads of 64, float16, later queries, ragged with NaN, more blocks forced."""
    offset, lengths = 1000, jnp.array([1900, 1655], jnp.int32)
    q, means, lse = draw(900, 4, 1.0, 2, 4, 64, offset, jnp.float16, 2)
    past = (offset + jnp.arange(900) >= lengths[:, None])[..., None, None]
    poisoned = jnp.where(past[..., None], jnp.nan, q), means, jnp.where(past, jnp.nan, lse)
    options = {"places": 7, "init": 1, "local": 2}
    chosen = jax.jit(functools.partial(select, **options))(*poisoned, offset=offset, lengths=lengths)
    rule = {"init_blocks": options["init"], "local_blocks": options["local"], "q_offset": offset, "lengths": lengths}
    return check(chosen, (q, means, lse), **rule) | {"none past": bool((jnp.where(past, chosen, -1) == -1).all())}


def check_ties() -> dict[str, Any]:
    """All importances alike, and all underflown: the lowest indices."""
    seen = {}
    for name, shift in (("equal", 0.0), ("zero", 300.0)):
        q = jnp.zeros((1, 4096, HEADS, GROUP, SIZE), jnp.bfloat16)
        chosen = jax.jit(functools.partial(select, places=8))(
            q, q[:, ::BLOCK, :, 0], jnp.full(q.shape[:-1], shift, jnp.float32)
        )
        current = (jnp.arange(4096) // BLOCK)[None, :, None, None]
        place = jnp.arange(8)
        expected = jnp.where(
            place < jnp.minimum(current, 7), place, jnp.where(place == jnp.minimum(current, 7), current, -1)
        )
        seen[name] = bool((chosen == expected).all())
    return seen


def check_scores(queries: int) -> dict[str, float]:
    """Relative error of the importances themselves."""
    q, means, lse = draw(queries, 5, 1.0)
    poison(jax.ShapeDtypeStruct((HEADS, queries, -(-(queries // BLOCK + 1) // 128) * 128), jnp.float32))
    scores = score(gpu_config.heuristic(SIZE), queries)(*prepare(q, means, lse), jnp.zeros(1, jnp.int32))
    exact = jnp.swapaxes(jax.jit(importances)(q, means, lse)[0], 0, 1)
    seen = jnp.arange(means.shape[1]) < (jnp.arange(queries) // BLOCK)[:, None]
    error = jnp.abs(scores[:, :, : means.shape[1]] / exact - 1)
    return {"worst relative": float(jnp.where(seen, error, 0).max())}


def select(
    q: jax.Array,
    means: jax.Array,
    lse: jax.Array,
    offset: Any = 0,
    lengths: jax.Array | None = None,
    places: int = PLACES,
    init: int = 0,
    local: int = 1,
    config: gpu_config.Config | None = None,
    words: bool = False,
) -> jax.Array:
    """The whole operation, or its words."""
    return (mosaic_gpu.block_words if words else mosaic_gpu.block_selection)(
        q,
        means,
        lse,
        block_size=BLOCK,
        block_count=places,
        init_blocks=init,
        local_blocks=local,
        q_offset=offset,
        lengths=lengths,
        config=config,
    )


@jax.jit
def prepare(q: jax.Array, means: jax.Array, lse: jax.Array) -> tuple[jax.Array, ...]:
    """What the importance kernel takes, for whole tiles of queries and B = 1."""
    shift = jnp.transpose(lse, (0, 2, 3, 1)) * jnp.float32(mosaic_gpu.gpu.LOG2_E)
    last = jnp.arange(q.shape[1] // 64, dtype=jnp.int32)[None]
    return q, means, shift, last


def score(config: gpu_config.Config, chunk: int) -> Any:
    """The importance kernel over one chunk."""

    def run(q: jax.Array, means: jax.Array, shift: jax.Array, last: jax.Array, start: jax.Array) -> jax.Array:
        columns = -(-(means.shape[1] + 1) // 128) * 128
        return importance(config, None, q, means, shift, last, start, chunk, columns)

    return jax.jit(run)


def score_all(queries: int) -> Any:
    """The importance kernel over all chunks, each of which is dropped."""
    config = gpu_config.heuristic(SIZE)
    columns = -(-(queries // BLOCK + 1) // gpu_config.COLUMNS) * gpu_config.COLUMNS
    chunk = config.chunk(queries, HEADS, columns)
    one = score(config, chunk)
    starts = jnp.arange(-(-queries // chunk), dtype=jnp.int32)[:, None] * chunk

    def run(q: jax.Array, means: jax.Array, shift: jax.Array, last: jax.Array) -> jax.Array:
        past = starts.size * chunk - queries
        shift = jnp.pad(shift, [(0, 0), (0, 0), (0, 0), (0, past)])
        last = jnp.pad(last, [(0, 0), (0, past // 64)], constant_values=-1)
        return jax.lax.map(lambda start: one(q, means, shift, last, start)[:, 0, 0], starts)

    return jax.jit(run)


def count_floors(queries: int) -> dict[str, float]:
    """Floors in ms (798 TFLOP/s, 3.0 TB/s, 3.9 T exp2/s, 14 T int32 operations/s), half of the blocks being past."""
    pairs = HEADS * queries * (queries // BLOCK) / 2
    return {
        "importance matmul": 2 * pairs * GROUP * SIZE / 798e9,
        "importance exp2": pairs * GROUP / 3.9e9,
        "scores once through memory": 4 * pairs / 3e9,
        "top n, 10 passes of 2 operations": 20 * pairs / 14e9,
    }


def time_whole(queries: int, record: dict[str, Any]) -> None:
    """Times and checks the whole operation."""
    report(record, "floors", count_floors(queries))
    inputs = {name: draw(queries, seed, spread) for seed, (name, spread) in enumerate(SPREADS.items())}
    whole = jax.jit(select).lower(*inputs["normal"]).compile()
    report(record, "temporary MiB", whole.memory_analysis().temp_size_in_bytes / 2**20)
    attempt(record, "whole", lambda: median_ms(whole, [inputs["normal"]]))
    words = jax.jit(functools.partial(select, words=True))
    attempt(record, "words", lambda: median_ms(words, [inputs["normal"]]))
    attempt(record, "importances", lambda: median_ms(score_all(queries), [prepare(*inputs["normal"])]))
    for name, x in inputs.items():
        attempt(record, f"whole, {name}", lambda: median_ms(whole, [x], 3))  # noqa: B023
        attempt(record, f"check, {name}", lambda: check(whole(*x), x))  # noqa: B023
    x = inputs["normal"]
    attempt(record, "same bits", lambda: bool((whole(*x) == whole(*x)).all()))


def time_pieces(queries: int, record: dict[str, Any], save: Callable[[], None]) -> None:
    """Times each kernel under several configurations over the last chunk, whose rows are the longest."""
    config = gpu_config.heuristic(SIZE)
    inputs = [draw(queries, seed, SPREADS["normal"]) for seed in range(2)]
    blocks = queries // BLOCK
    chunk = config.chunk(queries, HEADS, blocks + 128)
    start = jnp.array([queries - chunk], jnp.int32)
    report(record, "chunk", chunk)
    args = [(*prepare(*x), start) for x in inputs]

    def time_one(name: str, fn: Callable[..., Any], inputs: list[tuple[Any, ...]]) -> None:
        attempt(record, name, lambda: median_ms(jax.jit(fn), inputs, 3))
        save()

    first = score(config, chunk)
    scores = [(first(*x),) for x in args]
    time_one("importance, last chunk", first, args)
    time_one("importance, last chunk, 6 stages of 64", score(gpu_config.Config(6, 64), chunk), args)
    current = (jnp.arange(queries, dtype=jnp.int32) // BLOCK)[None]
    last = args[0][3]

    def top(config: gpu_config.Config, places: int, values: jax.Array) -> jax.Array:
        width = gpu_config.words_for(blocks + 1)
        return gpu_top_n.choose(
            config, None, values, width, current, last, start, block_count=places, init_blocks=0, local_blocks=1
        )

    for name, places, changes in (
        ("", PLACES, {}),
        (", no search", 1 << 20, {}),
        (", twice the rows per warp", PLACES, {"row_values": 2 * config.row_values}),
    ):
        fn = functools.partial(top, dataclasses.replace(config, **changes), places)
        time_one(f"top n, last chunk{name}", fn, scores)
    words = jnp.int32(1) << jax.random.randint(jax.random.key(0), (1, queries, HEADS, blocks // 32 + 1), 0, 32)
    words = words.at[..., PLACES:].set(0)
    time_one("indices of words", lambda w: block_words.indices_of(w, PLACES), [(words,)])

    few = [(x[:, : min(chunk, 2048)],) for (x,) in scores]
    report(record, "queries of top_k", few[0][0].shape[1])
    best = functools.partial(jax.lax.top_k, k=PLACES, is_stable=False)
    time_one("lax.top_k, unstable", lambda x: best(jnp.where(jnp.isnan(x), -1, x))[1], few)
    rows = [(q[:, -1024:], means, lse[:, -1024:]) for q, means, lse in inputs]
    plain = lambda q, means, lse: jnp.exp(_logits(q, means) - lse[..., None]).sum(axis=3)  # noqa: E731
    time_one("XLA importance of 1024 queries", plain, rows)


def main() -> None:
    """Checks or times, and writes the JSON after every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checks", action="store_true", help="check short inputs and time nothing")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--pieces", type=int, help="time each kernel under several configurations at this length")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no length is begun")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    watch(25)
    result: dict[str, Any] = {
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"N": HEADS, "G": GROUP, "D": SIZE, "s": BLOCK, "n": PLACES, "B": 1, "dtype": "bfloat16"},
    }

    def save() -> None:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)

    if args.checks:
        result["checks"] = checks = {}
        attempt(checks, "scores", lambda: check_scores(16384))
        save()
        for name, run in (("small", check_small), ("other shape", check_other_shape), ("ties", check_ties)):
            attempt(checks, name, run)
            save()
        return
    result["lengths"] = {}
    for queries in args.lengths:
        if time.monotonic() - _began > args.budget:
            break
        print(f"T = {queries}", flush=True)
        result["lengths"][queries] = record = {}
        attempt(record, "all", lambda: time_whole(queries, record))  # noqa: B023
        save()
    if args.pieces:
        print(f"pieces at T = {args.pieces}", flush=True)
        result["pieces"] = {"T": args.pieces}
        attempt(result["pieces"], "all", lambda: time_pieces(args.pieces, result["pieces"], save))
        save()


if __name__ == "__main__":
    main()
