"""What the TPU kernels of every operation share: the chips they are made for, refusals, layouts, compiler options."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Shaped

from pallas_kernels.common import ArrayLike

LANES = 128
SUBLANES = 8
LOG2_E = math.log2(math.e)

_HEAD_DIMS = (64, 128)
_DTYPES = ("bfloat16", "float32")
# What a kernel leaves to the compiler's own buffers.
_VMEM_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation.

    Sources: https://docs.cloud.google.com/tpu/docs (peak FLOP/s, HBM bandwidth), `jax.experimental.pallas.tpu`'s
    `TpuInfo` of jax 0.11.2 (memories). The clock is what makes the matrix units' width reach the peak.

    Attributes:
      name: the name in topologies ("v5e").
      cores: TensorCores of one device, which share the grid's parallel axes.
      vmem_bytes: vector memory per core.
      smem_bytes: scalar memory per core.
      clock_hz: cycles per second.
      hbm_bytes_per_second: bandwidth per device.
      bf16_flops_per_second: peak per device.
    """

    name: str
    cores: int
    vmem_bytes: int
    smem_bytes: int
    clock_hz: float
    hbm_bytes_per_second: float
    bf16_flops_per_second: float


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", 1, 128 * 2**20, 2**20, 1.5e9, 819e9, 197e12),
        Chip("v5p", 2, 64 * 2**20, 2**20, 1.75e9, 2765e9, 459e12),
        Chip("v6e", 1, 128 * 2**20, 2**20, 1.75e9, 1640e9, 918e12),
    )
}
_DEVICE_KINDS = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "TPU v6 lite": "v6e"}
_SMALLEST = min(CHIPS.values(), key=lambda chip: chip.vmem_bytes)

_compiling_for: ContextVar[Chip | None] = ContextVar("_compiling_for", default=None)


@contextlib.contextmanager
def compiling_for(name: str) -> Iterator[Chip]:
    """Traces kernels for a chip that this machine does not have, to compile them ahead of time.

    Args:
      name: a key of `CHIPS`.

    Yields:
      The chip.

    Raises:
      ValueError: an unknown chip.
    """
    if name not in CHIPS:
        raise ValueError(f"chip is {name!r}, expected one of {', '.join(CHIPS)}")
    token = _compiling_for.set(CHIPS[name])
    try:
        yield CHIPS[name]
    finally:
        _compiling_for.reset(token)


def target_chip() -> Chip:
    """The chip that a kernel traced now is for: `compiling_for`'s, this machine's, or the one with the least VMEM."""
    chip = _compiling_for.get()
    if chip is None and jax.default_backend() == "tpu":
        chip = CHIPS.get(_DEVICE_KINDS.get(jax.devices()[0].device_kind, ""))
    return chip or _SMALLEST


def interpreted() -> bool:
    """Whether a kernel traced now is interpreted: wherever there is no TPU and none is compiled for."""
    return _compiling_for.get() is None and jax.default_backend() != "tpu"


def check_arrays(operation: str, q: ArrayLike) -> None:
    """Refuses what no TPU kernel covers.

    Args:
      operation: named in the message.
      q: the queries; the last axis is D.

    Raises:
      NotImplementedError: q's dtype or head size, with the supported ones.
    """
    if q.dtype.name not in _DTYPES:
        raise NotImplementedError(f"{operation} on TPU has dtype {q.dtype}, supported are {' and '.join(_DTYPES)}")
    if q.shape[-1] not in _HEAD_DIMS:
        supported = " and ".join(map(str, _HEAD_DIMS))
        raise NotImplementedError(f"{operation} on TPU has D = {q.shape[-1]}, supported are {supported}")
    if q.shape[-2] > SUBLANES:
        raise NotImplementedError(f"{operation} on TPU has G = {q.shape[-2]}, supported are 1 to {SUBLANES}")


def check_block_size(operation: str, block_size: int, supported: Sequence[int]) -> None:
    """Raises NotImplementedError unless block_size is one of the supported."""
    if block_size not in supported:
        raise NotImplementedError(
            f"{operation} on TPU has block_size {block_size}, supported are {', '.join(map(str, supported))}"
        )


def buffer_bytes(shape: Sequence[int], dtype: Any, copies: int = 1) -> int:
    """VMEM bytes of a buffer whose last two axes are padded to whole tiles.

    Args:
      shape: of one copy.
      dtype: of its elements.
      copies: 2 for what the pipeline double-buffers.
    """
    itemsize = np.dtype(dtype).itemsize
    *lead, rows, columns = (1, *shape) if len(shape) < 2 else shape
    tile_rows = SUBLANES * max(4 // itemsize, 1)
    padded = -(-rows // tile_rows) * tile_rows * -(-columns // LANES) * LANES
    return copies * math.prod(lead) * padded * itemsize


def vmem_limit(operation: str, buffers: Mapping[str, int]) -> int:
    """The `vmem_limit_bytes` of a kernel with these buffers.

    Args:
      operation: named in the message.
      buffers: bytes by what they hold, see `buffer_bytes`; the values of a kernel's inner loop included.

    Returns:
      What the kernel may use of the target chip's VMEM.

    Raises:
      NotImplementedError: the buffers exceed it, with the sum.
    """
    chip = target_chip()
    limit = int(chip.vmem_bytes * _VMEM_SHARE)
    total = sum(buffers.values())
    if total > limit:
        terms = " + ".join(f"{name} {size / 2**20:.2f}" for name, size in buffers.items())
        raise NotImplementedError(
            f"{operation} needs {total / 2**20:.2f} MiB of VMEM ({terms}), "
            f"{chip.name} has {chip.vmem_bytes / 2**20:.0f} MiB, of which a kernel may use {limit / 2**20:.2f}"
        )
    return limit


def compiler_params(semantics: Sequence[str], vmem_limit_bytes: int, **options: Any) -> pltpu.CompilerParams:
    """Compiler options of a kernel.

    Args:
      semantics: "parallel" or "arbitrary" per grid axis.
      vmem_limit_bytes: see `vmem_limit`.
      **options: further fields of `pltpu.CompilerParams`.
    """
    return pltpu.CompilerParams(dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem_limit_bytes, **options)


def cost(flops: float, transcendentals: float, *arrays: Any) -> pl.CostEstimate:
    """What XLA's scheduler is told of a kernel.

    Args:
      flops: of the whole call.
      transcendentals: exponentials of the whole call.
      *arrays: anything with shape and dtype that is read or written once.
    """
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)
    return pl.CostEstimate(flops=int(flops), transcendentals=int(transcendentals), bytes_accessed=int(size))


def dot_precision(dtype: Any) -> jax.lax.Precision:
    """Precision of a kernel's products: bfloat16 ones are exact in one pass, float32 ones take the highest."""
    return jax.lax.Precision.HIGHEST if np.dtype(dtype) == np.float32 else jax.lax.Precision.DEFAULT


def pad_axis(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
    """Pads an axis at its end up to `size`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def group_major(x: Shaped[Array, "B T N G *rest"], tokens: int) -> Shaped[Array, "B N G padded *rest"]:
    """Queries, or values per query, with their tokens innermost: a tile of them is G equal runs of rows.

    Nothing is padded but the tokens: seven heads stay seven. A tile of 16 tokens' multiple flattens to
    [G * tile, D] for free.

    Args:
      x: one entry per query head.
      tokens: T after padding with zeros.
    """
    return pad_axis(jnp.moveaxis(x, 1, 3), 3, tokens)


def from_group_major(x: Shaped[Array, "B N G padded *rest"], queries: int) -> Shaped[Array, "B T N G *rest"]:
    """Inverse of `group_major`: the first `queries` tokens, back in their order."""
    return jnp.moveaxis(x[:, :, :, :queries], 3, 1)


def keys_head_major(x: Shaped[Array, "B S N D"], keys: int) -> Shaped[Array, "B N padded D"]:
    """Keys or values with one head's rows together, padded with zeros to `keys` rows."""
    return pad_axis(jnp.moveaxis(x, 1, 2), 2, keys)
