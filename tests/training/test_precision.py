"""Parameters in bfloat16 with float32 masters, and moments in bfloat16."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fakes import random_batch, tiny_experiment

from videonsa_jax.training import checkpoints
from videonsa_jax.training.config import MeshConfig, OptimizerConfig, TrainConfig
from videonsa_jax.training.mesh import make_mesh
from videonsa_jax.training.optimizer import Masters, Rounded, make_optimizer, round_stochastically
from videonsa_jax.training.pretrained import trained_model
from videonsa_jax.training.step import (
    TrainState,
    accumulate,
    apply_gradients,
    exact_params,
    init_state,
    make_losses,
    start_state,
)

PAPER_RATE = 1e-6
BFLOAT16 = TrainConfig(param_dtype="bfloat16")


def small_params() -> dict:
    draw = np.random.default_rng(0)
    return {"layer": {"kernel": jnp.asarray(1 + draw.random((8, 16)), jnp.float32), "bias": jnp.ones(16)}}


def config(name: str, **options: object) -> OptimizerConfig:
    return OptimizerConfig(
        name=name, **({"learning_rate": PAPER_RATE, "warmup_ratio": 0.0, "weight_decay": 0.0} | options)
    )


def run_steps(optimizer: optax.GradientTransformation, params: dict, opt_state: object, steps: int) -> tuple:
    # Muon takes gradients of full rank: what it makes of a vanishing singular value is the rounding.
    draw = np.random.default_rng(1)
    grads = jax.tree.map(lambda leaf: jnp.asarray(draw.standard_normal(leaf.shape), leaf.dtype), params)

    def step(_: int, carry: tuple) -> tuple:
        updates, opt_state = optimizer.update(grads, carry[1], carry[0])
        return optax.apply_updates(carry[0], updates), opt_state

    return jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))((params, opt_state))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_papers_learning_rate_moves_bfloat16_parameters_with_masters_only(name: str) -> None:
    start = small_params()
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start)
    plain = make_optimizer(config(name), steps=10**6)
    params, _ = run_steps(plain, rounded, plain.init(rounded), 20)
    jax.tree.map(np.testing.assert_array_equal, params, rounded)

    optimizer = make_optimizer(config(name), 10**6, "bfloat16")
    state = start_state(optimizer, BFLOAT16, start)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    params, opt_state = run_steps(optimizer, state.params, state.opt_state, 20)
    reference, _ = run_steps(plain, start, plain.init(start), 20)
    assert not np.array_equal(opt_state.params["layer"]["kernel"], start["layer"]["kernel"])
    # As if all were in float32, of whose numbers near 2 an ulp is 2.4e-7: one rounding apart at most.
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-7), opt_state.params, reference)
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), opt_state.params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    params, _ = run_steps(optimizer, params, opt_state, 2000)  # 0.002, a quarter of the distance of bfloat16 numbers
    moved = np.mean(np.asarray(params["layer"]["kernel"] != rounded["layer"]["kernel"]))
    assert 0.01 < moved < 0.6  # about the movement's share of that distance; Muon's is a fifth of AdamW's


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_in_bfloat16_follow_those_in_float32(name: str) -> None:
    params = small_params()
    wide, narrow = (make_optimizer(config(name, moment_dtype=d), 10**6) for d in ("float32", "bfloat16"))
    expected, _ = run_steps(wide, params, wide.init(params), 20)
    actual, state = run_steps(narrow, params, narrow.init(params), 20)
    assert isinstance(state, Rounded)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16]
    # AdamW: two for each parameter. Muon has one for its matrix.
    assert len(moments) == {"adamw": 4, "muon": 3}[name]
    # A moment's relative error is 2^-7 at most, float32's of the sum 2^-24 a step; of parameters near 1 with that ulp,
    # seeds differ by a few.
    moved = jax.tree.map(lambda one, start: float(jnp.abs(one - start).max()), expected, params)
    for one, other, far in zip(*map(jax.tree.leaves, (actual, expected, moved)), strict=True):
        assert far > 2e-6
        np.testing.assert_allclose(one, other, rtol=0, atol=far / 16 + 20 * 2**-24)


def test_a_bfloat16_second_moment_falls_as_it_should() -> None:
    """Rounded to the nearest, it would stay where it is: a step takes a thousandth of it away."""
    optimizer = make_optimizer(config("adamw", moment_dtype="bfloat16"), 10**6)
    params = {"kernel": jnp.zeros((64, 64))}
    _, state = optimizer.update({"kernel": jnp.ones((64, 64)) / 64}, optimizer.init(params), params)
    second = state.rule[1][0].nu["kernel"].astype(jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = jax.jit(
        lambda state: jax.lax.fori_loop(0, 300, lambda _, now: optimizer.update(zeros, now, params)[1], state)
    )(state)
    ratio = float(jnp.mean(state.rule[1][0].nu["kernel"].astype(jnp.float32)) / jnp.mean(second))
    # The mean of 4096 entries, each off by about 2^-9 x sqrt(300) = 3 percent at random.
    np.testing.assert_allclose(ratio, 0.999**300, rtol=0.005)
    assert (second.astype(jnp.bfloat16) * jnp.bfloat16(0.999) == second.astype(jnp.bfloat16)).all()


def test_stochastic_rounding_has_the_right_mean_and_keeps_what_needs_none() -> None:
    x = jnp.full(2**14, 1 + 2**-7 * 0.25, jnp.float32)
    rounded = round_stochastically(x, jax.random.key(1)).astype(jnp.float32)
    assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
    np.testing.assert_allclose((rounded > 1).mean(), 0.25, atol=0.02)  # 6 standard deviations
    exact = jnp.asarray([0.0, -3.5, jnp.inf, 2.0**-100], jnp.float32)
    np.testing.assert_array_equal(round_stochastically(exact, jax.random.key(2)).astype(jnp.float32), exact)


def test_a_whole_step_in_bfloat16_and_its_export(tmp_path: Path) -> None:
    experiment = tiny_experiment(dtype="bfloat16", param_dtype="bfloat16", accumulation=2)
    train = experiment.train
    optimizer = make_optimizer(experiment.optimizer, train.steps, train.param_dtype)
    losses = make_losses(experiment.model, train, make_mesh(MeshConfig(), jax.devices()[:1]))

    def step(state: TrainState) -> tuple:
        sums, _ = accumulate(losses, train, state.params, None, random_batch(0))
        return apply_gradients(optimizer, optax.constant_schedule(0.0), state, sums), sums

    shapes = jax.eval_shape(lambda: init_state(experiment.model, train, 0, optimizer))
    (after, _), sums = jax.eval_shape(step, shapes)
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes.params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves((shapes.opt_state, sums.grads)) if leaf.ndim} == {np.dtype("f4")}

    # Masters that bfloat16 cannot hold are what is exported.
    state = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 1 + 2**-12, leaf.dtype), shapes)
    assert isinstance(state.opt_state, Masters)
    with checkpoints.open_checkpoints(tmp_path, 1) as manager:
        checkpoints.save(manager, 1, state, {}, experiment)
    exported = jax.tree.leaves(trained_model(experiment, tmp_path).norm)[0]
    np.testing.assert_array_equal(exported, np.float32(1 + 2**-12))
    jax.tree.map(np.testing.assert_array_equal, exact_params(state), state.opt_state.params)


@pytest.mark.parametrize(
    ("group", "field", "old"), [("train", "param_dtype", "float32"), ("optimizer", "moment_dtype", "float32")]
)
def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path, group: str, field: str, old: str) -> None:
    experiment = tiny_experiment()
    with checkpoints.open_checkpoints(tmp_path, 1) as manager:
        checkpoints.save(manager, 1, {"step": jnp.zeros((), jnp.int32)}, {}, experiment)
        manager.wait_until_finished()
        checkpoints.check_same_config(manager, 1, experiment)
        other = dataclasses.replace(getattr(experiment, group), **{field: "bfloat16"})
        with pytest.raises(ValueError, match=rf"{group}\.{field} was '{old}' and is 'bfloat16'; use another --workdir"):
            checkpoints.check_same_config(manager, 1, dataclasses.replace(experiment, **{group: other}))


def test_a_checkpoint_from_before_these_settings_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tiny_experiment()
    config = checkpoints.config_dict(experiment)
    del config["train"]["param_dtype"], config["optimizer"]["moment_dtype"]
    monkeypatch.setattr(checkpoints, "config_dict", lambda _: config)
    with checkpoints.open_checkpoints(tmp_path, 1) as manager:
        checkpoints.save(manager, 1, {"step": jnp.zeros((), jnp.int32)}, {}, experiment)
        manager.wait_until_finished()
        monkeypatch.undo()
        checkpoints.check_same_config(manager, 1, experiment)
