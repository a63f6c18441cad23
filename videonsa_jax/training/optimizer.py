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
      config: peak, share of the steps spent warming up, first and last shares of the peak.
      steps: optimiser steps of the whole run.

    Returns:
      A function of the number of steps done.
    """
    peak = config.learning_rate
    warmup_steps = round(config.warmup_ratio * steps)
    if warmup_steps == 0:
        return optax.cosine_decay_schedule(peak, steps, alpha=config.final_ratio)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak * config.warmup_start,
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=peak * config.final_ratio,
    )


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
