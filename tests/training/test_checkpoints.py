import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_fakes import tiny_experiment

from videonsa_jax.configs import tiny
from videonsa_jax.training import checkpoints
from videonsa_jax.training.config import MeshConfig, TrainConfig
from videonsa_jax.training.mesh import make_mesh, state_shardings

STATE = {"step": jnp.zeros((), jnp.int32), "params": {"kernel": jnp.arange(6.0).reshape(2, 3)}}


def restore(manager, step: int):
    shardings = state_shardings(STATE, make_mesh(MeshConfig(), jax.devices()[:1]))
    return checkpoints.restore(manager, step, STATE, shardings)


def test_state_and_progress_come_back_and_old_steps_go(tmp_path: Path) -> None:
    manager = checkpoints.open_checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 3):
        state = jax.tree.map(lambda leaf, step=step: leaf + step, STATE)
        checkpoints.save(manager, step, state, {"iterators": [{"next_step": step}]}, tiny_experiment())
    manager.close()
    manager = checkpoints.open_checkpoints(tmp_path, keep=2)
    assert manager.all_steps() == [2, 3]
    state, progress = restore(manager, 2)
    np.testing.assert_array_equal(state["params"]["kernel"], STATE["params"]["kernel"] + 2)
    assert state["step"] == 2
    assert progress == {"iterators": [{"next_step": 2}]}
    manager.close()


def test_every_so_many_steps_a_checkpoint_is_kept_for_good(tmp_path: Path) -> None:
    with checkpoints.open_checkpoints(tmp_path, keep=2, keep_every=3) as manager:
        for step in range(1, 9):
            checkpoints.save(manager, step, STATE, {}, tiny_experiment())
        manager.wait_until_finished()
        assert manager.all_steps() == [3, 6, 7, 8]
    with pytest.raises(ValueError, match=r"train\.keep_every is 5, expected a multiple of save_every \(2\)"):
        tiny_experiment(keep_every=5)


def test_a_step_that_takes_the_state_over_does_not_wait_for_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    with checkpoints.open_checkpoints(tmp_path, keep=1) as manager:
        monkeypatch.setattr(manager, "save", lambda step, args, force: saved.append(args.state.item))
        checkpoints.save(manager, 1, STATE, {}, tiny_experiment())
    jax.tree.map(np.testing.assert_array_equal, saved[0], STATE)
    for copy, original in zip(jax.tree.leaves(saved[0]), jax.tree.leaves(STATE), strict=True):
        assert copy.unsafe_buffer_pointer() != original.unsafe_buffer_pointer()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, r"seed was 0 and is 1"),
        ({"model": dataclasses.replace(tiny(), nsa=None)}, r"model\.nsa was 'absent' and is None"),
        ({"seed": 1, "model": tiny()}, r"model\.nsa\.block_count was 2 and is 5; .*; seed was 0 and is 1"),
    ],
)
def test_a_config_that_differs_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    manager = checkpoints.open_checkpoints(tmp_path, keep=1)
    experiment = tiny_experiment()
    checkpoints.save(manager, 1, STATE, {}, experiment)
    manager.wait_until_finished()
    checkpoints.check_same_config(manager, 1, experiment)
    checkpoints.check_same_config(manager, 1, dataclasses.replace(experiment, name="x", mesh=MeshConfig(fsdp=4)))
    with pytest.raises(ValueError, match=message):
        checkpoints.check_same_config(manager, 1, dataclasses.replace(experiment, **change))
    manager.close()


def test_remat_may_change_and_its_old_switch_is_explained(tmp_path: Path) -> None:
    old = TrainConfig()
    object.__setattr__(old, "remat", True)  # the type checker of the tests stands before the constructor
    with pytest.raises(ValueError, match=r'train\.remat is True, expected one of none, full, .* True is now "full"'):
        old.__post_init__()
    experiment = tiny_experiment()
    config = checkpoints.config_dict(experiment)
    config["train"]["remat"] = False
    with checkpoints.open_checkpoints(tmp_path, keep=1) as manager:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoints, "config_dict", lambda _: config)
            checkpoints.save(manager, 1, STATE, {}, experiment)
        manager.wait_until_finished()
        checkpoints.check_same_config(manager, 1, tiny_experiment(remat="full"))


KILLED_WHILE_SAVING = """
import os, signal, sys
import jax, jax.numpy as jnp
from pathlib import Path
from videonsa_jax.training import checkpoints
from videonsa_jax.training.config import Experiment

workdir = Path(sys.argv[1])
manager = checkpoints.open_checkpoints(workdir, keep=1)
state = {"weights": jnp.zeros((64, 2**18)), "step": jnp.int32(1)}  # 64 MiB: a save takes a while
checkpoints.save(manager, 1, state, {"iterators": []}, Experiment())
manager.wait_until_finished()
state = jax.tree.map(lambda leaf: leaf + 1, state)
checkpoints.save(manager, 2, state, {"iterators": []}, Experiment())
while not any(path.name != "1" for path in (workdir / "checkpoints").iterdir()):
    pass
print(sorted(path.name for path in (workdir / "checkpoints").iterdir()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_saving_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "1" in killed.stdout
    manager = checkpoints.open_checkpoints(tmp_path, keep=1)
    assert manager.latest_step() == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]  # the torn one is cleared away
    state = {"weights": jax.ShapeDtypeStruct((64, 2**18), jnp.float32), "step": jax.ShapeDtypeStruct((), jnp.int32)}
    shardings = state_shardings(state, make_mesh(MeshConfig(), jax.devices()[:1]))
    restored, _ = checkpoints.restore(manager, 1, state, shardings)
    assert restored["step"] == 1
    assert not np.asarray(restored["weights"]).any()
    checkpoints.save(manager, 2, restored, {"iterators": []}, tiny_experiment())  # and the step can be saved again
    manager.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
