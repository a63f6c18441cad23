"""Times the prefill of VideoNSA-7B's language model over 128K visual tokens: sparse, dense, and transformers' dense.

    python -m benchmarks.prefill_128k --json=benchmarks/results/prefill_128k_h200.json      # 60 GB, torch beside jax
    python -m benchmarks.prefill_128k --tiny --no-torch --json=/tmp/prefill.json            # a CPU, to test the script

All 28 layers with random bfloat16 weights, from the embedded tokens to the text's last hidden states and the filled
key/value cache: 2,048 grid steps of 8 x 8 tokens and 128 text tokens, on which transformers' language model
(port_7b_torch.py's kind of process) runs in turn. Hidden states vary smoothly over space and time, so that neighbours
choose blocks alike as a video's do; how alike is reported. The attention of a layer is timed by itself on the queries,
keys and values that its layer makes; the rest is what is left of the whole.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs memory too
if "XLA_FLAGS" not in os.environ and os.environ.get("JAX_PLATFORMS") != "cpu":
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.step_time import nsa_options
from pallas_kernels import block_means, block_selection, compressed_attention, nsa_attention, prefix_attention
from videonsa_jax.checkpoints import hf_config
from videonsa_jax.configs import ModelConfig, qwen2_5_vl_7b, tiny
from videonsa_jax.models.attention import Attention, AttentionOptions
from videonsa_jax.models.cache import Piece, empty_cache, extend
from videonsa_jax.models.decoder import Decoder
from videonsa_jax.streams import Visual, split_streams
from videonsa_jax.training.environment import environment

SIDE, STEPS = 8, 2048
TEXT_BEFORE, TEXT_TOKENS = 24, 128


def embedded_video(steps: int, side: int, hidden: int) -> jax.Array:
    """Hidden states [1, L, hidden] of unit variance that vary over some 8 tokens and some 8 steps, with noise."""
    place = jnp.stack(
        jnp.meshgrid(*(jnp.arange(size, dtype=jnp.float32) for size in (steps, side, side)), indexing="ij")
    )
    keys = jax.random.split(jax.random.key(0), 3)
    frequencies = jax.random.normal(keys[0], (3, hidden)) / 8
    phases = jax.random.uniform(keys[1], (hidden,), maxval=2 * jnp.pi)
    smooth = jnp.sin(jnp.moveaxis(place, 0, -1).reshape(-1, 3) @ frequencies + phases) * 2**0.5
    noise = jax.random.normal(keys[2], smooth.shape)
    return (0.9 * smooth + 0.4 * noise)[None].astype(jnp.bfloat16)


def whole_piece(model: ModelConfig, steps: int, side: int) -> Piece:
    """A conversation with one video, as one piece."""
    visual = Visual((steps, side, side), seconds_per_grid=0.5)
    words = np.random.default_rng(0).integers(0, model.text.vocab_size, TEXT_TOKENS).tolist()
    split = split_streams(
        [words[:TEXT_BEFORE], visual, words[TEXT_BEFORE:]],
        tokens_per_second=model.text.tokens_per_second,
        mrope=model.mrope,
    )
    return jax.tree.map(
        jnp.asarray,
        Piece(
            visual_positions=split.visual_positions[:, None],
            visible_text=split.visible_text[None],
            visual_offset=np.int32(0),
            visual_lengths=np.array([visual.num_tokens], np.int32),
            text_tokens=split.text_tokens[None, None],
            text_positions=split.text_positions[:, None, None],
            visible_visual=split.visible_visual[None, None],
            text_offsets=np.zeros((1, 1), np.int32),
            text_lengths=np.full((1, 1), TEXT_TOKENS, np.int32),
        ),
    )


def cudnn_visual(_: Attention, query: jax.Array, visual_kv: tuple, *rest: Any) -> jax.Array:
    """The visual stream's dense attention by cuDNN, causal over visual keys; the text before the video is left out."""
    heads = query.reshape(*query.shape[:2], -1, query.shape[-1])
    out = jax.nn.dot_product_attention(heads, *visual_kv, is_causal=True, implementation="cudnn")
    return out.reshape(query.shape)


def first_of_stack(layers: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stack."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


class Prefill:
    """The language model, its inputs, and what was measured; parts run in any order."""

    def __init__(self, model: ModelConfig, steps: int, side: int, samples: int, file: Path):
        self.model, self.samples, self._file = model, samples, file
        self.steps, self.side = steps, side
        self.tokens = steps * side**2
        self.dtype = jnp.bfloat16
        make = functools.partial(Decoder, model.text, model.nsa, dtype=self.dtype, param_dtype=self.dtype)
        self.graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
        self.params = jax.jit(lambda: nnx.split(make(rngs=nnx.Rngs(0)))[1])()
        self.visual = jax.jit(embedded_video, static_argnums=(0, 1, 2))(steps, side, model.text.hidden_size)
        self.text = jax.random.normal(jax.random.key(1), (1, 1, TEXT_TOKENS, model.text.hidden_size), self.dtype)
        self.piece = whole_piece(model, steps, side)
        self.record: dict[str, Any] = {"parts": {}, "failed": {}}
        self._layer_arrays: tuple[jax.Array, ...] = ()

    def attempt(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        """Runs a part, keeps and prints its result, or why there is none."""
        start = time.perf_counter()
        try:
            result = part()
        except Exception as error:  # one part's failure must not hide the others
            self.record["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name}: FAILED after {time.perf_counter() - start:.1f} s: {str(error)[:300]}", flush=True)
        else:
            self.record["parts"][name] = result
            shown = {key: value for key, value in result.items() if isinstance(value, float)}
            print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items()), flush=True)
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1, default=str) + "\n")
        partial.replace(self._file)

    def release(self) -> None:
        """Frees the device's memory; what needs the arrays must have run."""
        self._layer_arrays = self.params = self.visual = ()

    def whole(self, kind: str) -> dict[str, Any]:
        """All layers; the cache is made anew in every call."""

        def prefill(params: Any, visual: jax.Array, text: jax.Array, piece: Piece) -> Any:
            cache = empty_cache(self.model.text, 1, 1, self.tokens, TEXT_TOKENS, self.dtype)
            places = piece.places(self.model.text)
            decoder = nnx.merge(self.graphdef, params)
            return extend(decoder, (visual, text), cache, places, AttentionOptions(kind), is_whole=True)

        return self._timed(prefill, self.params, self.visual, self.text, self.piece)

    def attention(self, kind: str) -> dict[str, Any]:
        """A layer's visual attention by itself, on what the second layer makes of the hidden states."""
        arrays = self.layer_arrays()
        operations = {
            "nsa": functools.partial(nsa_attention, lengths=self.piece.visual_lengths, **nsa_options(self.model)),
            "dense": lambda q, k, v, _: self.dense(q, k, v),
            "cudnn": lambda q, k, v, _: cudnn_visual(None, q, (k, v)),
        }
        return self._timed(operations[kind], *arrays)

    def dense(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Dense causal attention over visual keys by this library's kernels."""
        visible = jnp.broadcast_to(jnp.arange(self.tokens) + 1, (1, 1, self.tokens))
        return prefix_attention(q[:, None], k, v, visible)[0][:, 0]

    def layer_arrays(self) -> tuple[jax.Array, ...]:
        """Queries, keys, values and gate logits of a layer's visual stream; made once."""
        if self._layer_arrays:
            return self._layer_arrays

        def project(params: Any, visual: jax.Array, text: jax.Array, piece: Piece) -> tuple[jax.Array, ...]:
            layers, places = nnx.merge(self.graphdef, params).layers, piece.places(self.model.text)
            hidden = first_of_stack(layers, 0)((visual, text), places, AttentionOptions("nsa"))
            layer = first_of_stack(layers, 1)
            (normed, _), keys_values, _ = layer.project(hidden, places)
            attention = layer.self_attn
            return attention.queries(normed, places.visual_tables), *keys_values, attention.gate_logits(normed)

        self._layer_arrays = jax.block_until_ready(jax.jit(project)(self.params, self.visual, self.text, self.piece))
        return self._layer_arrays

    def overlap(self) -> dict[str, Any]:
        """How much of a query's choice its neighbour chose too, and 16 queries' choices over one's."""
        size, count = self.model.nsa.block_size, self.model.nsa.block_count

        def choose(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            k_blocks, v_blocks = block_means(k, size), block_means(v, size)
            _, lse = compressed_attention(q, k_blocks, v_blocks, block_size=size)
            return block_selection(q, k_blocks, lse, block_size=size, block_count=count)

        chosen = np.asarray(jax.jit(choose)(*self.layer_arrays()[:3]))[0]
        common, union = [], []
        for start in range(self.tokens // 2, self.tokens - 16, max(self.tokens // 128, 1)):
            for head in range(chosen.shape[1]):
                tile = [set(row[row >= 0].tolist()) for row in chosen[start : start + 16, head]]
                common += [len(a & b) / len(a) for a, b in itertools.pairwise(tile)]
                union.append(len(set.union(*tile)) / len(tile[0]))
        return {"common_with_next": float(np.mean(common)), "union_of_16": float(np.mean(union))}

    def _timed(self, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        start = time.perf_counter()
        program = jax.jit(function).lower(*arguments).compile()
        compiling, times = time.perf_counter() - start, []
        for _ in range(self.samples + 1):
            start = time.perf_counter()
            result = jax.block_until_ready(program(*arguments))
            times.append(time.perf_counter() - start)
            finite = bool(jnp.all(jnp.isfinite(jax.tree.leaves(result)[0].astype(jnp.float32))))
            del result
        analysis = program.memory_analysis()
        return {
            "seconds": statistics.median(times[1:]),
            "compile_seconds": compiling,
            "samples": times[1:],
            "finite": finite,
            "temporary_bytes": analysis.temp_size_in_bytes,
        }


def transformers_prefill(model: ModelConfig, tokens: int, samples: int, python: str) -> dict[str, Any]:
    """transformers' language model in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="prefill_") as folder:
        hf_config.write_config(Path(folder), model, "bfloat16")
        script = Path(__file__).with_name("prefill_128k_torch.py")
        command = [python, str(script), folder, str(tokens + TEXT_TOKENS), str(samples)]
        subprocess.run(command, check=True)
        return json.loads((Path(folder) / "times.json").read_text())


def summary(parts: dict[str, Any], layers: int) -> dict[str, float]:
    """Ratios of times, and the share of each whole that is attention."""
    seconds = {name: part["seconds"] for name, part in parts.items() if "seconds" in part}
    found = {}
    for name, other in (("dense", "dense"), ("dense cudnn", "cuDNN"), ("transformers", "transformers")):
        if {"nsa", name} <= set(seconds):
            found[f"NSA times as fast as {other}"] = seconds[name] / seconds["nsa"]
    for whole, attention in (
        ("nsa", "attention nsa"),
        ("dense", "attention dense"),
        ("dense cudnn", "attention cudnn"),
    ):
        if {whole, attention} <= set(seconds):
            found[f"share of attention, {whole}"] = (layers - 1) * seconds[attention] / seconds[whole]
    return found


@contextlib.contextmanager
def cudnn() -> Iterator[None]:
    """Dense attention of the visual stream by cuDNN."""
    with mock.patch.object(Attention, "_dense_visual", cudnn_visual):
        yield


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for everything measured")
    parser.add_argument("--samples", type=int, default=3, help="timed runs of each program")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument("--tiny", action="store_true", help="a small model and 128 tokens")
    options = parser.parse_args(arguments)
    model, steps, side = (tiny(), 8, 4) if options.tiny else (qwen2_5_vl_7b(), STEPS, SIDE)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    prefill = Prefill(model, steps, side, options.samples, options.json)
    prefill.record |= environment() | {"xla_flags": os.environ.get("XLA_FLAGS", ""), "tokens": prefill.tokens}

    def with_cudnn(part: Callable[[str], dict[str, Any]], kind: str) -> dict[str, Any]:
        with cudnn():
            return part(kind)

    prefill.attempt("nsa", functools.partial(prefill.whole, "nsa"))
    prefill.attempt("dense", functools.partial(prefill.whole, "dense"))
    prefill.attempt("attention nsa", functools.partial(prefill.attention, "nsa"))
    prefill.attempt("attention dense", functools.partial(prefill.attention, "dense"))
    if jax.default_backend() == "gpu":
        prefill.attempt("dense cudnn", functools.partial(with_cudnn, prefill.whole, "dense"))
        prefill.attempt("attention cudnn", functools.partial(prefill.attention, "cudnn"))
    prefill.attempt("overlap", prefill.overlap)
    if not options.no_torch:
        prefill.release()
        run = functools.partial(transformers_prefill, model, prefill.tokens, options.samples, options.torch_python)
        prefill.attempt("transformers", run)
    prefill.record["summary"] = summary(prefill.record["parts"], model.text.num_hidden_layers)
    prefill.record["seconds"] = time.perf_counter() - begin
    prefill.attempt("summary", lambda: prefill.record["summary"])


if __name__ == "__main__":
    main()
