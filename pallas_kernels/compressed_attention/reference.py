"""Compressed attention as the paper writes it: one dense mask over the blocks."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.common import ArrayLike, Scalar, query_indices
from pallas_kernels.masked_attention import masked_attention


def compressed_attention(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    v_blocks: Float[ArrayLike, "B M N D"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to block means in float32; arguments and results as in `api.compressed_attention`."""
    t = query_indices(q.shape[1], q_offset)[:, None]
    end = (jnp.arange(k_blocks.shape[1]) + 1) * block_size
    visible = jnp.broadcast_to(end - 1 <= t, (q.shape[0], q.shape[1], k_blocks.shape[1]))
    if lengths is not None:
        length = jnp.asarray(lengths)[:, None, None]
        visible = visible & (end <= length) & (t < length)
    return masked_attention(q, k_blocks, v_blocks, visible[:, :, None, :])
