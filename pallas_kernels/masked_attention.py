"""The definition that the reference implementations share: softmax attention under an explicit mask, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Float32

from pallas_kernels.common import EMPTY_LSE, ArrayLike, zero_where


def masked_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    visible: Bool[ArrayLike, "B T #N S"],
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Computes o = softmax(q k^T / sqrt(D)) v over the visible keys, and the softmax's log-sum-exp.

    Args:
      q: queries, N KV heads x G query heads of each.
      k: keys.
      v: values.
      visible: which key each query of each KV head sees. A key that no query sees may hold NaN, and so may a query
        that sees no key.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.
    """
    visible = jnp.broadcast_to(visible, (*q.shape[:2], q.shape[2], k.shape[1]))
    unseen_key = ~jnp.swapaxes(visible.any(1), 1, 2)
    empty = ~visible.any(-1)
    q32 = zero_where(empty, jnp.asarray(q, jnp.float32))
    k32 = zero_where(unseen_key, jnp.asarray(k, jnp.float32))
    v32 = zero_where(unseen_key, jnp.asarray(v, jnp.float32))

    highest = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("btngd,bsnd->btngs", q32, k32, precision=highest) / q.shape[-1] ** 0.5
    seen = visible[:, :, :, None, :]
    # A row without keys takes the softmax of zeros, whose gradient is finite, and is overwritten below.
    logits = jnp.where(empty[..., None, None], 0.0, jnp.where(seen, logits, -jnp.inf))
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, initial=EMPTY_LSE))
    weights = jnp.exp(logits - top)
    total = jnp.where(empty[..., None, None], 1.0, jnp.sum(weights, axis=-1, keepdims=True))
    o = jnp.einsum("btngs,bsnd->btngd", weights / total, v32, precision=highest)
    lse = (top + jnp.log(total))[..., 0]
    return zero_where(empty, o).astype(q.dtype), jnp.where(empty[..., None], EMPTY_LSE, lse)
