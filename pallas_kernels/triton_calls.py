"""What the Triton kernels of every operation share: the device they need, refusals, the call from JAX.

jax_triton and triton are imported when a kernel is called, not before: most machines have neither.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels import gpu

OLDEST = 8.0
"""Compute capability from which on the kernels run: they copy to shared memory asynchronously and take bfloat16."""


check_covered = functools.partial(gpu.check_covered, kernel="Triton")
"""`gpu.check_covered`, which says so of Triton's kernels."""


def on_nvidia(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation to register: `kernel` where the default device is an NVIDIA GPU that Triton's kernels run on.

    Args:
      kernel: an operation's Triton implementation.

    Returns:
      A function of the same arguments. It raises NotImplementedError on another device, or without Triton.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        device = jax.devices()[0]
        capability = getattr(device, "compute_capability", None)
        # An AMD device names its architecture here (gfx942), not a number.
        if capability is None or capability.startswith("gfx") or float(capability) < OLDEST:
            seen = f"compute capability {capability}" if capability else f"platform {device.platform!r}"
            raise NotImplementedError(
                f"the Triton kernel needs an NVIDIA GPU of compute capability {OLDEST} or more, not {seen}"
            )
        missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
        if missing:
            raise NotImplementedError(f"the Triton kernel needs the package {missing[0]}, which is not installed")
        return kernel(*args, **kwargs)

    return run


def launch(
    kernel: Any,
    *arrays: jax.Array,
    out_shapes: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
      kernel: a `triton.jit` function: pointers to the arrays, pointers to the results, then constants.
      *arrays: what the kernel reads, row-major.
      out_shapes: of the results; memory that the kernel does not write holds anything.
      grid: number of programs per axis, at most three.
      num_warps: of a program.
      num_stages: of the pipelined loops that do not state their own.
      **constants: the kernel's `tl.constexpr` arguments.

    Returns:
      The results.
    """
    import jax_triton

    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        out_shape=list(out_shapes),
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        **constants,
    )
