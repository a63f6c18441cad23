"""The sharded entry point on eight CPU devices, against one device.

Devices are forced by a flag that must stand before jax starts: the check is a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import nsa_attention_sharded

CHECK = Path(__file__).with_name("sharded_check.py")


def test_eight_devices_compute_what_one_does():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(CHECK.parents[2]),
    }
    result = subprocess.run(
        [sys.executable, str(CHECK)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["data", "context", "tensor", "all", "none", "stripes-8", "stripes-4"]


@pytest.fixture
def mesh():
    return jax.make_mesh((1, 1), ("data", "context"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_an_axis_the_mesh_lacks(mesh):
    q, k, gates = jnp.zeros((1, 8, 1, 2, 4)), jnp.zeros((1, 8, 1, 4)), jnp.zeros((1, 8, 1, 2, 3))
    with pytest.raises(
        ValueError, match=r"tensor_axis names 'model', expected an axis of the mesh \('data', 'context'"
    ):
        nsa_attention_sharded(q, k, k, gates, mesh=mesh, tensor_axis="model")
