"""Where a result comes from: versions, device, command."""

import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
import videonsa_jax

PACKAGES = ("videonsa-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # a checkout that is run without being installed
            found[package] = "not installed"
    return found


def code_digest() -> str:
    """SHA-256 of this project's source files, of their paths and contents; its first 12 digits."""
    digest = hashlib.sha256()
    for package in (videonsa_jax, pallas_kernels):
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{folder.name}/{path.relative_to(folder).as_posix()}".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def peak_gigabytes() -> float | None:
    """The most memory that one of this process' devices has held so far, in 1e9 bytes; None where they do not say."""
    held = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return None if None in held else max(held) / 1e9


def environment() -> dict[str, Any]:
    """Versions and devices, for the report."""
    devices = jax.local_devices()
    return {
        "versions": versions(),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
            "host": platform.platform(),
            "cpu_count": os.cpu_count(),
            "peak_bytes": (devices[0].memory_stats() or {}).get("peak_bytes_in_use"),
        },
        "command": command_line(),
    }


def command_line() -> list[str]:
    """What was typed, without the place of this checkout."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["python", "-m", spec.name, *sys.argv[1:]] if spec else ["python", Path(sys.argv[0]).name, *sys.argv[1:]]
