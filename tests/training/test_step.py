import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fakes import CONTEXTS, TEXT, random_batch, random_eval_batch, tiny_experiment

from videonsa_jax.streams import TrainBatch
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.mesh import make_mesh
from videonsa_jax.training.optimizer import learning_rate, make_optimizer
from videonsa_jax.training.step import (
    TrainState,
    accumulate,
    apply_gradients,
    choose_options,
    init_state,
    make_forward,
    make_losses,
)

EXPERIMENT = tiny_experiment()


@dataclasses.dataclass
class Setup:
    """Each function compiled once, for all tests."""

    state: TrainState
    zeros: Any
    forward: Callable
    add: Callable
    apply: Callable
    choose: Callable


@pytest.fixture(scope="module")
def setup() -> Setup:
    optimizer = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.steps)
    schedule = learning_rate(EXPERIMENT.optimizer, EXPERIMENT.train.steps)
    shapes = jax.eval_shape(lambda: init_state(EXPERIMENT.model, EXPERIMENT.train, 0, optimizer)).params
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.2 * draw.standard_normal(leaf.shape, np.float32)), shapes)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    forward = make_forward(EXPERIMENT.model, EXPERIMENT.train, mesh)
    losses = make_losses(EXPERIMENT.model, EXPERIMENT.train, mesh)
    sums, _ = jax.eval_shape(functools.partial(accumulate, losses, EXPERIMENT.train), params, None, random_batch(0))
    return Setup(
        state=state,
        zeros=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), sums),
        forward=jax.jit(forward),
        add=jax.jit(functools.partial(accumulate, losses, EXPERIMENT.train)),
        apply=jax.jit(functools.partial(apply_gradients, optimizer, schedule)),
        choose=jax.jit(functools.partial(choose_options, forward)),
    )


def only(batch: TrainBatch, contexts: slice) -> TrainBatch:
    """The batch with the answers of some contexts."""
    weights = np.zeros_like(batch.loss_weights)
    weights[contexts] = batch.loss_weights[contexts]
    return dataclasses.replace(batch, loss_weights=weights)


def test_accumulation_equals_one_large_batch(setup: Setup) -> None:
    params, batch = setup.state.params, random_batch(0)
    whole, _ = setup.add(params, setup.zeros, batch)
    # Parts with different numbers of answer tokens: a mean of the parts' means would differ.
    first, second = only(batch, slice(0, 1)), only(batch, slice(1, CONTEXTS))
    assert 0 < first.loss_weights.sum() < second.loss_weights.sum()
    parts, _ = setup.add(params, setup.add(params, setup.zeros, first)[0], second)
    assert parts.answer_tokens == batch.loss_weights.sum()
    _, metrics_whole = setup.apply(setup.state, whole)
    _, metrics_parts = setup.apply(setup.state, parts)
    # 1e-5: sums of float32 numbers in another order.
    np.testing.assert_allclose(metrics_parts["loss"], metrics_whole["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics_parts["grad_norm"], metrics_whole["grad_norm"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(whole.grads), jax.tree.leaves(parts.grads), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()))


def test_the_loss_counts_answer_tokens_only(setup: Setup) -> None:
    batch = random_batch(1)
    sums, rows = setup.add(setup.state.params, setup.zeros, batch)
    after, metrics = setup.apply(setup.state, sums)
    log_probs = np.asarray(jax.nn.log_softmax(setup.forward(setup.state.params, batch.inputs)))
    losses = -np.take_along_axis(log_probs, batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(metrics["loss"], losses[batch.loss_weights > 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(np.sum(rows.loss * batch.loss_weights.sum(axis=-1)), sums.loss, rtol=1e-6)
    assert metrics["visual_tokens"] == batch.inputs.visual_lengths.sum()
    assert metrics["text_tokens"] == batch.inputs.text_lengths.sum()
    correct = (np.argmax(log_probs, axis=-1) == batch.targets)[batch.loss_weights > 0].mean()
    np.testing.assert_allclose(metrics["token_accuracy"], correct, rtol=1e-6)
    assert after.step == 1
    moved = jax.tree.map(lambda new, old: bool((new != old).any()), after.params, setup.state.params)
    assert moved["embed_tokens"]["embedding"]


def test_a_step_that_is_not_finite_leaves_the_state_alone(setup: Setup) -> None:
    batch = random_batch(2)
    batch.loss_weights[1, 0, -1] = np.nan
    sums, rows = setup.add(setup.state.params, setup.zeros, batch)
    after, metrics = setup.apply(setup.state, sums)
    assert not metrics["finite"]
    assert np.argwhere(~np.isfinite(rows.loss)).tolist() == [[1, 0]]
    jax.tree.map(np.testing.assert_array_equal, after, setup.state)


def test_a_step_without_answer_tokens_is_finite(setup: Setup) -> None:
    batch = random_batch(3)
    batch.loss_weights[:] = 0
    _, metrics = setup.apply(setup.state, setup.add(setup.state.params, setup.zeros, batch)[0])
    assert metrics["finite"]
    assert metrics["loss"] == 0


def test_options_are_chosen_by_their_first_token(setup: Setup) -> None:
    batch = random_eval_batch(2)
    logits = np.asarray(setup.forward(setup.state.params, batch.inputs))[:, :, TEXT - 2]
    chosen = setup.choose(setup.state.params, batch)
    np.testing.assert_array_equal(chosen["predicted"], np.argmax(logits[..., [3, 7]], axis=-1))
    np.testing.assert_array_equal(chosen["answer"], batch.answer_option)
    assert chosen["answer"][-1, -1] == -1


def test_bfloat16_keeps_parameters_gradients_and_losses_in_float32() -> None:
    experiment = tiny_experiment(dtype="bfloat16")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    state = jax.eval_shape(lambda: init_state(experiment.model, experiment.train, 0, optax.adamw(1e-3)))
    losses = make_losses(experiment.model, experiment.train, mesh)
    sums, _ = jax.eval_shape(
        functools.partial(accumulate, losses, experiment.train), state.params, None, random_batch(4)
    )
    floats = [leaf for leaf in jax.tree.leaves((state, sums)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
