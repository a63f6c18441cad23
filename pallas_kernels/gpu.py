"""What the Hopper kernels of every operation share: refusals, shared memory, products on the matrix units."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, nvvm, vector
from jaxtyping import Bool, Float, Float32, Shaped

LOG2_E = math.log2(math.e)

HIDDEN = 1e30
"""Subtracted from the exponents of rows that see nothing: their probabilities are 0."""

TILE_ROWS = 64
"""Rows of one product of a warpgroup."""

ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)
"""One value per row of a tile in registers."""

COLUMN_LAYOUT = plgpu.Layout.WGMMA.reduce(0)
"""One value per column of a tile in registers."""

SHARED_MEMORY = 227 * 1024
"""Bytes of shared memory that one thread block may use on Hopper."""

WARPS = 4
"""Warps of a warpgroup."""

Ref = Any
Held = dict[tuple[int, int], jax.Array | Ref]
"""Columns (first, number) of a left operand: where they are read from."""

Parts = list[tuple[jax.Array | Ref, Ref]]
"""Left and right operands of products that are summed; the left ones in registers or shared memory."""


def on_hopper(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation to register: `kernel` where the default device is a Hopper GPU.

    Args:
      kernel: an operation's Mosaic GPU implementation.

    Returns:
      A function of the same arguments. It raises NotImplementedError on another device.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", None)
        if capability != "9.0":
            seen = f"compute capability {capability}" if capability else f"platform {device.platform!r}"
            raise NotImplementedError(f"the Mosaic GPU kernel needs a Hopper GPU (compute capability 9.0), not {seen}")
        return kernel(*args, **kwargs)

    return run


def check_covered(dtype: Any, group_size: int, head_dim: int, kernel: str = "Mosaic GPU") -> None:
    """Refuses queries that the GPU kernels do not take.

    Args:
      dtype: of q, k and v.
      group_size: G, query heads per KV head.
      head_dim: D.
      kernel: what the message calls them.

    Raises:
      NotImplementedError: names the argument, the value seen and those that are covered.
    """
    if dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"the {kernel} kernel takes bfloat16 and float16, not {dtype}")
    if head_dim not in (64, 128):
        raise NotImplementedError(f"the {kernel} kernel takes head sizes 64 and 128, not {head_dim}")
    if group_size > 8:
        raise NotImplementedError(f"the {kernel} kernel takes at most 8 query heads per KV head, not {group_size}")


def in_eights(x: Shaped[jax.Array, "B L ..."], **how: Any) -> Shaped[jax.Array, "B P ..."]:
    """Pads the second axis to a multiple of 8: a copy of many rows takes them from an array of whole groups of 8."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % 8), *[(0, 0)] * (x.ndim - 2)], **how)


def delta_of(
    o: Float[jax.Array, "B T N G D"], do: Float[jax.Array, "B T N G D"], dlse: Float32[jax.Array, "B T N G"]
) -> Float32[jax.Array, "B T N G"]:
    """What the gradient of a row's logits subtracts: its sum of do x o, less the log-sum-exp's cotangent."""
    return jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse


def tile_memory(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory that the matrix units read: 128-byte swizzle over tiles of 8 rows."""
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


def product(left: jax.Array | Ref, right: Ref, columns: int, interpret: Any = None) -> jax.Array:
    """left @ right on the matrix units: 64 rows, float32; `left` in registers or shared memory."""
    return sum_of_products([(left, right)], columns, interpret)


def sum_of_products(parts: Parts, columns: int, interpret: Any = None) -> jax.Array:
    """The sum of left @ right over the parts, as `product`."""
    if interpret is not None and any(isinstance(left, jax.Array) for left, _ in parts):
        return sum(_interpreted_product(left[...], right) for left, right in parts)

    def multiply(acc_ref: Ref) -> jax.Array:
        for left, right in parts:
            plgpu.wgmma(acc_ref, left, right)
        return acc_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE_ROWS, columns), jnp.float32))


def add_product(acc: jax.Array, left: jax.Array | Ref, right: Ref, interpret: Any) -> jax.Array:
    """acc + left @ right on the matrix units; `left` in registers or shared memory."""

    def accumulate(acc_ref: Ref) -> None:
        plgpu.wgmma(acc_ref, left, right)

    if interpret is None:
        return pl.run_state(accumulate)(plgpu.ACC.init(acc))

    return acc + _interpreted_product(left[...], right)


def _interpreted_product(left: jax.Array, right: Ref) -> jax.Array:
    # The interpreter multiplies from shared memory alone. The fence stands between a plain read and the next copy.
    product = jnp.dot(left, right[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()
    return product


def products_in_flight(
    first: Parts, second: Parts, columns: int, use: Callable[[jax.Array, Callable[[], jax.Array]], Any], interpret: Any
) -> Any:
    """Two of `sum_of_products`; `use(first value, function that waits for the second)` runs meanwhile."""
    if interpret is not None:
        return use(sum_of_products(first, columns, interpret), lambda: sum_of_products(second, columns, interpret))

    def multiply(first_ref: Ref, second_ref: Ref) -> Any:
        for acc_ref, parts in ((first_ref, first), (second_ref, second)):
            for left, right in parts:
                plgpu.wgmma(acc_ref, left, right)
        return use(plgpu.wgmma_accumulator_load(first_ref, wait_n=len(second)), lambda: second_ref[...])

    acc = plgpu.ACC((TILE_ROWS, columns), jnp.float32)
    return pl.run_scoped(multiply, acc, acc)


def hold(tile: Ref, held: int) -> Held:
    """A left operand: its first `held` columns in registers from now on, the rest read from shared memory each time."""
    lefts: Held = {}
    if held:
        lefts[0, held] = plgpu.load(tile.at[:, pl.ds(0, held)], layout=plgpu.Layout.WGMMA)
    if held < tile.shape[1]:
        rest = tile.shape[1] - held
        lefts[held, rest] = tile.at[:, pl.ds(held, rest)]
    return lefts


def times_transpose(left: Held, right: Ref) -> Parts:
    """The parts of left @ right.T."""
    return [(part, right.at[:, pl.ds(*columns)].transpose((1, 0))) for columns, part in left.items()]


def add_two_products(
    accs: tuple[jax.Array, jax.Array],
    lefts: tuple[jax.Array | Ref, jax.Array | Ref],
    rights: tuple[Ref, Ref],
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Two of `add_product`, in flight together."""
    if interpret is not None:
        return tuple(add_product(*x, interpret) for x in zip(accs, lefts, rights, strict=True))

    def accumulate(acc_refs: tuple[Ref, Ref]) -> None:
        for acc_ref, left, right in zip(acc_refs, lefts, rights, strict=True):
            plgpu.wgmma(acc_ref, left, right)

    return pl.run_state(accumulate)(tuple(plgpu.ACC.init(acc) for acc in accs))


def any_positive(x: Float32[jax.Array, "64 C"], interpret: Any) -> Bool[jax.Array, ""]:
    """Whether an element that the calling warp holds (16 rows of a tile) is positive; of all rows when interpreting."""
    if interpret is not None:
        return jnp.any(x > 0)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=plgpu.ShapeDtypeStruct((), jnp.bool_, None))
    def vote(_: Any, held: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        flat = [vector.extract(pair, [], [i]) for pair in held.registers.flat for i in range(pair.type.shape[0])]
        zero = arith.constant(ir.F32Type.get(), 0.0)
        positive = [arith.cmpf(arith.CmpFPredicate.OGT, value, zero) for value in flat]
        everyone = arith.constant(ir.IntegerType.get_signless(32), -1)
        found = nvvm.vote_sync(everyone, functools.reduce(arith.ori, positive), "any")
        return mgpu.FragmentedArray.splat(found, (), is_signed=False)

    return vote(x)


def fold_columns(fold: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """[64, C] to [64, 8]: columns that one thread holds, folded without asking another thread."""
    return functools.reduce(fold, (x[:, i : i + 8] for i in range(0, x.shape[1], 8)))


def add_products(
    acc: jax.Array,
    left: Callable[[Any, slice], tuple[Any, jax.Array]],
    carry: Any,
    right: Ref,
    parts: int,
    interpret: Any,
) -> tuple[jax.Array, Any]:
    """acc + left @ right, where the columns of `left` come one part after another, each while the last is multiplied.

    Args:
      acc: [64, columns] float32.
      left: (carry, columns) -> carry and these columns of the left operand, in registers.
      carry: what the first call is given.
      right: in shared memory.
      parts: how many.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      The sum, and the last carry.
    """
    size = right.shape[0] // parts
    columns = [slice(i * size, (i + 1) * size) for i in range(parts)]
    if interpret is not None:
        for own in columns:
            carry, part = left(carry, own)
            acc = add_product(acc, part, right.at[pl.ds(own.start, size)], interpret)
        return acc, carry

    def accumulate(acc_ref: Ref) -> tuple[jax.Array, Any]:
        carried = carry
        acc_ref[...] = acc
        for own in columns:
            carried, part = left(carried, own)
            plgpu.wgmma(acc_ref, part, right.at[pl.ds(own.start, size)])
        return acc_ref[...], carried

    return pl.run_scoped(accumulate, plgpu.ACC(acc.shape, jnp.float32))
