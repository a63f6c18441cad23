"""VideoNSA in JAX: Qwen2.5-VL whose video tokens use trainable Native Sparse Attention."""

import importlib
from typing import TYPE_CHECKING

from videonsa_jax import configs
from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig
from videonsa_jax.streams import Batch, Visual, split_streams

if TYPE_CHECKING:
    from videonsa_jax.checkpoints import CheckpointError, load_pretrained, save_pretrained
    from videonsa_jax.generation import EncodedVisual, encode_visual, generate
    from videonsa_jax.models import Output, VideoNSA
    from videonsa_jax.processor import Processor, load_processor, make_processor, save_processor

__all__ = [
    "Batch",
    "CheckpointError",
    "EncodedVisual",
    "ModelConfig",
    "NSAConfig",
    "Output",
    "Processor",
    "TextConfig",
    "VideoNSA",
    "VisionConfig",
    "Visual",
    "configs",
    "encode_visual",
    "generate",
    "load_pretrained",
    "load_processor",
    "make_processor",
    "save_pretrained",
    "save_processor",
    "split_streams",
]

_DEFINED_IN = {
    "CheckpointError": "videonsa_jax.checkpoints",
    "EncodedVisual": "videonsa_jax.generation",
    "Output": "videonsa_jax.models",
    "Processor": "videonsa_jax.processor",
    "VideoNSA": "videonsa_jax.models",
    "encode_visual": "videonsa_jax.generation",
    "generate": "videonsa_jax.generation",
    "load_pretrained": "videonsa_jax.checkpoints",
    "load_processor": "videonsa_jax.processor",
    "make_processor": "videonsa_jax.processor",
    "save_pretrained": "videonsa_jax.checkpoints",
    "save_processor": "videonsa_jax.processor",
}


def __getattr__(name: str) -> object:
    # Imported on first use: loader processes import this package too, and have no use for flax and the kernels.
    if name in _DEFINED_IN:
        return getattr(importlib.import_module(_DEFINED_IN[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
