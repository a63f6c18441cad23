"""Prefix attention in plain XLA, chunked over queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.chunked import dense_attention
from pallas_kernels.common import ArrayLike, zero_where


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix; arguments and results as in `api.prefix_attention`."""
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

    # Rows that share their keys are one long row of queries; others are rows of the batch.
    shared = k.ndim == 4
    lead = (batch, rows * queries) if shared else (batch * rows, queries)
    if not shared:
        k, v = (x.reshape(batch * rows, *x.shape[2:]) for x in (k, v))
    o, lse = dense_attention(q.reshape(*lead, *q.shape[3:]), k, v, count.reshape(lead))
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])


def _zero_past(x: jax.Array, length: jax.Array) -> jax.Array:
    # Keys shared by rows of different lengths are finite up to the longest.
    length = length.max(axis=1, initial=0) if x.ndim == 4 else jnp.broadcast_to(length, x.shape[:2])
    return zero_where(jnp.arange(x.shape[-3]) >= length[..., None], x)
