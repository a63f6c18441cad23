"""Prefix attention with one dense mask over the keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.common import ArrayLike
from pallas_kernels.masked_attention import masked_attention


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix in float32; arguments and results as in `api.prefix_attention`."""
    rows, keys = q.shape[:2], k.shape[-3]
    if k.ndim == 4:
        k, v = (jnp.broadcast_to(x[:, None], (*rows, *x.shape[1:])) for x in (k, v))
    length = jnp.asarray(keys if k_lengths is None else k_lengths)
    length = jnp.broadcast_to(length[:, None] if length.ndim == 1 else length, rows)
    key = jnp.arange(keys)
    seen = (key < jnp.asarray(visible)[..., None]) & (key < length[..., None, None])

    def flat(x: ArrayLike) -> ArrayLike:
        return x.reshape(rows[0] * rows[1], *x.shape[2:])

    o, lse = masked_attention(flat(q), flat(k), flat(v), flat(seen)[:, :, None, :])
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])
