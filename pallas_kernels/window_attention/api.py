"""Public entry point of window attention."""

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu, registry, triton_calls, validation
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.window_attention import mosaic_gpu, mosaic_tpu, reference, triton, xla

registry.register(
    "window_attention",
    reference=reference.window_attention,
    xla=xla.window_attention,
    mosaic_gpu=gpu.on_hopper(mosaic_gpu.window_attention),
    mosaic_tpu=mosaic_tpu.window_attention,
    triton=triton_calls.on_nvidia(triton.window_attention),
)


def window_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    *,
    window_size: int,
    q_offset: Scalar = 0,
    lengths: Int[ArrayLike, "B"] | None = None,
    implementation: registry.Implementation = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the last keys: query t sees keys t-w+1 ... t, clipped at 0.

    Source: VideoNSA (arXiv 2510.02295) section 2, the sliding-window branch; NSA (arXiv 2502.11089) section 3.3.3.

    Args:
      q: queries; float32, bfloat16 or float16.
      k: keys, in q's dtype.
      v: values, likewise.
      window_size: keys in the window, the query's own included (w).
      q_offset: absolute index of the first query, one scalar.
      lengths: valid keys per row; keys at or past are never read, queries at or past give 0. None: S.
      implementation: a name, a dict per operation, or None for the device's best.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.

    Raises:
      ValueError: shapes that do not fit, window_size below 1, or an unknown implementation.
      TypeError: a dtype that does not fit.
      NotImplementedError: the named implementation does not cover the call.
    """
    validation.check_queries(q)
    validation.check_keys(q, "k", k)
    validation.check_keys(q, "v", v)
    validation.check_same_shape("v", v, "k", k)
    validation.check_positive("window_size", window_size)
    validation.check_integers("lengths", lengths, q.shape[:1], "[B]")
    return registry.call(
        "window_attention", implementation, q, k, v, window_size=window_size, q_offset=q_offset, lengths=lengths
    )
