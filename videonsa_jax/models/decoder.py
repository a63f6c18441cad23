"""Qwen2.5's decoder on two streams: the layer, and the stack of layers."""

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from videonsa_jax.configs import NSAConfig, TextConfig
from videonsa_jax.models.attention import Attention, AttentionOptions, TextKV, Visibility, VisualKV
from videonsa_jax.models.layers import GatedMLP, RMSNorm, scan_stack, stack

type Hidden = tuple[Float[Array, "B Lv hidden"], Float[Array, "B Q Lt hidden"]]


class DecoderLayer(nnx.Module):
    """Pre-norm attention and SwiGLU, both residual. Norms and MLP are token-wise, so the streams share them."""

    def __init__(
        self,
        config: TextConfig,
        nsa: NSAConfig | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, param_dtype=param_dtype)
        self.self_attn = Attention(config, nsa, **options)
        self.mlp = GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            use_bias=False,
            num_layers=config.num_hidden_layers,
            **options,
        )

    def __call__(
        self, hidden: Hidden, places: Visibility, options: AttentionOptions, *, update_visual: bool = True
    ) -> Hidden:
        """Applies the layer.

        Args:
          hidden: the two streams.
          places: see `Visibility`.
          options: see `AttentionOptions`.
          update_visual: False computes the visual stream's keys and values only and returns it as it came. Exact for
            the text stream; meant for the last layer, after which nothing reads the visual stream.

        Returns:
          The two streams after the layer.
        """
        normed, visual_kv, text_kv = self.project(hidden, places)
        return self.update(hidden, normed, visual_kv, text_kv, places, options, update_visual=update_visual)

    def project(self, hidden: Hidden, places: Visibility) -> tuple[Hidden, VisualKV, TextKV]:
        """The normed streams, and the keys and values of the visual and of the text tokens."""
        visual, text = self.input_layernorm(hidden[0]), self.input_layernorm(hidden[1])
        visual_kv = self.self_attn.keys_values(visual, places.visual_tables)
        return (visual, text), visual_kv, self.self_attn.keys_values(text, places.text_tables)

    def update(
        self,
        hidden: Hidden,
        normed: Hidden,
        visual_kv: VisualKV,
        text_kv: TextKV,
        places: Visibility,
        options: AttentionOptions,
        *,
        update_visual: bool = True,
    ) -> Hidden:
        """The layer's attention to the given keys and values, which may hold cached ones, and its MLP.

        Args:
          hidden: the two streams.
          normed: what `project` made of them.
          visual_kv: keys and values of the visual stream.
          text_kv: keys and values of the text stream.
          places: see `Visibility`.
          options: see `AttentionOptions`.
          update_visual: as in `__call__`.

        Returns:
          The two streams after the layer.
        """
        (visual, text), attention = hidden, self.self_attn
        if options.kind == "nsa" and attention.nsa.dialect == "released" and visual.shape[1]:
            attended = attention.attend_released(normed, visual_kv, text_kv, places)
            text = self._add_mlp(text + attended[1])
            return (self._add_mlp(visual + attended[0]) if update_visual else visual), text
        if text.shape[2]:
            text = self._add_mlp(text + attention.attend_text(normed[1], visual_kv, text_kv, places, options))
        if update_visual and visual.shape[1]:
            visual = self._add_mlp(visual + attention.attend_visual(normed[0], visual_kv, text_kv, places, options))
        return visual, text

    def _add_mlp(self, x: Float[Array, "*L hidden"]) -> Float[Array, "*L hidden"]:
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """All decoder layers.

    `layers` holds every layer but the last, stacked along a leading axis and scanned; `last_layer` stands apart
    because its visual half is skipped (docs/attention.md, "Last layer"). To slice one common stack would copy the
    weights in every step.
    """

    def __init__(
        self,
        config: TextConfig,
        nsa: NSAConfig | None,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        remat: str = "none",
    ):
        make = partial(DecoderLayer, config, nsa, dtype=dtype, param_dtype=param_dtype)
        self.layers = stack(lambda layer_rngs: make(rngs=layer_rngs), config.num_hidden_layers - 1, rngs)
        self.last_layer = make(rngs=rngs)
        self.remat = remat

    def __call__(
        self, hidden: Hidden, places: Visibility, options: AttentionOptions, *, update_visual: bool = False
    ) -> Hidden:
        """Applies all layers; unless `update_visual`, the visual stream returned is the one before the last layer."""

        def apply(layer: DecoderLayer, hidden: Hidden, _: None) -> Hidden:
            return layer(hidden, places, options)

        hidden = scan_stack(apply, self.layers, hidden, remat=self.remat)
        return self.last_layer(hidden, places, options, update_visual=update_visual)
