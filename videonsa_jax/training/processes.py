"""Several processes that train together: how they find each other, and that they are about the same run.

What they tell each other here goes through JAX's coordination service, not through devices: it works before the first
array is made, and where processes disagree on their devices.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from videonsa_jax.training.errors import UsageError, usage_errors

JOIN_SECONDS = 300  # as `jax.distributed.initialize`
_ANSWER_SECONDS = 120
_DAY = 86_400

# Launchers that JAX knows, by a variable from which it can be seen without asking a server that there are several
# processes, and how.
_LAUNCHERS = {
    "SLURM_STEP_NODELIST": lambda variables: variables.get("SLURM_NTASKS", "1") != "1",
    "OMPI_COMM_WORLD_SIZE": lambda variables: variables["OMPI_COMM_WORLD_SIZE"] != "1",
    "TPU_WORKER_HOSTNAMES": lambda variables: "," in variables["TPU_WORKER_HOSTNAMES"],
    "MEGASCALE_NUM_SLICES": lambda variables: variables["MEGASCALE_NUM_SLICES"] != "1",
}


@dataclass(frozen=True)
class Place:
    """A process among those that train together.

    Attributes:
      coordinator: HOST:PORT of process 0, where nothing else may listen.
      count: processes.
      index: this one's.
      local_device: the one device of its host that is this process'; None: all of them.
    """

    coordinator: str
    count: int
    index: int
    local_device: int | None = None


def parse_place(address: str) -> Place:
    """Reads "HOST:PORT,COUNT,INDEX"; ValueError if it is something else."""
    coordinator, *numbers = address.split(",")
    if ":" not in coordinator or len(numbers) != 2 or not all(number.isdigit() for number in numbers):
        raise ValueError(f"--multihost is {address!r}, expected HOST:PORT,COUNT,INDEX")
    return _checked(Place(coordinator, int(numbers[0]), int(numbers[1])), "--multihost")


def place_in_environment(variables: Mapping[str, str]) -> Place | None:
    """The place that torchrun's variables name, which other launchers set as well; None if there is one process.

    MASTER_ADDR, MASTER_PORT, WORLD_SIZE, RANK; with LOCAL_WORLD_SIZE more than 1, LOCAL_RANK's device is the process'
    own. Where torchrun itself listens at MASTER_PORT, the next port is taken.

    Raises:
      ValueError: a variable is missing or is no number that can be.
    """
    if variables.get("WORLD_SIZE", "1") == "1":
        return None

    def number(name: str) -> int:
        value = variables.get(name, "")
        if not value.isdigit():
            seen = repr(value) if value else "not set"
            raise ValueError(f"{name} is {seen} where WORLD_SIZE is {variables['WORLD_SIZE']!r}, expected a number")
        return int(value)

    if not variables.get("MASTER_ADDR"):
        raise ValueError(
            f"MASTER_ADDR is not set where WORLD_SIZE is {variables['WORLD_SIZE']}, expected process 0's host"
        )
    # torchrun's agent serves its own store there, and says so.
    port = number("MASTER_PORT") + (variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    shares_host = variables.get("LOCAL_WORLD_SIZE", "1") != "1"
    place = Place(
        coordinator=f"{variables['MASTER_ADDR']}:{port}",
        count=number("WORLD_SIZE"),
        index=number("RANK"),
        local_device=number("LOCAL_RANK") if shares_host else None,
    )
    return _checked(place, "WORLD_SIZE and RANK")


def _checked(place: Place, source: str) -> Place:
    if place.index >= place.count:
        raise ValueError(f"{source}: process {place.index} of {place.count}, expected an index below the number")
    return place


def join(address: str | None, variables: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of the run, if there are others. Before anything that uses devices.

    Args:
      address: "HOST:PORT,COUNT,INDEX"; None: what the environment says (torchrun's variables; Slurm, Open MPI, TPUs on
        GKE and Ray as JAX detects them), or one process; "": likewise, but there must be others, and JAX also
        asks what is no variable (Cloud TPU's metadata, Kubernetes); "off": one process.
      variables: the environment.

    Returns:
      Whether there are other processes, or JAX has been told so before.

    Raises:
      ValueError: the place is not one, or JAX found none.
    """
    if address == "off":
        return False
    if jax.distributed.is_initialized():
        return True
    place = parse_place(address) if address else place_in_environment(variables)
    launched = any(name in variables and several(variables) for name, several in _LAUNCHERS.items())
    if place is None and address is None and not launched:
        return False
    with _patience(place):
        if place is not None:
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.index,
                place.local_device,
                initialization_timeout=JOIN_SECONDS + 60,
            )
        else:
            try:
                jax.distributed.initialize(initialization_timeout=JOIN_SECONDS + 60)
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"no other processes found ({error}), expected a launcher that JAX knows, torchrun's variables or "
                    "--multihost=HOST:PORT,COUNT,INDEX"
                ) from error
    return True


@contextlib.contextmanager
def _patience(place: Place | None) -> Iterator[None]:
    """Ends the process with one sentence if the others do not come: JAX's own way is to abort with a stack trace."""

    def give_up() -> None:
        where = "" if place is None else f" as process {place.index} of {place.count} at {place.coordinator}"
        print(
            f"error: waited {JOIN_SECONDS} s for the other processes{where}: is each started, once, with the same "
            "count and address? (--multihost=off trains alone)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)

    timer = threading.Timer(JOIN_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


_exchanges = itertools.count()


def _coordination() -> Any:
    # JAX's coordination service and its store have no public name. It waits for as many processes as process 0 was
    # told that there are; `num_processes` is what this one was told.
    from jax._src.distributed import global_state

    return global_state


def _exchange(value: Any, seconds: float) -> list[Any]:
    """Every process' JSON value, in order; all processes call this as often, and wait for each other."""
    service = _coordination()
    client, topic = service.client, f"videonsa_jax/{next(_exchanges)}"
    client.key_value_set(f"{topic}/{service.process_id}", json.dumps(value))
    try:
        client.wait_at_barrier(topic, round(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        answered = {int(key.rpartition("/")[2]) for key, _ in client.key_value_dir_get(topic)}
        missing = sorted(set(range(service.num_processes)) - answered)
        raise UsageError(f"processes {missing} did not answer within {seconds:.0f} s; see what they said") from error
    answers = {int(key.rpartition("/")[2]): answer for key, answer in client.key_value_dir_get(topic)}
    return [json.loads(answers[index]) for index in sorted(answers)]


def check_agreement(fields: Mapping[str, Any]) -> None:
    """Compares what processes know; needs no device, and does nothing in a run of one process.

    Args:
      fields: JSON values by name, the same names on all processes.

    Raises:
      ValueError: some differ; the same sentence on all processes.
    """
    if not jax.distributed.is_initialized():
        return
    everywhere = _exchange({"number of processes": _coordination().num_processes} | dict(fields), _ANSWER_SECONDS)
    differences = []
    for name, first in everywhere[0].items():
        others = [index for index, seen in enumerate(everywhere) if seen.get(name) != first]
        if others:
            more = f" (and another value than process 0's on {len(others) - 1} more)" if len(others) > 1 else ""
            value = everywhere[others[0]].get(name)
            differences.append(f"{name} is {first!r} on process 0 and {value!r} on process {others[0]}{more}")
    if differences:
        raise ValueError(f"processes disagree: {'; '.join(differences)}; start them all with the same")


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """A block that ends on every process as it ends on one: what one process cannot do, its others would wait for.

    Raises:
      UsageError: the user can mend it (`usage_errors`), here or on another process, which is named.
      SystemExit: another process was stopped.
    """
    if not jax.distributed.is_initialized():
        with usage_errors():
            yield
        return
    failure: BaseException | None = None
    try:
        with usage_errors():
            yield
    except (Exception, SystemExit) as error:
        failure = error
    kind = {"status": failure.code} if isinstance(failure, SystemExit) else {}
    said = str(failure) if isinstance(failure, UsageError) else f"{type(failure).__name__}: {failure}"
    outcomes = _exchange(None if failure is None else {"said": said} | kind, _DAY)
    if failure is not None:
        raise failure
    for index, outcome in enumerate(outcomes):
        if outcome is not None:
            stopped = "status" in outcome
            raise SystemExit(outcome["status"]) if stopped else UsageError(f"process {index}: {outcome['said']}")
