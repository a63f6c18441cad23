"""Window attention on Hopper: the interval rule, of which only the band's steps are visited."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu_flash
from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths
from pallas_kernels.gpu_flash_config import Config


def window_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    *,
    window_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the window; arguments and results as in `api.window_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      window_size: see there.
      q_offset: see there.
      lengths: see there.
      config: tile configurations; None: `gpu_flash_config.heuristic`.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    visible = visible_window(q.shape[0], q.shape[1], k.shape[1], q_offset, lengths)
    return gpu_flash.interval_attention(
        q, k, v, visible, name="window", window=window_size, config=config, interpret=interpret
    )


def visible_window(
    batch: int, queries: int, keys: int, q_offset: Scalar, lengths: Int[ArrayLike, "B"] | None
) -> gpu_flash.Visible:
    """The intervals of the causal window: they end at the query's own key."""
    t = query_indices(queries, q_offset)
    length = resolve_lengths(lengths, batch, keys)
    end = jnp.where(t >= length[:, None], 0, t + 1)
    # A query past the last key is past every length.
    valid = jnp.clip(length - jnp.asarray(q_offset, jnp.int32), 0, queries)
    return gpu_flash.Visible(end, valid, None if lengths is None else length)
