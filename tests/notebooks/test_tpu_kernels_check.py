"""The notebook for people with a TPU runs, here interpreted and at tiny sizes, and both its forms are the same."""

import runpy
from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_notebook_is_made_from_the_script():
    script, notebook = (jupytext.read(NOTEBOOKS / f"tpu_kernels_check.{end}") for end in ("py", "ipynb"))
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ]
    assert not any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.slow
def test_notebook_runs(capsys):
    names = runpy.run_path(str(NOTEBOOKS / "tpu_kernels_check.py"))
    assert all(isinstance(ms, float) for ms in names["results"].values()), names["results"]
    printed = capsys.readouterr().out
    for operation in ("compressed", "selected", "window", "prefix", "nsa"):
        assert f"{operation:12} relative distances" in printed
    for case in ("splash forward 128", "splash train 128", "selection forward 128"):
        assert f"| {case} |" in printed
