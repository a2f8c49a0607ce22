"""The run that the notebooks show: can it be made and read, is it the preset's, is it small enough?"""

import base64
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from shared import ROOT

from grad_nb.config import override, preset
from grad_nb.core.files import file_sha256
from grad_nb.study.figures import field_arrays, localised, patch_arrays, weight_arrays
from grad_nb.study.fixture import LIMIT, REGULARISED, as_run, fixture, make_fixture, move_fixture

FEW = dict(size=64, train=20, validation=10, good=4, logical=4, structural=4)
TINY = {
    "generator.width": 8,
    "generator.steps": 4,
    "generator.batch": 2,
    "generator.n_samples": 16,
    "generator.sample_steps": 2,
    "detector.width": 0.1,
    "detector.steps": 20,
    "evaluation.map_size": 64,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fixture") / "made"
    make_fixture(folder, TINY, FEW, progress=False)
    return fixture(folder)


def test_a_fixture_is_made_and_read(made):
    assert made.record["changes"] == TINY and made.preset == override(preset("demo", "mvtec_loco"), TINY)
    assert made.pictures("real").shape == made.pictures("level-17").shape == (16, 64, 64, 3)
    assert len(made.pictures("test")) == len(made.masks) == len(made.kinds) == 11
    assert [bool(mask.any()) for mask in made.masks] == [kind != "good" for kind in made.kinds]
    assert len(made.scores) == 12 and made.history("detector").index.tolist() == [10, 20]
    assert {level for level in (3, 5, 17) if made.generator(level).level == level} == {3, 5, 17}


def test_the_last_snapshot_is_what_the_model_says(made):
    maps = made.snapshots()
    assert list(maps) == [1, 2, 6, 20]
    found = made.model().predict(made.pictures("test")).maps
    assert np.allclose(maps[20], found, atol=0.01)  # kept in half precision
    assert not np.allclose(maps[1], found, atol=0.01)


def test_the_second_detector_differs_from_the_first_by_its_regularisers(made):
    assert made.record["regularised"] == {**REGULARISED, "steps": 8}
    detector, decoder = made.regularised()
    with torch.no_grad():
        assert decoder(detector.features(torch.zeros(2, 5, 34, 34))).shape == (2, 5, 34, 34)


def test_the_figures_of_the_paper_can_be_drawn_from_it(made, tmp_path):
    run = as_run(made, tmp_path)
    groups, cloud = patch_arrays(run, 8)
    assert len(groups) == 5 and len(cloud.points) == 40
    assert len(weight_arrays([run], side=64)["titles"]) == 3
    assert len(localised(run, 6).pictures) == 6 and set(field_arrays(run)["supports"]) == {3, 5, 17}


def test_a_training_that_fails_leaves_the_older_fixture(made, monkeypatch):
    before = {path.name: file_sha256(path) for path in made.folder.iterdir()}
    monkeypatch.setattr("grad_nb.study.fixture.LIMIT", 1000)
    with pytest.raises(ValueError, match="keep fewer pictures"):
        make_fixture(made.folder, TINY, FEW, progress=False)
    assert {path.name: file_sha256(path) for path in made.folder.iterdir()} == before


def test_what_is_not_there_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="python -m grad_nb.study.fixture"):
        fixture(tmp_path)


# --- the one that the notebooks show ----------------------------------------------------------------------------------

REMAKE = "make it again with: python -m grad_nb.study.fixture"
METHOD = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if "02" <= path.name[:2] <= "10"]
FINDINGS = "findings"  # folder whose charts are drawn for a wider page


def pictures(notebook):
    "The pictures that are stored in a notebook."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            for kind, data in output.get("data", {}).items():
                if kind in ("image/png", "image/jpeg"):
                    yield Image.open(io.BytesIO(base64.b64decode("".join(data))))


def test_the_fixture_is_whole_and_has_three_megabytes_at_most():
    kept = fixture()
    there = {path.name: file_sha256(path) for path in kept.folder.iterdir() if path.name != "record.json"}
    assert there == kept.record["files"], REMAKE
    assert sum(path.stat().st_size for path in kept.folder.iterdir()) <= LIMIT


def test_the_fixture_is_the_preset_or_says_how_it_differs():
    record, made = fixture().record, fixture().preset
    asked = override(preset("demo", "mvtec_loco"), record["changes"])
    assert not made.one_network, "then how a student learns would count too"
    assert replace(made, student=asked.student) == asked, REMAKE
    assert {"seed", "data", "versions", "git", "device"} <= set(record)


def test_the_fixture_has_learnt_something():
    assert fixture().record["figures"]["auroc"] > 0.85


def test_every_notebook_of_the_method_has_a_picture_and_all_have_twenty():
    found = {path.name: len(list(pictures(path))) for path in METHOD}
    assert len(found) == 9 and all(found.values()) and sum(found.values()) >= 20, found


def test_pictures_fit_on_a_page():
    wide = {
        f"{path.relative_to(ROOT)}: {picture.size}"
        for path in (ROOT / "nbs").rglob("*.ipynb")
        if not {FINDINGS, ".ipynb_checkpoints"} & {*path.parts}
        for picture in pictures(path)
        if picture.width > 900
    }
    assert not wide, wide


def test_an_older_fixture_goes_when_the_new_one_is_there(tmp_path):
    made, folder = tmp_path / "made", tmp_path / "fixture"
    for path in (made / "a", made / "record.json", folder / "a", folder / "old", folder / ".ipynb_checkpoints/x"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(path.parent.name))
    move_fixture(made, folder)
    assert sorted(path.name for path in folder.iterdir()) == [".ipynb_checkpoints", "a", "record.json"]
    assert (folder / "a").read_text() == "made"
