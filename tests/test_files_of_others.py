"""Files that others made: models whose settings were changed and sealed again, journals, texts, executed notebooks."""

import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import pictures, tiny

from grad_nb.core.files import file_sha256, lock, read_array, read_json, write_json
from grad_nb.core.tensors import read_tensors, write_tensors
from grad_nb.datasets.readers import _head, _read_defects, read_image
from grad_nb.datasets.unpack import unpack
from grad_nb.grad import GRAD
from grad_nb.runs.notebooks import leave_out_places
from grad_nb.use.daily import _before_fit
from grad_nb.use.errors import printable
from grad_nb.use.watch import Journal

JUNK = [None, "x", "", [], {}, [1], True, -1, 0, 1, 0.5, 1e300, 10**18, -(10**18), {"a": 1}, "1", 3e9]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.grad"
    tiny().fit(pictures(8, 64)).save(path)
    return path


def leaves(value, where=()):
    "The places of all values in nested data."
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*where, key))


def changed(meta, where, value):
    "The same data with another value in one place."
    meta = json.loads(json.dumps(meta))
    inside = meta
    for key in where[:-1]:
        inside = inside[key]
    inside[where[-1]] = value
    return meta


def test_a_resealed_model_is_refused_by_load_or_predicts(saved, tmp_path):
    tensors, meta = read_tensors(saved)
    places = [where for where in leaves(meta) if where]
    draw = random.Random(0)
    refused = 0
    for i in range(300):
        where, value = places[i % len(places)], draw.choice(JUNK)
        write_tensors(tmp_path / "m", tensors, changed(meta, where, value))
        try:
            model = GRAD.load(tmp_path / "m", "cpu").set_params(progress=False)
        except ValueError as e:
            assert "m " in str(e) or "m:" in str(e)
            refused += 1
            continue
        if i % 8 == 0 or where[0] not in ("card", "licence", "versions"):
            scores = model.score_samples(pictures(1, 64)) if i % 4 == 0 or where[0] == "preset" else None
            assert scores is None or scores.shape == (1,), where
    assert refused > 150


def test_a_saved_model_says_the_same_twice_and_not_where(saved, tmp_path):
    model = GRAD.load(saved, "cpu")
    model.save(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == saved.read_bytes()
    for told in (str(saved.parent), str(Path.home()), os.getcwd(), f"@{os.uname().nodename}"):
        assert told.encode() not in saved.read_bytes()


def test_two_models_trained_equally_are_equal_byte_for_byte(saved, tmp_path):
    tiny().fit(pictures(8, 64)).save(tmp_path / "twin")
    assert (tmp_path / "twin").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("name", [["a"], {"a": 1}, None, 3, 1.5, True])
@pytest.mark.parametrize("field", ["name", "bytes", "changed_ns"])
def test_a_journal_of_lists_is_refused_in_words(tmp_path, name, field):
    row = {"name": "a.png", "bytes": 1, "changed_ns": 1, "model": "m", field: name}
    if field != "name" and name == 3:
        return
    (tmp_path / "j").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="j, line 1, is not a line of a journal"):
        Journal(tmp_path / "j", "m")


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_what_is_printed_does_nothing_to_a_terminal(text):
    shown = printable(text)
    assert shown.isprintable() or all(c.isprintable() or ord(c) > 0x9F for c in shown)
    assert len(shown.splitlines()) <= 1 and not any(ord(c) < 32 or 0x7E < ord(c) < 0xA0 for c in shown)
    if text.isascii() and text.isprintable():
        assert shown == text


def test_an_executed_notebook_says_what_and_not_where(tmp_path):
    data = tmp_path / "secret project" / "parts"
    told = [str(data), f"{data}/a.png", str(Path.home() / "x"), tempfile.gettempdir() + "/y", "plain"]
    notebook = {"metadata": {"papermill": {"input_path": told[1]}}, "cells": [{"outputs": [{"text": told}], "n": 1.5}]}
    (tmp_path / "n.ipynb").write_text(json.dumps(notebook))
    leave_out_places(tmp_path / "n.ipynb", {"data": str(data), "level": 3})
    text = (tmp_path / "n.ipynb").read_text()
    assert "secret project" not in text and str(Path.home()) not in text and str(tmp_path) not in text
    shown = json.loads(text)
    assert shown["cells"][0]["outputs"][0]["text"][:2] == ["…/parts", "…/parts/a.png"]
    assert shown["cells"][0]["outputs"][0]["text"][-1] == "plain" and shown["cells"][0]["n"] == 1.5
    picture = {"image/png": "ab/d=", "text/plain": "/d"}  # a picture is no text, whatever its letters say
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [{"outputs": [{"data": picture}]}]}))
    leave_out_places(tmp_path / "n.ipynb", {"data": "/d"})
    assert json.loads((tmp_path / "n.ipynb").read_text())["cells"][0]["outputs"][0]["data"] == {
        "image/png": "ab/d=",
        "text/plain": "…/d",
    }


def test_scores_are_numbers(saved):
    assert np.isfinite(GRAD.load(saved, "cpu").set_params(progress=False).score_samples(pictures(2, 64))).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused_at_once(tmp_path, kind):
    "To open a pipe would wait for ever, to read a device never end."
    path = tmp_path / "a"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    (tmp_path / "in").mkdir()
    jobs = {
        "read_json": lambda: read_json(path),
        "write_json": lambda: write_json(path, {}),
        "read_array": lambda: read_array(path),
        "file_sha256": lambda: file_sha256(path),
        "lock": lambda: lock(path),
        "read_tensors": lambda: read_tensors(path),
        "read_image": lambda: read_image(path),
        "head": lambda: _head(path)[1],
        "defects": lambda: _read_defects(path),
        "unpack": lambda: unpack(path, tmp_path / "out", True, False),
        "journal": lambda: Journal(path, "m"),
        "fit": lambda: _before_fit(str(tmp_path / "in" / "m"), ""),
    }
    os.link(path, tmp_path / "in" / "m.md", follow_symlinks=False)  # a card
    for name, job in jobs.items():
        try:
            said = job()
        except ValueError as e:
            said = str(e)
        assert "pipe" in said or "device" in said or "no regular file" in said, (name, said)
