"""Block selection in plain XLA, chunked over queries: the probabilities of one chunk exist at a time."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels.block_selection.choice import choose_blocks
from pallas_kernels.chunked import over_query_chunks, scaled_logits
from pallas_kernels.common import ArrayLike, Scalar, query_indices


def block_selection(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    lse: Float32[ArrayLike, "B T N G"],
    *,
    block_size: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
) -> Int32[jax.Array, "B T N n"]:
    """Chooses blocks; arguments and results as in `api.block_selection`."""
    q, lse = jnp.asarray(q), jnp.asarray(lse)
    batch, queries, heads, group, _ = q.shape
    keys = jnp.swapaxes(jnp.asarray(k_blocks), 1, 2)
    t = jnp.broadcast_to(query_indices(queries, q_offset), (batch, queries))
    valid = jnp.ones_like(t, bool) if lengths is None else t < jnp.asarray(lengths)[:, None]

    def body(chunk: Any) -> jax.Array:
        q_chunk, lse_chunk, t_chunk, valid_chunk = chunk
        logits = scaled_logits(jnp.swapaxes(q_chunk, 1, 2), keys)
        probabilities = jnp.exp(logits - jnp.swapaxes(lse_chunk, 1, 2)[..., None])
        importance = jnp.swapaxes(probabilities.sum(axis=3), 1, 2)
        return choose_blocks(
            importance,
            t_chunk,
            valid_chunk,
            block_size=block_size,
            block_count=block_count,
            init_blocks=init_blocks,
            local_blocks=local_blocks,
        )

    return over_query_chunks(body, (q, lse, t, valid), batch * heads * group * k_blocks.shape[1])
