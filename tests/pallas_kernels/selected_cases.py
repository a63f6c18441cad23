"""Drawn calls of selected attention, and the comparison of kernels with the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.selected_attention import reference

BLOCK = 64


def draw(shape, seed, dtype, end=None):
    """Normal values, NaN from `end[b]` on along the second axis."""
    x = np.random.default_rng([seed, *shape]).standard_normal(shape)
    if end is not None:
        index = np.arange(shape[1])
        x[index[None] >= np.asarray(end)[:, None]] = np.nan
    return jnp.asarray(x, dtype)


def draw_choice(batch, queries, heads, places, q_offset, keys, seed):
    """Each query's own block and earlier ones, in any order, padded with -1."""
    rng = np.random.default_rng(seed)
    index = np.full((batch, queries, heads, places), -1, np.int32)
    for b, t, n in np.ndindex(batch, queries, heads):
        current = min(q_offset + t, keys - 1) // BLOCK
        earlier = rng.permutation(current)[: places - 1]
        index[b, t, n, : len(earlier) + 1] = rng.permutation([*earlier, current])
    return index


def compare(operation, dtype, group, size, *, batch=1, heads=1, queries, keys, places, q_offset=0, lengths=None):
    """Checks output, log-sum-exp and gradients of `operation`; what lies past `lengths` is NaN."""
    index = draw_choice(batch, queries, heads, places, q_offset, keys, 3)
    index[0, queries // 2] = -1
    ends = (keys,) * batch if lengths is None else lengths
    past = np.clip(np.asarray(ends) - q_offset, 0, queries)
    q = draw((batch, queries, heads, group, size), 0, dtype, past)
    k, v = (draw((batch, keys, heads, size), seed, dtype, ends) for seed in (1, 2))
    do, dlse = draw(q.shape, 4, dtype, past), draw(q.shape[:-1], 5, jnp.float32, past)
    options = {"block_size": BLOCK, "lengths": None if lengths is None else jnp.asarray(lengths, jnp.int32)}

    @jax.jit
    def run(q, k, v, offset):
        attend = functools.partial(operation, **options, q_offset=offset)
        results, back = jax.vjp(lambda q, k, v: attend(q, k, v, index), q, k, v)
        return *results, *back((do, dlse))

    def exact(q, k, v):
        q, k, v = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (q, k, v))
        results, back = jax.vjp(
            lambda q, k, v: reference.selected_attention(q, k, v, index, **options, q_offset=q_offset), q, k, v
        )
        return *results, *back((jnp.nan_to_num(do.astype(jnp.float32)), jnp.nan_to_num(dlse)))

    actual, expected = run(q, k, v, q_offset), exact(q, k, v)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.shape == y.shape, name
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(x).all(), f"{name} is not finite"
        if name == "lse":
            np.testing.assert_array_equal(x == EMPTY_LSE, y == EMPTY_LSE)
            x, y = (np.where(z == EMPTY_LSE, 0, z) for z in (x, y))
        seen = np.linalg.norm(x - y) / np.linalg.norm(y)
        # bfloat16 keeps 8 bits: 2e-3 for one rounding; probabilities and dS are rounded once more.
        limit = 1e-6 if name == "lse" else 6e-3 if dtype == jnp.bfloat16 else 1e-3
        assert seen <= limit, f"{name} is off by {seen}"
