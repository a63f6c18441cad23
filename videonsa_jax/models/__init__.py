"""The model: vision tower, decoder on two streams, and the whole."""

from videonsa_jax.models.videonsa import Output, VideoNSA

__all__ = ["Output", "VideoNSA"]
