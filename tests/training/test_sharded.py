"""Eight CPU devices need a process of their own: XLA reads their number when it starts."""

import json
import os
import subprocess
import sys
from collections import Counter
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
    tensor, context = {"data=2 fsdp=2 tensor=2", "tensor=2"}, {"context=4", "context=8", "fsdp=2 context=4"}
    assert set(distances) == {"fsdp=8", *tensor, *context, "context=4 dense"}
    for name, distance in distances.items():
        # 1e-5 of a gradient's largest entry: sums of float32 numbers in another order.
        assert distance["loss"] < 1e-5, name
        assert distance["gradient"] < 1e-5, (name, distance)
        assert distance["split"], name
        # Where the vocabulary is split, no device holds all logits even of a chunk.
        assert not (distance["whole_logits"] and "tensor" in name), name
    assert distances["fsdp=8"]["whole_logits"]


def test_streams_stay_where_they_are() -> None:
    read = json.loads(run_script("sharded_collectives.py"))
    part = read["part"]
    of_frames, of_keys = 3 * part["visual stream"], 3 * part["keys"]  # a rank receives the parts of the three others
    assert of_keys < min(part["visual stream"], part["tower's stream"])
    exchanged = Counter((one["kind"], one["runs"], one["bytes"]) for one in read["exchanged"])
    # Merged frames once, and back their gradient; keys and values of the layer, again for its gradient, and back.
    assert exchanged[("all-gather", 1, of_frames)] == exchanged[("reduce-scatter", 1, of_frames)] == 1
    assert exchanged[("all-gather", 1, of_keys)] == 4
    assert exchanged[("reduce-scatter", 1, of_keys)] == 2
    # Anything else is smaller: weights and their gradients, and the text.
    assert sorted(size for _, _, size in exchanged if size >= of_keys) == [of_keys, of_keys, of_frames, of_frames]


def test_the_output_projections_gradient_crosses_devices_once() -> None:
    of_meshes = json.loads(run_script("sharded_targets.py"))
    assert len(of_meshes) == 4
    for name, read in of_meshes.items():
        # 1e-6 of the largest entry: sums of float32 numbers in another order.
        assert max(read["distances"]) < 1e-6, (name, read["distances"])
        large = [one for one in read["exchanged"] if one["bytes"] >= read["weights"] // 4]
        assert {one["runs"] for one in large} == {1}, (name, large)
        assert sum(one["bytes"] for one in large if one["kind"] != "all-gather") <= read["weights"], (name, large)


def run_script(name: str, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", HERE / name, *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    return run.stdout
