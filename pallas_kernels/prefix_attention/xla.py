"""Prefix attention in plain XLA, chunked over queries."""

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels.chunked import dense_attention
from pallas_kernels.common import ArrayLike
from pallas_kernels.prefix_attention.rows import as_rows, zero_unseen


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix; arguments and results as in `api.prefix_attention`."""
    rows, keys, values, count = as_rows(q, k, v, visible, k_lengths)
    o, lse = dense_attention(rows, zero_unseen(keys, count), zero_unseen(values, count), count)
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])
