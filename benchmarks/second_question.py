"""Time to first token of a question, with its video still to be encoded and with the video encoded already.

    python -m benchmarks.second_question --config=tiny --dtype=float32 --frames=240 --out=FILE
    python -m benchmarks.second_question --config=qwen2_5_vl_7b --frames=512 --out=FILE       # one GPU with 80 GB

Random weights and random frames of 224 x 224 as an array (no file is decoded), 64 visual tokens a pair of frames. Every
question is asked `--repeats` times after one round that compiles; every sample is kept. Needs neither PyAV nor grain.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import videonsa_jax as vn
from videonsa_jax.data.tokenizer import train_tokenizer
from videonsa_jax.training.environment import command_line

QUESTIONS = ("What happens first?", "What colour is the ball, and where does it go?")
NEW_TOKENS = 32


def _model_and_processor(name: str, dtype: str) -> tuple[vn.VideoNSA, vn.Processor]:
    config, dtype = getattr(vn.configs, name)(), jnp.dtype(dtype)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: vn.VideoNSA(config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype)))
    make = jax.jit(lambda: nnx.state(vn.VideoNSA(config, nnx.Rngs(0), dtype=dtype, param_dtype=dtype)))
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(QUESTIONS, Path(folder) / "tokenizer.json")
    return nnx.merge(graphdef, make()), vn.make_processor(tokenizer, config)


def _ask(model: vn.VideoNSA, processor: vn.Processor, messages: list, visual: vn.EncodedVisual | None) -> list[float]:
    """Seconds from the question until each token."""
    start, times = time.perf_counter(), []
    vn.generate(
        model,
        processor,
        messages,
        NEW_TOKENS,
        visual=visual,
        stop_tokens=(),
        on_token=lambda *_: times.append(time.perf_counter() - start),
    )
    return times


def main() -> None:
    """Runs the benchmark, prints its medians and writes its samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="tiny", help="a size of videonsa_jax.configs")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    options = parser.parse_args()

    model, processor = _model_and_processor(options.config, options.dtype)
    frames = np.random.default_rng(0).integers(0, 256, (options.frames, 224, 224, 3), dtype=np.uint8)
    conversations = [
        [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": question}]}]
        for question in QUESTIONS
    ]
    samples = {"encode": [], "whole": [], "second_question": [], "tokens_per_second": []}
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        encoded = vn.encode_visual(model, processor, conversations[0])
        jax.block_until_ready(encoded.keys_values)
        encoding = time.perf_counter() - start
        whole = _ask(model, processor, conversations[0], None)
        second = _ask(model, processor, conversations[1], encoded)
        if repeat:  # the first compiled
            rate = (NEW_TOKENS - 1) / (second[-1] - second[0])
            for name, value in zip(samples, (encoding, whole[0], second[0], rate), strict=True):
                samples[name].append(value)
    result = {
        "command": command_line(),
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "visual_tokens": encoded.num_tokens,
        "encoded_bytes": encoded.nbytes,
        "seconds_and_rates": samples,
        "medians": {name: statistics.median(values) for name, values in samples.items()},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result["medians"].items():
        print(f"{name:20} {value:.4g}")


if __name__ == "__main__":
    main()
