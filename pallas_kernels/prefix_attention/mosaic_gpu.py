"""Prefix attention on Hopper: the interval rule with every query's own end; few queries split the keys."""

from typing import Any

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu_flash
from pallas_kernels.common import ArrayLike
from pallas_kernels.gpu_flash_config import Config
from pallas_kernels.prefix_attention.rows import as_rows


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
    *,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix; arguments and results as in `api.prefix_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      visible: see there.
      k_lengths: see there.
      config: tile configurations; None: `gpu_flash_config.heuristic`.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    rows, keys, values, end = as_rows(q, k, v, visible, k_lengths)
    seen = gpu_flash.Visible(end, key_length=end.max(axis=1, initial=0))
    o, lse = gpu_flash.interval_attention(rows, keys, values, seen, name="prefix", config=config, interpret=interpret)
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])
