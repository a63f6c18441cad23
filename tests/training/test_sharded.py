"""Eight CPU devices need a process of their own: XLA reads their number when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def test_the_loss_is_the_same_on_every_mesh() -> None:
    meshes = ("data=1", "data=8", "fsdp=8")
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", HERE / "sharded_losses.py", *meshes]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout)
    assert len(results["data=1"]) == 3
    for name in meshes[1:]:
        # 1e-5: sums of float32 numbers in another order; the later steps see the earlier updates.
        np.testing.assert_allclose(results[name], results["data=1"], rtol=1e-5, err_msg=name)
