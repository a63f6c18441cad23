import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_fakes import tiny_experiment

from videonsa_jax.training.config import OptimizerConfig
from videonsa_jax.training.mesh import path_name
from videonsa_jax.training.optimizer import decay_mask, learning_rate, make_optimizer, muon_dimensions
from videonsa_jax.training.step import init_state


def test_the_schedule_has_the_papers_shape() -> None:
    schedule = learning_rate(OptimizerConfig(), steps=1000)
    assert float(schedule(0)) == pytest.approx(1e-6 * 1e-5)
    assert float(schedule(50)) == pytest.approx(0.5e-6, rel=1e-4)  # half-way through a linear warm-up
    assert float(schedule(100)) == pytest.approx(1e-6)
    assert float(schedule(550)) == pytest.approx(0.5e-6)  # half-way down a cosine
    assert float(schedule(1000)) == pytest.approx(0.0, abs=1e-12)


def test_the_schedule_without_warm_up_starts_at_the_peak_and_ends_at_its_share() -> None:
    schedule = learning_rate(OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, final_ratio=0.1), steps=10)
    assert float(schedule(0)) == 1.0
    assert float(schedule(10)) == pytest.approx(0.1)


def test_the_schedule_may_stay_at_the_peak_before_it_decays() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.1, decay_ratio=0.2, final_ratio=0.1)
    schedule = learning_rate(config, steps=100)
    assert [round(float(schedule(step)), 3) for step in (5, 10, 50, 80)] == [0.5, 1.0, 1.0, 1.0]
    assert float(schedule(90)) == pytest.approx(0.55)  # half-way down a cosine to a tenth
    assert float(schedule(100)) == pytest.approx(0.1)


def test_weight_decay_spares_norms_and_biases() -> None:
    experiment = tiny_experiment()
    params = jax.eval_shape(lambda: init_state(experiment.model, experiment.train, 0, optax.identity())).params
    decayed = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params))}
    assert {path.rsplit("/")[-1]: value for path, value in decayed.items()} == {
        "kernel": True,
        "embedding": True,
        "scale": False,
        "bias": False,
    }
    # Stacked over layers, a bias has two axes and a norm's scale too.
    assert not decayed["decoder/layers/self_attn/q_proj/bias"]
    assert not decayed["decoder/layers/input_layernorm/scale"]


def test_decay_and_clipping_reach_the_update() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_ratio=0.0, weight_decay=0.5, max_grad_norm=1.0, beta1=0.0)
    params = {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)}
    optimizer = make_optimizer(config, steps=10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 4.0)
    np.testing.assert_array_equal(updates["bias"], 0.0)
    # Clipping: AdamW's second moment sees the clipped gradient, whose norm is 1.
    grads = jax.tree.map(lambda value: 1000 * jnp.ones_like(value), params)
    _, (_, (adam, *_)) = optimizer.update(grads, optimizer.init(params), params)
    clipped = jnp.sqrt(adam.nu["kernel"][0, 0] / (1 - config.beta2))
    np.testing.assert_allclose(clipped, 1 / np.sqrt(6), rtol=1e-4)


def test_muon_updates_the_hidden_matrices_and_adamw_the_rest() -> None:
    experiment = tiny_experiment()
    params = jax.eval_shape(lambda: init_state(experiment.model, experiment.train, 0, optax.identity())).params
    by_path = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(muon_dimensions(params))}
    names = {path.rsplit("/", 1)[0] for path in by_path}
    assert all("kernel" in name for name in names)
    assert any(name.startswith("decoder/layers/self_attn/g_proj_1") for name in names)
    assert not any("patch_embed" in name or "lm_head" in name for name in names)


def test_muon_steps_along_orthogonal_matrices_of_adamws_size() -> None:
    """All singular values of an update are about the same; its root mean square is 0.2 of the learning rate."""
    config = OptimizerConfig(name="muon", learning_rate=0.1, warmup_ratio=0.0, weight_decay=0.5)
    rng = np.random.default_rng(0)
    stacked = jnp.asarray(rng.normal(size=(3, 8, 16)), jnp.float32)
    params = {"layer": {"kernel": stacked, "bias": jnp.ones((3, 16))}, "embed": {"embedding": jnp.ones((4, 8))}}
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    optimizer = make_optimizer(config, steps=10)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    step = np.asarray(updates["layer"]["kernel"] + 0.1 * 0.5 * stacked)  # less the weight decay
    singular = np.linalg.svd(step, compute_uv=False)
    # Five Newton-Schulz steps leave singular values within about 0.7 to 1.2 of each other's mean.
    assert singular.min() > 0.6 * singular.mean()
    assert singular.max() < 1.4 * singular.mean()
    np.testing.assert_allclose(np.sqrt(np.mean(step**2)), 0.2 * 0.1, rtol=0.3)
    # Adam's first step with Nesterov momentum: b1 / (1 + b1) + 1 of the learning rate; these leaves are not decayed.
    for leaf in (updates["layer"]["bias"], updates["embed"]["embedding"]):
        np.testing.assert_allclose(np.abs(leaf), 0.1 * (0.9 / 1.9 + 1), rtol=1e-3)
