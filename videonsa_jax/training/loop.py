"""The training run, from top to bottom."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from videonsa_jax.data.pipeline import DataIterator, build_pipeline, refuse_probing
from videonsa_jax.data.sources import DataError
from videonsa_jax.streams import Batch, TrainBatch
from videonsa_jax.training import checkpoints
from videonsa_jax.training.compiling import TimedJit, compiler_options
from videonsa_jax.training.config import Experiment
from videonsa_jax.training.environment import code_digest, environment, peak_gigabytes, versions
from videonsa_jax.training.errors import usage_errors
from videonsa_jax.training.export import EXPORT_FOLDER, export_model, model_of_state
from videonsa_jax.training.flops import peak_flops_per_second, train_flops, trained_parts
from videonsa_jax.training.frozen import split_params
from videonsa_jax.training.heldout import evaluate
from videonsa_jax.training.loading import place_agreed
from videonsa_jax.training.mesh import (
    check_batch_size,
    check_model_size,
    in_host_memory,
    loading_shard,
    make_mesh,
    place_batch,
    state_shardings,
)
from videonsa_jax.training.metrics import (
    METRICS_FILE,
    MetricsWriter,
    Progress,
    StepClock,
    StepTime,
    keep_metrics_until,
    read_metrics,
)
from videonsa_jax.training.optimizer import learning_rate, make_optimizer
from videonsa_jax.training.preemption import stop_requests
from videonsa_jax.training.pretrained import pretrained_params
from videonsa_jax.training.processes import check_agreement, fail_together
from videonsa_jax.training.profiling import StepProfiler
from videonsa_jax.training.report import REPORT_FILE, accuracies, write_report
from videonsa_jax.training.spikes import SPIKES_FILE, SpikeDetector, append_spike, spike_record
from videonsa_jax.training.step import (
    Params,
    Rows,
    Sums,
    accumulate,
    apply_gradients,
    choose_options,
    init_state,
    make_forward,
    make_losses,
    start_state,
    sums_like,
)

# What processes on several hosts may be told each in its own way.
FIELDS_OF_A_HOST = ("pretrained", "data.cache_dir", "data.video_root", "data.video_index", "data.workers")

EXIT_DONE = 0
EXIT_NOT_FINITE = 3
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


def expected_sums(trained: Params, accumulation: int, shardings: Sums) -> Sums:
    """Shapes of what `accumulate` returns, so that the update can compile before there is any.

    Args:
      trained: the trained parameters or their shapes.
      accumulation: `train.accumulation`.
      shardings: of the sums.
    """

    def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, np.float32 if accumulation > 1 else leaf.dtype)

    number, count = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.float32, np.int32))
    sums = dataclasses.replace(
        sums_like(jax.tree.map(shape_of, trained), number), visual_tokens=count, text_tokens=count
    )
    return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), sums, shardings)


@dataclass(frozen=True)
class StepInput:
    """The batches of one optimiser step.

    Attributes:
      batches: on the devices, or NumPy arrays where processes that load the same contexts have to agree on them first.
      failed_rows: of each batch, which contexts this process could not load.
      flops: of this process' share of them; None if they are not counted.
      loading_seconds: CPU seconds that loading this process' part took.
      iterator_state: the data iterator's, after them.
    """

    batches: list[TrainBatch]
    failed_rows: list[np.ndarray]
    flops: float | None
    loading_seconds: float
    iterator_state: dict[str, Any]


def fetch_step(
    iterator: DataIterator, accumulation: int, mesh: Mesh, count_flops: Callable[[Batch], float | None]
) -> StepInput:
    """Reads one optimiser step's batches, and places them unless other processes load the same contexts."""
    loading_before, shard = iterator.loading_seconds, loading_shard(mesh)
    batches, failed_rows = [], []
    for _ in range(accumulation):
        batches.append(next(iterator))
        failed_rows.append(iterator.failed_rows)
    counted = [count_flops(batch.inputs) for batch in batches]
    flops = None if None in counted else sum(counted) / len(shard.processes)
    loading = iterator.loading_seconds - loading_before
    if not shard.is_shared:
        batches = place_agreed(batches, failed_rows, mesh)
    return StepInput(batches, failed_rows, flops, loading, iterator.get_state())


def gather_figures(own: np.ndarray) -> np.ndarray:
    """A row of figures of each process, in order; a collective."""
    return own[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(own))


def gather_json(value: Any) -> list[Any]:
    """The JSON value of every process, in order; a collective."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.array(len(encoded))).max())
    padded = np.pad(encoded, (0, longest - len(encoded)), constant_values=ord(" "))
    return [json.loads(row.tobytes()) for row in multihost_utils.process_allgather(padded)]


def own_iterator_state(saved: list[dict[str, Any]]) -> dict[str, Any]:
    """This process' data iterator state, whatever number of processes saved theirs: any may own a skipped row now."""
    own = saved[min(jax.process_index(), len(saved) - 1)]
    return own | {"skips": [skip for state in saved for skip in state["skips"]]}


def bad_sample_ids(rows: list[Rows]) -> list[int]:
    """The samples whose own loss is not finite; all of the step's if only the gradient is not."""
    ids = np.concatenate([np.ravel(batch.sample_ids) for batch in rows])
    finite = np.isfinite(np.concatenate([np.ravel(batch.loss) for batch in rows]))
    bad = ids if finite.all() else ids[~finite]
    return sorted(set(bad[bad >= 0].tolist()))


def train(
    experiment: Experiment, workdir: Path, *, preempt_exit_code: int = EXIT_PREEMPTED, profile: range = range(0)
) -> int:
    """Trains, evaluates and reports; started again in the same folder, it goes on where it was.

    Args:
      experiment: what to do.
      workdir: folder of the run: checkpoints, `metrics.jsonl`, `spikes.jsonl`, `report.json`, `report.png`, `export`.
      preempt_exit_code: status after SIGTERM or Ctrl-C, once the state is saved.
      profile: numbers of the steps that a trace is written of, in the run's folder `profile`.

    Returns:
      The process' exit status: 0 when the last step is done and reported, 3 after a loss or gradient that is not
      finite (the state before that step is saved), else `preempt_exit_code`.

    Raises:
      UsageError: the experiment cannot run as it is told, or processes were not told the same.
      DataError: too many samples could not be read; on one host, the state is saved.
      SystemExit: SIGTERM or Ctrl-C while there was nothing to save; its status is `preempt_exit_code`.
    """
    config, seed = experiment.train, experiment.seed
    with stop_requests(preempt_exit_code) as stop, contextlib.ExitStack() as resources:
        # 1. Checks, and what an earlier start left. Nothing slow comes before them.
        with usage_errors():
            check_agreement(
                {"code": code_digest()} | versions() | checkpoints.flat_config(experiment, but=FIELDS_OF_A_HOST)
            )
            check_agreement({"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"})
        first_process = jax.process_index() == 0
        with fail_together():
            if experiment.pretrained and not Path(experiment.pretrained).is_dir():
                raise ValueError(f"pretrained is {experiment.pretrained!r}, expected a local Hugging Face folder")
            mesh = make_mesh(experiment.mesh)
            check_batch_size(experiment.data.contexts_per_batch, mesh)
            check_model_size(experiment.model.text.num_key_value_heads, mesh)
            compiler_options(mesh, sparse_cores=config.sparse_cores)
            shard = loading_shard(mesh)
            if profile and profile[-1] > config.steps:
                raise ValueError(f"--profile names step {profile[-1]}, expected at most train.steps ({config.steps})")
            if config.export and jax.process_count() > 1:
                raise ValueError(
                    f"train.export is {config.export!r} with {jax.process_count()} processes, expected nothing: run "
                    "experiments.export in one process afterwards"
                )
        with usage_errors():
            workdir.mkdir(parents=True, exist_ok=True)
            manager = checkpoints.open_checkpoints(workdir, config.keep, config.keep_every)
            resources.callback(manager.close)
            saved_step = manager.latest_step()
            if saved_step is not None:
                checkpoints.check_same_config(manager, saved_step, experiment)
        step = saved_step or 0
        progress = Progress(config.steps, step, enabled=first_process)
        resources.callback(progress.close)
        is_exported = not config.export or (workdir / EXPORT_FOLDER).exists()  # it appears when it is whole
        if step == config.steps and (workdir / REPORT_FILE).exists() and is_exported:
            progress.say(f"{workdir / REPORT_FILE} is complete; nothing to do")
            return EXIT_DONE

        # 2. Data.
        start = time.perf_counter()
        with fail_together():
            pipelines = {
                split: build_pipeline(
                    experiment.data,
                    experiment.model,
                    split=split,
                    seed=seed,
                    shard_index=shard.index,
                    shard_count=shard.count,
                    probe=refuse_probing if jax.process_count() > 1 else None,
                )
                for split in ("train", "heldout")
                if split == "train" or experiment.data.heldout
            }
        spent = {
            "data_seconds": time.perf_counter() - start,
            "compile_seconds": 0.0,
            "train_seconds": 0.0,
            "evaluation_seconds": 0.0,
            "saving_seconds": 0.0,
            "visual_tokens": 0,
            "text_tokens": 0,
        }
        iterator = pipelines["train"].iterator()
        resources.callback(iterator.close)
        with usage_errors():
            check_agreement({"index of the data": iterator.get_state().get("data")})

        # 3. State: shapes, then shardings, then arrays that are made (or loaded) where they belong.
        schedule = learning_rate(experiment.optimizer, config.steps)
        optimizer = make_optimizer(experiment.optimizer, config.steps, config.param_dtype)
        init = functools.partial(init_state, experiment.model, config, seed, optimizer)
        with usage_errors():
            shapes = jax.eval_shape(init)
            shardings = state_shardings(shapes, mesh, experiment.mesh.rules)
        if config.offload_optimizer:
            with usage_errors():
                on_host = in_host_memory(shapes.opt_state, shardings.opt_state)
            shardings = dataclasses.replace(shardings, opt_state=on_host)
        forward = make_forward(experiment.model, config, mesh)
        losses = make_losses(experiment.model, config, mesh)
        with usage_errors():  # an attention or kernel that does not cover this model says so when it is traced
            example = place_batch(pipelines["train"].empty_batch(pipelines["train"].shapes[0]), mesh)
            jax.eval_shape(losses, shapes.params, example)
        if saved_step is None:
            start = time.perf_counter()
            if experiment.pretrained:
                with usage_errors():
                    params = pretrained_params(experiment, shardings.params)
                begin = functools.partial(start_state, optimizer, config)
                # Frozen parameters that are rounded leave no use for their float32 values.
                donated = () if config.frozen and config.param_dtype != "float32" else 0
                state = jax.jit(begin, out_shardings=shardings, donate_argnums=donated)(params)
            else:
                state = jax.jit(init, out_shardings=shardings)()
            spent["compile_seconds"] += time.perf_counter() - start
        else:
            state, saved = checkpoints.restore(manager, saved_step, shapes, shardings)
            with usage_errors():
                iterator.set_state(own_iterator_state(saved["iterators"]))
            spent = {name: value + saved["spent"].get(name, 0) for name, value in spent.items()}
        iterator_state = iterator.get_state()

        # 4. The functions of a step. Each batch shape compiles once, when it is first met.
        replicated = NamedSharding(mesh, PartitionSpec())
        of_sums = sums_like(split_params(shardings.params, config.frozen)[0], replicated)
        add_batch = TimedJit(
            functools.partial(accumulate, losses, config),
            mesh,
            sparse_cores=config.sparse_cores,
            donate_argnums=1,
            out_shardings=(of_sums, replicated),
        )
        update = TimedJit(
            functools.partial(apply_gradients, optimizer, schedule, offloaded=config.offload_optimizer),
            mesh,
            sparse_cores=config.sparse_cores,
            donate_argnums=0,
            out_shardings=(shardings, replicated),
        )
        compiler = ThreadPoolExecutor(1, thread_name_prefix="compiler")
        resources.callback(compiler.shutdown, wait=False, cancel_futures=True)
        if step < config.steps:
            trained_shapes, _ = split_params(shapes.params, config.frozen)
            update.start_compiling(compiler, state, expected_sums(trained_shapes, config.accumulation, of_sums))
        choose = TimedJit(
            functools.partial(choose_options, forward),
            mesh,
            sparse_cores=config.sparse_cores,
            out_shardings=replicated,
        )

        def compile_seconds() -> float:
            return add_batch.seconds + update.seconds + choose.seconds

        def save() -> None:
            start = time.perf_counter()
            total = spent | {"compile_seconds": spent["compile_seconds"] + compile_seconds()}
            saved = {"iterators": gather_json(iterator_state), "spent": total}
            checkpoints.save(manager, step, state, saved, experiment)
            # What the loop stood still for: the files are written in the background.
            spent["saving_seconds"] += time.perf_counter() - start

        def evaluate_now(contexts: int = 0) -> dict[str, Any] | None:
            if "heldout" not in pipelines:
                return None
            batches = math.ceil(contexts / experiment.data.contexts_per_batch) if contexts else None
            start, compiled_before = time.perf_counter(), choose.seconds
            with contextlib.closing(pipelines["heldout"].iterator()) as questions:
                first = ((batch, questions.failed_rows) for batch in itertools.islice(questions, batches))
                right = evaluate(choose, state.params, first, mesh, stopped=stop.agreed)
            spent["evaluation_seconds"] += time.perf_counter() - start - (choose.seconds - compiled_before)
            if not right or stop.agreed():
                return None
            result = accuracies(right, pipelines["heldout"].records)
            by_family = {f"accuracy/{name}": row["accuracy"] for name, row in result["families"].items()}
            overall = result["overall"]
            writer.write("eval", step, {"accuracy": overall["accuracy"], "n": overall["n"], **by_family})
            progress.say(
                f"step {step}: held-out accuracy {overall['accuracy']:.3f} (n={overall['n']}, "
                f"chance {overall['chance']:.3f})"
            )
            return result

        # 5. The loop.
        if first_process:
            keep_metrics_until(workdir / METRICS_FILE, step)
            keep_metrics_until(workdir / SPIKES_FILE, step)
        with usage_errors():
            writer = MetricsWriter(workdir, tensorboard=config.tensorboard, enabled=first_process)
        resources.callback(writer.close)
        progress.say(
            f"{experiment.name}: {sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) / 1e6:.1f} M parameters, "
            f"{len(pipelines['train'].records)} questions, {mesh.size} x {jax.devices()[0].device_kind}, "
            f"steps {step} to {config.steps}"
        )
        reader = resources.enter_context(ThreadPoolExecutor(1, thread_name_prefix="batches"))
        trained = trained_parts(shapes.params, config.frozen)
        count_flops = functools.partial(train_flops, experiment.model, attention=config.attention, trained=trained)
        read = functools.partial(reader.submit, fetch_step, iterator, config.accumulation, mesh, count_flops)
        profiler = StepProfiler(profile, workdir, enabled=first_process)
        resources.callback(profiler.close)
        clock = StepClock(gather_figures, peak_flops_per_second([device.device_kind for device in mesh.devices.flat]))
        earlier = [line["loss"] for line in read_metrics(workdir / METRICS_FILE) if line["kind"] == "train"]
        spikes = SpikeDetector(config.spike_sigmas, earlier)
        stop.deferred = True
        reading = read() if step < config.steps else None
        while step < config.steps:
            start, compiled_before = time.perf_counter(), compile_seconds()
            profiler.begin(step + 1)
            try:
                fetched = reading.result()
            except DataError:
                if jax.process_count() == 1:  # saving takes all hosts, and the others did not fail
                    save()
                raise
            waiting = time.perf_counter() - start
            reading = read() if step + 1 < config.steps else None  # one step ahead, while the devices work

            sums, rows = None, []
            batches = fetched.batches
            if shard.is_shared:
                batches = place_agreed(batches, fetched.failed_rows, mesh)
            for batch in batches:
                sums, batch_rows = add_batch(state.params, sums, batch)
                rows.append(batch_rows)
            state, metrics = update(state, sums)
            host = time.perf_counter() - start - (compile_seconds() - compiled_before)
            metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
            if (trace := profiler.end(step + 1)) is not None:
                progress.say(f"step {step + 1}: wrote a trace, see it with: xprof {trace} (or tensorboard --logdir)")

            if not metrics.pop("finite"):
                save()  # `state` and `iterator_state` are still those before this step
                manager.wait_until_finished()
                progress.say(
                    f"step {step + 1}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} are not finite; "
                    f"samples {bad_sample_ids(rows)}; saved the state after step {step}"
                )
                return EXIT_NOT_FINITE
            step, iterator_state = step + 1, fetched.iterator_state

            seconds = time.perf_counter() - start - (compile_seconds() - compiled_before)
            tokens = {name: metrics[name] for name in ("visual_tokens", "text_tokens")}
            clock.add(StepTime(seconds, waiting, host, fetched.loading_seconds), flops=fetched.flops, **tokens)
            for name, value in {"train_seconds": seconds, **tokens}.items():
                spent[name] += value
            progress.step()
            if (spike := spikes.add(metrics["loss"])) is not None and first_process:
                record = spike_record(
                    step, metrics["loss"], metrics["grad_norm"], spike, rows, pipelines["train"].records
                )
                append_spike(workdir, record)
                progress.say(
                    f"step {step}: loss {metrics['loss']:.4f} stands out (median {spike.median:.4f}, sigma "
                    f"{spike.sigma:.4f}); its samples are in {workdir / SPIKES_FILE}"
                )
            if step % config.log_every == 0 or step in (1, config.steps):
                line = metrics | clock.read_and_reset() | {"peak_gigabytes": peak_gigabytes()}
                writer.write("train", step, line)
                progress.show(step, line)
            if config.save_every and step % config.save_every == 0:
                save()
            if config.eval_every and step % config.eval_every == 0 and step < config.steps:
                evaluate_now(config.eval_contexts)
            if stop.agreed():
                save()
                manager.wait_until_finished()
                progress.say(f"stopped by a signal after step {step}, saved; the same command goes on from here")
                return preempt_exit_code

        # 6. The end. With the last step saved, a signal has nothing left to spoil.
        save()
        manager.wait_until_finished()
        stop.deferred = False
        if stop.agreed():
            return preempt_exit_code
        accuracy = evaluate_now()
        if not is_exported:
            with usage_errors():
                export_model(experiment, model_of_state(experiment, state), workdir / EXPORT_FOLDER, config.export)
        if first_process:
            spent["compile_seconds"] += compile_seconds()
            summary = {
                "name": experiment.name,
                "steps": step,
                "accuracy": accuracy,
                "spent": spent,
                "data": {
                    "dropped": {split: pipeline.dropped for split, pipeline in pipelines.items()},
                    "contexts": iterator.failures.contexts,
                    "failed": dict(iterator.failures.counts),
                },
                "config": checkpoints.config_dict(experiment),
                **environment(),
            }
            write_report(workdir, summary, read_metrics(workdir / METRICS_FILE))
            progress.say(f"done: {workdir / REPORT_FILE}")
        return EXIT_DONE
