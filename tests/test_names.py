"""Text that others chose, in figures and on the way to a notebook: it is shown, and does nothing."""

import json
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from shared import pictures

from grad_nb.plots import (
    Localised,
    as_text,
    localisation_figure,
    map_overlays,
    picture_rows,
    picture_table,
    score_histogram,
)
from grad_nb.runs.notebooks import execute

matplotlib.use("agg")
NASTY = ["$\\frac{$", "$\\no$", "a$b", "$$", "\\$", "a\x1b[31m", "\u202eb", "{x}", "%s", "<b>", "\ud800", "^_~#&"]


@pytest.mark.parametrize("name", NASTY)
def test_a_figure_shows_a_name_as_it_is(name):
    seen, maps = pictures(2, 32), np.zeros((2, 32, 32), np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        for figure in (
            picture_rows({name: seen}, 2),
            picture_table({name: {name: seen}}, title=name),
            map_overlays(seen, maps, (0.0, 1.0), titles=[name, name]),
            localisation_figure({name: Localised(seen, maps, (0.0, 1.0), None, [name])}, title=name),
            score_histogram(np.arange(4.0), ["good", name, name, name]),
        ):
            figure.canvas.draw()  # a formula that is none is an error here
            matplotlib.pyplot.close(figure)


def test_what_is_shown_is_the_name():
    assert as_text("a$b_{c}\n<d>") == r"a\$b_{c}" + "\n<d>"
    assert as_text("a\x1bb\u202ec") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"


@pytest.mark.parametrize("name", ["{n} x", "{", "}", "{0} 'q' $x", "[a] *"])
def test_braces_and_spaces_in_the_paths_of_notebooks(tmp_path, name):
    pytest.importorskip("papermill")
    folder = tmp_path / name
    folder.mkdir()
    cell = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "n = 1"}
    body = cell | {"execution_count": None, "outputs": []}
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    notebook = {"cells": [body], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}
    source = folder / "source.ipynb"
    source.write_text(json.dumps(notebook))
    execute(source, folder / "out {n}.ipynb", folder / "log", {"n": 2})
    text = (folder / "out {n}.ipynb").read_text()
    assert "n = 2" in text.replace("\\n", "\n") and str(Path(tmp_path)) not in text
