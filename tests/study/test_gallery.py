"""The gallery: executed notebooks of a batch without the places of a machine, with their licence, and nobody's test."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from nbdev.test import nb_test_cells
from shared import ROOT, TINY, do_all

from grad_nb.core.files import read_json, write_json
from grad_nb.runs.stages import open_run
from grad_nb.study.gallery import as_gallery_page, gallery_pages, write_gallery

PNG = "iVBORw0KGgo/home/user/data/x"  # bytes of a picture are not a path, whatever they look like


def executed(title: str) -> dict:
    "A notebook as papermill leaves it."

    def code(name: str, source: str, *outputs: dict, tags=()) -> dict:
        cell = {"cell_type": "code", "id": name, "execution_count": 3, "source": source, "outputs": list(outputs)}
        return cell | {"metadata": {"tags": list(tags), "papermill": {"duration": 1.0}}}

    printed = {"output_type": "stream", "name": "stdout", "text": f"in {tempfile.gettempdir()}/x/runs/demo/tables\n"}
    bars = {"output_type": "stream", "name": "stderr", "text": "PatchDiff 5: 50%|"}
    picture = {"output_type": "display_data", "metadata": {"a": 1}, "data": {"image/png": PNG, "text/plain": "/a/b/c"}}
    shown = {"output_type": "execute_result", "execution_count": 3, "metadata": {}, "data": {"text/plain": ["1"]}}
    cells = [
        {"cell_type": "markdown", "id": "head", "metadata": {}, "source": f"# {title}\n\nA template for papermill"},
        code("defaults", "runs = 1", tags=["parameters"]),
        code("given", 'runs = "…/runs"', tags=["injected-parameters"]),
        code("work", "#| export\nopen('/home/someone/data/x.csv')", printed, bars, picture, shown),
    ]
    return {"cells": cells, "metadata": {"papermill": {"parameters": {}}}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture(scope="module")
def batch(data, tmp_path_factory) -> Path:
    "The folder of a batch with one run, which says that it is of MVTec LOCO, and a row of Table 4 in it."
    runs = tmp_path_factory.mktemp("runs")
    run = open_run(data, "trays", runs=runs, overrides=TINY, device="cpu", progress=False)
    do_all(run)
    result = read_json(run.folder / "result.json") | {"dataset": "mvtec_loco", "category": "pushpins"}
    write_json(run.folder / "result.json", result | {"notes": ["a few pictures"]})
    write_json(run.folder / "table4/baseline/result.json", result)
    for folder, names in ((runs / "demo", ("tables", "figures", "speed")), (run.folder, ("table",))):
        for name in names:
            write_json(folder / "notebooks" / f"{name}.ipynb", executed(name))
    return runs / "demo"


def test_pages_have_titles_attribution_and_licence(batch):
    pages = gallery_pages(batch, "demo")
    assert list(pages) == ["01_tables.ipynb", "02_figures.ipynb", "03_speed.ipynb", "mvtec_loco-pushpins.ipynb"]
    for page in pages.values():
        head = "".join(page["cells"][0]["source"])
        assert "MVTec LOCO AD" in head and "CC BY-NC-SA 4.0" in head and "© MVTec Software GmbH" in head
        assert "preset demo; seeds 0; on cpu" in head
    assert "a few pictures" in "".join(pages["mvtec_loco-pushpins.ipynb"]["cells"][0]["source"])


def test_nothing_of_a_machine_stays_and_pictures_do(batch):
    page = as_gallery_page(executed("x"), "X", ["about"])
    text = json.dumps(page, ensure_ascii=False)
    assert not re.search(r"/home/someone|" + re.escape(tempfile.gettempdir()) + "|50%|papermill|/a/b", text)
    assert "…/x.csv" in text and "in …/tables" in text and PNG in text
    assert [cell["id"] for cell in page["cells"]] == ["gallery-head", "given", "work"]


def test_nbdev_neither_tests_nor_exports_nor_changes_a_page(batch, tmp_path):
    folder = tmp_path / "nbs" / "gallery"
    stale = folder / "mvtec_ad-bottle.ipynb"
    folder.mkdir(parents=True)
    stale.write_text("{}")
    written = write_gallery(batch, "demo", folder)
    assert not stale.exists() and (folder / ".notest").is_file() and len(written) == 4
    before = {path: path.read_bytes() for path in written}
    for name in ("pyproject.toml", "settings.ini"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    bin = Path(sys.executable).parent
    for command in ("nbdev-clean", "nbdev-export"):
        subprocess.run([bin / command], cwd=tmp_path, check=True, capture_output=True)
    assert before == {path: path.read_bytes() for path in written}
    assert not list((tmp_path / "grad_nb").rglob("*gallery*")), "a directive in an executed cell exports nothing"
    assert nb_test_cells(written[0]), "only the file .notest keeps nbdev-test from it"


def test_a_batch_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no finished batch of demo; run grad_reproduce first"):
        write_gallery(tmp_path, "demo", tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


def test_no_archive_carries_the_gallery():
    assert "prune nbs/gallery" in (ROOT / "MANIFEST.in").read_text()
    assert '"nbs" / "reproduce"' in (ROOT / "setup.py").read_text(), "the wheel takes the templates alone"


def test_the_gallery_that_is_here_says_whose_pictures_it_shows():
    for path in (ROOT / "nbs" / "gallery").glob("*.ipynb"):
        head = "".join(read_json(path)["cells"][0]["source"])
        assert "CC BY-NC-SA 4.0" in head or "drawn by this package" in head, path
        assert not re.search(r"(?<![\w…./:\\<])/(?:home|tmp|root|Users|work)/", path.read_text()), path
