"""The small BPE tokenizer of `clips`."""

import pytest
from tokenizers import Tokenizer

from videonsa_jax.data.config import ClipsConfig
from videonsa_jax.data.questions import DESCRIBE, corpus, draw_clips
from videonsa_jax.data.tokenizer import MAX_VOCABULARY, SPECIAL_TOKENS, train_tokenizer

PREFIX = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer([*corpus(), PREFIX], path)
    return Tokenizer.from_file(str(path))


def test_training_is_deterministic(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(corpus(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_vocabulary_is_small_and_has_qwens_special_tokens(tokenizer):
    assert 256 + len(SPECIAL_TOKENS) < tokenizer.get_vocab_size() <= MAX_VOCABULARY
    for token in SPECIAL_TOKENS:
        assert len(tokenizer.encode(f"a{token}b").ids) == 3


def test_every_option_is_one_token_of_its_own(tokenizer):
    """Directly after the assistant's prefix, as a model answers."""
    prefix = tokenizer.encode(PREFIX).ids
    for clip in draw_clips(ClipsConfig(heldout_clips=200), "heldout"):
        for question in clip.questions:
            answers = [tokenizer.encode(PREFIX + option).ids for option in question.options]
            assert all(ids[:-1] == prefix for ids in answers)
            assert len({ids[-1] for ids in answers}) == 4
            # Written in the question exactly as in an answer.
            assert {ids[-1] for ids in answers} <= set(tokenizer.encode(question.prompt).ids)


def test_the_corpus_is_what_the_clips_ask():
    entries = [entry.split("\n") for entry in corpus()]
    options = {text: set(words) for text, second, *words in (e for e in entries if len(e) > 1) if second == "Options:"}
    asked = [question for clip in draw_clips(ClipsConfig(heldout_clips=200), "heldout") for question in clip.questions]
    assert {question.text for question in asked} == set(options)
    assert all(set(question.options) <= options[question.text] for question in asked)


def test_a_word_of_a_description_is_one_token(tokenizer):
    for clip in draw_clips(ClipsConfig(train_clips=60), "train"):
        words = clip.description.replace("\n", " ").split(" ")
        newlines = clip.description.count("\n")
        assert len(tokenizer.encode(clip.description).ids) == len(words) + newlines
    assert len(tokenizer.encode(DESCRIBE).ids) == 4


@pytest.mark.parametrize("text", ["Naïve café 12:30 你好 🙂", "a  b\n\n c\t", "<|im_start|>user\nHi<|im_end|>"])
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_no_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected some to learn from"):
        train_tokenizer([""], tmp_path / "tokenizer.json")
