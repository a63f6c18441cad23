"""Run by test_hf.py with a folder to write to: a model on four devices is loaded slice by slice, and saved again."""

import dataclasses
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import jax
import numpy as np
import safetensors.numpy
from flax import nnx
from model_cases import build, small_config

from videonsa_jax.checkpoints import load_model, save_model
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.mesh import make_mesh


def main() -> None:
    folder, base = Path(sys.argv[1]), small_config()
    # Arrays of at least 2^14 values are split.
    text = dataclasses.replace(base.text, head_dim=8, mrope_section=(2, 1, 1), intermediate_size=1024, vocab_size=1024)
    vision = dataclasses.replace(base.vision, patch_size=14, window_size=56)
    model = build(dataclasses.replace(base, text=text, vision=vision))
    save_model(model, folder / "one")
    mesh = make_mesh(MeshConfig(data=1, fsdp=4))
    loaded = load_model(folder / "one", "float32", mesh=mesh)
    split = 0
    for found, expected in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(model)), strict=True):
        assert len(found.sharding.device_set) == 4
        split += found.addressable_shards[0].data.size * 4 == found.size
        np.testing.assert_array_equal(found, expected)
    assert split >= 8, f"only {split} parameters are split"
    save_model(loaded, folder / "two")
    one, two = (safetensors.numpy.load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        np.testing.assert_array_equal(two[key], tensor)


main()
