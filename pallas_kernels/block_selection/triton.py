"""Block selection in Triton: importances of a chunk of queries, then the n best of each."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int, Int32

from pallas_kernels import triton_calls
from pallas_kernels.block_selection.triton_config import LANES, Config, power_of_two
from pallas_kernels.block_words import WORD, indices_of
from pallas_kernels.common import ArrayLike, Scalar, query_indices
from pallas_kernels.gpu import LOG2_E


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
    config: Config | None = None,
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
      config: tile configuration; None: the default one.

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
    config: Config | None = None,
) -> Int32[jax.Array, "B T N W"]:
    """`block_selection` as a bit per block: see `pallas_kernels.block_words`; W words hold M + 1 blocks."""
    q, k_blocks, lse = (jnp.asarray(x) for x in (q, k_blocks, lse))
    triton_calls.check_covered(q.dtype, *q.shape[3:])
    batch, queries, heads = q.shape[:3]
    blocks = k_blocks.shape[1]
    # One block more than there are complete ones: a partial last block can be the current one, and is forced then.
    words = -(-(blocks + 1) // WORD)
    if 0 in (batch, queries):
        return jnp.zeros((batch, queries, heads, words), jnp.int32)
    config = config or Config()
    width = -(-max(blocks, 1) // LANES) * LANES
    chunk = config.chunk(queries, batch * heads, width)
    chunks = -(-queries // chunk)
    current = jnp.minimum(query_indices(queries, q_offset) // block_size, blocks)
    current = jnp.broadcast_to(current, (batch, queries))
    if lengths is not None:
        past = query_indices(queries, q_offset) >= jnp.asarray(lengths)[:, None]
        current = jnp.where(past, -1, current)

    def choose_chunk(start: jax.Array) -> jax.Array:
        scores = importance(config, q, k_blocks, lse, current, start, chunk, width)
        return choose(config, scores, current, start, words, block_count, init_blocks, max(local_blocks, 1))

    chosen = jax.lax.map(choose_chunk, jnp.arange(chunks, dtype=jnp.int32)[:, None] * chunk)
    return jnp.moveaxis(chosen, 0, 1).reshape(batch, chunks * chunk, heads, words)[:, :queries]


def importance(
    config: Config,
    q: jax.Array,
    k_blocks: jax.Array,
    lse: jax.Array,
    current: Int32[jax.Array, "B T"],
    start: Int32[jax.Array, "1"],
    chunk: int,
    width: int,
) -> Float32[jax.Array, "R C columns"]:
    """The importances of a chunk of queries, where they are asked for."""
    from pallas_kernels.block_selection import triton_kernels

    batch, queries, heads, group, size = q.shape
    (scores,) = triton_calls.launch(
        triton_kernels.importance,
        q,
        k_blocks,
        lse,
        current,
        start,
        out_shapes=[jax.ShapeDtypeStruct((batch * heads, chunk, width), jnp.float32)],
        grid=(-(-width // config.columns), chunk // config.tokens, batch * heads),
        num_warps=config.warps,
        num_stages=config.stages,
        T=queries,
        M=k_blocks.shape[1],
        N=heads,
        G=group,
        D=size,
        SCALE=size**-0.5 * LOG2_E,
        TOKENS=config.tokens,
        COLUMNS=config.columns,
        WIDTH=width,
    )
    return scores


def choose(
    config: Config,
    scores: Float32[jax.Array, "R C columns"],
    current: Int32[jax.Array, "B T"],
    start: Int32[jax.Array, "1"],
    words: int,
    block_count: int,
    init_blocks: int,
    local_blocks: int,
) -> Int32[jax.Array, "B C N W"]:
    """The chosen blocks of a chunk of queries."""
    from pallas_kernels.block_selection import triton_kernels

    rows, chunk, width = scores.shape
    batch, queries = current.shape
    columns = power_of_two(width)
    tokens = config.rows_per_program(columns)
    variants = min(config.variants, (columns // LANES).bit_length())
    (chosen,) = triton_calls.launch(
        triton_kernels.choose,
        scores,
        current,
        start,
        out_shapes=[jax.ShapeDtypeStruct((batch, chunk, rows // batch, words), jnp.int32)],
        grid=(-(-chunk // tokens), rows),
        num_warps=1,
        num_stages=1,
        T=queries,
        N=rows // batch,
        W=words,
        WIDTH=width,
        CHUNK=chunk,
        PLACES=block_count,
        INIT=init_blocks,
        LOCAL=local_blocks,
        ROWS=tokens,
        COLUMNS=columns,
        VARIANTS=variants,
        ALL_WORDS=power_of_two(words),
    )
    return chosen
