"""The whole model: vision tower, decoder on two streams, logits where text is."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from pallas_kernels.stripes import striped_order
from videonsa_jax.configs import ModelConfig
from videonsa_jax.models.attention import AttentionKind, AttentionOptions, Implementation, visibility
from videonsa_jax.models.cache import KVCache, Piece, extend
from videonsa_jax.models.decoder import Decoder
from videonsa_jax.models.layers import RMSNorm, linear
from videonsa_jax.models.placement import CONTEXT_AXIS, by_frame, on_mesh, split_rows, take_tokens
from videonsa_jax.models.vision import VisionTower
from videonsa_jax.streams import Batch, register_pytree


@register_pytree
@dataclass(frozen=True)
class Output:
    """What the model returns.

    Attributes:
      logits: of the token that follows each text token.
      visual_hidden: final-normed hidden states of the visual stream, or None unless asked for.
    """

    logits: Float[Array, "B Q Lt V"]
    visual_hidden: Float[Array, "B Lv hidden"] | None


class VideoNSA(nnx.Module):
    """Qwen2.5-VL with Native Sparse Attention on its visual stream (arXiv 2510.02295).

    Q text rows of a context are answered on one visual stream, exactly as Q separate samples would be.

    Parameters have transformers' names (`visual.blocks.attn.qkv`, `decoder.layers.self_attn.q_proj`, ...), kernels are
    `[in, out]`, and the layers of a stack lie along a leading axis; the last decoder layer is `decoder.last_layer`.

    Args:
      config: the sizes; `config.nsa=None` makes a model without gates, dense throughout.
      rngs: the source of initial weights.
      dtype: of activations and matrix products; norms, softmax, losses and logits are float32 whatever it is.
      param_dtype: in which parameters are kept.
      remat: what the backward pass keeps of each layer but the last decoder layer, where it begins: "none" (of the
        layer, everything), "full" (nothing), or another policy; see `remat.checkpointed`.
      vision_remat: likewise of each layer of the vision tower; None: as `remat`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        remat: str = "none",
        vision_remat: str | None = None,
    ):
        text = config.text
        options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        self.visual = VisionTower(config.vision, remat=remat if vision_remat is None else vision_remat, **options)
        # Tied logits start with variance 1. An untied embedding starts at the scale of what the merger and the layers
        # write into the stream, so that a token's identity is not drowned by the first layer's output.
        embedding_scale = text.hidden_size**-0.5 if text.tie_word_embeddings else 1.0
        self.embed_tokens = nnx.Embed(
            text.vocab_size,
            text.hidden_size,
            embedding_init=nnx.initializers.normal(embedding_scale),
            **options,
        )
        self.decoder = Decoder(text, config.nsa, remat=remat, **options)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps, param_dtype=param_dtype)
        if not text.tie_word_embeddings:
            self.lm_head = linear(text.hidden_size, text.vocab_size, use_bias=False, **options)
        self.config = config
        self.dtype = dtype

    def __call__(
        self,
        batch: Batch,
        attention: str | None = None,
        implementation: Implementation = None,
        mesh: Mesh | None = None,
        return_visual: bool = False,
    ) -> Output:
        """Logits of every text position; `text_hidden` has the arguments and errors."""
        hidden, visual = self.text_hidden(batch, attention, implementation, mesh, return_visual)
        return Output(logits=self.logits(hidden), visual_hidden=visual)

    def text_hidden(
        self,
        batch: Batch,
        attention: str | None = None,
        implementation: Implementation = None,
        mesh: Mesh | None = None,
        return_visual: bool = False,
        rows_share_prefix: bool = False,
    ) -> tuple[Float[Array, "B Q Lt hidden"], Float[Array, "B Lv hidden"] | None]:
        """Everything but the output projection, so that a loss can choose its positions first.

        Args:
          batch: the two streams.
          attention: "nsa" or "dense", for the visual queries; None is "nsa" if the model has gates. Text queries are
            dense in both.
          implementation: backend of the attention operations: None (the best for the device), a name, or a dict per
            operation.
          mesh: the devices over which the batch is split; None or one device: no collectives. Over `context`, the
            visual stream lies in stripes (`pallas_kernels/stripes.py`) from here to the last layer.
          return_visual: also compute the visual half of the last layer, which nothing else reads.
          rows_share_prefix: the rows of a context are the same up to their last visual token. Dense attention, in which
            visual tokens see the text before them, then takes Q > 1 too, exactly.

        Returns:
          Final-normed hidden states of the text stream, to be passed to `logits`, and of the visual stream or None.
          Values at padded positions are finite and mean nothing.

        Raises:
          ValueError: `attention` is unknown, is "nsa" on a model without gates, or is "dense" with Q > 1 rows
            that are not said to share their prefix, or the model's dialect is "released" with Q > 1; or Lv does not
            divide into two stripes for each rank of `context`.
        """
        kind = self.attention_kind(attention, batch.text_tokens.shape[1], rows_share_prefix)
        batch = jax.tree.map(jnp.asarray, batch)
        order = self._stripes(kind, batch.visual_source.shape[1], mesh)
        options = AttentionOptions(kind, implementation, mesh, striped=order is not None)
        with on_mesh(mesh):
            if order is not None:
                batch = dataclasses.replace(
                    batch,
                    visual_source=batch.visual_source[:, order],
                    visual_positions=batch.visual_positions[:, :, order],
                    visible_text=batch.visible_text[:, order],
                )
            # The default gather clamps: a padding id outside the vocabulary cannot become NaN.
            text = self.embed_tokens.embedding[...][batch.text_tokens].astype(self.dtype)
            hidden = (self.embed_visual(batch), split_rows(text, "tokens"))
            places = visibility(batch, self.config.text)
            visual, text = self.decoder(hidden, places, options, update_visual=return_visual)
            if return_visual and order is not None:
                visual = visual[:, np.argsort(order)]
        return self.norm(text), self.norm(visual) if return_visual else None

    def _stripes(self, kind: AttentionKind, tokens: int, mesh: Mesh | None) -> Int[np.ndarray, "Lv"] | None:
        ranks = 1 if mesh is None else mesh.shape.get(CONTEXT_AXIS, 1)
        # The dialect "released" merges the streams in sequence order.
        is_released = kind == "nsa" and self.config.nsa.dialect == "released"
        return None if ranks == 1 or is_released else striped_order(tokens, ranks)

    def extend(
        self,
        visual: Float[Array, "B Lv hidden"],
        piece: Piece,
        cache: KVCache,
        options: AttentionOptions,
        *,
        is_whole: bool = False,
    ) -> tuple[Float[Array, "B Q Lt hidden"], KVCache]:
        """Runs the next piece of the two streams on a cache; the pieces together give what one forward pass gives.

        Args:
          visual: the vision tower's tokens of the piece.
          piece: see `cache.Piece`.
          cache: of the pieces before.
          options: see `AttentionOptions`.
          is_whole: as in `cache.extend`.

        Returns:
          Final-normed hidden states of the piece's text tokens, for `logits`, and the cache with the piece.
        """
        text = self.embed_tokens.embedding[...][piece.text_tokens].astype(self.dtype)
        places = jax.tree.map(jnp.asarray, piece).places(self.config.text)
        hidden = (visual.astype(self.dtype), text)
        hidden, cache = extend(self.decoder, hidden, cache, places, options, is_whole=is_whole)
        return self.norm(hidden), cache

    def embed_visual(self, batch: Batch) -> Float[Array, "B Lv hidden"]:
        """Encodes all frames and lines their merged tokens up as the visual stream."""
        contexts, frames, patches, _ = batch.patches.shape
        tokens = batch.visual_source.shape[1]
        if contexts * frames * patches * tokens == 0:
            return jnp.zeros((contexts, tokens, self.config.text.hidden_size), self.dtype)
        merged = self.visual(by_frame(jnp.asarray(batch.patches)), by_frame(jnp.asarray(batch.frame_grids)))
        return take_tokens(merged, jnp.asarray(batch.visual_source))

    def logits(self, hidden: Float[Array, "*L hidden"]) -> Float[Array, "*L V"]:
        """Projects hidden states to the vocabulary; products in the model's dtype, accumulated to float32."""
        weights = self.output_weights().astype(self.dtype)
        return jnp.einsum("...h,hv->...v", hidden, weights, preferred_element_type=jnp.float32)

    def output_weights(self) -> Float[Array, "hidden V"]:
        """Weights of the projection to the vocabulary, for losses that do not want all logits at once."""
        if self.config.text.tie_word_embeddings:
            return self.embed_tokens.embedding[...].T
        return self.lm_head.kernel[...]

    def attention_kind(self, attention: str | None, rows: int, rows_share_prefix: bool = False) -> AttentionKind:
        """What `attention=None` means for this model.

        Raises:
          ValueError: as `text_hidden`.
        """
        if attention is None:
            attention = "dense" if self.config.nsa is None else "nsa"
        if attention not in ("nsa", "dense"):
            raise ValueError(f'VideoNSA: attention is {attention!r}, expected "nsa", "dense" or None')
        if attention == "nsa" and self.config.nsa is None:
            raise ValueError(
                'VideoNSA: attention is "nsa", but config.nsa is None: this model has no gates, use "dense"'
            )
        if rows > 1 and attention == "dense" and not rows_share_prefix:
            raise ValueError(
                f"VideoNSA: dense attention supports Q = 1 text row a context only, got Q = {rows} rows that are not "
                "said to share the text before their video (rows_share_prefix)"
            )
        if rows > 1 and attention == "nsa" and self.config.nsa.dialect == "released":
            raise ValueError(f'VideoNSA: the dialect "released" supports Q = 1 text row a context only, got Q = {rows}')
        return attention
