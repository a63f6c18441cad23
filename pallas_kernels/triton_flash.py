"""Flash attention in Triton over one interval of keys per query: the twin of `gpu_flash`, with its rules.

A query sees the keys [end - window, end), or [0, end) without a window. No atomics: the same inputs give the same bits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Float32, Int32

from pallas_kernels import triton_calls
from pallas_kernels.common import EMPTY_LSE, merge_parts, zero_where
from pallas_kernels.gpu import LOG2_E, delta_of
from pallas_kernels.gpu_flash import Visible
from pallas_kernels.gpu_flash_plan import bounds
from pallas_kernels.triton_flash_config import Config, KeyConfig, QueryConfig, heuristic


@dataclasses.dataclass(frozen=True)
class Rule:
    """What of a call is static.

    Attributes:
      name: the operation; `<name>_output` and `<name>_lse` name what a gradient keeps besides its inputs, for
        `jax.checkpoint_policies.save_only_these_names`.
      window: keys that a query sees at most; None: all before its end.
      config: tile configurations.
    """

    name: str
    window: int | None
    config: Config


def interval_attention(
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
    *,
    name: str,
    window: int | None = None,
    config: Config | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the keys [max(end - window, 0), end) of each query; differentiable in q, k and v.

    Args:
      q: queries.
      k: keys.
      v: values.
      visible: ends of the intervals, and valid lengths.
      name: the operation; see `Rule`.
      window: keys that a query sees at most; None: all before its end.
      config: tile configurations; None: `triton_flash_config.heuristic`.

    Returns:
      Output in q's dtype and natural log-sum-exp in float32; 0 and -1e30 where a query sees no key.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    triton_calls.check_covered(q.dtype, *q.shape[3:])
    if 0 in (*q.shape, *k.shape):
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], EMPTY_LSE, jnp.float32)
    if config is None:
        batch, queries, heads, group, _ = q.shape
        config = heuristic(queries, k.shape[1], batch * heads, group, window)
    return _attend(Rule(name, window, config), q, k, v, visible)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(rule, q, k, v, visible)[0]


def _attend_forward(
    rule: Rule, q: jax.Array, k: jax.Array, v: jax.Array, visible: Visible
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    o, lse = attend(rule, q, k, v, visible)
    o, lse = checkpoint_name(o, f"{rule.name}_output"), checkpoint_name(lse, f"{rule.name}_lse")
    return (o, lse), (q, k, v, visible, o, lse)


def _attend_backward(rule: Rule, saved: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    q, k, v, visible, o, lse = saved
    do, dlse = cotangents
    if visible.query_length is None:
        do = zero_where(visible.end <= 0, do)
    return *gradients(rule, q, k, v, visible, do, lse, delta_of(o, do, dlse)), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    rule: Rule,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """The forward pass.

    Args:
      rule: what is static.
      q: queries.
      k: keys.
      v: values.
      visible: which keys they see.

    Returns:
      Output in q's dtype and natural log-sum-exp.
    """
    from pallas_kernels import triton_flash_kernels

    config = rule.config.forward
    o, lse = triton_calls.launch(
        triton_flash_kernels.forward,
        *(q, k, v, *_ends(config, q, visible, rule.window)),
        out_shapes=[_results(config.parts, q), jax.ShapeDtypeStruct((config.parts, *q.shape[:-1]), jnp.float32)],
        **_query_options(config, q, k, visible),
        **_constants(rule, config, q, k),
    )
    if config.parts == 1:
        return o, lse[0]
    o, lse = merge_parts(o, lse)
    return o.astype(q.dtype), lse


def gradients(
    rule: Rule,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
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
    backward = (rule, q, k, v, visible, do, lse, delta)
    return query_gradient(*backward), *key_gradients(*backward)


def query_gradient(
    rule: Rule,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
) -> Float[jax.Array, "B T N G D"]:
    """The gradient of q; arguments as of `gradients`."""
    from pallas_kernels import triton_flash_kernels

    config = rule.config.dq
    (dq,) = triton_calls.launch(
        triton_flash_kernels.query_gradient,
        *(q, k, v, do, lse, delta, *_ends(config, q, visible, rule.window)),
        out_shapes=[_results(config.parts, q)],
        **_query_options(config, q, k, visible),
        **_constants(rule, config, q, k),
    )
    return dq if config.parts == 1 else dq.sum(axis=0).astype(q.dtype)


def key_gradients(
    rule: Rule,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    visible: Visible,
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
) -> tuple[Float[jax.Array, "B S N D"], Float[jax.Array, "B S N D"]]:
    """The gradients of k and v; arguments as of `gradients`."""
    from pallas_kernels import triton_flash_kernels

    config = rule.config.dkdv
    batch, keys, heads, _ = k.shape
    end = visible.end.astype(jnp.int32)
    tiles = query_tiles(config, q.shape[3], end, rule.window, keys)
    query_lengths, key_lengths = (
        jnp.full((batch,), most, jnp.int32) if length is None else length.astype(jnp.int32)
        for most, length in ((q.shape[1], visible.query_length), (keys, visible.key_length))
    )
    dk, dv = triton_calls.launch(
        triton_flash_kernels.key_gradients,
        *(q, k, v, do, lse, delta, end, tiles, query_lengths, key_lengths),
        out_shapes=[_results(config.parts, k)] * 2,
        grid=(tiles.shape[1] * config.parts, batch * heads),
        num_warps=config.warps,
        num_stages=config.stages,
        **_constants(rule, config, q, k),
    )
    if config.parts > 1:
        dk, dv = (x.sum(axis=0).astype(k.dtype) for x in (dk, dv))
    return dk, dv


def query_tiles(
    config: KeyConfig, group: int, end: Int32[jax.Array, "B T"], window: int | None, keys: int
) -> Int32[jax.Array, "B tiles 2"]:
    """The tiles of queries, from the first number up to the second, that see some of each tile of keys."""
    low, high, _, _ = (x[:, None] for x in _tile_bounds(config, group, end, window))
    origin = (jnp.arange(-(-keys // config.keys)) * config.keys)[:, None]
    sees = (low < origin + config.keys) & (high > origin)
    tile = jnp.arange(sees.shape[-1])
    last = jnp.max(jnp.where(sees, tile + 1, 0), axis=-1)
    first = jnp.min(jnp.where(sees, tile, tile.size), axis=-1)
    return jnp.stack([jnp.minimum(first, last), last], axis=-1).astype(jnp.int32)


def _ends(
    config: QueryConfig, q: jax.Array, visible: Visible, window: int | None
) -> tuple[Int32[jax.Array, "B T"], Int32[jax.Array, "B tiles 4"]]:
    """The queries' ends, and each tile's bounds."""
    end = visible.end.astype(jnp.int32)
    return end, jnp.stack(_tile_bounds(config, q.shape[3], end, window), axis=-1)


def _tile_bounds(
    config: QueryConfig | KeyConfig, group: int, end: Int32[jax.Array, "B T"], window: int | None
) -> tuple[Int32[jax.Array, "B tiles"], ...]:
    """`gpu_flash_plan.bounds` of the tiles of queries; what follows the last query repeats it."""
    tokens = config.rows // group
    end = jnp.pad(end, [(0, 0), (0, -end.shape[1] % tokens)], mode="edge")
    return bounds(end.reshape(end.shape[0], -1, tokens), window)


def _query_options(config: QueryConfig, q: jax.Array, k: jax.Array, visible: Visible) -> dict[str, Any]:
    """Grid and options of a kernel whose tiles are queries."""
    batch, queries, heads, group, _ = q.shape
    tiles = -(-queries // (config.rows // group))
    return {
        "grid": (tiles * config.parts, batch * heads),
        "num_warps": config.warps,
        "num_stages": config.stages,
        "BOUNDED": visible.key_length is not None or k.shape[1] % config.keys != 0,
    }


def _constants(rule: Rule, config: QueryConfig | KeyConfig, q: jax.Array, k: jax.Array) -> dict[str, Any]:
    _, queries, heads, group, size = q.shape
    return {
        "T": queries,
        "S": k.shape[1],
        "N": heads,
        "G": group,
        "D": size,
        "WINDOW": rule.window or 0,
        "SCALE": size**-0.5 * LOG2_E,
        "ROWS": config.rows,
        "KEYS": config.keys,
        "PARTS": config.parts,
    }


def _results(parts: int, like: jax.Array) -> jax.ShapeDtypeStruct:
    """An array like `like`; of parts, float32 with a leading axis."""
    if parts == 1:
        return jax.ShapeDtypeStruct(like.shape, like.dtype)
    return jax.ShapeDtypeStruct((parts, *like.shape), jnp.float32)
