"""The notebook for one's own parts, run from the first cell to the last on trays."""

import json
import subprocess
import sys

import pytest
from shared import ROOT, TINY_FIT

from grad_nb.datasets.trays import make_trays
from grad_nb.grad import GRAD

NOTEBOOK = ROOT / "nbs" / "use" / "my_parts.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_has_no_more_than_ten_cells_and_all_of_them_are_code_that_parses():
    assert len(code_cells()) <= 10
    for i, text in enumerate(code_cells()):
        compile(text, f"cell {i}", "exec")


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_from_a_folder_to_an_export(tmp_path, own):
    cells = code_cells()
    settings = " ".join(f"{name}={value}" for name, value in TINY_FIT.items())
    cells[0] = cells[0].replace('overrides = ""', f"overrides = {settings!r}")
    if own:
        counts = {"train": 12, "validation": 6, "good": 4, "logical": 2, "structural": 3}
        root = make_trays(tmp_path / "data", seed=4, size=64, progress=False, **counts)
        folders = {"good": "train/good", "labelled": "test", "incoming": "test/good", "kept_aside": "validation/good"}
        for name, place in folders.items():
            cells[0] = cells[0].replace(f'{name} = ""', f"{name} = {str(root / place)!r}", 1)
    (tmp_path / "cells.py").write_text("import matplotlib\nmatplotlib.use('agg')\n" + "\n".join(cells))
    done = subprocess.run([sys.executable, "cells.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for said in ("good pictures", "learnt from", "false alarms expected", "AUROC", "called anomalous"):
        assert said in done.stdout, done.stdout
    assert "new normal pictures" in done.stdout and "stages:" in done.stderr
    model = GRAD.load(tmp_path / "part.grad", "cpu")
    assert model.n_pictures_[0] > 4
