"""A model and its processor as one folder: the public pair load_pretrained, save_pretrained."""

import dataclasses
import json

import numpy as np
from conversation_cases import SMALL_PIXELS, ask, clip, image, small_processor
from model_cases import build, logits, small_config

import videonsa_jax as vn


def config(**nsa: object) -> vn.ModelConfig:
    base = small_config(**nsa)
    return dataclasses.replace(
        base, text=dataclasses.replace(base.text, head_dim=8, mrope_section=(2, 1, 1), vocab_size=400)
    )


def assert_same_batch(found: vn.Batch, expected: vn.Batch) -> None:
    for field in dataclasses.fields(vn.Batch):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name), err_msg=field.name)


def test_a_model_and_its_processor_come_back(tmp_path):
    model = build(config())
    processor = small_processor(tmp_path, model.config)
    vn.save_pretrained(model, processor, tmp_path / "model")
    loaded, its_processor = vn.load_pretrained(tmp_path / "model", dtype="float32")
    messages = ask("Watch", clip(5, 1, fps=2.0), image(2), "What is it?")
    batch = processor(messages, **SMALL_PIXELS)
    assert_same_batch(its_processor(messages, **SMALL_PIXELS), batch)
    np.testing.assert_array_equal(logits(loaded, batch), logits(model, batch))
    # transformers finds images and videos by these ids.
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    special = processor.chat.special_ids
    assert content["image_token_id"] == special["<|image_pad|>"]
    assert content["video_token_id"] == special["<|video_pad|>"]
    assert content["vision_start_token_id"] == special["<|vision_start|>"]
    assert content["eos_token_id"] == special["<|im_end|>"]


def test_the_published_evaluation_takes_every_video_as_two_frames_a_second(tmp_path):
    released = dataclasses.replace(config(dialect="released", block_size=8), mrope="int_seconds")
    paper = dataclasses.replace(config(), mrope="int_seconds")
    question = "What is it?"
    published, exact = (
        small_processor(tmp_path, each)(ask(clip(8, 1, fps=4.0), image(2), question), **SMALL_PIXELS)
        for each in (released, paper)
    )
    slow = small_processor(tmp_path, paper)(ask(clip(8, 1, fps=2.0), image(2), question), **SMALL_PIXELS)
    np.testing.assert_array_equal(published.visual_positions, slow.visual_positions)
    assert not np.array_equal(published.visual_positions, exact.visual_positions)
