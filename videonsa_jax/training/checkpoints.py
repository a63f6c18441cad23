"""Checkpoints: state, data iterator and config together, a folder per step that is renamed into place when whole."""

import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from videonsa_jax.training.config import Experiment

# Fields that change how a run goes on, but not what it computes (up to the rounding of another mesh or kernel).
FREE_FIELDS = (
    "name",
    "mesh",
    "train.kernel",
    "train.remat",
    "train.vision_remat",
    "train.loss_chunk",
    "train.offload_optimizer",
    "train.sparse_cores",
    "train.log_every",
    "train.eval_every",
    "train.eval_contexts",
    "train.save_every",
    "train.keep",
    "train.keep_every",
    "train.spike_sigmas",
    "train.export",
    "train.tensorboard",
    "data.video_root",
    "data.video_index",
    "data.cache_dir",
    "data.workers",
    "data.max_failure_share",
    "data.decode_seconds",
    "data.clips.render_workers",
)

# Fields that earlier versions did not have, with the value that stands for what they did.
LATER_FIELDS = {
    "train.param_dtype": "float32",
    "optimizer.moment_dtype": "float32",
    "train.frozen": [],
    "data.kinds": ["open_ended", "multi_choice"],
    "data.split_turns": False,
    "data.fewest_frames": 1,
    "data.most_frames": 0,
    "data.resize": "pillow",
    "data.max_buckets": 4,
}


def open_checkpoints(workdir: Path, keep: int, keep_every: int = 0) -> ocp.CheckpointManager:
    """The checkpoints of a run; what a killed save left behind is removed.

    Args:
      workdir: folder of the run.
      keep: latest ones that are kept.
      keep_every: those of the steps that this divides are kept too; 0: no others.
    """
    folder = (workdir / "checkpoints").resolve()
    if jax.process_index() == 0:
        # Orbax's own clearing runs in a thread that an early exit breaks off with a traceback.
        for torn in folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(torn)
    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
    options = ocp.CheckpointManagerOptions(preservation_policy=policies.AnyPreservationPolicy(kept))
    return ocp.CheckpointManager(folder, options=options)


def config_dict(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON has it: tuples become lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(entry) for name, entry in value.items()}
        return [plain(entry) for entry in value] if isinstance(value, tuple) else value

    return plain(asdict(config))


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, progress: Mapping[str, Any], experiment: Experiment
) -> None:
    """Saves in the background; does nothing if this step is saved already.

    Args:
      manager: from `open_checkpoints`.
      step: optimiser steps done.
      state: pytree of arrays; free to be donated as soon as this returns.
      progress: JSON values that go with it: the data iterator's state and the time spent.
      experiment: what the run was told.
    """
    if step in manager.all_steps():
        return
    if any(device.platform == "cpu" for leaf in jax.tree.leaves(state) for device in leaf.devices()):
        # Host copies of a CPU's arrays are the arrays themselves: the next step, to which they are donated, would wait
        # until the files are written.
        state = jax.tree.map(jnp.copy, state)
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            progress=ocp.args.JsonSave(dict(progress)),
            config=ocp.args.JsonSave(config_dict(experiment)),
        ),
        force=True,
    )


def restore(
    manager: ocp.CheckpointManager, step: int, abstract_state: Any, shardings: Any
) -> tuple[Any, dict[str, Any]]:
    """Loads a checkpoint's state and progress.

    Args:
      manager: from `open_checkpoints`.
      step: one of its steps.
      abstract_state: shapes and dtypes expected.
      shardings: where the arrays go; any mesh, whatever the saving one was.

    Returns:
      The state on the devices, and the progress saved with it.
    """
    target = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state,
        shardings,
    )
    restored = manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(target), progress=ocp.args.JsonRestore()),
    )
    return restored.state, restored.progress


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        flat |= _flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return flat


def flat_config(experiment: Experiment, but: Collection[str] = ()) -> dict[str, Any]:
    """The values of an experiment's fields by their dotted paths, as JSON has them, without the fields `but`."""
    return {path: value for path, value in _flatten(config_dict(experiment)).items() if path not in but}


def check_same_config(manager: ocp.CheckpointManager, step: int, experiment: Experiment) -> None:
    """Raises a ValueError naming the fields if the checkpoint belongs to another computation."""
    config = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore())).config
    saved = LATER_FIELDS | _flatten(config)
    wanted = flat_config(experiment)
    absent = "absent"
    different = [
        f"{path} was {saved.get(path, absent)!r} and is {wanted.get(path, absent)!r}"
        for path in sorted(saved | wanted)
        if saved.get(path, absent) != wanted.get(path, absent)
        and not any(path == free or path.startswith(f"{free}.") for free in FREE_FIELDS)
    ]
    if different:
        raise ValueError(
            f"{manager.directory} holds step {step} of a run with another config: {'; '.join(different)}; "
            "use another --workdir or the old values"
        )
