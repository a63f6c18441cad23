"""Measured configurations: which entry serves which call."""

import json

import pytest

from pallas_kernels import gpu, gpu_table
from pallas_kernels.selected_attention import gpu_config


@pytest.fixture
def table(tmp_path, monkeypatch):
    def write(entries):
        file = tmp_path / "table.json"
        file.write_text(json.dumps({"entries": entries}))
        monkeypatch.setattr(gpu_table, "FILE", file)
        gpu_table._entries.cache_clear()

    yield write
    monkeypatch.undo()
    gpu_table._entries.cache_clear()


def entry(kernel, queries, **fields):
    return {"kernel": kernel, "head_dim": 128, "queries": queries, "fields": fields}


def test_the_nearest_length_within_a_factor_of_two_serves(table):
    table([entry("a", 1000, stages=2), entry("a", 4000, stages=3), entry("b", 1000, stages=4)])
    assert gpu_table.measured("a", 128, 1900) == {"stages": 2}
    assert gpu_table.measured("a", 128, 2100) == {"stages": 3}
    assert gpu_table.measured("a", 128, 499) == {}
    assert gpu_table.measured("a", 64, 1000) == {}
    assert gpu_table.measured("c", 128, 1000) == {}


def test_a_measured_configuration_comes_before_the_rule(table):
    table([entry("selected_forward", 8192, stages=3, consumers=2, q_registers=0, parts=1)])
    assert gpu_config.heuristic(8192, 4, 128).forward == gpu_config.TileConfig(3, 2, 0)
    assert gpu_config.heuristic(8192, 4, 64).forward == gpu_config.TileConfig(8, 3, 0)


def test_shared_memory_holds_every_measured_configuration():
    for queries in (4096, 8192, 16384, 32768, 65536, 131072):
        config = gpu_config.heuristic(queries, 4, 128)
        assert max(config.shared_memory(128).values()) <= gpu.SHARED_MEMORY
