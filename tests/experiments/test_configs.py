import jax
import pytest
from flax import nnx

from experiments import configs
from experiments.configs import registry
from videonsa_jax import VideoNSA
from videonsa_jax.training.config import Experiment

EXPECTED = ("nsa_video", "dense_video", "nsa_video_small", "dense_video_small", "text_only_small", "nsa_video_7b")


def test_the_documented_names_are_there() -> None:
    assert set(EXPECTED) <= set(configs.names())


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_says_how_to_run_it(name: str) -> None:
    experiment = configs.get(name)
    assert experiment.name == name
    assert len(configs.summary(name)) < 120
    assert f"python -m experiments.train --config={name}" in registry._CONFIGS[name].__doc__
    assert "Hardware: " in registry._CONFIGS[name].__doc__


@pytest.mark.parametrize(("name", "millions"), [("nsa_video", 1), ("nsa_video_small", 30)])
def test_the_models_have_the_stated_sizes(name: str, millions: int) -> None:
    model = nnx.eval_shape(lambda: VideoNSA(configs.get(name).model, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert round(count / 1e6) == millions


def test_the_paper_config_is_the_papers() -> None:
    experiment = configs.get("nsa_video_7b")
    data, optimizer, train = experiment.data, experiment.optimizer, experiment.train
    assert data.contexts_per_batch * data.questions_per_context * train.accumulation == 32
    assert (data.fps, data.max_frames, data.max_pixels, data.max_visual_tokens) == (4.0, 550, 50_176, 36_000)
    assert (optimizer.learning_rate, optimizer.warmup_ratio, optimizer.warmup_start) == (1e-6, 0.1, 1e-5)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.max_grad_norm) == (0.9, 0.999, 0.01, 1)
    nsa = experiment.model.nsa
    assert (nsa.block_size, nsa.block_count, nsa.window_size) == (64, 32, 256)


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))

    def nsa_video() -> Experiment:
        """Another one of that name."""
        return Experiment()

    with pytest.raises(ValueError, match=r"'nsa_video' is registered twice: in experiments\.configs\.clips and "):
        registry.register(nsa_video)


def test_an_unknown_name_gets_the_nearest_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown config 'nsa_vidio'; did you mean nsa_video"):
        configs.get("nsa_vidio")


def test_fields_that_must_be_given_are_found() -> None:
    missing = configs.missing_fields(configs.get("nsa_video_7b"))
    assert missing == ["pretrained", "data.source", "data.tokenizer"]
    assert configs.missing_fields(configs.get("nsa_video")) == []
