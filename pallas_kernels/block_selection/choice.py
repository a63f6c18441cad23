"""The top-n rule, from importances to indices."""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, Int32

_FORCED = 2.0**100
_NO_CANDIDATE = -1.0


def choose_blocks(
    importance: Float32[jax.Array, "B T N M"],
    t: Int[jax.Array, "B T"],
    valid: Bool[jax.Array, "B T"],
    *,
    block_size: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
) -> Int32[jax.Array, "B T N n"]:
    """Takes the forced blocks and the most important others.

    Args:
      importance: importance of each complete block; entries of blocks that are no candidates are ignored.
      t: absolute index of each query.
      valid: which queries choose at all.
      block_size: keys per block (s).
      block_count: places per query (n).
      init_blocks: leading blocks that are always taken.
      local_blocks: trailing blocks that are always taken.

    Returns:
      Block indices, ascending, padded at the end with -1.
    """
    # One column more than there are complete blocks: a partial last block can be the current one. Columns up to n,
    # so that top_k finds enough.
    columns = max(importance.shape[-1] + 1, block_count)
    j = jnp.arange(columns)
    current = (t // block_size)[..., None]
    candidate = (j <= current) & valid[:, :, None]
    forced = (j < init_blocks) | (j > current - max(local_blocks, 1))
    padded = jnp.pad(importance, [(0, 0)] * 3 + [(0, columns - importance.shape[-1])])
    score = jnp.where(forced[:, :, None, :], _FORCED, padded)
    score = jnp.where(candidate[:, :, None, :], score, _NO_CANDIDATE)
    # top_k puts the lower index first among equals.
    best, index = jax.lax.top_k(score, block_count)
    ascending = jnp.sort(jnp.where(best > _NO_CANDIDATE, index, columns), axis=-1)
    return jnp.where(ascending == columns, -1, ascending).astype(jnp.int32)


def replaced_choice(own: Int32[jax.Array, "B T N _"], given: Int[jax.Array, "B T N n"]) -> Int32[jax.Array, "B T N n"]:
    """`given`, in such a way that a compiler cannot leave `own`, indices or words, out: benchmarks time both."""
    # No query's choice: no index, and a first word with all blocks but the first belongs to no first query.
    never = (own == -2).all()
    return jnp.where(never, -1, given).astype(jnp.int32)
