"""Where a result comes from: versions, device, command."""

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("videonsa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av", "tokenizers")


def environment() -> dict[str, Any]:
    """Versions and devices, for the report."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is run without being installed
            versions[package] = "not installed"
    devices = jax.local_devices()
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "host": platform.platform(),
            "cpu_count": os.cpu_count(),
            "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
        },
        "command": _command(),
    }


def _command() -> list[str]:
    """What was typed, without the place of this checkout."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name, *sys.argv[1:]] if spec else ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
