"""Compressed attention on TPU: the interval rule over block means, which a KV head keeps in VMEM."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu_flash
from pallas_kernels.common import ArrayLike, Scalar, query_indices, zero_where

_NAME = "compressed_attention"
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
    if lengths is not None:
        q = zero_where(query_indices(q.shape[1], q_offset) >= jnp.asarray(lengths)[:, None], q)
    k_blocks, v_blocks, end = _visible(k_blocks, v_blocks, q.shape[1], block_size, q_offset, lengths)
    return tpu_flash.interval_attention(q, k_blocks, v_blocks, end, name=_NAME, tiles=_TILES)


def group_major_attention(
    q: Float[jax.Array, "B N G padded D"],
    k_blocks: Float[jax.Array, "B M N D"],
    v_blocks: Float[jax.Array, "B M N D"],
    *,
    queries: int,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B N G padded D"], Float32[jax.Array, "B N G padded"]]:
    """`compressed_attention` of T = `queries` that lie as the kernels take them, zeros past the lengths."""
    k_blocks, v_blocks, end = _visible(k_blocks, v_blocks, queries, block_size, q_offset, lengths)
    return tpu_flash.group_major_attention(q, k_blocks, v_blocks, end, name=_NAME, tiles=_TILES)


def _visible(
    k_blocks: jax.Array,
    v_blocks: jax.Array,
    queries: int,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[jax.Array, jax.Array, Int[jax.Array, "B T"]]:
    """Keys and values, zeros where none may be read, and one past the last block that each query sees."""
    batch, blocks = k_blocks.shape[:2]
    t = query_indices(queries, q_offset)
    end = jnp.broadcast_to(jnp.minimum((t + 1) // block_size, blocks), (batch, queries))
    if lengths is not None:
        length = jnp.asarray(lengths)[:, None]
        # What ends at a valid query lies below the length.
        end = jnp.where(t >= length, 0, end)
        partial = (jnp.arange(blocks) + 1) * block_size > length
        k_blocks, v_blocks = (zero_where(partial, x) for x in (k_blocks, v_blocks))
    return k_blocks, v_blocks, end
