"""AdamW with linear warm-up and cosine decay (VideoNSA, arXiv 2510.02295, App. B)."""

import re
from typing import Any

import jax
import optax

from videonsa_jax.training.config import OptimizerConfig
from videonsa_jax.training.mesh import path_name

# By name, not by rank: a bias or norm scale of stacked layers has two axes.
NOT_DECAYED = r"(^|/)(bias|scale)$"


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; its state has the parameters' dtype."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )
