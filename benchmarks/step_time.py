"""Times the train step of a named experiment and its pieces, on synthetic batches of the experiment's largest shape.

    python -m benchmarks.step_time --config=nsa_video
    XLA_FLAGS="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false" \
        python -m benchmarks.step_time --config=nsa_video_small --json=OUT.json

On GPUs the flags matter more than anything else: without autotuning (which takes minutes to compile), XLA's own Triton
matrix products run with an untuned tile; cuBLAS' are up to 20 times as fast.
Each piece is compiled by itself. Before anything is timed, the attention operations are compared with their reference
implementation on the benchmark's own device. Times are medians; the JSON keeps every sample. One device is used.
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments import configs
from pallas_kernels import (
    block_means,
    block_selection,
    compressed_attention,
    nsa_attention,
    prefix_attention,
    selected_attention,
    window_attention,
)
from videonsa_jax.configs import ModelConfig
from videonsa_jax.streams import Batch, TrainBatch, Visual, split_streams
from videonsa_jax.training.config import Experiment, MeshConfig
from videonsa_jax.training.environment import environment
from videonsa_jax.training.mesh import make_mesh
from videonsa_jax.training.optimizer import learning_rate, make_optimizer
from videonsa_jax.training.step import accumulate, apply_gradients, init_state, make_forward, make_losses, make_model

type Piece = tuple[Callable[..., Any], tuple[Any, ...]]

TEXT_BEFORE = 8  # tokens before the video, as the chat template's header


def synthetic_batch(experiment: Experiment, contexts: int, text_tokens: int) -> TrainBatch:
    """A full batch of the experiment's largest bucket: square frames of the largest allowed area, no padding."""
    model, data = experiment.model, experiment.data
    vision = model.vision
    side = math.isqrt(data.max_pixels) // vision.pixels_per_token
    frames = max(data.buckets) // side**2
    visual = Visual(grid=(frames, side, side), seconds_per_grid=vision.temporal_patch_size / data.fps)
    draw = np.random.default_rng(0)
    words = draw.integers(0, model.text.vocab_size, text_tokens).tolist()
    split = split_streams(
        [words[:TEXT_BEFORE], visual, words[TEXT_BEFORE:]],
        tokens_per_second=model.text.tokens_per_second,
        mrope=model.mrope,
    )
    rows = (contexts, data.questions_per_context)
    merge = vision.spatial_merge_size
    patches = (side * merge) ** 2

    def repeat(x: np.ndarray, lead: tuple[int, ...]) -> np.ndarray:
        expanded = x.reshape(*x.shape[:-1], *(1,) * len(lead), x.shape[-1])
        return np.broadcast_to(expanded, (*x.shape[:-1], *lead, x.shape[-1])).copy()

    lengths = np.full(rows, text_tokens, np.int32)
    inputs = Batch(
        patches=draw.integers(0, 256, (contexts, frames, patches, vision.patch_dim), dtype=np.uint8),
        frame_grids=np.full((contexts, frames, 2), side * merge, np.int32),
        visual_source=repeat(np.arange(frames * side**2, dtype=np.int32), rows[:1]),
        visual_positions=repeat(np.asarray(split.visual_positions, np.int32), rows[:1]),
        visual_lengths=np.full(contexts, frames * side**2, np.int32),
        visible_text=repeat(np.asarray(split.visible_text, np.int32), rows[:1]),
        text_tokens=draw.integers(0, model.text.vocab_size, (*rows, text_tokens)).astype(np.int32),
        text_positions=repeat(np.asarray(split.text_positions, np.int32), rows),
        text_lengths=lengths,
        visible_visual=repeat(np.asarray(split.visible_visual, np.int32), rows),
    )
    return TrainBatch(
        inputs=inputs,
        targets=np.roll(inputs.text_tokens, -1, axis=-1),
        loss_weights=(np.arange(text_tokens) >= text_tokens - 4).astype(np.float32) * np.ones((*rows, 1), np.float32),
        sample_ids=np.arange(rows[0] * rows[1], dtype=np.int32).reshape(rows),
    )


def with_gradient(function: Callable[..., jax.Array], arguments: tuple[Any, ...], count: int) -> Piece:
    """Forward and backward of a function in its first `count` arguments, for a drawn cotangent."""
    shape = jax.eval_shape(function, *arguments)
    cotangent = jax.random.normal(jax.random.key(1), shape.shape, shape.dtype)

    def run(cotangent: jax.Array, *arguments: Any) -> Any:
        value, pull = jax.vjp(lambda *head: function(*head, *arguments[count:]), *arguments[:count])
        return value, pull(cotangent)

    return run, (cotangent, *arguments)


def attention_arrays(model: ModelConfig, contexts: int, tokens: int, dtype: str) -> tuple[jax.Array, ...]:
    """Normal q, k, v and gate logits of one layer's visual stream."""
    text = model.text
    heads = (contexts, tokens, text.num_key_value_heads)
    shapes = (
        (*heads, text.group_size, text.head_dim),
        (*heads, text.head_dim),
        (*heads, text.head_dim),
        (*heads, text.group_size, 3),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def nsa_options(model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `nsa_attention` that the model gives it."""
    names = ("block_size", "block_count", "window_size", "gate_temperature", "init_blocks", "local_blocks", "branches")
    return {name: getattr(model.nsa, name) for name in names}


def causal_prefix(q: jax.Array, k: jax.Array, v: jax.Array, implementation: str | None = None) -> jax.Array:
    """Dense causal attention, as the dense baseline's visual stream has it."""
    visible = jnp.broadcast_to(jnp.arange(q.shape[1]) + 1, (q.shape[0], 1, q.shape[1]))
    return prefix_attention(q[:, None], k, v, visible, implementation=implementation)[0][:, 0]


def check_attention(model: ModelConfig, dtype: str) -> dict[str, float]:
    """Relative distance of outputs and gradients from the reference implementation on float32 copies.

    Raises:
      SystemExit: a distance above the dtype's rounding allows.
    """
    # 2^-8 is bfloat16's rounding; probabilities, their gradients and the results are each rounded once.
    limit = 1e-4 if dtype == "float32" else 2e-2
    tokens = max(4 * model.nsa.block_size * 2, 2 * model.nsa.window_size) + 5
    arrays = attention_arrays(model, 1, tokens, dtype)
    options = nsa_options(model)
    k_blocks = block_means(arrays[1], options["block_size"])
    place = {"block_size": options["block_size"], "implementation": "reference"}
    _, lse = compressed_attention(arrays[0], k_blocks, k_blocks, **place)
    chosen = block_selection(arrays[0], k_blocks, lse, block_count=options["block_count"], **place)

    def nsa(q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, implementation: str | None) -> jax.Array:
        return nsa_attention(q, k, v, gates, block_indices=chosen, implementation=implementation, **options)

    def dense(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array, implementation: str | None) -> jax.Array:
        visible = jnp.broadcast_to(jnp.arange(q.shape[1]), (1, 1, q.shape[1]))  # the first query sees no key
        o, lse = prefix_attention(q[:, None], k, v, visible, implementation=implementation)
        return jnp.where(visible[..., None, None, None] > 0, o + 0.1 * lse[..., None], o)

    distances = {}
    for name, function in (("nsa", nsa), ("dense", dense)):
        run, inputs = with_gradient(functools.partial(function, implementation=None), arrays, 4)
        actual = jax.jit(run)(*inputs)
        exact = tuple(x.astype(jnp.float32) for x in arrays)
        run, _ = with_gradient(functools.partial(function, implementation="reference"), exact, 4)
        expected = jax.jit(run)(*(x.astype(jnp.float32) for x in inputs))
        pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        for part, (x, y) in zip(("o", "dq", "dk", "dv", "dgates"), pairs, strict=True):
            x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
            distances[f"{name} {part}"] = float(np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-30))
    wrong = {name: distance for name, distance in distances.items() if not distance <= limit}
    if wrong:
        raise SystemExit(f"results differ from the reference by more than {limit:g}: {wrong}; nothing is timed")
    return distances


def attention_pieces(experiment: Experiment, contexts: int, tokens: int) -> Iterator[tuple[str, Piece]]:
    """One layer's attention operations over the visual stream."""
    model = experiment.model
    arrays = attention_arrays(model, contexts, tokens, experiment.train.dtype)
    q, k, v, _ = arrays
    options = nsa_options(model)
    s, n = options["block_size"], options["block_count"]

    @jax.jit
    def choose(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        k_blocks, v_blocks = block_means(k, s), block_means(v, s)
        _, lse = compressed_attention(q, k_blocks, v_blocks, block_size=s)
        return block_selection(q, k_blocks, lse, block_size=s, block_count=n)

    def compressed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return compressed_attention(q, block_means(k, s), block_means(v, s), block_size=s)[0]

    def selected(q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array) -> jax.Array:
        return selected_attention(q, k, v, chosen, block_size=s)[0]

    def window(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return window_attention(q, k, v, window_size=options["window_size"])[0]

    operations = {
        "compressed": (compressed, (q, k, v), 3),
        "selected": (selected, (q, k, v, choose(q, k, v)), 3),
        "window": (window, (q, k, v), 3),
        "nsa": (functools.partial(nsa_attention, **options), arrays, 4),
        "dense": (causal_prefix, (q, k, v), 3),
    }
    yield "attention/choice f", (choose, (q, k, v))
    for name, (function, inputs, count) in operations.items():
        yield f"attention/{name} f", (function, inputs)
        yield f"attention/{name} f+b", with_gradient(function, inputs, count)


def model_pieces(experiment: Experiment, batch: TrainBatch) -> Iterator[tuple[str, Piece]]:
    """The vision tower, the whole model and the optimiser."""
    network = make_model(experiment.model, experiment.train, 0)
    graphdef, tower = nnx.split(network.visual)
    contexts, frames, patches, patch_dim = batch.inputs.patches.shape
    pixels = batch.inputs.patches.reshape(contexts * frames, patches, patch_dim)
    grids = batch.inputs.frame_grids.reshape(contexts * frames, 2)

    def encode(tower: Any, pixels: jax.Array, grids: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, tower)(pixels, grids)

    yield "vision f", (encode, (tower, pixels, grids))
    yield "vision f+b", with_gradient(encode, (tower, pixels, grids), 1)

    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps, experiment.train.param_dtype)
    schedule = learning_rate(experiment.optimizer, experiment.train.steps)
    state = jax.jit(functools.partial(init_state, experiment.model, experiment.train, 0, optimizer))()
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    forward = make_forward(experiment.model, experiment.train, mesh)
    losses = make_losses(experiment.model, experiment.train, mesh)
    yield "model f", (forward, (state.params, batch.inputs))
    yield (
        "model f+b (accumulate)",
        (functools.partial(accumulate, losses, experiment.train), (state.params, None, batch)),
    )

    def step(state: Any, batch: TrainBatch) -> Any:
        sums, _ = add_batch(state.params, None, batch)
        return apply_gradients(optimizer, schedule, state, sums)

    yield "step", (step, (state, batch))


def measure(function: Callable[..., Any], arguments: tuple[Any, ...], samples: int) -> tuple[float, list[float]]:
    """Seconds to compile, and seconds of each of `samples` runs after a warm one."""
    arguments = jax.device_put(arguments)
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        times.append(time.perf_counter() - start)
    return compile_seconds, times


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nsa_video", help="a name of the registry behind `experiments.train`")
    parser.add_argument("--contexts", type=int, help="contexts per batch; default the config's")
    parser.add_argument("--text-tokens", type=int, default=48, help="tokens of a text row")
    parser.add_argument("--samples", type=int, default=10, help="timed runs of each piece")
    parser.add_argument("--pieces", default="", help="only pieces whose name contains one of these, comma-separated")
    parser.add_argument("--json", type=Path, help="file for all samples")
    options = parser.parse_args(arguments)

    experiment = configs.get(options.config)
    contexts = options.contexts or experiment.data.contexts_per_batch
    batch = synthetic_batch(experiment, contexts, options.text_tokens)
    distances = check_attention(experiment.model, experiment.train.dtype)
    worst = max(distances, key=distances.get)
    print(f"{jax.devices()[0].device_kind}: largest distance from the reference {distances[worst]:.1e} ({worst})")
    wanted = [part for part in options.pieces.split(",") if part]
    results = {}
    pieces = [
        *attention_pieces(experiment, contexts, batch.inputs.visual_source.shape[1]),
        *model_pieces(experiment, batch),
    ]
    print(f"{'piece':28}{'median ms':>10}{'least ms':>10}{'compile s':>11}")
    for name, piece in pieces:
        if wanted and not any(part in name for part in wanted):
            continue
        compile_seconds, times = measure(*piece, options.samples)
        results[name] = {"compile_seconds": compile_seconds, "median": statistics.median(times), "seconds": times}
        middle, least = 1e3 * statistics.median(times), 1e3 * min(times)
        print(f"{name:28}{middle:10.2f}{least:10.2f}{compile_seconds:11.1f}", flush=True)
    if options.json:
        record = {"config": options.config, "distances": distances, "pieces": results, **environment()}
        record["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        record["batch"] = {field.name: getattr(batch.inputs, field.name).shape for field in dataclasses.fields(Batch)}
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.replace(options.json)


if __name__ == "__main__":
    main(sys.argv[1:])
