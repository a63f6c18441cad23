"""How `experiments.bench_kernels` checks a result before it is timed: sampled queries against the float32 reference."""

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


def check_values(
    operation: Operation, spec: Spec, arrays: Arrays, o: Any, do: Any, gradients: Arrays
) -> dict[str, float]:
    """Relative errors on sampled queries against the float32 reference.

    Args:
      operation: what was computed.
      spec: its shape.
      arrays: its arrays.
      o: its result.
      do: None, or the cotangent, from `only_sampled`.
      gradients: of the differentiable arrays, given `do`.

    Returns:
      "o" and one entry per gradient, "d0" being that of the first array.
    """
    of_o = operation.query_axes[0]
    queries = 1 if of_o is None else o.shape[of_o]
    samples = min(ROWS, queries)
    count = operation.differentiable if do is not None else 0

    @jax.jit
    def reference(start: jax.Array, arrays: Arrays, do: jax.Array | None) -> Any:
        rows = [_rows(x, axis, start, samples) for x, axis in zip(arrays, operation.query_axes, strict=False)]
        rows = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in rows]
        with jax.default_matmul_precision("highest"):
            value, pull = jax.vjp(
                lambda *first: operation.call(spec, "reference", start, *first, *rows[count:]), *rows[:count]
            )
            if do is None:
                return value, ()
            return value, pull(jax.tree.map(lambda x: _rows(x, of_o, start, samples).astype(jnp.float32), do))

    errors: dict[str, list[float]] = {}
    sums: dict[int, jax.Array] = {}
    for start in sampled_starts(queries):
        value, gradient = reference(jnp.int32(start), arrays, do)
        for actual, expected in zip(*map(jax.tree.leaves, (o, value)), strict=True):
            errors.setdefault("o", []).append(relative_error(_rows(actual, of_o, start, samples), expected))
        for i, expected in enumerate(gradient):
            axis = operation.query_axes[i]
            if axis is None:
                sums[i] = sums.get(i, 0) + expected
            else:
                actual = _rows(gradients[i], axis, start, samples)
                errors.setdefault(f"d{i}", []).append(relative_error(actual, expected))
    for i, expected in sums.items():
        errors[f"d{i}"] = [relative_error(gradients[i], expected)]
    return {name: max(values) for name, values in errors.items()}


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


def _rows(x: jax.Array, axis: int | None, start: Any, count: int) -> jax.Array:
    return x if axis is None else jax.lax.dynamic_slice_in_dim(x, start, count, axis)
