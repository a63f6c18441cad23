"""Several processes of one machine that find each other by torchrun's variables."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run_together(scripts: Sequence[str], **variables: str) -> list[tuple[int, str]]:
    """Runs a script in each process, with torchrun's variables; status and what was said."""
    port = free_port()
    started = []
    for rank, script in enumerate(scripts):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{ROOT}:{HERE}",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(len(scripts)),
            "RANK": str(rank),
            **variables,
        }
        command = [sys.executable, "-W", "error", "-c", script]
        started.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=120)[0] for process in started]
    return [(process.returncode, text) for process, text in zip(started, said, strict=True)]
