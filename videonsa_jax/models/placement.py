"""Where activations and weights lie on the devices of a mesh.

Contexts are split over `data` and `fsdp`; within a context, tokens and frames over `context`. Weights lie split over
`fsdp` and `context` together and are gathered for each product, their gradients reduce-scattered. All of this is said
outright: left to itself, XLA's partitioner now and then leaves a product split as its weights are and moves
activations, which are larger, or turns the product into a ring of narrow ones.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Collection
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int, Shaped

DATA_AXES = ("data", "fsdp")  # mesh axes over which contexts (B) are split
CONTEXT_AXIS, TENSOR_AXIS = "context", "tensor"
FRAME_AXES = (*DATA_AXES, CONTEXT_AXIS)
WEIGHT_AXES = ("fsdp", CONTEXT_AXIS)

MIN_SHARDED_SIZE = 2**14  # smaller arrays are replicated: gathering them costs more than holding them

LANES = 128

type Rows = Literal["tokens", "frames"]
"""What the leading axes of activations are: `[B, Lv, ...]` or `[B, Q, Lt, ...]`, or `[F, P, ...]`."""


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """What is traced inside finds the mesh in its context; None or one device: no mesh."""
    if mesh is None or mesh.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def weight_split(
    shape: tuple[int, ...], mesh: Mesh | AbstractMesh, taken: Collection[int] = ()
) -> tuple[int, tuple[str, ...]] | None:
    """The axis of a parameter that is split, and over which mesh axes.

    It is the largest of those that divide over `fsdp` and `context` together or, where none does, over `fsdp` alone.
    The last axis comes last if its parts were not whole lanes: a TPU pads such parts, and all-reduces what it could
    reduce-scatter.

    Args:
      shape: of the parameter.
      mesh: the devices.
      taken: axes that are split otherwise.

    Returns:
      None where the parameter is too small or nothing divides.
    """
    if math.prod(shape) < MIN_SHARDED_SIZE:
        return None
    for names in (WEIGHT_AXES, WEIGHT_AXES[:1]):
        parts = _size(mesh, names)
        divisible = [axis for axis, length in enumerate(shape) if length % parts == 0 and axis not in taken]
        if divisible:
            is_whole = [axis < len(shape) - 1 or length // parts % LANES == 0 for axis, length in enumerate(shape)]
            best = max(divisible, key=lambda axis: (is_whole[axis], shape[axis]))
            return best, tuple(name for name in names if mesh.shape.get(name, 1) > 1)
    return None


def split_product(
    product: Callable[[Array, Array], Array], x: Float[Array, "*L features"], kernel: Float[Array, "in out"], rows: Rows
) -> Float[Array, "..."]:
    """`product(x, kernel)`, by each device for its own rows; the kernel is gathered, its gradient reduce-scattered.

    Where heads are split over `tensor` as well, the partitioner is told where rows stay and arranges the rest.

    Args:
      product: a map of the last axis.
      x: activations.
      kernel: its weights.
      rows: what the leading axes of x are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = _rows_split(x, rows, mesh)
    if split is None:
        return product(x, kernel)
    if _size(mesh, (TENSOR_AXIS,)) > 1:
        free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(split))
        return jax.lax.with_sharding_constraint(product(x, kernel), PartitionSpec(*split, *free))
    axis, names = weight_split(kernel.shape, mesh) or (0, ())

    def on_own_rows(x: Array, kernel: Array) -> Array:
        # One axis at a time: over two, TPUs all-reduce gradients where they could reduce-scatter.
        for name in reversed(names):
            kernel = jax.lax.all_gather(kernel, name, axis=axis, tiled=True)
        return product(x, kernel)

    return _on_each(mesh, on_own_rows, [split, PartitionSpec(*[None] * axis, names)], split)(x, kernel)


def split_targets[Results](
    function: Callable[[Array, Array, Array], Results],
    hidden: Float[Array, "B Q Lt hidden"],
    kernel: Float[Array, "hidden V"],
    targets: Int[Array, "B Q Lt"],
) -> Results:
    """`function(hidden, kernel, targets)`, by each device for its own tokens of the text.

    The kernel is gathered once, in the dtype of the hidden states, and comes as float32; its gradient is summed over
    devices in float32, once. The partitioner arranges products with a vocabulary that is split over `tensor`.

    Args:
      function: its results are of single tokens, [B, Q, Lt] each.
      hidden: hidden states.
      kernel: weights of the output projection.
      targets: of each token.
    """
    mesh = jax.sharding.get_abstract_mesh()
    split = _rows_split(hidden, "tokens", mesh)
    if split is None:
        return function(hidden, kernel, targets)
    parts = _size(mesh, (TENSOR_AXIS,))
    is_split = parts > 1 and kernel.shape[1] % parts == 0
    vocabulary = TENSOR_AXIS if is_split else None
    axis, names = weight_split(kernel.shape, mesh, (1,) if is_split else ()) or (0, ())
    of_kernel = PartitionSpec(names, vocabulary) if axis == 0 else PartitionSpec(None, names)

    def own_copy(kernel: Array) -> Array:
        return _gathered(axis, names, hidden.dtype, kernel)[None]

    def on_own_rows(hidden: Array, copies: Array, targets: Array) -> Results:
        return function(hidden, copies[0], targets)

    # Apart, because what is gathered by hand would be gathered over `tensor` too where that is the partitioner's.
    own = PartitionSpec(_present(mesh, FRAME_AXES))
    copies = _on_each(mesh, own_copy, [of_kernel], PartitionSpec(*own, None, vocabulary))(kernel.astype(jnp.float32))
    return jax.shard_map(
        on_own_rows,
        mesh=mesh,
        in_specs=(split, own, split),
        out_specs=split,
        axis_names=set(_present(mesh, FRAME_AXES)),
        check_vma=False,
    )(hidden, copies, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(axis: int, names: tuple[str, ...], dtype: DTypeLike, kernel: Float32[Array, "in out"]) -> Array:
    """The whole kernel, rounded to a dtype; float32 all the same, since a gradient has the dtype of its array."""
    kernel = kernel.astype(dtype)
    for name in reversed(names):
        kernel = jax.lax.all_gather(kernel, name, axis=axis, tiled=True)
    return kernel.astype(jnp.float32)


def _gathered_forward(axis: int, names: tuple[str, ...], dtype: DTypeLike, kernel: Array) -> tuple[Array, None]:
    return _gathered(axis, names, dtype, kernel), None


def _gathered_backward(axis: int, names: tuple[str, ...], dtype: DTypeLike, _: None, gradient: Array) -> tuple[Array]:
    for name in names:
        gradient = jax.lax.psum_scatter(gradient, name, scatter_dimension=axis, tiled=True)
    return (gradient,)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def split_rows(x: Shaped[Array, "*L features"], rows: Rows) -> Shaped[Array, "*L features"]:
    """Keeps activations, and their gradient, where `split_product` has its rows."""
    mesh = jax.sharding.get_abstract_mesh()
    split = _rows_split(x, rows, mesh)
    if split is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*split, *[None] * (x.ndim - len(split))))


def _rows_split(x: Array, rows: Rows, mesh: AbstractMesh) -> PartitionSpec | None:
    axes = {0: FRAME_AXES} if rows == "frames" else {0: DATA_AXES, x.ndim - 2: (CONTEXT_AXIS,)}
    parts = {axis: _size(mesh, names) for axis, names in axes.items()}
    if all(size == 1 for size in parts.values()) or x.shape[0] % parts[0]:
        return None
    # Few tokens of text may not divide: then all ranks of `context` compute all of them.
    split = {axis: _present(mesh, names) for axis, names in axes.items() if x.shape[axis] % parts[axis] == 0}
    return PartitionSpec(*(split.get(axis) for axis in range(x.ndim - 1)))


def by_frame(x: Shaped[Array, "B F *rest"]) -> Shaped[Array, "B*F *rest"]:
    """Joins contexts and frames where they lie: on a mesh, the order of the frames is that of the devices."""
    mesh = jax.sharding.get_abstract_mesh()

    def join(x: Array) -> Array:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

    if not _frames_divide(mesh, x.shape[0], x.shape[1]):
        return join(x)
    return _on_each(mesh, join, [_of_contexts(mesh)], PartitionSpec(_present(mesh, FRAME_AXES)))(x)


def take_tokens(merged: Float[Array, "F M hidden"], source: Int[Array, "B Lv"]) -> Float[Array, "B Lv hidden"]:
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


def _present(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if axis in mesh.shape)


def _size(mesh: Mesh | AbstractMesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in _present(mesh, axes))
