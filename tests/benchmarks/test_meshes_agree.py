"""What the comparison of meshes runs, and when it calls two gradients equal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.meshes_agree import MESHES, Case, cases, verdict

OF_ONE = {"loss": 1e-4, "norm/scale": 2e-2}


def test_every_mesh_is_compared_with_a_truth_that_came_before_it() -> None:
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)
    for attention, questions in {(case.attention, case.questions) for case in cases()}:
        own = [case for case in cases() if (case.attention, case.questions) == (attention, questions)]
        assert (own[0].dtype, own[0].mesh) == ("float32", "one")
        of_bfloat16 = [case.mesh for case in own if case.dtype == "bfloat16"]
        assert of_bfloat16 == list(MESHES)
        assert of_bfloat16[0] == "one"


@pytest.mark.parametrize(
    ("dtype", "distance", "agrees"),
    [
        ("float32", 0.9e-4, True),
        ("float32", 1.1e-4, False),
        ("bfloat16", 3.9e-2, True),
        ("bfloat16", 4.1e-2, False),
        ("bfloat16", float("nan"), False),
    ],
)
def test_a_mesh_may_be_as_far_off_as_one_device(dtype: str, distance: float, agrees: bool) -> None:
    found = verdict(Case("nsa", 1, dtype, "fsdp"), {"loss": 1e-5, "norm/scale": distance}, OF_ONE)
    assert found["agrees"] == agrees
    assert found["worst_leaf"] == "norm/scale"


@pytest.mark.slow
def test_two_cpu_devices_agree(tmp_path: Path) -> None:
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    command = [sys.executable, "-m", "benchmarks.meshes_agree", "--tiny", f"--json={tmp_path / 'agree.json'}"]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stdout + run.stderr
