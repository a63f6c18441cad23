"""Selected attention in Triton as the published kernels do it: the baseline that users know, not the one to use.

A program owns one token of one KV head, its query heads padded to 16 rows, and reads all its blocks; dk and dv take a
block's queries one by one (FLA's and XunhaoLai's native sparse attention are so). No two tokens share what was read: it
runs at the rate of the L2 cache, whatever its arithmetic does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import triton_calls
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.selected_attention import triton_rule
from pallas_kernels.selected_attention.gpu_lists import BlockLists
from pallas_kernels.selected_attention.triton_config import Config, token_major_heuristic

Chosen = tuple[Int[jax.Array, "B N T n"], Int[jax.Array, "1"]]
"""The visible blocks of each query, and q_offset."""


def selected_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    block_indices: Int[ArrayLike, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: Config | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the chosen blocks; arguments and results as in `api.selected_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      block_indices: see there.
      block_size: see there; 64.
      q_offset: see there.
      lengths: see there.
      config: of the kernels; None: `triton_config.token_major_heuristic`.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size, group or block size that the kernels do not cover.
    """
    return triton_rule.attend(
        _DESIGN,
        token_major_heuristic,
        *(q, k, v, block_indices),
        block_size=block_size,
        q_offset=q_offset,
        lengths=lengths,
        config=config,
    )


def _choice(
    config: Config, chosen: Int[jax.Array, "B N T n"], length: Int[jax.Array, "B"], q_offset: Scalar, keys: int
) -> tuple[Chosen, Chosen]:
    del config, length, keys
    read = chosen, jnp.asarray(q_offset, jnp.int32).reshape(1)
    return read, read


def forward(
    config: Config,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    choice: Chosen,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Runs the forward kernel on keys and values in whole blocks."""
    from pallas_kernels.selected_attention import triton_token_major_kernels

    return triton_rule.launch_forward(
        triton_token_major_kernels.forward_kernel,
        *(q, k, v, *choice),
        grid=(q.shape[1], q.shape[0] * q.shape[2]),
        num_warps=config.forward.warps,
        num_stages=config.forward.stages,
        PLACES=choice[0].shape[3],
        **triton_rule.sizes(q, k),
    )


def query_gradient(
    config: Config,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
    choice: Chosen,
) -> Float[jax.Array, "B T N G D"]:
    """Runs the kernel of dq."""
    from pallas_kernels.selected_attention import triton_token_major_kernels

    (dq,) = triton_calls.launch(
        triton_token_major_kernels.query_gradient_kernel,
        *(q, k, v, do, lse, delta, *choice),
        out_shapes=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(q.shape[1], q.shape[0] * q.shape[2]),
        num_warps=config.dq.warps,
        num_stages=config.dq.stages,
        factor=q.shape[4] ** -0.5,
        PLACES=choice[0].shape[3],
        **triton_rule.sizes(q, k),
    )
    return dq


def key_gradients(
    config: Config,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
    lists: BlockLists,
) -> tuple[Float[jax.Array, "B S N D"], Float[jax.Array, "B S N D"]]:
    """Runs the kernel of dk and dv."""
    from pallas_kernels.selected_attention import triton_token_major_kernels

    kernel = triton_token_major_kernels.key_gradients_kernel
    return triton_rule.launch_key_gradients(kernel, config.dkdv, q, k, v, do, lse, delta, lists)


_DESIGN = triton_rule.Design(_choice, forward, query_gradient, key_gradients)
