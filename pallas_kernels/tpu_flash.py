"""Flash attention on TPU over one interval of keys per query: compressed, window and prefix attention are three rules.

A query sees the keys [end - window, end), or [0, end) without a window. Queries lie on lanes: the logits of a tile are
[keys, G * tokens], so that maxima and sums over keys are elementwise across registers, a query's statistics are rows
of one sublane, and log-sum-exps leave as dense rows. Tiles that no query of a tile sees are skipped by bounds that XLA
computes per tile of queries and that arrive as scalars; tiles that every query sees whole skip the mask.

The recurrence and its gradient are FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu
from pallas_kernels.common import EMPTY_LSE
from pallas_kernels.tpu_flash_kernels import Call, Tiles


def interval_attention(
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    end: Int[jax.Array, "B T"],
    *,
    name: str,
    tiles: Tiles,
    window: int | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the keys [max(end - window, 0), end) of each query; differentiable in q, k and v.

    Args:
      q: queries, finite.
      k: keys, finite: what is hidden is multiplied by 0.
      v: values, likewise.
      end: one past the last key that a query sees, at most S; 0 for a query that sees none.
      name: the operation, for messages and profiles.
      tiles: sizes for long inputs; short ones take smaller tiles.
      window: keys that a query sees at most; None: all before `end`. The ends of a window's queries ascend by one.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.

    Raises:
      NotImplementedError: a head size, group, dtype or tile that the kernels do not cover.
    """
    tpu.check_arrays(name, q)
    batch, queries, heads, group, size = q.shape
    keys = k.shape[1]
    if 0 in (batch, queries, keys):
        return jnp.zeros_like(q), jnp.full(q.shape[:-1], EMPTY_LSE)
    if queries >= tpu.LANES:
        rows = tpu.group_major(q, _whole(queries, _fit(tiles, queries, keys).queries))
        results = group_major_attention(rows, k, v, end, name=name, tiles=tiles, window=window)
        o, lse = (tpu.from_group_major(x, queries) for x in results)
        return o, lse
    # Few tokens: their heads fill the lanes instead, as if they were tokens of a group of one.
    folded = jnp.moveaxis(q, 3, 1).reshape(batch, group * queries, heads, 1, size)
    lanes = _whole(group * queries, tpu.LANES)
    tiles = dataclasses.replace(_fit(tiles, queries, keys), queries=lanes)
    results = _attention(tpu.group_major(folded, lanes), k, v, jnp.tile(end, (1, group)), name, tiles, window)
    results = (tpu.from_group_major(x, group * queries) for x in results)
    o, lse = (jnp.moveaxis(x.reshape(batch, group, queries, heads, *x.shape[4:]), 1, 3) for x in results)
    return o, lse


def group_major_attention(
    q: Float[jax.Array, "B N G padded D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    end: Int[jax.Array, "B T"],
    *,
    name: str,
    tiles: Tiles,
    window: int | None = None,
) -> tuple[Float[jax.Array, "B N G padded D"], Float32[jax.Array, "B N G padded"]]:
    """`interval_attention` of queries that lie as the kernels take them, T padded to whole tiles."""
    return _attention(q, k, v, end, name, _fit(tiles, q.shape[3], k.shape[1]), window)


def attention_in_place(
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    end: Int[jax.Array, "B T"],
    *,
    name: str,
    tiles: Tiles,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the keys [0, end) where they lie: for few queries, of which a copy of the keys would cost more.

    The rows of all KV heads pass through the matrix units, and each query takes every N-th: with few lanes of queries
    that is less work than reading the keys is. Not differentiable; nothing past the largest end is read.

    Args:
      q: queries; N * G * T at most 128.
      k: keys, N a power of two; what no query sees may hold NaN.
      v: values, likewise.
      end: one past the last key that a query sees, at most S; 0 for a query that sees none.
      name: the operation, for messages and profiles.
      tiles: sizes for many keys; few ones take smaller tiles. A key counts N times.

    Returns:
      As `interval_attention`.

    Raises:
      NotImplementedError: a head size, group, dtype or tile that the kernels do not cover.
    """
    tpu.check_arrays(name, q)
    batch, queries, heads, group, size = q.shape
    # Row s * N + n holds key s of head n; a query sees the rows end - 1, end - 1 - N, ...
    rows = [x.reshape(batch, -1, 1, size) for x in (k, v)]
    row_end = jnp.where(end > 0, (end - 1) * heads + 1, 0)[..., None] + jnp.arange(heads) * (end > 0)[..., None]
    lanes = q.reshape(batch, queries * heads * group, 1, 1, size)
    row_end = jnp.repeat(row_end.reshape(batch, queries * heads), group, axis=1)
    tiles = _fit(tiles, lanes.shape[1], rows[0].shape[1])
    q_rows = tpu.group_major(lanes, _whole(lanes.shape[1], tiles.queries))
    call = dataclasses.replace(Call.of(q_rows, rows[0], name, tiles, None), stride=heads)
    o, lse = call.forward(q_rows, *(jnp.moveaxis(x, 1, 2) for x in rows), call.ends(row_end))
    o, lse = (tpu.from_group_major(x, lanes.shape[1]) for x in (o, lse))
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])


def _fit(tiles: Tiles, queries: int, keys: int) -> Tiles:
    """The tiles, no larger than the arrays."""
    chunk = min(tiles.chunk, _whole(keys, tpu.LANES))
    return Tiles(min(tiles.queries, _whole(queries, tpu.LANES)), min(tiles.keys, _whole(keys, chunk)), chunk)


def _whole(x: int, unit: int) -> int:
    """x rounded up to a multiple."""
    return -(-x // unit) * unit


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, name: str, tiles: Tiles, window: int | None
) -> tuple[jax.Array, jax.Array]:
    return _attention_forward(q, k, v, end, name, tiles, window)[0]


def _attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array, name: str, tiles: Tiles, window: int | None
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, ...]]:
    call = Call.of(q, k, name, tiles, window)
    o, lse = call.forward(q, call.keys(k), call.keys(v), call.ends(end))
    return (o, lse), (q, k, v, end, o, lse)


def _attention_backward(
    name: str, tiles: Tiles, window: int | None, saved: tuple[jax.Array, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, end, o, lse = saved
    call = Call.of(q, k, name, tiles, window)
    empty = (call.ends(end) <= 0)[:, :, None]
    do, dlse = jnp.where(empty[..., None], 0, cotangents[0]), jnp.where(empty, 0, cotangents[1])
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    dq, dk, dv = call.backward(q, call.keys(k), call.keys(v), call.ends(end), do, lse, delta)
    dk, dv = (jnp.moveaxis(x[:, :, : k.shape[1]], 2, 1) for x in (dk, dv))
    return dq, dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)
