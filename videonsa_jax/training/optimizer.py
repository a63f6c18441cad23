"""AdamW or Muon, with linear warm-up and cosine decay (VideoNSA, arXiv 2510.02295, App. B, uses AdamW)."""

import re
from typing import Any

import jax
import optax
import optax.contrib

from videonsa_jax.training.config import OptimizerConfig
from videonsa_jax.training.mesh import path_name

# By name, not by rank: a bias or norm scale of stacked layers has two axes.
NOT_DECAYED = r"(^|/)(bias|scale)$"
# Muon is for maps between hidden states: not the first layer's pixels, nor the logits (arXiv 2502.16982, section 2).
MUON = r"^(?!.*(patch_embed|lm_head)).*kernel$"
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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, or Muon with AdamW for the rest; its state has the parameters' dtype."""
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
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)
