"""Public entry point of selected attention."""

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu, registry, triton_calls, validation
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.selected_attention import mosaic_gpu, mosaic_tpu, reference, triton, triton_token_major, xla

registry.register(
    "selected_attention",
    reference=reference.selected_attention,
    xla=xla.selected_attention,
    mosaic_gpu=gpu.on_hopper(mosaic_gpu.selected_attention),
    mosaic_tpu=mosaic_tpu.selected_attention,
    triton=triton_calls.on_nvidia(triton.selected_attention),
    triton_token_major=triton_calls.on_nvidia(triton_token_major.selected_attention),
)


def selected_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    block_indices: Int[ArrayLike, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar = 0,
    lengths: Int[ArrayLike, "B"] | None = None,
    implementation: registry.Implementation = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the keys of the chosen blocks, causally, with one softmax over all of them.

    Source: VideoNSA (arXiv 2510.02295) section 2, the selection branch; NSA (arXiv 2502.11089) equation 12.

    Args:
      q: queries; float32, bfloat16 or float16.
      k: keys, in q's dtype; S need not be a multiple of block_size.
      v: values, likewise.
      block_indices: chosen blocks, each at most once per query and KV head, in any order; -1 is no block.
      block_size: keys per block (s).
      q_offset: absolute index of the first query, one scalar.
      lengths: valid keys per row; keys at or past are never read, queries at or past give 0. None: S.
      implementation: a name, a dict per operation, or None for the device's best.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.

    Raises:
      ValueError: shapes that do not fit, block_size below 1, or an unknown implementation.
      TypeError: a dtype that does not fit.
      NotImplementedError: the named implementation does not cover the call.
    """
    validation.check_queries(q)
    validation.check_keys(q, "k", k)
    validation.check_keys(q, "v", v)
    validation.check_same_shape("v", v, "k", k)
    validation.check_positive("block_size", block_size)
    validation.check_integers("block_indices", block_indices, (*q.shape[:3], *block_indices.shape[3:4]), "[B, T, N, n]")
    validation.check_integers("lengths", lengths, q.shape[:1], "[B]")
    return registry.call(
        "selected_attention",
        implementation,
        q,
        k,
        v,
        block_indices,
        block_size=block_size,
        q_offset=q_offset,
        lengths=lengths,
    )
