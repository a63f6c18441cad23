"""Attention over the two streams (docs/architecture.md, "Two streams").

Visual queries read visual keys: by Native Sparse Attention, or densely together with the text before them. Text
queries read the visual and text keys before them, always densely: two parts merged by log-sum-exp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import merge_by_lse, nsa_attention, nsa_attention_sharded, prefix_attention
from pallas_kernels.stripes import gather_stripes, stripe_starts, striped_order
from videonsa_jax.configs import NSAConfig, TextConfig
from videonsa_jax.models import released, rope
from videonsa_jax.models.layers import fan_in_init, linear, residual_scale
from videonsa_jax.models.placement import CONTEXT_AXIS, DATA_AXES, TENSOR_AXIS
from videonsa_jax.models.remat import kept_attention
from videonsa_jax.streams import Batch

type AttentionKind = Literal["nsa", "dense"]
type Implementation = str | Mapping[str, str | None] | None
type Tables = tuple[Float[Array, "*L half"], Float[Array, "*L half"]]
# Keys and values; there are as many as tokens, or more where earlier ones are cached.
type VisualKV = tuple[Float[Array, "B Sv N D"], Float[Array, "B Sv N D"]]
type TextKV = tuple[Float[Array, "B Q St N D"], Float[Array, "B Q St N D"]]


@dataclass(frozen=True)
class Visibility:
    """What every layer's attention needs beside the hidden states; see `streams.Batch` for the fields it copies.

    Attributes:
      visual_tables: rotary (cos, sin) of the visual stream, each `[B, Lv, D/2]`.
      text_tables: rotary (cos, sin) of the text stream, each `[B, Q, Lt, D/2]`.
      ids_differ: whether a visual token's three M-RoPE ids are not all equal (the dialect "released" asks).
      visual_offset: place of the first visual query among the visual keys; more than 0 where earlier ones are cached.
      text_offsets: likewise for each text row; None: 0.
    """

    visual_tables: tuple[Float[Array, "B Lv half"], Float[Array, "B Lv half"]]
    text_tables: tuple[Float[Array, "B Q Lt half"], Float[Array, "B Q Lt half"]]
    ids_differ: Bool[Array, "B Lv"]
    visual_lengths: Int[Array, "B"]
    text_lengths: Int[Array, "B Q"]
    visible_visual: Int[Array, "B Q Lt"]
    visible_text: Int[Array, "B Lv"]
    visual_offset: int | Int[Array, ""] = 0
    text_offsets: Int[Array, "B Q"] | None = None


@dataclass(frozen=True)
class AttentionOptions:
    """How attention is computed.

    Attributes:
      kind: "nsa" or "dense", for the visual queries.
      implementation: backend, as `pallas_kernels` takes it: None, a name, or a dict per operation.
      mesh: the devices over which arrays are split, or None; with more than one, kernels run inside `shard_map`.
      striped: the visual stream lies in stripes over the mesh's `context` (`pallas_kernels/stripes.py`).
    """

    kind: AttentionKind
    implementation: Implementation = None
    mesh: Mesh | None = None
    striped: bool = False


def visibility(batch: Batch, config: TextConfig) -> Visibility:
    """Computes once what all layers share."""
    return Visibility(
        visual_tables=rope.mrope_tables(batch.visual_positions, config.mrope_section, config.rope_theta),
        text_tables=rope.mrope_tables(batch.text_positions, config.mrope_section, config.rope_theta),
        ids_differ=jnp.any(batch.visual_positions != batch.visual_positions[:1], axis=0),
        visual_lengths=batch.visual_lengths,
        text_lengths=batch.text_lengths,
        visible_visual=batch.visible_visual,
        visible_text=batch.visible_text,
    )


def _keys_up_to(queries: tuple[int, int, int], offsets: int | Int[Array, "..."] | None) -> Int[Array, "B Q L"]:
    """How many keys of its own stream each query sees: those before it and its own."""
    own = jnp.arange(1, queries[2] + 1, dtype=jnp.int32)
    if offsets is not None:
        own = own + jnp.asarray(offsets, jnp.int32)[..., None]
    return jnp.broadcast_to(own, queries)


def _mesh_axis(mesh: Mesh, name: str) -> str | None:
    return name if mesh.shape.get(name, 1) > 1 else None


def _data_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(axis for axis in DATA_AXES if axis in mesh.shape)


def _prefix(
    query: Float[Array, "B Q L N G D"],
    key: Float[Array, "B *S N D"],
    value: Float[Array, "B *S N D"],
    visible: Int[Array, "B Q L"],
    key_lengths: Int[Array, "B *R"],
    options: AttentionOptions,
    *,
    visual_queries: bool = False,
    visual_keys: bool = False,
) -> tuple[Float[Array, "B Q L N G D"], Float[Array, "B Q L N G"]]:
    """`prefix_attention`, inside `shard_map` where there are several devices.

    Of a striped visual stream, each rank of `context` has its own tokens, and all of the text. So visual queries gather
    visual keys, while text queries attend to each rank's keys and merge what they found.
    """

    def attend(query: Array, key: Array, value: Array, visible: Array, key_lengths: Array) -> tuple[Array, Array]:
        return prefix_attention(query, key, value, visible, key_lengths, implementation=options.implementation)

    def attend_part(query: Array, key: Array, value: Array, visible: Array, key_lengths: Array) -> tuple[Array, Array]:
        if not (options.striped and visual_keys):
            return attend(query, key, value, visible, key_lengths)
        if visual_queries:
            key, value = (gather_stripes(x, CONTEXT_AXIS) for x in (key, value))
            return attend(query, key, value, visible, key_lengths)
        stripes = zip(*(jnp.split(x, 2, axis=1) for x in (key, value)), strict=True)
        starts = stripe_starts(CONTEXT_AXIS, key.shape[1] // 2)
        seen = (
            attend(query, *stripe, *(jnp.maximum(count - start, 0) for count in (visible, key_lengths)))
            for stripe, start in zip(stripes, starts, strict=True)
        )
        return merge_over_ranks(*merge_by_lse(*seen), CONTEXT_AXIS)

    mesh, on_mesh = options.mesh, attend
    if mesh is not None and mesh.size > 1:
        data, heads = _data_axes(mesh), _mesh_axis(mesh, TENSOR_AXIS)
        tokens = CONTEXT_AXIS if options.striped else None
        of_query = PartitionSpec(data, None, tokens if visual_queries else None, heads)
        of_key = PartitionSpec(data, *[None] * (key.ndim - 4), tokens if visual_keys else None, heads)
        on_mesh = jax.shard_map(
            attend_part,
            mesh=mesh,
            in_specs=(of_query, of_key, of_key, PartitionSpec(*of_query[:3]), PartitionSpec(data)),
            out_specs=(of_query, of_query),
            check_vma=False,
        )
    return kept_attention(lambda arrays, places: on_mesh(*arrays, *places), (query, key, value), (visible, key_lengths))


def merge_over_ranks(
    o: Float[Array, "*rows D"], lse: Float[Array, "*rows"], axis: str
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Inside `shard_map`: attention over all keys on every rank of `axis`, from that over each rank's part of them.

    As `merge_by_lse`: rows that see no key on any rank give 0 and -1e30.
    """
    top = jax.lax.pmax(jax.lax.stop_gradient(lse), axis)
    weight = jnp.exp(lse - top)
    total = jax.lax.psum(weight, axis)
    merged = jax.lax.psum(weight[..., None] * o, axis) / total[..., None]
    return merged.astype(o.dtype), top + jnp.log(total)


class Attention(nnx.Module):
    """Grouped-query attention of a decoder layer, with the NSA gate MLP where the model has one.

    Head h of a checkpoint is (h // G, h % G); its gate rows are 3h, 3h+1, 3h+2 (docs/attention.md, "Symbols").
    """

    def __init__(
        self,
        config: TextConfig,
        nsa: NSAConfig | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
    ):
        hidden = config.hidden_size
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.q_proj = linear(hidden, width, use_bias=True, **options)
        self.k_proj = linear(hidden, kv_width, use_bias=True, **options)
        self.v_proj = linear(hidden, kv_width, use_bias=True, **options)
        output_init = fan_in_init(residual_scale(config.num_hidden_layers))
        self.o_proj = linear(width, hidden, use_bias=False, kernel_init=output_init, **options)
        if nsa is not None:
            normal = nnx.initializers.normal(0.02)
            second = nnx.initializers.zeros_init() if nsa.gate_init == "zero" else normal
            self.g_proj_1 = linear(hidden, hidden, use_bias=True, kernel_init=normal, **options)
            self.g_proj_2 = linear(hidden, 3 * config.num_attention_heads, use_bias=True, kernel_init=second, **options)
        self.config = config
        self.nsa = nsa

    def queries(self, x: Float[Array, "*L hidden"], tables: Tables) -> Float[Array, "*L N G D"]:
        """Rotated queries, by KV head and place in its group."""
        config = self.config
        query = self.q_proj(x).reshape(*x.shape[:-1], config.num_key_value_heads, config.group_size, config.head_dim)
        return rope.rotate(query, jax.tree.map(lambda table: table[..., None, None, :], tables))

    def keys_values(
        self, x: Float[Array, "*L hidden"], tables: Tables
    ) -> tuple[Float[Array, "*L N D"], Float[Array, "*L N D"]]:
        """Rotated keys, and values."""
        shape = (*x.shape[:-1], self.config.num_key_value_heads, self.config.head_dim)
        key = rope.rotate(self.k_proj(x).reshape(shape), jax.tree.map(lambda table: table[..., None, :], tables))
        return key, self.v_proj(x).reshape(shape)

    def gate_logits(self, x: Float[Array, "*L hidden"]) -> Float[Array, "*L N G 3"]:
        """Logits of the three branches' gates for each query head; needs a model with NSA."""
        logits = self.g_proj_2(nnx.gelu(self.g_proj_1(x), approximate=False))
        return logits.reshape(*x.shape[:-1], self.config.num_key_value_heads, self.config.group_size, 3)

    def output(self, heads: Float[Array, "*L N G D"]) -> Float[Array, "*L hidden"]:
        """Joins the heads and projects them back."""
        return self.o_proj(heads.reshape(*heads.shape[:-3], self.o_proj.in_features))

    def attend_visual(
        self,
        x: Float[Array, "B Lv hidden"],
        visual_kv: VisualKV,
        text_kv: TextKV,
        places: Visibility,
        options: AttentionOptions,
    ) -> Float[Array, "B Lv hidden"]:
        """The visual stream's attention: NSA over visual keys, or dense over all keys before each token."""
        query = self.queries(x, places.visual_tables)
        if options.kind == "dense":
            return self.output(self._dense_visual(query, visual_kv, text_kv, places, options))
        arguments = {
            "block_size": self.nsa.block_size,
            "block_count": self.nsa.block_count,
            "window_size": self.nsa.window_size,
            "gate_temperature": self.nsa.gate_temperature,
            "init_blocks": self.nsa.init_blocks,
            "local_blocks": self.nsa.local_blocks,
            "branches": self.nsa.branches,
            "implementation": options.implementation,
        }
        mesh, places_of_keys = options.mesh, {"lengths": places.visual_lengths}
        if mesh is None or mesh.size == 1:
            attend = nsa_attention
            is_static = isinstance(places.visual_offset, int)
            (arguments if is_static else places_of_keys)["q_offset"] = places.visual_offset
        else:  # sets q_offset itself; its queries are as many as its keys
            attend = nsa_attention_sharded
            arguments |= {
                "mesh": mesh,
                "data_axes": _data_axes(mesh),
                "context_axis": _mesh_axis(mesh, CONTEXT_AXIS),
                "striped": options.striped,
                "tensor_axis": _mesh_axis(mesh, TENSOR_AXIS),
            }
        heads = kept_attention(
            lambda arrays, places: attend(*arrays, **places, **arguments),
            (query, *visual_kv, self.gate_logits(x)),
            places_of_keys,
        )
        return self.output(heads)

    def _dense_visual(
        self,
        query: Float[Array, "B Lv N G D"],
        visual_kv: VisualKV,
        text_kv: TextKV,
        places: Visibility,
        options: AttentionOptions,
    ) -> Float[Array, "B Lv N G D"]:
        # Where there are several rows, they share the text that a visual token sees: one of them stands for all.
        text_kv = tuple(x[:, :1] for x in text_kv)
        query = query[:, None]
        past = _keys_up_to(query.shape[:3], places.visual_offset)
        if options.striped:
            past = past[:, :, striped_order(query.shape[2], options.mesh.shape[CONTEXT_AXIS])]
        lengths, visible_text = places.text_lengths[:, :1], places.visible_text[:, None]
        visual = _prefix(query, *visual_kv, past, places.visual_lengths, options, visual_queries=True, visual_keys=True)
        text = _prefix(query, *text_kv, visible_text, lengths, options, visual_queries=True)
        return merge_by_lse(visual, text)[0][:, 0]

    def attend_text(
        self,
        x: Float[Array, "B Q Lt hidden"],
        visual_kv: VisualKV,
        text_kv: TextKV,
        places: Visibility,
        options: AttentionOptions,
    ) -> Float[Array, "B Q Lt hidden"]:
        """The text stream's attention: dense over the visual and own text keys before each token."""
        query = self.queries(x, places.text_tables)
        past = _keys_up_to(query.shape[:3], places.text_offsets)
        visual = _prefix(query, *visual_kv, places.visible_visual, places.visual_lengths, options, visual_keys=True)
        text = _prefix(query, *text_kv, past, places.text_lengths, options)
        return self.output(merge_by_lse(visual, text)[0])

    def attend_released(
        self,
        normed: tuple[Float[Array, "B Lv hidden"], Float[Array, "B 1 Lt hidden"]],
        visual_kv: VisualKV,
        text_kv: TextKV,
        places: Visibility,
    ) -> tuple[Float[Array, "B Lv hidden"], Float[Array, "B 1 Lt hidden"]]:
        """Both streams' attention in the dialect "released", which needs whole conversations in sequence order."""
        in_sequence = released.sequence_places(
            places.visible_text, places.visible_visual, places.visual_lengths, places.text_lengths
        )
        tables = (places.visual_tables, places.text_tables)
        is_visual = (places.ids_differ, jnp.zeros(places.visible_visual.shape, bool))
        merged = [
            released.merge_streams(streams, in_sequence)
            for streams in (
                tuple(map(self.queries, normed, tables)),
                *zip(visual_kv, text_kv, strict=True),
                tuple(map(self.gate_logits, normed)),
                is_visual,
            )
        ]
        lengths = places.visual_lengths + places.text_lengths[:, 0]
        *arrays, in_video = merged
        heads = kept_attention(
            lambda arrays, places: released.released_attention(*arrays, *places, self.nsa),
            tuple(arrays),
            (in_video, lengths),
        )
        visual, text = released.split_streams(heads, in_sequence)
        return self.output(visual), self.output(text)
