"""config.json of transformers' Qwen2.5-VL, flat (4.49, the hub) or nested (newer), to `ModelConfig` and back."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from videonsa_jax.checkpoints.errors import CheckpointError
from videonsa_jax.checkpoints.safetensor_files import read_json
from videonsa_jax.configs import (
    Dialect,
    GateInit,
    ModelConfig,
    MropeConvention,
    NSAConfig,
    ReleasedCopy,
    TextConfig,
    VisionConfig,
)

CONFIG = "config.json"
MODEL_TYPE, ARCHITECTURE = "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"

# What transformers' classes assume where a field is absent; config.json may leave such fields out.
_VISION_DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": (7, 15, 23, 31),
}
_TOKENS_PER_SECOND_DEFAULT = 4
_TEXT_DEFAULTS = {
    "vocab_size": 152_064,
    "hidden_size": 8192,
    "intermediate_size": 29_568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}
_ROPE_THETA_DEFAULT = 1_000_000.0
# Special tokens that config.json names by id, and their ids where the folder has no tokenizer to ask.
TOKEN_IDS = {
    "bos_token_id": ("<|endoftext|>", 151_643),
    "eos_token_id": ("<|im_end|>", 151_645),
    "vision_start_token_id": ("<|vision_start|>", 151_652),
    "vision_end_token_id": ("<|vision_end|>", 151_653),
    "vision_token_id": ("<|vision_pad|>", 151_654),
    "image_token_id": ("<|image_pad|>", 151_655),
    "video_token_id": ("<|video_pad|>", 151_656),
}
_BLOCK = "videonsa"
_BLOCK_NAMES = {
    "dialect": get_args(Dialect),
    "released_copy": get_args(ReleasedCopy),
    "gate_init": get_args(GateInit),
    "mrope": get_args(MropeConvention),
}


@dataclass(frozen=True)
class FolderConfig:
    """What a folder's config.json says.

    Attributes:
      model: the sizes; `nsa` and `mrope` as the `videonsa` block says, None and the default without one.
      has_block: whether there is such a block.
      released: what the published code would run gates with.
    """

    model: ModelConfig
    has_block: bool
    released: NSAConfig


def _refuse(path: Path, field: str, value: object, expected: str) -> None:
    raise CheckpointError(f"{path}: {field} is {value!r}, expected {expected}")


def _check_architecture(path: Path, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    if config.get("model_type") != MODEL_TYPE:
        _refuse(path, "model_type", config.get("model_type"), f'"{MODEL_TYPE}"')
    if config.get("quantization_config"):
        _refuse(
            path, "quantization_config", config["quantization_config"], "none (bfloat16, float16 or float32 weights)"
        )
    vision = config.get("vision_config") or {}
    for owner, values in (("", text), ("vision_config.", vision)):
        if values.get("hidden_act", "silu") != "silu":
            _refuse(path, f"{owner}hidden_act", values["hidden_act"], '"silu"')
    if text.get("use_sliding_window"):
        _refuse(path, "use_sliding_window", True, "false")
    if set(text.get("layer_types") or ()) - {"full_attention"}:
        _refuse(path, "layer_types", text["layer_types"], '"full_attention" for every layer')


def _rope(path: Path, text: Mapping[str, Any]) -> tuple[float, tuple[int, ...]]:
    # 4.49 keeps `rope_scaling` beside `rope_theta`; 5.x has both in `rope_parameters`.
    parameters = text.get("rope_parameters") or text.get("rope_scaling") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "mrope"):
        _refuse(path, "the type of rope_scaling", kind, '"mrope" or "default"')
    sections = parameters.get("mrope_section")
    if not isinstance(sections, list) or len(sections) != 3:
        _refuse(path, "rope_scaling.mrope_section", sections, "three numbers of frequencies")
    theta = parameters.get("rope_theta", text.get("rope_theta", _ROPE_THETA_DEFAULT))
    return float(theta), tuple(sections)


def _nsa_of_block(path: Path, block: Mapping[str, Any]) -> tuple[NSAConfig | None, MropeConvention]:
    values = dict(block)
    mrope = values.pop("mrope", "qwen2_5_vl")
    unknown = sorted(set(values) - {field.name for field in fields(NSAConfig)})
    if unknown:
        raise CheckpointError(f"{path}: the {_BLOCK} block has the unknown field(s) {', '.join(unknown)}")
    for name, names in _BLOCK_NAMES.items():
        value = block.get(name, names[0])
        if value not in names:
            _refuse(path, f"{_BLOCK}.{name}", value, " or ".join(map(repr, names)))
    if "dialect" not in values:  # a dense model
        return None, mrope
    if "branches" in values:
        values["branches"] = tuple(values["branches"])
    return NSAConfig(**values), mrope


def read_config(folder: Path) -> FolderConfig:
    """Reads config.json in either layout.

    Args:
      folder: a checkpoint folder.

    Raises:
      CheckpointError: the file is missing, is not JSON, belongs to another architecture, asks for what this model
        does not have (sliding windows, another activation or rotary scaling, quantised weights), or its `videonsa`
        block is wrong.
    """
    path = folder / CONFIG
    config = read_json(path)
    text, vision = config.get("text_config") or config, config.get("vision_config")
    _check_architecture(path, config, text)
    if not isinstance(vision, dict):
        _refuse(path, "vision_config", vision, "an object")
    theta, sections = _rope(path, text)
    values = {name: text.get(name, default) for name, default in _TEXT_DEFAULTS.items()}
    tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    vision_values = {name: vision.get(name, default) for name, default in _VISION_DEFAULTS.items()}
    vision_values["fullatt_block_indexes"] = tuple(vision_values["fullatt_block_indexes"])
    block = config.get(_BLOCK)
    try:
        nsa, mrope = _nsa_of_block(path, block) if block else (None, "qwen2_5_vl")
        model = ModelConfig(
            vision=VisionConfig(
                **vision_values,
                in_channels=vision.get("in_channels", vision.get("in_chans", 3)),
                rope_theta=float((vision.get("rope_parameters") or {}).get("rope_theta", VisionConfig.rope_theta)),
            ),
            text=TextConfig(
                **values,
                head_dim=text.get("head_dim") or values["hidden_size"] // values["num_attention_heads"],
                rope_theta=theta,
                mrope_section=sections,
                tokens_per_second=float(vision.get("tokens_per_second", _TOKENS_PER_SECOND_DEFAULT)),
                tie_word_embeddings=tied,
            ),
            nsa=nsa,
            mrope=mrope,
        )
        # The published code reads these two from its config and has no field for the others.
        released = NSAConfig(
            dialect="released",
            block_count=text.get("block_counts", 32),
            window_size=text.get("window_size", 256),
        )
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    return FolderConfig(model, block is not None, released)


def _block(config: ModelConfig) -> dict[str, Any]:
    if config.nsa is None:
        return {"mrope": config.mrope}
    values = {field.name: getattr(config.nsa, field.name) for field in fields(NSAConfig)}
    return values | {"branches": list(config.nsa.branches), "mrope": config.mrope}


def _token_ids(folder: Path, config: ModelConfig) -> dict[str, int]:
    """Ids of the special tokens, from the tokenizer in the folder or else Qwen's own."""
    if not (folder / "tokenizer.json").is_file():
        return {name: id for name, (_, id) in TOKEN_IDS.items() if id < config.text.vocab_size}
    added = {token["content"]: token["id"] for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    return {name: added[token] for name, (token, _) in TOKEN_IDS.items() if token in added}


def write_config(folder: Path, config: ModelConfig, dtype: str) -> None:
    """Writes config.json in the flat layout, which transformers 4.49 and newer releases read.

    Args:
      folder: an existing folder; its tokenizer.json, if there is one, gives the ids of the special tokens.
      config: the model's.
      dtype: of the weights: "bfloat16" or "float32".

    Raises:
      CheckpointError: transformers has no place for a value (such as a head_dim that is not hidden_size / heads).
    """
    text, vision = config.text, config.vision
    for name, value, fixed in (
        ("text.head_dim", text.head_dim, text.hidden_size / text.num_attention_heads),
        ("text.tokens_per_second", text.tokens_per_second, int(text.tokens_per_second)),
        ("vision.rms_norm_eps", vision.rms_norm_eps, VisionConfig.rms_norm_eps),
        ("vision.rope_theta", vision.rope_theta, VisionConfig.rope_theta),
    ):
        if value != fixed:
            raise CheckpointError(f"{name} is {value}, which transformers' config.json cannot say, expected {fixed:g}")
    content = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "torch_dtype": dtype,
        **_token_ids(folder, config),
        **{name: getattr(text, name) for name in _TEXT_DEFAULTS},
        "hidden_act": "silu",
        "max_position_embeddings": 128_000,
        "rope_theta": text.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(text.mrope_section)},
        "use_sliding_window": False,
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": {
            "model_type": MODEL_TYPE,
            "hidden_act": "silu",
            **{name: getattr(vision, name) for name in _VISION_DEFAULTS},
            "in_channels": vision.in_channels,
            "tokens_per_second": int(text.tokens_per_second),
        },
        _BLOCK: _block(config),
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")


def choose_nsa(
    folder: Path, read: FolderConfig, has_gates: bool, nsa: NSAConfig | str | None
) -> tuple[ModelConfig, str]:
    """Which attention a folder's model gets.

    Args:
      folder: named in messages.
      read: its config.json.
      has_gates: whether it holds gate tensors.
      nsa: "auto", a config that wins over the folder's, or None for dense attention throughout.

    Returns:
      The model's config, and what the user should be told ("" = nothing).

    Raises:
      ValueError: `nsa` is a string other than "auto".
    """
    if isinstance(nsa, str) and nsa != "auto":
        raise ValueError(f'nsa is {nsa!r}, expected "auto", an NSAConfig or None')
    notice = ""
    if nsa == "auto":
        nsa = read.model.nsa
        if has_gates and not read.has_block:
            nsa = read.released
            notice = (
                f"{folder} holds NSA gates but no {_BLOCK!r} block in {CONFIG}: taken as the published checkpoint, run "
                f'with NSAConfig(dialect="released", block_count={nsa.block_count}, window_size={nsa.window_size}); '
                "pass nsa=NSAConfig() for the paper's arithmetic"
            )
    elif nsa is None and has_gates:
        notice = f"nsa=None: the NSA gates of {folder} are left out, and will be missing where this model is saved"
    elif nsa is not None and not has_gates:
        notice = f'{folder} holds no NSA gates: they are initialised anew (gate_init="{nsa.gate_init}")'
    mrope = read.model.mrope
    if nsa is not None and nsa.dialect == "released" and not read.has_block:
        mrope = "int_seconds"  # as the published code computes them
    return replace(read.model, nsa=nsa, mrope=mrope), notice
