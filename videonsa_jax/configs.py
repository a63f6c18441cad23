"""Model configurations: frozen dataclasses, and the published sizes as functions.

Field names follow transformers' `Qwen2_5_VLConfig`, so that a reader of either finds the other.
"""

from dataclasses import dataclass, field
from typing import Literal

Branch = Literal["compressed", "selected", "window"]
BRANCHES: tuple[Branch, ...] = ("compressed", "selected", "window")
MropeConvention = Literal["qwen2_5_vl", "int_seconds", "transformers_5_3", "transformers_5_21"]
Dialect = Literal["paper", "released"]
ReleasedCopy = Literal["evaluation", "training"]
GateInit = Literal["released", "zero"]


def _require(condition: bool, owner: str, sentence: str) -> None:
    if not condition:
        raise ValueError(f"{owner}: {sentence}")


@dataclass(frozen=True)
class VisionConfig:
    """Qwen2.5-VL's vision tower: a windowed ViT over 2-frame patches, then a 2x2 merger.

    Attributes:
      depth: number of transformer blocks.
      hidden_size: width of the tower.
      intermediate_size: width of the gated MLP.
      num_heads: attention heads; hidden_size must divide by it into an even head size.
      out_hidden_size: width of the merged tokens; equals the text model's hidden_size.
      patch_size: pixels a patch is wide and high.
      temporal_patch_size: frames a patch is deep.
      spatial_merge_size: patches merged into a token along each image axis.
      window_size: pixels an attention window is wide and high.
      fullatt_block_indexes: blocks that attend over the whole frame instead of a window.
    """

    depth: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 3420
    num_heads: int = 16
    out_hidden_size: int = 3584
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    in_channels: int = 3
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        _require(
            self.hidden_size % (4 * self.num_heads) == 0,
            "VisionConfig",
            f"hidden_size {self.hidden_size} must be a multiple of 4 x num_heads ({self.num_heads}), "
            "for 2-D rotary embeddings",
        )
        _require(
            self.window_size % (self.patch_size * self.spatial_merge_size) == 0,
            "VisionConfig",
            f"window_size {self.window_size} must be a multiple of the merged patch "
            f"({self.patch_size * self.spatial_merge_size} pixels)",
        )

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def pixels_per_token(self) -> int:
        """Pixels a visual token is wide and high (28 for every published size)."""
        return self.patch_size * self.spatial_merge_size


@dataclass(frozen=True)
class TextConfig:
    """Qwen2.5's decoder: pre-norm GQA with biased q, k, v, SwiGLU, multimodal rotary embedding.

    Attributes:
      mrope_section: frequencies given to the (time, height, width) ids; they sum to head_dim / 2.
      tokens_per_second: M-RoPE temporal ids per second of video.
    """

    vocab_size: int = 152_064
    hidden_size: int = 3584
    intermediate_size: int = 18_944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tokens_per_second: float = 2.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "TextConfig",
            f"num_attention_heads {self.num_attention_heads} must be a multiple of "
            f"num_key_value_heads {self.num_key_value_heads}",
        )
        _require(
            2 * sum(self.mrope_section) == self.head_dim,
            "TextConfig",
            f"mrope_section {self.mrope_section} sums to {sum(self.mrope_section)}, "
            f"expected head_dim / 2 = {self.head_dim / 2:g}",
        )

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G)."""
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class NSAConfig:
    """Native Sparse Attention over the visual stream (arXiv 2510.02295 section 2).

    Attributes:
      block_size: keys per block (s), shared by compression and selection.
      block_count: selected blocks per query (n), the current one included.
      window_size: keys in the sliding window (w), the query's own included.
      gate_temperature: divides the gate logits before the sigmoid (0.3 in the released code).
      init_blocks: leading blocks that are always selected.
      local_blocks: trailing blocks that are always selected, the current one included.
      gate_init: "released" (normal 0.02 weights) or "zero" (second weight 0: every gate is 0.5).
      branches: the branches whose output counts; an absent one contributes 0.
      dialect: "paper" (docs/attention.md), or "released": the arithmetic of the published code, with which the
        published checkpoint was trained (`models/released.py`); a correctness path, in plain XLA.
      released_copy: which of that code's two copies the dialect "released" follows: "evaluation" (its lmms-eval) or
        "training" (its ms-swift). Unused by "paper".
    """

    block_size: int = 64
    block_count: int = 32
    window_size: int = 256
    gate_temperature: float = 0.3
    init_blocks: int = 0
    local_blocks: int = 1
    gate_init: GateInit = "released"
    branches: tuple[Branch, ...] = BRANCHES
    dialect: Dialect = "paper"
    released_copy: ReleasedCopy = "evaluation"

    def __post_init__(self) -> None:
        for name in ("block_size", "block_count", "window_size"):
            _require(getattr(self, name) >= 1, "NSAConfig", f"{name} is {getattr(self, name)}, expected at least 1")
        _require(self.gate_temperature > 0, "NSAConfig", f"gate_temperature is {self.gate_temperature}, expected > 0")
        _require(
            self.init_blocks >= 0 and self.local_blocks >= 0,
            "NSAConfig",
            f"init_blocks is {self.init_blocks} and local_blocks {self.local_blocks}, expected neither below 0",
        )
        forced = self.init_blocks + max(self.local_blocks, 1)
        _require(
            forced <= self.block_count,
            "NSAConfig",
            f"init_blocks {self.init_blocks} and local_blocks {self.local_blocks} (the current block counts as one) "
            f"add up to {forced}, expected at most block_count {self.block_count}",
        )
        _require(
            set(self.branches) <= set(BRANCHES) and len(set(self.branches)) == len(self.branches),
            "NSAConfig",
            f"branches {self.branches} must be distinct names out of {BRANCHES}",
        )
        if self.dialect == "released":
            self._check_released()

    def _check_released(self) -> None:
        _require(
            (self.init_blocks, self.local_blocks) == (0, 1) and set(self.branches) == set(BRANCHES),
            "NSAConfig",
            f'dialect "released" has no init_blocks, local_blocks or branches to choose, got {self.init_blocks}, '
            f"{self.local_blocks} and {self.branches}, expected 0, 1 and all three",
        )
        _require(
            self.block_size & (self.block_size - 1) == 0 and max(2, self.released_block_count) <= self.block_size,
            "NSAConfig",
            f'dialect "released" sorts block_size blocks at a time and rounds block_count up to a power of two, so '
            f"block_size must be a power of two of at least {max(2, self.released_block_count)} (block_count is "
            f"{self.block_count}), got {self.block_size}",
        )

    @property
    def released_block_count(self) -> int:
        """Blocks that the published kernel selects: `block_count` rounded up to a power of two."""
        return 1 << (self.block_count - 1).bit_length()


@dataclass(frozen=True)
class ModelConfig:
    """A Qwen2.5-VL model, with NSA on its visual stream or (`nsa=None`) dense throughout.

    Attributes:
      mrope: which release's rule for multimodal rotary ids; see `streams.mrope_positions`.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    nsa: NSAConfig | None = field(default_factory=NSAConfig)
    mrope: MropeConvention = "qwen2_5_vl"

    def __post_init__(self) -> None:
        _require(
            self.vision.out_hidden_size == self.text.hidden_size,
            "ModelConfig",
            f"vision.out_hidden_size {self.vision.out_hidden_size} must equal text.hidden_size {self.text.hidden_size}",
        )


def _qwen2_5_vl(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, *, vocab: int, tied: bool = False
) -> ModelConfig:
    # 32B's vision tower alone has the wider MLP (3456, its config.json); 3B, 7B and 72B have 3420.
    vision_mlp = 3456 if hidden == 5120 else 3420
    return ModelConfig(
        vision=VisionConfig(out_hidden_size=hidden, intermediate_size=vision_mlp),
        text=TextConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            tie_word_embeddings=tied,
        ),
    )


def qwen2_5_vl_3b() -> ModelConfig:
    """Qwen2.5-VL-3B with NSA on the visual stream."""
    return _qwen2_5_vl(2048, 11_008, 36, 16, 2, vocab=151_936, tied=True)


def qwen2_5_vl_7b() -> ModelConfig:
    """Qwen2.5-VL-7B with NSA on the visual stream: VideoNSA-7B."""
    return _qwen2_5_vl(3584, 18_944, 28, 28, 4, vocab=152_064)


def qwen2_5_vl_32b() -> ModelConfig:
    """Qwen2.5-VL-32B with NSA on the visual stream."""
    return _qwen2_5_vl(5120, 27_648, 64, 40, 8, vocab=152_064)


def qwen2_5_vl_72b() -> ModelConfig:
    """Qwen2.5-VL-72B with NSA on the visual stream."""
    return _qwen2_5_vl(8192, 29_568, 80, 64, 8, vocab=152_064)


def tiny(vocab_size: int = 640) -> ModelConfig:
    """A model of about a million parameters for CPUs and tests; G = 4, its NSA scaled down to a few hundred tokens."""
    return ModelConfig(
        vision=VisionConfig(
            depth=2,
            hidden_size=64,
            intermediate_size=176,
            num_heads=2,
            out_hidden_size=128,
            fullatt_block_indexes=(1,),
        ),
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            rope_theta=10_000.0,
            mrope_section=(6, 5, 5),
        ),
        # A block is two frames of 2 x 2 tokens, a window four blocks, as 64 and 256 are for VideoNSA's 64 tokens.
        nsa=NSAConfig(block_size=4, block_count=5, window_size=16),
    )
