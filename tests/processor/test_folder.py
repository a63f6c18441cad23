"""A model folder's processor files."""

import dataclasses
import json

import numpy as np
import pytest
from conversation_cases import SMALL_PIXELS, ask, clip, config_with, image, small_processor

import videonsa_jax as vn
from videonsa_jax.data.chat import QWEN_TEMPLATE
from videonsa_jax.processor import ProcessorError, load_processor, save_processor

PATCHES = {"patch_size": 2, "temporal_patch_size": 2, "merge_size": 2}


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return small_processor(tmp_path_factory.mktemp("processor"))


def assert_same(one, other):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def test_saved_and_loaded_it_is_the_same(processor, tmp_path):
    save_processor(processor, tmp_path / "model")
    loaded = load_processor(tmp_path / "model", processor.config)
    assert loaded.files == dict(processor.files)
    assert (
        loaded.stop_tokens
        == processor.stop_tokens
        == (processor.chat.special_ids["<|im_end|>"], processor.chat.special_ids["<|endoftext|>"])
    )
    messages = ask(clip(3, 1), image(2), "What colour?")
    assert_same(loaded(messages, **SMALL_PIXELS), processor(messages, **SMALL_PIXELS))
    assert not list((tmp_path / "model").glob("*.partial"))


@pytest.fixture
def folder(processor, tmp_path):
    save_processor(processor, tmp_path)
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


def rendered(folder):
    loaded = load_processor(folder, config_with())
    return loaded.chat.tokenizer.decode(loaded(ask("red")).text_tokens[0, 0], skip_special_tokens=False)


def test_where_a_folder_may_keep_its_chat_template(folder):
    """The newest place wins."""
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "default {{ eos_token }}"}]
    write(folder, "tokenizer_config.json", {"chat_template": named, "eos_token": {"content": "<|im_end|>"}})
    assert rendered(folder) == "default <|im_end|>"
    write(folder, "chat_template.json", {"chat_template": "json"})
    assert rendered(folder) == "json"
    write(folder, "chat_template.jinja", QWEN_TEMPLATE.replace("assistant", "jinja"))
    assert rendered(folder).endswith("red<|im_end|>\n<|im_start|>jinja\n")


def test_image_limits_of_a_folder(folder):
    write(folder, "preprocessor_config.json", PATCHES | {"min_pixels": 64, "max_pixels": 128})
    assert load_processor(folder, config_with()).image_max_pixels == 128
    write(folder, "preprocessor_config.json", PATCHES | {"size": {"shortest_edge": 64, "longest_edge": 256}})
    assert load_processor(folder, config_with()).image_max_pixels == 256
    (prompt,) = load_processor(folder, config_with()).plan(ask(image(1, 40, 40)))
    assert prompt.media[0].visual.grid == (1, 4, 4)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json: .*expected a tokenizer\.json"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: .*expected JSON"),
        ("tokenizer_config.json", "[]", "holds a list, expected a JSON object"),
        ("tokenizer_config.json", "{}", "no chat template in"),
        ("preprocessor_config.json", '{"patch_size": 14}', "patch_size is 14, expected 2"),
        ("preprocessor_config.json", '{"image_mean": [0.5, 0.5]}', "image_mean is .*, expected"),
        ("preprocessor_config.json", '{"image_mean": "grey"}', "image_mean is grey, expected"),
        ("preprocessor_config.json", '{"min_pixels": -4}', "min_pixels is -4, expected a whole number"),
    ],
)
def test_bad_folders(folder, name, content, sentence):
    write(folder, name, content)
    with pytest.raises(ValueError, match=sentence) as raised:
        load_processor(folder, config_with())
    assert str(folder) in str(raised.value)


def test_folders_without_a_tokenizer(folder, tmp_path):
    with pytest.raises(ProcessorError, match="no such folder"):
        load_processor(tmp_path / "none", config_with())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ProcessorError, match=r"lacks tokenizer\.json"):
        load_processor(folder, config_with())


def test_a_tokenizer_larger_than_the_model(folder):
    with pytest.raises(ProcessorError, match="338 tokens, expected at most the model's 100"):
        load_processor(folder, config_with(100))


@pytest.mark.parametrize(("ids", "stops"), [(5, (5,)), ([5, 6], (5, 6))])
def test_stop_tokens(folder, ids, stops):
    write(folder, "generation_config.json", {"eos_token_id": ids, "top_p": 0.8, "transformers_version": "4.49.0"})
    loaded = load_processor(folder, config_with())
    assert loaded.stop_tokens == stops
    assert loaded.unread_generation_fields == ("top_p",)


def test_bad_stop_tokens(folder):
    write(folder, "generation_config.json", {"eos_token_id": "<|im_end|>"})
    with pytest.raises(ProcessorError, match=r"eos_token_id is .*expected a token id"):
        _ = load_processor(folder, config_with()).stop_tokens


def test_public_names():
    assert vn.load_processor is load_processor
    assert vn.save_processor is save_processor
