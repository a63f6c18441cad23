"""Prefix attention on TPU: the interval rule with every query's own end."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu_flash
from pallas_kernels.common import ArrayLike
from pallas_kernels.prefix_attention.rows import as_rows

_TILES = tpu_flash.Tiles(queries=256, keys=2048, chunk=256)


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix; arguments and results as in `api.prefix_attention`."""
    rows, keys, values, end = as_rows(q, k, v, visible, k_lengths)
    end = jnp.maximum(end, 0)
    o, lse = tpu_flash.interval_attention(rows, keys, values, end, name="prefix_attention", tiles=_TILES)
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])
