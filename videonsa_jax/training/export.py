"""A trained model as a Hugging Face folder with all that asking it needs."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from videonsa_jax.checkpoints.hf import save_pretrained
from videonsa_jax.data.pipeline import open_chat
from videonsa_jax.models import VideoNSA
from videonsa_jax.processor import load_processor, make_processor
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.step import TrainState, exact_params, make_model

EXPORT_FOLDER = "export"


def model_of_state(experiment: Experiment, state: TrainState) -> VideoNSA:
    """The model that a run's state stands for, float32 parameters (masters where there are any) where they lie."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make_model(experiment.model, experiment.train, 0)), nnx.Param)
    return nnx.merge(graphdef, exact_params(state))


def export_model(experiment: Experiment, model: VideoNSA, folder: Path, dtype: str) -> None:
    """Writes weights, config and the processor's files; the folder appears when it is whole.

    The processor's files come from the run's `pretrained` folder, or else are made from its tokenizer.

    Args:
      experiment: what the run was told.
      model: its model, float32; its parameters are cast in place.
      folder: a folder that does not exist yet, or is empty.
      dtype: of the written weights, "float32" or "bfloat16".

    Raises:
      CheckpointError: the folder is not empty, or the processor's files cannot be read.
      NotImplementedError: there are several processes.
    """
    nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), nnx.state(model, nnx.Param)))
    if experiment.pretrained:
        processor = load_processor(experiment.pretrained, experiment.model)
    else:
        processor = make_processor(open_chat(experiment.data).tokenizer, experiment.model)
    save_pretrained(model, processor, folder)
