"""Argument checks of the public functions: one sentence with the argument, what was seen and what was expected."""

import jax.numpy as jnp

from pallas_kernels.common import ArrayLike


def check_queries(q: ArrayLike, expected: str = "[B, T, N, G, D]") -> None:
    """Raises unless q has the axes `expected` and a floating dtype."""
    if q.ndim != expected.count(",") + 1:
        raise ValueError(f"q has shape {q.shape}, expected {expected} (N KV heads, G query heads of each)")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"q has dtype {q.dtype}, expected a floating type (float32, bfloat16 or float16)")
    if 0 in q.shape[-3:]:
        raise ValueError(f"q has shape {q.shape}, expected at least one KV head, query head and channel")


def check_keys(q: ArrayLike, name: str, x: ArrayLike, axis: str = "S") -> None:
    """Raises unless x is [B, axis, N, D] with q's batch, KV heads, head size and dtype (q [B, T, N, G, D])."""
    batch, _, heads, _, size = q.shape
    if x.ndim != 4 or (x.shape[0], x.shape[2], x.shape[3]) != (batch, heads, size):
        raise ValueError(
            f"{name} has shape {x.shape}, expected [{batch}, {axis}, {heads}, {size}] beside q of shape {q.shape}"
        )
    check_dtype(q, name, x)


def check_dtype(q: ArrayLike, name: str, x: ArrayLike) -> None:
    """Raises unless x has q's dtype."""
    if x.dtype != q.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, expected q's {q.dtype}")


def check_same_shape(name: str, x: ArrayLike, other_name: str, other: ArrayLike) -> None:
    """Raises unless both arrays have one shape."""
    if x.shape != other.shape:
        raise ValueError(f"{name} has shape {x.shape}, expected {other_name}'s {other.shape}")


def check_shape(name: str, x: ArrayLike, expected: tuple[int, ...], axes: str) -> None:
    """Raises unless x has the shape `expected`, whose axes are called `axes`."""
    if x.shape != expected:
        raise ValueError(f"{name} has shape {x.shape}, expected {axes} = {expected}")


def check_integers(name: str, x: ArrayLike | None, expected: tuple[int, ...], axes: str) -> None:
    """Raises unless x is None or an integer array of the shape `expected`, whose axes are called `axes`."""
    if x is None:
        return
    check_shape(name, x, expected, axes)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {x.dtype}, expected int32")


def check_positive(name: str, value: int) -> None:
    """Raises unless value is at least 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def check_block_choice(block_count: int, init_blocks: int, local_blocks: int) -> None:
    """Raises unless the forced blocks fit: init_blocks, local_blocks and always the current block."""
    check_positive("block_count", block_count)
    if init_blocks < 0 or local_blocks < 0:
        raise ValueError(f"init_blocks is {init_blocks} and local_blocks {local_blocks}, expected neither below 0")
    if init_blocks + max(local_blocks, 1) > block_count:
        raise ValueError(
            f"init_blocks {init_blocks} and local_blocks {local_blocks} (the current block counts as one) add up to "
            f"{init_blocks + max(local_blocks, 1)}, expected at most block_count {block_count}"
        )
