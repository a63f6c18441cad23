"""Window attention on TPU: the interval rule, of which only the band's tiles are visited."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu_flash
from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths, zero_where

_TILES = tpu_flash.Tiles(queries=256, keys=512, chunk=128)


def window_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    *,
    window_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the window; arguments and results as in `api.window_attention`."""
    q, k, v = (jnp.asarray(x) for x in (q, k, v))
    t = query_indices(q.shape[1], q_offset)
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])[:, None]
    past = t >= length
    q = zero_where(past, q)
    k, v = (zero_where(jnp.arange(k.shape[1]) >= length, x) for x in (k, v))
    end = jnp.where(past, 0, t + 1)
    return tpu_flash.interval_attention(q, k, v, end, name="window_attention", tiles=_TILES, window=window_size)
