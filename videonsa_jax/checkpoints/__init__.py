"""Qwen2.5-VL and VideoNSA checkpoints as transformers writes them: read, written, and their configuration."""

from videonsa_jax.checkpoints.errors import CheckpointError
from videonsa_jax.checkpoints.hf import load_model, load_pretrained, save_model, save_pretrained

__all__ = ["CheckpointError", "load_model", "load_pretrained", "save_model", "save_pretrained"]
