"""Prefix attention as attention of plain rows: what of its arguments the kernels need not know."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.common import ArrayLike, zero_where


def as_rows(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
) -> tuple[
    Float[jax.Array, "rows T N G D"],
    Float[jax.Array, "rows S N D"],
    Float[jax.Array, "rows S N D"],
    Int[jax.Array, "rows T"],
]:
    """Rows that share their keys become one long row of queries; others become rows of the batch.

    Args:
      q: queries.
      k: keys.
      v: values.
      visible: how many leading keys each query sees.
      k_lengths: valid keys.

    Returns:
      q, k, v and how many keys each query sees; q is finite, keys past the largest count may be NaN.
    """
    q, k, v, visible = (jnp.asarray(x) for x in (q, k, v, visible))
    (batch, rows, queries), keys = q.shape[:3], k.shape[-3]
    count = jnp.minimum(visible, keys)
    if k_lengths is not None:
        length = jnp.asarray(k_lengths)
        count = jnp.minimum(count, length.reshape(length.shape + (1,) * (3 - length.ndim)))
    count = jnp.maximum(count, 0)
    q = zero_where(count == 0, q)

    shared = k.ndim == 4
    lead = (batch, rows * queries) if shared else (batch * rows, queries)
    if not shared:
        k, v = (x.reshape(batch * rows, *x.shape[2:]) for x in (k, v))
    return q.reshape(*lead, *q.shape[3:]), k, v, count.reshape(lead)


def zero_unseen(x: Float[jax.Array, "rows S N D"], count: Int[jax.Array, "rows T"]) -> Float[jax.Array, "rows S N D"]:
    """Zeros the keys or values that no query of their row sees."""
    return zero_where(jnp.arange(x.shape[1]) >= count.max(axis=1, initial=0)[:, None], x)
