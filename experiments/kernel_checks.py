"""How kernels' results are checked on a device: sampled queries against the float32 reference."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from experiments.kernel_operations import Arrays, Operation
from experiments.timing import relative_distance
from pallas_kernels.common import Scalar, query_indices
from pallas_kernels.specs import Spec

ROWS = 32
"""Queries of one sample that is compared with the reference."""

FORWARD_BOUND, GRADIENT_BOUND, CHOICE_BOUND = 1.5e-2, 2e-2, 1e-4
"""Relative norm errors of outputs and gradients in bfloat16; excess of an importance left out over one taken."""

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


def check_choice(
    chosen: Int[jax.Array, "B T N n"],
    arrays: Arrays,
    starts: Sequence[int],
    *,
    block_size: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    q_offset: Scalar = 0,
    lengths: Int[jax.Array, "B"] | None = None,
) -> dict[str, float | bool]:
    """How far chosen blocks are from the rule (docs/attention.md, "The three branches"), by importances in float32.

    Indices are not compared: importances that nearly tie may fall either way.

    Args:
      chosen: the result of `block_selection`.
      arrays: q `[B, T, N, G, D]`, k_blocks `[B, M, N, D]` and lse `[B, T, N, G]`, NaN nowhere.
      starts: first queries of the samples, each of `ROWS` (all, where there are fewer).
      block_size: as in `block_selection`; so are the arguments below.
      init_blocks: see there.
      local_blocks: see there.
      q_offset: see there.
      lengths: see there.

    Returns:
      "excess": by what fraction the most important candidate left out exceeds the least important block that was taken
      and not forced, the worst of all samples (-1 where none had such a pair); under other names how many queries of
      the worst sample break the rule, by what they break; "fine": none does, and excess is at most `CHOICE_BOUND`.
    """
    places = jnp.asarray(starts, jnp.int32), jnp.int32(q_offset), lengths
    found = choice_errors(chosen, arrays, *places, block_size, init_blocks, local_blocks)
    broken = {name: float(value) for name, value in found.items()}
    excess = broken.pop("excess")
    return {"fine": excess <= CHOICE_BOUND and not any(broken.values()), "excess": excess} | broken


@functools.partial(jax.jit, static_argnames=("block_size", "init_blocks", "local_blocks"))
def choice_errors(
    chosen: Int[jax.Array, "B T N n"],
    arrays: Arrays,
    starts: Int[jax.Array, "A"],
    q_offset: Int[jax.Array, ""],
    lengths: Int[jax.Array, "B"] | None,
    block_size: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
) -> dict[str, jax.Array]:
    """Excess and counts of `check_choice` as scalars on the device: of each the largest of the samples'."""
    q, k_blocks, lse = arrays
    count = min(ROWS, q.shape[1])
    # One more than there are means: the current block may not be complete.
    blocks = jnp.arange(k_blocks.shape[1] + 1)

    def sample(start: jax.Array) -> dict[str, jax.Array]:
        rows = functools.partial(_rows, axis=1, start=start, count=count)
        t = query_indices(count, q_offset + start)
        valid = jnp.ones((len(q), count), bool) if lengths is None else t < lengths[:, None]
        current = (t // block_size)[:, None, None]
        candidate = (blocks <= current) & valid[..., None, None]
        forced = candidate & ((blocks < init_blocks) | (blocks > current - max(local_blocks, 1)))
        importance = jnp.pad(importances(rows(q), k_blocks, rows(lse)), [(0, 0)] * 3 + [(0, 1)])
        indices = rows(chosen)
        there, taken = indices >= 0, (indices[..., None] == blocks).any(axis=-2)
        wanted = jnp.minimum(candidate.sum(-1), indices.shape[-1])
        ascending = (indices[..., 1:] > indices[..., :-1]) | ~there[..., 1:]
        free, left = taken & ~forced, candidate & ~taken
        least = jnp.where(free, importance, jnp.inf).min(-1)
        most = jnp.where(left, importance, -jnp.inf).max(-1)
        ratio = jnp.where(most == least, 1.0, most / least)
        return {
            "count": ((there.sum(-1) != wanted) | (taken.sum(-1) != wanted)).sum(),
            "not ascending": (~ascending.all(-1)).sum(),
            "forced left out": (forced & ~taken).any(-1).sum(),
            "no candidate taken": (taken & ~candidate).any(-1).sum(),
            "excess": jnp.max(jnp.where(free.any(-1) & left.any(-1), ratio - 1, -1.0)),
        }

    return jax.tree.map(jnp.max, jax.lax.map(sample, starts))


def importances(
    q: Float[jax.Array, "B T N G D"], k_blocks: Float[jax.Array, "B M N D"], lse: Float32[jax.Array, "B T N G"]
) -> Float32[jax.Array, "B T N M"]:
    """Importances (docs/attention.md, "The three branches") in float32 with TF32 off, of later blocks too."""
    q32, k32 = q.astype(jnp.float32), k_blocks.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        logits = jnp.einsum("btngd,bmnd->btngm", q32, k32) * q.shape[-1] ** -0.5
    return jnp.exp(logits - lse[..., None]).sum(3)


def _rows(x: jax.Array, axis: int | None, start: Any, count: int | None) -> jax.Array:
    return x if axis is None else jax.lax.dynamic_slice_in_dim(x, start, count, axis)
