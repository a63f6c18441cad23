"""How many CPU devices a run asks for, and which compiler flags."""

import dataclasses
import os

import jax
import pytest

from experiments import configs, train
from videonsa_jax.training.config import MeshConfig


@pytest.fixture
def asked(monkeypatch):
    """The number of devices asked for last; None when the run asked for none."""
    seen = {"count": None}
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda name, value: seen.update(count=value))
    return seen


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (2, 2), (3, 2), (6, 4), (64, 8)])
def test_devices_share_the_batch_evenly(asked, monkeypatch, cores, devices):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    experiment = configs.get("nsa_video")
    assert experiment.data.contexts_per_batch == 8
    train._use_all_cores(experiment)
    assert asked["count"] == devices


def test_a_mesh_of_ones_own_is_left_alone(asked):
    train._use_all_cores(dataclasses.replace(configs.get("nsa_video"), mesh=MeshConfig(data=1)))
    assert asked["count"] is None


def test_xla_flags_win(asked, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    train._use_all_cores(configs.get("nsa_video"))
    assert asked["count"] is None


def test_gpu_products_go_to_cublas_unless_flags_say_otherwise(monkeypatch):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: name == "jax_cuda13_plugin" or None)
    for given, left in (
        ("", "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"),
        ("--xla_gpu_autotune_level=4", "--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=false"),
    ):
        monkeypatch.setenv("XLA_FLAGS", given)
        train._choose_gpu_products()
        assert os.environ["XLA_FLAGS"] == left
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("XLA_FLAGS", "")
    train._choose_gpu_products()
    assert os.environ["XLA_FLAGS"] == "", "without a GPU nothing is set"
