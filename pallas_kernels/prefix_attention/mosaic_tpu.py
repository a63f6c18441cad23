"""Prefix attention on TPU: the interval rule with every query's own end; a decoded token reads the keys in place."""

from typing import Any

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import tpu, tpu_flash
from pallas_kernels.common import ArrayLike
from pallas_kernels.prefix_attention.rows import as_rows, zero_unseen

_NAME = "prefix_attention"
_TILES = tpu_flash.Tiles(queries=256, keys=2048, chunk=256)
_IN_PLACE = tpu_flash.Tiles(queries=128, keys=4096, chunk=512)


def prefix_attention(
    q: Float[ArrayLike, "B Q Lt N G D"],
    k: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    v: Float[ArrayLike, "B S N D"] | Float[ArrayLike, "B Q S N D"],
    visible: Int[ArrayLike, "B Q Lt"],
    k_lengths: Int[ArrayLike, "B"] | Int[ArrayLike, "B Q"] | None,
) -> tuple[Float[jax.Array, "B Q Lt N G D"], Float32[jax.Array, "B Q Lt N G"]]:
    """Attends to the prefix; arguments and results as in `api.prefix_attention`."""
    arrays = as_rows(q, k, v, visible, k_lengths)
    _, queries, heads, group, _ = arrays[0].shape
    few = 0 < queries * heads * group <= tpu.LANES and heads & (heads - 1) == 0 and 0 not in arrays[1].shape
    o, lse = (_few_queries if few else _queries)(*arrays)
    return o.reshape(q.shape), lse.reshape(q.shape[:-1])


def _queries(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    keys, values = zero_unseen(k, end), zero_unseen(v, end)
    return tpu_flash.interval_attention(q, keys, values, end, name=_NAME, tiles=_TILES)


@jax.custom_vjp
def _few_queries(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    return tpu_flash.attention_in_place(q, k, v, end, name=_NAME, tiles=_IN_PLACE)


def _few_queries_forward(q: jax.Array, k: jax.Array, v: jax.Array, end: jax.Array) -> Any:
    return jax.vjp(lambda q, k, v: _queries(q, k, v, end), q, k, v)


def _few_queries_backward(pull: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    return *pull(cotangents), None


_few_queries.defvjp(_few_queries_forward, _few_queries_backward)
