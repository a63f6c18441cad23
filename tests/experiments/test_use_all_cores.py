"""How many CPU devices a run asks for."""

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


@pytest.mark.parametrize(("cores", "devices"), [(1, 1), (2, 2), (3, 2), (6, 4), (64, 8), (None, 1)])
def test_devices_share_the_batch_evenly(asked, monkeypatch, cores, devices):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
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
