"""What is done with a finished run: export as a Hugging Face folder, start from it, measure its selection."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import configs, export, measure_selection, train
from experiments.overrides import apply_overrides
from videonsa_jax.checkpoints.hf import load_model
from videonsa_jax.models import VideoNSA
from videonsa_jax.training.mesh import make_mesh, state_shardings
from videonsa_jax.training.pretrained import pretrained_params, trained_model

SETTINGS = {
    "train.steps": 1,
    "data.clips.train_clips": 4,
    "data.clips.heldout_clips": 4,
    "data.clips.seconds": "12",
    "data.contexts_per_batch": 2,
    "data.buckets": 96,
    "model.vision.depth": 1,
    "model.vision.fullatt_block_indexes": "0",
    "model.text.num_hidden_layers": 3,
}


def command(folder: Path, workdir: str = "run", **changes: object) -> list[str]:
    settings = SETTINGS | {"data.cache_dir": folder / "datasets"} | changes
    chosen = [f"--set={path}={value}" for path, value in settings.items()]
    return ["--config=nsa_video", f"--workdir={folder / workdir}", *chosen]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a finished run, `run`, and its export, `model`."""
    jax.devices()  # `train.main` must not split the CPU into devices for the tests that follow
    folder = tmp_path_factory.mktemp("after_training")
    assert train.main(command(folder, **{"train.export": "bfloat16"})) == 0
    assert export.main([*command(folder), f"--out={folder / 'model'}"]) == 0
    return folder


def parameters(model: VideoNSA) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def experiment_of(arguments: list[str]):
    return apply_overrides(configs.get("nsa_video"), [a.removeprefix("--set=") for a in arguments[2:]])


def test_an_exported_model_is_the_trained_one(folder: Path) -> None:
    trained = parameters(trained_model(experiment_of(command(folder)), folder / "run"))
    exported = parameters(load_model(folder / "model", dtype="float32"))
    assert exported.keys() == trained.keys()
    for name, value in trained.items():
        np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_a_run_exports_its_model_when_it_is_told_to(folder: Path) -> None:
    trained = parameters(trained_model(experiment_of(command(folder)), folder / "run"))
    exported = parameters(load_model(folder / "run" / "export", dtype="bfloat16"))
    for name, value in trained.items():
        np.testing.assert_array_equal(exported[name], value.astype(exported[name].dtype), err_msg=name)
    by_command = {path.name for path in (folder / "model").iterdir()}
    assert {path.name for path in (folder / "run" / "export").iterdir()} == by_command


def test_a_run_starts_from_an_exported_model(folder: Path) -> None:
    arguments = command(folder, "again", pretrained=folder / "model")
    experiment = experiment_of(arguments)
    exported = load_model(folder / "model", dtype="float32")
    state = nnx.to_pure_dict(nnx.state(exported, nnx.Param))
    params = pretrained_params(experiment, state_shardings(jax.eval_shape(lambda: state), make_mesh(experiment.mesh)))
    jax.tree.map(np.testing.assert_array_equal, params, state)
    assert train.main(arguments) == 0
    # One step of AdamW changes no parameter by much more than the learning rate, 5e-4.
    again = parameters(trained_model(experiment, folder / "again"))
    moved = max(np.abs(value - again[name]).max() for name, value in parameters(exported).items())
    assert 0 < moved < 2e-3


def test_a_folder_with_another_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"pretrained": folder / "model", "model.text.rope_theta": 5000.0}
    assert train.main(command(folder, "wrong", **wrong)) == 2
    assert "model.text.rope_theta is 10000.0, expected the experiment's 5000.0" in capsys.readouterr().err


def test_selection_is_measured_by_layer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure_selection.main([*command(folder), "--clips=3"]) == 0
    assert "u8/n" in capsys.readouterr().out
    result = json.loads((folder / "run" / "selection.json").read_text())
    assert (result["clips"], len(result["union_over_n_by_layer"])) == (3, 2)
    for layer in result["union_over_n_by_layer"]:
        assert 1 <= layer["8"] <= layer["16"] <= layer["32"] <= 96 / 4 / 5
        assert layer["64"] is None, "96 tokens hold no tile of 64 in which every query chooses"
    with np.load(folder / "run" / "selection.npz", allow_pickle=False) as saved:
        assert saved["layer1/query"].shape == (96, 1, 4, 32)
        assert saved["layer0/block_indices"].max() < 96 / 4


def test_a_run_without_a_checkpoint_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([*command(folder, "empty"), f"--out={folder / 'other'}"]) == 2
    assert "empty: holds no checkpoint, expected the folder of a run of experiments.train" in capsys.readouterr().err
    assert not (folder / "other").exists()
