"""The engine of the XLA implementations: exact attention over chunks of queries, in memory linear in their number.

`attend` is one dense tile with a hand-written gradient that recomputes the probabilities from the log-sum-exp (as in
FlashAttention, arXiv 2205.14135, appendix B). `over_query_chunks` runs a tile per chunk of queries.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Float32, Int

from pallas_kernels.common import EMPTY_LSE, zero_where

TILE_ELEMENTS = 2**25
"""Elements of the largest array of one chunk (128 MiB in float32)."""

PREFIXES = 4
"""Evenly spaced prefixes of the keys that a loop's chunks choose from; causal queries compute 5/8 of all logits."""

_SAVED = ("chunk_output", "chunk_lse")


def _product(subscripts: str, left: jax.Array, right: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    # The default precision would round float32 operands to TF32 or bfloat16 on GPU and TPU. Sums are float32 whatever
    # dtype the result is rounded to.
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, left, right, precision=precision, preferred_element_type=dtype)


def _scores(tokens: jax.Array, keys: jax.Array) -> jax.Array:
    """Contracts D: [*X, C, G, D] with [*X, K, D] to [*X, C, G, K]."""
    # One batch axis and one row axis: XLA's CPU backend copies the tiles of products with more.
    product = _product("xrd,xkd->xrk", _rows(tokens), _flat(keys))
    return product.reshape(*tokens.shape[:-1], keys.shape[-2])


def _mix(tile: jax.Array, keys: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Contracts K: [*X, C, G, K] with [*X, K, D] to [*X, C, G, D]."""
    product = _product("xrk,xkd->xrd", _rows(tile), _flat(keys), dtype)
    return product.reshape(*tile.shape[:-1], keys.shape[-1])


def _to_keys(tokens: jax.Array, tile: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Contracts C and G: [*X, C, G, D] with [*X, C, G, K] to [*X, K, D]."""
    # In this order the small operand is the one that is transposed.
    product = jnp.swapaxes(_product("xrd,xrk->xdk", _rows(tokens), _rows(tile), dtype), 1, 2)
    return product.reshape(*tile.shape[:-3], *product.shape[1:])


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-3]), x.shape[-3] * x.shape[-2], x.shape[-1])


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def scaled_logits(q: Float[jax.Array, "*X C G D"], k: Float[jax.Array, "*X K D"]) -> Float32[jax.Array, "*X C G K"]:
    """Logits q k^T / sqrt(D), accumulated in float32."""
    return _scores(q, k.astype(q.dtype)) * q.shape[-1] ** -0.5


@jax.custom_vjp
def attend(
    q: Float[jax.Array, "*X C G D"],
    k: Float[jax.Array, "*X K D"],
    v: Float[jax.Array, "*X K D"],
    visible: Bool[jax.Array, "..."],
) -> tuple[Float[jax.Array, "*X C G D"], Float32[jax.Array, "*X C G"]]:
    """Attends inside one tile.

    Args:
      q: C tokens of G heads that share their keys, for any leading axes. Its dtype is that of the matrix products.
      k: keys, in q's dtype or in float32; their gradient has their dtype.
      v: values, likewise.
      visible: mask that broadcasts to the logits [*X, C, G, K].

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.
    """
    logits = jnp.where(visible, scaled_logits(q, k), -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0.0, top))
    total = jnp.sum(weights, axis=-1)
    empty = total == 0
    divisor = jnp.where(empty, 1.0, total)
    o = _mix(weights.astype(q.dtype), v.astype(q.dtype)) / divisor[..., None]
    return o.astype(q.dtype), jnp.where(empty, EMPTY_LSE, top[..., 0] + jnp.log(divisor))


def attend_gradient(
    q: Float[jax.Array, "*X C G D"],
    k: Float[jax.Array, "*X K D"],
    v: Float[jax.Array, "*X K D"],
    visible: Bool[jax.Array, "..."],
    o: Float[jax.Array, "*X C G D"],
    lse: Float32[jax.Array, "*X C G"],
    do: Float[jax.Array, "*X C G D"],
    dlse: Float32[jax.Array, "*X C G"],
) -> tuple[Float[jax.Array, "*X C G D"], Float[jax.Array, "*X K D"], Float[jax.Array, "*X K D"]]:
    """The gradient of `attend` in q, k and v, from its arguments, its results and their cotangents."""
    # A query without keys may be padding, its cotangent anything: 0 x NaN would reach the keys.
    do, dlse = (zero_where(lse == EMPTY_LSE, x) for x in (do, dlse))
    weights = jnp.exp(jnp.where(visible, scaled_logits(q, k), -jnp.inf) - lse[..., None])
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1) - dlse
    dv = _to_keys(do, weights.astype(q.dtype), v.dtype)
    dweights = _scores(do, v.astype(q.dtype))
    dlogits = (weights * (dweights - delta[..., None]) * q.shape[-1] ** -0.5).astype(q.dtype)
    return _mix(dlogits, k.astype(q.dtype), q.dtype), _to_keys(q, dlogits, k.dtype), dv


def _attend_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> tuple[Any, Any]:
    o, lse = (checkpoint_name(x, name) for x, name in zip(attend(q, k, v, visible), _SAVED, strict=True))
    return (o, lse), (q, k, v, visible, o, lse)


def _attend_backward(residuals: Any, cotangents: Any) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    return *attend_gradient(*residuals, *cotangents), None


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def _attend_prefix(
    q: Float[jax.Array, "*X C G D"],
    k: Float[jax.Array, "*X K D"],
    v: Float[jax.Array, "*X K D"],
    visible: Bool[jax.Array, "..."],
    end: Int[jax.Array, ""],
) -> tuple[Float[jax.Array, "*X C G D"], Float32[jax.Array, "*X C G"]]:
    """`attend` where no query sees a key at or past `end`: computes with the smallest of a few prefixes of the keys."""
    return _over_prefixes(attend, k.shape[-2], end)(q, k, v, visible)


def _over_prefixes(function: Callable[..., Any], keys: int, end: jax.Array) -> Callable[..., Any]:
    """`function(q, k, v, visible, ...)` on the shortest prefix of the keys that reaches `end`."""
    sizes = sorted({-(-keys * part // PREFIXES) for part in range(1, PREFIXES + 1)})

    def on_prefix(size: int) -> Callable[..., Any]:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, *rest: Any) -> Any:
            return function(q, k[..., :size, :], v[..., :size, :], visible[..., :size], *rest)

        return run

    # The first size that is not below `end`.
    place = jnp.searchsorted(jnp.asarray(sizes), jnp.minimum(end, keys))
    return lambda *args: jax.lax.switch(place, [on_prefix(size) for size in sizes], *args)


def _attend_prefix_forward(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array, end: jax.Array) -> Any:
    results = _attend_prefix(q, k, v, visible, end)
    o, lse = (checkpoint_name(x, name) for x, name in zip(results, _SAVED, strict=True))
    return (o, lse), (q, k, v, visible, o, lse, end)


def _attend_prefix_backward(residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    *arrays, end = residuals
    keys = arrays[1].shape[-2]

    def gradient(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        dq, *dkeys = attend_gradient(*arrays)
        return dq, *(jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, keys - x.shape[-2]), (0, 0)]) for x in dkeys)

    return *_over_prefixes(gradient, keys, end)(*arrays, *cotangents), None, None


_attend_prefix.defvjp(_attend_prefix_forward, _attend_prefix_backward)


def _chunks(queries: int, elements_per_query: int, tile_elements: int | None = None) -> int:
    most = TILE_ELEMENTS if tile_elements is None else tile_elements
    return max(-(-queries // max(most // max(elements_per_query, 1), 1)), 1)


def over_query_chunks(
    body: Callable[[Any], Any], per_query: Any, elements_per_query: int, tile_elements: int | None = None
) -> Any:
    """Applies `body` to chunks of the arrays in `per_query`, along their axis 1.

    Few queries make one chunk, without a loop. Otherwise the chunks run one after another and their gradients
    recompute everything but the results of `attend`.

    Args:
      body: maps arrays [B, C, ...] to arrays [B, C, ...], each query by itself.
      per_query: tree of arrays [B, T, ...].
      elements_per_query: elements of the largest array that `body` makes, divided by C.
      tile_elements: how large that array may be; None: `TILE_ELEMENTS`.

    Returns:
      The tree of arrays [B, T, ...] that `body(per_query)` is.
    """
    queries = jax.tree.leaves(per_query)[0].shape[1]
    chunks = _chunks(queries, elements_per_query, tile_elements)
    if chunks == 1:
        return body(per_query)
    size = -(-queries // chunks)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, chunks * size - queries)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], chunks, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], chunks * size, *x.shape[3:])[:, :queries]

    saved = jax.checkpoint_policies.save_only_these_names(*_SAVED)
    results = jax.lax.map(jax.checkpoint(body, policy=saved, prevent_cse=False), jax.tree.map(split, per_query))
    return jax.tree.map(join, results)


def dense_attention(
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    end: Int[jax.Array, "B T"],
    per_query: Any = (),
    visible: Callable[[Any], Bool[jax.Array, "..."]] | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to a prefix of the keys, or to those of its keys that a mask shows, which is made chunk by chunk.

    Args:
      q: queries.
      k: keys; what no query may see must be finite.
      v: values, likewise.
      end: one past the last key that a query may see.
      per_query: tree of arrays [B, T, ...] from which the mask is made.
      visible: maps a chunk [B, C, ...] of `per_query` to a mask that broadcasts to [B, N, C, S]; None hides nothing.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32.
    """
    batch, queries, heads, group, _ = q.shape
    elements = batch * heads * group * k.shape[1]
    # float32 carriers: the sum over chunks of the keys' gradients is kept in their dtype. One chunk (a decode step)
    # has no sum, and a copy of the cache would be its largest cost.
    carrier = k.dtype if _chunks(queries, elements) == 1 else jnp.float32
    keys, values = (jnp.swapaxes(x, 1, 2).astype(carrier) for x in (k, v))
    key = jnp.arange(k.shape[1])

    def body(chunk: Any) -> Any:
        q_chunk, end_chunk, rest = chunk
        seen = (key < end_chunk[..., None])[:, None]
        if visible is not None:
            seen &= visible(rest)
        arrays = jnp.swapaxes(q_chunk, 1, 2), keys, values, seen[..., None, :]
        o, lse = attend(*arrays) if end_chunk.shape == end.shape else _attend_prefix(*arrays, jnp.max(end_chunk))
        return jnp.swapaxes(o, 1, 2), jnp.swapaxes(lse, 1, 2)

    return over_query_chunks(body, (q, end, per_query), elements)
