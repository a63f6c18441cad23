"""Public entry point of compressed attention."""

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu, registry, triton_calls, validation
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.compressed_attention import mosaic_gpu, mosaic_tpu, reference, triton, xla

registry.register(
    "compressed_attention",
    reference=reference.compressed_attention,
    xla=xla.compressed_attention,
    mosaic_gpu=gpu.on_hopper(mosaic_gpu.compressed_attention),
    mosaic_tpu=mosaic_tpu.compressed_attention,
    triton=triton_calls.on_nvidia(triton.compressed_attention),
)


def compressed_attention(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    v_blocks: Float[ArrayLike, "B M N D"],
    *,
    block_size: int,
    q_offset: Scalar = 0,
    lengths: Int[ArrayLike, "B"] | None = None,
    implementation: registry.Implementation = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to block means: query t sees block j when (j+1)s - 1 <= t.

    Source: VideoNSA (arXiv 2510.02295) section 2, the compression branch; NSA (arXiv 2502.11089) equation 7 with the
    mean as its compression map.

    Args:
      q: queries; float32, bfloat16 or float16.
      k_blocks: mean keys of the M complete blocks, in q's dtype; see `pallas_kernels.nsa.block_means`.
      v_blocks: mean values, likewise.
      block_size: keys per block (s).
      q_offset: absolute index of the first query, one scalar.
      lengths: valid keys per row; a block that is not wholly below is never read, a query at or past gives 0.
        None: every block and every query is valid.
      implementation: a name, a dict per operation, or None for the device's best.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no block.

    Raises:
      ValueError: shapes that do not fit, block_size below 1, or an unknown implementation.
      TypeError: a dtype that does not fit.
      NotImplementedError: the named implementation does not cover the call.
    """
    validation.check_queries(q)
    validation.check_keys(q, "k_blocks", k_blocks, axis="M")
    validation.check_keys(q, "v_blocks", v_blocks, axis="M")
    validation.check_same_shape("v_blocks", v_blocks, "k_blocks", k_blocks)
    validation.check_positive("block_size", block_size)
    validation.check_integers("lengths", lengths, q.shape[:1], "[B]")
    return registry.call(
        "compressed_attention",
        implementation,
        q,
        k_blocks,
        v_blocks,
        block_size=block_size,
        q_offset=q_offset,
        lengths=lengths,
    )
