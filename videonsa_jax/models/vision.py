"""Qwen2.5-VL's vision tower, batched by frame: no patch sees a patch of another frame.

Parameter names follow transformers' `Qwen2_5_VisionTransformerPretrainedModel`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from videonsa_jax.configs import VisionConfig
from videonsa_jax.models import rope
from videonsa_jax.models.layers import (
    GatedMLP,
    RMSNorm,
    fan_in_init,
    linear,
    residual_scale,
    scan_stack,
    stack,
)
from videonsa_jax.models.patch_attention import PADDING, Windows, attend_patches
from videonsa_jax.models.placement import over_frames
from videonsa_jax.models.remat import kept_attention

# CLIP's, as in Qwen2.5-VL's preprocessor_config.json.
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise_pixels(patches: UInt8[Array, "*L patch_dim"], channels: int = 3) -> Float[Array, "*L patch_dim"]:
    """Rescales uint8 pixels to [0, 1] and normalises each channel; float32. A patch is channel-major."""
    per_channel = patches.shape[-1] // channels
    mean = np.repeat(np.asarray(PIXEL_MEAN, np.float32), per_channel)
    std = np.repeat(np.asarray(PIXEL_STD, np.float32), per_channel)
    return (patches.astype(jnp.float32) / 255.0 - mean) / std


def patch_places(
    frame_grids: Int[Array, "*F 2"], num_patches: int, merge: int
) -> tuple[Int[Array, "*F P"], Int[Array, "*F P"], Bool[Array, "*F P"]]:
    """Where each patch of a frame stands, in Qwen's order: merge groups row-major, row-major inside a group.

    Args:
      frame_grids: (height, width) of each frame in patches, multiples of `merge`; (0, 0) for a padded frame.
      num_patches: patches a frame is padded to (P).
      merge: patches merged along each axis.

    Returns:
      (rows, columns, valid).
    """
    group, inner = np.divmod(np.arange(num_patches, dtype=np.int32), merge * merge)
    groups_wide = jnp.maximum(frame_grids[..., 1] // merge, 1)[..., None]
    rows = group // groups_wide * merge + inner // merge
    columns = group % groups_wide * merge + inner % merge
    valid = np.arange(num_patches) < jnp.prod(frame_grids, axis=-1)[..., None]
    return rows, columns, valid


def window_numbers(rows: Int[Array, "*F P"], columns: Int[Array, "*F P"], side: int) -> Int[Array, "*F P"]:
    """Numbers the windows of side x side patches, which start at the frame's corner; row-major, with gaps."""
    return rows // side * rows.shape[-1] + columns // side


class VisionAttention(nnx.Module):
    """Multi-head attention among the patches of one frame, under a mask."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        hidden = config.hidden_size
        options = {"use_bias": True, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype, "rows": "frames"}
        self.qkv = linear(hidden, 3 * hidden, **options)
        self.proj = linear(hidden, hidden, kernel_init=fan_in_init(residual_scale(config.depth)), **options)
        self.num_heads = config.num_heads

    def __call__(
        self,
        x: Float[Array, "F P hidden"],
        tables: tuple[Float[Array, "F P half"], Float[Array, "F P half"]],
        windows: Windows,
        is_full: Bool[Array, ""],
    ) -> Float[Array, "F P hidden"]:
        """Attends among the patches of a frame or, unless `is_full`, of a window. Softmax in float32."""
        frames, patches, hidden = x.shape
        by_head = (frames, patches, self.num_heads, hidden // self.num_heads)
        query, key, value = (part.reshape(by_head) for part in jnp.split(self.qkv(x), 3, axis=-1))
        tables = jax.tree.map(lambda table: table[:, :, None], tables)
        query, key = rope.rotate(query, tables), rope.rotate(key, tables)

        def attend_frames(query: Array, key: Array, value: Array, number: Array, is_full: Array) -> Array:
            return attend_patches(query, key, value, Windows(number, windows.size), is_full)

        attend = over_frames(attend_frames)
        attended = kept_attention(
            lambda arrays, places: attend(*arrays, *places), (query, key, value), (windows.number, is_full)
        )
        return self.proj(attended.reshape(frames, patches, hidden))


class VisionBlock(nnx.Module):
    """Pre-norm transformer block of the tower."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.norm1 = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.norm2 = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.attn = VisionAttention(config, **options)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            use_bias=True,
            num_layers=config.depth,
            rows="frames",
            **options,
        )

    def __call__(
        self,
        x: Float[Array, "F P hidden"],
        tables: tuple[Float[Array, "F P half"], Float[Array, "F P half"]],
        windows: Windows,
        is_full: Bool[Array, ""],
    ) -> Float[Array, "F P hidden"]:
        """Attention, then the gated MLP, each added to its input."""
        x = x + self.attn(self.norm1(x), tables, windows, is_full)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    """The tower's 3-D convolution, whose stride is its kernel: one linear map of each flattened patch."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        self.proj = linear(
            config.patch_dim,
            config.hidden_size,
            use_bias=False,
            rngs=rngs,
            dtype=dtype,
            param_dtype=param_dtype,
            rows="frames",
        )

    def __call__(self, patches: Float[Array, "*L patch_dim"]) -> Float[Array, "*L hidden"]:
        """Embeds normalised patches."""
        return self.proj(patches)


class PatchMerger(nnx.Module):
    """Joins each group of merge x merge patches into one token of the decoder's width.

    `mlp_0` and `mlp_2` are transformers' `mlp.0` and `mlp.2`; an exact GELU stands between.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike):
        joined = config.hidden_size * config.spatial_merge_size**2
        options = {"use_bias": True, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype, "rows": "frames"}
        self.ln_q = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.mlp_0 = linear(joined, joined, **options)
        self.mlp_2 = linear(joined, config.out_hidden_size, **options)

    def __call__(self, x: Float[Array, "F P hidden"]) -> Float[Array, "F merged out_hidden"]:
        """Merges consecutive patches: `[F, P, hidden] -> [F, P / merge^2, out_hidden]`."""
        frames, patches, hidden = x.shape
        joined = self.ln_q(x).reshape(frames, patches * hidden // self.mlp_0.in_features, self.mlp_0.in_features)
        return self.mlp_2(nnx.gelu(self.mlp_0(joined), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding, a stack of windowed and full-frame blocks, and the merger."""

    def __init__(
        self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, param_dtype: DTypeLike, remat: str = "none"
    ):
        options = {"dtype": dtype, "param_dtype": param_dtype}
        self.patch_embed = PatchEmbed(config, rngs=rngs, **options)
        self.blocks = stack(lambda layer_rngs: VisionBlock(config, rngs=layer_rngs, **options), config.depth, rngs)
        self.merger = PatchMerger(config, rngs=rngs, **options)
        self.config = config
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self, patches: UInt8[Array, "F P patch_dim"], frame_grids: Int[Array, "F 2"]
    ) -> Float[Array, "F merged out_hidden"]:
        """Encodes frames, each on its own; memory is linear in their number.

        Args:
          patches: pixels of every patch in Qwen's order; padding is arbitrary.
          frame_grids: (height, width) of each frame in patches; (0, 0) for a padded frame.

        Returns:
          Merged tokens `[F, P / merge^2, out_hidden]` in `dtype`, row-major inside a frame; finite where padded.
        """
        config = self.config
        side, merge = config.window_size // config.patch_size, config.spatial_merge_size
        patches, rows, columns, windows, restore = _window_by_window(patches, frame_grids, side, merge)
        tables = rope.grid_tables(rows, columns, config.head_dim, config.rope_theta)

        def apply(block: VisionBlock, x: Array, is_full: Array) -> Array:
            return block(x, tables, windows, is_full)

        is_full = np.isin(np.arange(config.depth), config.fullatt_block_indexes)
        x = self.patch_embed(normalise_pixels(patches, config.in_channels).astype(self.dtype))
        x = scan_stack(apply, self.blocks, x, is_full, remat=self.remat)
        return restore(self.merger(x))


def _window_by_window(
    patches: UInt8[Array, "F P patch_dim"], frame_grids: Int[Array, "F 2"], side: int, merge: int
) -> tuple[Array, Array, Array, Windows, Callable[[Array], Array]]:
    """Reorders each frame's patches so that windows are contiguous, as Qwen2.5-VL does.

    Returns:
      The patches, their rows, columns and windows, and a function that puts merged tokens back in order.
    """
    rows, columns, valid = patch_places(frame_grids, patches.shape[1], merge)
    number = jnp.where(valid, window_numbers(rows, columns, side), PADDING)
    if patches.shape[1] <= side * side:
        return patches, rows, columns, Windows(number, side * side), lambda merged: merged

    # Whole merge groups move: a window never cuts one.
    group = merge * merge
    order = jnp.argsort(number[:, ::group], axis=1, stable=True)

    def reorder(x: Array) -> Array:
        return _take(x.reshape(*order.shape, group, *x.shape[2:]), order).reshape(x.shape)

    def restore(merged: Array) -> Array:
        return _take(merged, jnp.argsort(order, axis=1))

    return reorder(patches), reorder(rows), reorder(columns), Windows(reorder(number), side * side), restore


def _take(x: Array, permutation: Array) -> Array:
    # With unique indices the gradient is a plain write instead of atomic additions.
    return jax.vmap(lambda x, i: x.at[i].get(unique_indices=True, mode="promise_in_bounds"))(x, permutation)
