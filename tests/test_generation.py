"""Answers: against the model run afresh for every token, alone and in batches, on encoded videos."""

import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
from conversation_cases import (  # noqa: F401
    SMALL_PIXELS,
    ask,
    clip,
    config_with,
    image,
    little_optimisation,
    lively_model,
    small_processor,
)

from videonsa_jax import generation
from videonsa_jax.generation import encode_visual, generate
from videonsa_jax.processor import ProcessorError

CHUNK = 64  # one piece, and a cache of one size for all of these
LONG = ask("one", clip(4, 1), "two three", image(2), "red or green", clip(7, 3), "blue?")
SHORT = ask(clip(6, 4), "What colour is the ball?")
ONLY_TEXT = ask("Options")
QUESTIONS = [ask(clip(9, 5), image(6), question) for question in ("What?", "red or green or blue", "one two")]


@pytest.fixture(scope="module")
def model():
    return lively_model()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return small_processor(tmp_path_factory.mktemp("processor"))


@pytest.fixture(scope="module")
def encoded(model, processor):
    return encode_visual(model, processor, QUESTIONS[0], chunk_size=CHUNK, **SMALL_PIXELS)


def tokens_of(model, processor, messages, count=4, **options):
    """The tokens of each row's answer, which no stop token ends."""
    rows = {}
    options = {"chunk_size": CHUNK, "stop_tokens": ()} | SMALL_PIXELS | options
    generate(
        model,
        processor,
        messages,
        count,
        on_token=lambda row, token, _: rows.setdefault(row, []).append(token),
        **options,
    )
    return [rows[row] for row in sorted(rows)]


@jax.jit(static_argnames="attention")
def _forward(model, batch, attention):
    return model(batch, attention=attention).logits


def repeated_forward(model, processor, messages, count=4, attention=None):
    """Greedy tokens, the whole conversation run again for each."""
    batch = processor(messages, **SMALL_PIXELS)
    length = int(batch.text_lengths[0, 0])
    text_ids, visual_ids = batch.text_positions[:, 0, 0, :length], batch.visual_positions[:, 0]
    following = max(text_ids.max(), visual_ids.max(initial=-1)) + 1

    def room(x):
        return np.concatenate([x, np.zeros((*x.shape[:-1], count), np.int32)], axis=-1)

    fields = ("text_tokens", "text_positions", "visible_visual")
    batch = dataclasses.replace(batch, **{name: room(getattr(batch, name)) for name in fields})
    tokens = []
    for index in range(length, length + count):
        logits = _forward(model, batch, attention)
        tokens.append(int(np.argmax(logits[0, 0, index - 1])))
        batch.text_tokens[0, 0, index] = tokens[-1]
        batch.text_positions[:, 0, 0, index] = following + index - length
        batch.visible_visual[0, 0, index] = batch.visual_lengths[0]
        batch.text_lengths[0, 0] = index + 1
    return tokens


@pytest.mark.parametrize("attention", ["nsa", "dense"])
def test_answers_equal_repeated_forward_passes(model, processor, attention):
    expected = repeated_forward(model, processor, LONG, attention=attention)
    assert len(set(expected)) > 1
    assert tokens_of(model, processor, LONG, attention=attention, chunk_size=10) == [expected]


def test_answers_without_gates_equal_repeated_forward_passes(processor):
    dense = lively_model(dataclasses.replace(config_with(), nsa=None))
    assert tokens_of(dense, processor, SHORT) == [repeated_forward(dense, processor, SHORT)]


def test_an_answer_in_the_released_dialect_starts_as_its_forward_pass(processor):
    """The prompt runs in one piece; a generated token is plain dense, as in the published code."""
    released = lively_model(config_with(dialect="released"))
    prompt = processor(SHORT, **SMALL_PIXELS)
    first = np.argmax(_forward(released, prompt, None)[0, 0, prompt.text_lengths[0, 0] - 1])
    (tokens,) = tokens_of(released, processor, SHORT, chunk_size=5)
    assert tokens[0] == first
    assert tokens != tokens_of(lively_model(), processor, SHORT)[0]
    with pytest.raises(ValueError, match='the dialect "released"'):
        encode_visual(released, processor, SHORT)


def test_rows_of_a_batch_equal_single_conversations(model, processor):
    conversations = [LONG, SHORT, ONLY_TEXT]
    single = [tokens_of(model, processor, conversation)[0] for conversation in conversations]
    assert len({tuple(tokens) for tokens in single}) == 3
    assert tokens_of(model, processor, conversations) == single


def test_questions_on_an_encoded_video_equal_single_conversations(model, processor, encoded):
    single = [tokens_of(model, processor, question)[0] for question in QUESTIONS]
    assert len({tuple(tokens) for tokens in single}) == 3
    assert [tokens_of(model, processor, question, visual=encoded)[0] for question in QUESTIONS] == single
    assert tokens_of(model, processor, QUESTIONS, visual=encoded) == single
    assert tokens_of(model, processor, QUESTIONS, group=True) == single
    unnamed = [ask({"type": "video"}, {"type": "image"}, "What?")]
    assert tokens_of(model, processor, unnamed, visual=encoded) == single[:1]


def test_an_encoded_video_states_its_size(encoded):
    assert encoded.num_tokens == 5 * 6 + 6
    # 3 layers, keys and values, 64 places, 2 heads of 16, float32.
    assert encoded.nbytes == 3 * 2 * 64 * 2 * 16 * 4
    assert "36 tokens, 0.0 MiB" in repr(encoded)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        (ask("before", clip(9, 5), image(6), "What?"), "visual token 0 the M-RoPE ids .*equally long text"),
        (ask(clip(9, 7), image(6), "What?"), "show .*frames.*, expected .*frames"),
        (ask(clip(9, 5, fps=1), image(6), "What?"), "M-RoPE ids"),
        (ask(clip(9, 5), "What?"), "show .*, expected"),
        (ask("What?"), "show .*, expected"),
    ],
)
def test_another_visual_context_than_the_encoded_one(model, processor, encoded, messages, sentence):
    with pytest.raises(ProcessorError, match=sentence):
        tokens_of(model, processor, messages, visual=encoded)


def test_an_encoded_video_belongs_to_its_model(model, processor, encoded):
    other = lively_model()
    kernel = other.decoder.layers.mlp.up_proj.kernel
    kernel[...] = kernel[...].at[0, 0, 0].add(1e-6)
    wider = lively_model(config_with(window_size=7))
    for changed in (other, wider):
        with pytest.raises(ValueError, match="other weights or another configuration"):
            tokens_of(changed, processor, QUESTIONS[0], visual=encoded)
    with pytest.raises(ValueError, match="encoded with NSA"):
        tokens_of(model, processor, QUESTIONS[0], visual=encoded, attention="dense")


def test_what_cannot_be_encoded(model, processor):
    dense = lively_model(dataclasses.replace(config_with(), nsa=None))
    with pytest.raises(ValueError, match=r"dense \(nsa=None\)"):
        encode_visual(dense, processor, SHORT)
    with pytest.raises(ProcessorError, match="no video or image"):
        encode_visual(model, processor, ONLY_TEXT)
    with pytest.raises(ProcessorError, match="one conversation, got a list"):
        encode_visual(model, processor, [SHORT])


def test_stop_tokens_end_an_answer_and_are_left_out(model, processor):
    (tokens,) = tokens_of(model, processor, SHORT)
    stop = tokens[2]
    assert stop not in tokens[:2]
    assert tokens_of(model, processor, SHORT, stop_tokens=(stop,)) == [tokens[:2]]
    config = {"eos_token_id": [7, stop]}
    files = processor.files | {"generation_config.json": json.dumps(config).encode()}
    told = dataclasses.replace(processor, files=files)
    assert tokens_of(model, told, SHORT, stop_tokens=None) == [tokens[:2]]
    answer = generate(model, told, SHORT, 4, chunk_size=CHUNK, **SMALL_PIXELS)
    assert answer == processor.chat.decode(tokens[:2])
    assert generate(model, told, [SHORT], 4, chunk_size=CHUNK, **SMALL_PIXELS) == [answer]


def test_fields_left_unread_are_told_once(model, processor):
    config = {"eos_token_id": 7, "do_sample": True, "repetition_penalty": 1.05}
    files = processor.files | {"generation_config.json": json.dumps(config).encode()}
    told = dataclasses.replace(processor, files=files)
    with pytest.warns(UserWarning, match="do_sample, repetition_penalty not read"):
        tokens_of(model, told, SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens_of(model, told, SHORT)


def test_text_comes_as_its_tokens_do(model, processor):
    pieces = []
    answer = generate(
        model,
        processor,
        [SHORT, ONLY_TEXT],
        4,
        chunk_size=CHUNK,
        stop_tokens=(),
        on_token=lambda row, token, text: pieces.append((row, token, text)),
        **SMALL_PIXELS,
    )
    assert [row for row, _, _ in pieces] == [0, 1] * 4
    for row in (0, 1):
        # What an unfinished character at the end would be is not told.
        assert (
            answer[row].rstrip("\ufffd").startswith("".join(text for r, _, text in pieces if r == row).rstrip("\ufffd"))
        )


def test_sampling_depends_on_the_seed_alone(model, processor):
    options = {"temperature": 2.0, "count": 4}
    one, same, other = (tokens_of(model, processor, SHORT, seed=seed, **options) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    greedy = tokens_of(model, processor, SHORT)
    assert tokens_of(model, processor, SHORT, top_k=1, **options) == greedy
    assert tokens_of(model, processor, SHORT, top_p=1e-6, **options) == greedy


def test_a_decode_step_is_compiled_once(model, processor):
    """Other questions, other videos of about the same length, other sampling options: no new program."""
    tokens_of(model, processor, SHORT, temperature=1.0)
    before = generation._decode_step._cache_size()
    for seconds, options in ((5, {"temperature": 0.5}), (8, {"temperature": 0.7, "top_p": 0.5, "top_k": 5})):
        tokens_of(model, processor, ask(clip(seconds, 9), "red" * seconds), **options)
    assert generation._decode_step._cache_size() == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"count": 0}, "max_new_tokens is 0, expected a whole number"),
        ({"temperature": -1.0}, "temperature is -1.0, expected"),
        ({"temperature": float("nan")}, "temperature is nan, expected"),
        ({"top_p": 0.0}, "top_p is 0.0, expected"),
        ({"top_k": -1}, "top_k is -1, expected"),
        ({"chunk_size": 0}, "chunk_size is 0, expected"),
        ({"attention": "sparse"}, "attention is 'sparse', expected"),
    ],
)
def test_options_out_of_range(model, processor, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tokens_of(model, processor, SHORT, **options)
