"""One optimiser step and one evaluation step, as pure functions of pytrees.

An optimiser step is `accumulate`, once per batch, then `apply_gradients`. Sums are kept until every batch of every host
has been counted and are divided once, so that accumulation equals one large batch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.examples import EvalBatch
from videonsa_jax.models import VideoNSA
from videonsa_jax.models.placement import on_mesh
from videonsa_jax.streams import ArrayLike, Batch, TrainBatch, register_pytree
from videonsa_jax.training.config import TrainConfig
from videonsa_jax.training.cross_entropy import token_losses
from videonsa_jax.training.frozen import join_params, params_like, split_params
from videonsa_jax.training.optimizer import Masters

type Params = dict[str, Any]
type Leaf = Any  # an array, its shape or its sharding: these trees are mapped to all three
type Forward = Callable[..., Float[Array, "B Q *Lt V"]]
type Losses = Callable[[Params, TrainBatch], tuple[Float[Array, "B Q Lt"], Bool[Array, "B Q Lt"]]]


@register_pytree
@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds.

    Attributes:
      step: optimiser steps done, int32 scalar.
      params: the model's parameters by path, in `train.param_dtype`.
      opt_state: optax state, with the parameters' float32 masters if they are not float32.
    """

    step: Leaf
    params: Params
    opt_state: Any


@register_pytree
@dataclass(frozen=True)
class Sums:
    """Sums over the batches of an optimiser step, over all hosts; scalars but for `grads`.

    Attributes:
      grads: gradient of `loss` in the trained parameters.
      loss: cross-entropies of the answer tokens.
      answer_tokens: how many there are.
      correct: how many of them have the largest logit.
      visual_tokens: valid tokens of the visual streams.
      text_tokens: valid tokens of the text streams.
    """

    grads: Params
    loss: Leaf
    answer_tokens: Leaf
    correct: Leaf
    visual_tokens: Leaf
    text_tokens: Leaf


def sums_like(grads: Params, scalar: Leaf) -> Sums:
    """`Sums` of these gradients, or of their shardings, with the same leaf for every scalar."""
    scalars = (field.name for field in dataclasses.fields(Sums) if field.name != "grads")
    return Sums(grads=grads, **dict.fromkeys(scalars, scalar))


@register_pytree
@dataclass(frozen=True)
class Rows:
    """Text rows of a batch, for naming those at fault.

    Attributes:
      sample_ids: as in `TrainBatch`.
      loss: mean cross-entropy of the row's answer tokens; 0 where it has none.
    """

    sample_ids: Int[ArrayLike, "B Q"]
    loss: Float[Array, "B Q"]


def make_model(model: ModelConfig, train: TrainConfig, seed: int) -> VideoNSA:
    """A model with random float32 parameters, computing in `train.dtype`."""
    return VideoNSA(
        model,
        rngs=nnx.Rngs(seed),
        dtype=jnp.dtype(train.dtype),
        param_dtype=jnp.float32,
        remat=train.remat,
        vision_remat=None if train.vision_remat == "same" else train.vision_remat,
    )


def init_state(
    model: ModelConfig, train: TrainConfig, seed: int, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; run it under `jax.jit` with the state's shardings."""
    return start_state(optimizer, train, nnx.to_pure_dict(nnx.state(make_model(model, train, seed), nnx.Param)))


def start_state(optimizer: optax.GradientTransformation, train: TrainConfig, params: Params) -> TrainState:
    """The state before the first step that starts from the float32 `params`; errors as `split_params`."""
    trained, _ = split_params(params, train.frozen)
    kept = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(train.param_dtype)), params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=kept, opt_state=optimizer.init(trained))


def exact_params(state: TrainState) -> Params:
    """The float32 parameters that a state stands for: its masters where it has any."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state.params)
    return join_params(params, state.opt_state.params) if isinstance(state.opt_state, Masters) else params


def _make_hidden(
    model: ModelConfig, train: TrainConfig, mesh: Mesh
) -> Callable[[Params, Batch], tuple[VideoNSA, Float[Array, "B Q Lt hidden"]]]:
    """The function (params, batch) -> the model with these parameters, and hidden states of the text stream."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_model(model, train, 0)), nnx.Param)
    implementation = None if train.kernel == "auto" else train.kernel

    def text_hidden(params: Params, batch: Batch) -> tuple[VideoNSA, Float[Array, "B Q Lt hidden"]]:
        network = nnx.merge(graphdef, params)
        # A record's conversation opens with its video (data/sources.py), so nothing before it differs between rows.
        hidden, _ = network.text_hidden(batch, train.attention, implementation, mesh, rows_share_prefix=True)
        return network, hidden

    return text_hidden


def make_forward(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> Forward:
    """The function (params, batch, positions=None) -> float32 logits, of every text position or of one per row."""
    text_hidden = _make_hidden(model, train, mesh)

    def forward(params: Params, batch: Batch, positions: Int[Array, "B Q"] | None = None) -> Float[Array, "B Q *Lt V"]:
        network, hidden = text_hidden(params, batch)
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[:, :, None, None], axis=2)[:, :, 0]
        return network.logits(hidden)

    return forward


def make_losses(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> Losses:
    """The function (params, batch) -> each text token's loss, and whether its target has the largest logit."""
    text_hidden = _make_hidden(model, train, mesh)

    def losses(params: Params, batch: TrainBatch) -> tuple[Float[Array, "B Q Lt"], Bool[Array, "B Q Lt"]]:
        network, hidden = text_hidden(params, batch.inputs)
        with on_mesh(mesh):
            return token_losses(hidden, network.output_weights(), jnp.asarray(batch.targets), chunk=train.loss_chunk)

    return losses


def _loss(losses: Losses, params: Params, batch: TrainBatch) -> tuple[Float[Array, ""], tuple]:
    of_tokens, correct = losses(params, batch)
    weighted = of_tokens * batch.loss_weights
    of_rows = jnp.sum(weighted, axis=-1) / jnp.maximum(jnp.sum(batch.loss_weights, axis=-1), 1)
    return jnp.sum(weighted), (jnp.sum(correct * batch.loss_weights), of_rows)


def accumulate(
    losses: Losses, train: TrainConfig, params: Params, sums: Sums | None, batch: TrainBatch
) -> tuple[Sums, Rows]:
    """Adds a batch's loss and gradient to an optimiser step's sums.

    Args:
      losses: from `make_losses`.
      train: says which parameters are trained; of several batches a step, gradients are summed in float32.
      params: the model's parameters.
      sums: of the batches before; None for the first.
      batch: of any shape; batches of one step may differ in theirs.

    Returns:
      The sums with this batch, and its rows.
    """
    trained, frozen = split_params(params, train.frozen)

    def of_trained(trained: Params) -> tuple[Float[Array, ""], tuple]:
        return _loss(losses, join_params(frozen, trained), batch)

    (loss, (correct, of_rows)), grads = jax.value_and_grad(of_trained, has_aux=True)(trained)
    if train.accumulation > 1:
        grads = jax.tree.map(lambda grad: grad.astype(jnp.float32), grads)
    own = Sums(
        grads=grads,
        loss=loss,
        answer_tokens=jnp.sum(batch.loss_weights),
        correct=correct,
        visual_tokens=jnp.sum(batch.inputs.visual_lengths),
        text_tokens=jnp.sum(batch.inputs.text_lengths),
    )
    total = own if sums is None else jax.tree.map(jnp.add, sums, own)
    return total, Rows(sample_ids=batch.sample_ids, loss=of_rows)


def apply_gradients(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    state: TrainState,
    sums: Sums,
    *,
    offloaded: bool = False,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimiser update; where the loss or the gradient is not finite, the state stays as it was.

    Args:
      optimizer: from `make_optimizer`.
      schedule: from `learning_rate`; reported only.
      state: before the step.
      sums: over the step's batches.
      offloaded: the optimiser's state arrives in host memory.

    Returns:
      The state after the step, and its metrics: loss (per answer token), grad_norm (before clipping), learning_rate,
      answer_tokens, token_accuracy, visual_tokens, text_tokens, and finite.
    """
    if offloaded:
        opt_state = jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), state.opt_state)
        state = dataclasses.replace(state, opt_state=opt_state)
    # A step whose every row was replaced has no answer token: its gradient is 0, not 0 / 0.
    count = jnp.maximum(sums.answer_tokens, 1)
    grads = jax.tree.map(lambda grad: grad / count, sums.grads)
    # In float32: of bfloat16 gradients, optax would round every leaf's sum, and the sum of those, to three digits.
    loss, grad_norm = sums.loss / count, optax.tree.norm(jax.tree.map(lambda grad: grad.astype(jnp.float32), grads))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    trained = params_like(state.params, grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, trained)
    params = join_params(state.params, optax.apply_updates(trained, updates))
    updated = TrainState(step=state.step + 1, params=params, opt_state=opt_state)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step),
        "answer_tokens": sums.answer_tokens,
        "token_accuracy": sums.correct / count,
        "visual_tokens": sums.visual_tokens,
        "text_tokens": sums.text_tokens,
        "finite": finite,
    }
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state), metrics


def choose_options(forward: Forward, params: Params, batch: EvalBatch) -> dict[str, Int[Array, "B Q"]]:
    """The option whose first token has the largest logit where the answer begins.

    Args:
      forward: from `make_forward`.
      params: the model's parameters.
      batch: questions with their options.

    Returns:
      sample_ids, predicted and answer (both indices of an option; answer is -1 for a row that only fills up).
    """
    logits = forward(params, batch.inputs, batch.answer_position)
    option_logits = jnp.take_along_axis(logits, jnp.maximum(batch.option_tokens, 0), axis=-1)
    option_logits = jnp.where(batch.option_tokens >= 0, option_logits, -jnp.inf)
    return {
        "sample_ids": batch.sample_ids,
        "predicted": jnp.argmax(option_logits, axis=-1).astype(jnp.int32),
        "answer": batch.answer_option,
    }
