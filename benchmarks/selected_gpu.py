"""Times the Hopper kernels of selected attention beside cuDNN's dense causal attention, after checking them.

    python -m benchmarks.selected_gpu --json=OUT.json

Shapes are VideoNSA-7B's (28 query heads over 4 KV heads of 128, 32 blocks of 64, bfloat16, batch 1). Choices are drawn
with a stated similarity of neighbours: score[t, j] = sqrt(rho) a[t // 64, j] + sqrt(1 - rho) b[t, j], a and b normal; a
query takes its own block and the best-scored earlier ones. Every error is a relative norm against float32 attention.
Times are medians over samples that rotate among several inputs. A step that fails is reported and the next one runs; a
step that stands still ends the program.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import drawn_cases
from experiments.timing import median_ms, poison, relative_error
from pallas_kernels import gpu
from pallas_kernels.selected_attention import gpu_config, mosaic_gpu, mosaic_gpu_backward, reference
from pallas_kernels.selected_attention.gpu_lists import block_lists, tile_lists, visible_choice
from pallas_kernels.specs import Spec
from videonsa_jax.training.environment import command_line

HEADS, GROUP, SIZE, BLOCK, PLACES = 4, 7, 128, 64, 32
LENGTHS = (8192, 65536, 131072, 32768, 16384 + 37)
RHOS = (0.8, 0.0, 0.98)


def draw_choice(queries: int, rho: float, seed: int, places: int = PLACES, sink: bool = False) -> jax.Array:
    """Blocks [1, T, N, n] as the module says; with `sink`, every query also takes block 0."""
    spec = Spec("drawn", queries, queries, kv_heads=HEADS, block_size=BLOCK, block_count=places)
    return drawn_cases.draw_choice(spec, rho, seed, sink=sink)


def draw_tensors(queries: int, seed: int) -> tuple[jax.Array, ...]:
    """Normal q, k, v and the output's cotangent."""
    keys = jax.random.split(jax.random.key(seed), 4)
    rows, columns = (1, queries, HEADS, GROUP, SIZE), (1, queries, HEADS, SIZE)
    shapes = (rows, columns, columns, rows)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


@jax.jit
def reference_rows(q: jax.Array, k: jax.Array, v: jax.Array, index: jax.Array, do: jax.Array, start: jax.Array) -> Any:
    """Output, log-sum-exp and dq of the queries from `start` on, in float32 (TF32 off)."""
    q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))

    def attend(q: jax.Array) -> Any:
        return reference.selected_attention(q, k, v, index, block_size=BLOCK, q_offset=start, lengths=None)

    with jax.default_matmul_precision("highest"):
        (o, lse), back = jax.vjp(attend, q)
        return o, lse, back((do, jnp.zeros_like(lse)))[0]


@jax.jit
def reference_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    block: jax.Array,
) -> Any:
    """dk and dv of one block from all queries, in float32, given each row's log-sum-exp and delta."""
    with jax.default_matmul_precision("highest"):
        keys = block * BLOCK + jnp.arange(BLOCK)
        k, v = (jnp.where((keys < x.shape[1])[:, None, None], x[0, keys], 0).astype(jnp.float32) for x in (k, v))
        t = jnp.arange(q.shape[1])
        seen = (index[0] == block).any(-1)[:, :, None, None] & (keys <= t[:, None])[:, None, None]
        q, do = q[0].astype(jnp.float32), do[0].astype(jnp.float32)
        s = jnp.einsum("tngd,snd->tngs", q, k) * SIZE**-0.5
        p = jnp.where(seen, jnp.exp(s - lse[0, ..., None]), 0.0)
        dp = jnp.einsum("tngd,snd->tngs", do, v)
        ds = p * (dp - delta[0, ..., None]) * SIZE**-0.5
        return jnp.einsum("tngs,tngd->snd", ds, q), jnp.einsum("tngs,tngd->snd", p, do)


Attend = Callable[[jax.Array, jax.Array, jax.Array], Any]
"""q, k, v -> output and log-sum-exp."""


def check(whole: Callable[..., Attend], tensors: tuple[jax.Array, ...], index: jax.Array) -> dict[str, float | bool]:
    """Errors of output, log-sum-exp and gradients; whether a second run gives the same bits.

    Args:
      whole: from the chosen blocks (and lengths) to the operation as a function of q, k and v.
      tensors: q, k, v and the output's cotangent.
      index: the chosen blocks.
    """
    q, k, v, do = tensors
    queries = q.shape[1]

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, index: jax.Array) -> Any:
        (o, lse), back = jax.vjp(whole(index), q, k, v)
        return o, lse, *back((do, jnp.zeros_like(lse)))

    poison(q, q, k, v, do)
    o, lse, dq, dk, dv = first = run(q, k, v, do, index)
    again = run(q, k, v, do, index)
    same = all(bool((a == b).all()) for a, b in zip(first, again, strict=True))
    seen: dict[str, list[float]] = {name: [] for name in ("o", "lse", "dq", "dk", "dv")}
    for start in sorted({0, 1000, queries // 2 + 5, queries - 32}):
        rows = slice(start, start + 32)
        expected = reference_rows(q[:, rows], k, v, index[:, rows], do[:, rows], jnp.int32(start))
        for name, actual, value in zip(seen, (o, lse, dq), expected, strict=False):
            seen[name].append(relative_error(actual[:, rows], value))
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    for block in sorted({0, 1, queries // BLOCK // 2, (queries - 1) // BLOCK}):
        columns = slice(block * BLOCK, min(queries, (block + 1) * BLOCK))
        expected = reference_block(q, k, v, index, do, lse, delta, jnp.int32(block))
        for name, actual, value in zip(("dk", "dv"), (dk, dv), expected, strict=True):
            seen[name].append(relative_error(actual[0, columns], value[: columns.stop - columns.start]))
    finite = all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in first)
    return {name: max(values) for name, values in seen.items()} | {"finite": finite, "same_bits": same}


def whole(config: gpu_config.Config, index: jax.Array, lengths: jax.Array | None = None) -> Attend:
    """The operation as a function of q, k and v."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return mosaic_gpu.selected_attention(
            q, k, v, index, block_size=BLOCK, q_offset=0, lengths=lengths, config=config
        )

    return attend


def check_ragged(whole: Callable[..., Attend], tensors: tuple[jax.Array, ...], index: jax.Array) -> dict[str, Any]:
    """NaN past `lengths` must change nothing before it: compares with the call cut to that length (see `check`)."""
    q, k, v, do = tensors
    length = q.shape[1] - 100

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, index: jax.Array, lengths: Any) -> Any:
        (o, lse), back = jax.vjp(whole(index, lengths), q, k, v)
        return o, *back((do, jnp.zeros_like(lse)))

    past = jnp.arange(q.shape[1]) >= length
    hidden = [jnp.where(past.reshape(-1, *(1,) * (x.ndim - 2)), jnp.nan, x) for x in (q, k, v, do)]
    ragged = jax.jit(run)(*hidden, index, jnp.array([length], jnp.int32))
    cut = jax.jit(functools.partial(run, lengths=None))(*(x[:, :length] for x in (q, k, v, do, index)))
    names = ("o", "dq", "dk", "dv")
    errors = {name: relative_error(a[:, :length], b) for name, a, b in zip(names, ragged, cut, strict=True)}
    return errors | {"zero_past": all(bool((x[:, length:] == 0).all()) for x in ragged)}


def dense(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Dense causal attention of the same heads, by cuDNN."""
    heads = q.reshape(*q.shape[:2], HEADS * GROUP, SIZE)
    return jax.nn.dot_product_attention(heads, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)


def with_gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    """A function of q, k, v and do that returns attend's output and the three gradients."""

    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, back = jax.vjp(attend, q, k, v)
        return o, *back(do)

    return run


def time_pieces(
    config: gpu_config.Config, inputs: list[tuple[jax.Array, ...]], choices: list[jax.Array], record: dict[str, Any]
) -> None:
    """Times lists, kernels and the whole operation, each compiled by itself."""
    queries = inputs[0][0].shape[1]
    zero, length = jnp.int32(0), jnp.array([queries], jnp.int32)

    def tiles(index: jax.Array, tokens: int) -> Any:
        return tile_lists(visible_choice(index, length, zero, queries, BLOCK), length, zero, queries, BLOCK, tokens)

    def queries_of(index: jax.Array) -> Any:
        return block_lists(visible_choice(index, length, zero, queries, BLOCK), zero, queries, BLOCK, config.dkdv.part)

    pad = jax.jit(lambda x: mosaic_gpu.whole_blocks(x, None))
    calls = [(q, pad(k), pad(v), do) for q, k, v, do in inputs]
    tile_fn, block_fn = jax.jit(tiles, static_argnums=1), jax.jit(queries_of)
    listed = [tile_fn(index, config.forward.tokens) for index in choices]
    forward = jax.jit(functools.partial(mosaic_gpu.forward, config.forward, None))
    forward_args = [(q, k, v, lists) for (q, k, v, _), lists in zip(calls, listed, strict=True)]
    entries = listed[0].tiles[..., 0]
    record["union_blocks_per_tile"] = float(entries.mean())
    mask = listed[0].entries.reshape(*entries.shape, -1, 2)[..., 1]
    record["blocks_per_warpgroup"] = float(((mask & (2**config.forward.share - 1)) != 0).sum() / entries.size)
    report(record, "forward", median_ms(forward, forward_args))
    report(record, "tile_lists", median_ms(lambda i: tile_fn(i, config.forward.tokens), [(i,) for i in choices]))

    @jax.jit
    def terms(o: jax.Array, lse: jax.Array, do: jax.Array, dlse: jax.Array) -> Any:
        return mosaic_gpu_backward.row_terms(lse, gpu.delta_of(o, do, dlse))

    term_args = []
    for (q, _, _, do), args in zip(calls, forward_args, strict=True):
        o, lse = forward(*args)
        term_args.append((o, lse, do, jnp.zeros_like(lse)))
        del q
    report(record, "row_terms", median_ms(terms, term_args))
    rows = [terms(*args) for args in term_args]
    del term_args
    if config.dq.tokens != config.forward.tokens:
        listed = [tile_fn(index, config.dq.tokens) for index in choices]
    dq = jax.jit(functools.partial(mosaic_gpu_backward.query_gradient, config.dq, None))
    report(record, "dq", median_ms(dq, [(*c, *r, t) for c, r, t in zip(calls, rows, listed, strict=True)]))
    blocked = [block_fn(index) for index in choices]
    gathered = jax.jit(lambda shift, delta, lists: mosaic_gpu_backward.terms_in_lists(shift, delta, lists, queries))
    report(record, "terms_in_lists", median_ms(gathered, [(*r, t) for r, t in zip(rows, blocked, strict=True)]))
    dkdv = jax.jit(functools.partial(mosaic_gpu_backward.key_gradients, config.dkdv, None))
    report(record, "dkdv", median_ms(dkdv, [(*c, *r, t) for c, r, t in zip(calls, rows, blocked, strict=True)]))
    report(record, "block_lists", median_ms(block_fn, [(i,) for i in choices]))
    del blocked, listed, rows

    attend = jax.jit(lambda q, k, v, do, index: whole(config, index)(q, k, v)[0])
    both = jax.jit(lambda q, k, v, do, index: with_gradients(lambda *x: whole(config, index)(*x)[0])(q, k, v, do))
    arguments = [(*tensors, index) for tensors, index in zip(inputs, choices, strict=True)]
    report(record, "whole_forward", median_ms(attend, arguments))
    report(record, "whole_forward_backward", median_ms(both, arguments))


def small_checks(record: dict[str, Any]) -> bool:
    """Checks a short input: each kernel's compilation, a sink in split lists, ragged lengths."""
    queries = 2048 + 21
    tensors = draw_tensors(queries, 7)
    config = gpu_config.heuristic(queries, HEADS, SIZE, GROUP)
    index = draw_choice(queries, 0.5, 7, places=8)

    pieces: dict[str, Any] = {}
    try:
        time_pieces(config, [tensors], [index], pieces)
    except Exception:
        # The gradients are tried all the same, on a made-up output.
        traceback.print_exc(limit=4)
        record["failed"] = traceback.format_exc(limit=4)
        try_gradients(config, tensors, index, record)
        return False
    record["pieces"] = pieces
    attempt(record, "small", lambda: check(functools.partial(whole, config), tensors, index))
    split = dataclasses.replace(config, dkdv=dataclasses.replace(config.dkdv, part=256))
    attempt(
        record,
        "sink, split",
        lambda: check(functools.partial(whole, split), tensors, draw_choice(queries, 0.5, 8, places=8, sink=True)),
    )
    attempt(
        record,
        "ragged",
        lambda: check_ragged(functools.partial(whole, config), tensors, draw_choice(queries, 0.5, 9, places=8)),
    )
    return all(fine(record[name]) for name in ("small", "sink, split", "ragged"))


def check_other_shape(attend: Callable[..., Any] = mosaic_gpu.selected_attention) -> dict[str, float]:
    """Two batch rows, four query heads of 64, float16, later queries, ragged: against the float32 reference."""
    batch, queries, heads, group, size, offset = 2, 300, 2, 4, 64, 100
    keys, lengths = queries + offset, jnp.array([400, 371], jnp.int32)
    draw = [jax.random.normal(jax.random.key(i), (batch, keys, heads, size), jnp.float16) for i in range(2)]
    rows = [jax.random.normal(jax.random.key(i), (batch, queries, heads, group, size), jnp.float16) for i in (2, 3)]
    current = ((offset + jnp.arange(queries)) // BLOCK)[None, :, None, None]
    earlier = jax.random.bits(jax.random.key(4), (batch, queries, heads, 1), jnp.uint8) % current
    index = jnp.concatenate([earlier, jnp.broadcast_to(current, earlier.shape)], axis=-1).astype(jnp.int32)
    options = {"block_size": BLOCK, "q_offset": jnp.int32(offset), "lengths": lengths}

    def run(attend: Callable[..., Any], dtype: Any) -> Any:
        tensors = [x.astype(dtype) for x in (rows[0], *draw, rows[1])]

        def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
            with jax.default_matmul_precision("highest"):
                (o, lse), back = jax.vjp(lambda q, k, v: attend(q, k, v, index, **options), q, k, v)
                return o, *back((do, jnp.zeros_like(lse)))

        return jax.jit(both)(*tensors)

    actual, expected = run(attend, jnp.float16), run(reference.selected_attention, jnp.float32)
    names = ("o", "dq", "dk", "dv")
    return {name: relative_error(a, b) for name, a, b in zip(names, actual, expected, strict=True)}


def fine(errors: dict[str, Any]) -> bool:
    """Whether every error is below 2e-2 and nothing failed."""
    return all(
        value is True if isinstance(value, bool) else not isinstance(value, str) and value < 2e-2
        for value in errors.values()
    )


def try_gradients(
    config: gpu_config.Config, tensors: tuple[jax.Array, ...], index: jax.Array, record: dict[str, Any]
) -> None:
    """Runs the gradient kernels by themselves: which of them work when another does not."""
    q, k, v, do = tensors
    queries = q.shape[1]
    zero, length = jnp.int32(0), jnp.array([queries], jnp.int32)
    k, v = (mosaic_gpu.whole_blocks(x, None) for x in (k, v))
    chosen = visible_choice(index, length, zero, queries, BLOCK)
    rows = mosaic_gpu_backward.row_terms(jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape[:-1]))
    tiles = tile_lists(chosen, length, zero, queries, BLOCK, config.dq.tokens)
    blocks = block_lists(chosen, zero, queries, BLOCK, config.dkdv.part)
    forward = functools.partial(mosaic_gpu.forward, config.forward, None)
    dq = functools.partial(mosaic_gpu_backward.query_gradient, config.dq, None)
    dkdv = functools.partial(mosaic_gpu_backward.key_gradients, config.dkdv, None)
    attempt(record, "forward alone", lambda: median_ms(jax.jit(forward), [(q, k, v, tiles)], 1))
    attempt(record, "dq alone", lambda: median_ms(jax.jit(dq), [(q, k, v, do, *rows, tiles)], 1))
    attempt(record, "dkdv alone", lambda: median_ms(jax.jit(dkdv), [(q, k, v, do, *rows, blocks)], 1))


def report(record: dict[str, Any], name: str, value: Any) -> None:
    """Keeps a value, shows it and tells the watchdog that the program moves."""
    global _moved
    _moved = time.monotonic()
    record[name] = value
    shown = f"{value['median_ms']:.3f} ms" if isinstance(value, dict) and "median_ms" in value else value
    print(f"  {time.monotonic() - _began:6.1f}s {name}: {shown}", flush=True)


def attempt(record: dict[str, Any], name: str, step: Callable[[], Any]) -> None:
    """Runs a step and reports its value, or why there is none."""
    try:
        report(record, name, step())
    except Exception as reason:
        traceback.print_exc(limit=3)
        report(record, name, {"failed": f"{type(reason).__name__}: {str(reason)[:500]}"})


def watch(limit: float) -> None:
    """Ends the program when nothing was reported for `limit` seconds: a kernel may hang."""

    def look() -> None:
        while time.monotonic() - _moved < limit:
            time.sleep(1)
        print(f"nothing for {limit} s: a step hangs", flush=True)
        os._exit(3)

    threading.Thread(target=look, daemon=True).start()


_began = _moved = time.monotonic()


def main() -> None:
    """Checks, times and writes the JSON after every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--rho", type=float, nargs="+", default=RHOS)
    parser.add_argument("--inputs", type=int, default=2, help="inputs that the samples rotate among")
    parser.add_argument("--skip-checks", action="store_true", help="leave out the checks on a short input")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no length is begun")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    watch(45)
    result: dict[str, Any] = {
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"N": HEADS, "G": GROUP, "D": SIZE, "s": BLOCK, "n": PLACES, "B": 1, "dtype": "bfloat16"},
        "lengths": {},
    }

    def save() -> None:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)

    small: dict[str, Any] = {}
    result["checks"] = small
    if not args.skip_checks and not small_checks(small):
        save()
        sys.exit("a check failed")
    save()

    for queries in args.lengths:
        if time.monotonic() - _began > args.budget:
            break
        print(f"T = {queries}", flush=True)
        at: dict[str, Any] = {}
        result["lengths"][queries] = at
        config = gpu_config.heuristic(queries, HEADS, SIZE, GROUP)
        at["config"] = dataclasses.asdict(config)
        inputs = [draw_tensors(queries, seed) for seed in range(args.inputs)]
        attempt(at, "dense_forward", lambda: median_ms(jax.jit(dense), [x[:3] for x in inputs], 3))  # noqa: B023
        fn = jax.jit(with_gradients(dense))
        attempt(at, "dense_forward_backward", lambda: median_ms(fn, inputs, 3))  # noqa: B023
        for rho in args.rho:
            print(f" rho = {rho}", flush=True)
            record: dict[str, Any] = {}
            at[f"rho {rho}"] = record
            choices = [draw_choice(queries, rho, seed) for seed in range(args.inputs)]
            if rho == args.rho[0]:
                attempt(record, "errors", lambda: check(functools.partial(whole, config), inputs[0], choices[0]))  # noqa: B023
            try:
                time_pieces(config, inputs, choices, record)
            except Exception as reason:
                traceback.print_exc(limit=4)
                record["failed"] = f"{type(reason).__name__}: {str(reason)[:500]}"
            save()
            del choices
        del inputs
    print(np.float32(time.monotonic() - _began), "s in all")


if __name__ == "__main__":
    main()
