"""Chunked against unchunked cross-entropy; tests/training/test_sharded.py has a split vocabulary."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxpr_reading import every_equation

from videonsa_jax.training.cross_entropy import token_losses

B, Q, LT, HIDDEN, VOCAB = 2, 2, 11, 8, 37


def weighted_loss(chunk: int, hidden: Any, weights: Any, targets: Any, loss_weights: Any) -> Any:
    losses, correct = token_losses(hidden, weights, targets, chunk=chunk)
    return jnp.sum(losses * loss_weights), (losses, correct)


def inputs(dtype: Any = jnp.float32) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((B, Q, LT, HIDDEN)), dtype)
    weights = jnp.asarray(rng.standard_normal((HIDDEN, VOCAB)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCAB, (B, Q, LT)), jnp.int32)
    return hidden, weights, targets, jnp.asarray(rng.integers(0, 3, (B, Q, LT)), jnp.float32)


def with_gradients(chunk: int, dtype: Any = jnp.float32) -> Any:
    function = jax.value_and_grad(functools.partial(weighted_loss, chunk), argnums=(0, 1), has_aux=True)
    return jax.jit(function)(*inputs(dtype))


@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_chunks_change_neither_loss_nor_gradient(chunk: int) -> None:
    """Chunks of one token, chunks that do not divide the stream, one chunk."""
    whole, chunked = with_gradients(0), with_gradients(chunk)
    hidden, weights, targets, _ = inputs()
    log_probabilities = jax.nn.log_softmax(hidden @ weights)
    losses = -jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    for (_, (of_tokens, correct)), _ in (whole, chunked):
        # 1e-6 here and below: a float32 rounding or two of sums in another order.
        np.testing.assert_allclose(of_tokens, losses, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(correct, jnp.argmax(log_probabilities, axis=-1) == targets)
    np.testing.assert_allclose(chunked[0][0], whole[0][0], rtol=1e-6)
    for one, other in zip(jax.tree.leaves(whole[1]), jax.tree.leaves(chunked[1]), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-6 * float(jnp.abs(one).max()))


@pytest.mark.parametrize(("chunk", "expected"), [(0, LT), (4, 4)])
def test_neither_pass_makes_more_logits_than_a_chunks(chunk: int, expected: int) -> None:
    function = jax.grad(functools.partial(weighted_loss, chunk), argnums=(0, 1), has_aux=True)
    jaxpr = jax.make_jaxpr(function)(*inputs())
    shapes = [var.aval.shape for equation in every_equation(jaxpr) for var in equation.outvars]
    assert max(math.prod(shape) for shape in shapes if VOCAB in shape) == B * Q * expected * VOCAB


def test_bfloat16_weights_gradients_are_summed_in_float32() -> None:
    """Products of bfloat16 operands have an error of 2^-9 each; their sum over chunks adds none."""
    (_, (losses, _)), (dhidden, dweights) = with_gradients(4, jnp.bfloat16)
    (_, (expected_losses, _)), (_, expected) = with_gradients(0)
    assert (losses.dtype, dhidden.dtype, dweights.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(losses, expected_losses, rtol=0, atol=0.05)
    np.testing.assert_allclose(dweights, expected, rtol=0, atol=2**-7 * float(jnp.abs(expected).max()))
