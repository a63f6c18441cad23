"""Compressed attention on TPU: the interval rule over block means, which a KV head keeps in VMEM."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu_flash
from pallas_kernels.common import ArrayLike, Scalar, query_indices, zero_where

_TILES = tpu_flash.Tiles(queries=256, keys=4096, chunk=256)


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
    q, k_blocks, v_blocks = (jnp.asarray(x) for x in (q, k_blocks, v_blocks))
    blocks = k_blocks.shape[1]
    t = query_indices(q.shape[1], q_offset)
    end = jnp.broadcast_to(jnp.minimum((t + 1) // block_size, blocks), q.shape[:2])
    if lengths is not None:
        length = jnp.asarray(lengths)[:, None]
        past = t >= length
        # What ends at a valid query lies below the length.
        end = jnp.where(past, 0, end)
        q = zero_where(past, q)
        partial = (jnp.arange(blocks) + 1) * block_size > length
        k_blocks, v_blocks = (zero_where(partial, x) for x in (k_blocks, v_blocks))
    return tpu_flash.interval_attention(q, k_blocks, v_blocks, end, name="compressed_attention", tiles=_TILES)
