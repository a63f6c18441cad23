"""Records to batches: a deterministic schedule of steps, loaded by grain, resumable, the same on every host.

Bucket, contexts and epoch of a step follow from its number alone, which all hosts hold; a context that cannot be
loaded becomes a zero-weight row of the same shape. So hosts never disagree on shapes, whatever files they can read.

An epoch holds every context once: each bucket's contexts are permuted and cut into batches, the last one of a bucket
filled up with zero-weight rows, and the batches of all buckets are permuted. A held-out epoch is in file order.
"""

import dataclasses
import hashlib
import logging
import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grain
import jax
import numpy as np
from absl import flags

from videonsa_jax.configs import ModelConfig
from videonsa_jax.data.annotations import find_annotations, read_annotations
from videonsa_jax.data.chat import Chat, load_chat
from videonsa_jax.data.clips import make_clips
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.examples import (
    BatchShape,
    EvalBatch,
    as_batch,
    build_example,
    clear_row,
    empty_arrays,
    fill_row,
)
from videonsa_jax.data.frames import VideoError
from videonsa_jax.data.records import DataError, Record, join_turns, split_turns, too_many
from videonsa_jax.data.sources import Index, Padding, Probe, build_index, padding, probe_videos
from videonsa_jax.data.video_index import read_video_index
from videonsa_jax.streams import BATCH_AXIS_SECOND, TrainBatch

logger = logging.getLogger("videonsa_jax.data")

Split = Literal["train", "heldout"]

_ENDLESS = 2**40  # steps of a training split: any number no run reaches
_MAX_THREADS = 8
_WORKER_BUFFER = 2  # parts of batches
# What one worker loads at a time, about: a context of 14 K visual tokens alone has 66 MB of patches.
_PART_BYTES = 2**26
_CLOSE_SECONDS = 5.0
# Bytes. Smaller arrays travel through the queue's pipe, which must hold all that a worker buffers: a worker that waits
# for room in it cannot end, and grain (0.2.18, process_prefetch.py) then waits for the worker.
_SHARED_MEMORY_FROM = 2**11
_STATE_VERSION = 1


class Schedule:
    """Which contexts make up which step.

    Args:
      buckets: the context numbers of each bucket.
      contexts_per_batch: B, over all hosts.
      seed: of the order of an epoch; None keeps file order.
    """

    def __init__(self, buckets: list[list[int]], contexts_per_batch: int, seed: int | None):
        self._buckets = [np.asarray(bucket, np.int64) for bucket in buckets]
        self._size, self._seed = contexts_per_batch, seed
        self._epoch: tuple[int, list[tuple[int, np.ndarray]]] | None = None
        self.steps_per_epoch = sum(-(-len(bucket) // contexts_per_batch) for bucket in buckets)

    def step(self, step: int) -> tuple[int, np.ndarray]:
        """(bucket, the context number of each row or -1 for one that fills up) of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        known = self._epoch
        if known is None or known[0] != epoch:  # several threads may do this at once, with the same result
            known = self._epoch = epoch, self._batches(epoch)
        return known[1][place]

    def _batches(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        batches = []
        for number, bucket in enumerate(self._buckets):
            if self._seed is not None:
                bucket = np.random.default_rng((self._seed, epoch, number)).permutation(bucket)
            fill = np.full(-len(bucket) % self._size, -1, np.int64)
            batches += [(number, rows) for rows in np.concatenate([bucket, fill]).reshape(-1, self._size)]
        if self._seed is None:
            return batches
        order = np.random.default_rng((self._seed, epoch, len(self._buckets))).permutation(len(batches))
        return [batches[place] for place in order]


@dataclass(frozen=True)
class _Loader:
    """Loads this host's rows of a step in parts of `rows_per_part`; runs in loader threads or processes.

    Element n is part n % parts of step n // parts.
    """

    index: Index
    chat: Chat
    config: DataConfig
    model: ModelConfig
    schedule: Schedule
    shapes: tuple[BatchShape, ...]
    rows: range
    rows_per_part: int
    answered: bool

    @property
    def parts(self) -> int:
        return -(-len(self.rows) // self.rows_per_part)

    def __call__(self, element: int) -> dict:
        start = time.thread_time()  # decoders are told to use no threads of their own
        step, part = divmod(element, self.parts)
        bucket, contexts = self.schedule.step(step)
        rows = self.rows[part * self.rows_per_part : (part + 1) * self.rows_per_part]
        arrays = empty_arrays(dataclasses.replace(self.shapes[bucket], contexts=len(rows)))
        failures, seen = [], 0
        for place, row in enumerate(rows):
            if contexts[row] < 0:
                continue
            context = self.index.contexts[contexts[row]]
            seen += 1
            try:
                example = build_example(
                    context, self.index.records, self.chat, self.config, self.model, answered=self.answered
                )
            except VideoError as error:
                failures.append({"row": row, "records": str(context.records), "message": str(error)})
            else:
                fill_row(arrays, place, example)
        return {"arrays": arrays, "failures": failures, "seen": seen, "seconds": time.thread_time() - start}


@dataclass
class Failures:
    """What went wrong on this host so far.

    Attributes:
      contexts: contexts asked for.
      counts: failed contexts: "video" could not be used, "replayed" failed before the run was resumed.
      messages: the last few reasons.
    """

    contexts: int = 0
    counts: Counter = field(default_factory=Counter)
    messages: deque = field(default_factory=lambda: deque(maxlen=10))


@dataclass(frozen=True)
class Pipeline:
    """A split, indexed and ready to iterate.

    Attributes:
      records: the good records; sample ids are their indices.
      shapes: every shape of this process' batches, for compiling ahead.
      contexts_per_bucket: how many contexts of an epoch have each of these shapes.
      steps_per_epoch: batches in an epoch.
      dropped: records left out, by reason.
      dropped_videos: videos left out with all their records, by reason.
      padding: shares of the batches that only fill up.
      vocab_size: of the tokenizer.
    """

    records: tuple[Record, ...]
    shapes: tuple[BatchShape, ...]
    contexts_per_bucket: tuple[int, ...]
    steps_per_epoch: int
    dropped: dict[str, int]
    dropped_videos: dict[str, int]
    padding: Padding
    vocab_size: int
    chat: Chat
    _loader: _Loader
    _split: Split
    _fingerprint: str

    def iterator(self) -> "DataIterator":
        """An iterator from the first step: endless for training, one epoch of the held-out split."""
        return DataIterator(self)

    def empty_batch(self, shape: BatchShape) -> TrainBatch | EvalBatch:
        """A batch of `shape` whose rows all fill up."""
        return as_batch(empty_arrays(shape))


class DataIterator:
    """Yields this process' rows of the global batches, as NumPy arrays; close it when done.

    Attributes:
      failures: what went wrong so far.
      failed_rows: [rows], which of the last batch only fill up because they could not be loaded, now or before the run
        was resumed.
      loading_seconds: CPU seconds that loader threads or processes have spent on what was yielded so far.
    """

    def __init__(self, pipeline: Pipeline):
        self._pipeline = pipeline
        self._source: Iterator[dict] | None = None
        self._next_step = 0
        self._skips: dict[tuple[int, int], str] = {}
        self._warned: set[str] = set()
        self.failures = Failures()
        self.failed_rows = np.zeros(len(pipeline._loader.rows), bool)
        self.loading_seconds = 0.0

    def __iter__(self) -> "DataIterator":
        return self

    def __next__(self) -> TrainBatch | EvalBatch:
        """The next batch.

        Raises:
          DataError: more contexts than the allowed share failed.
          StopIteration: the held-out split is through.
        """
        if self._source is None:
            self._source = self._open()
        element = self._read_step()
        step, self._next_step = self._next_step, self._next_step + 1
        self.failures.contexts += element["seen"]
        self.loading_seconds += element["seconds"]
        failed = {failure["row"] for failure in element["failures"]}
        rows = self._pipeline._loader.rows
        replayed = {row for row in rows if (step, row) in self._skips} - failed
        for row in replayed:
            clear_row(element["arrays"], row - rows.start)
            self.failures.counts["replayed"] += 1
        self.failed_rows = np.array([row in failed | replayed for row in rows])
        for failure in element["failures"]:
            self._skips[step, failure["row"]] = failure["records"]
            self._report(failure["message"])
        self._check_share()
        return as_batch(element["arrays"])

    def _read_step(self) -> dict:
        """The arrays and failures of all parts of the next step."""
        loader = self._pipeline._loader
        elements = [next(self._source) for _ in range(loader.parts)]
        arrays = [element["arrays"] for element in elements]
        if loader.config.workers or len(arrays) > 1:
            # Also of one part: arrays in grain's shared memory must not outlive the interpreter's last modules.
            whole = {
                name: np.concatenate([part[name] for part in arrays], axis=1 if name in BATCH_AXIS_SECOND else 0)
                for name in arrays[0]
            }
        else:
            (whole,) = arrays
        failures = [failure for element in elements for failure in element["failures"]]
        totals = {name: sum(element[name] for element in elements) for name in ("seen", "seconds")}
        return {"arrays": whole, "failures": failures, **totals}

    def get_state(self) -> dict:
        """Where the iterator stands and what it skipped, ready for JSON; hosts save their own."""
        return {
            "version": _STATE_VERSION,
            "data": self._pipeline._fingerprint,
            "next_step": self._next_step,
            "skips": [[step, row, records] for (step, row), records in self._skips.items()],
            "contexts": self.failures.contexts,
            "failed": dict(self.failures.counts),
        }

    def set_state(self, state: dict) -> None:
        """Goes on where `get_state` was called; a row that was skipped then is skipped again.

        Raises:
          DataError: the state was saved with other data or settings that decide the batches.
        """
        seen = state.get("version"), state.get("data")
        if seen != (_STATE_VERSION, self._pipeline._fingerprint):
            raise DataError(
                f"saved data state has version and data {seen}, expected "
                f"{(_STATE_VERSION, self._pipeline._fingerprint)}: records, seed, batch sizes or sampling changed"
            )
        self.close()
        self._next_step = state["next_step"]
        self._skips = {(step, row): records for step, row, records in state["skips"]}
        self.failures = Failures(contexts=state["contexts"], counts=Counter(state["failed"]))

    def close(self) -> None:
        """Ends loader threads and processes."""
        if self._source is not None:
            # Should a worker not end in time (see _SHARED_MEMORY_FROM), a daemon thread goes on waiting for it.
            closing = threading.Thread(target=self._source.close, daemon=True)
            closing.start()
            closing.join(_CLOSE_SECONDS)
            self._source = None

    def _open(self) -> Iterator[dict]:
        pipeline, workers = self._pipeline, self._pipeline._loader.config.workers
        end = _ENDLESS if pipeline._split == "train" else pipeline.steps_per_epoch
        parts = pipeline._loader.parts
        steps = grain.MapDataset.range(min(self._next_step, end) * parts, end * parts).map(pipeline._loader)
        if workers:
            if not flags.FLAGS.is_parsed():  # grain's multiprocessing reads absl flags, also in programs without absl
                flags.FLAGS.mark_as_parsed()
            dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
            options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_WORKER_BUFFER)
            sharing = grain.experimental.DatasetOptions(min_shm_size=_SHARED_MEMORY_FROM)
            dataset = grain.experimental.WithOptionsIterDataset(dataset, sharing)
            return iter(dataset.mp_prefetch(options, worker_init_fn=_stay_off_accelerators))
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        return iter(steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)))

    def _report(self, message: str) -> None:
        self.failures.counts["video"] += 1
        self.failures.messages.append(message)
        if message not in self._warned:
            self._warned.add(message)
            total = self.failures.counts.total()
            logger.warning("%s (%d of %d contexts failed)", message, total, self.failures.contexts)

    def _check_share(self) -> None:
        failed, contexts = self.failures.counts.total(), self.failures.contexts
        share = self._pipeline._loader.config.max_failure_share
        if too_many(failed, contexts, share):
            last = self.failures.messages[-1] if self.failures.messages else "none in this run"
            raise DataError(
                f"{failed} of {contexts} contexts failed, expected at most a share of {share:g} (max_failure_share); "
                f"the last: {last}"
            )


def _stay_off_accelerators(worker: int, workers: int) -> None:
    """Runs first in every loader process."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")  # jax has read the variable when it was imported


def _files(config: DataConfig, split: Split) -> tuple[str, str, Path]:
    """(where its records are, folder of its videos or "" for their own, tokenizer.json)."""
    source = config.source if split == "train" else config.heldout
    if not source:
        raise DataError(f"DataConfig: {split} split is empty, expected 'clips' or the path of a JSON file")
    clips = make_clips(config.clips, config.cache_dir) if "clips" in (source, config.tokenizer or "clips") else None
    tokenizer = Path(config.tokenizer) if config.tokenizer else clips.tokenizer_json
    if source != "clips":
        return source, config.video_root, tokenizer
    return str(clips.train_json if split == "train" else clips.heldout_json), str(clips.root), tokenizer


def split_records(config: DataConfig, split: Split) -> tuple[list[Record], Counter[str]]:
    """A split's records, and the number of those that its files hold beside them, by reason.

    Raises:
      DataError: the files cannot be used, or there are none.
    """
    source, root, _ = _files(config, split)
    records, dropped = read_annotations(
        find_annotations(source, root),
        config.kinds,
        needs_options=split == "heldout",
        max_failure_share=config.max_failure_share,
    )
    return (split_turns(records) if split == "train" and config.split_turns else records), dropped


def open_chat(config: DataConfig, split: Split = "train") -> Chat:
    """The tokenizer and template that a split's text goes through; ChatError where the tokenizer cannot be read."""
    return load_chat(_files(config, split)[2], system_prompt=config.system_prompt)


def _check(config: DataConfig, shard_index: int, shard_count: int) -> None:
    def require(holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise DataError(f"DataConfig: {name} is {getattr(config, name)}, expected {expected}")

    require(config.fps > 0, "fps", "more than 0")
    require(0 < config.min_pixels <= config.max_pixels, "min_pixels", f"1 to max_pixels ({config.max_pixels})")
    counts = ("max_frames", "fewest_frames", "questions_per_context", "questions_per_row", "contexts_per_batch")
    for name in (*counts, "max_text_tokens", "max_visual_tokens", "max_buckets"):
        require(getattr(config, name) >= 1, name, "at least 1")
    most = config.most_frames
    require(most == 0 or most >= config.fewest_frames, "most_frames", f"0, or at least {config.fewest_frames}")
    require(config.workers >= 0, "workers", "a number of processes, or 0 for threads")
    require(config.frame_cache_gigabytes >= 0, "frame_cache_gigabytes", "a limit, or 0 for no cache")
    require(0 <= config.max_failure_share <= 1, "max_failure_share", "0 to 1")
    require(all(length >= 1 for length in config.buckets), "buckets", "positive lengths")
    require(
        config.contexts_per_batch % shard_count == 0,
        "contexts_per_batch",
        f"a multiple of the {shard_count} shards that hosts load",
    )
    if not 0 <= shard_index < shard_count:
        raise DataError(f"shard_index is {shard_index}, expected 0 to {shard_count - 1}")


def _check_options(records: tuple[Record, ...], chat: Chat) -> None:
    for record in records:
        first = [chat.encode(option)[0] for option in record.options]
        if len(set(first)) < len(first):
            raise DataError(
                f"record {record.id}: options {list(record.options)} share a first token, expected distinct ones"
            )


def refuse_probing(videos: list[str]) -> list[str]:
    """The `probe` of hosts that might find different things in what should be one file."""
    raise DataError(
        f"{videos[0]} and {len(videos) - 1} more: their records state no width, height and duration, expected them "
        "where several processes load, or data.video_index (python -m experiments.index builds it)"
    )


def build_pipeline(
    config: DataConfig,
    model: ModelConfig,
    *,
    split: Split,
    seed: int,
    shard_index: int = 0,
    shard_count: int = 1,
    probe: Probe | None = None,
) -> Pipeline:
    """Indexes a split.

    Args:
      config: where samples come from and how they become arrays.
      model: token sizes, M-RoPE rule, vocabulary.
      split: "train" (`config.source`, shuffled, endless) or "heldout" (`config.heldout`, in file order, once).
      seed: of the training order.
      shard_index: which part of every batch this host loads.
      shard_count: parts, of contexts_per_batch / shard_count consecutive rows each.
      probe: says what videos hold of which neither the video index nor their records do; None reads their headers
        here, unless there are several shards. It must give all hosts the same answer.

    Raises:
      DataError: settings, records or options cannot be used.
      ChatError: likewise the tokenizer.
    """
    _check(config, shard_index, shard_count)
    answered = split == "train"
    tokenizer = _files(config, split)[2]
    chat = load_chat(tokenizer, system_prompt=config.system_prompt)
    if chat.vocab_size > model.text.vocab_size:
        raise DataError(
            f"{tokenizer}: {chat.vocab_size} tokens, expected at most the model's vocab_size {model.text.vocab_size}"
        )
    records, dropped = split_records(config, split)
    if answered and config.questions_per_row > 1:
        records = join_turns(records, config.questions_per_row)
    probe = probe or (probe_videos if shard_count == 1 else refuse_probing)
    indexed = read_video_index(config.video_index) if config.video_index else None
    index = build_index(records, chat, config, model, answered=answered, probe=probe, indexed=indexed)
    if not answered:
        _check_options(index.records, chat)
    rows = config.contexts_per_batch // shard_count
    shapes = tuple(
        BatchShape(
            contexts=rows,
            questions=config.questions_per_context,
            text_tokens=index.text_tokens,
            visual_tokens=bucket.visual_tokens,
            frames=bucket.frames,
            patches=bucket.patches,
            patch_dim=model.vision.patch_dim,
            options=0 if answered else max(len(record.options) for record in index.records),
        )
        for bucket in index.buckets
    )
    members = [
        [number for number, context in enumerate(index.contexts) if context.bucket == bucket]
        for bucket in range(len(index.buckets))
    ]
    schedule = Schedule(members, config.contexts_per_batch, seed if answered else None)
    loader = _Loader(
        index=index,
        chat=chat,
        config=config,
        model=model,
        schedule=schedule,
        shapes=shapes,
        rows=range(shard_index * rows, (shard_index + 1) * rows),
        rows_per_part=max(1, _PART_BYTES // max(math.prod((s.frames, s.patches, s.patch_dim)) for s in shapes)),
        answered=answered,
    )
    sampling = config.contexts_per_batch, config.questions_per_row, config.fps, config.max_frames, config.ablation
    decides = split, seed, sampling, index.buckets
    batches = [(context.records, context.visual, context.bucket) for context in index.contexts]
    return Pipeline(
        records=index.records,
        shapes=shapes,
        contexts_per_bucket=tuple(map(len, members)),
        steps_per_epoch=schedule.steps_per_epoch,
        dropped={**index.dropped, **dropped},
        dropped_videos=dict(index.dropped_videos),
        padding=padding(index, config, model.vision.spatial_merge_size**2),
        vocab_size=chat.vocab_size,
        chat=chat,
        _loader=loader,
        _split=split,
        _fingerprint=hashlib.sha256(repr((decides, batches)).encode()).hexdigest()[:16],
    )
