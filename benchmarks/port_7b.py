"""Qwen2.5-VL-7B's full width and depth with random weights: this library and transformers in one run.

    python -m benchmarks.port_7b --out=benchmarks/results/port_7b.json      # one GPU with 80 GB, about 5 minutes
    python -m benchmarks.port_7b --tiny --torch-python=.venv-parity/bin/python --out=/tmp/port_tiny.json

Measured for both: load time, peak memory of host (above what the process held, page cache apart) and device; prefill
(pixels to the first token's logits) at 4K and 16K visual tokens, with the vision tower alone beside it; decoding after
the shorter prefill; and how far our logits lie from transformers' bfloat16 and float32 ones, beside transformers'
bfloat16 from its float32. Ours are also timed with NSA on the same weights (new gates). Every sample is kept. Needs
torch and transformers 5.x, in this Python or in --torch-python; neither PyAV nor grain.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peak is what was used

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks.host_memory import HostMemory
from videonsa_jax import NSAConfig, configs
from videonsa_jax.checkpoints import hf_config, load_model
from videonsa_jax.models import VideoNSA
from videonsa_jax.models.attention import AttentionOptions
from videonsa_jax.models.cache import KVCache, Piece, empty_cache
from videonsa_jax.models.vision import VisionTower

SIDE = 8  # a frame pair is 8 x 8 tokens, VideoNSA's training setting
TEXT_BEFORE, TEXT_AFTER = 16, 48
VISION_START, VISION_END, VIDEO = 151_652, 151_653, 151_656


def write_inputs(folder: Path, name: str, visual_tokens: int, patch_dim: int) -> None:
    """One conversation with a video of uint8 patches, as both halves read it."""
    rng = np.random.default_rng(visual_tokens)
    before, after = rng.integers(0, 150_000, TEXT_BEFORE), rng.integers(0, 150_000, TEXT_AFTER)
    before[-1], after[0] = VISION_START, VISION_END
    frames = visual_tokens // SIDE**2
    np.savez(
        folder / f"{name}.npz",
        input_ids=np.concatenate([before, np.full(visual_tokens, VIDEO), after]),
        types=np.repeat([0, 2, 0], [TEXT_BEFORE, visual_tokens, TEXT_AFTER]).astype(np.int32),
        grid=np.array([frames, 2 * SIDE, 2 * SIDE]),
        patches=rng.integers(0, 256, (4 * visual_tokens, patch_dim), dtype=np.uint8),
    )


def read_inputs(folder: Path, name: str, positions: np.ndarray | None = None) -> tuple[np.ndarray, Piece]:
    """Patches [F, P, patch_dim], and both streams as one piece; M-RoPE ids as given, or one step a frame pair."""
    with np.load(folder / f"{name}.npz") as file:
        ids, is_text, patches, grid = file["input_ids"], file["types"] == 0, file["patches"], file["grid"]
    if positions is None:
        positions = np.tile(np.arange(len(ids)), (3, 1))
    visual_tokens = int((~is_text).sum())
    piece = Piece(
        visual_positions=positions[:, None, ~is_text].astype(np.int32),
        visible_text=np.full((1, visual_tokens), TEXT_BEFORE, np.int32),
        visual_offset=np.int32(0),
        visual_lengths=np.array([visual_tokens], np.int32),
        text_tokens=ids[None, None, is_text].astype(np.int32),
        text_positions=positions[:, None, None, is_text].astype(np.int32),
        visible_visual=np.repeat([0, visual_tokens], [TEXT_BEFORE, TEXT_AFTER])[None, None].astype(np.int32),
        text_offsets=np.zeros((1, 1), np.int32),
        text_lengths=np.array([[TEXT_BEFORE + TEXT_AFTER]], np.int32),
    )
    return patches.reshape(grid[0], grid[1] * grid[2], -1), piece


@jax.jit
def encode(tower: VisionTower, patches: Array) -> Array:
    """Visual tokens [1, Lv, hidden] of frames of 2 SIDE x 2 SIDE patches."""
    grids = jnp.full((len(patches), 2), 2 * SIDE, jnp.int32)
    return tower(patches, grids).reshape(1, -1, tower.config.out_hidden_size)


@partial(jax.jit, static_argnames=("options", "new_tokens"))
def prefill(model: VideoNSA, visual: Array, piece: Piece, options: AttentionOptions, new_tokens: int) -> tuple:
    """Final hidden states of the text, and the filled cache."""
    text_places = TEXT_BEFORE + TEXT_AFTER + new_tokens
    cache = empty_cache(model.config.text, 1, 1, visual.shape[1], text_places, model.dtype)
    return model.extend(visual, piece, cache, options)


@jax.jit
def last_logits(model: VideoNSA, hidden: Array) -> Array:
    """Logits of the token that follows the conversation."""
    return model.logits(hidden[:, :, -1])


@partial(jax.jit, donate_argnames="text", static_argnames="options")
def decode_step(
    model: VideoNSA, visual: tuple, text: tuple, token: Array, length: Array, options: AttentionOptions
) -> tuple[Array, tuple]:
    """Feeds one token and chooses the next."""
    nothing = jnp.zeros((3, 1, 0), jnp.int32)
    piece = Piece(
        visual_positions=nothing,
        visible_text=nothing[0],
        visual_offset=jnp.int32(0),
        visual_lengths=jnp.full((1,), visual[0].shape[2], jnp.int32),
        text_tokens=token[..., None],
        text_positions=jnp.broadcast_to(length, (3, 1, 1, 1)),
        visible_visual=jnp.full((1, 1, 1), visual[0].shape[2], jnp.int32),
        text_offsets=length[None, None],
        text_lengths=length[None, None] + 1,
    )
    empty = jnp.zeros((1, 0, model.config.text.hidden_size), model.dtype)
    hidden, cache = model.extend(empty, piece, KVCache(visual, text), options)
    return jnp.argmax(model.logits(hidden[:, :, 0]), axis=-1).astype(jnp.int32), cache.text


def timed(function: Callable[[], Any], samples: int) -> dict[str, Any]:
    """Seconds of each call after a first one, whose time (with compiling) comes first."""
    seconds = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "samples": seconds[1:]}


def device_peak() -> int | None:
    """Bytes, or None where the backend does not count them."""
    statistics = jax.devices()[0].memory_stats()
    return statistics and statistics.get("peak_bytes_in_use")


def decode(model: VideoNSA, visual: Array, piece: Piece, options: AttentionOptions, count: int) -> Array:
    """The last of `count` greedy tokens, the first of which comes from the prefill."""
    hidden, cache = prefill(model, visual, piece, options, count)
    token = jnp.argmax(last_logits(model, hidden), axis=-1).astype(jnp.int32)
    text, dense = cache.text, AttentionOptions("dense", options.implementation)
    for step in range(count - 1):
        length = jnp.int32(TEXT_BEFORE + TEXT_AFTER + step)
        token, text = decode_step(model, cache.visual, text, token, length, dense)
    return token


def run_ours(folder: Path, settings: dict[str, Any], save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Our half of the measurement; `save` is given the result after each part."""
    with HostMemory() as host, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the gates are new
        start = time.perf_counter()
        model = load_model(folder / "model", "bfloat16", nsa=NSAConfig(**settings["nsa"]))
        jax.block_until_ready(jax.tree.leaves(model))
        load = {"seconds": time.perf_counter() - start, "with": "new NSA gates"}
    load |= {"host_peak_bytes": host.peak - host.before, "device_peak_bytes": device_peak()}
    result: dict[str, Any] = {
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "load": load,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        "vision": {},
        "prefill": {"dense": {}, "nsa": {}},
        "generate": {"dense": {}, "nsa": {}},
    }
    samples, new = settings["samples"], settings["new_tokens"]

    def time_prefill(kind: str, tokens: int) -> None:
        patches, piece = read_inputs(folder, f"visual_{tokens}")
        patches = jax.device_put(patches)

        def whole() -> Array:
            hidden, _ = prefill(model, encode(model.visual, patches), piece, AttentionOptions(kind), 0)
            return last_logits(model, hidden)

        if kind == "dense":
            result["vision"][str(tokens)] = timed(partial(encode, model.visual, patches), samples)
        result["prefill"][kind][str(tokens)] = timed(whole, samples)

    def time_generate(kind: str, count: int) -> None:
        patches, piece = read_inputs(folder, f"visual_{settings['visual_tokens'][0]}")

        def generate() -> Array:
            return decode(model, encode(model.visual, patches), piece, AttentionOptions(kind), count)

        result["generate"][kind][str(count)] = timed(generate, samples)

    def compare_logits() -> None:
        with np.load(folder / "torch.npz") as file:
            theirs = dict(file)
        patches, piece = read_inputs(folder, "compared", theirs.pop("position_ids"))
        hidden, _ = prefill(model, encode(model.visual, patches), piece, AttentionOptions("dense"), 0)
        ours = np.asarray(model.logits(hidden)[0, 0])
        pairs = {f"ours bfloat16 from transformers {name}": (ours, logits) for name, logits in theirs.items()}
        if "float32" in theirs:
            pairs["transformers bfloat16 from transformers float32"] = (theirs["bfloat16"], theirs["float32"])
        result["logits"] = {name: difference(*pair) for name, pair in pairs.items()}

    parts = [compare_logits]
    for kind in ("dense", "nsa"):
        parts += [partial(time_prefill, kind, tokens) for tokens in settings["visual_tokens"]]
        parts += [partial(time_generate, kind, count) for count in (1, new + 1)]
    for part in parts:
        part()
        result["device_peak_bytes"] = device_peak()
        save(result)
    return result


def difference(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Mean and largest absolute difference, relative to the mean and the largest magnitude expected."""
    absolute = np.abs(found - expected)
    return {
        "mean_relative": float(absolute.mean() / np.abs(expected).mean()),
        "max_relative": float(absolute.max() / np.abs(expected).max()),
        "same_greedy_token": float(np.mean(found.argmax(-1) == expected.argmax(-1))),
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Tokens per second, from medians."""
    rows: dict[str, Any] = {}
    ours, theirs = result["ours"], result["transformers"]
    runs = {
        "transformers": (theirs["prefill"], theirs["generate"]),
        **{f"ours, {kind}": (ours["prefill"][kind], ours["generate"][kind]) for kind in ours["prefill"]},
    }
    for name, (prefills, generates) in runs.items():
        one, many = sorted(generates, key=int)
        median = {count: float(np.median(generates[count]["samples"])) for count in (one, many)}
        rows[name] = {
            f"prefill at {tokens}: visual tokens/s": int(tokens) / float(np.median(times["samples"]))
            for tokens, times in prefills.items()
        }
        rows[name]["decode tokens/s"] = (int(many) - int(one)) / (median[many] - median[one])
    return rows


def main() -> None:
    """Writes the checkpoint and inputs, runs both halves one after the other, writes JSON and prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model, to test the script")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--no-float32", action="store_true", help="leave out transformers in float32 (31 GB)")
    parser.add_argument("--samples", type=int, default=3)
    options = parser.parse_args()
    config = configs.tiny(vocab_size=151_700) if options.tiny else configs.qwen2_5_vl_7b()
    settings = {
        "visual_tokens": [128, 256] if options.tiny else [4096, 16_384],
        "new_tokens": 8 if options.tiny else 64,
        "samples": options.samples,
        "float32": not options.no_float32,
        "nsa": {"block_size": 8, "block_count": 4, "window_size": 32} if options.tiny else {},
    }
    torch_half = [options.torch_python, str(Path(__file__).with_name("port_7b_torch.py"))]
    with tempfile.TemporaryDirectory(prefix="port_7b_") as name:
        folder = Path(name)
        hf_config.write_config(folder, config, "bfloat16")
        (folder / "settings.json").write_text(json.dumps(settings))
        patch_dim = config.vision.patch_dim
        for tokens in settings["visual_tokens"]:
            write_inputs(folder, f"visual_{tokens}", tokens, patch_dim)
        write_inputs(folder, "compared", 64 if options.tiny else 1024, patch_dim)
        seconds = {}
        for part in ("make", "run"):
            start = time.perf_counter()
            subprocess.run([*torch_half, part, str(folder)], check=True)
            seconds[part] = time.perf_counter() - start
        result = {
            "command": "python -m benchmarks.port_7b" + " --tiny" * options.tiny,
            "settings": settings,
            "seconds": seconds,
            "transformers": json.loads((folder / "torch.json").read_text()),
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)

        def save(ours: dict[str, Any]) -> None:
            options.out.write_text(json.dumps(result | {"ours": ours}, indent=2) + "\n")

        start = time.perf_counter()
        result["ours"] = run_ours(folder, settings, save)
        seconds["ours"] = time.perf_counter() - start
    result["summary"] = summary(result)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["summary"] | result["ours"]["logits"], indent=2))


if __name__ == "__main__":
    main()
