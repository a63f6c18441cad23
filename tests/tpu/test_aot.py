"""Every TPU kernel compiled by the TPU compiler, without a TPU: `make test-tpu-aot`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import tpu_cases, tpu_compile
from experiments.program_reading import read_program
from pallas_kernels import nsa_attention_sharded, tpu

pytestmark = pytest.mark.tpu_aot

KERNELS = {
    ("compressed", "forward"): {"compressed_attention_forward"},
    ("compressed", "train"): {"compressed_attention_forward", "compressed_attention_backward"},
    ("selection", "forward"): {"block_selection"},
    ("selected", "forward"): {"tile_lists", "selected_attention_forward"},
    ("selected", "train"): {"tile_lists", "selected_attention_forward", "selected_attention_backward"},
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


def compile_other(operation, direction, chip, ragged=False, **sizes):
    """Compiles an operation of other sizes than the released model's; ragged: lengths and a traced offset besides."""

    def build():
        shape = dataclasses.replace(tpu_cases.spec(8192), **sizes)
        function, shapes, count = tpu_cases.OPERATIONS[operation](shape)
        if ragged:
            fixed, shapes = function, (*shapes, jax.ShapeDtypeStruct((shape.batch,), jnp.int32))
            shapes = (*shapes, jax.ShapeDtypeStruct((), jnp.int32))

            def function(*arguments):
                *arrays, lengths, q_offset = arguments
                return fixed(*arrays, lengths=lengths, q_offset=q_offset)

        return tpu_cases.with_gradient(function, shapes, count) if direction == "train" else (function, shapes)

    name = f"{operation} {direction}"
    program = tpu_compile.compile_lowered(tpu_compile.lower(build, chip), name, chip)
    assert_holds(program.kernels, WHOLE[direction] if operation == "nsa" else KERNELS[operation, direction])
    return program


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("operation", ["nsa", "prefix"])
@pytest.mark.parametrize("sizes", [{"dtype": "float32"}, {"head_dim": 64}], ids=["float32", "D64"])
def test_other_types_and_head_sizes_compile(sizes, operation, chip):
    compile_other(operation, "train", chip, **sizes)


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("group_size", [1, 8])
def test_other_groups_compile(group_size, chip):
    compile_other("nsa", "train", chip, group_size=group_size)


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
def test_ragged_rows_of_later_queries_compile(chip):
    compile_other("nsa", "train", chip, ragged=True, batch=2, queries=4000, keys=9000)


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
def test_a_decoded_token_reads_its_keys_in_place(chip):
    program = compile_other("prefix", "forward", chip, queries=1, keys=131072)
    assert program.temporary_bytes < 2**20, "keys are copied before they are read"


def compile_on_four_devices(chip, axes, place, sharded, shapes, count, direction):
    """The text of a program on a mesh of 2 x 2 devices; `sharded` makes the call for a mesh."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=tpu_compile.TOPOLOGIES[chip])
    devices = topologies.make_mesh(topology, (2, 2), axes).devices
    mesh = Mesh(devices, axes, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with tpu.compiling_for(chip):
        function = sharded(mesh)
        if direction == "train":
            function, shapes = tpu_cases.with_gradient(function, shapes, count)
        split = NamedSharding(mesh, place)
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split) for x in shapes]
        return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("direction", tpu_cases.DIRECTIONS)
def test_whole_attention_compiles_in_shard_map(direction, chip):
    def sharded(mesh):
        split = {"context_axis": "context", "tensor_axis": "tensor"}
        return functools.partial(nsa_attention_sharded, mesh=mesh, implementation="mosaic_tpu", **split)

    axes, shapes = ("context", "tensor"), tpu_cases.spec(32768).shapes
    text = compile_on_four_devices(chip, axes, PartitionSpec(None, *axes), sharded, shapes, 4, direction)
    assert_holds(read_program(text).kernels, WHOLE[direction])
    assert "all-gather" in text, "keys are not gathered over the context"


@pytest.mark.parametrize("chip", tpu_compile.TOPOLOGIES)
@pytest.mark.parametrize("direction", tpu_cases.DIRECTIONS)
def test_prefix_attention_compiles_in_shard_map(direction, chip):
    attention, shapes, count = tpu_cases.OPERATIONS["prefix"](dataclasses.replace(tpu_cases.spec(32768), batch=2))
    rows, keys = PartitionSpec("data", None, None, "tensor"), PartitionSpec("data", None, "tensor")

    def sharded(mesh):
        specs = {"in_specs": (rows, keys, keys, PartitionSpec("data")), "out_specs": (rows, rows)}
        return jax.shard_map(attention, mesh=mesh, check_vma=False, **specs)

    axes = ("data", "tensor")
    text = compile_on_four_devices(chip, axes, PartitionSpec("data"), sharded, shapes, count, direction)
    assert_holds(read_program(text).kernels, KERNELS["prefix", direction])
