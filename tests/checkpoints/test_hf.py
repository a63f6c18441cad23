"""Hugging Face folders: read and written, and what is wrong with one said in one sentence."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from model_cases import build, small_config

from videonsa_jax.checkpoints import CheckpointError, hf, load_model, safetensor_files, save_model
from videonsa_jax.checkpoints.weight_table import weights_of
from videonsa_jax.configs import ModelConfig, NSAConfig

ROOT = Path(__file__).parents[2]
INDEX = safetensor_files.INDEX


def config(tied: bool = False, **nsa: object) -> ModelConfig:
    """A small one whose head_dim is hidden_size / heads, as transformers has it."""
    base = small_config(**nsa)
    text = dataclasses.replace(base.text, head_dim=8, mrope_section=(2, 1, 1), tie_word_embeddings=tied)
    return dataclasses.replace(base, text=text)


def assert_same(found, expected):
    found, expected = (dict(nnx.to_flat_state(nnx.state(model))) for model in (found, expected))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path][...].dtype == leaf[...].dtype
        np.testing.assert_array_equal(found[path][...], leaf[...], err_msg=str(path))


@pytest.fixture(scope="module")
def model():
    return build(config())


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a good folder, to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def tensors_of(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values):
    content = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(content))


def shard(folder, monkeypatch, size=20_000):
    """Saves the folder's model again, in shards."""
    model = load_model(folder, "float32")
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(safetensor_files, "SHARD_BYTES", size)
        save_model(model, folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, dtype, tied):
    model = build(config(tied, dialect="paper", block_count=2), param_dtype=dtype, dtype=dtype)
    model.config = dataclasses.replace(model.config, mrope="int_seconds")
    save_model(model, tmp_path / "new" / "folder")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a folder that says everything has nothing to be told about
        loaded = load_model(tmp_path / "new" / "folder", dtype)
    assert_same(loaded, model)
    assert loaded.config == model.config
    assert loaded.dtype == np.dtype(dtype)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


def test_names_and_layout_are_transformers(saved, model):
    stored = tensors_of(saved)
    layers = nnx.to_pure_dict(nnx.state(model.decoder))
    for layer, ours in ((1, jax.tree.map(lambda x: x[1], layers["layers"])), (2, layers["last_layer"])):
        for name in ("q_proj", "g_proj_1", "g_proj_2"):
            key = f"model.layers.{layer}.self_attn.{name}"
            np.testing.assert_array_equal(stored[f"{key}.weight"], ours["self_attn"][name]["kernel"].T)
            np.testing.assert_array_equal(stored[f"{key}.bias"], ours["self_attn"][name]["bias"])
    vision = model.config.vision
    patch = (vision.hidden_size, 3, 2, vision.patch_size, vision.patch_size)
    assert stored["visual.patch_embed.proj.weight"].shape == patch
    block = json.loads((saved / "config.json").read_text())["videonsa"]
    assert (block["dialect"], block["block_size"], block["block_count"], block["window_size"]) == ("paper", 4, 3, 6)
    assert (block["gate_temperature"], block["init_blocks"], block["local_blocks"]) == (0.3, 0, 1)
    assert block["mrope"] == "qwen2_5_vl"


def test_the_newer_key_layout_is_read(folder, model):
    """What transformers 4.52 to 4.57 write: model.language_model.* and model.visual.*."""
    renamed = {}
    for key, tensor in tensors_of(folder).items():
        part = key.removeprefix("model.")
        newer = f"model.{key}" if key.startswith("visual.") else key if part == key else f"model.language_model.{part}"
        renamed[newer] = tensor
    assert {key.split(".")[1] for key in renamed if key != "lm_head.weight"} == {"language_model", "visual"}
    rewrite(folder, renamed)
    assert_same(load_model(folder, "float32"), model)


def test_shards_are_written_and_read(folder, model, monkeypatch):
    shard(folder, monkeypatch)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 3
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((folder / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert_same(load_model(folder, "float32"), model)


def test_float32_weights_load_as_bfloat16_and_back(folder, model):
    rounded = load_model(folder, "bfloat16")
    kernel = rounded.decoder.last_layer.mlp.up_proj.kernel[...]
    expected = np.asarray(model.decoder.last_layer.mlp.up_proj.kernel[...]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(kernel, expected)


def test_float16_weights_load(folder):
    tensors = tensors_of(folder)
    norm = tensors["model.norm.weight"].astype(np.float16)
    rewrite(folder, tensors | {"model.norm.weight": norm})
    np.testing.assert_array_equal(load_model(folder, "float32").norm.scale[...], norm.astype(np.float32))


def test_a_mesh_gets_its_slices(tmp_path):
    """In a process of its own, which has four devices."""
    command = [sys.executable, str(Path(__file__).with_name("sharded_load.py")), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


class TestNSA:
    """Which attention a folder gets."""

    def test_gates_without_a_block_are_the_published_checkpoint(self, folder, model):
        content = json.loads((folder / "config.json").read_text())
        del content["videonsa"]
        (folder / "config.json").write_text(json.dumps(content | {"block_counts": 16, "window_size": 128}))
        with pytest.warns(UserWarning, match='taken as the published checkpoint.*dialect="released", block_count=16'):
            loaded = load_model(folder, "float32")
        assert loaded.config.nsa == NSAConfig(dialect="released", block_count=16, window_size=128)
        assert loaded.config.mrope == "int_seconds"
        kernel = loaded.decoder.last_layer.self_attn.g_proj_2.kernel[...]
        np.testing.assert_array_equal(kernel, model.decoder.last_layer.self_attn.g_proj_2.kernel[...])

    def test_an_explicit_config_wins(self, folder):
        assert load_model(folder, "float32", nsa=NSAConfig(block_size=2)).config.nsa == NSAConfig(block_size=2)

    def test_none_leaves_the_gates_out(self, folder, model):
        with pytest.warns(UserWarning, match="nsa=None: the NSA gates of .* are left out"):
            loaded = load_model(folder, "float32", nsa=None)
        assert loaded.config.nsa is None
        assert not hasattr(loaded.decoder.last_layer.self_attn, "g_proj_1")

    def test_a_plain_folder_is_dense_or_gets_new_gates(self, model, tmp_path):
        plain = build(dataclasses.replace(model.config, nsa=None))
        save_model(plain, tmp_path / "plain")
        assert load_model(tmp_path / "plain", "float32").config.nsa is None
        nsa = NSAConfig(block_size=4, block_count=2, window_size=6)
        with pytest.warns(UserWarning, match="holds no NSA gates: they are initialised anew"):
            loaded = load_model(tmp_path / "plain", "float32", nsa=nsa)
        gates = loaded.decoder.layers.self_attn
        kernel = np.asarray(gates.g_proj_1.kernel[...])
        assert kernel.std() == pytest.approx(0.02, rel=0.1)  # 2 x 32 x 32 draws
        assert not np.array_equal(kernel[0], kernel[1])
        assert not gates.g_proj_1.bias[...].any()
        assert not gates.g_proj_2.bias[...].any()
        with pytest.warns(UserWarning, match='gate_init="zero"'):
            zero = load_model(tmp_path / "plain", nsa=dataclasses.replace(nsa, gate_init="zero"))
        assert not zero.decoder.last_layer.self_attn.g_proj_2.kernel[...].any()
        np.testing.assert_array_equal(
            loaded.decoder.last_layer.mlp.up_proj.kernel[...], plain.decoder.last_layer.mlp.up_proj.kernel[...]
        )

    def test_gates_that_the_block_promises_must_be_there(self, folder):
        rewrite(folder, {key: tensor for key, tensor in tensors_of(folder).items() if "g_proj_2" not in key})
        with pytest.raises(CheckpointError, match=r"6 missing: model\.layers\.0\.self_attn\.g_proj_2\.bias"):
            load_model(folder, "float32")


class TestConfig:
    """config.json that belongs to something else."""

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"model_type": "llama"}, r"config\.json: model_type is 'llama', expected \"qwen2_5_vl\""),
            ({"model_type": "qwen2_vl"}, r"model_type is 'qwen2_vl', expected \"qwen2_5_vl\""),
            ({"use_sliding_window": True}, "use_sliding_window is True, expected false"),
            ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected \"silu\""),
            ({"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}, expected none"),
            (
                {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 1, 1]}},
                'type of rope_scaling is \'yarn\', expected "mrope" or "default"',
            ),
            ({"rope_scaling": None}, "rope_scaling.mrope_section is None, expected three numbers"),
            (
                {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 1]}},
                r"mrope_section \(2, 2, 1\) sums to 5, expected head_dim / 2 = 4",
            ),
            ({"vision_config": None}, "vision_config is None, expected an object"),
            ({"videonsa": {"dialect": "papper"}}, "videonsa.dialect is 'papper', expected 'paper' or 'released'"),
            ({"videonsa": {"dialect": "paper", "blocks": 1}}, r"the videonsa block has the unknown field\(s\) blocks"),
            ({"videonsa": {"dialect": "paper", "block_size": 0}}, "block_size is 0, expected at least 1"),
            ({"videonsa": {"mrope": "seconds"}}, "videonsa.mrope is 'seconds', expected 'qwen2_5_vl' or"),
        ],
    )
    def test_it_is_refused_by_name(self, folder, values, message):
        edit_config(folder, **values)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder, "float32")

    def test_a_missing_or_broken_file_is_named(self, folder):
        (folder / "config.json").write_text('{"model_type": "qwen2_5')
        with pytest.raises(CheckpointError, match=r"config\.json: .*, expected a JSON object"):
            load_model(folder)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
            load_model(folder)

    def test_the_nested_layout_is_read(self, folder, model):
        """As transformers 5.x writes it."""
        flat = json.loads((folder / "config.json").read_text())
        outer = ("architectures", "model_type", "vision_config", "videonsa", "tie_word_embeddings")
        text = {key: value for key, value in flat.items() if key not in outer}
        sections = text.pop("rope_scaling")["mrope_section"]
        text["rope_parameters"] = {
            "rope_type": "default",
            "type": "mrope",
            "mrope_section": sections,
            "rope_theta": text.pop("rope_theta"),
        }
        text["layer_types"] = ["full_attention"] * 3
        nested = {key: flat[key] for key in outer} | {"text_config": text}
        (folder / "config.json").write_text(json.dumps(nested))
        loaded = load_model(folder, "float32")
        assert loaded.config == model.config
        edit_config(folder, text_config=text | {"layer_types": ["sliding_attention"] * 3})
        with pytest.raises(CheckpointError, match='expected "full_attention" for every layer'):
            load_model(folder, "float32")


class TestTensors:
    """Weights that are not what config.json says, or cannot be read."""

    def test_every_wrong_key_is_in_one_error(self, folder):
        tensors = tensors_of(folder)
        tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["extra.bias"] = np.zeros(2, np.float32)
        del tensors["visual.merger.ln_q.weight"]
        del tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.norm.weight"] = np.zeros(33, np.float32)
        rewrite(folder, tensors)
        with pytest.raises(CheckpointError) as caught:
            load_model(folder, "float32")
        message = str(caught.value)
        assert "2 unmapped: extra.bias, model.layers.9.mlp.up_proj.weight;" in message
        assert "2 missing: model.layers.1.self_attn.k_proj.bias, visual.merger.ln_q.weight;" in message
        assert "1 mis-shaped: model.norm.weight [33] (expected [32])" in message

    def test_a_tied_head_may_be_stored_but_not_differ(self, tmp_path):
        model = build(config(tied=True))
        save_model(model, tmp_path / "tied")
        tensors = tensors_of(tmp_path / "tied")
        assert "lm_head.weight" not in tensors
        head = tensors["model.embed_tokens.weight"].copy()
        rewrite(tmp_path / "tied", tensors | {"lm_head.weight": head})
        assert_same(load_model(tmp_path / "tied", "float32"), model)
        head[-1, -1] += 1
        rewrite(tmp_path / "tied", tensors | {"lm_head.weight": head})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            load_model(tmp_path / "tied", "float32")

    def test_a_truncated_file_is_named(self, folder, monkeypatch):
        shard(folder, monkeypatch)
        victim = sorted(folder.glob("*.safetensors"))[1]
        victim.write_bytes(victim.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=f"{victim.name} is damaged or truncated at [0-9]+ bytes"):
            load_model(folder, "float32")

    def test_another_dtype_is_refused(self, folder):
        tensors = tensors_of(folder)
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
        rewrite(folder, tensors)
        with pytest.raises(
            CheckpointError, match=r"not read: model\.norm\.weight \(I8\); expected one of BF16, F16, F32"
        ):
            load_model(folder, "float32")

    def test_shards_need_their_index(self, folder, monkeypatch):
        shard(folder, monkeypatch)
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).unlink()
        with pytest.raises(CheckpointError, match=f"but no {INDEX} that lists them"):
            load_model(folder, "float32")
        moved = index | {"weight_map": index["weight_map"] | {"model.norm.weight": "model-00099-of-00099.safetensors"}}
        (folder / INDEX).write_text(json.dumps(moved))
        with pytest.raises(CheckpointError, match="names shards that are not there: model-00099-of-00099"):
            load_model(folder, "float32")
        outside = index | {"weight_map": {"model.norm.weight": "../other.safetensors"}}
        (folder / INDEX).write_text(json.dumps(outside))
        with pytest.raises(
            CheckpointError, match=r"names the shard '\.\./other\.safetensors', expected a file of this"
        ):
            load_model(folder, "float32")
        (folder / INDEX).write_text(json.dumps({"weight_map": {}}))
        with pytest.raises(CheckpointError, match=r"weight_map is \{\}, expected the shard of every key"):
            load_model(folder, "float32")
        renamed = {
            key if key != "model.norm.weight" else "norm.weight": name for key, name in index["weight_map"].items()
        }
        (folder / INDEX).write_text(json.dumps({"weight_map": renamed}))
        with pytest.raises(CheckpointError, match=r"disagree about model\.norm\.weight, norm\.weight"):
            load_model(folder, "float32")

    def test_pickles_are_never_read(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"holds no weights, expected model\.safetensors or"):
            load_model(folder, "float32")
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(
            CheckpointError, match=r"pickle file pytorch_model\.bin, which can run code and is never read"
        ):
            load_model(folder, "float32")

    def test_a_hub_name_is_not_a_folder(self):
        with pytest.raises(
            CheckpointError, match=r"Qwen/Nothing: no such folder, expected a local Hugging Face folder"
        ):
            load_model("Qwen/Nothing")

    def test_an_unknown_argument_is_named(self, folder):
        with pytest.raises(ValueError, match='dtype is \'int8\', expected "bfloat16" or "float32"'):
            load_model(folder, "int8")
        with pytest.raises(ValueError, match="nsa is 'paper', expected \"auto\", an NSAConfig or None"):
            load_model(folder, nsa="paper")


class TestSaving:
    """A folder appears whole or not at all."""

    def test_nothing_is_left_of_a_save_that_fails(self, model, tmp_path, monkeypatch):
        def full_disk(*_):
            raise OSError("no space left on device")

        monkeypatch.setattr(safetensor_files, "write_shards", full_disk)
        with pytest.raises(OSError, match="no space left"):
            save_model(model, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_with_something_in_it_is_left_alone(self, folder, model):
        before = {path: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(CheckpointError, match="exists already, expected a new or empty folder"):
            save_model(model, folder)
        assert {path: path.read_bytes() for path in folder.iterdir()} == before

    def test_what_transformers_cannot_say_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"text\.head_dim is 16, which transformers' config\.json cannot say"):
            save_model(build(small_config()), tmp_path / "model")
        with pytest.raises(CheckpointError, match="parameters are float16, expected all bfloat16 or all float32"):
            save_model(build(config(), param_dtype="float16"), tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


def test_the_host_holds_a_few_layers_slices(tmp_path, monkeypatch):
    """Peak of what is allocated while loading, against one layer of the largest parameter, which has eight."""
    base = config()
    big = dataclasses.replace(base, text=dataclasses.replace(base.text, num_hidden_layers=9, intermediate_size=8000))
    model = build(big)
    save_model(model, tmp_path / "big")
    # The CPU's devices hold their arrays in the same memory: copied here, freed by JAX's own allocator there.
    monkeypatch.setattr(hf.jax, "device_put", lambda array, device: jax.numpy.array(array, copy=True, device=device))
    largest = 4 * 8000 * 32
    load_model(tmp_path / "big", "float32")  # what is compiled and cached is not counted
    tracemalloc.start()
    load_model(tmp_path / "big", "float32")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Two layers' slices in flight, and one that the safetensors library is reading.
    assert peak < 4 * largest < model.decoder.layers.mlp.up_proj.kernel[...].nbytes


def test_the_table_covers_the_model_exactly(model):
    shapes = {"/".join(map(str, path)): leaf[...].shape for path, leaf in nnx.to_flat_state(nnx.state(model))}
    assert len(weights_of(model.config, shapes)) == len(set(weights_of(model.config, shapes)))
    with pytest.raises(AssertionError, match="parameters without a line in TABLE: visual/new/kernel"):
        weights_of(model.config, shapes | {"visual/new/kernel": (2, 2)})
