"""How TPUs exchange weights, in programs that are compiled without a TPU, as the loop compiles them."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from experiments.program_reading import read_program
from videonsa_jax.models.placement import on_mesh, split_product
from videonsa_jax.training.compiling import compile_program
from videonsa_jax.training.config import MeshConfig
from videonsa_jax.training.mesh import make_mesh

pytestmark = pytest.mark.tpu_aot

LAYERS, TOKENS, WIDTH = 6, 8192, 4096
KERNEL = WIDTH * WIDTH * 2  # bytes


@pytest.mark.parametrize(("topology", "asynchronous"), [("v5e:4x4", 1), ("v5p:4x4x1", 4), ("v6e:4x4", 4)])
def test_sparse_cores_gather_weights_where_there_are_any(topology: str, asynchronous: int) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, context=4), devices)
    placed = lambda shape, *split: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(*split))
    )
    x = placed((4, TOKENS, WIDTH), "fsdp", "context")
    first, second = [placed((LAYERS, WIDTH, WIDTH), None, ("fsdp", "context"))] * 2

    def stack(x: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        def layer(x: jax.Array, kernels: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            for kernel in kernels:
                x = jax.nn.silu(split_product(jnp.matmul, x, kernel, "tokens"))
            return x, None

        with on_mesh(mesh):
            return jax.lax.scan(layer, x, (first, second))[0]

    text = compile_program(
        jax.jit(stack).lower(x, first, second), mesh, sparse_cores=not topology.startswith("v5e")
    ).as_text()
    gathers = [one for one in read_program(text).collectives if one.kind == "all-gather"]
    # A device has a sixteenth, receives three such parts, and then three of four times their size.
    assert sorted(one.bytes for one in gathers) == [3 * KERNEL // parts for parts in (16, 16, 4, 4)]
    assert {one.runs for one in gathers} == {LAYERS}
    assert sum(one.asynchronous for one in gathers) == asynchronous
    assert ('async_execution_thread="sparsecore"' in text) == (asynchronous == len(gathers))
