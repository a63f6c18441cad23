"""Rematerialisation policies: the same gradients, what is computed again, and what is kept."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import model_cases
import pytest
from jaxpr_reading import every_equation
from model_cases import assert_close, jit, make_batch, small_config, words

from videonsa_jax.models import VideoNSA
from videonsa_jax.models.attention import AttentionOptions, visibility
from videonsa_jax.models.decoder import DecoderLayer
from videonsa_jax.models.layers import scan_stack
from videonsa_jax.models.remat import REMATS, checkpointed
from videonsa_jax.streams import Batch, Visual


@pytest.fixture(scope="module")
def batch() -> Batch:
    batch = make_batch([[[words(4, 1), Visual((3, 3, 2), seconds_per_grid=1.0), words(3, 3)]]])
    return jax.tree.map(jnp.asarray, batch)


def build(remat: str) -> VideoNSA:
    """One layer under each policy: a vision block and a decoder layer."""
    config = small_config()
    vision = dataclasses.replace(config.vision, depth=1, fullatt_block_indexes=(0,))
    text = dataclasses.replace(config.text, num_hidden_layers=2)
    return model_cases.build(dataclasses.replace(config, vision=vision, text=text), remat=remat)


def loss(model: VideoNSA, batch: Batch, attention: str) -> jax.Array:
    """A number that depends on both streams behind those layers."""
    hidden = model.embed_visual(batch), model.embed_tokens(batch.text_tokens)
    places, options = visibility(batch, model.config.text), AttentionOptions(attention)

    def apply(layer: DecoderLayer, hidden: tuple, _: None) -> tuple:
        return layer(hidden, places, options)

    visual, text = scan_stack(apply, model.decoder.layers, hidden, remat=model.decoder.remat)
    return jnp.sum(visual**2) + jnp.sum(text**2)


def work_and_bytes(batch: Batch, remat: str, attention: str) -> tuple[Counter, int]:
    """How often a loss' gradient multiplies matrices and chooses blocks, and the bytes it keeps between the passes.

    Products of attention have batch axes (contexts and heads), products with weights have none.
    """

    def both_passes(model: VideoNSA) -> tuple:
        value, pullback = jax.vjp(lambda model: loss(model, batch, attention), model)
        return pullback, pullback(jnp.ones_like(value))

    jaxpr, (kept, _) = jax.make_jaxpr(both_passes, return_shape=True)(build(remat))
    work = Counter()
    for equation in every_equation(jaxpr):
        if equation.primitive.name == "dot_general":
            batch_axes = equation.params["dimension_numbers"][1]
            work["attention" if batch_axes[0] else "weights"] += 1
        work["choice"] += equation.primitive.name == "top_k"
    return work, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_a_policy_computes_again_what_its_name_says_and_keeps_the_rest(batch: Batch, attention: str) -> None:
    work, kept = {}, {}
    for remat in REMATS:
        work[remat], kept[remat] = work_and_bytes(batch, remat, attention)
    assert work["none"]["choice"] == (attention == "nsa")
    assert work["full"]["attention"] > work["none"]["attention"]
    assert work["full"]["weights"] > work["none"]["weights"]
    assert work["full"]["choice"] == 2 * work["none"]["choice"]
    assert work["attention_outputs"]["attention"] == work["none"]["attention"]
    assert work["attention_outputs"]["choice"] == work["none"]["choice"]
    assert work["none"]["weights"] < work["attention_outputs"]["weights"] < work["full"]["weights"]
    assert work["minimal"]["weights"] == work["none"]["weights"]
    assert work["none"]["attention"] < work["minimal"]["attention"] <= work["full"]["attention"]
    assert work["minimal_and_attention_outputs"] == work["none"]

    assert kept["full"] < kept["minimal"] < kept["none"]
    assert kept["full"] < kept["attention_outputs"] < kept["minimal_and_attention_outputs"] < kept["none"]


def test_policies_change_no_gradient(batch: Batch) -> None:
    gradients = {remat: jit(jax.grad(loss), static_argnums=2)(build(remat), batch, "nsa") for remat in REMATS}
    for remat in REMATS[1:]:
        # 2e-5: the same float32 numbers, fused and summed in another order.
        assert_close(gradients[remat], gradients["none"], 2e-5)


def test_the_vision_tower_may_have_a_policy_of_its_own() -> None:
    for vision_remat, expected in ((None, "full"), ("minimal", "minimal")):
        model = model_cases.build(small_config(), remat="full", vision_remat=vision_remat)
        assert (model.visual.remat, model.decoder.remat) == (expected, "full")


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="remat is 'some', expected one of none, full, minimal, attention_outputs"):
        checkpointed(jnp.sin, "some", prevent_cse=True)
