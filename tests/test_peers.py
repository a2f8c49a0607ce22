"""Peers: the same pictures, threads and clock; nothing is downloaded, and what is missing is said."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from grad_nb.bench import peers
from grad_nb.bench.peers import PEERS, bench_peers, build_peer
from grad_nb.core.files import write_json
from grad_nb.study.tables import table_3

SMALL = dict(threads=1, runs=2, size=48, sizes=(48,), width=0.1, progress=False)


def test_an_unknown_peer_is_an_error():
    with pytest.raises(ValueError, match="there are PatchCore, PaDiM"):
        build_peer("none")


@pytest.mark.skipif(find_spec("anomalib") is not None, reason="anomalib is installed")
def test_what_to_install():
    with pytest.raises(ImportError, match="compare"):
        bench_peers(("STFPM",), **SMALL)


class Net(torch.nn.Module):
    "Stands in for a peer."

    def __init__(self, forward):
        super().__init__()
        self.forward = forward


class Found:
    def __init__(self, n):
        self.pred_score, self.anomaly_map = torch.zeros(n), torch.zeros(n, 1, 4, 4)


def test_everybody_gets_the_same_kind_of_pictures_time_in_turns(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        peers,
        "build_peer",
        lambda name, size: Net(lambda x: seen.append((name, tuple(x.shape), float(x.max()))) or Found(len(x))),
    )
    real = peers._ours
    monkeypatch.setattr(
        peers, "_ours", lambda *a: lambda x, judge=real(*a): seen.append(("GRAD", x.shape, x.dtype)) or judge(x)
    )
    rows = bench_peers(("STFPM", "DSR"), batch=2, **SMALL)
    assert [name for name, *_ in seen[:16]] == ["STFPM"] * 8 + ["DSR"] * 8 and seen[0][2] == 0, (
        "each peer is tried in both memory layouts before anything is timed"
    )
    del seen[:16]
    assert [name for name, *_ in seen] == 3 * ["GRAD", "GRAD", "STFPM", "STFPM", "DSR", "DSR"], (
        "each twice, and the second call is timed"
    )
    assert all(shape in ((2, 3, 48, 48), (2, 48, 48, 3)) for _, shape, _ in seen) and all(
        top <= 1 for name, _, top in seen if name != "GRAD"
    )
    assert seen[0][2] == np.uint8 and [row["method"] for row in rows] == [
        "GRAD here",
        "STFPM (anomalib)",
        "DSR (anomalib)",
    ]
    for row in rows:
        assert (row["threads"], row["batch"], row["runs"], row["weights"]) == (1, 2, 2, "random") and row[
            "times_GRAD"
        ] == row["median_ms"] / rows[0]["median_ms"]
    write_json(tmp_path / "bench.json", {"detectors": [], "peers": rows})
    assert list(table_3(tmp_path / "bench.json").index[-3:]) == ["GRAD here", "STFPM (anomalib)", "DSR (anomalib)"]


def test_several_detectors_stand_beside_one_alone():
    rows = bench_peers((), **SMALL | {"sizes": (48, 34)})
    assert [row["method"] for row in rows] == ["GRAD here", "GRAD here, one detector"] and rows[0]["times_GRAD"] == 1


def test_a_peer_that_breaks_is_named_and_the_others_go_on(monkeypatch, tmp_path):
    def build(name, size):
        if name == "DSR":
            raise RuntimeError("no such layer")
        return Net(lambda x: Found(len(x)))

    monkeypatch.setattr(peers, "build_peer", build)
    rows = bench_peers(("DSR", "STFPM"), **SMALL)
    assert [row["method"] for row in rows] == [
        "GRAD here",
        "STFPM (anomalib)",
        "DSR (anomalib)",
    ] and "no such layer" in rows[-1]["error"]
    write_json(tmp_path / "bench.json", {"detectors": [], "peers": rows})
    assert "DSR (anomalib)" not in table_3(tmp_path / "bench.json").index


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
        seen.append(
            torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return Found(len(x))

    net.forward = forward
    monkeypatch.setattr(peers, "best_ms", lambda call, runs, device: (call(), 1.0 if seen[-1] == better else 2.0)[1])
    way = peers._theirs(net, 48, torch.device("cpu"))
    way(np.zeros((2, 48, 48, 3), np.uint8))
    assert seen[-1] == better and net.weight.is_contiguous(memory_format=better)
