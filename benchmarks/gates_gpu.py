"""Times forms of the whole NSA's passes over arrays as large as its output, beside their floors.

    python -m benchmarks.gates_gpu --json=OUT.json

Gated sum, its gradient's row products, sum of three query gradients, block means and the gradient back through them,
at VideoNSA-7B's shapes. A floor is the bytes read and written once at 3 TB/s. Each form is compared with float32 XLA
before it is timed.
"""

import argparse
import json
import re
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.selected_gpu import BLOCK, GROUP, HEADS, SIZE
from experiments.timing import median_ms, poison, relative_error
from pallas_kernels.nsa import block_means
from videonsa_jax.training.environment import command_line

TEMPERATURE = 0.3
BYTES_PER_MS = 3e9


def sum_in_one_fusion(logits: jax.Array, *outputs: jax.Array) -> jax.Array:
    """Gates recomputed wherever they are used."""
    gates = jax.nn.sigmoid(logits / TEMPERATURE)
    return sum(gates[..., i, None] * o.astype(jnp.float32) for i, o in enumerate(outputs)).astype(outputs[0].dtype)


def sum_of_gates_apart(logits: jax.Array, *outputs: jax.Array) -> jax.Array:
    """Gates written first."""
    gates = jax.lax.optimization_barrier(jax.nn.sigmoid(logits / TEMPERATURE))
    return sum(gates[..., i, None] * o.astype(jnp.float32) for i, o in enumerate(outputs)).astype(outputs[0].dtype)


def sum_of_gates_by_branch(logits: jax.Array, *outputs: jax.Array) -> jax.Array:
    """Gates written first, one array per branch."""
    gates = jax.lax.optimization_barrier(tuple(jax.nn.sigmoid(logits[..., i] / TEMPERATURE) for i in range(3)))
    total = sum(g[..., None] * o.astype(jnp.float32) for g, o in zip(gates, outputs, strict=True))
    return total.astype(outputs[0].dtype)


def products_by_xla(do: jax.Array, *outputs: jax.Array) -> jax.Array:
    """Row products [3, R]."""
    do = do.astype(jnp.float32)
    return jnp.stack([jnp.sum(do * o.astype(jnp.float32), axis=-1).reshape(-1) for o in outputs])


def products_apart(do: jax.Array, *outputs: jax.Array) -> tuple[jax.Array, ...]:
    """Row products as three arrays."""
    do = do.astype(jnp.float32)
    return tuple(jnp.sum(do * o.astype(jnp.float32), axis=-1) for o in outputs)


def terms(products: jax.Array, logits: jax.Array, *lses: jax.Array) -> tuple[jax.Array, ...]:
    """What follows the row products: gradient of the logits, log-sum-exps with the gates in them."""
    logits = logits / TEMPERATURE
    gates = jax.nn.sigmoid(logits)
    products = jnp.moveaxis(products.reshape(3, *lses[0].shape), 0, -1)
    shifted = tuple(lse - jax.nn.log_sigmoid(logits[..., i]) for i, lse in enumerate(lses))
    return products * gates * (1 - gates) / TEMPERATURE, *shifted


def sum_of_three(*gradients: jax.Array) -> jax.Array:
    """Sum in float32."""
    return sum(x.astype(jnp.float32) for x in gradients).astype(gradients[0].dtype)


def means(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As the library has them."""
    return block_means(k, BLOCK), block_means(v, BLOCK)


def means_by_product(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """As products with a row of ones."""
    ones = jnp.full((BLOCK,), 1 / BLOCK, k.dtype)

    def mean(x: jax.Array) -> jax.Array:
        blocks = x.reshape(x.shape[1] // BLOCK, BLOCK, HEADS * SIZE)
        return jnp.einsum("s,msx->mx", ones, blocks, preferred_element_type=jnp.float32).astype(x.dtype)

    return mean(k), mean(v)


def means_in_two_steps(k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of 8 rows, then of 8 sums: more rows in flight."""

    def mean(x: jax.Array) -> jax.Array:
        parts = x.reshape(x.shape[1] // BLOCK, 8, BLOCK // 8, HEADS * SIZE).astype(jnp.float32)
        return (parts.sum(2).sum(1) / BLOCK).astype(x.dtype)

    return mean(k), mean(v)


def key_gradient(selected: jax.Array, window: jax.Array, blocks: jax.Array) -> jax.Array:
    """The three parts of dk (or dv), the compressed one spread over its block."""
    spread = jnp.repeat(blocks.astype(jnp.float32) / BLOCK, BLOCK, axis=1)
    return (selected.astype(jnp.float32) + window.astype(jnp.float32) + spread).astype(selected.dtype)


def flat(tree: Any) -> jax.Array:
    """All values of a result."""
    return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(tree)])


def instructions(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[str]:
    """Names of what the compiled program runs, in order."""
    text = jax.jit(fn).lower(*args).compile().as_text()
    entry = text[text.index("ENTRY") :]
    return re.findall(r"%(\S+) = .*? (?:fusion|custom-call|reduce|copy|transpose|concatenate)\(", entry)


def measure(queries: int, record: dict[str, Any]) -> None:
    """Checks and times every form at one length."""
    rows, columns = (1, queries, HEADS, GROUP, SIZE), (1, queries, HEADS, SIZE)
    sets = 2

    def draw(shape: tuple[int, ...], count: int, dtype: Any = jnp.bfloat16) -> list[tuple[jax.Array, ...]]:
        keys = jax.random.split(jax.random.key(len(shape) + shape[-1]), sets * count)
        arrays = [jax.random.normal(key, shape, dtype) for key in keys]
        return [tuple(arrays[i::sets]) for i in range(sets)]

    big, logits = draw(rows, 4), draw((*rows[:-1], 3), 1, jnp.float32)
    small = draw(columns, 2)
    blocks = draw((1, queries // BLOCK, *columns[2:]), 1)
    lses = draw(rows[:-1], 3, jnp.float32)
    products = draw((3, queries * HEADS * GROUP), 1, jnp.float32)
    size, key_size = big[0][0].nbytes, small[0][0].nbytes
    branches = [(*g, *x[:3]) for g, x in zip(logits, big, strict=True)]
    forms: dict[str, tuple[list[Callable[..., Any]], list[tuple[Any, ...]], float]] = {
        "gated_sum": (
            [sum_in_one_fusion, sum_of_gates_apart, sum_of_gates_by_branch],
            branches,
            4 * size + logits[0][0].nbytes,
        ),
        "row_products": ([products_by_xla, products_apart], big, 4 * size),
        "terms": (
            [terms],
            [(*p, *g, *e) for p, g, e in zip(products, logits, lses, strict=True)],
            12 * lses[0][0].nbytes + 0.0,
        ),
        "sum_of_three": ([sum_of_three], [x[:3] for x in big], 4 * size),
        "block_means": ([means, means_by_product, means_in_two_steps], small, 2 * key_size),
        "key_gradient": ([key_gradient], [(*x, *b) for x, b in zip(small, blocks, strict=True)], 3 * key_size),
    }
    for name, (functions, inputs, moved) in forms.items():
        floor = moved / BYTES_PER_MS
        expected = flat(jax.jit(functions[0])(*inputs[0]))
        for fn in functions:
            seen: dict[str, Any] = {"floor_ms": floor}
            record[f"{name}: {fn.__name__}"] = seen
            try:
                if queries <= 65536:
                    seen["runs"] = instructions(fn, inputs[0])
                poison(expected)
                seen["difference"] = relative_error(flat(jax.jit(fn)(*inputs[0])), expected)
                seen |= median_ms(jax.jit(fn), inputs)
            except Exception as reason:
                traceback.print_exc(limit=3)
                seen["failed"] = f"{type(reason).__name__}: {str(reason)[:300]}"
            shown = f"{seen['median_ms']:.3f}" if "median_ms" in seen else "failed"
            print(
                f"{queries:7} {fn.__name__:24} {shown:>7} ms, floor {floor:.3f}, {seen.get('difference')}", flush=True
            )


def main() -> None:
    """Times every length; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=(65536, 131072, 8192))
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "command": command_line(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "shape": {"N": HEADS, "G": GROUP, "D": SIZE, "s": BLOCK, "B": 1, "dtype": "bfloat16"},
        "lengths": {},
    }
    begin = time.monotonic()
    for queries in options.lengths:
        measure(queries, result["lengths"].setdefault(queries, {}))
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
    print(f"{time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
