"""Public entry point of prefix attention."""

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import gpu, registry, triton_calls, validation
from pallas_kernels.common import ArrayLike
from pallas_kernels.prefix_attention import mosaic_gpu, mosaic_tpu, reference, triton, xla

registry.register(
    "prefix_attention",
    reference=reference.prefix_attention,
    xla=xla.prefix_attention,
    mosaic_gpu=gpu.on_hopper(mosaic_gpu.prefix_attention),
    mosaic_tpu=mosaic_tpu.prefix_attention,
    triton=triton_calls.on_nvidia(triton.prefix_attention),
)


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None = None,
    *,
    implementation: registry.Implementation = None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends densely to a prefix of the keys: a query sees keys [0, min(visible, k_lengths)).

    Text queries over the visual keys that precede them, text queries over their own row's text (visible = 1 + index),
    one decoded token over a cache, and the dense baseline are all of this form.

    Args:
      q: queries of Q rows per visual context; float32, bfloat16 or float16.
      k: keys, in q's dtype: shared by the Q rows, or one set per row.
      v: values, likewise.
      visible: how many leading keys each query sees; 0 gives output 0.
      k_lengths: valid keys per context or per row, [B] or [B, Q]; keys at or past are never read. None: S.
      implementation: a name, a dict per operation, or None for the device's best.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.

    Raises:
      ValueError: shapes that do not fit or an unknown implementation.
      TypeError: a dtype that does not fit.
      NotImplementedError: the named implementation does not cover the call.
    """
    validation.check_queries(q, "[B, Q, Lt, N, G, D]")
    shared, heads = q.shape[:1], (q.shape[3], q.shape[5])
    if k.ndim not in (4, 5) or k.shape != (*q.shape[: k.ndim - 3], k.shape[-3], *heads):
        raise ValueError(
            f"k has shape {k.shape}, expected [B, S, N, D] or [B, Q, S, N, D] with the B, Q, N, D of q's {q.shape}"
        )
    validation.check_same_shape("v", v, "k", k)
    validation.check_dtype(q, "k", k)
    validation.check_dtype(q, "v", v)
    validation.check_integers("visible", visible, q.shape[:3], "[B, Q, Lt]")
    if k_lengths is not None and k_lengths.ndim == 1:
        validation.check_integers("k_lengths", k_lengths, shared, "[B]")
    else:
        validation.check_integers("k_lengths", k_lengths, q.shape[:2], "[B, Q]")
    return registry.call("prefix_attention", implementation, q, k, v, visible, k_lengths)
