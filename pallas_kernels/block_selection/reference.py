"""Block selection as the paper writes it: all probabilities at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels.block_selection.choice import choose_blocks
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
    """Chooses blocks in float32; arguments and results as in `api.block_selection`."""
    t = jnp.broadcast_to(query_indices(q.shape[1], q_offset), q.shape[:2])
    valid = jnp.ones_like(t, bool) if lengths is None else t < jnp.asarray(lengths)[:, None]

    q32, k32 = jnp.asarray(q, jnp.float32), jnp.asarray(k_blocks, jnp.float32)
    logits = jnp.einsum("btngd,bmnd->btngm", q32, k32, precision=jax.lax.Precision.HIGHEST) / q.shape[-1] ** 0.5
    importance = jnp.exp(logits - jnp.asarray(lse)[..., None]).sum(axis=3)
    return choose_blocks(
        importance,
        t,
        valid,
        block_size=block_size,
        block_count=block_count,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
    )
