"""Experiments on the embedded clips: nothing to download, the videos are rendered on first use."""

import dataclasses

from experiments.configs.registry import register
from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig, tiny
from videonsa_jax.data.config import ClipsConfig, DataConfig
from videonsa_jax.training.config import Experiment, OptimizerConfig, TrainConfig


@register
def nsa_video() -> Experiment:
    """A tiny model with sparse attention on 8 and 12 second clips; runs on a laptop's CPU.

    Command: python -m experiments.train --config=nsa_video  (`make train`)
    Hardware: a CPU is enough; whatever accelerator jax finds is used.
    Time and result on two cores: 9 minutes in the loop, 0.68 of the held-out questions right (chance 0.25).
    """
    return Experiment(
        model=tiny(),
        data=DataConfig(
            clips=ClipsConfig(train_clips=6000, frame_side=84, seconds=(8,) * 7 + (12,)),
            system_prompt="",
            # 2 x 2 tokens a pair of frames, whatever the aspect ratio: 4000 is 56 x 56 x 5/4, rounded up.
            max_pixels=4000,
            # One bucket for each clip length: with more, compiling costs more than padding.
            buckets=(64, 96),
            questions_per_context=5,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-3,
            warmup_ratio=0.05,
            warmup_start=0.01,
            decay_ratio=0.2,
            beta2=0.99,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=2000, log_every=20, eval_every=0, save_every=200),
    )


@register
def dense_video() -> Experiment:
    """`nsa_video` with dense attention: the same weights, one question a video, as the comparison asks.

    Command: python -m experiments.train --config=dense_video
    Hardware: a CPU is enough.
    With AdamW and 2,300 steps on two cores: 6 minutes in the loop, about 0.3 right, as `nsa_video` with one question.
    """
    base = nsa_video()
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, questions_per_context=1),
        train=dataclasses.replace(base.train, attention="dense"),
    )


def _small_model() -> ModelConfig:
    # The 7B model's attention geometry (7 query heads of 128 to a KV head, blocks of 64), a hundredth of its width.
    return ModelConfig(
        vision=VisionConfig(
            depth=4,
            hidden_size=256,
            intermediate_size=704,
            num_heads=4,
            out_hidden_size=512,
            fullatt_block_indexes=(1, 3),
        ),
        text=TextConfig(
            vocab_size=640,
            hidden_size=512,
            intermediate_size=1408,
            num_hidden_layers=7,
            num_attention_heads=7,
            num_key_value_heads=1,
            head_dim=128,
            rope_theta=10_000.0,
        ),
        nsa=NSAConfig(block_size=64, block_count=12, window_size=256),
    )


@register
def nsa_video_small() -> Experiment:
    """30 M parameters in the 7B model's attention geometry, on 64 and 96 second clips (2 and 3 K visual tokens).

    Command: python -m experiments.train --config=nsa_video_small --set data.workers=14 \\
      --set data.frame_cache_gigabytes=60
    Hardware: one GPU or TPU chip; bfloat16 activations.
    Time and result on one H100 with 16 cores: 5 minutes in the loop, 0.954 of the held-out questions right.
    """
    return Experiment(
        model=_small_model(),
        data=DataConfig(
            clips=ClipsConfig(
                train_clips=12_000,
                frame_side=140,
                aspects=("1:1", "8:7", "7:8"),
                seconds=(64, 64, 64, 96),
                short_seconds=(8,) * 12,
            ),
            system_prompt="",
            # 4 x 4 tokens a pair of frames: 14,700 is 112 x 112 x 8/7 and a little.
            max_pixels=14_700,
            buckets=(256, 2048, 3072),
            contexts_per_batch=8,
            questions_per_context=10,
        ),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=1e-3,
            warmup_ratio=0.04,
            warmup_start=0.01,
            decay_ratio=0.2,
            beta2=0.99,
            weight_decay=0.05,
        ),
        train=TrainConfig(steps=5000, dtype="bfloat16", log_every=50, eval_every=1000, eval_contexts=200),
    )


@register
def dense_video_small() -> Experiment:
    """`nsa_video_small` with dense attention: the same weights and rows.

    Command: python -m experiments.train --config=dense_video_small --set data.workers=14 \\
      --set data.frame_cache_gigabytes=60
    Hardware: one GPU or TPU chip.
    Time and result on one H100 with 16 cores: 5 minutes in the loop, 0.964 of the held-out questions right.
    """
    base = nsa_video_small()
    return dataclasses.replace(base, train=dataclasses.replace(base.train, attention="dense"))


@register
def text_only_small() -> Experiment:
    """`nsa_video_small` without the video: what the questions alone give away.

    Command: python -m experiments.train --config=text_only_small
    Hardware: one GPU or TPU chip.
    Result: chance (0.250) after 1,500 steps, 2 minutes of an H200.
    """
    base = nsa_video_small()
    return dataclasses.replace(base, data=dataclasses.replace(base.data, ablation="text_only"))
