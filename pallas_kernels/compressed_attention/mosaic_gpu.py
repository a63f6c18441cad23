"""Compressed attention on Hopper: the interval rule over block means."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu_flash
from pallas_kernels.common import ArrayLike, Scalar, query_indices
from pallas_kernels.gpu_flash_config import Config


def compressed_attention(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    v_blocks: Float[ArrayLike, "B M N D"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to block means; arguments and results as in `api.compressed_attention`.

    Args:
      q: see there.
      k_blocks: see there.
      v_blocks: see there.
      block_size: see there.
      q_offset: see there.
      lengths: see there.
      config: tile configurations; None: `gpu_flash_config.heuristic`.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    q, k_blocks, v_blocks = (jnp.asarray(x) for x in (q, k_blocks, v_blocks))
    visible = visible_blocks(q.shape[0], q.shape[1], k_blocks.shape[1], block_size, q_offset, lengths)
    return gpu_flash.interval_attention(
        q, k_blocks, v_blocks, visible, name="compressed", config=config, interpret=interpret
    )


def visible_blocks(
    batch: int, queries: int, blocks: int, block_size: int, q_offset: Scalar, lengths: Int[ArrayLike, "B"] | None
) -> gpu_flash.Visible:
    """The intervals of blocks: those that end at the query or before, and wholly below the length."""
    t = query_indices(queries, q_offset)
    end = jnp.broadcast_to(jnp.minimum((t + 1) // block_size, blocks), (batch, queries))
    if lengths is None:
        return gpu_flash.Visible(end)
    length = jnp.asarray(lengths, jnp.int32)
    # What ends at a valid query lies below the length.
    end = jnp.where(t >= length[:, None], 0, end)
    valid = jnp.clip(length - jnp.asarray(q_offset, jnp.int32), 0, queries)
    return gpu_flash.Visible(end, valid, jnp.minimum(length // block_size, blocks))
