"""Where activations lie on the devices of a mesh."""

import contextlib
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Shaped

DATA_AXES = ("data", "fsdp")  # mesh axes over which contexts (B) are split
CONTEXT_AXIS, TENSOR_AXIS = "context", "tensor"
FRAME_AXES = (*DATA_AXES, CONTEXT_AXIS)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced inside finds the mesh in its context; None or one device: no mesh."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split_by_context(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
    """Keeps activations split over their first axis, contexts or frames, and their gradient likewise.

    Weights lie split over `fsdp` too. Told nothing, XLA's partitioner now and then leaves a product of the two split as
    the weights are, and moves activations, which are larger, instead of gathering weights. Where tokens are split over
    `context` as well, it is left to choose.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _size(mesh, DATA_AXES) == 1 or _size(mesh, (CONTEXT_AXIS,)) > 1 or x.shape[0] % _size(mesh, DATA_AXES):
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(_present(mesh, DATA_AXES), *rest))


def over_frames[Function: Callable[..., Array]](function: Function) -> Function:
    """A function of arrays [F, ...] that each device applies to its own frames."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = _present(mesh, FRAME_AXES)

    def run(*arrays: Array) -> Array:
        if _size(mesh, axes) == 1 or arrays[0].shape[0] % _size(mesh, axes):
            return function(*arrays)
        frames = tuple(PartitionSpec(axes) if array.ndim else PartitionSpec() for array in arrays)
        return jax.shard_map(function, mesh=mesh, in_specs=frames, out_specs=PartitionSpec(axes), check_vma=False)(
            *arrays
        )

    return run


def _present(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in mesh.shape)


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in _present(mesh, axes):
        size *= mesh.shape[axis]
    return size
