"""The readers of what ncu, ptxas and training runs wrote."""

import csv

import pytest

from benchmarks import gpu_resources, profile_gpu, train_kernels


def write_counters(path, kernels):
    with path.open("w") as file:
        file.write("==PROF== Connected to process 1\n")
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(["ID", "Block Size", "Grid Size", "Metric Name", "Metric Unit", "Metric Value"])
        for kernel in range(kernels):
            for metric, unit, value in ((profile_gpu.METRICS["ms"], "us", "1,500.5"), ("other", "%", "3")):
                rows.writerow([kernel, "(512, 1, 1)", "(132, 1, 1)", metric, unit, value])


def test_a_table_of_counters_names_the_kernels_in_order(tmp_path):
    write_counters(tmp_path / "ncu.csv", len(profile_gpu.NAMES))
    records = profile_gpu.table(tmp_path / "ncu.csv")
    assert [record["kernel"] for record in records] == list(profile_gpu.NAMES)
    assert all(record["ms"] == pytest.approx(1.5005) and "other" not in record for record in records)


def test_a_table_of_other_kernels_is_refused(tmp_path):
    write_counters(tmp_path / "ncu.csv", 2)
    with pytest.raises(ValueError, match="holds 2 kernels, expected 11"):
        profile_gpu.table(tmp_path / "ncu.csv")


def test_a_compilers_report_tells_registers_spills_and_serialized_products():
    report = """
ptxas info    : (C7519) warpgroup.arrive is injected
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized
    464 bytes stack frame, 476 bytes spill stores, 500 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
"""
    expected = {"registers": 168, "spilled bytes": 476, "serialized": ["C7512"]}
    assert gpu_resources.summarize(report) == expected


def test_losses_are_compared_over_the_steps_that_all_runs_made():
    def run(losses):
        return [{"loss": loss, "step_seconds": 0.1} for loss in losses]

    summary = train_kernels.summarize({"auto": run([3.0, 2.0, 1.0]), "xla": run([3.5, 2.25])})
    assert summary["apart"]["auto and xla"] == {
        "first_step": 0.5,
        "first_20_steps_worst": 0.5,
        "means_of_last_tenth": [2.0, 2.25],
    }
