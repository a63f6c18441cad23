"""Public entry point of block selection."""

import jax
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import gpu, registry, triton_calls, validation
from pallas_kernels.block_selection import mosaic_gpu, mosaic_tpu, reference, triton, xla
from pallas_kernels.common import ArrayLike, Scalar

registry.register(
    "block_selection",
    reference=reference.block_selection,
    xla=xla.block_selection,
    mosaic_gpu=gpu.on_hopper(mosaic_gpu.block_selection),
    mosaic_tpu=mosaic_tpu.block_selection,
    triton=triton_calls.on_nvidia(triton.block_selection),
)


def block_selection(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    lse: Float32[ArrayLike, "B T N G"],
    *,
    block_size: int,
    block_count: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    q_offset: Scalar = 0,
    lengths: Int[ArrayLike, "B"] | None = None,
    implementation: registry.Implementation = None,
) -> Int32[jax.Array, "B T N n"]:
    """Chooses the blocks that each query of each KV head attends to in full.

    A block's importance is the compression branch's probability summed over the group's G heads. The current block
    t // s, the first `init_blocks` and the last `local_blocks` are always taken; the other places go to the highest
    importance among the blocks j <= t // s, the lower index first among equals. No gradient flows.

    Source: VideoNSA (arXiv 2510.02295) section 2, the selection branch; NSA (arXiv 2502.11089) equations 8-12.

    Args:
      q: queries; float32, bfloat16 or float16.
      k_blocks: mean keys of the M complete blocks, in q's dtype; a partial block M may follow them.
      lse: natural log-sum-exp that `compressed_attention` returned for the same q and k_blocks.
      block_size: keys per block (s).
      block_count: places per query (n).
      init_blocks: leading blocks that are always taken.
      local_blocks: trailing blocks that are always taken, the current one included.
      q_offset: absolute index of the first query, one scalar.
      lengths: valid keys per row; a query at or past them gets no block. None: every query is valid.
      implementation: a name, a dict per operation, or None for the device's best.

    Returns:
      Block indices, ascending, padded at the end with -1.

    Raises:
      ValueError: shapes that do not fit, sizes below 1, forced blocks beyond block_count, an unknown implementation.
      TypeError: a dtype that does not fit.
      NotImplementedError: the named implementation does not cover the call.
    """
    validation.check_queries(q)
    validation.check_keys(q, "k_blocks", k_blocks, axis="M")
    validation.check_shape("lse", lse, q.shape[:-1], "[B, T, N, G]")
    validation.check_positive("block_size", block_size)
    validation.check_block_choice(block_count, init_blocks, local_blocks)
    validation.check_integers("lengths", lengths, q.shape[:1], "[B]")
    return registry.call(
        "block_selection",
        implementation,
        jax.lax.stop_gradient(q),
        jax.lax.stop_gradient(k_blocks),
        jax.lax.stop_gradient(lse),
        block_size=block_size,
        block_count=block_count,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        q_offset=q_offset,
        lengths=lengths,
    )
