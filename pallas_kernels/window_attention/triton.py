"""Window attention in Triton: the interval rule, of which only the band's steps are visited."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import triton_flash
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.triton_flash_config import Config
from pallas_kernels.window_attention.mosaic_gpu import visible_window


def window_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    *,
    window_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: Config | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the window; arguments and results as in `api.window_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      window_size: see there.
      q_offset: see there.
      lengths: see there.
      config: tile configurations; None: `triton_flash_config.heuristic`.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    visible = visible_window(q.shape[0], q.shape[1], k.shape[1], q_offset, lengths)
    return triton_flash.interval_attention(q, k, v, visible, name="window", window=window_size, config=config)
