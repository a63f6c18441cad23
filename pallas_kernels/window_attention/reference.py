"""Window attention as the paper writes it: one dense band mask over the keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths
from pallas_kernels.masked_attention import masked_attention


def window_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    *,
    window_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the window in float32; arguments and results as in `api.window_attention`."""
    t = query_indices(q.shape[1], q_offset)[:, None]
    key = jnp.arange(k.shape[1])
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])[:, None, None]
    visible = (t - window_size < key) & (key <= t) & (key < length) & (t < length)
    return masked_attention(q, k, v, visible[:, :, None, :])
