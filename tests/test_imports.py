"""The import direction: experiments -> videonsa_jax -> pallas_kernels -> jax, and nothing points back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Folder -> packages of this project, or modules outside it, that no file below it may import.
FORBIDDEN = {
    "pallas_kernels": ("videonsa_jax", "experiments", "flax", "optax", "torch", "transformers"),
    "videonsa_jax": ("experiments", "torch", "transformers"),
    "videonsa_jax/models": ("videonsa_jax.checkpoints", "videonsa_jax.data", "videonsa_jax.training"),
    "videonsa_jax/data": ("videonsa_jax.models", "videonsa_jax.training", "pallas_kernels", "flax", "optax"),
    "experiments": ("torch", "transformers"),
}


def _imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the project imports by absolute name"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def _violations(folder: Path, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(folder.parent)} imports {module}"
        for path in sorted(folder.rglob("*.py"))
        for module in sorted(_imported_modules(path))
        if any(module == name or module.startswith(name + ".") for name in forbidden)
    ]


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    assert list((ROOT / folder).rglob("*.py")), f"{folder} holds no Python file: the test would check nothing"
    assert _violations(ROOT / folder, FORBIDDEN[folder]) == []


def test_a_violation_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "pallas_kernels"
    package.mkdir()
    (package / "bad.py").write_text("from videonsa_jax import configs\n")
    assert _violations(package, FORBIDDEN["pallas_kernels"]) == ["pallas_kernels/bad.py imports videonsa_jax.configs"]


@pytest.mark.parametrize("module", ["videonsa_jax.data.pipeline", "videonsa_jax.streams"])
def test_loader_processes_import_neither_flax_nor_the_kernels(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "assert not {'flax', 'optax', 'pallas_kernels', 'videonsa_jax.models'} & set(sys.modules)\n"
        "import videonsa_jax\n"
        "assert set(videonsa_jax.__all__) <= set(dir(videonsa_jax)) and 'flax' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_hands_out_all_its_names() -> None:
    import videonsa_jax

    assert all(hasattr(videonsa_jax, name) for name in videonsa_jax.__all__)
    with pytest.raises(AttributeError, match=r"module 'videonsa_jax' has no attribute 'VideoNsa'"):
        _ = videonsa_jax.VideoNsa
