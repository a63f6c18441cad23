"""Selected attention as the paper writes it: one dense mask over the keys."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels.common import ArrayLike, Scalar, query_indices, resolve_lengths
from pallas_kernels.masked_attention import masked_attention


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
    """Attends to the chosen blocks in float32; arguments and results as in `api.selected_attention`."""
    t = query_indices(q.shape[1], q_offset)[:, None]
    key = jnp.arange(k.shape[1])
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])[:, None, None]
    causal = (key <= t) & (key < length) & (t < length)
    chosen = (jnp.asarray(block_indices)[..., None] == key // block_size).any(axis=3)
    return masked_attention(q, k, v, causal[:, :, None, :] & chosen)
