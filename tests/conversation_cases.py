"""A small model with its processor, and conversations for them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import build, small_config
from small_videos import write_tokenizer
from tokenizers import Tokenizer

from videonsa_jax.configs import ModelConfig
from videonsa_jax.models import VideoNSA
from videonsa_jax.processor import Processor, make_processor

# Frames of 8 x 12 pixels are 2 x 3 tokens of 4 x 4 pixels.
SMALL_PIXELS = {"min_pixels": 16, "max_pixels": 96}


@pytest.fixture(scope="module", autouse=True)
def little_optimisation():
    """For modules that import it: their tests compile much and compute little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def config_with(vocabulary: int = 400, **nsa: object) -> ModelConfig:
    config = small_config(**nsa)
    return dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=vocabulary))


def small_processor(folder: Path, config: ModelConfig | None = None) -> Processor:
    path = write_tokenizer(folder / "tokenizer.json")
    return make_processor(Tokenizer.from_file(str(path)), config or config_with())


def lively_model(config: ModelConfig | None = None, seed: int = 1) -> VideoNSA:
    """A model whose answers depend on what it is shown and asked: attention is sharp and writes much."""
    graphdef, state = nnx.split(build(config or config_with(), seed))
    for layer in (state["decoder"]["layers"], state["decoder"]["last_layer"]):
        for name, factor in (("q_proj", 3), ("k_proj", 3), ("o_proj", 6)):
            kernel = layer["self_attn"][name]["kernel"]
            kernel[...] = factor * jnp.asarray(kernel[...])
    return nnx.merge(graphdef, state)


def frames(count: int, seed: int, height: int = 8, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def clip(count: int, seed: int, **fields: object) -> dict:
    return {"type": "video", "video": frames(count, seed), **fields}


def image(seed: int, height: int = 12, width: int = 8) -> dict:
    return {"type": "image", "image": frames(1, seed, height, width)[0]}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def ask(*content: dict | str) -> list[dict]:
    items = [text(item) if isinstance(item, str) else item for item in content]
    return [{"role": "user", "content": items}]
