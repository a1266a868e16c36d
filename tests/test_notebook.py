"""The notebook of the documents runs from its first cell to its last and shows what it says."""

from pathlib import Path

import nbclient
import nbformat
import pytest
from tests.small_runs import SMALL_RUN

import lorasweep

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "quickstart.ipynb"


@pytest.mark.release
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(lorasweep.__file__).parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs for cell in notebook.cells if cell.cell_type == "code")  # they are not kept
    cell = next(cell for cell in notebook.cells if "overrides={" in cell.source)
    cell.source = cell.source.replace("overrides={", f"overrides={{**{SMALL_RUN!r},")
    cell.source = cell.source.replace('"trainer.max_steps": 24', '"trainer.max_steps": 8')
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = " ".join(str(output.get("data", output.get("text", ""))) for output in outputs)
    assert "application/vnd.plotly.v1+json" in texts
    assert "lora 6/6" in texts  # progress as plain lines
    assert "method.rank" in texts
    assert (tmp_path / "outputs" / "quickstart" / "report" / "index.html").is_file()
