"""How processes find each other, and that they notice where they differ; each is a process of its own here."""

import pytest
from together import run_together

from videonsa_jax.training import processes
from videonsa_jax.training.processes import Place, join, parse_place, place_in_environment

TORCHRUN = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "WORLD_SIZE": "16", "RANK": "9"}


def test_torchrun_variables_name_the_place() -> None:
    assert place_in_environment({}) is None
    assert place_in_environment(TORCHRUN | {"WORLD_SIZE": "1"}) is None
    assert place_in_environment(TORCHRUN) == Place("node0:29500", 16, 9, None)
    # One process per GPU: each takes its own. torchrun's agent listens at MASTER_PORT itself.
    local = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert place_in_environment(TORCHRUN | local) == Place("node0:29501", 16, 9, 1)
    assert place_in_environment(TORCHRUN | local | {"LOCAL_WORLD_SIZE": "1"}).local_device is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set where WORLD_SIZE is 16, expected process 0's host"),
        ({"RANK": ""}, "RANK is not set where WORLD_SIZE is '16', expected a number"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http' where WORLD_SIZE is '16', expected a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' where"),
        ({"RANK": "16"}, "WORLD_SIZE and RANK: process 16 of 16, expected an index below the number"),
    ],
)
def test_variables_that_name_no_place_are_told(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        place_in_environment(TORCHRUN | change)


def test_an_address_names_the_place() -> None:
    assert parse_place("node0:1234,4,3") == Place("node0:1234", 4, 3)
    for wrong in ("node0", "node0,4,3", "node0:1234,4", "node0:1234,4,x"):
        with pytest.raises(ValueError, match="expected HOST:PORT,COUNT,INDEX"):
            parse_place(wrong)
    with pytest.raises(ValueError, match="process 4 of 4"):
        parse_place("node0:1234,4,4")


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, False),  # of a job, but in none of its tasks
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "host0,host1"}, True),
        ({"MEGASCALE_NUM_SLICES": "2", "TPU_WORKER_HOSTNAMES": "host0"}, True),
    ],
)
def test_jax_is_asked_where_a_launcher_started_several(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], asked: bool
) -> None:
    calls = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *place, **_: calls.append(place))
    assert join(None, variables) == asked
    assert calls == [()] * asked
    assert not join("off", variables)
    assert join(None, variables | TORCHRUN)
    assert calls[-1] == ("node0:29500", 16, 9, None)


def test_a_launcher_that_is_asked_for_and_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(**_: object) -> None:
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match=r"no other processes found \(coordinator_address .*--multihost=HOST:PORT"):
        join("", {})


DISAGREE = """
import dataclasses, sys
from pathlib import Path
from training_fakes import tiny_experiment
from videonsa_jax.training import loop, processes
from videonsa_jax.training.errors import UsageError

assert processes.join(None)
loop.code_digest = lambda: "{code}"
try:
    loop.train(tiny_experiment(steps={steps}), Path("never made"))
except UsageError as error:
    print(error)
    sys.exit(2)
"""

FAIL = """
import sys
from videonsa_jax.training.errors import UsageError
from videonsa_jax.training.processes import check_agreement, fail_together, join

assert join(None)
check_agreement({{"a": 1}})
try:
    with fail_together():
        if {fails}:
            raise ValueError("v.mp4: no such file")
except UsageError as error:
    print(error)
    sys.exit(2)
"""


def test_processes_that_differ_say_so_at_once_and_alike() -> None:
    same, other = DISAGREE.format(steps=6, code="c0de"), DISAGREE.format(steps=7, code="beef")
    expected = (
        "processes disagree: code is 'c0de' on process 0 and 'beef' on process 1; train.steps is 6 on process 0 and 7 "
        "on process 1; start them all with the same\n"
    )
    assert run_together([same, other]) == [(2, expected)] * 2


def test_what_one_process_cannot_do_ends_all() -> None:
    scripts = [FAIL.format(fails=fails) for fails in (False, True)]
    assert run_together(scripts) == [(2, "process 1: v.mp4: no such file\n"), (2, "v.mp4: no such file\n")]


def test_a_process_that_waits_in_vain_says_for_what() -> None:
    script = "from videonsa_jax.training import processes; processes.JOIN_SECONDS = 1; processes.join(None)"
    ((status, said),) = run_together([script], WORLD_SIZE="2")
    assert status == 2
    assert "error: waited 1 s for the other processes as process 0 of 2 at localhost:" in said
    assert said.count("\n") == 1


def test_a_wrong_number_of_processes_is_told() -> None:
    script = """
import os, sys
os.environ["WORLD_SIZE"] = "{count}"
from videonsa_jax.training.processes import check_agreement, join
join(None)
try:
    check_agreement({{}})
except ValueError as error:
    print(error)
    sys.exit(2)
"""
    answers = run_together([script.format(count=2), script.format(count=3)])
    expected = (
        "processes disagree: number of processes is 2 on process 0 and 3 on process 1; start them all with the same\n"
    )
    assert answers == [(2, expected)] * 2
