"""Which host of a TPU pod loads what, on the meshes that docs/training.md plans; no chip is there."""

from collections import Counter

import jax
import pytest
from jax.experimental import topologies

from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.mesh import loading_shard, make_mesh

pytestmark = pytest.mark.tpu_aot


@pytest.mark.parametrize(
    ("topology", "fsdp", "context", "shards", "hosts_of_a_shard"),
    [
        ("v5e:16x16", 16, 16, 8, 8),
        ("v6e:16x16", 16, 16, 8, 8),
        ("v5p:4x4x4", 16, 4, 8, 2),
        ("v5p:4x4x4", 64, 1, 16, 1),
        ("v5e:16x16", 1, 256, 1, 64),
    ],
)
def test_hosts_that_hold_the_same_contexts_load_the_same(
    topology, fsdp, context, shards, hosts_of_a_shard, monkeypatch
):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=fsdp, context=context), devices)
    loaders = Counter()
    for host in {device.process_index for device in devices}:
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        shard = loading_shard.__wrapped__(mesh)
        assert shard.count == shards
        assert host in shard.processes
        loaders[shard.index] += 1
    assert loaders == dict.fromkeys(range(shards), hosts_of_a_shard)
