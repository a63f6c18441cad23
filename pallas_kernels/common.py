"""What every operation's implementations share: axis types, indices, visibility, merging."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int

ArrayLike = jax.Array | np.ndarray
Scalar = int | np.integer | Int[ArrayLike, ""]

EMPTY_LSE = -1e30
"""The log-sum-exp of a query that sees no key: finite, so that differences of two of them are 0 and not NaN."""


def block_total(keys: int, block_size: int) -> int:
    """Number of blocks that cover `keys` keys, a partial last one included."""
    return -(-keys // block_size)


def query_indices(queries: int, q_offset: Scalar) -> Int[jax.Array, "T"]:
    """Absolute indices `q_offset + t` of the queries of one call."""
    return jnp.asarray(q_offset, jnp.int32) + jnp.arange(queries, dtype=jnp.int32)


def resolve_lengths(lengths: Int[ArrayLike, "B"] | None, batch: int, keys: int) -> Int[jax.Array, "B"]:
    """Valid keys per row, at most `keys`; None means all of them."""
    if lengths is None:
        return jnp.full((batch,), keys, jnp.int32)
    return jnp.minimum(jnp.asarray(lengths, jnp.int32), keys)


def zero_where(hidden: Bool[jax.Array, "..."], x: jax.Array) -> jax.Array:
    """Zeros the entries of x under `hidden`, which covers x's leading axes.

    A multiplication by 0 would keep NaN, and so would a mask applied to the product alone: its gradient is 0 x NaN.
    """
    return jnp.where(hidden.reshape(hidden.shape + (1,) * (x.ndim - hidden.ndim)), jnp.zeros((), x.dtype), x)


def merge_by_lse(
    first: tuple[Float[ArrayLike, "*rows D"], Float[ArrayLike, "*rows"]],
    second: tuple[Float[ArrayLike, "*rows D"], Float[ArrayLike, "*rows"]],
) -> tuple[Float[jax.Array, "*rows D"], Float32[jax.Array, "*rows"]]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    Rows where both sets are empty give output 0, LSE -1e30 and zero gradients.

    Args:
      first: output and natural log-sum-exp (float32) over the first set.
      second: the same over the second set.

    Returns:
      Output in the first output's dtype, and the float32 log-sum-exp of the union.
    """
    (o_first, lse_first), (o_second, lse_second) = first, second
    lse_first = jnp.asarray(lse_first, jnp.float32)
    lse_second = jnp.asarray(lse_second, jnp.float32)
    empty = (lse_first <= EMPTY_LSE) & (lse_second <= EMPTY_LSE)
    # Against a top of 0 an empty part weighs exp(-1e30) = 0; against its own LSE it would weigh 1.
    top = jax.lax.stop_gradient(jnp.where(empty, 0.0, jnp.maximum(lse_first, lse_second)))
    weight_first, weight_second = jnp.exp(lse_first - top), jnp.exp(lse_second - top)
    total = jnp.where(empty, 1.0, weight_first + weight_second)
    o = (weight_first / total)[..., None] * o_first + (weight_second / total)[..., None] * o_second
    return o.astype(o_first.dtype), jnp.where(empty, EMPTY_LSE, top + jnp.log(total))


def merge_parts(
    o: Float32[jax.Array, "P *rows D"], lse: Float32[jax.Array, "P *rows"]
) -> tuple[Float32[jax.Array, "*rows D"], Float32[jax.Array, "*rows"]]:
    """Attention over all keys from that over each of P parts of them; `merge_by_lse` for kernels' float32 results.

    Args:
      o: output over each part.
      lse: its natural log-sum-exp, -1e30 where a row sees no key of the part.

    Returns:
      Output and log-sum-exp over the union; 0 and -1e30 where a row sees no key at all.
    """
    top = lse.max(axis=0)
    weights = jnp.where(lse == EMPTY_LSE, 0.0, jnp.exp(lse - top))
    total = weights.sum(axis=0)
    empty = total == 0.0
    weights = weights / jnp.where(empty, 1.0, total)
    merged = jnp.sum(weights[..., None] * o, axis=0)
    return merged, jnp.where(empty, EMPTY_LSE, top + jnp.log(jnp.where(empty, 1.0, total)))
