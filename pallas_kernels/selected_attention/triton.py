"""Selected attention in Triton, in the design of the Mosaic GPU kernels: neighbouring queries share their blocks.

A program owns 16 (or 8) neighbouring tokens of one KV head, 8 rows each, and reads the union of their blocks once; for
dk and dv a program owns a block and gathers 8 of its queries at a time. docs/kernels.md compares it with Mosaic's.
"""

import functools

import jax
from jaxtyping import Float, Float32, Int

from pallas_kernels import triton_calls
from pallas_kernels.common import ArrayLike, Scalar
from pallas_kernels.selected_attention import triton_rule
from pallas_kernels.selected_attention.gpu_lists import BlockLists, TileLists, tile_lists, work_lists
from pallas_kernels.selected_attention.gpu_tiles import BLOCK
from pallas_kernels.selected_attention.triton_config import Config, heuristic


def selected_attention(
    q: Float[ArrayLike, "B T N G D"],
    k: Float[ArrayLike, "B S N D"],
    v: Float[ArrayLike, "B S N D"],
    block_indices: Int[ArrayLike, "B T N n"],
    *,
    block_size: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: Config | None = None,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Attends to the chosen blocks; arguments and results as in `api.selected_attention`.

    Args:
      q: see there.
      k: see there.
      v: see there.
      block_indices: see there.
      block_size: see there; 64.
      q_offset: see there.
      lengths: see there.
      config: tile configurations; None: `triton_config.heuristic`.

    Returns:
      Output and log-sum-exp.

    Raises:
      NotImplementedError: a dtype, head size, group or block size that the kernels do not cover.
    """
    return triton_rule.attend(
        _DESIGN,
        heuristic,
        *(q, k, v, block_indices),
        block_size=block_size,
        q_offset=q_offset,
        lengths=lengths,
        config=config,
    )


def _lists(
    config: Config, chosen: Int[jax.Array, "B N T n"], length: Int[jax.Array, "B"], q_offset: Scalar, keys: int
) -> tuple[TileLists, TileLists]:
    build = functools.partial(tile_lists, chosen, length, q_offset, keys, BLOCK)
    return work_lists(config.forward.tokens, config.dq.tokens, build)


def forward(
    config: Config,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    lists: TileLists,
) -> tuple[Float[jax.Array, "B T N G D"], Float32[jax.Array, "B T N G"]]:
    """Runs the forward kernel on keys and values in whole blocks."""
    from pallas_kernels.selected_attention import triton_kernels

    rows, tiles, pieces, width = lists.entries.shape
    return triton_rule.launch_forward(
        triton_kernels.forward_kernel,
        *(q, k, v, lists.entries, lists.tiles),
        grid=(tiles, rows),
        num_warps=config.forward.warps,
        num_stages=config.forward.stages,
        TOKENS=config.forward.tokens,
        NUMBERS=pieces * width,
        **triton_rule.sizes(q, k),
    )


def query_gradient(
    config: Config,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
    lists: TileLists,
) -> Float[jax.Array, "B T N G D"]:
    """Runs the kernel of dq."""
    from pallas_kernels.selected_attention import triton_kernels

    rows, tiles, pieces, width = lists.entries.shape
    (dq,) = triton_calls.launch(
        triton_kernels.query_gradient_kernel,
        *(q, k, v, do, lse, delta, lists.entries, lists.tiles),
        out_shapes=(jax.ShapeDtypeStruct(q.shape, q.dtype),),
        grid=(tiles, rows),
        num_warps=config.dq.warps,
        num_stages=config.dq.stages,
        factor=q.shape[4] ** -0.5,
        TOKENS=config.dq.tokens,
        NUMBERS=pieces * width,
        **triton_rule.sizes(q, k),
    )
    return dq


def key_gradients(
    config: Config,
    q: Float[jax.Array, "B T N G D"],
    k: Float[jax.Array, "B S N D"],
    v: Float[jax.Array, "B S N D"],
    do: Float[jax.Array, "B T N G D"],
    lse: Float32[jax.Array, "B T N G"],
    delta: Float32[jax.Array, "B T N G"],
    lists: BlockLists,
) -> tuple[Float[jax.Array, "B S N D"], Float[jax.Array, "B S N D"]]:
    """Runs the kernel of dk and dv."""
    from pallas_kernels.selected_attention import triton_kernels

    kernel, tokens = triton_kernels.key_gradients_kernel, config.dkdv.tokens
    return triton_rule.launch_key_gradients(kernel, config.dkdv, q, k, v, do, lse, delta, lists, TOKENS=tokens)


_DESIGN = triton_rule.Design(_lists, forward, query_gradient, key_gradients)
