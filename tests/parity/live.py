"""`make parity`: fixtures made afresh and compared, and checkpoints handed to transformers and back.

    python tests/parity/live.py PYTHON_WITH_TRANSFORMERS_4.49.0 PYTHON_WITH_TRANSFORMERS_5.23.0

1. Each release makes its models and outputs; the tests of test_fixtures.py run on these instead of the committed ones.
2. What a release has written is loaded and saved by us, in bfloat16 and in float32, plain and with new gates. Both
   releases load that with no key missing or left over but the gates, and give the outputs of the original bit for bit.
3. What they write of it in turn (never the gates) is loaded by us, bit for bit what we had saved.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import jax
import numpy as np
from flax import nnx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import parity_cases as cases  # noqa: E402

from videonsa_jax.checkpoints import load_model, save_model  # noqa: E402
from videonsa_jax.configs import NSAConfig  # noqa: E402
from videonsa_jax.models import VideoNSA  # noqa: E402

RELEASES = ("transformers-4.49.0", "transformers-5.23.0")
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def run_transformers(python: str, folder: Path, *arguments: str) -> dict[str, np.ndarray]:
    command = [python, "-W", "ignore", str(HERE / "make_fixtures.py"), str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    with np.load(folder / "outputs.npz") as file:
        return dict(file)


def save_with_token_ids(model: VideoNSA, folder: Path, name: str) -> None:
    """Saves; these models have no tokenizer that would tell the ids of their special tokens."""
    save_model(model, folder / name)
    path = folder / name / "config.json"
    ids = {key: cases.MODELS[name][key] for key in TOKEN_IDS}
    path.write_text(json.dumps(json.loads(path.read_text()) | ids))


def assert_same_parameters(found: VideoNSA, expected: VideoNSA) -> None:
    found, expected = (dict(nnx.to_flat_state(nnx.state(model))) for model in (found, expected))
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf[...], expected[path][...], err_msg=str(path))


def round_trip(pythons: dict[str, str], outputs: dict[str, dict], folder: Path) -> None:
    for source in RELEASES:
        for dtype, nsa in (("bfloat16", None), ("float32", None), ("bfloat16", NSAConfig(block_size=4, block_count=2))):
            variant = f"{source} in {dtype}{' with gates' if nsa else ''}"
            saved = folder / f"ours of {variant}"
            models = {}
            for name in cases.MODELS:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that the gates are new
                    models[name] = load_model(folder / source / name, dtype, nsa=nsa)
                save_with_token_ids(models[name], saved, name)
            for reader in RELEASES:
                back = folder / f"{reader} of ours of {variant}"
                found = run_transformers(pythons[reader], back, "--load", str(saved))
                assert found.keys() == outputs[reader].keys()
                for key, array in outputs[reader].items():
                    np.testing.assert_array_equal(found[key], array, err_msg=f"{back.name}: {key}")
                for name, model in models.items():
                    # transformers leaves gates out, but 4.49 keeps our block of config.json that promises them.
                    assert_same_parameters(load_model(back / name, dtype, nsa=None), model)
                print(f"{variant} -> videonsa_jax -> {reader} -> videonsa_jax: equal bit for bit")


def main() -> None:
    pythons = dict(zip(RELEASES, sys.argv[1:], strict=True))
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(prefix="parity_") as name:
        folder = Path(name)
        outputs = {release: run_transformers(pythons[release], folder / release) for release in RELEASES}
        for release in RELEASES:
            print(release, (folder / release / "versions.json").read_text().replace("\n", " "))
        tests = [sys.executable, "-m", "pytest", "-q", "-n", "0", str(HERE / "test_fixtures.py")]
        subprocess.run(tests, cwd=ROOT, env=os.environ | {"PARITY_FIXTURES": name}, check=True)
        round_trip(pythons, outputs, folder)


if __name__ == "__main__":
    main()
