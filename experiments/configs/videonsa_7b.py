"""The paper's own run (VideoNSA, arXiv 2510.02295, section 2.3 and App. B)."""

from experiments.configs.registry import REQUIRED, register
from videonsa_jax.configs import qwen2_5_vl_7b
from videonsa_jax.data.config import DataConfig
from videonsa_jax.training.config import Experiment, MeshConfig, OptimizerConfig, TrainConfig


@register
def nsa_video_7b() -> Experiment:
    """VideoNSA-7B from Qwen2.5-VL-7B on LLaVA-Video-178K: the paper's recipe.

    Command: python -m experiments.index --config=nsa_video_7b --set data.source='LLaVA-Video-178K/*_v0_1'
      --set data.tokenizer=tokenizer.json   (once; docs/data.md), then
      python -m experiments.train --config=nsa_video_7b --set pretrained=Qwen2.5-VL-7B-Instruct, with the same data
    Hardware: the paper spent about 4,600 H100 hours. Not run on the data here; on samples of this shape with random
      weights one H200 takes 2.0 seconds a question, 0.5 with four questions a video: 119 and 30 hours (docs/scale.md).

    216 K question-answer pairs, one epoch at a global batch of 32 (here 8 contexts x 4 accumulated batches, one
    question each): 6,750 steps. 4 frames a second, at most 50,176 pixels a frame, at most 36 K tokens. All weights are
    trained: AdamW, peak 1e-6, warm-up over a tenth of the steps, cosine. The paper takes its pairs from 961 K, which is
    how many open-ended ones the data set's card counts, and keeps videos of 350 to 550 sampled frames.
    --set data.questions_per_context=4 asks four of a video's questions (5.4 in the mean) for one visual stream.

    One H200 (139 GiB) holds it with --set train.param_dtype=bfloat16 (float32 masters in the optimiser's state) --set
    optimizer.moment_dtype=bfloat16 --set data.contexts_per_batch=1 --set train.accumulation=1: sums over several
    batches are float32 and do not fit beside the rest. Over more devices they do, and --set
    train.remat=minimal_and_attention_outputs --set train.vision_remat=attention_outputs spare most of the
    recomputation. Less memory: --set train.remat=full, and --set train.frozen=vision, or any of vision, merger and llm
    (training/frozen.py).
    """
    return Experiment(
        pretrained=REQUIRED,
        model=qwen2_5_vl_7b(),
        data=DataConfig(
            source=REQUIRED,
            heldout="",
            kinds=("open_ended",),
            split_turns=True,
            video_index="datasets/video_index.jsonl",
            tokenizer=REQUIRED,
            fps=4.0,
            max_frames=550,
            fewest_frames=350,
            most_frames=550,
            max_pixels=50_176,
            resize="swscale",
            workers=8,
            decode_seconds=60.0,
            max_visual_tokens=36_000,
            max_buckets=6,
            contexts_per_batch=8,
            questions_per_context=1,
        ),
        optimizer=OptimizerConfig(),
        mesh=MeshConfig(data=1, fsdp=-1),
        train=TrainConfig(
            steps=6750, accumulation=4, dtype="bfloat16", remat="attention_outputs", vision_remat="full", save_every=250
        ),
    )
