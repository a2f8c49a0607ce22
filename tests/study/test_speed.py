"""The speed of a device for Table 3: what there is is measured, and what there is not is said."""

import importlib.util

import pytest
import torch

from grad_nb.config import override, preset
from grad_nb.core.files import read_json, write_json
from grad_nb.study import speed
from grad_nb.study.speed import SPEED_FILE, speed_stage, what_is_timed
from grad_nb.study.tables import table_3

CPU = torch.device("cpu")


def small(monkeypatch):
    "Small detectors in the place of the paper's."
    monkeypatch.setattr(speed, "TOGETHER", (96, 48))
    monkeypatch.setattr(speed, "what_is_timed", lambda settings: [((64, 40), 0.1), ((64,), 0.1)])
    return preset("demo")


def test_three_detectors_and_one_are_timed_and_those_of_the_preset():
    assert what_is_timed(preset("paper")) == [((256, 128, 64), 1.0), ((256,), 1.0)]
    narrow = override(preset("fast"), {"detector.width": 0.5})
    assert what_is_timed(narrow)[2:] == [((256, 128, 64), 0.5), ((256,), 0.5)]


def test_a_stage_leaves_rows_that_the_table_takes_and_is_done_once(monkeypatch, tmp_path):
    settings = small(monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    record = speed_stage(tmp_path, settings, CPU, runs=2)
    found = read_json(tmp_path / SPEED_FILE)
    assert [row["detectors"] for row in found["protocol"]] == ["64 + 40", "64"] and not found["peers"]
    students = ["GRAD here, one network for 96 + 48", "GRAD here, one network for 96"]
    assert [row["method"] for row in found["students"]] == students
    assert len(record["missing"]) == 1 and "pip install 'grad_nb[compare]'" in record["missing"][0]
    table = table_3(tmp_path / SPEED_FILE)
    assert list(table.index[-4:]) == ["GRAD here, 64 + 40", "GRAD here, 64", *students]
    assert "the library's form" in table.iloc[-1].protocol and "anomalib" in table.attrs["notes"][-1]
    assert speed_stage(tmp_path, settings, CPU, runs=2)["skipped"]
    write_json(tmp_path / SPEED_FILE, {})
    assert not speed_stage(tmp_path, settings, CPU, runs=2)["skipped"], "a damaged file is measured again"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried to allocate 9 GB")])
def test_detectors_that_do_not_fit_are_named_and_the_others_are_timed(monkeypatch, error):
    settings = small(monkeypatch)

    def protocol(sizes, *rest):
        if len(sizes) > 1:
            raise error
        return {"detectors": "64"}

    monkeypatch.setattr(speed, "bench_protocol", protocol)
    missing = []
    assert speed.detector_rows(settings, CPU, missing) == [{"detectors": "64"}]
    assert missing[0].startswith("detectors 64 + 40 of width 0.1: the memory of cpu")


def test_another_error_is_an_error(monkeypatch):
    settings = small(monkeypatch)

    def protocol(*rest):
        raise RuntimeError("a kernel is wrong")

    monkeypatch.setattr(speed, "bench_protocol", protocol)
    with pytest.raises(RuntimeError, match="a kernel is wrong"):
        speed.detector_rows(settings, CPU, [])


def test_peers_that_cannot_be_run_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    rows = [{"method": "GRAD here", "median_ms": 1.0}, {"method": "PaDiM (anomalib)", "error": "TypeError: layers"}]
    monkeypatch.setattr(speed, "bench_peers", lambda **options: rows)
    missing = []
    assert speed.peer_rows(CPU, missing) == rows[:1] and missing == ["PaDiM (anomalib): TypeError: layers"]

    def broken(**options):
        raise ImportError("no libGL")

    monkeypatch.setattr(speed, "bench_peers", broken)
    missing = []
    assert speed.peer_rows(CPU, missing) == [] and "cannot be imported here (no libGL)" in missing[0]


def test_a_busy_machine_is_said_below_the_table(monkeypatch, tmp_path):
    small(monkeypatch)
    monkeypatch.setattr(speed, "bench_protocol", lambda *rest: {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    assert speed.measure_speed(preset("demo"))["notes"] == []
    monkeypatch.setattr(speed.os, "getloadavg", lambda: (900.0, 0.0, 0.0))
    found = speed.measure_speed(preset("demo"))
    write_json(tmp_path / "bench.json", found | {"protocol": []})
    assert "the machine was busy" in table_3(tmp_path / "bench.json").attrs["notes"][1]


def test_an_error_that_only_speaks_of_memory_is_no_small_memory():
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    missing = []
    with pytest.raises(RuntimeError, match="illegal"):
        speed._if_it_fits(fails, "detectors", torch.device("cpu"), missing)
    assert not missing
