"""Stand-ins for the call of a Triton kernel from JAX, on machines without a GPU.

jax_triton cannot even be imported there. `interpreted` runs kernels under Triton's interpreter, whose tensors may be
anything that has an address and a dtype; `launches` records what a call would launch, and `compiled` builds that for a
Hopper GPU.
"""

import contextlib
import dataclasses
import functools
import re
import subprocess
import tempfile
import threading
import types
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import triton_calls

_TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "uint32": "u32"}


_ONE_AT_A_TIME = threading.Lock()


class _Pointer:
    """An array for the interpreter."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = _TYPES[array.dtype.name]

    def data_ptr(self):
        return self.array.ctypes.data


def _interpret(kernel: Any, grid: tuple[int, ...], constants: dict[str, Any], outs: Any, *arrays: Any) -> Any:
    from triton.runtime.interpreter import GridExecutor

    class OnHost(GridExecutor):
        """Arrays are where the interpreter reads and writes them."""

        def _init_args_hst(self, args, kwargs):
            return args, kwargs

        def _restore_args_dev(self, *args):
            pass

    inputs = [np.ascontiguousarray(x) for x in arrays]
    # What the kernel does not write shows.
    results = [np.full(x.shape, -(2**30) if jnp.issubdtype(x.dtype, jnp.integer) else np.nan, x.dtype) for x in outs]
    function = _rewritten(kernel.fn)
    run = OnHost(function.rewrite(), function.arg_names, grid)
    # The interpreter knows of one program at a time.
    with _ONE_AT_A_TIME:
        run(*map(_Pointer, inputs), *map(_Pointer, results), **constants)
    return results


@functools.cache
def _rewritten(function: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


def _widened(handle: Any, interpreter: Any) -> Any:
    import triton.language as tl

    if handle.dtype != tl.bfloat16:
        return handle
    data = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(data.view(np.float32), tl.float32)


@contextlib.contextmanager
def interpreted():
    """Kernels run under the interpreter, results filled with NaN before."""
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor, scope):
        patch_tensor(tensor, scope)
        # The interpreter keeps a scalar as an array of one element, which numpy no longer converts to an int.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with mock.patch.object(interpreter, "_patch_lang_tensor", patch_tensor_and_index):
        scope = interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def launch(kernel, *arrays, out_shapes, grid, num_warps, num_stages, **constants):
        del num_warps, num_stages
        run = functools.partial(_interpret, kernel, grid, constants, out_shapes)
        return jax.pure_callback(run, list(out_shapes), *arrays)

    multiply = interpreter.InterpreterBuilder.create_dot

    def multiply_widened(self, a, b, *others):
        # It multiplies the bits of bfloat16 as if they were integers.
        a, b = (_widened(x, interpreter) for x in (a, b))
        return multiply(self, a, b, *others)

    convert = interpreter._convert_float

    def convert_to_nearest(data, source, target, rounding):
        # It cuts the lower bits off, where the device rounds to the nearest value.
        if source == tl.float32 and target == tl.bfloat16:
            return np.asarray(data, np.float32).astype(jnp.bfloat16).view(np.uint16)
        return convert(data, source, target, rounding)

    with (
        mock.patch.object(triton_calls, "launch", launch),
        mock.patch.object(interpreter, "_convert_float", convert_to_nearest),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", multiply_widened),
        # It would patch the language again for every call of a helper, and not take that back.
        mock.patch.object(interpreter, "_patch_lang", return_value=interpreter._LangPatchScope()),
        # A kernel's helpers are called while it is interpreted.
        mock.patch.object(JITFunction, "__call__", lambda self, *args, **kwargs: _rewritten(self.fn)(*args, **kwargs)),
    ):
        try:
            yield
        finally:
            scope.restore()


@dataclasses.dataclass(frozen=True)
class Launch:
    """What `triton_calls.launch` was asked for; arrays and results as (shape, dtype)."""

    kernel: Any
    arrays: tuple[jax.ShapeDtypeStruct, ...]
    out_shapes: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    num_warps: int
    num_stages: int
    constants: dict[str, Any]


def launches(function: Any, *shapes: Any) -> list[Launch]:
    """The launches of function(*shapes), traced."""
    seen = []

    def launch(kernel, *arrays, out_shapes, grid, num_warps, num_stages, **constants):
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        seen.append(Launch(kernel, shapes, tuple(out_shapes), grid, num_warps, num_stages, constants))
        return [jnp.zeros(x.shape, x.dtype) for x in out_shapes]

    with mock.patch.object(triton_calls, "launch", launch):
        jax.eval_shape(function, *shapes)
    return seen


@dataclasses.dataclass(frozen=True)
class Built:
    """A kernel compiled for compute capability 9.0.

    Attributes:
      ptx: the assembly.
      shared_memory: bytes of a program.
      registers: per thread.
      spills: bytes that a thread stores to and loads from local memory.
    """

    ptx: str
    shared_memory: int
    registers: int
    spills: int


def compiled(launch: Launch) -> Built:
    """Compiles a launch as jax_triton does: pointers are multiples of 16 bytes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    arrays = [f"*{_TYPES[jnp.dtype(x.dtype).name]}" for x in (*launch.arrays, *launch.out_shapes)]
    signature = dict(zip(names, arrays, strict=False)) | dict.fromkeys(launch.constants, "constexpr")
    assert set(signature) == set(names), "arguments of the kernel that the launch does not pass, or the reverse"
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))}
    source = ASTSource(launch.kernel, signature, launch.constants, aligned)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    registers, spills = _assembled(built.asm["ptx"])
    return Built(built.asm["ptx"], built.metadata.shared, registers, spills)


def _assembled(ptx: str) -> tuple[int, int]:
    """Registers and bytes spilled, as ptxas says."""
    import triton.backends.nvidia as nvidia

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
        command = [ptxas, "-v", "--gpu-name", "sm_90a", source, "-o", Path(folder, "kernel.cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", said)
    return int(re.search(r"Used (\d+) registers", said)[1]), sum(map(int, spilled))
