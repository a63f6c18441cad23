"""Compressed attention in plain XLA, chunked over queries."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.chunked import dense_attention
from pallas_kernels.common import ArrayLike, Scalar, query_indices, zero_where


def compressed_attention(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    v_blocks: Float[ArrayLike, "B M N D"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to block means; arguments and results as in `api.compressed_attention`."""
    end = (jnp.arange(k_blocks.shape[1]) + 1) * block_size
    # How many blocks a query sees: those that end at it or before.
    count = jnp.broadcast_to((query_indices(q.shape[1], q_offset) + 1) // block_size, q.shape[:2])
    q, k_blocks, v_blocks = (jnp.asarray(x) for x in (q, k_blocks, v_blocks))
    if lengths is not None:
        length = jnp.asarray(lengths)[:, None]
        past = query_indices(q.shape[1], q_offset) >= length
        # What ends at a valid query lies below the length.
        count = jnp.where(past, 0, count)
        q = zero_where(past, q)
        k_blocks, v_blocks = (zero_where(end > length, x) for x in (k_blocks, v_blocks))
    return dense_attention(q, k_blocks, v_blocks, count)
