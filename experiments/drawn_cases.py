"""Inputs of kernel benchmarks: choices with a stated similarity of neighbours, tensors of a trained model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.common import Scalar
from pallas_kernels.specs import Spec

CHUNK = 4096


@functools.partial(jax.jit, static_argnames=("spec", "rho", "sink"))
def draw_choice(spec: Spec, rho: float, seed: Scalar, *, sink: bool = False) -> Int32[Array, "B T N n"]:
    """Draws which blocks each query takes.

    score[t, j] = sqrt(rho) a[t // s, j] + sqrt(1 - rho) b[t, j] with a and b standard normal, per row and KV head. A
    query takes its own block and the n - 1 best-scored earlier ones, ascending, padded with -1.

    Args:
      spec: shape; q_offset must be 0.
      rho: similarity of the queries of one block, 0 to 1.
      seed: same seed, same choice.
      sink: every query also takes block 0.
    """
    blocks = -(-spec.keys // spec.block_size)
    rows = (spec.batch, spec.kv_heads, blocks)
    tokens, key = min(CHUNK, spec.queries), jax.random.key(seed)

    def chunk(start: jax.Array) -> jax.Array:
        current = (start + jnp.arange(tokens)) // spec.block_size
        # A block's queries share a: it depends on the block alone.
        shared = jax.vmap(lambda block: jax.random.normal(jax.random.fold_in(key, block), rows))(current)
        own = jax.random.normal(jax.random.fold_in(key, 2**20 + start), (tokens, *rows))
        score = jnp.sqrt(rho) * shared + jnp.sqrt(1 - rho) * own
        block, current = jnp.arange(blocks), current[:, None, None, None]
        score = jnp.where(block < current, score, jnp.where(block == current, jnp.inf, -jnp.inf))
        score = jnp.where(sink & (block == 0), jnp.inf, score)
        best, index = jax.lax.top_k(score, min(spec.block_count, blocks))
        index = jnp.sort(jnp.where(best == -jnp.inf, blocks, index), axis=-1)
        return jnp.where(index == blocks, -1, index).astype(jnp.int32)

    drawn = jax.lax.map(chunk, tokens * jnp.arange(-(-spec.queries // tokens)))
    drawn = jnp.moveaxis(drawn.reshape(-1, *drawn.shape[2:])[: spec.queries], 1, 0)
    missing = spec.block_count - drawn.shape[-1]
    return jnp.pad(drawn, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)


def union_size(block_indices: Int32[Array, "B T N n"], neighbours: int, blocks: int) -> float:
    """Blocks in the union of what `neighbours` neighbouring queries take, over n; the mean of all such groups."""
    return float(mean_union(block_indices, neighbours, blocks))


@functools.partial(jax.jit, static_argnums=(1, 2))
def mean_union(index: Int32[Array, "B T N n"], neighbours: int, blocks: int) -> jax.Array:
    """`union_size` on the device."""
    batch, queries, heads, places = index.shape
    group = jnp.broadcast_to((jnp.arange(queries) // neighbours)[:, None, None], index.shape[1:])
    taken = jnp.zeros((batch, heads, -(-queries // neighbours), blocks), bool)
    row, head = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None]
    taken = taken.at[row, head, group, jnp.where(index < 0, blocks, index)].set(True, mode="drop")
    return taken.sum() / (taken.size / blocks) / places


def trained_tensors(path: Path, spec: Spec) -> tuple[jax.Array, ...]:
    """What `experiments.measure_selection` saved of one clip, as queries, keys, values and gate logits of a shape.

    Args:
      path: its `selection.npz`.
      spec: the shape; the clip is repeated up to its length, and the KV heads are those of as many layers as it takes.

    Raises:
      ValueError: the file holds no such tensors, or their heads do not fit.
    """
    names = ("query", "key", "value", "gate_logits")
    with np.load(path, allow_pickle=False) as arrays:
        layers = sorted({name.split("/")[0] for name in arrays.files if name.endswith("/query")})
        if not layers:
            raise ValueError(f"{path}: no array named LAYER/query, expected a file of measure_selection")
        tensors = [np.concatenate([arrays[f"{layer}/{name}"] for layer in layers], axis=1) for name in names]
    heads = tensors[0].shape[2:]
    if heads != (spec.group_size, spec.head_dim):
        raise ValueError(f"{path}: {layers[0]}/query has [G, D] = {heads}, expected {spec.group_size, spec.head_dim}")
    q, k, v, logits = (_repeated(_repeated(x, spec.keys, 0), spec.kv_heads, 1)[None] for x in tensors)
    return *(jnp.asarray(x, spec.dtype) for x in (q, k, v)), jnp.asarray(logits, jnp.float32)


def _repeated(x: np.ndarray, length: int, axis: int) -> np.ndarray:
    times = [1] * x.ndim
    times[axis] = -(-length // x.shape[axis])
    return np.take(np.tile(x, times), range(length), axis)
