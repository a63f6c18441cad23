"""Cross-entropy over a large vocabulary, a chunk of the text at a time.

Qwen2.5-VL's 152,064 float32 logits are 0.6 MB a token: for a batch's whole text stream, with their gradient, they would
be its largest arrays. Here one chunk's exist at a time; the gradient computes them again from the hidden states.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from videonsa_jax.models.placement import split_targets


def token_losses(
    hidden: Float[Array, "B Q Lt hidden"],
    weights: Float[Array, "hidden V"],
    targets: Int[Array, "B Q Lt"],
    *,
    chunk: int,
) -> tuple[Float32[Array, "B Q Lt"], Bool[Array, "B Q Lt"]]:
    """The cross-entropy of each token's target under softmax(hidden @ weights).

    Differentiable in `hidden` and `weights`. On a mesh (`placement.on_mesh`) every device has its own tokens, and sums
    their share of the weights' gradient before any of it is exchanged. The vocabulary may be split over `tensor`: sums
    and maxima over it are all that crosses it.

    Args:
      hidden: hidden states; matrix products are in their dtype, accumulated in float32.
      weights: of the output projection, in any dtype; their gradient is accumulated in float32.
      targets: token ids below V.
      chunk: positions of each row whose logits exist at a time, of those that a device has; 0: all.

    Returns:
      The losses, and whether no logit is larger than the target's.
    """
    return split_targets(functools.partial(_own_losses, chunk), hidden, weights, targets)


def _own_losses(chunk: int, hidden: Array, weights: Array, targets: Array) -> tuple[Array, Array]:
    if chunk == 0 or targets.shape[-1] <= chunk:
        # A single chunk's logits are alive between the passes' last and first step alone: nothing is gained by
        # computing them again.
        return _losses(_logits(hidden, weights), targets)
    return _chunked(chunk, hidden, weights.astype(jnp.float32), targets)


def _logits(hidden: Float[Array, "*L hidden"], weights: Float[Array, "hidden V"]) -> Float32[Array, "*L V"]:
    return jnp.einsum("...h,hv->...v", hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _is_target(targets: Int[Array, "*L"], vocabulary: int) -> Bool[Array, "*L V"]:
    # A comparison is local where the vocabulary is split over devices; to look an entry up would gather it.
    return targets[..., None] == jnp.arange(vocabulary, dtype=targets.dtype)


def _losses(
    logits: Float32[Array, "*L V"], targets: Int[Array, "*L"]
) -> tuple[Float32[Array, "*L"], Bool[Array, "*L"]]:
    own = jnp.sum(jnp.where(_is_target(targets, logits.shape[-1]), logits, 0.0), axis=-1)
    return jax.nn.logsumexp(logits, axis=-1) - own, own == jnp.max(logits, axis=-1)


def _split(x: Array, chunk: int) -> Array:
    """[B, Q, Lt, ...] to [chunks, B, Q, chunk, ...], padded with zeros."""
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % chunk)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:]), 2, 0)


def _join(x: Array, length: int) -> Array:
    """The inverse of `_split`."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk: int, hidden: Array, weights: Array, targets: Array) -> tuple[Array, Array]:
    return _chunked_forward(chunk, hidden, weights, targets)[0]


def _chunked_forward(
    chunk: int, hidden: Array, weights: Array, targets: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    # Rounded here, no chunk's loop holds the float32 weights.
    weights = weights.astype(hidden.dtype)
    losses, correct = jax.lax.map(
        lambda part: _losses(_logits(part[0], weights), part[1]), (_split(hidden, chunk), _split(targets, chunk))
    )
    length = targets.shape[-1]
    return (_join(losses, length), _join(correct, length)), (hidden, weights, targets)


def _chunked_backward(chunk: int, saved: tuple[Array, ...], cotangents: tuple[Array, Any]) -> tuple[Any, ...]:
    hidden, weights, targets = saved

    def body(dweights: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        hidden, targets, dloss = part
        logits = _logits(hidden, weights)
        dlogits = jax.nn.softmax(logits, axis=-1) - _is_target(targets, logits.shape[-1])
        dlogits = (dlogits * dloss[..., None]).astype(hidden.dtype)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dhidden = product("...v,hv->...h", dlogits, weights).astype(hidden.dtype)
        return dweights + product("bqlh,bqlv->hv", hidden, dlogits), dhidden

    parts = tuple(_split(x, chunk) for x in (hidden, targets, cotangents[0]))
    dweights, dhidden = jax.lax.scan(body, jnp.zeros(weights.shape, jnp.float32), parts)
    return _join(dhidden, targets.shape[-1]), dweights, None


_chunked.defvjp(_chunked_forward, _chunked_backward)
