"""How `experiments.bench_kernels` checks a result before it is timed: sampled queries against the float32 reference."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from experiments.kernel_operations import Arrays, Operation
from experiments.timing import relative_distance
from pallas_kernels.common import Scalar
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


@functools.partial(jax.jit, static_argnums=0)
def cotangent(result: Any, seed: Scalar) -> Any:
    """Normal values in the shape of a result, which is a tree of `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed), x.shape, x.dtype), result)


@functools.partial(jax.jit, static_argnums=0)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expected:
    """What the reference says of the sampled queries.

    Attributes:
      values: the result's rows, the samples along a first axis.
      with_queries: likewise gradients of the arrays that have queries, by their place.
      others: gradients of the arrays without a query axis, by their place.
    """

    values: Any
    with_queries: dict[int, jax.Array]
    others: dict[int, jax.Array]


def shapes_of(tree: Any) -> Any:
    """Shapes and dtypes of arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def expected_values(operation: Operation, spec: Spec, differentiable: int, arrays: Arrays, do: Any) -> Expected:
    """Results and gradients of sampled queries, in float32.

    Args:
      operation: what is to be computed.
      spec: its shape.
      differentiable: how many of the first arrays are to have a gradient.
      arrays: of the operation; where blocks are chosen, with the choice.
      do: the cotangent, from `only_sampled`; not read without gradients.
    """
    of_o = operation.query_axes[0]
    queries = 1 if of_o is None else arrays[0].shape[of_o]
    has_queries = {i: operation.query_axes[i] is not None for i in range(differentiable)}

    def sample(others: dict[int, jax.Array], start: jax.Array) -> Any:
        rows = functools.partial(_rows, start=start, count=min(ROWS, queries))
        given = [rows(x, axis) for x, axis in zip(arrays, operation.query_axes, strict=False)]
        given = [x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in given]
        with jax.default_matmul_precision("highest"):
            value, pull = jax.vjp(
                lambda *first: operation.call(spec, "reference", start, *first, *given[differentiable:]),
                *given[:differentiable],
            )
            of_rows = jax.tree.map(lambda x: rows(x, of_o).astype(jnp.float32), do) if differentiable else None
            gradients = pull(of_rows) if differentiable else ()
        with_queries = {i: x for i, x in enumerate(gradients) if has_queries[i]}
        return {i: others[i] + gradients[i] for i in others}, (value, with_queries)

    zeros = {i: jnp.zeros(arrays[i].shape, jnp.float32) for i, has in has_queries.items() if not has}
    others, (values, with_queries) = jax.lax.scan(sample, zeros, jnp.asarray(sampled_starts(queries), jnp.int32))
    return Expected(values, with_queries, others)


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
    return {name: float(error) for name, error in compared(operation, expected, o, gradients).items()}


@functools.partial(jax.jit, static_argnums=0)
def compared(operation: Operation, expected: Expected, o: Any, gradients: Arrays) -> dict[str, jax.Array]:
    """`errors_of` as scalars on the device."""

    def largest(actual: jax.Array, wanted: jax.Array, axis: int | None) -> jax.Array:
        count = None if axis is None else wanted.shape[axis + 1]
        starts = sampled_starts(1 if axis is None else actual.shape[axis])
        errors = [
            relative_distance(_rows(actual, axis, start, count), wanted[sample]) for sample, start in enumerate(starts)
        ]
        return jnp.max(jnp.stack(errors))

    of_o = operation.query_axes[0]
    pairs = zip(*map(jax.tree.leaves, (o, expected.values)), strict=True)
    seen = {"o": jnp.max(jnp.stack([largest(actual, wanted, of_o) for actual, wanted in pairs]))}
    if gradients:
        for i, wanted in expected.with_queries.items():
            seen[f"d{i}"] = largest(gradients[i], wanted, operation.query_axes[i])
        for i, wanted in expected.others.items():
            seen[f"d{i}"] = relative_distance(gradients[i], wanted)
    return seen


@functools.partial(jax.jit, static_argnums=0)
def sampled_importances(spec: Spec, arrays: Arrays) -> Float32[jax.Array, "A B R N M"]:
    """Importances (SEMANTICS, block selection) of each block to the A samples of R queries, from `q, k_blocks, lse`."""
    q, k_blocks, lse = arrays
    importances = []
    for start in sampled_starts(spec.queries):
        rows = slice(start, start + ROWS)
        q32, k32 = (x.astype(jnp.float32) for x in (q[:, rows], k_blocks))
        with jax.default_matmul_precision("highest"):
            logits = jnp.einsum("btngd,bmnd->btngm", q32, k32) * spec.head_dim**-0.5
        importances.append(jnp.exp(logits - lse[:, rows, ..., None]).sum(3))
    return jnp.stack(importances)


def check_choice(spec: Spec, arrays: Arrays, chosen: jax.Array) -> dict[str, float]:
    """How far a choice is from the rule, on sampled queries: the largest relative excess of an importance left out."""
    worst = 0.0
    importances, chosen = np.asarray(sampled_importances(spec, arrays)), np.asarray(chosen)
    for importance, start in zip(importances, sampled_starts(spec.queries), strict=True):
        taken = chosen[:, start : start + ROWS]
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
