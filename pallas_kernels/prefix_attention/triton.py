"""Prefix attention in Triton: the interval rule with every query's own end; few queries split the keys."""

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import triton_flash
from pallas_kernels.common import ArrayLike
from pallas_kernels.gpu_flash import Visible
from pallas_kernels.prefix_attention.rows import as_rows
from pallas_kernels.triton_flash_config import Config


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
    *,
    config: Config | None = None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix; arguments and results as in `api.prefix_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      visible: see there.
      k_lengths: see there.
      config: tile configurations; None: `triton_flash_config.heuristic`.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    rows, keys, values, end = as_rows(q, k, v, visible, k_lengths)
    seen = Visible(end, key_length=end.max(axis=1, initial=0))
    o, lse = triton_flash.interval_attention(rows, keys, values, seen, name="prefix", config=config)
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])
