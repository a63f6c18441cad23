"""One compilation for all runs of the same small model."""

from pathlib import Path

import jax
import pytest


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    # Below pytest-xdist a worker's folder lies in the session's.
    return (base.parent if base.name.startswith("popen-") else base) / "xla"


@pytest.fixture
def compile_once(compilation_cache: Path):
    """Compiled functions are kept on disk while a test runs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(compilation_cache), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
