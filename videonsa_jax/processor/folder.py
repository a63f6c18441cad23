"""Processors from Hugging Face folders and back."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.chat import QWEN_TEMPLATE, load_chat, parse_chat
from videonsa_jax.data.frames import MAX_PIXELS, MIN_PIXELS
from videonsa_jax.data.media import MediaError, make_limits
from videonsa_jax.models.vision import PIXEL_MEAN, PIXEL_STD
from videonsa_jax.processor.conversations import GENERATION_CONFIG, Processor, ProcessorError, json_file

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PREPROCESSOR = "preprocessor_config.json"
TEMPLATE_JINJA, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    TEMPLATE_JINJA,
    TEMPLATE_JSON,
    PREPROCESSOR,
    GENERATION_CONFIG,
    "processor_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)


def _template(files: Mapping[str, bytes], tokenizer_config: Mapping) -> str:
    """The folder's chat template: the newest of the three places where transformers has put it."""
    if TEMPLATE_JINJA in files:
        return files[TEMPLATE_JINJA].decode()
    template = json_file(files, TEMPLATE_JSON).get("chat_template", tokenizer_config.get("chat_template"))
    if isinstance(template, list):  # [{"name", "template"}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise ProcessorError(
            f"no chat template in {TEMPLATE_JINJA}, {TEMPLATE_JSON} or {TOKENIZER_CONFIG}, expected one in one of them"
        )
    return template


def _agree(value: object, expected: int | list[float]) -> bool:
    try:
        return np.shape(value) == np.shape(expected) and bool(np.allclose(value, expected, rtol=1e-6))
    except (TypeError, ValueError):
        return False


def _pixel_limits(files: Mapping[str, bytes], config: ModelConfig) -> tuple[int, int]:
    """preprocessor_config.json's limits of an image, its other fields compared with what the model does."""
    fields = json_file(files, PREPROCESSOR)
    vision = config.vision
    expected = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }
    for name, value in expected.items():
        if name in fields and not _agree(fields[name], value):
            raise ProcessorError(f"{PREPROCESSOR}: {name} is {fields[name]}, expected {value}")
    size = fields.get("size") or {}
    least = fields.get("min_pixels") or size.get("min_pixels") or size.get("shortest_edge") or MIN_PIXELS
    most = fields.get("max_pixels") or size.get("max_pixels") or size.get("longest_edge") or MAX_PIXELS
    limits = make_limits(min_pixels=least, max_pixels=most)
    return limits.min_pixels, limits.max_pixels


def load_processor(path: str | Path, config: ModelConfig) -> Processor:
    """Reads the processor of a Hugging Face folder of Qwen2.5-VL.

    Args:
      path: the folder. It needs tokenizer.json and a chat template (chat_template.jinja, chat_template.json or in
        tokenizer_config.json); preprocessor_config.json and generation_config.json are read where present.
      config: of the model; gives patch sizes and the rule for M-RoPE ids.

    Raises:
      ProcessorError, ChatError: a file is missing, malformed, or contradicts the model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ProcessorError(f"{folder}: no such folder, expected a model's")
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if TOKENIZER not in files:
        raise ProcessorError(f"{folder}: lacks {TOKENIZER}, expected the files of a Qwen2.5-VL model")
    try:
        tokenizer_config = json_file(files, TOKENIZER_CONFIG)
        chat = dataclasses.replace(
            load_chat(folder / TOKENIZER, template=_template(files, tokenizer_config)),
            template_variables=_token_variables(tokenizer_config),
        )
        least, most = _pixel_limits(files, config)
    except (ProcessorError, MediaError, UnicodeDecodeError) as error:
        raise ProcessorError(f"{folder}: {error}") from error
    if chat.vocab_size > config.text.vocab_size:
        raise ProcessorError(
            f"{folder / TOKENIZER}: {chat.vocab_size} tokens, expected at most the model's {config.text.vocab_size}"
        )
    return Processor(chat, config, files, least, most)


def _token_variables(tokenizer_config: Mapping) -> dict[str, str]:
    """bos_token and its like, which templates may read; transformers writes them as text or as {"content"}."""
    variables = {}
    for name, value in tokenizer_config.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            variables[name] = value
    return variables


def make_processor(tokenizer: Tokenizer, config: ModelConfig, *, template: str = QWEN_TEMPLATE) -> Processor:
    """A processor for a model that was not loaded from a folder, such as one trained here.

    Args:
      tokenizer: with Qwen's special tokens (`data.tokenizer.train_tokenizer` makes one).
      config: of the model.
      template: Jinja chat template.

    Raises:
      ChatError: the tokenizer lacks one of Qwen's special tokens.
    """
    vision = config.vision
    ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": PIXEL_MEAN,
        "image_std": PIXEL_STD,
    }
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    stops = [ids[name] for name in ("<|im_end|>", "<|endoftext|>") if name in ids]
    files = {
        TOKENIZER: tokenizer.to_str().encode(),
        TOKENIZER_CONFIG: _json_bytes(tokenizer_config),
        PREPROCESSOR: _json_bytes(preprocessor),
        GENERATION_CONFIG: _json_bytes({"eos_token_id": stops}),
    }
    return Processor(parse_chat(files[TOKENIZER].decode(), template=template), config, files)


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def save_processor(processor: Processor, path: str | Path) -> None:
    """Writes a processor's files into a folder, as they were loaded; each file is written whole or not at all.

    Args:
      processor: from `load_processor` or `make_processor`.
      path: the folder, made if need be.

    Raises:
      OSError: a file cannot be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in processor.files.items():
        partial = folder / f".{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)
