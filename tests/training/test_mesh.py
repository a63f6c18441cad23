from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from training_fakes import random_batch

from videonsa_jax.training import mesh as mesh_module
from videonsa_jax.training.config import MeshConfig, ShardingRule
from videonsa_jax.training.mesh import (
    AXES,
    check_batch_size,
    check_model_size,
    in_host_memory,
    loading_shard,
    make_mesh,
    place_batch,
    state_shardings,
)

ONE = jax.devices()[:1]


def test_a_laptop_gets_a_mesh_of_one() -> None:
    assert dict(make_mesh(MeshConfig(), ONE).shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), r"mesh data 3 x fsdp 1 x context 1 x tensor 1 does not fit 1 device"),
        (MeshConfig(fsdp=2), r"mesh data -1 x fsdp 2 .* does not fit 1 device"),
        (MeshConfig(fsdp=-1), r"mesh.data and mesh.fsdp are both -1"),
        (MeshConfig(fsdp=0), r"mesh.fsdp is 0, expected a positive number of devices or -1"),
    ],
)
def test_a_mesh_that_does_not_fit_says_so(config: MeshConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_mesh(config, ONE)


def mesh_of_processes(shape: tuple[int, ...], processes: list[int]) -> Any:
    """A mesh whose devices belong to these processes."""
    devices = np.array([Mock(spec=jax.Device, process_index=process) for process in processes], object)
    mesh = Mock(spec=Mesh, axis_names=AXES, devices=devices.reshape(shape), shape=dict(zip(AXES, shape, strict=True)))
    return mesh


@pytest.mark.parametrize(
    ("shape", "processes", "of_process"),
    [
        # Every process has contexts of its own.
        ((2, 2, 1, 1), [0, 0, 1, 1], {0: (0, 2, (0,)), 1: (1, 2, (1,))}),
        # Two contexts, each over two processes.
        ((1, 2, 2, 1), [0, 1, 2, 3], {0: (0, 2, (0, 1)), 3: (1, 2, (2, 3))}),
        # Two processes each hold a half of both.
        ((1, 2, 1, 2), [0, 1, 0, 1], {0: (0, 1, (0, 1)), 1: (0, 1, (0, 1))}),
        # As a TPU's torus may lie: 2 x 2 chips a process.
        (
            (1, 4, 4, 1),
            [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3],
            {1: (0, 2, (0, 1)), 2: (1, 2, (2, 3))},
        ),
        # Processes in another order than contexts.
        ((4, 1, 1, 1), [1, 1, 0, 0], {0: (1, 2, (0,)), 1: (0, 2, (1,))}),
    ],
)
def test_processes_load_what_their_devices_hold(
    shape: tuple[int, ...],
    processes: list[int],
    of_process: dict[int, tuple[int, int, tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for process, expected in of_process.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shard = loading_shard.__wrapped__(mesh_of_processes(shape, processes))
        assert (shard.index, shard.count, shard.processes) == expected
        assert shard.is_shared == (len(expected[2]) > 1)


def test_contexts_that_processes_share_in_part_are_refused() -> None:
    message = (
        r"mesh data 3 x fsdp 1 x context 2 x tensor 1 gives its 2 processes the contexts \(0, 1\), \(1, 2\) of each "
        "batch, expected parts of one size that do not overlap"
    )
    with pytest.raises(ValueError, match=message):
        loading_shard.__wrapped__(mesh_of_processes((3, 1, 2, 1), [0, 0, 0, 1, 1, 1]))


def test_kv_heads_must_divide_over_the_mesh() -> None:
    mesh = AbstractMesh((1, 1, 1, 4), ("data", "fsdp", "context", "tensor"))
    check_model_size(4, mesh)
    with pytest.raises(ValueError, match=r"mesh\.tensor is 4, expected a divisor of the model's 2 KV heads"):
        check_model_size(2, mesh)


def test_tensor_splits_heads_the_inside_of_mlps_and_the_vocabulary() -> None:
    mesh = AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "context", "tensor"))
    shapes = {
        "decoder": {
            "layers": {
                "self_attn": {"q_proj": {"kernel": (6, 512, 1024)}, "o_proj": {"kernel": (6, 1024, 512)}},
                "mlp": {"up_proj": {"kernel": (6, 512, 1408)}, "down_proj": {"kernel": (6, 1408, 512)}},
            }
        },
        "lm_head": {"kernel": (512, 4096)},
        "embed_tokens": {"embedding": (4096, 512)},
        "visual": {"blocks": {"mlp": {"up_proj": {"kernel": (6, 512, 1408)}}}},
    }
    state = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings({"mu": state, "params": state}, mesh))
    assert specs["mu"] == specs["params"]
    columns, rows = PartitionSpec(None, "fsdp", "tensor"), PartitionSpec(None, "tensor", "fsdp")
    assert specs["params"] == {
        "decoder": {
            "layers": {
                "self_attn": {"q_proj": {"kernel": columns}, "o_proj": {"kernel": rows}},
                "mlp": {"up_proj": {"kernel": columns}, "down_proj": {"kernel": rows}},
            }
        },
        "lm_head": {"kernel": PartitionSpec("fsdp", "tensor")},
        "embed_tokens": {"embedding": PartitionSpec("tensor", "fsdp")},
        "visual": {"blocks": {"mlp": {"up_proj": {"kernel": PartitionSpec(None, "fsdp")}}}},
    }


def test_a_config_may_have_rules_of_its_own() -> None:
    mesh = AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "context", "tensor"))
    state = {name: jax.ShapeDtypeStruct((512, 1024), "float32") for name in ("one", "two", "three")}
    rules = MeshConfig(rules=(("one", "replicated"), ("two", 0), ("", "fsdp"))).rules
    specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings(state, mesh, rules))
    assert specs == {
        "one": PartitionSpec(),
        "two": PartitionSpec("tensor", "fsdp"),
        "three": PartitionSpec(None, "fsdp"),
    }


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("two", "fsdp"), r'mesh\.rules has none for one, expected a last one such as \("\.\*", "fsdp"\)'),
        (("one", -3), r"mesh\.rules splits axis -3 of one, expected one of the 2 axes that it has"),
    ],
)
def test_rules_that_do_not_fit_say_so(rule: ShardingRule, message: str) -> None:
    mesh = AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "context", "tensor"))
    with pytest.raises(ValueError, match=message):
        state_shardings({"one": jax.ShapeDtypeStruct((512, 1024), "float32")}, mesh, (rule,))


def test_contexts_must_divide_over_the_mesh() -> None:
    mesh = AbstractMesh((2, 4, 1, 1), ("data", "fsdp", "context", "tensor"))
    check_batch_size(16, mesh)
    with pytest.raises(ValueError, match=r"contexts_per_batch is 12, expected a multiple of mesh data x fsdp = 8"):
        check_batch_size(12, mesh)


def test_fsdp_splits_the_largest_axis_that_divides() -> None:
    mesh = AbstractMesh((1, 8, 1, 1), ("data", "fsdp", "context", "tensor"))
    shapes = {
        "layers": {"kernel": (6, 512, 1024), "narrow": (6, 512, 1408), "bias": (6, 1408 * 8)},
        "odd": {"kernel": (999, 1024)},
        "small": {"kernel": (16, 16)},
        "indivisible": {"kernel": (1001, 1001)},
        "step": (),
    }
    state = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings({"mu": state, "params": state}, mesh))
    assert specs["mu"] == specs["params"]
    assert specs["params"] == {
        # An eighth of 1408 is no multiple of 128.
        "layers": {
            "kernel": PartitionSpec(None, None, "fsdp"),
            "narrow": PartitionSpec(None, "fsdp"),
            "bias": PartitionSpec(),
        },
        "odd": {"kernel": PartitionSpec(None, "fsdp")},
        "small": {"kernel": PartitionSpec()},
        "indivisible": {"kernel": PartitionSpec()},
        "step": PartitionSpec(),
    }


def test_context_splits_weights_as_well() -> None:
    mesh = AbstractMesh((1, 4, 2, 1), ("data", "fsdp", "context", "tensor"))
    state = {
        "kernel": jax.ShapeDtypeStruct((512, 1024), "float32"),
        "odd": jax.ShapeDtypeStruct((516, 1023), "float32"),
    }
    specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings(state, mesh))
    assert specs == {"kernel": PartitionSpec(None, ("fsdp", "context")), "odd": PartitionSpec("fsdp")}


def test_batches_are_split_along_their_contexts() -> None:
    placed = place_batch(random_batch(0), make_mesh(MeshConfig(), ONE))
    assert placed.inputs.visual_positions.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    assert placed.inputs.text_positions.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
    assert placed.inputs.patches.sharding.spec == PartitionSpec(("data", "fsdp"))
    assert placed.loss_weights.sharding.spec == PartitionSpec(("data", "fsdp"))


def test_devices_without_pinned_host_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"count": jnp.zeros(()), "mu": jnp.zeros(4)}
    shardings = state_shardings(state, make_mesh(MeshConfig(), ONE))
    kinds = jax.tree.map(lambda sharding: sharding.memory_kind, in_host_memory(state, shardings))
    assert kinds == {"count": "device", "mu": "pinned_host"}
    monkeypatch.setattr(mesh_module, "HOST_MEMORY", "no_such_memory")
    with pytest.raises(ValueError, match=r"train\.offload_optimizer is true, but a cpu has the memories device, "):
        in_host_memory(state, shardings)
