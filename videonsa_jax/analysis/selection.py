"""Which blocks a trained model selects, and how alike neighbouring queries choose.

A kernel that serves a tile of neighbouring queries reads the union of their blocks: its traffic per query follows from
the size of that union.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import block_selection, compressed_attention
from pallas_kernels.nsa import block_means
from videonsa_jax.models.attention import AttentionOptions, visibility
from videonsa_jax.models.videonsa import VideoNSA
from videonsa_jax.streams import Batch, register_pytree


@register_pytree
@dataclass(frozen=True)
class VisualAttention:
    """What one layer's visual attention computes with.

    Attributes:
      query: after M-RoPE.
      key: after M-RoPE.
      value: as projected.
      gate_logits: of the three branches.
      block_indices: selected blocks, ascending, -1 where a query has fewer than n candidates.
    """

    query: Float[Array, "B Lv N G D"]
    key: Float[Array, "B Lv N D"]
    value: Float[Array, "B Lv N D"]
    gate_logits: Float[Array, "B Lv N G 3"]
    block_indices: Int[Array, "B Lv N n"]


def visual_attention(model: VideoNSA, batch: Batch) -> Iterator[VisualAttention]:
    """Runs a model with NSA and yields what each layer's visual attention computes with.

    The last layer is left out: nothing reads its visual queries (docs/attention.md, "Last layer").

    Args:
      model: a model with gates.
      batch: the two streams; the text does not matter.
    """
    nsa = model.config.nsa
    if nsa is None:
        raise ValueError("visual_attention: config.nsa is None, expected a model with gates")
    batch = jax.tree.map(jnp.asarray, batch)
    places = visibility(batch, model.config.text)
    text = model.embed_tokens.embedding[...][batch.text_tokens].astype(model.dtype)
    hidden = (model.embed_visual(batch), text)
    graphdef, state = nnx.split(model.decoder.layers)
    for index in range(jax.tree.leaves(state)[0].shape[0]):
        layer = nnx.merge(graphdef, jax.tree.map(lambda leaf, index=index: leaf[index], state))
        normed, attention = layer.input_layernorm(hidden[0]), layer.self_attn
        query = attention.queries(normed, places.visual_tables)
        key, value = attention.keys_values(normed, places.visual_tables)
        shared = {"block_size": nsa.block_size, "lengths": batch.visual_lengths}
        k_blocks = block_means(key, nsa.block_size)
        _, lse = compressed_attention(query, k_blocks, block_means(value, nsa.block_size), **shared)
        block_indices = block_selection(
            query,
            k_blocks,
            lse,
            block_count=nsa.block_count,
            init_blocks=nsa.init_blocks,
            local_blocks=nsa.local_blocks,
            **shared,
        )
        yield VisualAttention(query, key, value, attention.gate_logits(normed), block_indices)
        hidden = layer(hidden, places, AttentionOptions("nsa"))


def _chosen(block_indices: Int[np.ndarray, "L N n"], blocks: int) -> Bool[np.ndarray, "L N blocks"]:
    chosen = np.zeros((*block_indices.shape[:2], blocks + 1), bool)
    np.put_along_axis(chosen, block_indices, True, axis=-1)
    return chosen[..., :blocks]  # -1 marks the extra column


def union_sizes(
    block_indices: Int[np.ndarray, "L N n"], *, block_size: int, neighbours: Sequence[int]
) -> dict[int, float]:
    """Mean size of the union of the blocks that neighbouring queries select, divided by n.

    Tiles of m neighbours start at multiples of m. Those in which a query has no more than n candidates, and so no
    choice, are left out.

    Args:
      block_indices: of one context's valid queries.
      block_size: keys per block (s).
      neighbours: sizes of tiles (m).

    Returns:
      By m: 1.0 where all neighbours choose alike, at most m; NaN where no tile is left.
    """
    length, _, count = block_indices.shape
    chosen = _chosen(block_indices, -(-length // block_size))
    sizes = {}
    for m in neighbours:
        first = -(-count * block_size // m)
        tiles = chosen[first * m : length // m * m].reshape(-1, m, *chosen.shape[1:])
        sizes[m] = float(tiles.any(axis=1).sum(-1).mean() / count) if len(tiles) else float("nan")
    return sizes
