"""What both Triton designs of selected attention are to JAX: arguments, gradient rule, launches."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import gpu, triton_calls
from pallas_kernels.common import EMPTY_LSE, ArrayLike, Scalar, resolve_lengths
from pallas_kernels.selected_attention import mosaic_gpu
from pallas_kernels.selected_attention.gpu_lists import BlockLists, block_lists, visible_choice
from pallas_kernels.selected_attention.gpu_tiles import BLOCK
from pallas_kernels.selected_attention.mosaic_gpu import SAVED, whole_blocks
from pallas_kernels.selected_attention.mosaic_gpu_backward import with_parts
from pallas_kernels.selected_attention.triton_config import BlockConfig, Config

MOST = 2**31
"""Elements of one batch row: the kernels count within one in 32 bits."""


@dataclasses.dataclass(frozen=True)
class Design:
    """The kernels of a design.

    Attributes:
      lists: (config, chosen, length, q_offset, keys) -> what forward and dq read besides the tensors, one for each.
      forward: (config, q, k, v, lists) -> output and log-sum-exp.
      query_gradient: (config, q, k, v, do, lse, delta, lists) -> dq.
      key_gradients: (config, q, k, v, do, lse, delta, block lists) -> dk and dv.
    """

    lists: Callable[..., tuple[Any, Any]]
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    query_gradient: Callable[..., jax.Array]
    key_gradients: Callable[..., tuple[jax.Array, jax.Array]]


def attend(
    design: Design,
    heuristic: Callable[[int, int, int], Config],
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    block_indices: ArrayLike,
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: ArrayLike | None,
    config: Config | None,
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp; arguments as in `api.selected_attention`, and `config`, None for `heuristic`'s."""
    q, k, v, block_indices = (jnp.asarray(x) for x in (q, k, v, block_indices))
    check_covered(q, k, block_size)
    if 0 in (*q.shape, *k.shape, block_indices.shape[3]):
        return jnp.zeros(q.shape, q.dtype), jnp.full(q.shape[:-1], EMPTY_LSE, jnp.float32)
    length = resolve_lengths(lengths, q.shape[0], k.shape[1])
    config = config or heuristic(q.shape[1], q.shape[0] * q.shape[2], q.shape[4])
    chosen = visible_choice(block_indices, length, q_offset, k.shape[1], block_size)
    k, v = (whole_blocks(x, length if lengths is not None else None) for x in (k, v))
    return _attend(design, config, q, k, v, chosen, length, jnp.asarray(q_offset, jnp.int32))


def check_covered(q: jax.Array, k: jax.Array, block_size: int) -> None:
    """Raises NotImplementedError for what Mosaic's kernels do not cover, or a batch row of `MOST` elements."""
    mosaic_gpu.check_covered(q, k, block_size, "Triton")
    if math.prod(q.shape[1:]) >= MOST or math.prod(k.shape[1:]) >= MOST:
        raise NotImplementedError(
            f"the Triton kernel takes rows of a batch below {MOST} elements, not q of {q.shape} and k of {k.shape}"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(design: Design, config: Config, *arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _attend_forward(design, config, *arguments)[0]


def _attend_forward(
    design: Design,
    config: Config,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    chosen: jax.Array,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    forward_lists, dq_lists = design.lists(config, chosen, length, q_offset, k.shape[1])
    results = design.forward(config, q, k, v, forward_lists)
    o, lse = (checkpoint_name(x, name) for x, name in zip(results, SAVED, strict=True))
    return (o, lse), (q, k, v, chosen, q_offset, dq_lists, o, lse)


def _attend_backward(
    design: Design, config: Config, saved: tuple[Any, ...], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    q, k, v, chosen, q_offset, lists, o, lse = saved
    do, dlse = cotangents
    delta = gpu.delta_of(o, do, dlse)
    dq = design.query_gradient(config, q, k, v, do, lse, delta, lists)
    queries_of = block_lists(chosen, q_offset, k.shape[1], BLOCK, config.dkdv.part)
    dk, dv = design.key_gradients(config, q, k, v, do, lse, delta, queries_of)
    return dq, dk, dv, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def sizes(q: jax.Array, k: jax.Array) -> dict[str, Any]:
    """The constants of every kernel."""
    _, queries, heads, group, size = q.shape
    return {
        "scale": size**-0.5 * gpu.LOG2_E,
        "QUERIES": queries,
        "KEYS": k.shape[1],
        "HEADS": heads,
        "GROUP": group,
        "SIZE": size,
    }


def launch_forward(kernel: Any, q: jax.Array, *others: jax.Array, **how: Any) -> tuple[jax.Array, jax.Array]:
    """Runs a forward kernel: output and log-sum-exp, laid out as q is."""
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32))
    o, lse = triton_calls.launch(kernel, q, *others, out_shapes=results, **how)
    return o, lse


def launch_key_gradients(
    kernel: Any,
    config: BlockConfig,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    lists: BlockLists,
    **constants: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs a kernel of dk and dv over the parts of lists, and adds up those of split ones."""
    size = q.shape[4]
    part = jax.ShapeDtypeStruct((max(lists.slots, 1), BLOCK, size), jnp.float32)
    dk, dv, *parts = triton_calls.launch(
        kernel,
        *(q, k, v, do, lse, delta, lists.tokens, lists.items),
        out_shapes=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), part, part),
        grid=(lists.items.shape[0],),
        num_warps=config.warps,
        num_stages=config.stages,
        factor=size**-0.5,
        **sizes(q, k),
        **constants,
    )
    if lists.slots:
        dk, dv = (with_parts(x, part, lists, k.shape[2]) for x, part in zip((dk, dv), parts, strict=True))
    return dk, dv
