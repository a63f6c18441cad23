"""Rematerialisation policies: the same gradients, what is computed again, and what is kept."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jaxpr_reading import every_equation
from model_cases import assert_close, build, loss, loss_and_gradients, make_batch, small_config, words

from videonsa_jax.models.remat import REMATS, checkpointed
from videonsa_jax.streams import Batch, Visual


@pytest.fixture(scope="module")
def batch() -> Batch:
    batch = make_batch([[[words(4, 1), Visual((3, 3, 2), seconds_per_grid=1.0), words(n, n)] for n in (3, 5)]])
    return jax.tree.map(jnp.asarray, batch)


def work_and_bytes(batch: Batch, remat: str, attention: str) -> tuple[Counter, int]:
    """How often a loss' gradient multiplies matrices and chooses blocks, and the bytes it keeps between the passes.

    Products of attention have batch axes (contexts and heads), products with weights have none.
    """
    model = build(small_config(), remat=remat)

    def of_model(model):
        return loss(model, batch, attention, rows_share_prefix=True)

    kept = jax.eval_shape(lambda model: jax.vjp(of_model, model)[1], model)
    work = Counter()
    for equation in every_equation(jax.make_jaxpr(jax.grad(of_model))(model)):
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
    # Two stacks of layers, the vision tower's and the decoder's: what "full" computes again, the others do not.
    assert work["full"]["attention"] > work["none"]["attention"]
    assert work["full"]["weights"] > work["none"]["weights"]
    assert work["full"]["choice"] == 2 * work["none"]["choice"]
    assert work["attention_outputs"]["attention"] == work["none"]["attention"]
    assert work["attention_outputs"]["choice"] == work["none"]["choice"]
    assert work["none"]["weights"] < work["attention_outputs"]["weights"] < work["full"]["weights"]
    assert work["minimal"]["weights"] == work["none"]["weights"]
    assert work["none"]["attention"] < work["minimal"]["attention"] <= work["full"]["attention"]

    assert kept["full"] < kept["minimal"] < kept["none"]
    assert kept["full"] < kept["attention_outputs"] < kept["none"]


def test_policies_change_no_gradient(batch: Batch) -> None:
    config = small_config()
    vision = dataclasses.replace(config.vision, depth=1, fullatt_block_indexes=(0,))
    config = dataclasses.replace(config, vision=vision, text=dataclasses.replace(config.text, num_hidden_layers=2))
    expected = loss_and_gradients(build(config), batch)
    for remat in set(REMATS) - {"none"}:
        # 2e-5: the same float32 numbers, fused and summed in another order.
        assert_close(loss_and_gradients(build(config, remat=remat), batch), expected, 2e-5)


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match="remat is 'some', expected one of none, full, minimal, attention_outputs"):
        checkpointed(jnp.sin, "some", prevent_cse=True)
