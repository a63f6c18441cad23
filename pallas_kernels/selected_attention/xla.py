"""Selected attention in plain XLA, chunked over queries, in two forms.

Where the chosen blocks are a fair share of all keys, a dense tile under a mask is quicker than fetching each query's
own keys; where they are few, fetching them is what keeps the work linear in the length.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.chunked import attend, dense_attention, over_query_chunks
from pallas_kernels.common import ArrayLike, Scalar, block_total, query_indices, resolve_lengths, zero_where

DENSE_SHARE = 8
"""The dense form runs while all keys are at most this many times the chosen ones."""


def selected_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    block_indices: Int[ArrayLike, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the chosen blocks; arguments and results as in `api.selected_attention`."""
    q, k, v, block_indices = (jnp.asarray(x) for x in (q, k, v, block_indices))
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])[:, None]
    t = query_indices(q.shape[1], q_offset)
    past = t >= length
    # One past the last key that a query may see in its blocks.
    end = jnp.where(past, 0, jnp.minimum(t + 1, length))
    q = zero_where(past, q)
    k, v = (zero_where(jnp.arange(k.shape[1]) >= length, x) for x in (k, v))
    form = _dense if k.shape[1] <= DENSE_SHARE * block_indices.shape[3] * block_size else _fetched
    return form(q, k, v, block_indices, end, block_size)


def _dense(
    q: jax.Array, k: jax.Array, v: jax.Array, block_indices: jax.Array, end: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    keys = k.shape[1]
    blocks = jnp.arange(block_total(keys, block_size))

    def chosen(index: jax.Array) -> jax.Array:
        by_block = (jnp.swapaxes(index, 1, 2)[..., None] == blocks).any(axis=3)
        return jnp.repeat(by_block, block_size, axis=-1)[..., :keys]

    return dense_attention(q, k, v, end, block_indices, chosen)


def _fetched(
    q: jax.Array, k: jax.Array, v: jax.Array, block_indices: jax.Array, end: jax.Array, block_size: int
) -> tuple[jax.Array, jax.Array]:
    batch, keys, heads, size = k.shape
    blocks = block_total(keys, block_size)
    places = block_indices.shape[3]

    def in_blocks(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, blocks * block_size - keys), (0, 0), (0, 0)])
        by_block = padded.reshape(batch, blocks, block_size, heads, size)
        # float32 carriers: see dense_attention.
        return jnp.moveaxis(by_block, 3, 1).astype(jnp.float32)

    k_in_blocks, v_in_blocks = in_blocks(k), in_blocks(v)

    def fetch(x: jax.Array, index: jax.Array) -> jax.Array:
        fetched = jax.vmap(jax.vmap(lambda x, index: x[index]))(x, index)
        return fetched.reshape(*index.shape[:3], places * block_size, size)

    def body(chunk: Any) -> Any:
        q_chunk, index, end = chunk
        index = jnp.swapaxes(index, 1, 2)
        key = jnp.where(index < 0, keys, index * block_size)[..., None] + jnp.arange(block_size)
        key = key.reshape(*index.shape[:3], 1, 1, places * block_size)
        visible = key < end[:, None, :, None, None, None]
        index = jnp.maximum(index, 0)
        # Every query has keys of its own: a tile holds one token's G heads.
        o, lse = attend(
            jnp.swapaxes(q_chunk, 1, 2)[..., None, :, :], fetch(k_in_blocks, index), fetch(v_in_blocks, index), visible
        )
        return jnp.swapaxes(o[..., 0, :, :], 1, 2), jnp.swapaxes(lse[..., 0, :], 1, 2)

    return over_query_chunks(body, (q, block_indices, end), batch * heads * places * block_size * size)
