"""Sets of blocks as bit words: 32 blocks a word, the lowest index in the lowest bit."""

import jax
import jax.numpy as jnp
from jaxtyping import Int, Int32

WORD = 32
"""Blocks per word."""

_HALVES = (16, 8, 4, 2, 1)


def words_of(indices: Int[jax.Array, "*rows n"], blocks: int) -> Int32[jax.Array, "*rows W"]:
    """The words of each row's blocks.

    Args:
      indices: blocks in any order, each at most once; negative is none.
      blocks: number of blocks; W is the words that hold as many.

    Returns:
      The words.
    """
    word = jnp.arange(-(-blocks // WORD), dtype=jnp.int32)
    indices = indices.astype(jnp.int32)
    bit = jnp.int32(1) << (indices & (WORD - 1))
    inside = (indices >> 5)[..., None, :] == word[:, None]
    return jnp.where(inside, bit[..., None, :], 0).sum(axis=-1, dtype=jnp.int32)


def indices_of(words: Int32[jax.Array, "*rows W"], places: int) -> Int32[jax.Array, "*rows n"]:
    """The blocks of each row's words.

    Args:
      words: at most `places` bits are set in a row.
      places: n.

    Returns:
      Block indices, ascending, padded at the end with -1.
    """
    total = words.shape[-1]
    # How many blocks stand in the words up to each one. Counts are exact in the matrix units: 32 at most in bfloat16,
    # added in float32.
    upper = jnp.triu(jnp.ones((total, total), jnp.bfloat16))
    counts = jax.lax.population_count(words).astype(jnp.bfloat16)
    ends = jnp.dot(counts, upper, preferred_element_type=jnp.float32).astype(jnp.int32)
    place = jnp.broadcast_to(jnp.arange(places, dtype=jnp.int32), (*words.shape[:-1], places))

    # The place's word is the first whose end lies past it.
    index = jnp.zeros_like(place)
    for step in _powers_below(total):
        before = _take(ends, index + step - 1)
        index = jnp.where((index + step < total) & (before <= place), index + step, index)
    word = _take(words, index)
    rank = place - _take(ends, index) + jax.lax.population_count(word)

    bit = jnp.zeros_like(place)
    for half in _HALVES:
        lower = jax.lax.population_count(word & ((1 << half) - 1))
        above = rank >= lower
        rank = jnp.where(above, rank - lower, rank)
        word = jnp.where(above, jax.lax.shift_right_logical(word, half), word)
        bit = jnp.where(above, bit + half, bit)
    return jnp.where(place < ends[..., -1:], index * WORD + bit, -1)


def _powers_below(total: int) -> list[int]:
    """Powers of two below `total`, descending."""
    return [1 << i for i in reversed(range((total - 1).bit_length()))]


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """x at `index` along the last axis; an index past the end takes the last."""
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")
