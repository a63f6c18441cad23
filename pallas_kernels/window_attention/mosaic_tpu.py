"""Window attention on TPU: the interval rule, of which only the band's tiles are visited."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu_flash
from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths, zero_where

_NAME = "window_attention"
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
    k, v, end = _visible(k, v, q.shape[1], q_offset, lengths)
    return tpu_flash.interval_attention(
        zero_where(end == 0, q), k, v, end, name=_NAME, tiles=_TILES, window=window_size
    )


def group_major_attention(
    q: Float[jax.Array, "B N G padded D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    *,
    queries: int,
    window_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B N G padded D"], Float32[jax.Array, "B N G padded"]]:
    """`window_attention` of T = `queries` that lie as the kernels take them, zeros past the lengths."""
    k, v, end = _visible(k, v, queries, q_offset, lengths)
    return tpu_flash.group_major_attention(q, k, v, end, name=_NAME, tiles=_TILES, window=window_size)


def _visible(
    k: jax.Array, v: jax.Array, queries: int, q_offset: Scalar, lengths: Int[ArrayLike, "B"] | None
) -> tuple[jax.Array, jax.Array, Int[jax.Array, "B T"]]:
    """Keys and values, zeros past the lengths, and one past the last key that each query sees, 0 past the lengths."""
    length = resolve_lengths(lengths, k.shape[0], k.shape[1])[:, None]
    k, v = (zero_where(jnp.arange(k.shape[1]) >= length, x) for x in (k, v))
    t = query_indices(queries, q_offset)
    return k, v, jnp.where(t >= length, 0, t + 1)
