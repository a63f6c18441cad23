"""VideoNSA in JAX: Qwen2.5-VL whose video tokens use trainable Native Sparse Attention."""

from videonsa_jax import configs
from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig
from videonsa_jax.models import Output, VideoNSA
from videonsa_jax.streams import Batch, Visual, split_streams

__all__ = [
    "Batch",
    "ModelConfig",
    "NSAConfig",
    "Output",
    "TextConfig",
    "VideoNSA",
    "VisionConfig",
    "Visual",
    "configs",
    "split_streams",
]
