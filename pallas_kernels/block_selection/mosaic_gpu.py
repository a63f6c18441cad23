"""Block selection on Hopper, in Mosaic GPU: importances of a chunk of queries, then the n best of each."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import gpu
from pallas_kernels.block_selection import gpu_config
from pallas_kernels.block_selection.gpu_importance import importance
from pallas_kernels.block_selection.gpu_top_n import choose
from pallas_kernels.block_words import WORD, indices_of
from pallas_kernels.common import ArrayLike, Scalar, query_indices
from pallas_kernels.gpu import TILE_ROWS

_ATOM = 8
"""Rows of a swizzled tile: the copy engine takes an axis of whole ones."""


def block_selection(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    lse: Float32[ArrayLike, "B T N G"],
    *,
    block_size: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: gpu_config.Config | None = None,
    interpret: Any = None,
) -> Int32[jax.Array, "B T N n"]:
    """Chooses blocks; arguments and results as in `api.block_selection`.

    Args:
      q: see there.
      k_blocks: see there.
      lse: see there.
      block_size: see there.
      block_count: see there.
      init_blocks: see there.
      local_blocks: see there.
      q_offset: see there.
      lengths: see there.
      config: tile configuration; None: `gpu_config.heuristic`.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Returns:
      Block indices, ascending, padded at the end with -1.

    Raises:
      NotImplementedError: a dtype, head size or group that the kernels do not cover.
    """
    words = block_words(
        q,
        k_blocks,
        lse,
        block_size=block_size,
        block_count=block_count,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        q_offset=q_offset,
        lengths=lengths,
        config=config,
        interpret=interpret,
    )
    return indices_of(words, block_count)


def block_words(
    q: Float[ArrayLike, "B T N G D"],
    k_blocks: Float[ArrayLike, "B M N D"],
    lse: Float32[ArrayLike, "B T N G"],
    *,
    block_size: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
    q_offset: Scalar,
    lengths: Int[ArrayLike, "B"] | None,
    config: gpu_config.Config | None = None,
    interpret: Any = None,
) -> Int32[jax.Array, "B T N W"]:
    """`block_selection` as a bit per block: see `pallas_kernels.block_words`; W words hold M + 1 blocks."""
    q, k_blocks, lse = (jnp.asarray(x) for x in (q, k_blocks, lse))
    gpu.check_covered(q.dtype, *q.shape[3:])
    batch, queries, heads, _, size = q.shape
    blocks = k_blocks.shape[1]
    # One block more than there are complete ones: a partial last block can be the current one.
    words = gpu_config.words_for(blocks + 1)
    columns = -(-words * WORD // gpu_config.COLUMNS) * gpu_config.COLUMNS
    if 0 in (batch, queries):
        return jnp.zeros((batch, queries, heads, words), jnp.int32)
    k_blocks = _pad_tokens(k_blocks, max(_ATOM, -(-blocks // _ATOM) * _ATOM))
    q = _pad_tokens(q, -(-queries // _ATOM) * _ATOM)
    config = config or gpu_config.heuristic(size)
    chunk = config.chunk(queries, batch * heads, columns)
    chunks = -(-queries // chunk)

    t = query_indices(queries, q_offset)
    current = jnp.broadcast_to(t // block_size, (batch, queries))
    if lengths is not None:
        current = jnp.where(t >= jnp.asarray(lengths)[:, None], -1, current)
    past = chunks * chunk - queries
    current = jnp.pad(current, [(0, 0), (0, past)], constant_values=-1)
    last = current.reshape(batch, -1, TILE_ROWS).max(axis=-1)
    shift = jnp.pad(jnp.transpose(lse * gpu.LOG2_E, (0, 2, 3, 1)), [(0, 0), (0, 0), (0, 0), (0, past)])

    def choose_chunk(start: jax.Array) -> jax.Array:
        scores = importance(config, interpret, q, k_blocks, shift, last, start, chunk, columns)
        return choose(
            config,
            interpret,
            scores,
            words,
            current,
            last,
            start,
            block_count=block_count,
            init_blocks=init_blocks,
            local_blocks=max(local_blocks, 1),
        )

    chosen = jax.lax.map(choose_chunk, jnp.arange(chunks, dtype=jnp.int32)[:, None] * chunk)
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, chunks * chunk, heads, words)[:, :queries]


def _pad_tokens(x: jax.Array, length: int) -> jax.Array:
    """Zeros past the end of the second axis, up to `length`."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
