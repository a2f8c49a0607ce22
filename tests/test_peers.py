"""Peers: the same pictures, threads and clock; nothing is downloaded, and what is missing is said."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from grad_nb.bench import peers
from grad_nb.bench.peers import GRAD_HERE, PEERS, Contender, Terms, bench_peers, beside_another, build_peer, opened
from grad_nb.core.files import write_json
from grad_nb.study.figures import measured_peers
from grad_nb.study.tables import table_3

SMALL = dict(threads=1, runs=2, size=48, sizes=(48,), width=0.1, progress=False)
ALONE = [name for name in GRAD_HERE if not GRAD_HERE[name][0]]  # the rows that a single size has


def test_an_unknown_peer_is_an_error():
    with pytest.raises(ValueError, match="there are PatchCore, PaDiM"):
        build_peer("none")


@pytest.mark.skipif(find_spec("anomalib") is not None, reason="anomalib is installed")
def test_what_to_install(only_the_library):
    with pytest.raises(ImportError, match="compare"):
        bench_peers(("STFPM",), **SMALL)


@pytest.fixture
def only_the_library(monkeypatch):
    "No file is exported, so that only PyTorch is timed."
    monkeypatch.setattr(peers, "export_all", lambda model, folder: iter(()))
    monkeypatch.setattr(peers, "export_peer", lambda model, file, size: [])


class Net(torch.nn.Module):
    "Stands in for a peer."

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Found:
    def __init__(self, n):
        self.pred_score, self.anomaly_map = torch.zeros(n), torch.zeros(n, 1, 4, 4)


@pytest.fixture
def seen(monkeypatch, only_the_library):
    "Who is given what: name, shape and largest value, call by call."
    calls = []

    def build(name, size):
        return Net(lambda x: calls.append((name, tuple(x.shape), float(x.max()))) or Found(len(x)))

    def own(model):
        return lambda x: calls.append(("GRAD", x.shape, x.dtype)) or (x, x)

    monkeypatch.setattr(peers, "build_peer", build)
    monkeypatch.setattr(peers, "predicted", own)
    monkeypatch.setattr(peers, "best_ms", lambda call, runs, device: (call(), 1.0)[1])
    return calls


TURNS = ["GRAD", "GRAD"] * len(ALONE) + ["STFPM", "STFPM", "DSR", "DSR"]  # each twice, and the second call is timed


def test_everybody_gets_the_same_kind_of_pictures_time_in_turns(seen, tmp_path):
    rows = bench_peers(("STFPM", "DSR"), **SMALL)
    assert [name for name, *_ in seen[-3 * len(TURNS) :]] == 3 * TURNS
    assert all(shape in ((1, 3, 48, 48), (1, 48, 48, 3)) for _, shape, _ in seen[-len(TURNS) :])
    assert all(top <= 1 for name, _, top in seen if name != "GRAD") and seen[-len(TURNS)][2] == np.uint8
    assert [row["method"] for row in rows] == [*ALONE, "STFPM (anomalib)", "DSR (anomalib)"]
    for row in rows:
        assert (row["threads"], row["batch"], row["runs"], row["weights"]) == (1, 1, 2, "random")
        assert row["in_turns"] and row["times_GRAD"] == row["median_ms"] / rows[0]["median_ms"]
    write_json(tmp_path / "bench.json", {"detectors": [], "peers": rows})
    assert list(table_3(tmp_path / "bench.json").index[-2:]) == ["STFPM (anomalib)", "DSR (anomalib)"]


def test_in_larger_batches_each_is_alone_in_memory(seen):
    rows = bench_peers(("STFPM", "DSR"), (2,), **SMALL)
    assert {shape for _, shape, _ in seen[-1:]} == {(2, 3, 48, 48)} and not any(row["in_turns"] for row in rows)
    names = [name for name, shape, _ in seen if shape[0] == 2]
    assert [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name] == ["GRAD", "STFPM", "DSR"]


def test_several_detectors_stand_beside_one_alone(only_the_library):
    rows = bench_peers((), **SMALL | {"sizes": (96, 48), "size": 96})
    assert [row["method"] for row in rows] == list(GRAD_HERE) and rows[0]["times_GRAD"] == 1


def test_a_peer_that_breaks_is_named_and_the_others_go_on(monkeypatch, tmp_path, only_the_library):
    def build(name, size):
        if name == "DSR":
            raise RuntimeError("no such layer\nand more")
        return Net(lambda x: Found(len(x)))

    monkeypatch.setattr(peers, "build_peer", build)
    rows = bench_peers(("DSR", "STFPM"), **SMALL)
    assert [row["method"] for row in rows] == [*ALONE, "STFPM (anomalib)", "DSR (anomalib)"]
    assert rows[-1]["error"] == "RuntimeError: no such layer"
    write_json(tmp_path / "bench.json", {"detectors": [], "peers": rows})
    assert "DSR (anomalib)" not in table_3(tmp_path / "bench.json").index


def test_a_form_that_cannot_be_called_is_named_and_the_others_go_on(monkeypatch, only_the_library):
    def build(name, size):
        calls = []

        def forward(x):
            calls.append(1)
            if len(x) > 1:
                raise RuntimeError("one at a time")
            return Found(len(x))

        return Net(forward)

    monkeypatch.setattr(peers, "build_peer", build)
    rows = bench_peers(("STFPM",), (1, 2), **SMALL)
    assert [row.get("batch") for row in rows if row["method"].startswith("STFPM")] == [1, 2]
    assert rows[-1]["error"] == "RuntimeError: one at a time" and rows[-1]["way"] == "PyTorch"


def test_every_exported_form_judges_beside_the_library():
    pytest.importorskip("onnxruntime")
    rows = bench_peers((), (1, 3), **SMALL)
    ways = {(row["way"], row["precision"]) for row in rows if row["method"] == "GRAD here, one network"}
    assert {("library", "float32"), ("ONNX Runtime", "float32"), ("ONNX Runtime", "int8")} <= ways
    assert not [row for row in rows if "error" in row]
    assert {row["batch"] for row in rows} == {1, 3} and {row["processes"] for row in rows} == {1}


@pytest.mark.slow
def test_another_process_judges_beside_it(only_the_library):
    rows = bench_peers((), **SMALL, beside=True)
    assert [row["processes"] for row in rows] == [1] * len(ALONE) + [2] * len(ALONE)
    both = rows[-1]
    assert both["pictures_per_s"] == pytest.approx(2000 / both["median_ms"])


def test_a_process_that_does_not_begin_is_said(monkeypatch):
    monkeypatch.setattr(peers, "PATIENCE", 0.0)
    with pytest.raises(RuntimeError, match="did not begin"):
        with beside_another(Contender("GRAD here", "library", "float32"), Terms(48, (48,), 0.1)):
            pass


def test_the_figure_has_each_peer_once_in_float32_and_its_fastest_form(tmp_path):
    row = {"batch": 1, "processes": 1, "device": "cpu", "precision": "float32"}
    rows = [
        row | {"method": "PatchCore (anomalib)", "way": "PyTorch", "median_ms": 50.0},
        row | {"method": "PatchCore (anomalib)", "way": "OpenVINO", "median_ms": 40.0},
        row | {"method": "PatchCore (anomalib)", "way": "OpenVINO", "median_ms": 20.0, "precision": "int8"},
        row | {"method": "PatchCore (anomalib)", "way": "OpenVINO", "median_ms": 10.0, "processes": 2},
    ]
    write_json(tmp_path / "bench.json", {"peers": rows})
    found = measured_peers(tmp_path / "bench.json")
    assert found.latency_ms.tolist() == [40.0]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("anomalib") is None, reason="anomalib is not installed")
@pytest.mark.parametrize("name", PEERS)
def test_every_peer_can_be_built_and_judges(name):
    found = build_peer(name)(torch.rand(1, 3, 256, 256))
    assert found.anomaly_map.shape[-2:] == (256, 256) and found.pred_score.numel() == 1


@pytest.mark.parametrize("better", [torch.channels_last, torch.contiguous_format])
def test_a_peer_has_the_layout_in_which_it_is_faster(monkeypatch, better):
    seen, net = [], torch.nn.Conv2d(3, 4, 3)

    def forward(x):
        last = net.weight.is_contiguous(memory_format=torch.channels_last)
        seen.append(torch.channels_last if last else torch.contiguous_format)
        return Found(len(x))

    net.forward = forward
    monkeypatch.setattr(peers, "build_peer", lambda name, size: net)
    monkeypatch.setattr(peers, "best_ms", lambda call, runs, device: (call(), 1.0 if seen[-1] == better else 2.0)[1])
    way = opened(Contender("STFPM", "PyTorch", "float32"), Terms(48, (48,)))
    way(np.zeros((2, 48, 48, 3), np.uint8))
    assert net.weight.is_contiguous(memory_format=better)
