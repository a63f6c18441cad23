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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.step_time import nsa_options
from benchmarks.train_7b import set_up_xla
from experiments.timing import turn
from pallas_kernels import block_means, block_selection, compressed_attention, nsa_attention, prefix_attention
from videonsa_jax.checkpoints import hf_config
from videonsa_jax.configs import ModelConfig, qwen2_5_vl_7b, tiny
from videonsa_jax.models.attention import Attention, AttentionOptions
from videonsa_jax.models.cache import Piece, empty_cache, extend
from videonsa_jax.models.decoder import Decoder
from videonsa_jax.streams import Visual, split_streams
from videonsa_jax.training.environment import environment

SIDE, STEPS = 8, 2048
# With it 16 neighbours' choices together are about as much more than one's as a trained model's were measured to be
# (1.65 times, results/selection_small_h100.json); with 0.4 five times, and selected attention takes a tenth longer.
NOISE = 0.05
TEXT_BEFORE, TEXT_TOKENS = 24, 128


def embedded_video(steps: int, side: int, hidden: int, noise: float) -> jax.Array:
    """Hidden states [1, L, hidden] of unit variance that vary over some 16 tokens and some 16 steps, with noise."""
    place = jnp.stack(
        jnp.meshgrid(*(jnp.arange(size, dtype=jnp.float32) for size in (steps, side, side)), indexing="ij")
    )
    keys = jax.random.split(jax.random.key(0), 3)
    frequencies = jax.random.normal(keys[0], (3, hidden)) / 16
    phases = jax.random.uniform(keys[1], (hidden,), maxval=2 * jnp.pi)
    smooth = jnp.sin(jnp.moveaxis(place, 0, -1).reshape(-1, 3) @ frequencies + phases) * 2**0.5
    rough = jax.random.normal(keys[2], smooth.shape)
    return ((1 - noise**2) ** 0.5 * smooth + noise * rough)[None].astype(jnp.bfloat16)


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


def one_of_stack(layers: nnx.Module, index: int) -> nnx.Module:
    """One layer of a stack."""
    graphdef, state = nnx.split(layers)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


class Prefill:
    """The language model, its programs, and what was measured.

    Attributes:
      tokens: visual tokens.
      record: what is saved.
    """

    def __init__(self, model: ModelConfig, steps: int, side: int, noise: float, samples: dict[str, int], file: Path):
        self._noise = noise
        self.model, self.tokens, self._samples, self._file = model, steps * side**2, samples, file
        self._options = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
        self._graphdef, _ = nnx.split(nnx.eval_shape(self._decoder))
        self._piece = whole_piece(model, steps, side)
        self._make = functools.partial(self._inputs, steps, side)
        # The piece as well: of constants, XLA would compute the rotary tables while it compiles.
        self._shapes = (*jax.eval_shape(self._make), jax.eval_shape(lambda: self._piece))
        self._programs: dict[str, tuple[Any, float]] = {}
        self._arrays: tuple[Any, ...] = ()
        self._layer_arrays: tuple[jax.Array, ...] = ()
        self.record: dict[str, Any] = {"parts": {}, "failed": {}}

    def _decoder(self) -> Decoder:
        return Decoder(self.model.text, self.model.nsa, rngs=nnx.Rngs(0), **self._options)

    def _inputs(self, steps: int, side: int) -> tuple[Any, jax.Array, jax.Array]:
        hidden = self.model.text.hidden_size
        text = jax.random.normal(jax.random.key(1), (1, 1, TEXT_TOKENS, hidden), jnp.bfloat16)
        return nnx.split(self._decoder())[1], embedded_video(steps, side, hidden, self._noise), text

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

    def _compile(self, name: str, function: Callable[..., Any], shapes: Any) -> None:
        start = time.perf_counter()
        self._programs[name] = (jax.jit(function).lower(*shapes).compile(), time.perf_counter() - start)

    def compile_inputs(self) -> None:
        """Compiles what makes the weights and the hidden states, and a layer's queries, keys, values and gates."""
        self._compile("inputs", self._make, ())
        self._compile("layer arrays", self._project, self._shapes)

    def compile_whole(self, kind: str) -> None:
        """Compiles the prefill through all layers: "nsa", "dense", or "cudnn" for dense attention by cuDNN."""

        def prefill(params: Any, visual: jax.Array, text: jax.Array, piece: Piece) -> Any:
            cache = empty_cache(self.model.text, 1, 1, self.tokens, TEXT_TOKENS, jnp.bfloat16)
            places = piece.places(self.model.text)
            options = AttentionOptions("nsa" if kind == "nsa" else "dense")
            decoder = nnx.merge(self._graphdef, params)
            return extend(decoder, (visual, text), cache, places, options, is_whole=True)

        replaced = mock.patch.object(Attention, "_dense_visual", cudnn_visual)
        with replaced if kind == "cudnn" else contextlib.nullcontext():
            self._compile(kind, prefill, self._shapes)

    def compile_attention(self, kind: str) -> None:
        """Compiles a layer's visual attention by itself."""

        def dense(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
            visible = jnp.broadcast_to(jnp.arange(self.tokens) + 1, (1, 1, self.tokens))
            return prefix_attention(q[:, None], k, v, visible)[0][:, 0]

        operations = {
            "nsa": functools.partial(nsa_attention, lengths=self._piece.visual_lengths, **nsa_options(self.model)),
            "dense": dense,
            "cudnn": lambda q, k, v, _: cudnn_visual(None, q, (k, v)),
        }
        shapes = jax.eval_shape(self._project, *self._shapes)
        self._compile(f"attention {kind}", operations[kind], shapes)

    def _project(self, params: Any, visual: jax.Array, text: jax.Array, piece: Piece) -> tuple[jax.Array, ...]:
        layers, places = nnx.merge(self._graphdef, params).layers, piece.places(self.model.text)
        hidden = one_of_stack(layers, 0)((visual, text), places, AttentionOptions("nsa"))
        layer = one_of_stack(layers, 1)
        (normed, _), keys_values, _ = layer.project(hidden, places)
        attention = layer.self_attn
        return attention.queries(normed, places.visual_tables), *keys_values, attention.gate_logits(normed)

    def make_inputs(self) -> dict[str, Any]:
        """Makes the weights and the hidden states on the device."""
        program, seconds = self._programs["inputs"]
        start = time.perf_counter()
        self._arrays = (*jax.block_until_ready(program()), self._piece)
        self._layer_arrays = jax.block_until_ready(self._programs["layer arrays"][0](*self._arrays))
        return {"seconds": time.perf_counter() - start, "compile_seconds": seconds}

    def release(self) -> None:
        """Frees the device's memory."""
        self._arrays = self._layer_arrays = ()

    def time(self, name: str) -> dict[str, Any]:
        """Times a program: a whole prefill, the cache made anew in every call, or a layer's attention."""
        program, compiling = self._programs[name]
        arguments = self._layer_arrays if name.startswith("attention") else self._arrays
        times = []
        for _ in range(self._samples.get(name, self._samples["default"]) + 1):
            start = time.perf_counter()
            result = jax.block_until_ready(program(*arguments))
            times.append(time.perf_counter() - start)
            finite = bool(jnp.all(jnp.isfinite(jax.tree.leaves(result)[0].astype(jnp.float32))))
            del result
        return {
            "seconds": statistics.median(times[1:]),
            "compile_seconds": compiling,
            "samples": times[1:],
            "finite": finite,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        }

    def compile_choice(self) -> None:
        """Compiles a layer's choice of blocks."""
        size, count = self.model.nsa.block_size, self.model.nsa.block_count

        def choose(q: jax.Array, k: jax.Array, v: jax.Array, _: jax.Array) -> jax.Array:
            k_blocks, v_blocks = block_means(k, size), block_means(v, size)
            _, lse = compressed_attention(q, k_blocks, v_blocks, block_size=size)
            return block_selection(q, k_blocks, lse, block_size=size, block_count=count)

        self._compile("choice", choose, jax.eval_shape(self._project, *self._shapes))

    def overlap(self) -> dict[str, Any]:
        """How much of a query's choice its neighbour chose too, and 16 queries' choices over one's."""
        chosen = np.asarray(self._programs["choice"][0](*self._layer_arrays))[0]
        common, union = [], []
        for start in range(self.tokens // 2, self.tokens - 16, max(self.tokens // 128, 1)):
            for head in range(chosen.shape[1]):
                tile = [set(row[row >= 0].tolist()) for row in chosen[start : start + 16, head]]
                common += [len(a & b) / len(a) for a, b in itertools.pairwise(tile)]
                union.append(len(set.union(*tile)) / len(tile[0]))
        return {"common_with_next": float(np.mean(common)), "union_of_16": float(np.mean(union))}


def transformers_prefill(
    model: ModelConfig, tokens: int, samples: int, python: str, share: Path | None
) -> dict[str, Any]:
    """transformers' language model in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="prefill_") as folder:
        hf_config.write_config(Path(folder), model, "bfloat16")
        script = Path(__file__).with_name("prefill_128k_torch.py")
        command = [python, str(script), folder, str(tokens + TEXT_TOKENS), str(samples)]
        with turn(share):
            subprocess.run(command, check=True)
        return json.loads((Path(folder) / "times.json").read_text())


def summary(parts: dict[str, Any], layers: int) -> dict[str, float]:
    """Ratios of times, and the share of each whole that is attention."""
    seconds = {name: part["seconds"] for name, part in parts.items() if "seconds" in part}
    found = {}
    for name, other in (("dense", "dense"), ("cudnn", "cuDNN's dense"), ("transformers", "transformers")):
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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch's process needs memory too
    set_up_xla()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for everything measured")
    parser.add_argument("--samples", type=int, default=3, help="timed runs of each program")
    parser.add_argument("--torch-python", default=sys.executable, help="a Python with torch and transformers")
    parser.add_argument("--noise", type=float, default=NOISE, help="standard deviation of each hidden state's noise")
    parser.add_argument("--no-cudnn", action="store_true", help="leave dense attention by cuDNN out")
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument("--share", type=Path, help="file whose lock is held while the device works, not to compile")
    parser.add_argument("--tiny", action="store_true", help="a small model and 128 tokens")
    options = parser.parse_args(arguments)
    model, steps, side = (tiny(), 8, 4) if options.tiny else (qwen2_5_vl_7b(), STEPS, SIDE)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    # Eight seconds each: one run after the first.
    samples = {"default": options.samples, "dense": 1, "cudnn": 1}
    prefill = Prefill(model, steps, side, options.noise, samples, options.json)
    prefill.record |= environment() | {"xla_flags": os.environ.get("XLA_FLAGS", ""), "tokens": prefill.tokens}
    prefill.record["noise"] = options.noise
    with_cudnn = jax.default_backend() == "gpu" and not options.no_cudnn
    kinds = ("nsa", "dense", *(("cudnn",) if with_cudnn else ()))
    torch_first = functools.partial(
        transformers_prefill, model, prefill.tokens, options.samples, options.torch_python, options.share
    )
    with ThreadPoolExecutor(4) as pool:  # transformers runs while this process compiles
        transformers = None if options.no_torch else pool.submit(torch_first)
        prefill.compile_inputs()
        for kind in kinds:
            prefill.attempt(f"compile {kind}", functools.partial(compiled, prefill, kind))
        prefill.attempt("compile choice", lambda: prefill.compile_choice() or {})
        if transformers is not None:
            prefill.attempt("transformers", transformers.result)
        with turn(options.share):
            prefill.attempt("inputs", prefill.make_inputs)
            for name in (*kinds, *(f"attention {kind}" for kind in kinds)):
                prefill.attempt(name, functools.partial(prefill.time, name))
            prefill.attempt("overlap", prefill.overlap)
    prefill.record["seconds"] = time.perf_counter() - begin
    prefill.attempt("summary", lambda: summary(prefill.record["parts"], model.text.num_hidden_layers))


def compiled(prefill: Prefill, kind: str) -> dict[str, Any]:
    """Compiles the whole and the attention of a kind."""
    prefill.compile_whole(kind)
    prefill.compile_attention(kind)
    return {}


if __name__ == "__main__":
    main()
