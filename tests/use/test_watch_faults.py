"""A watcher goes on: deaths over one picture, files that cannot be opened, folders that go, many judged files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import pictures, tiny

from grad_nb.datasets.readers import DataError, UnavailableError
from grad_nb.use import watch as module
from grad_nb.use.watch import Journal, Known, Progress, look, watch


@pytest.fixture(scope="module")
def model():
    return tiny(evaluation__batch=3).fit(pictures(8, 64))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m.grad"
    model.save(path)
    return path


@pytest.fixture
def inbox(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def put(path: Path, seed: int = 0) -> Path:
    Image.fromarray(pictures(1, 64, seed)[0]).save(path)
    return path


def rows_of(inbox: Path) -> list[dict]:
    return [json.loads(line) for line in (inbox.parent / "in.journal.jsonl").read_text().splitlines()]


KILLER = """
import os, sys
from grad_nb.grad import GRAD
from grad_nb.use import watch
read = watch.read_image
def deadly(path, *how, **more):
    if path.name in sys.argv[3].split(","):
        os.kill(os.getpid(), 9)
    return read(path, *how, **more)
watch.read_image = deadly
model = GRAD.load(sys.argv[1], "cpu").set_params(progress=False)
for row in watch.watch(model, sys.argv[2], every=0.001, looks=8, patience=2):
    print(row["path"], "error" in row, flush=True)
"""


@pytest.mark.parametrize("deadly", [["b.png"], ["a.png", "d.png"]])
def test_a_picture_that_ends_its_reader_is_passed_over_after_two_deaths(saved, inbox, deadly):
    for i, name in enumerate("abcde"):
        put(inbox / f"{name}.png", i)
    command = [sys.executable, "-c", KILLER, saved, inbox, ",".join(deadly)]
    ends = []
    for _ in range(2 * len(deadly) + 1):
        ends.append(subprocess.run(command, capture_output=True, text=True))
    assert [end.returncode for end in ends] == [-9] * (2 * len(deadly)) + [0], ends[-1].stderr
    rows = {row["name"]: row for row in rows_of(inbox)}
    assert len(rows) == len(rows_of(inbox)) == 5
    for name, row in rows.items():
        assert ("error" in row) == (name in deadly)
        if name in deadly:
            assert "2 processes ended while they read it" in row["error"]
    assert not list(inbox.parent.glob("*.reading"))
    told = "".join(end.stdout for end in ends)
    assert all(told.count(f"{name}.png") == 1 for name in "abcde")


def test_the_mark_of_a_reader_at_every_cut(tmp_path):
    path = tmp_path / "p"
    progress = Progress(path, 9)
    with progress.reading("a.png", (1, 2)):
        whole = path.read_bytes().split(b"\n")[0] + b"\n"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Progress(path, 9)
        assert again.deaths == ({("a.png", 1, 2): 1} if cut >= len(whole) - 1 else {})
        again.deaths.clear()
        again.close(9)
    for other in (b"[]", b"{}\n", b"null", b'{"deaths": 3}', b'{"deaths": [[1]], "told": 0, "reading": 0}', b"\xff"):
        path.write_bytes(other)
        Progress(path, 9).close(9)
    assert not path.exists()


def test_a_row_that_was_written_and_not_told_is_told_by_the_next(model, inbox):
    put(inbox / "a.png")
    (row,) = watch(model, inbox, every=0.001, looks=3)
    journal = inbox.parent / "in.journal.jsonl"
    mark = {"reading": None, "told": 0, "deaths": []}
    journal.with_name(f"{journal.name}.reading").write_text(json.dumps(mark) + "\n")
    assert list(watch(model, inbox, every=0.001, looks=1)) == [row]
    assert list(watch(model, inbox, every=0.001, looks=1)) == []


def test_a_journal_that_was_edited_is_told_from_the_beginning_of_a_line(model, inbox):
    put(inbox / "a.png"), put(inbox / "b.png", 1)
    rows = list(watch(model, inbox, every=0.001, looks=3))
    journal = inbox.parent / "in.journal.jsonl"
    first = journal.read_bytes().index(b"\n") + 1
    for told, expected in [(0, rows), (3, rows), (first, rows[1:]), (first + 4, rows[1:]), (10**6, [])]:
        mark = {"reading": None, "told": told, "deaths": []}
        journal.with_name(f"{journal.name}.reading").write_text(json.dumps(mark) + "\n")
        assert list(watch(model, inbox, every=0.001, looks=1)) == expected, told


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(5, "I/O"), MemoryError("no room")])
def test_what_cannot_be_opened_is_told_once_and_tried_again(model, inbox, monkeypatch, error):
    "Permissions change neither size nor time of a file."
    put(inbox / "a.png"), put(inbox / "b.png", 1)
    real, tries = Image.open, []

    def fails(path, *args, **kwargs):
        if Path(path).name == "a.png" and len(tries) < 12:
            tries.append(path)
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", fails)
    rows = list(watch(model, inbox, every=0.001, patience=3, looks=20))
    assert [(Path(r["path"]).name, "error" in r) for r in rows] == [("b.png", 0), ("a.png", 1), ("a.png", 0)]
    assert "tried again" in rows[1]["error"] and all("score" in row for row in rows_of(inbox))


def test_a_folder_that_disappears_is_said_once_and_taken_up_again(model, inbox):
    put(inbox / "a.png")
    rows = watch(model, inbox, every=0.001, looks=200)
    assert "score" in next(rows)
    inbox.rename(inbox.parent / "away")
    gone = next(rows)
    assert "not there any more" in gone["error"] and gone["path"] == str(inbox)
    (inbox.parent / "away").rename(inbox)
    put(inbox / "b.png", 1)
    assert Path(next(rows)["path"]).name == "b.png"
    assert list(rows) == []


def test_looks_cost_nothing_for_what_is_judged(inbox, monkeypatch):
    done = set()
    for i in range(3000):
        path = inbox / f"{i}.png"
        path.touch()
        done.add((path.name, 0, path.stat().st_mtime_ns))
    known, asked, real = Known(), [], module.stamp_of
    monkeypatch.setattr(module, "stamp_of", lambda path: asked.append(path) or real(path))
    assert look(inbox, {}, done, known) == {} and len(asked) == 3000
    known.changed -= 60
    for _ in range(6):
        asked.clear()
        assert look(inbox, {}, done, known) == {} and len(asked) == module.RECHECKED
    put(inbox / "new.png")
    assert [path.name for path in look(inbox, {}, done, known)] == ["new.png"]
    put(inbox / "77.png")  # written over in place
    seen = [path.name for _ in range(7) for path in look(inbox, {}, done, known)]
    assert "77.png" in seen and seen.count("new.png") == 7


@pytest.mark.parametrize("seed", range(4))
def test_looks_that_remember_see_what_looks_without_memory_see(inbox, monkeypatch, seed):
    "Files come, change, go, and are judged, in any order."
    monkeypatch.setattr(module, "SETTLED", 0.0)
    rng = np.random.default_rng(seed)
    known, done = Known(), set()
    for step in range(150):
        path = inbox / f"{rng.integers(12)}.png"
        if rng.random() < 0.7:
            path.write_bytes(bytes(int(rng.integers(1, 99))))
            os.utime(path, ns=(step, step))
        else:
            path.unlink(missing_ok=True)
        os.utime(inbox, ns=(step, step))
        found = look(inbox, {}, done, known)
        assert found == look(inbox, {}, done)
        for judged in list(found)[: rng.integers(3)]:
            done.add((judged.name, *found[judged][0]))


def test_a_map_that_cannot_be_drawn_now_is_drawn_later(model, inbox):
    put(inbox / "a.png")
    tries = []

    def draw(path, heat_map):
        tries.append(path)
        if len(tries) < 3:
            raise UnavailableError(f"{path} may not be read")
        return {"map": "m"}

    told, row = watch(model, inbox, every=0.001, looks=9, before=draw)
    assert "tried again" in told["error"] and row["map"] == "m" and len(tries) == 3


def test_the_journal_has_no_link_for_its_mark(model, inbox, tmp_path):
    (tmp_path / "precious").write_text("years of work")
    (tmp_path / "j.reading").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        Journal(tmp_path / "j", "m")
    assert (tmp_path / "precious").read_text() == "years of work"


def test_a_long_watch_is_cheap(inbox):
    "20,000 judged files: a look takes a few milliseconds once the folder has settled."
    done = set()
    for i in range(20_000):
        path = inbox / f"{i}.png"
        path.touch()
        done.add((path.name, 0, path.stat().st_mtime_ns))
    known = Known()
    look(inbox, {}, done, known)
    known.changed -= 60
    start = time.process_time()
    for _ in range(10):
        look(inbox, {}, done, known)
    assert (time.process_time() - start) / 10 < 20_000 * 3.5e-6, DataError


def test_a_row_at_which_its_reader_breaks_off_comes_again(model, inbox):
    "As in `grad_predict --watch | head -1`, and where a disk is full behind what is written."
    for i, name in enumerate("abc"):
        put(inbox / f"{name}.png", i)
    rows = watch(model, inbox, every=0.001, looks=3)
    first, second = next(rows), next(rows)
    rows.close()
    again = list(watch(model, inbox, every=0.001, looks=3))
    assert again[0] == second and [Path(row["path"]).name for row in again] == ["b.png", "c.png"]
    assert "a.png" in first["path"] and list(watch(model, inbox, every=0.001, looks=1)) == []
    assert len(rows_of(inbox)) == 3 and not list(inbox.parent.glob("*.reading"))


def test_a_wrong_limit_of_pixels_ends_a_watch_and_a_low_one_is_tried_again(model, inbox, monkeypatch):
    put(inbox / "a.png")
    monkeypatch.setenv("GRAD_NB_MAX_PIXELS", "64e6")
    with pytest.raises(ValueError, match="GRAD_NB_MAX_PIXELS must be a whole number"):
        list(watch(model, inbox, every=0.001, looks=9, patience=1))
    monkeypatch.setenv("GRAD_NB_MAX_PIXELS", "100")
    (row,) = watch(model, inbox, every=0.001, looks=9, patience=1)
    assert "at most 100 are read" in row["error"] and "tried again" in row["error"]
    monkeypatch.delenv("GRAD_NB_MAX_PIXELS")
    (row,) = watch(model, inbox, every=0.001, looks=3)
    assert "score" in row
