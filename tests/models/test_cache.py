"""Memory of the cached forward pass, from XLA's own account of a compiled step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from videonsa_jax import configs
from videonsa_jax.models import VideoNSA
from videonsa_jax.models.attention import AttentionOptions
from videonsa_jax.models.cache import Piece, empty_cache

PLACES, TEXT_PLACES = 8192, 64


def working_memory(layers: int, visual: int, text: int) -> int:
    """Bytes that a step needs beside weights and cache, for a piece of so many tokens."""
    config = configs.tiny()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=layers))
    model = nnx.eval_shape(lambda: VideoNSA(config, nnx.Rngs(0)))
    cache = jax.eval_shape(lambda: empty_cache(config.text, 1, 1, PLACES, TEXT_PLACES, jnp.float32))

    def integers(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.int32)

    piece = Piece(
        visual_positions=integers(3, 1, visual),
        visible_text=integers(1, visual),
        visual_offset=integers(),
        visual_lengths=integers(1),
        text_tokens=integers(1, 1, text),
        text_positions=integers(3, 1, 1, text),
        visible_visual=integers(1, 1, text),
        text_offsets=integers(1, 1),
        text_lengths=integers(1, 1),
    )
    options = AttentionOptions("nsa")

    def step(model, piece, visual, cache):
        hidden, extended = model.extend(visual, piece, cache, options)
        return hidden, extended if piece.visual_positions.shape[2] else extended.text

    stream = jax.ShapeDtypeStruct((1, visual, config.text.hidden_size), jnp.float32)
    donated = (3,) if visual else ()
    compiled = jax.jit(step, donate_argnums=donated).lower(model, piece, stream, cache).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(("visual", "text"), [(256, 0), (0, 1)])
def test_the_cache_is_never_copied(visual, text):
    """What a step needs does not grow with the number of layers, as it would by a copy of the cache."""
    of_a_layer = 2 * PLACES * 32 * 4  # keys and values of one head of 32, float32
    few, many = working_memory(6, visual, text), working_memory(14, visual, text)
    assert many - few < of_a_layer
