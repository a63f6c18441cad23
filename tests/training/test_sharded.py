"""Eight CPU devices need a process of their own: XLA reads their number when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def test_the_loss_is_the_same_on_every_mesh() -> None:
    meshes = ("data=1", "data=8", "fsdp=8", "fsdp=8>data=2 fsdp=2")
    results = json.loads(run_script("sharded_losses.py", *meshes))
    assert len(results["data=1"]) == 3
    for name in meshes[1:]:
        # 1e-5: sums of float32 numbers in another order; the later steps see the earlier updates.
        np.testing.assert_allclose(results[name], results["data=1"], rtol=1e-5, err_msg=name)


def test_loss_and_gradients_are_the_same_on_every_mesh() -> None:
    distances = json.loads(run_script("sharded_gradients.py"))
    assert set(distances) == {"fsdp=8", "data=2 fsdp=2 tensor=2", "tensor=2", "context=4"}
    for name, distance in distances.items():
        # 1e-5 of a gradient's largest entry: sums of float32 numbers in another order.
        assert distance["loss"] < 1e-5, name
        assert distance["gradient"] < 1e-5, (name, distance)
        assert distance["split"], name
        # Where the vocabulary is split, no device holds all logits even of a chunk.
        assert distance["whole_logits"] == ("tensor" not in name), name


def run_script(name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", HERE / name, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return run.stdout
