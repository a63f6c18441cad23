"""AdamW or Muon, with linear warm-up and cosine decay (VideoNSA, arXiv 2510.02295, App. B, uses AdamW).

Parameters kept in bfloat16 have float32 masters in the optimiser's state: near 1, bfloat16 numbers are 2^-8 apart, and
an update of the paper's learning rate, 1e-6, would round to nothing.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Int, UInt32

from videonsa_jax.training.config import OptimizerConfig
from videonsa_jax.training.mesh import path_name

# By name, not by rank: a bias or norm scale of stacked layers has two axes.
NOT_DECAYED = r"(^|/)(bias|scale)$"
# Muon is for maps between hidden states: not the first layer's pixels, nor the logits (arXiv 2502.16982, section 2).
MUON = r"^(?!.*(patch_embed|lm_head)).*kernel$"
MOMENTS = r"(^|/)(mu|nu)/"  # in optax's states
# Update size that lets AdamW's learning rates and weight decay serve Muon (arXiv 2502.16982, equation 4).
_MUON_RMS = 0.2


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step.

    Args:
      config: peak, shares of the steps spent warming up and decaying, first and last shares of the peak.
      steps: optimiser steps of the whole run.

    Returns:
      A function of the number of steps done.
    """
    peak = config.learning_rate
    warmup_steps = round(config.warmup_ratio * steps)
    decay_start = max(warmup_steps, steps - round(config.decay_ratio * steps))
    warm_up = optax.linear_schedule(peak * config.warmup_start, peak, warmup_steps)
    decay = optax.cosine_decay_schedule(peak, max(steps - decay_start, 1), alpha=config.final_ratio)
    return optax.join_schedules([warm_up, optax.constant_schedule(peak), decay], boundaries=[warmup_steps, decay_start])


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: matrices, not norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: re.search(NOT_DECAYED, path_name(path)) is None, params)


def muon_dimensions(params: Any) -> Any:
    """The input and output axes of the parameters that Muon updates, the last two, and None for the others."""

    def of_leaf(path: tuple[Any, ...], leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if re.search(MUON, path_name(path)) is None:
            return None
        return optax.contrib.MuonDimensionNumbers(reduction_axis=leaf.ndim - 2, output_axis=leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


class Masters(NamedTuple):
    """State of `keep_masters`.

    Attributes:
      params: the parameters in float32.
      rule: state of the rule that moves them.
    """

    params: Any
    rule: Any


def keep_masters(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a rule to float32 copies of the parameters, of which the parameters become the rounded values.

    `init` takes the parameters before they are rounded.
    """

    def in_float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def init(params: Any) -> Masters:
        masters = in_float32(params)
        return Masters(masters, rule.init(masters))

    def update(grads: Any, state: Masters, params: Any) -> tuple[Any, Masters]:
        updates, rule_state = rule.update(in_float32(grads), state.rule, state.params)
        masters = optax.apply_updates(state.params, updates)
        # `optax.apply_updates` adds in float32 and then rounds. p + (m - p) is m: the difference of near numbers is
        # exact (Sterbenz), and that of others is off by a rounding that does not reach the masters.
        return jax.tree.map(lambda master, param: master - param.astype(jnp.float32), masters, params), Masters(
            masters, rule_state
        )

    return optax.GradientTransformation(init, update)


class Rounded(NamedTuple):
    """State of `keep_moments_in_bfloat16`.

    Attributes:
      count: updates so far; seeds the rounding.
      rule: state of the rule, its moments in bfloat16.
    """

    count: Int[Array, ""]
    rule: Any


def round_stochastically(x: Float32[Array, "*S"], key: Array) -> BFloat16[Array, "*S"]:
    """Rounds up or down, to either neighbour the more often the nearer it is: the mean of many roundings is x."""
    bits = (jax.lax.bitcast_convert_type(x, jnp.uint32) + _noise(x.shape, key)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _noise(shape: tuple[int, ...], key: Array) -> UInt32[Array, "*S"]:
    """16 bits for each element, of its place and the key.

    An integer hash (the constants are those of Chris Wellons' hash-prospector): JAX's generator takes some hundred
    operations a number, for two moments of each parameter more time than the whole update takes to read and write.
    """
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    mixed = place ^ jax.random.bits(key, (), jnp.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return mixed >> 16


def keep_moments_in_bfloat16(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps a rule's first and second moments in bfloat16; it computes with them in float32.

    They are rounded stochastically: to the nearest, a second moment could not fall, for 1 - beta2 of it (a thousandth)
    is less than half the distance of two bfloat16 numbers.
    """

    def map_moments(function: Callable[[Array, int], Array], state: Any) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        mapped = [
            function(leaf, place) if re.search(MOMENTS, path_name(path)) else leaf
            for place, (path, leaf) in enumerate(leaves)
        ]
        return jax.tree.unflatten(structure, mapped)

    def init(params: Any) -> Rounded:
        state = map_moments(lambda leaf, _: leaf.astype(jnp.bfloat16), rule.init(params))
        return Rounded(jnp.zeros((), jnp.int32), state)

    def update(grads: Any, state: Rounded, params: Any) -> tuple[Any, Rounded]:
        before = map_moments(lambda leaf, _: leaf.astype(jnp.float32), state.rule)
        updates, after = rule.update(grads, before, params)
        key = jax.random.fold_in(jax.random.key(0), state.count)
        rounded = map_moments(lambda leaf, place: round_stochastically(leaf, jax.random.fold_in(key, place)), after)
        return updates, Rounded(state.count + 1, rounded)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig, steps: int, param_dtype: DTypeLike = "float32"
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon with AdamW for the rest.

    Args:
      config: rates, and the dtype of the moments.
      steps: optimiser steps of the whole run.
      param_dtype: of the parameters. If it is not float32, the state holds float32 masters; see `keep_masters`.
    """
    rate = learning_rate(config, steps)
    if config.name == "muon":
        rule = optax.contrib.muon(
            rate,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=_MUON_RMS,
        )
    else:
        rule = optax.adamw(
            rate,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        )
    optimizer = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
    if config.moment_dtype == "bfloat16":
        optimizer = keep_moments_in_bfloat16(optimizer)
    return optimizer if jnp.dtype(param_dtype) == jnp.float32 else keep_masters(optimizer)
