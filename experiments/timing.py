"""Times of device work, errors against a reference, memory that shows what is not written."""

import contextlib
import fcntl
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

SAMPLE_SECONDS = 0.02


@contextlib.contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Holds the lock of a file while the device works, so that processes may compile meanwhile; None: does nothing."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def median_ms(function: Callable[..., Any], inputs: Sequence[tuple[Any, ...]], samples: int = 5) -> dict[str, Any]:
    """Times a compiled function.

    Args:
      function: returns device arrays.
      inputs: argument tuples that the samples rotate among.
      samples: how many; each is as many calls as fill 20 ms.

    Returns:
      median_ms, samples_ms and calls_per_sample.
    """
    for arguments in inputs[:2]:
        jax.block_until_ready(function(*arguments))
    begin = time.perf_counter()
    jax.block_until_ready(function(*inputs[0]))
    calls = max(1, min(50, int(SAMPLE_SECONDS / (time.perf_counter() - begin))))
    seen = []
    for sample in range(samples):
        arguments = inputs[sample % len(inputs)]
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        seen.append(1e3 * (time.perf_counter() - begin) / calls)
    return {"median_ms": statistics.median(seen), "samples_ms": seen, "calls_per_sample": calls}


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """Norm of the difference over the norm of `expected` (over 1 where that is 0), in float32; NaN if anything is."""
    return float(relative_distance(actual, expected))


@jax.jit
def relative_distance(actual: jax.Array, expected: jax.Array) -> jax.Array:
    """`relative_error` on the device."""
    actual, expected = actual.astype(jnp.float32), expected.astype(jnp.float32)
    norm = jnp.linalg.norm(expected.ravel())
    return jnp.linalg.norm((actual - expected).ravel()) / jnp.where(norm == 0, 1.0, norm)


def poison(*like: Any) -> None:
    """Leaves NaN in freed memory of these floating arrays' sizes: an output that is not written shows."""
    jax.block_until_ready(nans(floating_shapes(*like)))


def floating_shapes(*like: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes and dtypes of those arrays that are not of integers."""
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like if jnp.issubdtype(x.dtype, jnp.floating))


@functools.partial(jax.jit, static_argnums=0)
def nans(shapes: tuple[jax.ShapeDtypeStruct, ...]) -> list[jax.Array]:
    """Arrays of NaN."""
    return [jnp.full(x.shape, jnp.nan, x.dtype) for x in shapes]
