"""Messages to text tokens: the tokenizer, Qwen's chat template, and which tokens are answers.

The template is rendered with a mark in place of every text that came from outside, and the marks are filled in after
the rendered text was cut at its special tokens. So a question that holds "<|im_end|>" stays text, and tokenisation is
otherwise the same as that of the rendered whole.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer

from videonsa_jax.data.template import TemplateError, render_template
from videonsa_jax.streams import Visual

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_FIELDS = ("role", "content")

# Qwen2.5-VL's chat_template.json, with its fixed system prompt made a variable.
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' and system_prompt %}"
    "<|im_start|>system\n{{ system_prompt }}<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_SYSTEM_PROMPT = "You are a helpful assistant."

_MARK = re.compile("\ue000([0-9]+)\ue001")  # private-use characters, which no template holds


class ChatError(ValueError):
    """Messages, a template or a tokenizer that cannot be used: one sentence says which, what was seen and expected."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the parts that `streams.split_streams` takes.

    Attributes:
      parts: runs of token ids, and a `Visual` where a video or image stands.
      answer: for each token of the text stream whether the assistant said it (its closing <|im_end|> included).
    """

    parts: list[list[int] | Visual]
    answer: Bool[np.ndarray, "Lt"]


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template. Picklable: loader workers get a copy.

    Attributes:
      tokenizer: reads special tokens in text as such; used to decode.
      plain: the same tokenizer, reading them as ordinary text.
      special_ids: id of every special token.
      template: Jinja source.
      system_prompt: for conversations without one; empty or None = none.
      template_variables: what else the template may read, such as `bos_token`.
    """

    tokenizer: Tokenizer
    plain: Tokenizer
    special_ids: Mapping[str, int]
    template: str = QWEN_TEMPLATE
    system_prompt: str | None = QWEN_SYSTEM_PROMPT
    template_variables: Mapping[str, str] = field(default_factory=dict)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.plain.encode_special_tokens = True  # not part of a pickled tokenizer

    @property
    def vocab_size(self) -> int:
        """Largest token id plus one."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of text from outside: special tokens in it are ordinary characters."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def render(
        self, messages: Sequence[object], visuals: Sequence[Visual] = (), *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Renders and tokenises one conversation.

        Args:
          messages: Qwen's format: {"role", "content": text or a list of items of type "text", "video" or "image"}.
          visuals: one per video or image item, in order.
          add_generation_prompt: end with the header of the assistant's turn.

        Raises:
          ChatError: a message is malformed, or items and `visuals` differ in number.
        """
        texts = _Texts()
        variables = {
            **self.template_variables,
            "messages": [_marked(message, place, texts) for place, message in enumerate(messages)],
            "system_prompt": texts.mark(self.system_prompt) if self.system_prompt else "",
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered = render_template(self.template, variables)
        except TemplateError as error:
            raise ChatError(str(error)) from error
        return self._assemble(rendered, texts, visuals)

    def _assemble(self, rendered: str, texts: "_Texts", visuals: Sequence[Visual]) -> Rendered:
        parts, answer = [], []
        run, said, in_answer, seen = "", False, False, 0
        token = re.compile("|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True))))

        def extend(ids: list[int], is_answer: bool) -> None:
            if not parts or isinstance(parts[-1], Visual):
                parts.append([])
            parts[-1].extend(ids)
            answer.extend([is_answer] * len(ids))

        for piece, kind in _pieces(rendered, token):
            # Neighbouring texts are tokenised together, as in the rendered whole, up to where an answer begins: there
            # generation starts too, with the header's tokens given.
            is_said = kind == "mark" and texts.said[int(piece)]
            if run and (kind == "special" or is_said != said):
                extend(self.encode(run), said)
                run = ""
            if kind != "special":
                run, said = run + (texts.texts[int(piece)] if kind == "mark" else piece), is_said
                in_answer |= is_said
            elif piece in (VIDEO_PAD, IMAGE_PAD):
                if seen == len(visuals):
                    raise ChatError(f"the messages hold more videos and images than the {len(visuals)} given")
                parts.append(visuals[seen])
                seen += 1
            else:
                extend([self.special_ids[piece]], in_answer and piece == IM_END)
                in_answer = in_answer and piece != IM_END
        if run:
            extend(self.encode(run), said)
        if seen != len(visuals):
            raise ChatError(f"the messages hold {seen} videos and images, but {len(visuals)} are given")
        return Rendered(parts=parts, answer=np.asarray(answer, bool))


class _Texts:
    """Texts from outside, in the order in which their marks were made."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.said: list[bool] = []

    def mark(self, text: str, said: bool = False) -> str:
        """Keeps a text (`said` by the assistant or not) and returns its mark."""
        self.texts.append(text)
        self.said.append(said)
        return f"\ue000{len(self.texts) - 1}\ue001"


def _marked(message: object, place: int, texts: _Texts) -> dict:
    """A copy of a checked message with every text replaced by its mark."""
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise ChatError(f"message {place} is {str(message)[:80]!r}, expected a role out of {', '.join(ROLES)}")
    unknown = [name for name in message if name not in MESSAGE_FIELDS]
    if unknown:
        raise ChatError(f"message {place} has the field {unknown[0]!r}, expected only {' and '.join(MESSAGE_FIELDS)}")
    content, said = message.get("content"), message["role"] == "assistant"
    if isinstance(content, str):
        return {"role": message["role"], "content": texts.mark(content, said)}
    if not isinstance(content, list | tuple):
        raise ChatError(f"message {place} has content of type {type(content).__name__}, expected text or a list")
    items = []
    for item in content:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str) and len(item) == 2:
            items.append({"type": "text", "text": texts.mark(item["text"], said)})
        elif kind in ("video", "image"):
            items.append({"type": kind, kind: ""})
        else:
            raise ChatError(
                f"message {place} holds the item {str(item)[:80]!r}, expected type text (with a text alone), video "
                "or image"
            )
    return {"role": message["role"], "content": items}


def _pieces(rendered: str, special: re.Pattern) -> Iterator[tuple[str, Literal["special", "mark", "plain"]]]:
    """Cuts rendered text into special tokens, marks (their number) and the template's own text."""
    position = 0
    for match in re.finditer(f"({special.pattern})|{_MARK.pattern}", rendered):
        if match.start() > position:
            yield rendered[position : match.start()], "plain"
        yield (match[1], "special") if match[1] else (match[2], "mark")
        position = match.end()
    if position < len(rendered):
        yield rendered[position:], "plain"


def load_chat(
    tokenizer_json: str | Path, *, template: str = QWEN_TEMPLATE, system_prompt: str | None = QWEN_SYSTEM_PROMPT
) -> Chat:
    """Reads a tokenizer.json.

    Args:
      tokenizer_json: file of the `tokenizers` library, with Qwen's special tokens.
      template: Jinja chat template.
      system_prompt: for conversations without a system message; None = none. A template may have its own instead.

    Raises:
      ChatError: the file is missing or malformed, or lacks one of Qwen's special tokens.
    """
    path = Path(tokenizer_json)
    if not path.is_file():
        raise ChatError(f"{path}: no such file, expected a tokenizer.json")
    try:
        return parse_chat(path.read_text(encoding="utf-8"), template=template, system_prompt=system_prompt)
    except (ChatError, UnicodeDecodeError) as error:
        raise ChatError(f"{path}: {error}") from error


def parse_chat(
    tokenizer_json: str, *, template: str = QWEN_TEMPLATE, system_prompt: str | None = QWEN_SYSTEM_PROMPT
) -> Chat:
    """As `load_chat`, from the text of a tokenizer.json."""
    try:
        tokenizer, plain = Tokenizer.from_str(tokenizer_json), Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises bare Exceptions
        raise ChatError(f"{error}, expected a tokenizer.json") from error
    plain.encode_special_tokens = True
    special_ids = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    missing = [token for token in SPECIAL_TOKENS if token not in special_ids]
    if missing:
        raise ChatError(f"lacks the special token {missing[0]}, expected all of {', '.join(SPECIAL_TOKENS)}")
    return Chat(tokenizer, plain, special_ids, template, system_prompt)
