import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxpr_reading import every_equation
from training_fakes import random_batch, tiny_experiment

from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.frozen import PRESETS, join_params, split_params
from videonsa_jax.training.mesh import make_mesh, path_name
from videonsa_jax.training.optimizer import make_optimizer
from videonsa_jax.training.step import TrainState, accumulate, apply_gradients, exact_params, init_state, make_losses


def paths(tree: Any) -> set[str]:
    return {path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def traced(frozen: tuple[str, ...], **train: Any) -> tuple[TrainState, Any, Any]:
    """The shapes of a state and of its gradients, and the jaxpr of the gradients."""
    experiment = tiny_experiment(frozen=frozen, **train)
    optimizer = make_optimizer(experiment.optimizer, 10, experiment.train.param_dtype)
    state = jax.eval_shape(lambda: init_state(experiment.model, experiment.train, 0, optimizer))
    losses = make_losses(experiment.model, experiment.train, make_mesh(MeshConfig(), jax.devices()[:1]))
    add = functools.partial(accumulate, losses, experiment.train)
    jaxpr, shapes = jax.make_jaxpr(add, return_shape=True)(state.params, None, random_batch(0))
    return state, shapes[0].grads, jaxpr


def weight_products(jaxpr: Any) -> int:
    """Products without batch axes: with weights, and their gradients."""
    products = (eqn for eqn in every_equation(jaxpr) if eqn.primitive.name == "dot_general")
    return sum(not eqn.params["dimension_numbers"][1][0] for eqn in products)


def test_presets_part_the_model() -> None:
    experiment = tiny_experiment()
    params = jax.eval_shape(lambda: init_state(experiment.model, experiment.train, 0, optax.identity())).params
    parts = {name: paths(split_params(params, (name,))[1]) for name in PRESETS}
    assert sorted(path for part in parts.values() for path in part) == sorted(paths(params))
    assert {path.split("/")[1] for path in parts["vision"]} == {"patch_embed", "blocks"}
    assert {path.split("/")[1] for path in parts["merger"]} == {"merger"}


def test_what_is_frozen_has_neither_gradient_nor_optimizer_state() -> None:
    everything, _, whole_jaxpr = traced((), param_dtype="bfloat16")
    state, grads, jaxpr = traced(("vision", "g_proj"), param_dtype="bfloat16")
    trained, frozen = split_params(state.params, ("vision", "g_proj"))
    assert paths(state.params) == paths(everything.params)
    assert paths(grads) == paths(trained)
    assert not any(path.endswith(name) for path in paths(state.opt_state) for name in paths(frozen))
    assert all(any(path.endswith(name) for path in paths(state.opt_state)) for name in paths(trained))
    # The vision tower runs forward only. Its layer has 5 matrices with two gradients each and the patch embedding one;
    # the gates' two matrices of the stacked layer lose one each, the tower's input and they feed what is trained.
    # Each product of `layers.linear` is there twice, in the form for CPUs and in that for other devices.
    assert weight_products(whole_jaxpr) - weight_products(jaxpr) == 2 * (5 * 2 + 1 + 2)


def test_a_step_moves_what_is_trained_alone() -> None:
    params = {"visual": {"merger": {"kernel": jnp.ones((2, 2))}, "blocks": {"kernel": jnp.ones((2, 2))}}}
    trained, frozen = split_params(params, ("vision",))
    optimizer = make_optimizer(tiny_experiment().optimizer, 10, "bfloat16")
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    state = TrainState(step=jnp.zeros((), jnp.int32), params=rounded, opt_state=optimizer.init(trained))
    experiment = tiny_experiment(frozen=("vision",))

    def losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        total = sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(params))
        return jnp.full(batch.targets.shape, total), jnp.zeros(batch.targets.shape, bool)

    sums, _ = accumulate(losses, experiment.train, state.params, None, random_batch(0))
    after, metrics = apply_gradients(optimizer, optax.constant_schedule(1e-2), state, sums)
    assert metrics["finite"]
    np.testing.assert_array_equal(after.params["visual"]["blocks"]["kernel"], frozen["visual"]["blocks"]["kernel"])
    exact = exact_params(after)["visual"]
    assert (exact["merger"]["kernel"] < 1).all()
    assert exact["blocks"]["kernel"].dtype == jnp.float32
    assert paths(join_params(frozen, trained)) == paths(params)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (
            ("visoin",),
            r"train\.frozen has 'visoin', which matches no parameter, expected one of vision, merger, llm or",
        ),
        (("(",), r"train\.frozen has '\(', which is no regular expression: "),
        (("vision", "merger", "llm"), r"train\.frozen is vision, merger, llm, which leaves no parameter to train"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_told(frozen: tuple[str, ...], message: str) -> None:
    params = {"visual": {"merger": {"kernel": 0}, "blocks": {"kernel": 0}}, "norm": {"scale": 0}}
    with pytest.raises(ValueError, match=message):
        split_params(params, frozen)
