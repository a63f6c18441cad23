"""The table of what was measured fastest."""

import json

from benchmarks import order_implementations


def record(operation, implementation, ms, length=8192, **others):
    common = {"operation": operation, "implementation": implementation, "length": length, "pass": "fwd", "choice": ""}
    return common | {"median_ms": ms} | others


def test_the_fastest_where_all_were_timed_comes_first(tmp_path):
    records = [
        record("window_attention", "triton", 2.0),
        record("window_attention", "triton", 3.0, length=16384),
        record("window_attention", "mosaic_gpu", 1.0),
        record("window_attention", "mosaic_gpu", 4.0, length=16384),
        record("window_attention", "xla", 0.5),
        record("nsa_attention", "triton", 1.0),
        {"operation": "nsa_attention", "implementation": "mosaic_gpu", "length": 8192, "pass": "fwd", "failed": "x"},
        record("dense_attention", "cudnn_dense", 1.0),
    ]
    result, table = tmp_path / "result.json", tmp_path / "table.json"
    result.write_text(json.dumps({"device": {"kind": "a GPU"}, "records": records}))
    table.write_text(json.dumps({"devices": {"another": {"window_attention": ["xla"]}}}))
    assert order_implementations.main([str(result), f"--table={table}"]) == 0
    assert json.loads(table.read_text())["devices"] == {
        "another": {"window_attention": ["xla"]},
        "a GPU": {"nsa_attention": ["triton"], "window_attention": ["mosaic_gpu", "triton", "xla"]},
    }


def test_a_file_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert order_implementations.main([str(tmp_path / "x.json")]) == 2
    assert "x.json: no result of experiments.bench_kernels" in capsys.readouterr().err
