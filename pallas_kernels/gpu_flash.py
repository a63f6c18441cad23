"""Flash attention on Hopper over one interval of keys per query, of which compressed, window and prefix are rules.

A query sees the keys [end - window, end), or [0, end) without a window. Steps of keys that no query of a tile sees are
skipped by bounds that XLA computes from the ends; steps that every query sees whole take no mask. The recurrence and
its gradient are FlashAttention-2's (arXiv 2307.08691, algorithms 1 and 2), the schedule FlashAttention-3's
(arXiv 2407.08608). No atomics: the same inputs give the same bits.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32

from pallas_kernels import gpu, gpu_flash_backward, gpu_flash_kernels, gpu_flash_plan
from pallas_kernels.common import EMPTY_LSE, merge_parts, zero_where
from pallas_kernels.gpu import TILE_ROWS
from pallas_kernels.gpu_flash_config import Config, heuristic
from pallas_kernels.gpu_flash_kernels import source
from pallas_kernels.gpu_flash_plan import Tiles


@dataclasses.dataclass(frozen=True)
class Rule:
    """What of a call is static.

    Attributes:
      name: the operation; `<name>_output` and `<name>_lse` name what a gradient keeps besides its inputs, for
        `jax.checkpoint_policies.save_only_these_names`.
      window: keys that a query sees at most; None: all before its end.
      config: tile configurations.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
    """

    name: str
    window: int | None
    config: Config
    interpret: Any = None


class Visible(NamedTuple):
    """Which keys the queries see.

    Attributes:
      end: one past the last key of each query [B, T], at most S; 0 for a query that sees none.
      query_length: valid queries [B]; those past it may hold NaN and have end 0. None: all, and they are finite.
      key_length: valid keys [B]; those past it may hold NaN, and no end is larger. None: all are finite.
    """

    end: jax.Array
    query_length: jax.Array | None = None
    key_length: jax.Array | None = None


def interval_attention(
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
    *,
    name: str,
    window: int | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the keys [max(end - window, 0), end) of each query; differentiable in q, k and v.

    Args:
      q: queries.
      k: keys.
      v: values.
      visible: ends of the intervals, and valid lengths.
      name: the operation; see `Rule`.
      window: keys that a query sees at most; None: all before its end.
      config: tile configurations; None: `gpu_flash_config.heuristic`.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    gpu.check_covered(q.dtype, *q.shape[3:])
    if 0 in (*q.shape, *k.shape):
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], EMPTY_LSE, jnp.float32)
    batch, queries, heads, group, size = q.shape
    if config is None:
        # Tiles of 8 tokens read queries in place: they must all be finite.
        few_rows = visible.query_length is None
        config = heuristic(queries, k.shape[1], batch * heads, group, size, window, few_rows)
    if config.tokens == TILE_ROWS:
        q, end = gpu.in_eights(q), gpu.in_eights(visible.end, mode="edge")
        visible = visible._replace(end=end)
    o, lse = _attend(Rule(name, window, config, interpret), q, gpu.in_eights(k), gpu.in_eights(v), visible)
    return o[:, :queries], lse[:, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(rule, q, k, v, visible)[0]


def _attend_forward(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    o, lse = attend(rule, q, k, v, visible)
    o, lse = checkpoint_name(o, f"{rule.name}_output"), checkpoint_name(lse, f"{rule.name}_lse")
    return (o, _tiles(rule, q).unpack(lse)), (q, k, v, visible, o, lse)


def _attend_backward(rule: Rule, saved: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, visible, o, lse = saved
    do, dlse = cotangents
    if visible.query_length is None:
        do, dlse = zero_where(visible.end <= 0, do), zero_where(visible.end <= 0, dlse)
    delta = gpu.delta_of(o, do, dlse)
    return *gradients(rule, q, k, v, visible, do, lse, delta), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    rule: Rule,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "R tiles 64"]]:
    """The forward pass.

    Args:
      rule: what is static.
      q: queries.
      k: keys.
      v: values.
      visible: which keys they see.

    Returns:
      Output in q's dtype, and the natural log-sum-exp of the rows of each tile (`Tiles.unpack` orders it by query).
    """
    config, tiles = rule.config.forward, _tiles(rule, q)
    ends = tiles.row_ends(visible.end)
    o, lse = gpu_flash_kernels.forward(
        config,
        rule.config.programs,
        rule.interpret,
        tiles,
        rule.window,
        q,
        source(k, visible.key_length),
        source(v, visible.key_length),
        ends,
        gpu_flash_plan.query_items(config, tiles, ends, rule.window),
    )
    if config.parts == 1:
        return o, lse
    o, lse = merge_parts(*(x.reshape(config.parts, -1, *x.shape[1:]) for x in (o, lse)))
    return tiles.unpack(o).astype(q.dtype), lse


def gradients(
    rule: Rule,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "R tiles 64"],
    delta: Float32[jax.Array, "B T N G"],
) -> tuple[Float[jax.Array, "B T N G D"], Float[jax.Array, "B S N D"], Float[jax.Array, "B S N D"]]:
    """The backward pass.

    Args:
      rule: what is static.
      q: queries.
      k: keys.
      v: values.
      visible: which keys they see.
      do: cotangent of the output; finite where the query is, unless it lies past `visible.query_length`.
      lse: from `attend`.
      delta: the sum over D of do * o, less the log-sum-exp's cotangent.

    Returns:
      Gradients of q, k and v.
    """
    config, tiles = rule.config, _tiles(rule, q)
    ends = tiles.row_ends(visible.end)
    terms = gpu_flash_backward.row_terms(tiles, lse, delta)
    shared = (config.programs, rule.interpret, tiles, rule.window)
    dq = gpu_flash_backward.query_gradient(
        config.dq,
        *shared,
        q,
        source(k, visible.key_length),
        source(v, visible.key_length),
        do,
        terms,
        ends,
        gpu_flash_plan.query_items(config.dq, tiles, ends, rule.window),
    )
    dk, dv = gpu_flash_backward.key_gradients(
        config.dkdv,
        *shared,
        source(q, visible.query_length),
        source(k, visible.key_length),
        source(v, visible.key_length),
        source(do, visible.query_length),
        terms,
        ends,
        gpu_flash_plan.key_items(config.dkdv, tiles, ends, rule.window, k.shape[1]),
    )
    if config.dq.parts > 1:
        dq = tiles.unpack(dq.reshape(config.dq.parts, -1, *dq.shape[1:]).sum(axis=0)).astype(q.dtype)
    if config.dkdv.parts > 1:
        dk, dv = (_sum_pieces(x, k) for x in (dk, dv))
    return dq, dk, dv


def _sum_pieces(pieces: jax.Array, k: jax.Array) -> jax.Array:
    """The sum over parts of pieces [PR, pieces, 64, D], laid out as k is."""
    batch, keys, heads, size = k.shape
    total = pieces.reshape(-1, batch, heads, pieces.shape[1] * pieces.shape[2], size).sum(axis=0)
    return jnp.swapaxes(total[:, :, :keys], 1, 2).astype(k.dtype)


def _tiles(rule: Rule, q: jax.Array) -> Tiles:
    return Tiles(*q.shape[:4], rule.config.tokens)
