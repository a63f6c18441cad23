"""A small byte-level BPE tokenizer in the manner of Qwen2.5's, for `clips` and its models."""

import os
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MAX_VOCABULARY = 1000

# tokenizer_config.json of Qwen2.5-VL, in its order.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# How Qwen2.5's tokenizer.json splits text before BPE.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], path: str | os.PathLike[str]) -> Tokenizer:
    """Trains a tokenizer on `texts` and writes it to `path` as a tokenizer.json; the same texts give the same file.

    The vocabulary has at most `MAX_VOCABULARY` entries: all bytes, merges until every word of the texts is one
    token, and after them Qwen2.5's special tokens.

    Args:
      texts: what to learn the merges from.
      path: the file to write; its folder exists.

    Raises:
      ValueError: there is no text.
    """
    texts = list(texts)
    if not any(texts):
        raise ValueError(f"train_tokenizer: got {len(texts)} texts without a character, expected some to learn from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY - len(SPECIAL_TOKENS),
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(Path(path)))
    return tokenizer
