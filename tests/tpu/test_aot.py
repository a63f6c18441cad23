"""Every TPU kernel compiled by the TPU compiler, without a TPU: `make test-tpu-aot`."""

import functools

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tpu_cases, tpu_compile
from pallas_kernels import nsa_attention_sharded, tpu

pytestmark = pytest.mark.tpu_aot

KERNELS = {
    ("compressed", "forward"): {"compressed_attention_forward"},
    ("compressed", "train"): {"compressed_attention_forward", "compressed_attention_backward"},
    ("selection", "forward"): {"block_selection"},
    ("selected", "forward"): {"selected_attention_forward"},
    ("selected", "train"): {"selected_attention_forward", "selected_attention_backward"},
    ("window", "forward"): {"window_attention_forward"},
    ("window", "train"): {"window_attention_forward", "window_attention_dq", "window_attention_dkv"},
    ("prefix", "forward"): {"prefix_attention_forward"},
    ("prefix", "train"): {"prefix_attention_forward", "prefix_attention_dq", "prefix_attention_dkv"},
}
BRANCHES = ("compressed", "selection", "selected", "window")
WHOLE = {
    direction: set().union(*(KERNELS.get((name, direction), KERNELS[name, "forward"]) for name in BRANCHES))
    for direction in tpu_cases.DIRECTIONS
}


def assert_holds(kernels, wanted):
    missing = {name for name in wanted if not any(name in kernel for kernel in kernels)}
    assert not missing, f"of {sorted(kernels)} none is {sorted(missing)}"


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("tokens", tpu_cases.TOKENS)
@pytest.mark.parametrize(("operation", "direction"), KERNELS)
def test_kernels_compile(operation, direction, tokens, chip):
    name = f"{operation} {direction} {tokens}"
    program = tpu_compile.compile_lowered(tpu_compile.lower_case(name, chip), name, chip)
    assert_holds(program.kernels, KERNELS[operation, direction])
    for kernel in program.kernels.values():
        assert 0 < kernel["vmem_bytes"] <= tpu.CHIPS[chip].vmem_bytes


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("direction", tpu_cases.DIRECTIONS)
def test_whole_attention_compiles_in_shard_map(direction, chip):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=tpu_compile.TOPOLOGIES[chip])
    devices = topologies.make_mesh(topology, (2, 2), ("context", "tensor")).devices
    mesh = Mesh(devices, ("context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = tpu_cases.spec(32768)
    with tpu.compiling_for(chip):
        attention = functools.partial(
            nsa_attention_sharded,
            mesh=mesh,
            context_axis="context",
            tensor_axis="tensor",
            implementation="mosaic_tpu",
        )
        function, shapes = attention, spec.shapes
        if direction == "train":
            function, shapes = tpu_cases.with_gradient(attention, spec.shapes, 4)
        split = NamedSharding(mesh, PartitionSpec(None, "context", "tensor"))
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in shapes]
        compiled = jax.jit(function).lower(*arguments).compile()
    text = compiled.as_text()
    kernels, _ = tpu_compile.read_program(text)
    assert_holds(kernels, WHOLE[direction])
    assert "all-gather" in text, "keys are not gathered over the context"
