"""Inputs of kernel benchmarks: choices with a stated similarity of neighbours, tensors of a trained model."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from pallas_kernels.specs import Spec

CHUNK = 4096


def draw_choice(spec: Spec, rho: float, seed: int, *, sink: bool = False) -> Int32[Array, "B T N n"]:
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

    @functools.partial(jax.jit, static_argnums=0)
    def chunk(tokens: int, start: jax.Array, key: jax.Array) -> jax.Array:
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

    tokens = min(CHUNK, spec.queries)
    starts = range(0, -(-spec.queries // tokens) * tokens, tokens)
    drawn = jnp.concatenate([chunk(tokens, jnp.int32(start), jax.random.key(seed)) for start in starts])
    drawn = jnp.moveaxis(drawn[: spec.queries], 1, 0)
    missing = spec.block_count - drawn.shape[-1]
    return jnp.pad(drawn, [(0, 0)] * 3 + [(0, missing)], constant_values=-1)


def union_size(block_indices: Int32[Array, "B T N n"], neighbours: int, blocks: int) -> float:
    """Blocks in the union of what `neighbours` neighbouring queries take, over n; the mean of all such groups."""

    @jax.jit
    def total(index: jax.Array) -> jax.Array:
        batch, queries, heads, places = index.shape
        group = jnp.broadcast_to((jnp.arange(queries) // neighbours)[:, None, None], index.shape[1:])
        taken = jnp.zeros((batch, heads, -(-queries // neighbours), blocks), bool)
        row, head = jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None]
        taken = taken.at[row, head, group, jnp.where(index < 0, blocks, index)].set(True, mode="drop")
        return taken.sum() / (taken.size / blocks) / places

    return float(total(block_indices))


def trained_cases(path: Path, queries: int | None = None) -> dict[str, tuple[Spec, tuple[jax.Array, ...]]]:
    """The tensors that `experiments.measure_selection` saved, layer by layer.

    Args:
      path: its `selection.npz`.
      queries: repeat the clip up to this length; None: as long as it is.

    Returns:
      Per layer its shape (block size 64 and window 256 where they fit the published ones, n as saved) and q, k, v and
      gate logits, in bfloat16 but for the logits.

    Raises:
      ValueError: the file holds no such tensors.
    """
    with np.load(path, allow_pickle=False) as arrays:
        layers = sorted({name.split("/")[0] for name in arrays.files if name.endswith("/block_indices")})
        if not layers:
            raise ValueError(f"{path}: no array named LAYER/block_indices, expected a file of measure_selection")
        cases = {}
        for layer in layers:
            q, k, v, logits, index = (
                arrays[f"{layer}/{name}"][None] for name in ("query", "key", "value", "gate_logits", "block_indices")
            )
            length = queries or q.shape[1]
            q, k, v, logits = (_repeated(x, length) for x in (q, k, v, logits))
            spec = Spec(
                f"trained {layer}" + (", repeated" if length > index.shape[1] else ""),
                queries=length,
                keys=length,
                kv_heads=q.shape[2],
                group_size=q.shape[3],
                head_dim=q.shape[4],
                block_count=index.shape[3],
            )
            tensors = (*(jnp.asarray(x, spec.dtype) for x in (q, k, v)), jnp.asarray(logits, jnp.float32))
            cases[layer] = spec, tensors
    return cases


def _repeated(x: np.ndarray, length: int) -> np.ndarray:
    times = -(-length // x.shape[1])
    return np.tile(x, (1, times, *(1,) * (x.ndim - 2)))[:, :length]
