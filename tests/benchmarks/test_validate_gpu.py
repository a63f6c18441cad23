"""The checks of the whole attention on a GPU, with XLA's attention on a CPU in the kernels' place."""

import dataclasses

import pytest

from benchmarks import validate_gpu
from benchmarks.validate_gpu import Case
from pallas_kernels.specs import Spec

SMALL = Spec("small", 300, 300, batch=2, kv_heads=1, group_size=2, head_dim=16, block_count=4, window_size=64)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(SMALL, lengths=(300, 140)), id="ragged"),
        pytest.param(Case(dataclasses.replace(SMALL, queries=128, q_offset=172)), id="later", marks=pytest.mark.slow),
        pytest.param(Case(SMALL, lengths=(0, 300), sink=True), id="drawn", marks=pytest.mark.slow),
    ],
)
def test_right_values_are_found_right(case):
    record = validate_gpu.run_case(case)
    assert record["kernels"] == 0
    assert not record.pop("fine"), "without a kernel nothing is shown"
    assert record["same_bits"]
    assert record["finite"]
    assert record["zero_past_lengths"]
    assert record.get("choice", {"fine": True})["fine"]
    # bfloat16 against float32.
    assert max(record["errors"].values()) <= 1e-2
