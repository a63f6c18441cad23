"""Times the Hopper kernels of compressed, window and prefix attention, after checking them.

    python -m benchmarks.flash_gpu --json=OUT.json
    python -m benchmarks.flash_gpu --steps checks compressed --tune --lengths 65536 --json=OUT.json

Shapes are VideoNSA-7B's: 28 query heads over 4 KV heads of 128, blocks of 64, a window of 256, bfloat16, batch 1. Every
error is a relative norm against float32 attention, at long lengths of sampled queries and keys. Times are medians over
samples that rotate among several inputs; each stands beside its floor, by the matrix units (798 TFLOP/s) or by device
memory (3.0 TB/s). A step that fails is reported and the next one runs; one that stands still ends the program.
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

from benchmarks.selected_gpu import attempt, median_ms, poison, relative_error, watch
from pallas_kernels import gpu_flash, gpu_flash_backward, gpu_flash_config, gpu_flash_plan
from pallas_kernels.compressed_attention import mosaic_gpu as compressed_gpu
from pallas_kernels.compressed_attention import reference as compressed_reference
from pallas_kernels.gpu_flash_config import Config, KeyConfig, QueryConfig
from pallas_kernels.prefix_attention import mosaic_gpu as prefix_gpu
from pallas_kernels.prefix_attention import reference as prefix_reference
from pallas_kernels.window_attention import mosaic_gpu as window_gpu
from pallas_kernels.window_attention import reference as window_reference
from videonsa_jax.training.environment import command_line

HEADS, GROUP, SIZE, BLOCK, WINDOW = 4, 7, 128, 64, 256
MATRIX_RATE, MEMORY_RATE = 798e12, 3.0e12
SAMPLE = 64
RAGGED = ("compressed", "window", "prefix", "decode")
_began = time.monotonic()


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of interval attention.

    Attributes:
      name: of the operation.
      queries: T.
      keys: S.
      end: the end of query t's keys.
      window: keys that a query sees at most.
    """

    name: str
    queries: int
    keys: int
    end: Callable[[jax.Array], jax.Array]
    window: int | None = None

    @property
    def visible(self) -> gpu_flash.Visible:
        """The ends of all queries."""
        return gpu_flash.Visible(self.end(jnp.arange(self.queries))[None].astype(jnp.int32))

    def pairs(self) -> int:
        """Visible pairs of query and key: more than 32 bits hold."""
        end = np.asarray(self.visible.end, np.int64)
        return int((end if self.window is None else np.minimum(end, self.window)).sum())

    def floors(self) -> dict[str, float]:
        """Milliseconds at the matrix units' rate (2, 3 and 4 products) or the memory's, whichever is longer."""
        product = 2 * self.pairs() * HEADS * GROUP * SIZE / MATRIX_RATE
        rows, columns = (2 * HEADS * SIZE * x / MEMORY_RATE for x in (GROUP * self.queries, self.keys))
        bounds = {
            "forward": (2 * product, 2 * rows + 2 * columns),
            "dq": (3 * product, 3 * rows + 2 * columns),
            "dkdv": (4 * product, 2 * rows + 4 * columns),
        }
        return {name: 1e3 * max(times) for name, times in bounds.items()}

    def draw(self, seed: int) -> tuple[jax.Array, ...]:
        """Normal q, k, v and the output's cotangent."""
        rows, columns = (1, self.queries, HEADS, GROUP, SIZE), (1, self.keys, HEADS, SIZE)
        keys = jax.random.split(jax.random.key(seed), 4)
        shapes = (rows, columns, columns, rows)
        return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    def config(self) -> Config:
        """The heuristic's choice."""
        return gpu_flash_config.heuristic(self.queries, self.keys, HEADS, GROUP, SIZE, self.window)

    def rule(self, config: Config | None = None) -> gpu_flash.Rule:
        """The static part of the call."""
        return gpu_flash.Rule(self.name, self.window, config or self.config())


def compressed(queries: int) -> Case:
    """Queries over the block means of as many keys."""
    return Case("compressed", queries, queries // BLOCK, lambda t: jnp.minimum((t + 1) // BLOCK, queries // BLOCK))


def window(queries: int) -> Case:
    """The causal window."""
    return Case("window", queries, queries, lambda t: t + 1, WINDOW)


def text(queries: int, keys: int) -> Case:
    """A few last queries over all keys."""
    return Case("text", queries, keys, lambda t: keys - queries + t + 1)


def dense(queries: int) -> Case:
    """Dense causal attention."""
    return Case("dense", queries, queries, lambda t: t + 1)


def run(case: Case, config: Config, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> tuple[jax.Array, ...]:
    """Output, log-sum-exp by query and the gradients."""
    rule, visible = case.rule(config), case.visible
    o, lse = gpu_flash.attend(rule, q, k, v, visible)
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    tiles = gpu_flash_plan.Tiles(*q.shape[:4], config.tokens)
    return o, tiles.unpack(lse), *gpu_flash.gradients(rule, q, k, v, visible, do, lse, delta)


@functools.partial(jax.jit, static_argnums=0)
def sampled_rows(case: Case, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, start: jax.Array) -> Any:
    """Output, log-sum-exp and dq of the queries of q, which are those from `start` on, in float32 (TF32 off)."""
    q, k, v, do = (x.astype(jnp.float32) for x in (q, k, v, do))
    end = case.end(start + jnp.arange(q.shape[1]))
    key = jnp.arange(k.shape[1])
    seen = key < end[:, None]
    if case.window is not None:
        seen &= key >= end[:, None] - case.window
    with jax.default_matmul_precision("highest"):

        def attend(q: jax.Array) -> Any:
            s = jnp.einsum("btngd,bsnd->btngs", q, k) * SIZE**-0.5
            s = jnp.where(seen[None, :, None, None], s, -1e30)
            lse = jax.nn.logsumexp(s, axis=-1)
            p = jnp.where(seen[None, :, None, None], jnp.exp(s - lse[..., None]), 0.0)
            return jnp.einsum("btngs,bsnd->btngd", p, v), lse

        (o, lse), back = jax.vjp(attend, q)
        return o, jnp.where(end[None, :, None, None] > 0, lse, -1e30), back((do, jnp.zeros_like(lse)))[0]


@functools.partial(jax.jit, static_argnums=0)
def sampled_keys(
    case: Case,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    start: jax.Array,
) -> Any:
    """dk and dv of the keys of k and v, which are those from `start` on, in float32."""
    chunk = min(4096, q.shape[1])
    chunks = -(-q.shape[1] // chunk)

    def add(i: jax.Array, total: Any) -> Any:
        t = i * chunk + jnp.arange(chunk)
        there = t < q.shape[1]
        place = jnp.minimum(t, q.shape[1] - 1)
        q_part, do_part = (x[0, place].astype(jnp.float32) for x in (q, do))
        end = jnp.where(there, case.end(t), 0)
        key = start + jnp.arange(k.shape[1])
        seen = key < end[:, None]
        if case.window is not None:
            seen &= key >= end[:, None] - case.window
        s = jnp.einsum("tngd,snd->tngs", q_part, k[0].astype(jnp.float32)) * SIZE**-0.5
        p = jnp.where(seen[:, None, None], jnp.exp(s - lse[0, place][..., None]), 0.0)
        dp = jnp.einsum("tngd,snd->tngs", do_part, v[0].astype(jnp.float32))
        ds = p * (dp - delta[0, place][..., None]) * SIZE**-0.5
        dk, dv = total
        return dk + jnp.einsum("tngs,tngd->snd", ds, q_part), dv + jnp.einsum("tngs,tngd->snd", p, do_part)

    zero = jnp.zeros(k.shape[1:], jnp.float32)
    with jax.default_matmul_precision("highest"):
        return jax.lax.fori_loop(0, chunks, add, (zero, zero))


def check(case: Case, config: Config) -> dict[str, Any]:
    """Errors of output, log-sum-exp and gradients on samples; whether a second run gives the same bits."""
    q, k, v, do = case.draw(3)
    fn = jax.jit(functools.partial(run, case, config))
    poison(q, q, k, v, do)
    o, lse, dq, dk, dv = first = fn(q, k, v, do)
    same = all(bool((a == b).all()) for a, b in zip(first, fn(q, k, v, do), strict=True))
    seen: dict[str, list[float]] = {name: [] for name in ("o", "lse", "dq", "dk", "dv")}
    rows = min(SAMPLE, case.queries)
    # Of a query with one key, dq is 0: no error is relative to that.
    for start in sorted({case.queries // 8 // 8 * 8, case.queries // 2 // 8 * 8, case.queries - rows}):
        place = slice(start, start + rows)
        expected = sampled_rows(case, q[:, place], k, v, do[:, place], jnp.int32(start))
        for name, actual, value in zip(seen, (o, lse, dq), expected, strict=False):
            actual, value = actual[:, place], value.astype(jnp.float32)
            if name == "lse":
                empty = value == -1e30
                if not bool(((actual == -1e30) == empty).all()):
                    seen[name].append(float("nan"))
                actual, value = (jnp.where(empty, 1.0, x) for x in (actual, value))
            seen[name].append(relative_error(actual, value))
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
    columns = min(SAMPLE, case.keys)
    for start in sorted({0, case.keys // 2 // 8 * 8, max(0, case.keys - 2 * columns)}):
        place = slice(start, start + columns)
        expected = sampled_keys(case, q, k[:, place], v[:, place], do, lse, delta, jnp.int32(start))
        for name, actual, value in zip(("dk", "dv"), (dk, dv), expected, strict=True):
            seen[name].append(relative_error(actual[0, place], value))
    finite = all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in first)
    return {name: max(values) for name, values in seen.items()} | {"finite": finite, "same_bits": same}


def check_ragged(shapes: tuple[str, ...] = ("bfloat16", "float16"), names: tuple[str, ...] = RAGGED) -> dict[str, Any]:
    """The operations on two rows, NaN past the lengths, later queries; float16 with 64 channels."""
    record: dict[str, Any] = {}
    sizes = {"bfloat16": (2, 7, 128, jnp.bfloat16), "float16": (2, 4, 64, jnp.float16)}
    for heads, group, size, dtype in (sizes[x] for x in shapes):
        batch, queries, keys, offset = 2, 504, 704, 192
        lengths = jnp.array([690, 555], jnp.int32)
        for name, columns, column_lengths in (("compressed", keys // 8, lengths // 8), ("window", keys, lengths)):
            if name not in names:
                continue

            def normal(seed: int, shape: tuple[int, ...], end: jax.Array, dtype: Any = dtype) -> jax.Array:
                x = jax.random.normal(jax.random.key(seed), shape, dtype)
                past = jnp.arange(shape[1]) >= end[:, None]
                return jnp.where(past.reshape(*past.shape, *(1,) * (len(shape) - 2)), jnp.nan, x)

            rows = (batch, queries, heads, group, size)
            q, do = (normal(seed, rows, lengths - offset) for seed in (0, 1))
            k, v = (normal(seed, (batch, columns, heads, size), column_lengths) for seed in (2, 3))
            gpu, reference = {
                "compressed": (compressed_gpu.compressed_attention, compressed_reference.compressed_attention),
                "window": (window_gpu.window_attention, window_reference.window_attention),
            }[name]
            options = {"q_offset": jnp.int32(offset), "lengths": lengths}
            options |= {"block_size": 8} if name == "compressed" else {"window_size": 100}
            record[f"{name} D={size}"] = _errors(gpu, reference, options, q, k, v, do)
        k, v = (jax.random.normal(jax.random.key(s), (batch, keys, heads, size), dtype) for s in (6, 7))
        q, do = (jax.random.normal(jax.random.key(s), (batch, 1, 40, heads, group, size), dtype) for s in (4, 5))
        count = jnp.stack([650 + jnp.arange(40), jnp.arange(40) * 7]).reshape(batch, 1, 40)
        options = {"visible": count, "k_lengths": lengths}
        prefix = (prefix_gpu.prefix_attention, prefix_reference.prefix_attention)
        if "prefix" in names:
            record[f"prefix D={size}"] = _errors(*prefix, options, q, k, v, do)
        options = {"visible": jnp.array([[[700]], [[3]]]), "k_lengths": lengths}
        if "decode" in names:
            record[f"decode D={size}"] = _errors(*prefix, options, q[:, :, :1], k, v, do[:, :, :1])
    return record


def _errors(gpu: Any, reference: Any, options: dict[str, Any], *tensors: jax.Array) -> dict[str, Any]:
    def both(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        with jax.default_matmul_precision("highest"):
            (o, lse), back = jax.vjp(lambda q, k, v: attend(q, k, v, **options), q, k, v)
            return o, *back((do, jnp.zeros_like(lse)))

    actual = jax.jit(functools.partial(both, gpu))(*tensors)
    finite = [jnp.nan_to_num(x.astype(jnp.float32)) for x in tensors]
    expected = jax.jit(functools.partial(both, reference))(*finite)
    names = ("o", "dq", "dk", "dv")
    return {name: round(relative_error(a, b), 6) for name, a, b in zip(names, actual, expected, strict=True)}


def pieces(case: Case, config: Config, inputs: list[tuple[jax.Array, ...]]) -> dict[str, tuple[Any, list[Any]]]:
    """The kernels as functions, with their arguments: forward, dq, dkdv, and all with what XLA does around them."""
    rule, visible = case.rule(config), case.visible
    tiles = gpu_flash_plan.Tiles(*inputs[0][0].shape[:4], config.tokens)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        return gpu_flash.attend(rule, q, k, v, visible)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        return run(case, config, q, k, v, do)

    ends = tiles.row_ends(visible.end)
    query_items = jax.jit(lambda: gpu_flash_plan.query_items(config.dq, tiles, ends, case.window))()
    key_items = jax.jit(lambda: gpu_flash_plan.key_items(config.dkdv, tiles, ends, case.window, case.keys))()
    shared = (config.programs, None, tiles, case.window)

    def dq(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, terms: jax.Array) -> Any:
        return gpu_flash_backward.query_gradient(config.dq, *shared, q, (k,), (v,), do, terms, ends, query_items)

    def dkdv(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, terms: jax.Array) -> Any:
        return gpu_flash_backward.key_gradients(config.dkdv, *shared, (q,), (k,), (v,), (do,), terms, ends, key_items)

    # Of constants: times do not depend on what the rows subtract.
    flat = [(*x, jnp.zeros((tiles.rows, tiles.count, 2, 64), jnp.float32)) for x in inputs]
    return {
        "forward": (jax.jit(forward), inputs),
        "dq": (jax.jit(dq), flat),
        "dkdv": (jax.jit(dkdv), flat),
        "forward and backward": (jax.jit(both), inputs),
    }


def time_case(case: Case, record: dict[str, Any], count: int, only: tuple[str, ...] | None = None) -> None:
    """Times a case's kernels beside their floors."""
    inputs = [case.draw(seed) for seed in range(count)]
    floors = case.floors()
    for name, (fn, arguments) in pieces(case, case.config(), inputs).items():
        if only is None or name in only:
            label = (
                f"{case.name} {case.queries}x{case.keys} {name} (floor {floors.get(name, sum(floors.values())):.2f})"
            )
            attempt(record, label, lambda: median_ms(fn, arguments, 5))  # noqa: B023
    del inputs


def configs(case: Case) -> dict[str, list[Config]]:
    """What is tried beside the heuristic's choice, by kernel."""
    base = case.config()
    parts = base.forward.parts
    tried: dict[str, list[Config]] = {"forward": [], "dq": [], "dkdv": []}
    for keys, stages, buffers in ((64, 4, 1), (64, 4, 2), (128, 2, 1), (128, 2, 2)):
        query = QueryConfig(keys, stages, base.forward.consumers, parts, buffers)
        tried["forward"].append(dataclasses.replace(base, forward=query))
    for keys, stages in ((64, 2), (64, 3), (64, 4), (128, 2)):
        query = QueryConfig(keys, stages, base.dq.consumers, base.dq.parts)
        tried["dq"].append(dataclasses.replace(base, dq=query))
    for stages in (2, 3):
        tried["dkdv"].append(dataclasses.replace(base, dkdv=KeyConfig(stages, base.dkdv.parts)))
    if base.dkdv.parts > 1:
        for share in (base.dkdv.parts * 2, max(2, base.dkdv.parts // 2)):
            tried["dkdv"].append(dataclasses.replace(base, dkdv=KeyConfig(3, share)))
    return tried


def tune(case: Case, record: dict[str, Any], only: tuple[str, ...] | None = None) -> None:
    """Times the kernels under several configurations."""
    inputs = [case.draw(0)]
    for name, tried in configs(case).items():
        for config in tried if only is None or name in only else ():
            part = getattr(config, name)
            label = f"{case.name} {case.queries} {name} {tuple(dataclasses.asdict(part).values())}"
            attempt(record, label, lambda: median_ms(*pieces(case, config, inputs)[name], 3))  # noqa: B023


def cudnn(case: Case, record: dict[str, Any]) -> None:
    """Times cuDNN's dense or window attention on the same shape."""
    inputs = [case.draw(seed) for seed in range(2)]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        heads = q.reshape(*q.shape[:2], HEADS * GROUP, SIZE)
        local = None if case.window is None else (case.window - 1, 0)
        options = {"is_causal": True, "implementation": "cudnn", "local_window_size": local}
        return jax.nn.dot_product_attention(heads, k, v, **options)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, back = jax.vjp(attend, q, k, v)
        return o, *back(do.reshape(o.shape))

    label = f"cuDNN {case.name} {case.queries}"
    attempt(record, f"{label} forward", lambda: median_ms(jax.jit(lambda q, k, v, do: attend(q, k, v)), inputs, 3))
    attempt(record, f"{label} forward and backward", lambda: median_ms(jax.jit(both), inputs, 3))


def main() -> None:
    """Runs the steps asked for and writes the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ("checks", "long", "compressed", "window", "text", "decode", "dense", "cudnn")
    parser.add_argument("--steps", nargs="+", default=steps, choices=steps)
    parser.add_argument("--lengths", type=int, nargs="+", default=(65536, 131072, 8192, 16384, 32768))
    parser.add_argument("--tune", action="store_true", help="several configurations instead of the heuristic's choice")
    parser.add_argument("--only", nargs="+", help="kernels: forward, dq, dkdv, 'forward and backward'")
    parser.add_argument("--inputs", type=int, default=2, help="inputs that the samples rotate among")
    parser.add_argument("--json", required=True)
    args = parser.parse_args()
    watch(40)
    result: dict[str, Any] = {
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"N": HEADS, "G": GROUP, "D": SIZE, "s": BLOCK, "w": WINDOW, "B": 1, "dtype": "bfloat16"},
    }

    def save() -> None:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)

    cases = {
        "compressed": compressed,
        "window": window,
        "text": functools.partial(text, 256),
        "decode": functools.partial(text, 1),
        "dense": dense,
    }
    for step in args.steps:
        record: dict[str, Any] = {}
        result[step] = record
        if step == "checks":
            for case in (compressed(4096 + 40), window(1000), text(256, 4096 + 8), text(1, 4096 + 8), dense(1000)):
                attempt(record, f"{case.name} {case.queries}", lambda: check(case, case.config()))  # noqa: B023
            attempt(record, "ragged", check_ragged)
        elif step == "long":
            for case in (compressed(args.lengths[0]), window(args.lengths[0]), dense(16384)):
                attempt(record, f"{case.name} {case.queries}", lambda: check(case, case.config()))  # noqa: B023
        elif step == "cudnn":
            cudnn(dense(args.lengths[0]), record)
            cudnn(window(args.lengths[0]), record)
        else:
            for length in args.lengths:
                case = cases[step](length)
                if args.tune:
                    tune(case, record, args.only)
                else:
                    time_case(case, record, args.inputs, args.only)
                save()
        save()
    print(f"{time.monotonic() - _began:.1f} s in all")


if __name__ == "__main__":
    main()
