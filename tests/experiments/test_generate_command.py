"""The command on a saved model and a clip: what it prints, and bad input in one sentence."""

import re
import shutil

import numpy as np
import pytest
from conversation_cases import little_optimisation, small_processor  # noqa: F401
from flax import nnx
from small_videos import write_video

import videonsa_jax as vn
from experiments.generate import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a clip and an image."""
    folder = tmp_path_factory.mktemp("generate")
    config = vn.configs.tiny()
    vn.save_pretrained(vn.VideoNSA(config, nnx.Rngs(0)), small_processor(folder, config), folder / "model")
    noise = np.random.default_rng(0).integers(0, 256, (10, 56, 84, 3), dtype=np.uint8)
    write_video(folder / "clip.mp4", noise)
    return folder


def run(folder, *arguments, model="model"):
    options = ["--max-new-tokens=4", "--dtype=float32", "--fps=2", f"--model={folder / model}"]
    return main([*options, *arguments])


REPORT = r"\[time to first token [0-9.]+ s(, of which [0-9.]+ s encoding)?; [0-9.]+ tokens/s\]"


def test_two_questions_on_one_video(folder, capsys):
    video = f"--video={folder / 'clip.mp4'}"
    assert run(folder, video, "--prompt=What colour?", "--prompt=red or green") == 0
    printed = capsys.readouterr()
    assert re.fullmatch(rf"(?s).*\n{REPORT}\n.*\n{REPORT}\n", printed.out)
    assert printed.out.count("of which") == 1  # the second question finds the video encoded
    assert re.search(r"EncodedVisual\(.*clip\.mp4: 6 tokens, [0-9.]+ MiB\)", printed.err)


def test_sampling_from_text_alone(folder, capsys):
    options = ("--temperature=1.5", "--top-p=0.9", "--top-k=50", "--prompt=What?")
    answers = []
    for seed in (1, 1, 2):
        assert run(folder, *options, f"--seed={seed}") == 0
        answers.append(capsys.readouterr().out.partition("\n[time")[0])
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--video=none.mp4", "--prompt=x"], r"message 0: none\.mp4: no such file, expected a video"),
        (["--image=none.png", "--prompt=x"], r"message 0: none\.png: no such file, expected an image"),
        (["--prompt=x", "--temperature=-1"], "temperature is -1.0, expected"),
        (["--prompt=x", "--max-pixels=4"], "min_pixels 3136 exceeds max_pixels 4"),
    ],
)
def test_what_can_be_mended(folder, capsys, arguments, sentence):
    assert run(folder, *arguments) == 2
    assert re.fullmatch(rf"error: .*{sentence}.*\n", capsys.readouterr().err)


def test_a_missing_model(folder, capsys):
    assert run(folder, "--prompt=x", model="none") == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_a_template_that_loops(folder, capsys):
    shutil.copytree(folder / "model", folder / "looping")
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "looping" / "chat_template.jinja").write_text(loop)
    assert run(folder, "--prompt=x", model="looping") == 2
    assert "did not end within" in capsys.readouterr().err
