"""The driver of all kernel measurements, on a CPU and one small case."""

import json

from benchmarks import kernels_in_parallel


def test_processes_side_by_side_make_one_result(tmp_path, monkeypatch, capsys):
    means = ("--ops=block_means", "--implementations=xla", "--passes=fwd", "--samples=1")
    groups = {"some": means, "others": means}
    monkeypatch.setattr(kernels_in_parallel, "GROUPS", groups)
    monkeypatch.setattr(kernels_in_parallel, "GIB_AT_128K", {"some": 10, "others": 10})
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


def test_no_more_begins_than_the_memory_holds(tmp_path, monkeypatch, capsys):
    begun = []

    class Process:
        returncode = 0

        def __init__(self, command, **_):
            begun.append(next(word for word in command if word.startswith("--lengths=")))

        def poll(self):
            return None

        def kill(self):
            pass

    monkeypatch.setattr(kernels_in_parallel.subprocess, "Popen", Process)
    arguments = [f"--json={tmp_path / 'out.json'}", "--groups=whole,layer", "--lengths=65536,32768,8192"]
    assert kernels_in_parallel.main([*arguments, "--memory=28", "--limit=0.1"]) == 2
    # 10.6 and 16.6 GiB, then nothing of 5.6 or 8.6.
    assert begun == ["--lengths=65536", "--lengths=65536"]
    assert "layer at 8192: not begun" in capsys.readouterr().out
