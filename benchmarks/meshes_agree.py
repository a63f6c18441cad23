"""Compares loss and gradients of a batch on several meshes of two devices with those on one of them.

    python -m benchmarks.meshes_agree --json=benchmarks/results/meshes_agree_h200x2.json     # two GPUs
    python -m benchmarks.meshes_agree --one --json=benchmarks/results/meshes_agree_one.json  # one, to see its rounding
    XLA_FLAGS=--xla_force_host_platform_device_count=2 JAX_PLATFORMS=cpu \
      python -m benchmarks.meshes_agree --tiny --json=/tmp/agree.json                        # to test the script

Layers have the 7B's widths, but there are few of them and few words; a video has 32 grid steps of 12 x 20 patches
(1,920 visual tokens). A mesh lays both devices along one axis. The truth is float32 on one device, by plain XLA, of
weights that are rounded to bfloat16. A mesh in float32 must agree with it to the rounding of sums in another order; a
mesh in bfloat16, with the device's kernels, must come as near to it as one device in bfloat16 does. A leaf's distance
is the norm of the difference over the truth's norm.
"""

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.stages import Compiled

from benchmarks.real_samples import GRID, real_shaped_batch
from experiments import configs
from experiments.timing import relative_distance
from videonsa_jax.configs import ModelConfig, tiny
from videonsa_jax.models import placement
from videonsa_jax.streams import TrainBatch
from videonsa_jax.training.compiling import compile_program
from videonsa_jax.training.config import MeshConfig, TrainConfig
from videonsa_jax.training.environment import environment
from videonsa_jax.training.mesh import make_mesh, path_name, place_batch, state_shardings
from videonsa_jax.training.step import Params, Sums, accumulate, make_losses, make_model

LAYERS, VISION_LAYERS, VOCABULARY, FRAMES = 3, 8, 8192, 32
KINDS = (("nsa", 1), ("dense", 1), ("nsa", 2))  # attention, and questions a video
DEVICES = 2
MESHES = {"one": MeshConfig(data=1)} | {
    axis: MeshConfig(**({"data": 1} | {axis: DEVICES})) for axis in ("fsdp", "context", "tensor")
}
FLOAT32_LIMIT = 1e-4  # sums of up to 10^5 terms in another order
# Times what one device's bfloat16 is off: where sums are split rounding falls out otherwise, and a leaf may be unlucky.
BFLOAT16_LIMIT, BFLOAT16_FLOOR = 2.0, 1e-2


@dataclasses.dataclass(frozen=True)
class Case:
    """One program.

    Attributes:
      attention: "nsa" or "dense".
      questions: a video.
      dtype: "float32", by plain XLA, or "bfloat16", by the device's kernels.
      mesh: a key of `MESHES`.
    """

    attention: str
    questions: int
    dtype: str
    mesh: str

    @property
    def name(self) -> str:
        """Such as "nsa 1 bfloat16 fsdp"."""
        return f"{self.attention} {self.questions} {self.dtype} {self.mesh}"


def cases(meshes: Collection[str] = tuple(MESHES)) -> list[Case]:
    """Every program on these meshes: float32 on all of them for the first kind alone."""
    return [
        Case(attention, questions, dtype, mesh)
        for index, (attention, questions) in enumerate(KINDS)
        for dtype in ("float32", "bfloat16")
        for mesh in meshes
        if dtype == "bfloat16" or mesh == "one" or index == 0
    ]


def small_model(is_tiny: bool) -> ModelConfig:
    """The 7B with few layers and words, or a tiny model with two KV heads, that `tensor` may split."""
    if is_tiny:
        model = tiny()
        return dataclasses.replace(model, text=dataclasses.replace(model.text, num_key_value_heads=2))
    model = configs.get("nsa_video_7b").model
    text = dataclasses.replace(model.text, num_hidden_layers=LAYERS, vocab_size=VOCABULARY)
    vision = dataclasses.replace(model.vision, depth=VISION_LAYERS, fullatt_block_indexes=(VISION_LAYERS - 1,))
    return dataclasses.replace(model, text=text, vision=vision)


def train_config(case: Case) -> TrainConfig:
    """How the case's gradient is computed."""
    return dataclasses.replace(
        configs.get("nsa_video_7b").train,
        accumulation=1,
        dtype=case.dtype,
        param_dtype=case.dtype,
        kernel="xla" if case.dtype == "float32" else "auto",
        attention=case.attention,
    )


@functools.partial(jax.jit, static_argnums=0)
def draw_params(model: ModelConfig) -> Params:
    """Random parameters, rounded to bfloat16."""
    train = train_config(Case("nsa", 1, "bfloat16", "one"))
    params = nnx.to_pure_dict(nnx.state(make_model(model, train, 0), nnx.Param))
    return jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)


class Program:
    """A case's program, compiling in `pool`, and what it runs on."""

    def __init__(self, case: Case, model: ModelConfig, batch: TrainBatch, params: Params, pool: ThreadPoolExecutor):
        train, config = train_config(case), MESHES[case.mesh]
        self._mesh = make_mesh(config, jax.devices()[: 1 if case.mesh == "one" else DEVICES])
        self._batch, self._dtype = batch, case.dtype
        add = functools.partial(accumulate, make_losses(model, train, self._mesh), train)
        with jax.default_matmul_precision("highest" if case.dtype == "float32" else "default"):
            lowered = jax.jit(add).lower(*self._arguments(params))
        self._program: Future[Compiled] = pool.submit(compile_program, lowered, self._mesh)

    def _arguments(self, params: Params) -> tuple[Params, None, TrainBatch]:
        params = jax.tree.map(lambda leaf: leaf.astype(self._dtype), params)
        return jax.device_put(params, state_shardings(params, self._mesh)), None, place_batch(self._batch, self._mesh)

    def run(self, params: Params) -> Sums:
        """The sums over the batch, on the first device."""
        sums, _ = self._program.result()(*self._arguments(params))
        return jax.device_put(sums, jax.devices()[0])


def distances(found: Sums, truth: Sums) -> dict[str, float]:
    """Of every leaf of the gradient, and of the loss."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(truth.grads), jax.tree.leaves(found.grads), strict=True)
    gradients = {path_name(path): float(relative_distance(leaf, wanted)) for (path, wanted), leaf in pairs}
    return {"loss": float(relative_distance(found.loss, truth.loss))} | gradients


def verdict(case: Case, found: dict[str, float], of_one: dict[str, float]) -> dict[str, Any]:
    """The leaf that lies farthest from the truth for what is allowed, and whether it is near enough."""

    def allowed(leaf: str) -> float:
        return FLOAT32_LIMIT if case.dtype == "float32" else max(BFLOAT16_LIMIT * of_one[leaf], BFLOAT16_FLOOR)

    worst = max(found, key=lambda leaf: (math.isnan(found[leaf]), found[leaf] / allowed(leaf)))
    return {
        "loss": found["loss"],
        "worst_leaf": worst,
        "distance": found[worst],
        "allowed": allowed(worst),
        "distance_of_one_device": of_one[worst],
        "agrees": all(distance <= allowed(leaf) for leaf, distance in found.items()),
    }


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; its status is 1 where a mesh does not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for everything found")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a short video")
    parser.add_argument("--one", action="store_true", help="one device alone: how far its bfloat16 is off")
    options = parser.parse_args(arguments)
    devices = 1 if options.one else DEVICES
    if len(jax.devices()) < devices:
        parser.error(f"found {len(jax.devices())} device(s), expected {devices}")
    if options.tiny:
        placement.MIN_SHARDED_SIZE = 1  # shard what can be
    model, size = small_model(options.tiny), (8, (4, 4)) if options.tiny else (FRAMES, GRID)
    batches = {questions: real_shaped_batch(model, DEVICES, questions, *size) for questions in (1, 2)}
    params = draw_params(model)
    record: dict[str, Any] = environment() | {"cases": {}}
    with ThreadPoolExecutor(8) as pool:
        programs = {
            case: Program(case, model, batches[case.questions], params, pool)
            for case in cases(("one",) if options.one else MESHES)
        }
        for case, program in programs.items():
            sums = program.run(params)
            if case.mesh == "one" and case.dtype == "float32":
                truth = sums
            found = distances(sums, truth)
            if case.mesh == "one":
                of_one = found
            counts = [float(count) for count in (sums.answer_tokens, sums.visual_tokens, sums.text_tokens)]
            record["cases"][case.name] = result = verdict(case, found, of_one) | {"counts": counts}
            print(
                f"{case.name}: {'agrees' if result['agrees'] else 'DIFFERS'}, loss {result['loss']:.1e}, "
                f"{result['worst_leaf']} {result['distance']:.1e} of {result['allowed']:.1e}",
                flush=True,
            )
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1, default=str) + "\n")
    results = record["cases"].values()
    same_counts = len({tuple(result["counts"][:2]) for name, result in record["cases"].items() if " 1 " in name}) == 1
    return 0 if same_counts and all(result["agrees"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
