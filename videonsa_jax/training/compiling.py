"""Compiling the programs of a step: ahead of their first use, on time that is counted, and rightly."""

import functools
import re
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered

# XLA of jaxlib 0.11.2: of float32 sums that are rounded to bfloat16 and then added, one of them reshaped, these passes
# make one sum in bfloat16 that keeps the float32 addition. The combiner of all-reduces tells data types by that
# addition: it joins this sum with float32 ones, as bfloat16. Their results are garbage: here the losses, the counts and
# gradients of norms, where a batch has one question a video.
_PASSES_THAT_MIX_TYPES = "all-reduce-reassociate,reduce-scatter-reassociate"

# SparseCores gather and reduce-scatter while the TensorCore computes, where the devices that exchange lie along one
# axis of the torus. v5e has none: there gathers are steps of fused products, without being told.
_WITH_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite")
_EXCHANGES_ON_SPARSE_CORES = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
}

_REDUCTION = re.compile(r"%(\S+) = (.*?) (?:all-reduce|reduce-scatter)(?:-start)?\(.*to_apply=%([^,\s]+)")
_SCALAR_FUNCTION = re.compile(r"%(\S+) \(.*\) -> (\w+)\[\] \{$")
_ARRAY_TYPE = re.compile(r"\b([a-z]+\d*)\[")


class TimedJit:
    """A jitted function that is compiled ahead for each set of shapes it meets, the time kept apart.

    Attributes:
      seconds: that callers stood still for tracing and compiling so far.
    """

    def __init__(self, function: Callable, mesh: Mesh, *, sparse_cores: bool = False, **options: Any):
        self._jitted = jax.jit(function, **options)
        self._compile = functools.partial(compile_program, mesh=mesh, sparse_cores=sparse_cores)
        self._programs: dict[Any, Callable | Future[Callable]] = {}
        self.seconds = 0.0

    def start_compiling(self, pool: Executor, *args: Any) -> None:
        """Compiles in `pool` for these arrays, or for shapes that say where theirs will lie."""
        start = time.perf_counter()
        self._programs[signature(args)] = pool.submit(self._compile, self._jitted.lower(*args))
        self.seconds += time.perf_counter() - start

    def __call__(self, *args: Any) -> Any:
        """Calls the function with arrays that are on the devices already."""
        key = signature(args)
        program = self._programs.get(key)
        if not callable(program):
            start = time.perf_counter()
            program = program.result() if isinstance(program, Future) else self._compile(self._jitted.lower(*args))
            self._programs[key] = program
            self.seconds += time.perf_counter() - start
        # A hidden copy from the host would stall every step: what enters one was put on the devices beforehand.
        with jax.transfer_guard_host_to_device("disallow"):
            return program(*args)


def signature(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a compiled program fits: the arguments' tree, and their leaves' shapes and dtypes."""
    leaves, structure = jax.tree.flatten(args)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def compile_program(lowered: Lowered, mesh: Mesh, *, sparse_cores: bool = False) -> Compiled:
    """Compiles a program that adds up gradients over a mesh.

    Args:
      lowered: the program; its arguments say where they lie.
      mesh: the devices.
      sparse_cores: as `train.sparse_cores`.

    Raises:
      RuntimeError: several GPUs would add arrays of one data type as if they were of another.
      ValueError: the devices have no SparseCores that could be asked.
    """
    program = lowered.compile(compiler_options=compiler_options(mesh, sparse_cores=sparse_cores))
    if not _is_several_gpus(mesh):
        return program
    if mixed := mixed_reductions(program.as_text() or ""):
        raise RuntimeError(
            f"XLA compiled {', '.join(mixed)} to add one data type as another, expected one type in a sum: its result "
            "would be wrong (videonsa_jax/training/compiling.py names the cause known of XLA in jaxlib 0.11.2)"
        )
    return program


def compiler_options(mesh: Mesh, *, sparse_cores: bool) -> dict[str, str | bool]:
    """What XLA is told of a program for these devices.

    Args:
      mesh: the devices.
      sparse_cores: as `train.sparse_cores`.

    Raises:
      ValueError: the devices have no SparseCores.
    """
    kind = mesh.devices.flat[0].device_kind
    if sparse_cores and kind not in _WITH_SPARSE_CORES:
        raise ValueError(f"train.sparse_cores is true on a {kind}, expected one of {', '.join(_WITH_SPARSE_CORES)}")
    if _is_several_gpus(mesh):
        return {"xla_disable_hlo_passes": _PASSES_THAT_MIX_TYPES}
    return _EXCHANGES_ON_SPARSE_CORES if sparse_cores and mesh.size > 1 else {}


def _is_several_gpus(mesh: Mesh) -> bool:
    return mesh.size > 1 and mesh.devices.flat[0].platform in ("gpu", "cuda", "rocm")


def mixed_reductions(text: str) -> list[str]:
    """The all-reduces and reduce-scatters of a compiled program whose arrays are not of their addition's data type.

    Args:
      text: the program's HLO, `compiled.as_text()`.
    """
    lines = text.splitlines()
    functions = (_SCALAR_FUNCTION.match(line) for line in lines if line.endswith("{"))
    type_of = {match[1]: match[2] for match in functions if match}
    reductions = (_REDUCTION.search(line) for line in lines if "to_apply=" in line)
    return [
        match[1]
        for match in reductions
        if match and match[3] in type_of and set(_ARRAY_TYPE.findall(match[2])) != {type_of[match[3]]}
    ]
