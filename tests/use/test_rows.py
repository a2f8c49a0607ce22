"""Rows of grad_predict: whole in any reader, harmless in a spreadsheet, and none is lost to one bad picture."""

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grad_nb.core.files import csv_field
from grad_nb.core.stages import read_table, table_csv, write_table
from grad_nb.datasets.readers import DataError
from grad_nb.study.tables import write_tables
from grad_nb.use import verdicts
from grad_nb.use.verdicts import RowWriter, judge

STARTS = "=+-@\t\r\n＝＋－＠"  # what a spreadsheet takes as the beginning of a formula
HOSTILE = ["=cmd|' /C calc'!A0", "+1+cmd", "-2+3+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\r=1", "\n=1", "＝1", '="a,b"']
NUMBERS = ["-0.42", "+1.5", "-3", "-1e-05", "-.5", "-0.4 ± 0.1", "-", "98.1 ± 0.3", "n/a"]


@settings(max_examples=300, deadline=None)
@given(fields=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4))
def test_a_row_is_one_row_with_its_fields_in_any_reader(fields):
    line = ",".join(csv_field(field, path=True) for field in fields)
    (row,) = csv.reader(io.StringIO(line + "\n", newline=""))
    assert [Path(a) for a in row] == [Path(b) for b in fields]
    assert all(text[0] not in STARTS for text in row)


@settings(max_examples=300, deadline=None)
@given(fields=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=4))
def test_text_that_is_no_path_is_itself_or_itself_after_an_apostrophe(fields):
    (row,) = csv.reader(io.StringIO(",".join(map(csv_field, fields)) + "\n", newline=""))
    for text, field in zip(row, fields, strict=True):
        assert text == field or (text == f"'{field}" and field[0] in STARTS)
        assert text[0] not in STARTS or text == "-" or float(text.partition(" ± ")[0]) is not None


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_stays_a_number_also_as_text(number):
    assert csv_field(number) == number


def cells(text: str) -> list[str]:
    return [field for row in csv.reader(io.StringIO(text, newline="")) for field in row]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_table_holds_a_formula(tmp_path, name):
    "Neither in a name, nor in a column's, nor in a cell; predict's rows, a run's scores, the paper's tables."
    table = pd.DataFrame({"path": [name], "type": [name], name: ["-0.42"], "score": [-0.5]})
    write_table(tmp_path / "scores.csv", table)
    write_tables(tmp_path, {"t": table.set_index("type")})
    for file in ("scores.csv", "t.csv"):
        found = cells((tmp_path / file).read_bytes().decode())
        assert {"-0.42", "-0.5"} <= set(found) and len(found) == 8
        assert not [field for field in found if field[0] in STARTS and field not in ("-0.42", "-0.5")]
    back = read_table(tmp_path / "scores.csv")
    assert Path(back.path[0]) == Path(name) and back.type[0] == f"'{name}" and back.score[0] == -0.5


def test_names_that_look_like_numbers_or_like_nothing_come_back_as_names(tmp_path):
    table = pd.DataFrame({"path": ["test/a\nb.png", "test/\udcff.png", "1", "NA"], "type": ["NA", "007", "", "null"]})
    table["score"] = [1.5, np.nan, -2.0, 1e-7]
    write_table(tmp_path / "scores.csv", table)
    pd.testing.assert_frame_equal(read_table(tmp_path / "scores.csv"), table, check_dtype=False)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(width=64), min_size=1, max_size=5),
    st.lists(st.floats(width=32), min_size=5, max_size=5),
    st.lists(st.integers(-(2**60), 2**60), min_size=5, max_size=5),
)
def test_numbers_are_written_as_pandas_writes_them(a, b, c):
    n = len(a)
    table = pd.DataFrame({"a": a, "b": np.array(b[:n], np.float32), "c": c[:n], "d": [True] * n, "e": ["x, y"] * n})
    assert table_csv(table) == table.to_csv(index=False, lineterminator="\n")
    assert table_csv(table.set_index("c"), index=True) == table.set_index("c").to_csv(lineterminator="\n")


def test_a_row_does_nothing_to_a_terminal(capsys, monkeypatch):
    "In a file a name is what it is; on a terminal it is shown."
    row = {"path": "a\x1b]0;b\x07.png", "score": 0.5, "anomalous": True}
    told = RowWriter(["path", "score", "anomalous"])
    told.row(row)
    assert "\x1b" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    told.row(row)
    assert capsys.readouterr().out == '"a\\x1b]0;b\\x07.png",0.5,True\n'


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


@pytest.mark.parametrize("jsonl", [False, True])
def test_a_row_and_its_end_are_one_write_even_without_a_buffer(monkeypatch, jsonl):
    "As with PYTHONUNBUFFERED=1, where a kill between two writes would join a row to the next process's."
    pieces = []

    class Raw(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            pieces.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(Raw(), write_through=True))
    told = RowWriter(["path", "score", "anomalous"], jsonl)
    told.row({"path": "a.png", "score": 0.5, "anomalous": False})
    assert len(pieces) == 2 - jsonl and all(piece.endswith(b"\n") for piece in pieces)
