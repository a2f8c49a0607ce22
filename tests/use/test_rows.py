"""Rows of grad_predict: whole in any reader, harmless in a spreadsheet, and none is lost to one bad picture."""

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grad_nb.datasets.readers import DataError
from grad_nb.use import verdicts
from grad_nb.use.verdicts import RowWriter, csv_field, judge


@settings(max_examples=300, deadline=None)
@given(fields=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4))
def test_a_row_is_one_row_with_its_fields_in_any_reader(fields):
    line = ",".join(map(csv_field, fields))
    (row,) = csv.reader(io.StringIO(line + "\n", newline=""))
    assert [Path(a) for a in row] == [Path(b) for b in fields]
    assert all(text[0] not in "=+-@\t\r" for text in row)


def test_numbers_and_plain_paths_stay_as_they_are(capsys):
    told = RowWriter(["path", "score", "anomalous"])
    told.row({"path": "a/b c.png", "score": -0.25, "anomalous": True})
    told.row({"path": "-2.png", "score": 1e-7, "anomalous": False})
    out = capsys.readouterr().out
    assert out == "path,score,anomalous\na/b c.png,-0.25,True\n./-2.png,1e-07,False\n"


def test_names_on_stdin_are_bytes(monkeypatch):
    class Stdin:
        buffer = io.BytesIO(b"a.png\n\xff\xfe.png\r\n\n b.png\n")

    monkeypatch.setattr("sys.stdin", Stdin)
    assert [os.fsencode(p) for p in verdicts.expand(["-"])] == [b"a.png", b"\xff\xfe.png", b" b.png"]


@pytest.mark.parametrize("keep_going", [True, False])
def test_a_picture_that_is_gone_when_its_map_is_drawn(keep_going):
    class Batch:
        paths, scores, labels, maps = [Path("a"), Path("b"), Path("c")], [1, 2, 3], [0, 0, 1], [0, 0, 0]

    class Model:
        def stream(self, *_):
            yield Batch

    def draw(path, _):
        if path.name == "b":
            raise DataError("b is gone")
        return {"map": "m"}

    broken = []
    rows = judge(Model(), [], draw, (lambda *about: broken.append(about)) if keep_going else None, True)
    if not keep_going:
        with pytest.raises(DataError):
            list(rows)
        return
    assert [row["path"] for row in rows] == ["a", "c"]
    assert [path.name for path, _ in broken] == ["b"]
