"""The one table that says which tensor of a checkpoint is which parameter, read when loading and when saving."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from videonsa_jax.configs import ModelConfig

# Parameter of `models.VideoNSA` -> key of Qwen2.5-VL's hub checkpoints, {} a layer's number. Kernels are [in, out]
# here and [out, in] there; what lies along a leading axis here is one tensor for each layer there.
TABLE: tuple[tuple[str, str], ...] = (
    ("visual/patch_embed/proj/kernel", "visual.patch_embed.proj.weight"),
    ("visual/blocks/norm1/scale", "visual.blocks.{}.norm1.weight"),
    ("visual/blocks/norm2/scale", "visual.blocks.{}.norm2.weight"),
    ("visual/blocks/attn/qkv/kernel", "visual.blocks.{}.attn.qkv.weight"),
    ("visual/blocks/attn/qkv/bias", "visual.blocks.{}.attn.qkv.bias"),
    ("visual/blocks/attn/proj/kernel", "visual.blocks.{}.attn.proj.weight"),
    ("visual/blocks/attn/proj/bias", "visual.blocks.{}.attn.proj.bias"),
    ("visual/blocks/mlp/gate_proj/kernel", "visual.blocks.{}.mlp.gate_proj.weight"),
    ("visual/blocks/mlp/gate_proj/bias", "visual.blocks.{}.mlp.gate_proj.bias"),
    ("visual/blocks/mlp/up_proj/kernel", "visual.blocks.{}.mlp.up_proj.weight"),
    ("visual/blocks/mlp/up_proj/bias", "visual.blocks.{}.mlp.up_proj.bias"),
    ("visual/blocks/mlp/down_proj/kernel", "visual.blocks.{}.mlp.down_proj.weight"),
    ("visual/blocks/mlp/down_proj/bias", "visual.blocks.{}.mlp.down_proj.bias"),
    ("visual/merger/ln_q/scale", "visual.merger.ln_q.weight"),
    ("visual/merger/mlp_0/kernel", "visual.merger.mlp.0.weight"),
    ("visual/merger/mlp_0/bias", "visual.merger.mlp.0.bias"),
    ("visual/merger/mlp_2/kernel", "visual.merger.mlp.2.weight"),
    ("visual/merger/mlp_2/bias", "visual.merger.mlp.2.bias"),
    ("embed_tokens/embedding", "model.embed_tokens.weight"),
    ("decoder/layers/input_layernorm/scale", "model.layers.{}.input_layernorm.weight"),
    ("decoder/layers/post_attention_layernorm/scale", "model.layers.{}.post_attention_layernorm.weight"),
    ("decoder/layers/self_attn/q_proj/kernel", "model.layers.{}.self_attn.q_proj.weight"),
    ("decoder/layers/self_attn/q_proj/bias", "model.layers.{}.self_attn.q_proj.bias"),
    ("decoder/layers/self_attn/k_proj/kernel", "model.layers.{}.self_attn.k_proj.weight"),
    ("decoder/layers/self_attn/k_proj/bias", "model.layers.{}.self_attn.k_proj.bias"),
    ("decoder/layers/self_attn/v_proj/kernel", "model.layers.{}.self_attn.v_proj.weight"),
    ("decoder/layers/self_attn/v_proj/bias", "model.layers.{}.self_attn.v_proj.bias"),
    ("decoder/layers/self_attn/o_proj/kernel", "model.layers.{}.self_attn.o_proj.weight"),
    ("decoder/layers/self_attn/g_proj_1/kernel", "model.layers.{}.self_attn.g_proj_1.weight"),
    ("decoder/layers/self_attn/g_proj_1/bias", "model.layers.{}.self_attn.g_proj_1.bias"),
    ("decoder/layers/self_attn/g_proj_2/kernel", "model.layers.{}.self_attn.g_proj_2.weight"),
    ("decoder/layers/self_attn/g_proj_2/bias", "model.layers.{}.self_attn.g_proj_2.bias"),
    ("decoder/layers/mlp/gate_proj/kernel", "model.layers.{}.mlp.gate_proj.weight"),
    ("decoder/layers/mlp/up_proj/kernel", "model.layers.{}.mlp.up_proj.weight"),
    ("decoder/layers/mlp/down_proj/kernel", "model.layers.{}.mlp.down_proj.weight"),
    ("norm/scale", "model.norm.weight"),
    ("lm_head/kernel", "lm_head.weight"),
)
STACKS = {
    "visual/blocks/": lambda config: config.vision.depth,
    "decoder/layers/": lambda config: config.text.num_hidden_layers,
}
PATCH_EMBED = "visual/patch_embed/proj/kernel"
EMBEDDING_KEY, HEAD_KEY = "model.embed_tokens.weight", "lm_head.weight"

# Releases from 4.52 on may write these prefixes; the hub's, and what every release reads, are on the right.
_NEWER_PREFIXES = (("model.visual.", "visual."), ("model.language_model.", "model."))
_GATE = re.compile(r"model\.layers\.\d+\.self_attn\.g_proj_[12]\.(weight|bias)")


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint.

    Attributes:
      key: its name there.
      path: our parameter, as `path_name` writes it.
      layer: its place along the parameter's leading axis, or None where the parameter is this tensor alone.
      shape: its shape there.
      is_kernel: stored [out, in, ...] there, [in, out] here.
    """

    key: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    is_kernel: bool


def hub_key(key: str) -> str:
    """A key in the layout of the hub's checkpoints, whichever transformers release wrote it."""
    for newer, hub in _NEWER_PREFIXES:
        if key.startswith(newer):
            return hub + key.removeprefix(newer)
    return key


def is_gate(key: str) -> bool:
    """Whether a key (in the hub's layout) is one of the NSA gate MLP's."""
    return _GATE.fullmatch(key) is not None


def _stored_shape(path: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    vision = config.vision
    if path == PATCH_EMBED:
        patch = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        return (vision.hidden_size, *patch)
    return shape[::-1] if path.endswith("/kernel") else shape


def weights_of(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
    """Every tensor of a checkpoint of this model.

    Args:
      config: the model's sizes.
      shapes: shape of each parameter of the model, by path; the table must cover them all.

    Returns:
      The tensors by key, in the order of the table.
    """
    last = config.text.num_hidden_layers - 1
    weights, used = [], set()

    def add(path: str, key: str, layer: int | None) -> None:
        shape = shapes[path] if layer is None else shapes[path][1:]
        weights.append(Weight(key, path, layer, _stored_shape(path, shape, config), path.endswith("/kernel")))
        used.add(path)

    for path, key in TABLE:
        stack = next((prefix for prefix in STACKS if path.startswith(prefix)), None)
        # The last decoder layer is a module of its own: its half of the visual stream is skipped.
        last_path = path.replace("decoder/layers/", "decoder/last_layer/")
        if last_path not in shapes:  # gates of a dense model, the head of a tied one
            continue
        if stack is None:
            add(path, key, None)
            continue
        for layer in range(STACKS[stack](config)):
            if last_path != path and layer == last:
                add(last_path, key.format(layer), None)
            else:
                add(path, key.format(layer), layer)
    uncovered = sorted(set(shapes) - used)
    assert not uncovered, f"parameters without a line in TABLE: {', '.join(uncovered)}"
    return {weight.key: weight for weight in weights}


def stored_array(weight: Weight, array: np.ndarray) -> np.ndarray:
    """A parameter's slice `[in, out]` or `[n]` as the checkpoint stores it; C-contiguous."""
    return np.ascontiguousarray((array.T if weight.is_kernel else array).reshape(weight.shape))
