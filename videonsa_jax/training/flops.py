"""FLOPs of a training step, and the share of the devices' peak that they come to (MFU); the formula is in
docs/training.md.

Counted are the products that the model's definition asks for, two FLOPs a multiply-add, on valid tokens: what padding,
recomputation (`train.remat`, the loss' chunks, flash attention's second look at its logits) or a kernel's tiles add
is no part of it, so that MFU falls where work is wasted (PaLM, arXiv 2204.02311, App. B).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Int

from pallas_kernels.tpu import CHIPS
from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig
from videonsa_jax.streams import Batch
from videonsa_jax.training.frozen import split_params

Part = Literal["patch_embed", "blocks", "merger", "llm"]
PARTS: tuple[Part, ...] = get_args(Part)  # in the order in which the model computes them

# Dense bfloat16 products per second of one device, by `device_kind`. NVIDIA's data sheets (their sparse figures
# halved) at the power limit of the form named; of TPUs, see `pallas_kernels.tpu.Chip`.
PEAK_FLOPS_PER_SECOND: dict[str, float] = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].bf16_flops_per_second,
    "TPU v5": CHIPS["v5p"].bf16_flops_per_second,
    "TPU v5p": CHIPS["v5p"].bf16_flops_per_second,
    "TPU v6 lite": CHIPS["v6e"].bf16_flops_per_second,
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass.

    Attributes:
      weights: of products of activations with weights; the backward pass has two of the same size, one for the
        gradient of each factor.
      attention: of products among activations; the backward pass has twice as many.
    """

    weights: float
    attention: float = 0.0


def peak_flops_per_second(device_kinds: Sequence[str]) -> float | None:
    """Dense bfloat16 peak of devices together, whatever dtype is computed in; None where a kind is not known."""
    peaks = [PEAK_FLOPS_PER_SECOND.get(kind) for kind in device_kinds]
    return None if None in peaks else sum(peaks)


def trained_parts(params: Mapping[str, Any], frozen: Sequence[str]) -> frozenset[Part]:
    """The parts of the model with parameters that are trained.

    Args:
      params: the model's parameters, or their shapes.
      frozen: as `train.frozen`.
    """
    paths = flatten_dict(split_params(params, frozen)[0], sep="/")
    found = (re.match(r"visual/(patch_embed|blocks|merger)/", path) for path in paths)
    return frozenset(match[1] if match else "llm" for match in found)


def train_flops(model: ModelConfig, batch: Batch, attention: str, trained: Collection[Part] = PARTS) -> float | None:
    """FLOPs of one forward and backward pass over a batch.

    A product's factor is differentiated if its part is trained (weights), or if anything before it is (activations).

    Args:
      model: the sizes.
      batch: its lengths and grids count, not its pixels; arrays on the host.
      attention: "nsa" or "dense", as `train.attention`.
      trained: from `trained_parts`.

    Returns:
      The FLOPs, of all rows; None in the dialect "released", whose arithmetic is not counted.
    """
    parts = forward_flops(model, batch, attention)
    if parts is None:
        return None
    total, gradient_passes = 0.0, False
    for part in PARTS:
        is_trained = part in trained
        # Pixels need no gradient; further in, a part's own earlier layers do.
        gradient_passes |= is_trained and part != "patch_embed"
        total += parts[part].weights * (1 + is_trained + gradient_passes)
        total += parts[part].attention * (1 + 2 * gradient_passes)
        gradient_passes |= is_trained
    return total


def forward_flops(model: ModelConfig, batch: Batch, attention: str) -> dict[Part, Flops] | None:
    """FLOPs of a forward pass over a batch, by part; arguments and None as `train_flops`."""
    if attention == "nsa" and model.nsa is not None and model.nsa.dialect == "released":
        return None
    grids = np.asarray(batch.frame_grids, np.int64).reshape(-1, 2)
    return _vision_flops(model.vision, grids) | {"llm": _llm_flops(model.text, model.nsa, batch, attention)}


def _vision_flops(config: VisionConfig, grids: Int[np.ndarray, "F 2"]) -> dict[Part, Flops]:
    hidden, patches = config.hidden_size, int(grids.prod(axis=1).sum())
    side = config.window_size // config.patch_size
    full_layers = len(set(config.fullatt_block_indexes) & set(range(config.depth)))
    full = int((grids.prod(axis=1) ** 2).sum())
    # A grid's windows are the products of pieces of its two sides, `side` long but for the last.
    windowed = int(np.prod([(grids // side) * side**2 + (grids % side) ** 2], axis=(0, 2)).sum())
    pairs = full_layers * full + (config.depth - full_layers) * windowed
    block = 4 * hidden**2 + 3 * hidden * config.intermediate_size
    joined = hidden * config.spatial_merge_size**2
    merged = patches // config.spatial_merge_size**2
    return {
        "patch_embed": Flops(2.0 * patches * config.patch_dim * hidden),
        "blocks": Flops(2.0 * config.depth * patches * block, 4.0 * hidden * pairs),
        "merger": Flops(2.0 * merged * joined * (joined + config.out_hidden_size)),
    }


def _llm_flops(config: TextConfig, nsa: NSAConfig | None, batch: Batch, attention: str) -> Flops:
    visual_lengths = np.asarray(batch.visual_lengths, np.int64)
    text_lengths = np.asarray(batch.text_lengths, np.int64)
    visual_tokens, text_tokens = int(visual_lengths.sum()), int(text_lengths.sum())
    hidden, layers = config.hidden_size, config.num_hidden_layers
    width = config.num_attention_heads * config.head_dim
    keys_values = 2 * hidden * config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * width + keys_values + 3 * hidden * config.intermediate_size
    gates = hidden * (hidden + 3 * config.num_attention_heads) if attention == "nsa" else 0
    # Of the last layer, the visual stream needs keys and values only.
    products = visual_tokens * ((layers - 1) * (layer + gates) + keys_values)
    products += text_tokens * (layers * layer + hidden * config.vocab_size)

    seen_by_text = _within(batch.visible_visual, text_lengths) + (text_lengths * (text_lengths + 1) // 2).sum()
    if attention == "nsa":
        seen_by_visual = sum(nsa_pairs(nsa, visual_lengths).values())
    else:
        seen_by_visual = (visual_lengths * (visual_lengths + 1) // 2).sum() + _within(
            batch.visible_text, visual_lengths
        )
    pairs = layers * int(seen_by_text) + (layers - 1) * int(seen_by_visual)
    return Flops(2.0 * products, 4.0 * width * pairs)


def _within(counts: Any, lengths: Int[np.ndarray, "*R"]) -> int:
    """The sum of `counts` over the first `lengths` places of its last axis."""
    counts = np.asarray(counts, np.int64)
    return int(np.sum(counts * (np.arange(counts.shape[-1]) < lengths[..., None])))


def nsa_pairs(nsa: NSAConfig, lengths: Int[np.ndarray, "B"]) -> dict[str, int]:
    """Pairs of a visual query and a key (of the compressed branch: a block's mean) that each branch attends to.

    The choice of blocks reads the compressed branch's probabilities, and no more is counted for it.

    Args:
      nsa: blocks, window and branches; docs/attention.md defines what a query sees.
      lengths: visual tokens of each context.

    Returns:
      For each of `nsa.branches` the pairs per head, of all contexts.
    """
    pairs = dict.fromkeys(nsa.branches, 0)
    for length in lengths:
        query = np.arange(length, dtype=np.int64)
        block, place = np.divmod(query, nsa.block_size)
        seen = {
            "compressed": (query + 1) // nsa.block_size,
            "selected": (np.minimum(block + 1, nsa.block_count) - 1) * nsa.block_size + place + 1,
            "window": np.minimum(query + 1, nsa.window_size),
        }
        for branch in pairs:
            pairs[branch] += int(seen[branch].sum())
    return pairs
