"""VideoNSA in JAX: Qwen2.5-VL whose video tokens use trainable Native Sparse Attention."""

from typing import TYPE_CHECKING

from videonsa_jax import configs
from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig
from videonsa_jax.streams import Batch, Visual, split_streams

if TYPE_CHECKING:
    from videonsa_jax.models import Output, VideoNSA

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


def __getattr__(name: str) -> object:
    # Imported on first use: loader processes import this package too, and have no use for flax and the kernels.
    if name in ("Output", "VideoNSA"):
        from videonsa_jax import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
