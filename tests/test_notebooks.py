"""Every notebook of colab/ runs from any folder, and is stored without its results."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = [pytest.param(p, id=p.stem) for p in sorted((ROOT / "colab").glob("*.ipynb"))]


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_is_stored_without_results(path):
    import nbformat

    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_a_notebook_runs_from_any_folder(path, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("JAXREPRO_NOTEBOOK_STEPS", "2")
    monkeypatch.setenv(
        "PYTHONPATH", str(ROOT), prepend=os.pathsep
    )  # also where it is not installed
    notebook = nbformat.read(path, 4)
    resources = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
    client.execute()  # raises with the traceback of the cell that failed
