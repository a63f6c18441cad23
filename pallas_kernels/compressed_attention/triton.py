"""Compressed attention in Triton: the interval rule over block means."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import triton_flash
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.compressed_attention.mosaic_gpu import visible_blocks
from pallas_kernels.triton_flash_config import Config


def compressed_attention(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    v_blocks: Float[ArrayLike, "B M N D"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: Config | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to block means; arguments and results as in `api.compressed_attention`.

    Args:
      q: see there.
      k_blocks: see there.
      v_blocks: see there.
      block_size: see there.
      q_offset: see there.
      lengths: see there.
      config: tile configurations; None: `triton_flash_config.heuristic`.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    q, k_blocks, v_blocks = (jnp.asarray(x) for x in (q, k_blocks, v_blocks))
    visible = visible_blocks(q.shape[0], q.shape[1], k_blocks.shape[1], block_size, q_offset, lengths)
    return triton_flash.interval_attention(q, k_blocks, v_blocks, visible, name="compressed", config=config)
