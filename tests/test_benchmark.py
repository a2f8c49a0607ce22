"""The benchmark: operations in closed form, what is timed, rows that carry their protocol. No time is asserted."""

import math
import mmap
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastcore.script import anno_parser
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared import pictures
from torch import nn

from grad_nb.accel.backends import accel_help, choice
from grad_nb.bench import backends, detectors, growth, recorded, stages, ways, whole
from grad_nb.bench.backends import bench_backends
from grad_nb.bench.charts import bench_charts
from grad_nb.bench.command import grad_bench
from grad_nb.bench.detectors import bench_detectors, bench_path
from grad_nb.bench.growth import bench_growth, forget_peak, peak_memory
from grad_nb.bench.operations import (
    bound_of,
    count_operations,
    fast_bytes,
    fast_operations,
    layer_bytes,
    operations,
    time_in_turns,
)
from grad_nb.bench.recorded import bench_protocol, bench_throughput
from grad_nb.bench.stages import bench_stages, detector_work, time_per_step
from grad_nb.bench.ways import bench_precisions, in_bfloat16, random_model
from grad_nb.config import DetectorConfig, Level, override, preset
from grad_nb.core.files import read_json
from grad_nb.core.latency import Latency, latency
from grad_nb.datasets.readers import load_images, read_category
from grad_nb.detector import TABLE_8, Decoder, Detector
from grad_nb.evaluation import image_auroc, score_maps
from grad_nb.inference.captured import Captured
from grad_nb.inference.loops import NEAR, scorer_loops, way_of
from grad_nb.inference.scorer import FastDetector, precision_of, prepared
from grad_nb.patchdiff import PatchDiff
from grad_nb.use.export import Scorer

PROTOCOL = {"device", "threads", "batch", "precision", "transfers", "runs", "median_ms", "p10_ms", "p90_ms"}


@given(st.integers(34, 300), st.sampled_from([0.1, 0.5, 1.0]))
@settings(deadline=None, max_examples=20)
def test_operations_are_the_closed_form(size, width):
    side, before, expected = size, 5, []
    for kernels, kernel, stride in (*TABLE_8, (1 / width, 1, 1)):
        side, after = (side - kernel) // stride + 1, max(1, round(kernels * width))
        expected.append(side**2 * after * before * kernel**2)
        before = after
    assert list(count_operations(Detector(width), size).values()) == expected


def test_operations_of_the_three_detectors():
    assert sum(sum(count_operations(Detector(), size).values()) for size in (256, 128, 64)) / 1e9 == pytest.approx(
        11.92, abs=0.005
    )


@pytest.mark.parametrize("level, gmac", [(5, 3.6), (9, 6.2), (13, 8.9), (17, 11.6)])
def test_operations_of_the_generators(level, gmac):
    counts = operations(PatchDiff(level, 64), torch.empty(1, 5, 256, 256), torch.zeros(1, dtype=torch.int64))
    assert sum(counts.values()) / 1e9 == pytest.approx(gmac, abs=0.06)


def test_operations_of_groups_linear_layers_and_reuse():
    assert operations(nn.Conv2d(8, 8, 3, groups=8, padding=1), torch.empty(2, 8, 5, 5)) == {"": 2 * 25 * 8 * 9}
    assert operations(nn.Sequential(nn.Linear(3, 7), nn.ReLU()), torch.empty(4, 3)) == {"0": 4 * 21}
    shared = nn.Conv2d(2, 2, 1)
    assert operations(nn.Sequential(shared, shared), torch.empty(1, 2, 3, 3)) == {"0": 2 * 9 * 4}
    assert (
        sum(operations(Decoder(), torch.empty(1, 256, 1, 1)).values()) == 1_682_836 - 3 * 256 - 5 * 34**2
    )  # one cell: the weights


def test_counting_leaves_the_network_alone():
    detector = Detector(0.1)
    count_operations(detector, 64)
    assert all(p.device.type == "cpu" for p in detector.parameters()) and not any(
        m._forward_hooks for m in detector.modules()
    )


def test_the_clock_sees_the_call_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    runs = iter([50, 60, 1, 2, 3])  # the first two are the warm-up
    assert latency(lambda _: spend(next(runs)), lambda: spend(1000), runs=3, warmup=2) == Latency.of([1, 2, 3])


def test_every_call_has_its_own_input():
    made, seen = [], []
    latency(seen.append, lambda: made.append(object()) or made[-1], runs=3, warmup=1)
    assert seen == made and len(seen) == 4


@pytest.mark.parametrize("runs, warmup", [(0, 1), (-1, 0), (1, -1)])
def test_nothing_to_time_is_an_error(runs, warmup):
    with pytest.raises(ValueError, match="runs must be"):
        latency(lambda x: x, lambda: 0, runs, warmup)


def test_a_gpu_is_waited_for_before_and_after(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    latency(lambda _: order.append("call"), lambda: order.append("input"), runs=1, warmup=1, device="cuda")
    assert order == 2 * ["input", "wait", "call", "wait"]


def test_preparation_is_not_in_a_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def call(n):
        now[0] += 100 + 3 * n

    assert time_per_step(call, steps=4, runs=2) == Latency(3000.0, 3000.0, 3000.0)


def test_rows_carry_their_protocol():
    before = torch.get_num_threads()
    rows = bench_detectors((64, 48), "cpu", batch=3, threads=1, runs=2, width=0.1)
    assert torch.get_num_threads() == before and [row["detectors"] for row in rows] == ["64", "48", "64 + 48"]
    for row in rows:
        assert row.keys() >= PROTOCOL | {"pictures_per_s", "GMAC", "GMAC_per_s"}
        assert (row["threads"], row["batch"], row["precision"], row["transfers"], row["runs"]) == (
            1,
            3,
            "float32",
            "none (cpu)",
            2,
        )
        assert row["device"].startswith("cpu (1 threads, ") and row["pictures_per_s"] == pytest.approx(
            3000 / row["median_ms"]
        )
        assert row["GMAC_per_s"] == pytest.approx(row["GMAC"] * row["pictures_per_s"])
    assert rows[2]["GMAC"] == pytest.approx(
        sum(count_operations(Detector(0.1), s)[n] for s in (64, 48) for n in count_operations(Detector(0.1), s)) / 1e9
    )


def test_the_way_to_multiply_is_named_where_it_works():
    library = scorer_loops()
    unit = way_of(library) if library else "float32"
    assert [
        bench_detectors((size,), "cpu", runs=1, width=width, fast=fast)[0]["precision"]
        for size, width, fast in ((64, 0.25, True), (64, 0.1, True), (64, 0.25, False))
    ] == [unit, "float32", "float32"]
    assert {
        row["stage"]: row["precision"]
        for row in bench_path((64,), runs=1, width=0.25, limits={"copy": 1, "matmul float32": 1})
    }["detector 64, fast"] == unit


def test_one_size_is_one_row_and_bf16_is_named():
    (row,) = bench_detectors((48,), "cpu", bf16=True, runs=1, width=0.1)
    assert row["precision"] == "bf16"


def test_what_is_timed_are_the_detectors():
    judge = detectors._Judge([64, 34], torch.device("cpu"), 2, torch.float32, True, 0.1)
    (a, A), (b, B) = judge(judge.pictures())
    assert (
        A.shape == (2, 8, 8) and B.shape == (2, 1, 1) and torch.equal(a, A.amax((1, 2))) and torch.equal(b, B.flatten())
    )
    assert A.std() > 0 and A.isfinite().all()


def test_the_random_numbers_of_others_stay():
    state = torch.get_rng_state()
    bench_detectors((34,), "cpu", runs=1, width=0.1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("sizes, batch", [((), 1), ((64,), 0)])
def test_an_empty_benchmark_is_an_error(sizes, batch):
    with pytest.raises(ValueError, match="at least one"):
        bench_detectors(sizes, "cpu", batch=batch)


def test_stages_time_the_real_functions(monkeypatch):
    tiny = override(
        preset("demo"),
        {
            "generator.width": 8,
            "generator.size": 48,
            "generator.batch": 2,
            "generator.sample_batch": 3,
            "detector.width": 0.1,
            "levels_ad": (Level(34, 48, (3, 5)),),
        },
    )
    steps = []
    for name, place in (
        ("train_patchdiff", lambda a: a[2].steps),
        ("generate", lambda a: a[1].sample_steps),
        ("train_detector", lambda a: a[2].steps),
    ):
        real = getattr(stages, name)
        monkeypatch.setattr(
            stages,
            name,
            lambda *a, real=real, name=name, place=place, **k: steps.append((name, place(a))) or real(*a, **k),
        )
    rows = bench_stages(tiny, device="cpu", threads=1, steps=1, runs=1, progress=False)
    assert [row["stage"] for row in rows] == [
        "PatchDiff 3, training",
        "PatchDiff 3, sampling",
        "PatchDiff 5, training",
        "PatchDiff 5, sampling",
        "detector 34, training",
    ]
    assert [row["items"] for row in rows] == [2, 3, 2, 3, 128 * 4] and all(
        row.keys() >= PROTOCOL - {"batch", "transfers"} for row in rows
    )
    assert steps == [(n, s) for n in 2 * ["train_patchdiff", "generate"] + ["train_detector"] for s in (2, 3, 2)]
    assert rows[0]["GFLOP"] / (3 * 2 * 24**2) == pytest.approx(rows[1]["GFLOP"] / (3 * 48**2), rel=0.01), (
        "three passes over crops, one over pictures"
    )


def test_a_student_has_no_bfloat16_of_its_own(data, monkeypatch):
    monkeypatch.setattr(ways, "bf16_supported", lambda device: True)
    model = random_model((48,), 0.1, one_network=True)
    rows = bench_precisions(model, read_category(data, "trays"), threads=1, runs=1, calibration=4)
    assert "bf16" not in {row["precision"] for row in rows}


def test_what_cannot_be_measured_is_said_before(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(whole, "measure", lambda *_, **__: pytest.fail("measured"))
    random_model((48,), 0.1).save(tmp_path / "m.grad")
    (tmp_path / "plain").mkdir()
    for i, picture in enumerate(pictures(4, 48)):
        Image.fromarray(picture).save(tmp_path / f"plain/{i}.png")
    plain = {"model": str(tmp_path / "m.grad"), "data": str(tmp_path / "plain")}
    for wrong, said in (
        ({"runs": 0}, "--runs"),
        ({"batch": 0}, "--batch"),
        ({"threads": -1}, "--threads"),
        (plain, "no test"),
        ({"json_file": str(tmp_path)}, "it is a folder"),
        ({"plots": str(tmp_path / "m.grad")}, "it is a file"),
        (plain | {"json_file": str(tmp_path / "m.grad")}, "would be overwritten"),
    ):
        with pytest.raises(SystemExit):
            grad_bench("cpu", **wrong)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("has", [True, False])
def test_fewer_bits_are_judged_on_test_pictures(data, monkeypatch, has):
    monkeypatch.setattr(ways, "bf16_supported", lambda device: has)  # without it torch computes the same, slowly
    category, model = read_category(data, "trays"), random_model((48,), 0.1)
    x, labels = load_images(category.test, 48, progress=False), [s.label for s in category.test]
    rows = bench_precisions(model, category, threads=1, runs=2, calibration=4)
    exact, torch_rows = rows[0], [row for row in rows if row["way"] == "torch"]
    assert [row["precision"] for row in torch_rows] == ["float32", "bf16"][: 1 + has] and exact["difference"] == exact[
        "other_verdicts"
    ] == 0
    assert exact["image_auroc"] == pytest.approx(image_auroc(model.score_samples(x), np.array(labels)), abs=1e-6)
    assert all(0 < row["difference"] < 1 and row["MB"] < exact["MB"] for row in torch_rows[1:]) and {
        row["pictures"] for row in rows
    } == {len(labels)}
    assert (
        (rows[1]["way"], rows[1]["precision"]) == ("library", "float32")
        and rows[1]["difference"] < 1e-3
        and rows[1]["image_auroc"] == exact["image_auroc"]
    )
    if len(rows) == len(torch_rows) + 1:
        pytest.skip("no ONNX Runtime")
    same, small = rows[len(torch_rows) + 1 :]
    assert (
        same["difference"] < 1e-3
        and small["MB"] < same["MB"]
        and 0 < small["difference"] < 5
        and (same["precision"], small["precision"]) == ("float32", "int8")
    )


def test_precisions_without_an_exporter(data, monkeypatch):
    def absent(*a, **k):
        raise ImportError("exporting needs the package onnx")

    monkeypatch.setattr(ways, "to_onnx", absent)
    assert {
        row["way"]
        for row in bench_precisions(random_model((48,), 0.1), read_category(data, "trays"), threads=1, runs=1)
    } == {"torch", "library"}


def test_bfloat16_changes_the_detectors_alone():
    torch.manual_seed(0)
    scorer, x = Scorer(random_model((64, 48), 0.25)).eval(), torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    exact, half = scorer(x)[2], in_bfloat16(scorer)
    near = half(x)[2]
    assert near.dtype == torch.float32 and 0 < float((near - exact).abs().max()) < 0.1 * float(exact.std())
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    of_detectors = {name for name, b in half.named_buffers() if b.dtype == torch.bfloat16}
    assert {name.rpartition(".")[2] for name in of_detectors} == {"constant"}, "their first layers' share of the places"
    assert all(b.dtype == torch.float32 for name, b in half.named_buffers() if name not in of_detectors)
    assert torch.equal(scorer(x)[2], exact)


def test_the_command(tmp_path, capsys, monkeypatch):
    for name, small in (
        ("bench_detectors", {"sizes": (48, 34), "width": 0.1}),
        ("bench_path", {"sizes": (48, 34), "width": 0.1}),
        ("ceilings", {"scale": 64}),
    ):
        monkeypatch.setattr(whole, name, lambda *a, real=getattr(whole, name), small=small, **k: real(*a, **k | small))
    grad_bench(
        "cpu",
        batch=2,
        runs=7,
        threads=1,
        quick=True,
        json_file=str(tmp_path / "bench.json"),
        plots=str(tmp_path / "plots"),
    )
    out, found = capsys.readouterr().out, read_json(tmp_path / "bench.json")
    assert "48 + 34" in out and "random weights" in out and "float32" in out and "cpu (1 threads, " in out
    assert (
        "stages" not in found
        and "peers" not in found
        and found["path"][-1]["stage"] == "bytes to score, map and label"
        and found["ceilings"]["copy"] > 0
    )
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["detectors.png", "path.png"] and "path.png" in out
    assert found["detectors"][0]["runs"] == 5 and found["detectors"][0]["batch"] == 2 and "torch" in found["versions"]


def test_the_help_lists_what_may_be_taken():
    said = " ".join(anno_parser(grad_bench, prog="grad_bench").format_help().split())
    assert accel_help() in said and "--backends" in said


TINY = {
    "generator.width": 8,
    "generator.size": 48,
    "generator.batch": 2,
    "generator.sample_batch": 2,
    "detector.width": 0.25,
    "detector.patches": 32,
    "levels_ad": (Level(34, 48, (5,)),),
}


@pytest.mark.parametrize("has", [True, False])
def test_each_backend_is_held_against_plain_torch_and_the_compiler(monkeypatch, caplog, has):
    words, seen = [], []

    def compiled(net, dynamic):
        seen.append(net)
        if len(seen) == 2:
            raise RuntimeError("not this one")
        return net

    real = backends.score_map
    monkeypatch.setattr(backends, "score_map", lambda *a: words.append(choice()) or real(*a))
    monkeypatch.setattr(backends, "bf16_supported", lambda device: has)
    monkeypatch.setattr(torch, "compile", compiled)
    rows = bench_backends({"a": override(preset("demo"), TINY)}, "cpu", threads=1, runs=1, progress=False)
    generator, detector = ["PatchDiff 5, training", "PatchDiff 5, sampling"], ["detector, classification"]
    alone = ["detector, Eq. 6", "detector, a batch", "one picture of 48 px"]
    named = (generator + detector) * (1 + has) + alone
    assert [row["stage"] for row in rows] == [f"a: {name}" for name in named]
    assert [row["precision"] for row in rows] == ["bf16 (mixed)"] * 3 * has + ["float32"] * 6
    assert len(seen) == len(rows) - 1, "there is no network in a batch"
    assert [math.isnan(row["compiled_ms"]) for row in rows] == [k in (1, len(rows) - 2) for k in range(len(rows))]
    assert "torch.compile cannot do a: PatchDiff 5, sampling (not this one)" in caplog.text
    assert {frozenset(), frozenset({"reference"})} == set(words)
    for row in rows:
        best = min(ms for ms in (row["reference_ms"], row["compiled_ms"]) if ms == ms)
        assert row["gain"] == 1 - row["median_ms"] / best
        assert row.keys() >= PROTOCOL - {"batch", "transfers"} | {"backend"}


def test_ways_take_turns_and_their_second_call_counts(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def way(name, cost):
        def call(x):
            calls.append((name, x))
            now[0] += cost if calls[-2:-1] == [(name, x)] else 100 * cost

        return call

    found = time_in_turns({"a": way("a", 0.25), "b": way("b", 0.5)}, iter(range(100)).__next__, runs=2)
    assert found == {"a": [0.25, 0.25], "b": [0.5, 0.5]}
    assert calls == [(name, x) for x, name in enumerate("ababab") for _ in range(2)]


def test_a_slow_way_is_called_once_a_round_and_stops_early(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def way(name, cost):
        def call(_):
            calls.append(name)
            now[0] += cost

        return call

    ways = {"fast": way("fast", 0.5), "slow": way("slow", 8)}
    found = time_in_turns(ways, lambda: None, runs=6, longest=20)
    assert found == {"fast": 6 * [0.5], "slow": 3 * [8]}
    assert calls.count("slow") == 2 + 3, "two in the round that is not timed, as for every way"
    assert time_in_turns(ways, lambda: None, runs=6)["slow"] == 6 * [8]


@pytest.mark.gpu
@pytest.mark.parametrize("transfers", [True, False])
def test_on_a_gpu(transfers):
    rows = bench_detectors((64,), "cuda", batch=4, bf16=True, runs=3, transfers=transfers)
    assert rows[0]["transfers"] == ("inside" if transfers else "outside") and rows[0]["device"].startswith("cuda")


def test_bytes_and_products_of_layers():
    assert layer_bytes(nn.Conv2d(2, 3, 1, bias=False), torch.empty(1, 2, 4, 4)) == {"": 4 * (32 + 48 + 6)}
    fast = FastDetector(Detector(0.1), 48)  # no layer of it is wide enough for the tiles
    assert fast_operations(fast) == sum(count_operations(Detector(0.1), 48).values())
    assert fast_operations(FastDetector(Detector(), 64)) < (0.7 if scorer_loops() else 1.01) * sum(
        count_operations(Detector(), 64).values()
    )


def test_bytes_of_a_fast_detector():
    fast = FastDetector(Detector(0.1), 48)
    plain = layer_bytes(Detector(0.1), torch.empty(1, 5, 48, 48))
    assert fast_bytes(fast) == pytest.approx(sum(plain.values()), rel=0.05), "the same layers, and a head less"
    wide = FastDetector(Detector(), 64)
    tiles = fast_bytes(wide)
    assert fast.group == 1, "torch's own layers take one picture at a time"
    if scorer_loops():
        assert fast_bytes(wide, wide.group) < wide.group * tiles < fast_bytes(wide, 2 * wide.group) * wide.group
    assert tiles > sum(layer_bytes(Detector(), torch.empty(1, 5, 64, 64)).values()) or scorer_loops() is None


def test_a_layer_is_counted_whoever_calls_it():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 3, 1), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(F.conv2d(x, self.conv.weight, self.conv.bias))

    assert operations(Functional(), torch.empty(1, 2, 4, 4)) == {"conv": 16 * 6}
    assert layer_bytes(Functional(), torch.empty(1, 2, 4, 4)) == {"conv": 4 * (32 + 6 + 48)}


def test_the_work_of_a_step_is_that_of_its_terms():
    def mac(d, side, n):
        return 2e-9 * n * sum(count_operations(d, side).values())

    def work(**changes):
        return detector_work(replace(plain, **changes), 3)[0]

    plain = DetectorConfig(width=0.1, patches=16, alpha_1=0.0, alpha_2=0.0)
    d = Detector(0.1)
    one, decoder = mac(d, 34, 16 * 5), 2e-9 * 80 * (3 * 26**2 + 26 * 5780)
    assert work() == pytest.approx(3 * one) and work(wrong_coordinates=False) == pytest.approx(3 * one * 4 / 5)
    assert work(alpha_2=1.0) == pytest.approx(3 * one + 4 * mac(d, 34, 16))
    assert work(alpha_2=1.0, penalise="probability") == pytest.approx(3 * one + 7 * mac(d, 34, 16))
    assert work(alpha_1=1.0) == pytest.approx(6 * one + 3 * decoder)
    assert work(block=2, pictures=4) == pytest.approx(3 * mac(d, 38, 20))


def test_bf16_has_a_ceiling_of_its_own():
    limits = {"matmul float32": 100, "conv float32": 80, "matmul bf16": 400, "conv bf16": 50, "copy": 10}
    assert bound_of(10, 1, 1, limits)["share"] == 1 and bound_of(10, 1, 1, limits, "bf16 (mixed)")["share"] == 0.25
    assert (
        bound_of(10, 0, 50, limits)["share"] == 0.5 and bound_of(10, 0, 50, limits, "bf16 (mixed)")["share"] == 0.25
    ), "half the bytes"
    assert (
        bound_of(10, 1, 1, limits, "int16")["share"] == 0.5 and bound_of(10, 0, 50, limits, "int16")["share"] == 0.5
    ), "two operations for one, bytes as they were counted"


@pytest.mark.parametrize(
    "ms, gflop, mb, share, bound",
    [(10, 1, 1, 1.0, "arithmetic"), (10, 0, 50, 0.5, "memory"), (100, 1, 1, 0.1, "calls")],
)
def test_what_bounds_a_stage(ms, gflop, mb, share, bound):
    found = bound_of(ms, gflop, mb, {"matmul float32": 100, "copy": 10})
    assert found["share"] == pytest.approx(share) and found["bound"] == bound


def test_growth_measures_what_it_says(monkeypatch):
    seen = []
    monkeypatch.setattr(
        growth, "score_levels", lambda nets, x, sizes, batch: seen.append((len(nets), x.shape[:2], tuple(sizes)))
    )
    rows = bench_growth((20,), (64,), (1,), (2,), 40, 0.1)
    assert [(row["varies"], row["value"], row["pictures"]) for row in rows] == [
        ("pictures", 20, 20),
        ("threads", 1, 64),
        ("levels", 2, 32),
        ("pixels", 64, 16),
    ]
    assert (
        seen[:3] == [(1, (16, 40), (40,)), (1, (16, 40), (40,)), (1, (4, 40), (40,))]
        and (2, (16, 160), (160, 80)) in seen
        and seen[-1] == (1, (16, 64), (64,))
    )


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a peak")
def test_a_peak_can_be_forgotten():
    def hold(megabytes):
        with mmap.mmap(-1, megabytes * 1_000_000) as held:
            for i in range(0, len(held), 4096):
                held[i] = 1  # goes back to the system at once, as an array may not

    forget_peak()
    before = peak_memory()
    hold(300)
    most = peak_memory()
    forget_peak()
    assert most > before + 250 and peak_memory() < most - 250


def test_charts_show_every_row():
    row = {"device": "cpu (1 threads)", "batch": 1, "median_ms": 2.0, "p10_ms": 1.0, "p90_ms": 5.0}
    grown = [
        {"varies": kind, "value": v, "seconds": v / 10, "ms_per_picture": 1.0 * v, "peak_MB": 100.0 + v}
        for kind in ("pictures", "threads")
        for v in (1, 2, 4)
    ]
    charts = bench_charts(
        {
            "peers": [
                row | {"method": "GRAD here"},
                {"method": "absent", "error": "no network"},
                row | {"method": "other", "median_ms": 300.0},
            ],
            "terms": [],
            "growth": grown,
            "ceilings": {"copy": 1.0},
        }
    )
    assert set(charts) == {"peers", "growth"}
    bars = charts["peers"].axes[0]
    assert (
        [t.get_text() for t in bars.get_yticklabels()] == ["GRAD here  2.0", "other  300"]
        and bars.get_xscale() == "log"
        and list(bars.collections[0].get_offsets()[:, 0]) == [2, 300]
    )
    assert [
        b.get_width()
        for b in bench_charts({"ways": [row | {"way": "library"}, row | {"way": "b", "median_ms": 3.0}]})["ways"]
        .axes[0]
        .patches
    ] == [2, 3]
    both = bench_charts(
        {"detectors": [row | {"detectors": "64", "way": "fast", "precision": p} for p in ("float32", "bf16")]}
    )["detectors"].axes[0]
    assert [t.get_text() for t in both.get_yticklabels()] == ["64, float32  2.0", "64, bf16  2.0"]
    above, below = charts["growth"].axes[0], charts["growth"].axes[2]
    assert list(above.lines[0].get_ydata()) == [0.1, 0.2, 0.4] and list(below.lines[0].get_ydata()) == [101, 102, 104]


def test_the_protocol_reports_the_second_half(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def judge(self, pictures):
        calls.append(1)
        now[0] += 100 if len(calls) <= 4 else 1

    monkeypatch.setattr(recorded.Captured, "__call__", judge)
    row = bench_protocol((48,), "cpu", runs=8, width=0.1)
    assert (
        row["mean_ms"] == 1000 and row["runs"] == 8 and row["pictures_per_s"] == 1 and row["transfers"] == "none (cpu)"
    )


def test_throughput_is_that_of_large_batches_with_all_detectors_and_with_one():
    rows = bench_throughput("cpu", (2, 3), runs=2, sizes=(64, 48), width=0.1)
    assert [(row["detectors"], row["batch"]) for row in rows] == [("64 + 48", 2), ("64 + 48", 3), ("64", 2), ("64", 3)]
    assert all(row["pictures_per_s"] == pytest.approx(row["batch"] / row["mean_ms"] * 1000) for row in rows)


def test_all_levels_together_on_the_cpu():
    nets, x = [Detector(0.25).eval(), Detector(0.1).eval()], torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    judge = Captured(nets, (64, 48), 2, 64, "cpu")
    for net, size, (scores, maps) in zip(nets, (64, 48), judge(x)):
        assert np.allclose(
            maps,
            score_maps(net, x.numpy(), size),
            atol=NEAR["int16"] * maps.std() if precision_of(prepared(net, size)) == "int16" else 1e-4,
        ) and torch.equal(scores, maps.amax((1, 2)))
    with pytest.raises(ValueError, match="pictures are"):
        judge(x[:1])


@pytest.mark.gpu
def test_one_graph_for_all_levels():
    nets, x = [Detector().eval(), Detector().eval()], torch.randint(0, 256, (2, 128, 128, 3), dtype=torch.uint8)
    plain = [score_maps(net, x.numpy(), size) for net, size in zip(nets, (128, 64))]
    judge = Captured(nets, (128, 64), 2, 128, "cuda")
    for _ in range(2):
        for (scores, maps), expected in zip(judge(x.pin_memory()), plain):
            assert np.abs(maps.numpy() - expected).max() < 0.05 * expected.std() and torch.equal(
                scores, maps.amax((1, 2))
            )


def test_a_row_that_quick_leaves_out_is_not_asked_for_with_it(capsys):
    with pytest.raises(SystemExit):
        grad_bench(quick=True, compiled=True)
    assert "--compiled is a row of what --quick leaves out" in capsys.readouterr().err
