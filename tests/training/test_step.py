import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fakes import CONTEXTS, TEXT, random_batch, random_eval_batch, tiny_experiment

from videonsa_jax.streams import TrainBatch, slice_batch
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.mesh import make_mesh
from videonsa_jax.training.optimizer import learning_rate, make_optimizer
from videonsa_jax.training.step import accumulate, apply_gradients, choose_options, init_state, make_forward

EXPERIMENT = tiny_experiment()


@pytest.fixture(scope="module")
def setup():
    optimizer = make_optimizer(EXPERIMENT.optimizer, EXPERIMENT.train.steps)
    schedule = learning_rate(EXPERIMENT.optimizer, EXPERIMENT.train.steps)
    state = jax.jit(lambda: init_state(EXPERIMENT.model, EXPERIMENT.train, 0, optimizer))()
    forward = make_forward(EXPERIMENT.model, EXPERIMENT.train, make_mesh(MeshConfig(), jax.devices()[:1]))
    return optimizer, schedule, state, forward


def part(batch: TrainBatch, rows: slice) -> TrainBatch:
    return TrainBatch(
        slice_batch(batch.inputs, rows), batch.targets[rows], batch.loss_weights[rows], batch.sample_ids[rows]
    )


def test_accumulation_equals_one_large_batch(setup) -> None:
    optimizer, schedule, state, forward = setup
    batch = random_batch(0)
    add = jax.jit(lambda params, sums, batch: accumulate(forward, params, sums, batch)[0])
    whole = add(state.params, None, batch)
    # Parts with different numbers of answer tokens: a mean of the parts' means would differ.
    parts = [part(batch, slice(0, 1)), part(batch, slice(1, CONTEXTS))]
    assert parts[0].loss_weights.mean() != parts[1].loss_weights.mean()
    summed = add(state.params, add(state.params, None, parts[0]), parts[1])
    assert summed.answer_tokens == batch.loss_weights.sum()
    state_whole, metrics_whole = apply_gradients(optimizer, schedule, state, whole)
    state_parts, metrics_parts = apply_gradients(optimizer, schedule, state, summed)
    # 1e-5: sums of float32 numbers in another order.
    np.testing.assert_allclose(metrics_parts["loss"], metrics_whole["loss"], rtol=1e-5)
    np.testing.assert_allclose(metrics_parts["grad_norm"], metrics_whole["grad_norm"], rtol=1e-5)
    for one, other in zip(jax.tree.leaves(whole.grads), jax.tree.leaves(summed.grads), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5 * float(jnp.abs(one).max()))
    assert int(state_whole.step) == int(state_parts.step) == 1


def test_the_loss_counts_answer_tokens_only(setup) -> None:
    optimizer, schedule, state, forward = setup
    batch = random_batch(1)
    sums, rows = accumulate(forward, state.params, None, batch)
    _, metrics = apply_gradients(optimizer, schedule, state, sums)
    log_probs = jax.nn.log_softmax(forward(state.params, batch.inputs))
    losses = -np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(metrics["loss"], losses[batch.loss_weights > 0].mean(), rtol=1e-5)
    assert rows.finite.all()
    assert metrics["visual_tokens"] == batch.inputs.visual_lengths.sum()
    assert metrics["text_tokens"] == batch.inputs.text_lengths.sum()
    correct = (np.argmax(log_probs, axis=-1) == batch.targets)[batch.loss_weights > 0].mean()
    np.testing.assert_allclose(metrics["token_accuracy"], correct, rtol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_state_alone(setup) -> None:
    optimizer, schedule, state, forward = setup
    batch = random_batch(2)
    batch.loss_weights[1, 0, -1] = np.nan
    sums, rows = accumulate(forward, state.params, None, batch)
    after, metrics = apply_gradients(optimizer, schedule, state, sums)
    assert not metrics["finite"]
    assert np.argwhere(~np.asarray(rows.finite)).tolist() == [[1, 0]]
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_a_step_without_answer_tokens_is_finite(setup) -> None:
    optimizer, schedule, state, forward = setup
    batch = random_batch(3)
    batch.loss_weights[:] = 0
    _, metrics = apply_gradients(optimizer, schedule, state, accumulate(forward, state.params, None, batch)[0])
    assert metrics["finite"]
    assert metrics["loss"] == 0


def test_options_are_chosen_by_their_first_token(setup) -> None:
    _, _, state, forward = setup
    batch = random_eval_batch(2)
    logits = np.asarray(forward(state.params, batch.inputs))[:, :, TEXT - 2]
    expected = np.argmax(logits[..., [3, 7]], axis=-1)
    chosen = choose_options(forward, state.params, batch)
    np.testing.assert_array_equal(chosen["predicted"], expected)
    np.testing.assert_array_equal(chosen["answer"], batch.answer_option)
    assert chosen["answer"][-1, -1] == -1


def test_bfloat16_keeps_parameters_gradients_and_losses_in_float32() -> None:
    experiment = tiny_experiment(dtype="bfloat16")
    optimizer = optax.adamw(1e-3)
    state = init_state(experiment.model, experiment.train, 0, optimizer)
    forward = make_forward(experiment.model, experiment.train, make_mesh(MeshConfig(), jax.devices()[:1]))
    sums, _ = accumulate(forward, state.params, None, random_batch(4))
    floats = [leaf for leaf in jax.tree.leaves((state, sums)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
