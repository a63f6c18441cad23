"""Times the train step of VideoNSA-7B at full size on samples of the paper's shape, with random weights.

    python -m benchmarks.train_7b --json=benchmarks/results/train_7b_h200.json               # one GPU with 139 GiB
    python -m benchmarks.train_7b --fsdp=2 --json=benchmarks/results/train_7b_h200x2.json    # two
    python -m benchmarks.train_7b --tiny --json=/tmp/tiny.json                               # a CPU, to test the script

A sample is 450 sampled frames of 16:9 in at most 50,176 pixels: 225 grid steps of 12 x 20 patches, 13,500 visual
tokens, padded to whole blocks, and 128 text tokens a question. Everything is trained: bfloat16 parameters with float32
masters, moments in bfloat16. The two programs of a step are those of `training/loop.py`: `accumulate`, once for each
batch, and the update. Pixels are a moving pattern, so that neighbouring tokens resemble each other as a video's do.

Programs are compiled side by side; results are saved after every part, and a part that fails is recorded as failed.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered

from benchmarks.real_samples import FRAMES, GRID, TEXT_TOKENS, one_question, real_shaped_batch
from benchmarks.step_time import attention_arrays, nsa_options
from experiments import configs
from experiments.timing import relative_error, turn
from pallas_kernels import nsa_attention
from videonsa_jax.configs import tiny
from videonsa_jax.streams import Batch, TrainBatch
from videonsa_jax.training.compiling import compile_program
from videonsa_jax.training.config import Experiment, MeshConfig
from videonsa_jax.training.environment import environment
from videonsa_jax.training.flops import forward_flops, peak_flops_per_second, train_flops
from videonsa_jax.training.loop import expected_sums
from videonsa_jax.training.mesh import batch_shapes, make_mesh, place_batch, state_shardings
from videonsa_jax.training.optimizer import learning_rate, make_optimizer
from videonsa_jax.training.step import (
    Sums,
    TrainState,
    accumulate,
    apply_gradients,
    init_state,
    make_losses,
    make_model,
    sums_like,
)

PAPER_SAMPLES, PAPER_BATCH = 216_000, 32  # VideoNSA, App. B and Q
CASES = tuple((attention, questions) for questions in (1, 4) for attention in ("nsa", "dense"))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program and the seconds that making it took."""

    run: Callable[..., Any]
    seconds: dict[str, float]
    memory: dict[str, int]


class Programs:
    """Traces in order, compiles side by side."""

    def __init__(self, mesh: Mesh) -> None:
        self._pool, self._mesh = ThreadPoolExecutor(8), mesh
        self._futures: dict[str, Future[Compiled]] = {}

    def add(self, name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Starts to compile `jax.jit(function, **options)` for arguments of these shapes and shardings."""
        start = time.perf_counter()
        lowered = jax.jit(function, **options).lower(*arguments)
        tracing = time.perf_counter() - start
        self._futures[name] = self._pool.submit(_compile, lowered, self._mesh, tracing)

    def get(self, name: str) -> Compiled:
        """The program, once it is compiled."""
        return self._futures[name].result()

    def wait(self) -> None:
        """Waits for all programs; what failed is raised where it is asked for."""
        wait(self._futures.values())

    def close(self) -> None:
        """Leaves what is still compiling."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _compile(lowered: Lowered, mesh: Mesh, tracing: float) -> Compiled:
    start = time.perf_counter()
    program = compile_program(lowered, mesh)
    seconds = {"trace": tracing, "compile": time.perf_counter() - start}
    analysis = program.memory_analysis()
    names = ("argument", "output", "alias", "temp")
    return Compiled(program, seconds, {name: getattr(analysis, f"{name}_size_in_bytes") for name in names})


class Benchmark:
    """The programs of one experiment on one mesh, their state, and what was measured.

    Attributes:
      record: what is saved.
    """

    def __init__(self, experiment: Experiment, frames: int, grid: tuple[int, int], samples: int, file: Path):
        self.experiment, self.samples, self._file = experiment, samples, file
        self._sizes = {"frames": frames, "grid": grid}
        self.mesh = make_mesh(experiment.mesh)
        self.contexts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.schedule = learning_rate(experiment.optimizer, 100)
        self.optimizer = make_optimizer(experiment.optimizer, 100, experiment.train.param_dtype)
        self.init = functools.partial(init_state, experiment.model, experiment.train, 0, self.optimizer)
        shapes = jax.eval_shape(self.init)
        self.shardings = state_shardings(shapes, self.mesh, experiment.mesh.rules)
        self.shapes = jax.tree.map(_placed, shapes, self.shardings)
        self.programs = Programs(self.mesh)
        self.batches = functools.cache(self._batch)
        self.state: TrainState | None = None
        self.record: dict[str, Any] = {"parts": {}, "failed": {}}

    def save(self) -> None:
        """Writes the record."""
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1, default=str) + "\n")
        partial.replace(self._file)

    def attempt(self, name: str, part: Callable[[], dict[str, Any]]) -> None:
        """Runs a part, keeps and prints its result, or why there is none."""
        start = time.perf_counter()
        try:
            result = part()
        except Exception as error:  # one part's failure must not hide the others
            self.record["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name}: FAILED after {time.perf_counter() - start:.1f} s: {str(error)[:300]}", flush=True)
            traceback.print_exc()
        else:
            self.record["parts"][name] = result | {"wall_seconds": time.perf_counter() - start}
            shown = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
            print(f"{name}: " + ", ".join(f"{key} {_short(value)}" for key, value in shown.items()), flush=True)
        self.save()

    def _batch(self, questions: int) -> TrainBatch:
        return real_shaped_batch(self.experiment.model, self.contexts, questions, **self._sizes)

    def _batch_shapes(self, questions: int) -> TrainBatch:
        return batch_shapes(self.batches(questions), self.mesh)

    def _sums_shardings(self) -> Sums:
        return sums_like(self.shardings.params, self.replicated)

    def compile_init(self) -> None:
        """Starts to compile the making of the first state."""
        self.programs.add("init", self.init, out_shardings=self.shardings)

    def compile_update(self) -> None:
        """Starts to compile the optimiser's update."""
        train = self.experiment.train
        sums = expected_sums(self.shapes.params, train.accumulation, self._sums_shardings())
        self.programs.add(
            "update",
            functools.partial(apply_gradients, self.optimizer, self.schedule),
            self.shapes,
            sums,
            donate_argnums=0,
            out_shardings=(self.shardings, self.replicated),
        )

    def compile_accumulate(self, attention: str, questions: int) -> None:
        """Starts to compile the forward and backward pass over one batch."""
        train = dataclasses.replace(self.experiment.train, attention=attention)
        losses = make_losses(self.experiment.model, train, self.mesh)
        self.programs.add(
            f"{attention} {questions}",
            functools.partial(accumulate, losses, train),
            self.shapes.params,
            None,
            self._batch_shapes(questions),
            out_shardings=(self._sums_shardings(), self.replicated),
        )

    def compile_check(self) -> None:
        """Starts to compile one layer's sparse attention at the batch's shape, by the device's kernels and by XLA."""
        model, tokens = self.experiment.model, self.batches(1).inputs.visual_source.shape[1]
        *arrays, cotangent = self._attention_arrays(tokens)
        lengths = jnp.asarray(self.batches(1).inputs.visual_lengths[:1])
        options = nsa_options(model) | {"lengths": lengths}
        names = {"kernels": None, "xla": "xla"}

        def both(implementation: str | None, cotangent: jax.Array, *arrays: jax.Array) -> Any:
            attend = functools.partial(nsa_attention, implementation=implementation, **options)
            value, pull = jax.vjp(attend, *arrays)
            return value, *pull(cotangent)

        for name, implementation in names.items():
            self.programs.add(f"check {name}", functools.partial(both, implementation), cotangent, *arrays)

    def _attention_arrays(self, tokens: int) -> tuple[jax.Array, ...]:
        *arrays, gates = attention_arrays(self.experiment.model, 1, tokens, self.experiment.train.dtype)
        return *arrays, gates, jax.random.normal(jax.random.key(1), arrays[0].shape, arrays[0].dtype)

    def check(self) -> dict[str, Any]:
        """Relative distances of the kernels' output and gradients from XLA's."""
        *arrays, cotangent = self._attention_arrays(self.batches(1).inputs.visual_source.shape[1])
        found, expected = (self.programs.get(f"check {name}").run(cotangent, *arrays) for name in ("kernels", "xla"))
        names = ("output", "dq", "dk", "dv", "dgates")
        distances = [float(relative_error(*pair)) for pair in zip(found, expected, strict=True)]
        return dict(zip(names, distances, strict=True))

    def compile_vision(self) -> None:
        """Starts to compile the vision tower's two passes, without and with the gradient."""
        train = self.experiment.train
        network = nnx.eval_shape(lambda: make_model(self.experiment.model, train, 0))
        graphdef, _ = nnx.split(network.visual)

        def encode(tower: Any, batch: Batch) -> jax.Array:
            patches = batch.patches.reshape(-1, *batch.patches.shape[2:])
            return nnx.merge(graphdef, tower)(patches, batch.frame_grids.reshape(-1, 2))

        def both(tower: Any, batch: Batch) -> tuple[jax.Array, Any]:
            value, pull = jax.vjp(lambda tower: encode(tower, batch), tower)
            return jnp.sum(value, dtype=jnp.float32), pull(value)[0]

        tower, inputs = self.shapes.params["visual"], self._batch_shapes(1).inputs
        self.programs.add("vision f", lambda *args: jnp.sum(encode(*args), dtype=jnp.float32), tower, inputs)
        self.programs.add("vision f+b", both, tower, inputs, out_shardings=(None, self.shardings.params["visual"]))

    def time_init(self) -> dict[str, Any]:
        """Makes the state on the devices."""
        program = self.programs.get("init")
        start = time.perf_counter()
        self.state = jax.block_until_ready(program.run())
        seconds = time.perf_counter() - start
        return {"seconds": seconds, **program.seconds, "memory": program.memory, **self._peak()}

    def time_vision(self, name: str) -> dict[str, Any]:
        """Times a pass of the vision tower."""
        program, batch = self.programs.get(name), self._placed(1)
        times = self._times(lambda: program.run(self.state.params["visual"], batch.inputs))
        parts = forward_flops(self.experiment.model, self.batches(1).inputs, "dense")
        forward = sum(flops.weights + flops.attention for key, flops in parts.items() if key != "llm")
        work = forward * (3 if name.endswith("b") else 1)
        return self._timed(times, program) | self._mfu(work, statistics.median(times))

    def time_accumulate(self, attention: str, questions: int) -> dict[str, Any]:
        """Times the forward and backward pass of a batch, after one whose loss and update are real."""
        program = self.programs.get(f"{attention} {questions}")
        self.batches(questions)
        start = time.perf_counter()
        batch = jax.block_until_ready(self._placed(questions))
        placing = time.perf_counter() - start
        sums, _ = program.run(self.state.params, None, batch)
        values = {"loss": float(sums.loss) / float(sums.answer_tokens)}
        values["gradient_norm"] = float(_norm(sums.grads)) / float(sums.answer_tokens)
        del sums
        times = self._times(lambda: program.run(self.state.params, None, batch))
        seconds, rows = statistics.median(times), self.contexts * questions
        tokens = int(self.batches(questions).inputs.visual_lengths.sum() + rows * TEXT_TOKENS)
        work = train_flops(self.experiment.model, self.batches(questions).inputs, attention)
        per_sample = seconds * self.mesh.size / rows
        return (
            {"gpu_seconds_per_sample": per_sample, "tokens_per_second": tokens / seconds, **values}
            | {"placing_seconds": placing}
            | self._mfu(work, seconds)
            | self._timed(times, program)
        )

    def compare_apart(self, attention: str, questions: int) -> dict[str, Any]:
        """Every question's loss with the others on one visual stream, and with a stream of its own."""
        together, apart = (self.programs.get(f"{attention} {count}") for count in (questions, 1))
        batch = self.batches(questions)
        _, rows = together.run(self.state.params, None, self._placed(questions))
        shared = jax.device_get(rows.loss)
        del rows, _
        own = []
        for q in range(questions):
            _, rows = apart.run(self.state.params, None, place_batch(one_question(batch, q), self.mesh))
            own.append(jax.device_get(rows.loss))
            del rows, _
        own = np.concatenate(own, axis=1)
        return {
            "largest_relative_difference": float(np.max(np.abs(shared / own - 1))),
            "losses": {"shared": shared.tolist(), "own": own.tolist()},
        }

    def time_update(self, attention: str) -> dict[str, Any]:
        """Takes some steps on one batch: whole steps' times, the update's own, and the losses."""
        add, update, batch = self.programs.get(f"{attention} 1"), self.programs.get("update"), self._placed(1)
        steps, times, losses = [], [], []
        for _ in range(self.samples + 1):
            start = time.perf_counter()
            sums, _ = jax.block_until_ready(add.run(self.state.params, None, batch))
            middle = time.perf_counter()
            self.state, metrics = jax.block_until_ready(update.run(self.state, sums))
            del sums
            times.append(time.perf_counter() - middle)
            steps.append(time.perf_counter() - start)
            losses.append(float(metrics["loss"]))
        work = train_flops(self.experiment.model, self.batches(1).inputs, attention)
        result = self._timed(times[1:], update) | {"losses": losses, "gradient_norm": float(metrics["grad_norm"])}
        step = statistics.median(steps[1:])
        return result | {"step_seconds": step, "steps": steps[1:]} | self._mfu(work, step)

    def profile(self, attention: str, folder: Path) -> dict[str, Any]:
        """Traces one pass over a batch; `jax.profiler.ProfileData` reads what it writes."""
        program, batch = self.programs.get(f"{attention} 1"), self._placed(1)
        with jax.profiler.trace(folder):
            jax.block_until_ready(program.run(self.state.params, None, batch))
        return {"files": [file.name for file in folder.rglob("*.xplane.pb")]}

    def _placed(self, questions: int) -> TrainBatch:
        return place_batch(self.batches(questions), self.mesh)

    def _times(self, function: Callable[[], Any]) -> list[float]:
        jax.block_until_ready(function())
        times = []
        for _ in range(self.samples):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
        return times

    def _timed(self, times: list[float], program: Compiled) -> dict[str, Any]:
        return {
            "seconds": statistics.median(times),
            **program.seconds,
            "samples": times,
            "memory": program.memory,
            **self._peak(),
        }

    def _mfu(self, work: float | None, seconds: float) -> dict[str, float | None]:
        peak = peak_flops_per_second([device.device_kind for device in self.mesh.devices.flat])
        mfu = None if work is None or peak is None else work / seconds / peak
        return {"model_flops": work, "mfu": mfu}

    def _peak(self) -> dict[str, int | None]:
        statistics_of_device = self.mesh.devices.flat[0].memory_stats() or {}
        return {"peak_bytes_so_far": statistics_of_device.get("peak_bytes_in_use")}


@jax.jit
def _norm(tree: Any) -> jax.Array:
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares))


def _placed(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def hours(parts: dict[str, Any], devices: int) -> dict[str, float]:
    """GPU hours of the paper's 216,000 questions, by case: the passes, and a 32nd of an update for each question."""
    update = parts.get("update", {}).get("seconds", 0.0) * devices / PAPER_BATCH
    return {
        name: PAPER_SAMPLES * (part["gpu_seconds_per_sample"] + update) / 3600
        for name, part in parts.items()
        if "gpu_seconds_per_sample" in part
    }


def make_experiment(options: argparse.Namespace) -> Experiment:
    """nsa_video_7b as it is trained here, or something tiny of its kind."""
    experiment = configs.get("nsa_video_7b")
    model = experiment.model
    if options.tiny:
        model = tiny()
    text = dataclasses.replace(model.text, num_hidden_layers=options.layers or model.text.num_hidden_layers)
    model = dataclasses.replace(model, text=text)
    train = dataclasses.replace(
        experiment.train,
        accumulation=1,
        param_dtype="bfloat16",
        remat=options.remat or experiment.train.remat,
        vision_remat=options.vision_remat or experiment.train.vision_remat,
    )
    return dataclasses.replace(
        experiment,
        model=model,
        train=train,
        optimizer=dataclasses.replace(experiment.optimizer, moment_dtype="bfloat16"),
        mesh=MeshConfig(data=1, fsdp=options.fsdp),
    )


def set_up_xla() -> None:
    """Memory and flags, unless the environment says otherwise; read when the first array is made."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")
    if "XLA_FLAGS" not in os.environ and os.environ.get("JAX_PLATFORMS") != "cpu":
        wanted = ("autotune_level=0", "enable_triton_gemm=false")
        os.environ["XLA_FLAGS"] = " ".join(f"--xla_gpu_{flag}" for flag in wanted)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    set_up_xla()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file for everything measured")
    parser.add_argument("--fsdp", type=int, default=1, help="devices over which everything is split")
    parser.add_argument("--layers", type=int, default=0, help="decoder layers; default the model's")
    parser.add_argument("--remat", default="", help="of the decoder; default the config's")
    parser.add_argument("--vision-remat", default="", help="of the vision tower; default the config's")
    parser.add_argument("--cases", default="", help="such as 'nsa 1,dense 4': attention and questions; default all")
    parser.add_argument("--leave-out", default="", help="'vision', 'update' or both")
    parser.add_argument("--samples", type=int, default=3, help="timed runs of each program")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no part after so many")
    parser.add_argument("--check", action="store_true", help="compare the kernels with plain XLA first")
    parser.add_argument("--profile", type=Path, help="folder for a trace of the first case")
    parser.add_argument("--share", type=Path, help="file whose lock is held while the devices work, not to compile")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and a short video")
    options = parser.parse_args(arguments)
    begin = time.perf_counter()
    sizes = (3, (4, 4)) if options.tiny else (FRAMES, GRID)
    experiment = make_experiment(options)
    named = [tuple(case.split()) for case in options.cases.split(",") if case]
    cases = [(attention, int(questions)) for attention, questions in named] or list(CASES)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    benchmark = Benchmark(experiment, *sizes, options.samples, options.json)
    benchmark.record |= environment() | {
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "remat": {"decoder": experiment.train.remat, "vision": experiment.train.vision_remat},
        "layers": experiment.model.text.num_hidden_layers,
        "devices": benchmark.mesh.size,
        "contexts": benchmark.contexts,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(benchmark.shapes.params)),
    }

    def late() -> bool:
        return time.perf_counter() - begin > options.seconds

    benchmark.compile_init()
    if "update" not in options.leave_out:
        benchmark.compile_update()
    benchmark.compile_accumulate(*cases[0])
    if "vision" not in options.leave_out:
        benchmark.compile_vision()
    if options.check:
        benchmark.compile_check()
    for case in cases[1:]:
        benchmark.compile_accumulate(*case)
    benchmark.programs.wait()
    stack = contextlib.ExitStack()
    stack.enter_context(turn(options.share))  # until the end: the state stays on the device
    benchmark.record["waited_seconds"] = time.perf_counter() - begin
    if options.check:
        benchmark.attempt("check", benchmark.check)
    benchmark.attempt("init", benchmark.time_init)
    for name in () if "vision" in options.leave_out else ("vision f", "vision f+b"):
        benchmark.attempt(name, functools.partial(benchmark.time_vision, name))
    for case in cases:
        if not late():
            name = "{} {}".format(*case)
            benchmark.attempt(name, functools.partial(benchmark.time_accumulate, *case))
    for attention, questions in cases:
        if questions > 1 and (attention, 1) in cases and not late():
            compare = functools.partial(benchmark.compare_apart, attention, questions)
            benchmark.attempt(f"{attention} {questions} apart", compare)
    if not late() and "update" not in options.leave_out:
        benchmark.attempt("update", functools.partial(benchmark.time_update, cases[0][0]))
    if options.profile:
        benchmark.attempt("profile", functools.partial(benchmark.profile, cases[0][0], options.profile))
    spent = hours(benchmark.record["parts"], benchmark.mesh.size)
    benchmark.record["gpu_hours_of_216000"] = spent
    benchmark.record["seconds"] = time.perf_counter() - begin
    benchmark.record["device"] |= benchmark._peak()
    benchmark.save()
    benchmark.programs.close()
    stack.close()
    print(
        f"{benchmark.record['seconds']:.0f} s; GPU hours of 216,000 questions:", benchmark.record["gpu_hours_of_216000"]
    )


if __name__ == "__main__":
    main()
