"""Weights that come from elsewhere: a run's start from a Hugging Face folder, and a finished run's model."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from videonsa_jax.checkpoints import hf_config
from videonsa_jax.checkpoints.hf import load_model
from videonsa_jax.configs import ModelConfig
from videonsa_jax.models import VideoNSA
from videonsa_jax.training import checkpoints
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.export import model_of_state
from videonsa_jax.training.optimizer import make_optimizer
from videonsa_jax.training.step import Params, init_state


def _check_same_model(folder: str, found: ModelConfig, expected: ModelConfig) -> None:
    for part in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(expected, part.name), getattr(found, part.name)
        if ours == theirs:
            continue
        if not dataclasses.is_dataclass(ours) or not dataclasses.is_dataclass(theirs):
            raise ValueError(f"{folder}: model.{part.name} is {theirs}, expected the experiment's {ours}")
        for field in dataclasses.fields(ours):
            here, there = getattr(ours, field.name), getattr(theirs, field.name)
            if here != there:
                name = f"model.{part.name}.{field.name}"
                raise ValueError(f"{folder}: {name} is {there}, expected the experiment's {here}")


def pretrained_params(experiment: Experiment, shardings: Any) -> Params:
    """The parameters that a run starts from, float32, on the run's devices.

    Gates that the folder does not have are initialised; the experiment's `model.nsa` says how they are run.

    Args:
      experiment: its `pretrained` is a local Hugging Face folder, its `model` what that folder must hold.
      shardings: of the parameters, on the run's mesh.

    Raises:
      CheckpointError: the folder cannot be read.
      ValueError: it holds another model than the experiment's.
    """
    folder, nsa = Path(experiment.pretrained), experiment.model.nsa
    found, _ = hf_config.choose_nsa(folder, hf_config.read_config(folder), True, nsa)
    _check_same_model(experiment.pretrained, found, experiment.model)
    model = load_model(folder, dtype="float32", nsa=nsa, mesh=jax.tree.leaves(shardings)[0].mesh)
    return jax.device_put(nnx.to_pure_dict(nnx.state(model, nnx.Param)), shardings)


def trained_model(experiment: Experiment, workdir: Path) -> VideoNSA:
    """The model of a run's last checkpoint, float32 parameters (masters where there are any) on the first device.

    Args:
      experiment: what the run was told.
      workdir: folder of the run.

    Raises:
      ValueError: there is no checkpoint, or it is of another experiment.
    """
    train = experiment.train
    optimizer = make_optimizer(experiment.optimizer, train.steps, train.param_dtype)
    shapes = jax.eval_shape(lambda: init_state(experiment.model, train, 0, optimizer))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with checkpoints.open_checkpoints(workdir, train.keep) as manager:
        step = manager.latest_step()
        if step is None:
            raise ValueError(f"{workdir}: holds no checkpoint, expected the folder of a run of experiments.train")
        checkpoints.check_same_config(manager, step, experiment)
        state, _ = checkpoints.restore(manager, step, shapes, jax.tree.map(lambda _: here, shapes))
    return model_of_state(experiment, state)
