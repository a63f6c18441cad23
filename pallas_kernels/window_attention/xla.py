"""Window attention in plain XLA: chunks of w or more queries against the chunk's own keys and the w - 1 before it."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.chunked import attend, dense_attention, over_query_chunks
from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths, zero_where

_SMALLEST_CHUNK = 64
_ALIGNMENT = 8  # bfloat16 rows of 16 bytes: GPUs' matrix units read no shorter ones at full speed


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
    queries, keys = q.shape[1], k.shape[1]
    length = resolve_lengths(lengths, q.shape[0], keys)[:, None]
    past = query_indices(queries, q_offset) >= length
    q = zero_where(past, q)
    k, v = (zero_where(jnp.arange(keys) >= length, x) for x in (k, v))

    # Keys before a chunk's own: at least w - 1, in number a multiple of what matrix units take.
    before = -(-(window_size - 1) // _ALIGNMENT) * _ALIGNMENT
    chunk = max(_SMALLEST_CHUNK, before)
    if queries > chunk and chunk + before < keys:
        return _banded(q, k, v, past, window_size, q_offset, chunk, before)

    end = jnp.where(past, 0, query_indices(queries, q_offset) + 1)

    def in_window(end: jax.Array) -> jax.Array:
        return jnp.arange(keys) >= end[:, None, :, None] - window_size

    return dense_attention(q, k, v, end, end, in_window)


def _banded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    past: jax.Array,
    window_size: int,
    q_offset: Scalar,
    chunk: int,
    before: int,
) -> tuple[jax.Array, jax.Array]:
    batch, queries, heads, group, size = q.shape
    chunks = -(-queries // chunk)
    padded = chunks * chunk

    def in_chunks(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, padded - queries)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, chunks, chunk, *x.shape[2:])

    def band(x: jax.Array) -> jax.Array:
        # From the key `before` the first query on, as many as the padded queries need; a chunk's keys are its own and
        # the first `before` of the chunk-sized piece that starts so much earlier (chunk >= before).
        x = jnp.pad(x, [(0, 0), (before, padded), (0, 0), (0, 0)])
        x = jax.lax.dynamic_slice_in_dim(x, jnp.asarray(q_offset, jnp.int32), before + padded, axis=1)
        earlier = x[:, :padded].reshape(batch, chunks, chunk, heads, size)[:, :, :before]
        own = x[:, before:].reshape(batch, chunks, chunk, heads, size)
        return jnp.swapaxes(jnp.concatenate([earlier, own], axis=2), 2, 3)

    # Key column c of a chunk is at the distance i + before - c from its query i.
    distance = jnp.arange(chunk)[:, None] + before - jnp.arange(before + chunk)
    in_window = (distance >= 0) & (distance < window_size)
    first_key = jnp.asarray(q_offset, jnp.int32) - before + jnp.arange(chunks) * chunk

    def body(tile: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q_tile, k_tile, v_tile, past_tile, first = tile
        key = first[..., None] + jnp.arange(before + chunk)
        visible = in_window & (key >= 0)[:, :, None, :] & ~past_tile[..., None]
        o, lse = attend(jnp.swapaxes(q_tile, 2, 3), k_tile, v_tile, visible[:, :, None, :, None, :])
        return jnp.swapaxes(o, 2, 3), jnp.swapaxes(lse, 2, 3)

    first_key = jnp.broadcast_to(first_key, (batch, chunks))
    tiles = (in_chunks(q), band(k), band(v), in_chunks(past), first_key)
    o, lse = over_query_chunks(body, tiles, batch * heads * group * chunk * (before + chunk))
    return (
        o.reshape(batch, padded, heads, group, size)[:, :queries],
        lse.reshape(batch, padded, heads, group)[:, :queries],
    )
