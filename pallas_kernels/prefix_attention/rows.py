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
      q, k, v and how many keys each query sees; finite where `k_lengths` or `visible` hides something.
    """
    q, k, v, visible = (jnp.asarray(x) for x in (q, k, v, visible))
    (batch, rows, queries), keys = q.shape[:3], k.shape[-3]
    if k_lengths is None:
        count = jnp.minimum(visible, keys)
    else:
        length = jnp.asarray(k_lengths)
        length = length.reshape(length.shape + (1,) * (2 - length.ndim))
        count = jnp.minimum(visible, length[..., None])
        k, v = (_zero_past(x, length) for x in (k, v))
    q = zero_where(count <= 0, q)

    shared = k.ndim == 4
    lead = (batch, rows * queries) if shared else (batch * rows, queries)
    if not shared:
        k, v = (x.reshape(batch * rows, *x.shape[2:]) for x in (k, v))
    return q.reshape(*lead, *q.shape[3:]), k, v, count.reshape(lead)


def _zero_past(x: jax.Array, length: jax.Array) -> jax.Array:
    # Keys shared by rows of different lengths are finite up to the longest.
    length = length.max(axis=1, initial=0) if x.ndim == 4 else jnp.broadcast_to(length, x.shape[:2])
    return zero_where(jnp.arange(x.shape[-3]) >= length[..., None], x)
