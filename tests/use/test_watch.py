"""grad_predict --watch as a line of production uses it: slow writers, kills, broken files, two watchers, full disks."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from grad_nb.config import override, preset
from grad_nb.datasets.readers import DataError, picture_files
from grad_nb.datasets.trays import draw_tray
from grad_nb.grad import GRAD
from grad_nb.use.daily import grad_predict
from grad_nb.use.watch import Journal, being_written, look, model_key, stamp_of, watch

TINY = {
    "generator.width": 8,
    "generator.steps": 2,
    "generator.batch": 2,
    "generator.n_samples": 4,
    "generator.sample_steps": 2,
    "detector.width": 0.1,
    "detector.steps": 2,
    "evaluation.map_size": 64,
    "evaluation.batch": 3,
}


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(4)
    return np.stack([draw_tray(rng, 64)[0] for _ in range(12)])


@pytest.fixture(scope="module")
def model(pictures) -> GRAD:
    return GRAD(override(preset("demo"), TINY), device="cpu", progress=False).fit(pictures)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.grad"
    model.save(path)
    return path


@pytest.fixture
def inbox(tmp_path) -> Path:
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def put(picture: np.ndarray, path: Path) -> Path:
    Image.fromarray(picture).save(path)
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(condition, seconds=60):
    "Wait for something to happen in another process."
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.03)
    return found


class Watcher:
    "A grad_predict --watch in a process of its own; its stdout and stderr go to files."

    def __init__(self, saved, inbox, *args):
        self.out, self.err = inbox.parent / "out.jsonl", inbox.parent / "err.txt"
        program = Path(sys.executable).parent / "grad_predict"
        command = [program, saved, "--watch", inbox, "--every", "0.05", "--format", "jsonl", *args]
        with open(self.out, "ab") as out, open(self.err, "ab") as err:
            self.process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def rows(self) -> list[dict]:
        return lines(self.out)


def test_each_picture_once_whatever_happens(saved, inbox, pictures, model):
    """A slow writer, a broken file, kill -9 in the middle, a restart, Ctrl-C.

    The journal has each picture once, with its right score.
    """
    journal = inbox.parent / "in.journal.jsonl"
    for i in range(4):
        put(pictures[i], inbox / f"{i}.png")
    with Watcher(saved, inbox) as first:
        until(lambda: len(lines(journal)) >= 2)
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    before = lines(journal)
    with open(journal, "ab") as f:
        f.write(b'{"name": "torn')
    for i in range(4, 7):
        put(pictures[i], inbox / f"{i}.png")
    (inbox / "broken.png").write_bytes((inbox / "0.png").read_bytes()[:200])
    with Watcher(saved, inbox, "--maps", inbox.parent / "maps") as second:
        until(
            lambda: all(f"{i}.png" in journal.read_text() for i in range(7))
        )  # not stdout: the kill may have cost a line there
        whole = put(pictures[7], inbox.parent / "7.bmp").read_bytes()
        with open(
            inbox / "7.bmp", "wb", buffering=0
        ) as slow:  # a header with the right size, and the pixels bit by bit
            for i in range(0, len(whole), 1500):
                slow.write(whole[i : i + 1500])
                time.sleep(0.02)
        until(
            lambda: any(r["path"].endswith("7.bmp") for r in second.rows()) and "broken.png" in second.err.read_text()
        )
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(60) == 130
    kept = lines(journal)
    assert kept[: len(before)] == before and Counter(r["name"] for r in kept) == Counter(
        [f"{i}.png" for i in range(7)] + ["7.bmp", "broken.png"]
    )
    want = dict(zip([f"{i}.png" for i in range(7)] + ["7.bmp"], model.score_samples(pictures[:8])))
    for row in kept:
        if row["name"] == "broken.png":
            assert "score" not in row and "broken.png" in row["error"]
        else:
            assert row["score"] == pytest.approx(want[row["name"]], abs=2e-6)
    told = Counter(Path(r["path"]).name for r in second.rows())
    assert (
        set(told.values()) == {1} and set(told) <= set(want) and len(told) >= len(want) - 1
    )  # a kill between journal and stdout costs a line there
    assert {p.name for p in (inbox.parent / "maps").iterdir()} == {
        n if n != "7.bmp" else "7.bmp.png" for n in set(want) - {r["name"] for r in before}
    }
    assert (
        second.err.read_text().splitlines()[0].startswith("grad_predict: ")
        and second.err.read_text().splitlines()[-1] == "grad_predict: stopped"
    )


def test_a_picture_in_pieces_is_not_read(model, inbox, pictures):
    "Looks alternate with writes: as long as it changes, nothing is told of it."
    data, path, told = put(pictures[0], inbox.parent / "a.png").read_bytes(), inbox / "a.png", []
    seen = {}
    for i in range(0, len(data), len(data) // 5 + 1):
        with open(path, "ab") as f:
            f.write(data[i : i + len(data) // 5 + 1])
        seen = look(inbox, seen, set())
        told.append(seen[path][1])
    assert told == [0] * 5 and look(inbox, seen, set())[path][1] == 1


def test_a_stalled_writer_is_given_time(model, inbox, pictures):
    data, path = put(pictures[0], inbox.parent / "a.png").read_bytes(), inbox / "a.png"
    path.write_bytes(data[:300])
    assert list(watch(model, inbox, every=0.001, patience=50, looks=20)) == []
    path.write_bytes(data)
    (row,) = watch(model, inbox, every=0.001, patience=50, looks=3)
    assert row["path"] == str(path) and "score" in row


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell who has a file open")
def test_a_writer_that_pauses_with_the_file_open_is_waited_for(model, inbox, pictures):
    """Every stamp stands still and the file decodes, for it was made full size at once.

    Only the open file says that it is not whole.
    """
    path = inbox / "a.bmp"
    whole = put(pictures[0], inbox.parent / "a.bmp").read_bytes()
    with open(path, "wb", buffering=0) as slow:
        slow.write(whole[:200] + bytes(len(whole) - 200))
        assert being_written(path) and list(watch(model, inbox, every=0.001, patience=3, looks=12)) == []
        slow.seek(0)
        slow.write(whole)
    (row,) = watch(model, inbox, every=0.001, looks=4)
    assert row["score"] == pytest.approx(model.score_samples(pictures[:1])[0], abs=2e-6) and not being_written(path)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell who has a file open")
def test_asking_who_writes_harms_nobody(tmp_path):
    "Writers that come and go while we ask are not kept out and do not kill us; a pipe does not hold us up."
    path = tmp_path / "a.png"
    path.touch()
    os.mkfifo(tmp_path / "b.png")
    assert (
        not being_written(tmp_path / "b.png")
        and not being_written(tmp_path / "gone.png")
        and not being_written(tmp_path)
    )
    code = f"for i in range(2000): open({str(path)!r}, 'ab').write(b'x')"
    writer = subprocess.Popen([sys.executable, "-c", code])
    while writer.poll() is None:
        being_written(path)
    assert writer.returncode == 0 and path.stat().st_size == 2000


def test_a_picture_that_is_taken_away_before_its_map_is_drawn(model, inbox, pictures):
    "A robot moves the picture on as soon as it likes; the watch goes on, and the picture counts as not judged."
    put(pictures[0], inbox / "a.png")
    put(pictures[1], inbox / "b.png")
    os.utime(inbox / "a.png", ns=(1, 1))  # the older one comes first

    def takes_away(path, heat_map):
        if path.name == "a.png":
            path.rename(inbox.parent / "a.png")
        if not path.exists():
            raise DataError(f"{path} does not exist")
        return {}

    rows = list(watch(model, inbox, every=0.001, looks=4, before=takes_away))
    assert [Path(r["path"]).name for r in rows] == ["b.png"] and [
        r["name"] for r in lines(inbox.parent / "in.journal.jsonl")
    ] == ["b.png"]
    (inbox.parent / "a.png").rename(inbox / "a.png")
    assert [Path(r["path"]).name for r in watch(model, inbox, every=0.001, looks=3)] == ["a.png"], (
        "it is judged when it comes back"
    )


def test_a_map_that_cannot_be_drawn_is_reported_once(model, inbox, pictures):
    put(pictures[0], inbox / "a.png")

    def cannot(path, heat_map):
        raise DataError(f"{path} cannot be drawn")

    (row,) = watch(model, inbox, every=0.001, looks=5, before=cannot)
    assert "cannot be drawn" in row["error"] and "score" not in row
    assert list(watch(model, inbox, every=0.001, looks=3)) == []


def test_a_broken_one_is_told_once_and_again_when_mended(model, inbox, pictures):
    path = inbox / "a.png"
    path.write_bytes(b"nonsense")
    put(pictures[1], inbox / "b.png")
    rows = list(watch(model, inbox, every=0.001, patience=3, looks=20))
    assert [(Path(r["path"]).name, "error" in r) for r in rows] == [("b.png", False), ("a.png", True)]
    put(pictures[0], path)
    (row,) = watch(model, inbox, every=0.001, looks=3)
    assert row["path"] == str(path) and "score" in row


def test_a_dead_link_an_empty_file_and_other_files(model, inbox):
    (inbox / "dead.png").symlink_to(inbox / "gone.png")
    (inbox / "empty.png").touch()
    (inbox / "notes.txt").write_text("x")
    (inbox / "folder.png").mkdir()
    (inbox / ".hidden.png").write_text("x")
    (inbox / "circle.png").symlink_to("circle.png")
    rows = list(watch(model, inbox, every=0.001, patience=2, looks=9))
    assert sorted(Path(r["path"]).name for r in rows) == ["circle.png", "dead.png", "empty.png"]
    assert all("error" in r for r in rows)
    assert [path.name for path in picture_files(inbox)] == ["circle.png", "dead.png", "empty.png"]


def test_a_journal_is_no_file_of_another_program(model, inbox):
    other = inbox.parent / "mine.json"
    text = '{"name": "line 4", "camera": "x"}'
    other.write_text(text)
    with pytest.raises(ValueError, match="line 1, is not a line of a journal"):
        list(watch(model, inbox, other, every=0.001, looks=1))
    assert other.read_text() == text


def test_a_picture_that_changes_while_it_is_judged_waits(model, inbox, pictures, monkeypatch):
    path, real = put(pictures[0], inbox / "a.png"), GRAD._score

    def slow(self, batch, *rest):
        if not changed:
            changed.append(put(pictures[5], path))
            os.utime(path, ns=(1, 1))
        return real(self, batch, *rest)

    changed = []
    monkeypatch.setattr(GRAD, "_score", slow)
    (row,) = watch(model, inbox, every=0.001, looks=6)
    monkeypatch.undo()
    assert changed and row["score"] == pytest.approx(model.score_samples(pictures[5:6])[0], abs=2e-6)


def test_what_comes_before_is_done_before_the_line_is_written(model, inbox, pictures):
    journal = inbox.parent / "in.journal.jsonl"
    put(pictures[0], inbox / "a.png")

    def fails(path, heat_map):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError):
        list(watch(model, inbox, every=0.001, looks=3, before=fails))
    assert lines(journal) == []
    (row,) = watch(model, inbox, every=0.001, looks=3, before=lambda path, heat_map: {"top": float(heat_map.max())})
    assert lines(journal)[0]["top"] == row["top"]
    told = datetime.fromisoformat(lines(journal)[0]["time"])
    assert abs((datetime.now(timezone.utc) - told).total_seconds()) < 600 and "time" not in row


def test_two_watchers_do_not_share_a_journal(saved, inbox):
    with Journal(inbox.parent / "in.journal.jsonl", "x"):
        done = subprocess.run(
            [Path(sys.executable).parent / "grad_predict", saved, "--watch", inbox],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2 and "in use by another process" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_journal_of_another_model_or_of_no_model(model, inbox, pictures, tmp_path):
    put(pictures[0], inbox / "a.png")
    list(watch(model, inbox, tmp_path / "j", every=0.001, looks=2))
    other = GRAD(override(preset("demo"), TINY), random_state=1, device="cpu", progress=False).fit(pictures)
    assert model_key(other) != model_key(model)
    distilled = copy.copy(model)
    distilled.student_ = torch.nn.Linear(1, 1)
    assert model_key(distilled) != model_key(model), "the one network decides over verdicts too"
    with pytest.raises(ValueError, match="another model"):
        list(watch(other, inbox, tmp_path / "j", every=0.001, looks=2))
    for text in (
        b"hello\n",
        b"[1]\n",
        b'{"name": "a"}\n',
        b"\xff\xfe\n",
        b"[" * 9000 + b"\n",
        b"\n",
        b"no end of line",
        b"\x89PNG\r\n\x1a\n...",
    ):
        (tmp_path / "k").write_bytes(text)
        with pytest.raises(ValueError, match="k, line 1"):
            Journal(tmp_path / "k", "m")
        assert (tmp_path / "k").read_bytes() == text, "a file that is no journal is not touched"


def test_a_journal_survives_a_cut_at_every_byte(tmp_path):
    path = tmp_path / "j"
    with Journal(path, "m") as journal:
        for i in range(3):
            journal.add(Path(f"é\udcff{i}.png"), (i, i), score=i / 3)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        n = whole[:cut].count(b"\n")
        with Journal(path, "m") as journal:
            assert journal.done == {(f"é\udcff{i}.png", i, i) for i in range(n)}
            journal.add(Path("next.png"), (9, 9))
        assert [json.loads(line)["name"] for line in path.read_bytes().splitlines()][n:] == ["next.png"]


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with Journal(tmp_path / "j", "m") as journal:
        journal.add(Path("a.png"), (1, 1))
        before = (tmp_path / "j").read_bytes()

        def full(fd):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.add(Path("b.png"), (2, 2))
        assert (tmp_path / "j").read_bytes() == before and ("b.png", 2, 2) not in journal.done


def test_wrong_use_is_said(model, saved, inbox, tmp_path, capsys):
    with pytest.raises(DataError, match="not a folder"):
        next(watch(model, tmp_path / "gone"))
    with pytest.raises(ValueError, match="every"):
        next(watch(model, inbox, every=0))
    with pytest.raises(SystemExit) as stop:
        grad_predict(str(saved), str(inbox), watch=str(inbox))
    assert stop.value.code == 2 and "not both" in capsys.readouterr().err


def test_maps_in_the_watched_folder_itself_are_refused(saved, inbox, pictures, capsys):
    picture = put(pictures[0], inbox / "a.png")
    before = picture.read_bytes()
    with pytest.raises(SystemExit) as stop:
        grad_predict(str(saved), watch=str(inbox), maps=str(inbox), every=0.01, device="cpu")
    assert stop.value.code == 2 and picture.read_bytes() == before and "overwrite" in capsys.readouterr().err
    inbox.joinpath("a.png").unlink()
    (inbox.parent / "link").symlink_to(inbox)
    with pytest.raises(SystemExit):
        grad_predict(str(saved), watch=str(inbox), maps=str(inbox.parent / "link"), every=0.01, device="cpu")
    assert "another folder" in capsys.readouterr().err


def test_stamps(tmp_path):
    assert stamp_of(tmp_path / "gone") is None
    a = tmp_path / "a"
    a.write_text("1")
    one = stamp_of(a)
    shutil.copystat(a, tmp_path)
    a.write_text("12")
    assert stamp_of(a) != one
