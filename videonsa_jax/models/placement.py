"""Where activations lie on the devices of a mesh.

Contexts are split over `data` and `fsdp`; within a context, frames and tokens of the visual stream over `context`.
Weights lie split too. Told nothing, XLA's partitioner now and then leaves a product of the two split as the weights are,
and moves activations, which are larger, instead of gathering weights. So every product with weights is told to stay
where its tokens are, and what has to move (keys and values, merged frames) is moved by name.
"""

import contextlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

DATA_AXES = ("data", "fsdp")  # mesh axes over which contexts (B) are split
CONTEXT_AXIS, TENSOR_AXIS = "context", "tensor"
FRAME_AXES = (*DATA_AXES, CONTEXT_AXIS)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced inside finds the mesh in its context; None or one device: no mesh."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def split_tokens(x: Shaped[Array, "B *rest"]) -> Shaped[Array, "B *rest"]:
    """Keeps a stream's activations, and their gradient, split by context and the visual stream's by token too.

    Args:
      x: `[B, Lv, features]` of the visual stream or `[B, Q, Lt, features]` of the text stream, which is whole on each
        rank of `context`.
    """
    return _kept(x, (DATA_AXES, (CONTEXT_AXIS,)) if x.ndim == 3 else (DATA_AXES,))


def split_frames(x: Shaped[Array, "F *rest"]) -> Shaped[Array, "F *rest"]:
    """Keeps the vision tower's activations, and their gradient, split by frame."""
    return _kept(x, (FRAME_AXES,))


def _kept(x: Array, axes: tuple[tuple[str, ...], ...]) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    sizes = [_size(mesh, names) for names in axes]
    if all(size == 1 for size in sizes) or any(length % size for length, size in zip(x.shape, sizes, strict=False)):
        return x
    # Features lie split over `tensor` or whole, as the weights say.
    features = PartitionSpec.UNCONSTRAINED if _size(mesh, (TENSOR_AXIS,)) > 1 else None
    spec = [_present(mesh, names) for names in axes] + [None] * (x.ndim - len(axes) - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec, features))


def by_frame(x: Shaped[Array, "B F *rest"]) -> Shaped[Array, "B*F *rest"]:
    """Joins contexts and frames where they lie: on a mesh, the order of the frames is that of the devices."""
    mesh = jax.sharding.get_abstract_mesh()

    def join(x: Array) -> Array:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    if not _frames_divide(mesh, x.shape[0], x.shape[1]):
        return join(x)
    return _on_each(mesh, join, [_of_contexts(mesh)], PartitionSpec(_present(mesh, FRAME_AXES)))(x)


def take_tokens(
    merged: Float[Array, "B*F M hidden"], source: Int[Array, "B Lv"]
) -> Float[Array, "B Lv hidden"]:
    """Lines merged tokens up as the visual stream, from frames as `by_frame` joined them.

    A rank of `context` gathers its contexts' merged tokens whole and takes its own tokens; the gradient is
    reduce-scattered.

    Args:
      merged: tokens of every frame.
      source: for each visual token its place in its context's `[F * M]` merged tokens.
    """
    mesh = jax.sharding.get_abstract_mesh()
    contexts, tokens = source.shape
    frames = merged.shape[0] // contexts
    is_split = _frames_divide(mesh, contexts, frames) and tokens % _size(mesh, (CONTEXT_AXIS,)) == 0

    def take(merged: Array, source: Array) -> Array:
        merged = merged.reshape(source.shape[0], -1, merged.shape[-1])
        if is_split and _size(mesh, (CONTEXT_AXIS,)) > 1:
            merged = jax.lax.all_gather(merged, CONTEXT_AXIS, axis=1, tiled=True)
        return jnp.take_along_axis(merged, source[..., None], axis=1, mode="clip")

    if not is_split:
        return take(merged, source)
    frames_split, tokens_split = PartitionSpec(_present(mesh, FRAME_AXES)), _of_contexts(mesh)
    return _on_each(mesh, take, [frames_split, tokens_split], tokens_split)(merged, source)


def over_frames[Function: Callable[..., Array]](function: Function) -> Function:
    """A function of arrays [F, ...] that each device applies to its own frames."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = _present(mesh, FRAME_AXES)

    def run(*arrays: Array) -> Array:
        if _size(mesh, axes) == 1 or arrays[0].shape[0] % _size(mesh, axes):
            return function(*arrays)
        frames = [PartitionSpec(axes) if array.ndim else PartitionSpec() for array in arrays]
        return _on_each(mesh, function, frames, PartitionSpec(axes))(*arrays)

    return run


def _on_each(
    mesh: AbstractMesh, function: Callable[..., Array], inputs: list[PartitionSpec], output: PartitionSpec
) -> Callable[..., Array]:
    # Kernels' results do not say over which mesh axes they vary, so that the check cannot follow them.
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(inputs), out_specs=output, check_vma=False)


def _of_contexts(mesh: AbstractMesh) -> PartitionSpec:
    return PartitionSpec(_present(mesh, DATA_AXES), *_present(mesh, (CONTEXT_AXIS,)))


def _frames_divide(mesh: AbstractMesh, contexts: int, frames: int) -> bool:
    parts = _size(mesh, DATA_AXES), _size(mesh, (CONTEXT_AXIS,))
    return parts != (1, 1) and contexts % parts[0] == 0 and frames % parts[1] == 0


def _present(mesh: AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in mesh.shape)


def _size(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    size = 1
    for axis in _present(mesh, axes):
        size *= mesh.shape[axis]
    return size
