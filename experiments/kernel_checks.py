"""How `experiments.bench_kernels` checks a result before it is timed: sampled queries against the float32 reference."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.kernel_operations import Arrays, Operation
from experiments.timing import relative_error
from pallas_kernels.specs import Spec

ROWS = 32
"""Queries of one sample that is compared with the reference."""

FORWARD_BOUND, GRADIENT_BOUND, CHOICE_BOUND = 1.5e-2, 2e-2, 1e-4
"""Relative norm errors of outputs and gradients in bfloat16; relative difference of importances that may swap."""

BIAS_BOUND = 1e-1
"""Of a bias' gradient, a sum over all tokens that nearly cancels: a softmax ignores what all keys share."""


def sampled_starts(queries: int) -> tuple[int, ...]:
    """First queries of the samples, which do not overlap: the start, where no tile begins, the end."""
    last = max(queries - ROWS, 0)
    starts: list[int] = []
    for start in (0, last, queries // 3 + 5, queries // 2 + 41):
        if start <= last and all(abs(start - other) >= ROWS for other in starts):
            starts.append(start)
    return tuple(sorted(starts))


def only_sampled(operation: Operation, do: Any) -> Any:
    """The cotangent, 0 but for the sampled queries: their gradients can be computed by themselves."""
    axis = operation.query_axes[0]
    if axis is None:
        return do
    queries = do.shape[axis]
    index = np.arange(queries)
    kept = np.zeros(queries, bool)
    for start in sampled_starts(queries):
        kept |= (index >= start) & (index < start + ROWS)
    return jnp.where(jnp.asarray(kept).reshape(-1, *(1,) * (do.ndim - axis - 1)), do, jnp.zeros((), do.dtype))


@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference says of the sampled queries.

    Attributes:
      samples: per sample its first query, the result's rows and the rows of the gradients that have queries.
      others: gradients of the arrays without a query axis, by their place.
    """

    samples: list[tuple[int, Any, dict[int, jax.Array]]]
    others: dict[int, jax.Array]


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.lru_cache(maxsize=4)
def compiled_reference(operation: Operation, spec: Spec, differentiable: int, shapes: tuple[Any, ...], do: Any) -> Any:
    """Compiles (first sampled query, arrays, do) -> the result's rows, and the first arrays' gradients of those rows.

    Args:
      operation: what the reference computes.
      spec: its shape.
      differentiable: how many arrays are to have a gradient.
      shapes: of the arrays.
      do: shape of the cotangent, or shapes; not read without gradients.
    """
    of_o = operation.query_axes[0]

    def run(start: jax.Array, arrays: Arrays, do: Any) -> Any:
        queries = 1 if of_o is None else arrays[0].shape[of_o]
        rows = functools.partial(_rows, start=start, count=min(ROWS, queries))
        given = [rows(x, axis) for x, axis in zip(arrays, operation.query_axes, strict=False)]
        given = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in given]
        with jax.default_matmul_precision("highest"):
            value, pull = jax.vjp(
                lambda *first: operation.call(spec, "reference", start, *first, *given[differentiable:]),
                *given[:differentiable],
            )
            if not differentiable:
                return value, ()
            return value, pull(jax.tree.map(lambda x: rows(x, of_o).astype(jnp.float32), do))

    return jax.jit(run).lower(jax.ShapeDtypeStruct((), jnp.int32), shapes, do).compile()


def expected_values(operation: Operation, reference: Callable[..., Any], arrays: Arrays, do: Any) -> Expected:
    """Results and gradients of sampled queries, in float32.

    Args:
      operation: what is to be computed.
      reference: from `compiled_reference`.
      arrays: its arrays; where blocks are chosen, with the choice.
      do: the cotangent, from `only_sampled`.
    """
    of_o = operation.query_axes[0]
    samples, others = [], {}
    for start in sampled_starts(1 if of_o is None else arrays[0].shape[of_o]):
        value, gradients = reference(jnp.int32(start), arrays, do)
        with_queries = {}
        for i, gradient in enumerate(gradients):
            if operation.query_axes[i] is None:
                others[i] = others.get(i, 0) + gradient
            else:
                with_queries[i] = gradient
        samples.append((start, value, with_queries))
    return Expected(samples, others)


def errors_of(operation: Operation, expected: Expected, o: Any, gradients: Arrays = ()) -> dict[str, float]:
    """Relative errors against `expected_values`.

    Args:
      operation: what was computed.
      expected: of the same arrays and cotangent.
      o: the result.
      gradients: of the differentiable arrays; none are compared if it is empty.

    Returns:
      "o" and one entry per gradient, "d0" being that of the first array: the largest of the samples'.
    """
    seen: dict[str, list[float]] = {}
    for start, value, with_queries in expected.samples:
        rows = functools.partial(_rows, start=start)
        for actual, wanted in zip(*map(jax.tree.leaves, (o, value)), strict=True):
            axis = operation.query_axes[0]
            count = None if axis is None else wanted.shape[axis]
            seen.setdefault("o", []).append(relative_error(rows(actual, axis, count=count), wanted))
        for i, wanted in with_queries.items() if gradients else ():
            axis = operation.query_axes[i]
            actual = rows(gradients[i], axis, count=wanted.shape[axis])
            seen.setdefault(f"d{i}", []).append(relative_error(actual, wanted))
    for i, wanted in expected.others.items() if gradients else ():
        seen[f"d{i}"] = [relative_error(gradients[i], wanted)]
    return {name: max(values) for name, values in seen.items()}


def check_choice(spec: Spec, arrays: Arrays, chosen: jax.Array) -> dict[str, float]:
    """How far a choice is from the rule, on sampled queries: the largest relative excess of an importance left out."""
    q, k_blocks, lse = arrays
    worst = 0.0
    for start in sampled_starts(spec.queries):
        rows = slice(start, start + ROWS)
        q32, k32 = (x.astype(jnp.float32) for x in (q[:, rows], k_blocks))
        with jax.default_matmul_precision("highest"):
            logits = jnp.einsum("btngd,bmnd->btngm", q32, k32) * spec.head_dim**-0.5
        importance = np.asarray(jnp.exp(logits - lse[:, rows, ..., None]).sum(3))
        taken = np.asarray(chosen[:, rows])
        for b, t, n in np.ndindex(taken.shape[:3]):
            current = (start + t) // spec.block_size
            mine = taken[b, t, n][taken[b, t, n] >= 0]
            if len(set(mine)) != min(spec.block_count, current + 1) or current not in mine or mine.max() > current:
                return {"choice": float("inf")}
            row = importance[b, t, n]
            left = np.setdiff1d(np.arange(min(current, len(row))), mine)
            free = mine[mine < current]
            if len(left) and len(free):
                worst = max(worst, float((row[left].max() - row[free].min()) / row[left].max()))
    return {"choice": worst}


def _rows(x: jax.Array, axis: int | None, start: Any, count: int | None) -> jax.Array:
    return x if axis is None else jax.lax.dynamic_slice_in_dim(x, start, count, axis)
