"""Notebooks run from top to bottom in a fresh kernel, outside the repository, and keep no results."""

import json
import re
import sys

import nbclient
import nbformat
import pytest

from tests.helpers.paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FIGURES = {"01_variants_and_bytes.ipynb": 4, "03_decode_layouts.ipynb": 3}
PRINTS = {
    "01_variants_and_bytes.ipynb": ("131072", "KV ledger", "exact: True"),  # Llama-3-8B: 2 x 32 x 8 x 128 x 2
    "03_decode_layouts.ipynb": ("N 48 -> 64", "Best: ws_2d/by_batch:xyz", "compiled two layers", "cut: "),
}


def test_every_notebook_is_listed():
    assert [path.name for path in NOTEBOOKS] == sorted(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_stored_clean(path):
    """No outputs, no paths of the machine it was written on, nothing defined, and a badge that names the file."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            assert not re.search(r"^\s*(def|class) ", cell.source, re.M)
    text = json.dumps(notebook)
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    first = notebook.cells[0].source
    assert "colab-badge.svg" in first
    assert f"/notebooks/{path.name})" in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONWARNINGS", "error::DeprecationWarning:kvattn,error::DeprecationWarning:__main__")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sys; sys.executable"))
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    assert sys.executable in str(notebook.cells[0].outputs)  # this interpreter, not some other Python's kernel
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    figures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(figures) == FIGURES[path.name]
    printed = re.sub(r"\x1b\[[0-9;]*m", "", json.dumps(outputs).encode().decode("unicode_escape"))
    for text in PRINTS[path.name]:
        assert text in printed
