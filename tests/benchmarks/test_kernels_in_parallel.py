"""The driver of all kernel measurements, on a CPU and one small case."""

import json

from benchmarks import kernels_in_parallel


def test_processes_side_by_side_make_one_result(tmp_path, monkeypatch, capsys):
    means = ("--ops=block_means", "--implementations=xla", "--passes=fwd", "--samples=1")
    groups = {"some": means, "others": means}
    monkeypatch.setattr(kernels_in_parallel, "GROUPS", groups)
    out = tmp_path / "out.json"
    status = kernels_in_parallel.main([f"--json={out}", "--groups=some,others", "--lengths=64", "--at-once=2"])
    assert status == 0, capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [record["operation"] for record in result["records"]] == ["block_means"] * 2
    assert len(result["command"]) == 2


def test_what_takes_too_long_is_said(tmp_path, capsys):
    arguments = [f"--json={tmp_path / 'out.json'}", "--groups=xla", "--lengths=8192", "--limit=0"]
    assert kernels_in_parallel.main(arguments) == 2
    shown = capsys.readouterr()
    assert "xla at 8192: not begun after 0 s" in shown.out
    assert "no process wrote a figure" in shown.err


def test_no_more_begins_than_is_allowed_at_once(tmp_path, monkeypatch, capsys):
    begun = []

    class Process:
        returncode = 0

        def __init__(self, command, **_):
            begun.append(command)

        def poll(self):
            return None

        def kill(self):
            pass

    monkeypatch.setattr(kernels_in_parallel.subprocess, "Popen", Process)
    arguments = [f"--json={tmp_path / 'out.json'}", "--groups=whole,layer", "--lengths=65536,8192", "--at-once=3"]
    assert kernels_in_parallel.main([*arguments, "--tensors=x.npz", "--limit=0.1"]) == 2
    assert ["--lengths=65536" in command for command in begun] == [True, True, False]
    own = [command for command in begun if "--tensors=x.npz" in command and "--drawn-only" not in command]
    assert own == begun[:1]
    assert "layer at 8192: not begun" in capsys.readouterr().out
