"""The fast way to a score map is the plain way: same function, same scores, fewer multiplications."""

import copy
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grad_nb import evaluation
from grad_nb.accel import backends, native
from grad_nb.accel.backends import PRODUCTS
from grad_nb.accel.winograd import unstrided, winograd, winograd_matrices
from grad_nb.config import DetectorConfig, preset
from grad_nb.coords import with_coords
from grad_nb.datasets.readers import load_images, read_category, resize_pictures
from grad_nb.detector import Detector
from grad_nb.evaluation import fuse, image_auroc, score_levels, score_maps
from grad_nb.grad import GRAD
from grad_nb.inference import captured as recording
from grad_nb.inference import levels, loops, scorer
from grad_nb.inference.captured import Captured, captured_detectors, roomy_batch
from grad_nb.inference.levels import score_levels_fast
from grad_nb.inference.loops import NEAR, TILES, WinogradConv, best_tile, scorer_loops
from grad_nb.inference.scorer import FastDetector, arithmetic, precision_of, prepared, score_map
from grad_nb.training import Learner

ELSEWHERE = """
import copy, os, sys, threading
import torch
from grad_nb.detector import Detector
from grad_nb.inference.scorer import score_map
torch.manual_seed(0)
net = Detector(1.0).eval()
x = torch.randint(0, 256, (2, 128, 128, 3)).float()
want = score_map(net, x)
same = lambda: torch.allclose(score_map(net, x), want, rtol=0, atol=1e-4)
torch.set_default_dtype(torch.float64)
assert same() and score_map(copy.deepcopy(net), x).dtype == torch.float32
with torch.autocast("cpu", dtype=torch.bfloat16):
    assert same()
thread = threading.Thread(target=lambda: [score_map(net, x + 1) for _ in range(30)])
thread.start()
children = []
for k in range(3):
    child = os.fork()
    if not child:
        score_map(net, x + k)
        os._exit(int(not same()))
    children.append(child)
wrong = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
thread.join()
sys.exit(any(wrong))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_default_types_autocast_threads_and_forks_change_no_score():
    "All that a process shares with its children, and what may be set around a call."
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TOLERANCE = 1e-3  # of the standard deviation of the logits, of torch's own ways


def plain(detector, pictures):
    "Logits by the network as it stands in Table 8."
    x = torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode():
        return detector(with_coords(x))[:, 0]


def pictures(n, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def detector(width=1.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Detector(width).eval()
        for conv in made.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.bias, std=0.1)
        return made


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("r", [2, 3])
def test_the_matrices_are_exact(m, r):
    AT, G, BT = winograd_matrices(m, r)
    g, d = torch.randn(r, dtype=torch.float64), torch.randn(m + r - 1, dtype=torch.float64)
    assert torch.allclose(AT @ ((G @ g) * (BT @ d)), d.unfold(0, r, 1) @ g, atol=1e-10)


def test_a_tile_without_points_is_an_error():
    with pytest.raises(ValueError, match="points"):
        winograd_matrices(8, 3)


@settings(max_examples=15, deadline=None)
@given(
    m=st.sampled_from([2, 4, 6]),
    r=st.sampled_from([2, 3]),
    h=st.integers(3, 17),
    w=st.integers(3, 17),
    c=st.integers(1, 5),
    k=st.integers(1, 5),
)
def test_the_reference_is_a_convolution(m, r, h, w, c, k):
    x, weight, bias = torch.randn(2, h, w, c).double(), torch.randn(k, c, r, r).double(), torch.randn(k).double()
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    assert torch.allclose(winograd(x, weight, bias, m), expected, atol=1e-8)


@pytest.fixture(autouse=True)
def the_same_numbers_each_time():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def fresh():
    "Nothing compiled yet; afterwards everything as before."
    loops._first_right.cache_clear()
    yield
    loops._first_right.cache_clear()


@lru_cache(maxsize=None)
def library_for(way):
    "The compiled loops of one way to multiply, or None where they cannot be had. Loops that compile have to be right."
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = ctypes.CDLL(str(native.compile_c(loops.scorer_source(way), "winograd", folder)))
        except (OSError, subprocess.SubprocessError):
            return None
    assert loops.way_of(made) == way and loops._scorer_loops_right(made)
    return made


def compiled_for(way):
    "The same; skips where they cannot be had."
    return library_for(way) or pytest.skip("the compiler or the processor does not know it")


@pytest.fixture(scope="module", params=PRODUCTS)
def library(request):
    return compiled_for(request.param)


def near(library):
    return NEAR[loops.way_of(library)]


def tolerance(fast):
    return NEAR[precision_of(fast)]


def same(fast, maps):
    "The last bit of a first layer may become the last of sixteen."
    return tolerance(fast) * maps.std() if precision_of(fast) == "int16" else 1e-4


@pytest.mark.parametrize("m, r, fold", [(2, 3, 1), (4, 3, 1), (6, 3, 1), (2, 2, 2), (4, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("side", [8, 13, 19])
def test_the_compiled_layer_is_a_convolution_with_relu(library, m, r, fold, side):
    if m == 6 and loops.way_of(library) != "float32":
        pytest.skip("its tiles are smaller")
    C, K = 32 * fold if side == 13 else 64, 96
    x, weight, bias = torch.randn(3, side, side, C), torch.randn(K, C, r * fold, r * fold) / C, torch.randn(K)
    expected = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), fold).relu().permute(0, 2, 3, 1)
    layer = WinogradConv(unstrided(weight) if fold == 2 else weight, bias, side, fold, m, library)
    found = layer(x, [torch.full((n,), torch.nan) for n in layer.memory(3)], torch.full(expected.shape, torch.nan))
    assert (
        layer.out == expected.shape[1]
        and (found - expected).abs().max() < near(library) * expected.std()
        and found.min() == 0
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 81, 241])
def test_the_product_takes_any_number_of_rows(library, rows):
    V, U, bias, room = torch.randn(rows, 64), torch.randn(1, 64, 96), torch.randn(96), -(-rows // 16) * 16
    M = torch.full((room + 1, 96), torch.nan)
    native.call(library.product, V, loops.packed_filters(U, library), bias, 1, rows, 64, 96, 0, 0, 48, M)
    assert torch.allclose(M[:rows], (V @ U[0] + bias).relu(), atol=near(library)) and M[-1].isnan().all()


def whole(V):
    "(N, T, C) as pairs of integers are read: every 32 numbers scaled to a length of 32760, rounded, then the scales."
    scale = V.unflatten(2, (-1, 32)).norm(dim=3).clamp_min(1e-20) / 32760
    integers = (V / scale.repeat_interleave(32, 2)).round().short().contiguous().view(torch.float32)
    return torch.cat([integers.flatten(1), scale.flatten(1)], 1)


def as_read(V, library):
    return {"int16": whole, "float32": torch.clone}[loops.way_of(library)](V)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 49, 241, 300])
def test_several_products_at_once(library, rows):
    V, U, apart = torch.randn(3, rows, 64), torch.randn(3, 64, 96), 16
    seen = F.pad(as_read(V, library).flatten(1), (0, apart))
    made = torch.full((3, -(-rows // 16) * 16 * 96 + apart), torch.nan)
    native.call(
        library.product,
        seen,
        loops.packed_filters(U, library),
        None,
        3,
        rows,
        64,
        96,
        seen.shape[1],
        made.shape[1],
        240,
        made,
    )
    assert (
        torch.allclose(made[:, : rows * 96].view(3, rows, 96), V @ U, atol=near(library))
        and made[:, -apart:].isnan().all()
    )


def test_what_is_left_of_a_number(library):
    "With integers 16 bits of the largest, or fewer the more numbers share its scale."
    V, U, M = torch.rand(64, 32) + 1, torch.eye(32)[None], torch.empty(64, 32)
    native.call(library.product, V, loops.packed_filters(U, library), torch.zeros(32), 1, 64, 32, 32, 0, 0, 48, M)
    worst = ((M - V) / V).abs().max()
    low, high = {"int16": (1e-9, 2**-12), "float32": (-1, 0)}[loops.way_of(library)]
    assert low < worst <= high


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    C=st.sampled_from([32, 64, 256]),
    kind=st.sampled_from(["aligned", "opposite", "one", "spread", "flat"]),
    scale=st.sampled_from([1e-12, 1e-3, 1, 1e6]),
)
def test_a_sum_of_integers_never_overflows(seed, C, kind, scale):
    "Rows that are multiples of the columns reach the bound of Cauchy and Schwarz; an overflow changes the whole sum."
    library, drawn = compiled_for("int16"), torch.Generator().manual_seed(seed)
    u = torch.randn(C, generator=drawn)
    if kind == "one":
        u *= torch.arange(C) % 32 == seed % 32
    if kind == "spread":
        u *= torch.logspace(-6, 0, C)
    if kind == "flat":
        u = torch.ones(C)
    V, U = u.repeat(13, 1) * (-scale if kind == "opposite" else scale), u[None, :, None].repeat(1, 1, 32)
    made, rectified = torch.full((13, 32), torch.nan), torch.full((13, 32), torch.nan)
    native.call(
        library.product, whole(V[None]).flatten(), loops.packed_filters(U, library), None, 1, 13, C, 32, 0, 0, 240, made
    )
    native.call(
        library.product, V, loops.packed_filters(U, library), torch.zeros(32), 1, 13, C, 32, 0, 0, 48, rectified
    )
    assert torch.allclose(made, V @ U[0], rtol=1e-3, atol=0) and torch.allclose(
        rectified, (V @ U[0]).relu(), rtol=1e-3, atol=0
    )


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), scale=st.sampled_from([1e-8, 1.0, 1e12]), dark=st.booleans())
def test_every_row_has_scales_of_its_own(rows, scale, dark):
    library = compiled_for("int16")
    V, U = torch.randn(rows, 64) * torch.logspace(0, -6, rows)[:, None] * scale, torch.randn(1, 64, 32)
    if dark:
        V[rows // 2] = 0
    M = torch.empty(rows, 32)
    native.call(library.product, V, loops.packed_filters(U, library), torch.zeros(32), 1, rows, 64, 32, 0, 0, 48, M)
    expected = (V.double() @ U[0].double()).relu()
    assert ((M - expected).abs() <= 1e-3 * V.norm(dim=1, keepdim=True) * 8).all()


def test_a_filter_of_zeros_gives_zeros(library):
    V, M = torch.randn(5, 32), torch.empty(16, 32)
    native.call(
        library.product,
        V,
        loops.packed_filters(torch.zeros(1, 32, 32), library),
        torch.zeros(32),
        1,
        5,
        32,
        32,
        0,
        0,
        48,
        M,
    )
    assert M[:5].eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_none(library, bad):
    V, M = torch.randn(5, 64), torch.empty(16, 32)
    V[2, 40] = bad
    native.call(
        library.product,
        V,
        loops.packed_filters(torch.ones(1, 64, 32), library),
        torch.zeros(32),
        1,
        5,
        64,
        32,
        0,
        0,
        48,
        M,
    )
    assert not M[2].isfinite().any() and M[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("first, there", [("float32", ("float32",)), ("int16", ("int16", "float32"))])
def test_a_way_can_be_named(monkeypatch, first, there):
    monkeypatch.setenv("GRAD_NB_ACCEL", first)
    assert loops.product_ways() == there
    compiled_for(first)
    assert loops.way_of(scorer_loops()) == first
    monkeypatch.delenv("GRAD_NB_ACCEL")
    with backends.use(first):
        assert loops.way_of(scorer_loops()) == first


def test_what_is_not_wanted_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("GRAD_NB_ACCEL", "float32")
    monkeypatch.setattr(loops, "has_pairs", lambda: pytest.fail("the pairs were asked for"))
    assert loops.product_ways() == ("float32",)


def test_vectors_of_floats_are_not_taken_for_integers(monkeypatch, tmp_path):
    "A compiler that does not know the processor's instruction would make a slower way of it."
    monkeypatch.setattr(loops, "has_pairs", lambda: True)
    program = loops.scorer_source("int16").replace("defined __AVX512VNNI__", "0").replace("defined __AVXVNNI__", "0")
    with pytest.raises(subprocess.CalledProcessError):
        native.compile_c(program, "without", tmp_path)


def test_by_default_the_best_way_that_is_there_comes_first(monkeypatch):
    monkeypatch.delenv("GRAD_NB_ACCEL", raising=False)
    for pairs in (True, False):
        monkeypatch.setattr(loops, "has_pairs", lambda pairs=pairs: pairs)
        assert loops.product_ways() == ("int16",) * pairs + ("float32",)


@pytest.mark.parametrize("known", ["avx_vnni", "avx512_vnni", "avx512_bf16", None])
@pytest.mark.parametrize("older", [False, True])
def test_torch_says_whether_a_processor_has_pairs(monkeypatch, known, older):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: known == "avx512_vnni")
    said = {"avx2": True, "avx_vnni": False, "avx512_vnni": False} | ({known: True} if known else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: said, raising=False)
    if older:  # it tells of one of the two
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert loops.has_pairs() == (known == "avx512_vnni" or known == "avx_vnni" and not older)


def test_an_unknown_way_is_an_error_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAD_NB_ACCEL", "int8")
    for work in (
        loops.product_ways,
        scorer_loops,
        lambda: GRAD("demo").fit(tmp_path),
        lambda: GRAD.load(tmp_path / "part.grad"),
    ):
        with pytest.raises(
            ValueError, match="GRAD_NB_ACCEL must be made of .*'int16', 'float32', 'bfloat16', not 'int8'"
        ):
            work()


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    "A folder for compiled loops that is kept for all wrong ones, with a compiler that hardly optimises."
    folder = tmp_path_factory.mktemp("hasty")
    compiler = folder / "cc"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which(os.environ.get("CC") or "cc")} "$@" -O1\n')
    compiler.chmod(0o700)
    return folder


WRONG = [
    ("PAIRS", "#include <immintrin.h>", "#error no"),
    ("SPLIT", "12582912.0f", "12582913.0f"),
    ("SPLIT", "scale = 32760 / size", "scale = 36000 / size"),
    ("BY_PAIRS", "c > CH / 2 ? *to : (vec){0}", "(vec){0}"),
    ("BY_PAIRS", "size[i * parts]", "size[0]"),
    ("BY_PAIRS", "column + k * W", "column"),
    ("BY_PAIRS", "(last - first) * C / 2}", "0}"),
]


@pytest.mark.parametrize(
    "name, right, wrong",
    WRONG,
    ids=[
        "unknown pairs",
        "rounding",
        "too long",
        "the sum so far",
        "scales of rows",
        "scales of columns",
        "where scales are",
    ],
)
def test_loops_that_are_wrong_are_not_used(monkeypatch, caplog, hasty, fresh, name, right, wrong):
    compiled_for("int16")
    monkeypatch.setenv("GRAD_NB_ACCEL", "int16")
    monkeypatch.setenv("XDG_CACHE_HOME", str(hasty))
    monkeypatch.setenv("CC", str(hasty / "cc"))
    assert getattr(loops, name).count(right) == 1
    monkeypatch.setattr(loops, name, getattr(loops, name).replace(right, wrong))
    with caplog.at_level("INFO"):
        assert loops.way_of(scorer_loops()) == "float32"
    assert "products by float32 do the work" in caplog.text


@pytest.mark.parametrize(
    "width, size", [(1.0, 64), (1.0, 75), (0.5, 100), (0.25, 64), (0.25, 256), (0.1, 50), (0.25, 34)]
)
@pytest.mark.parametrize("way", [*PRODUCTS, "torch"])
def test_fast_is_plain(width, size, way, monkeypatch):
    made = None if way == "torch" else compiled_for(way)
    monkeypatch.setattr(scorer, "scorer_loops", lambda: made)
    d = detector(width)
    fast, seen = FastDetector(d, size), pictures(5 if size < 256 else 1, size)
    expected = plain(d, seen)
    assert (fast(torch.from_numpy(seen)) - expected).abs().max() < tolerance(fast) * (
        expected.std() if size > 34 else 1
    )
    assert way == "torch" or width < 0.25 or size == 34 or any(isinstance(layer, WinogradConv) for layer in fast.layers)
    assert precision_of(fast) == (way if way != "torch" and width >= 0.25 else "float32")


@pytest.mark.skipif(scorer_loops() is None, reason="there is no C compiler")
@pytest.mark.parametrize("tiles", [1, 7, 30])
def test_large_pictures_go_through_in_strips(tiles, monkeypatch):
    d, seen = detector(0.25), pictures(2, 134)
    expected = plain(d, seen)
    monkeypatch.setattr(loops, "STRIP", tiles)
    fast = FastDetector(d, 134)
    assert any(isinstance(layer, WinogradConv) and layer.strip < layer.tiles for layer in fast.layers)
    assert (fast(torch.from_numpy(seen)) - expected).abs().max() < tolerance(fast) * expected.std()


@pytest.mark.parametrize("width, size", [(0.1, 64), (0.25, 96), (0.5, 64)])
@pytest.mark.parametrize("way", [*PRODUCTS, "no-loops"])
def test_a_score_does_not_depend_on_what_else_is_in_the_batch(way, width, size):
    "Bit for bit, with the loops and without."
    d, seen = detector(width), pictures(19, size)
    with backends.use(way):
        alone = np.concatenate([score_maps(d, seen[i : i + 1], size) for i in range(len(seen))])
        for batch in (2, 3, 16, 19):
            assert np.array_equal(score_maps(d, seen, size, batch=batch), alone)
        assert np.array_equal(score_maps(d, seen[::-1], size, batch=5)[::-1], alone)


@pytest.mark.parametrize("way", [*PRODUCTS, "no-loops"])
def test_nor_does_that_of_a_level_at_which_pictures_are_made_smaller(way):
    levels, sizes, seen = [detector(0.1), detector(0.25)], [96, 64], pictures(7, 128)
    with backends.use(way):
        whole = score_levels(levels, seen, sizes, batch=7)
        for i in range(7):
            alone = score_levels(levels, seen[i : i + 1], sizes)
            assert all(np.array_equal(maps[i : i + 1], one) for maps, one in zip(whole, alone, strict=True))


def test_the_reference_computes_a_batch_at_once_and_agrees_nearly():
    d, seen = detector(0.25), pictures(19, 64)
    with backends.use("reference"):
        alone = np.concatenate([score_maps(d, seen[i : i + 1], 64) for i in range(len(seen))])
        assert np.allclose(score_maps(d, seen, 64), alone, rtol=0, atol=1e-5 * alone.std())


def test_the_reference_is_the_network_as_it_stands(monkeypatch):
    d, seen = detector(0.25), torch.from_numpy(pictures(2, 64))
    expected, fast = torch.cat([plain(d, one) for one in seen.split(1)]), score_map(d, seen)
    with backends.use("reference"):
        assert torch.equal(score_map(d, seen), expected) and arithmetic([d], [64]) == "float32"
        assert scorer_loops() is None
    assert torch.equal(score_map(d, seen), fast)


@pytest.mark.skipif(scorer_loops() is None, reason="there is no C compiler")
def test_a_form_is_that_of_the_words_in_force():
    compiled_for("int16")
    d, forms = detector(0.25), []
    for words, products in (("int16", "int16"), ("float32", "float32"), ("no-loops", "float32")):
        with backends.use(words):
            forms.append(prepared(d, 64))
            assert arithmetic([d], [64]) == products and prepared(d, 64) is forms[-1]
    assert len(set(map(id, forms))) == 3 and all(isinstance(layer, WinogradConv) for layer in forms[1].layers)
    assert not any(isinstance(layer, WinogradConv) for layer in forms[2].layers)


def test_bfloat16_is_computed_by_torch_when_it_is_asked_for():
    d, seen = detector(0.25), torch.from_numpy(pictures(2, 64))
    exact, half = score_map(d, seen), score_map(d, seen, bf16=True)
    assert half.dtype == torch.float32 and 0 < (half - exact).abs().max() < 0.1 * exact.std()
    x = with_coords(seen.permute(0, 3, 1, 2).float() / 127.5 - 1)
    net = copy.deepcopy(d).bfloat16().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(half, net(x.bfloat16())[:, 0].float())
    assert all(p.dtype == torch.float32 for p in d.parameters())
    assert arithmetic([d], [64], bf16=True) == "bf16"
    (judged,) = score_levels_fast([d], seen.numpy(), (64,), bf16=True)
    with backends.use("bfloat16"):
        assert arithmetic([d], [64]) != "bf16"  # what `score_map` does, which asks its argument alone
        wished = evaluation.score_maps(d, seen.numpy(), 64)
    assert np.array_equal(wished, half) and not np.array_equal(evaluation.score_maps(d, seen.numpy(), 64), half)
    with (
        pytest.raises(ValueError, match="several ways to multiply: bfloat16 and int16"),
        backends.use("int16,bfloat16"),
    ):
        pass
    assert np.array_equal(judged[0], half)
    with torch.no_grad():
        d.head.bias += 1
    assert not torch.equal(score_map(d, seen, bf16=True), half)
    with torch.inference_mode():
        frozen = detector(0.25)
    assert torch.equal(score_map(frozen, seen, bf16=True), half)  # weights that cannot tell whether they were changed


def test_a_batch_that_does_not_fit_is_halved_and_stays_so(monkeypatch):
    d, seen, tried, real = detector(0.1), pictures(11, 48), [], levels.score_map

    def small_memory(net, x, bf16):
        tried.append(len(x))
        if len(x) > 3:
            raise torch.OutOfMemoryError("full")
        return real(net, x, bf16)

    expected = np.concatenate([maps for (maps,) in score_levels_fast([d], seen, (48,))])
    monkeypatch.setattr(levels, "score_map", small_memory)
    found = [maps for (maps,) in score_levels_fast([d], seen, (48,), batch=8)]
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1] and np.allclose(np.concatenate(found), expected, atol=1e-5)


def test_pictures_of_any_shape_are_brought_to_each_size():
    nets, seen = [detector(0.1), detector(0.1, 1)], np.random.default_rng(0).integers(0, 256, (3, 60, 70, 3), np.uint8)
    (found,) = score_levels_fast(nets, seen, (64, 48))
    for net, size, maps in zip(nets, (64, 48), found):
        assert np.allclose(maps, plain(net, resize_pictures(seen, size)), atol=1e-4)
    assert list(score_levels_fast(nets, seen[:0], (64, 48))) == []


def test_memory_is_not_shared_between_calls():
    d, seen = detector(0.25), pictures(2, 64)
    first = score_map(d, torch.from_numpy(seen[:1]))
    kept = first.clone()
    score_map(d, torch.from_numpy(seen[1:]))
    assert torch.equal(first, kept)


def test_nothing_that_is_not_a_number_is_hidden():
    d = detector(0.25)
    with torch.no_grad():
        d.body[4].weight[0, 0, 0, 0] = torch.nan
    assert score_map(d, torch.from_numpy(pictures(1, 64))).isnan().any()


def test_new_weights_are_seen():
    d, seen = detector(0.25), torch.from_numpy(pictures(1, 64))
    before, form = score_map(d, seen), prepared(d, 64)
    assert prepared(d, 64) is form
    with torch.no_grad():
        d.body[0].bias += 0.5
    assert prepared(d, 64) is not form and not torch.allclose(score_map(d, seen), before)
    d.load_state_dict(detector(0.25, seed=1).state_dict())
    assert torch.allclose(score_map(d, seen), score_map(detector(0.25, seed=1), seen), atol=1e-4)


def test_other_networks_take_the_plain_way():
    net = nn.Conv2d(5, 1, 34, 4)
    x = torch.from_numpy(pictures(2, 50))
    assert torch.allclose(
        score_map(net, x), net(with_coords(x.permute(0, 3, 1, 2).float() / 127.5 - 1))[:, 0], atol=1e-5
    )


def test_the_rule_takes_the_shape_and_the_way():
    assert best_tile(58, 3) == 6 and best_tile(8, 3) == 2 and best_tile(62, 2) == 4
    assert {(best_tile(side, r, way), r) for side in range(1, 80) for r in (2, 3) for way in ("int16",)} <= {
        (0, 2),
        (0, 3),
        *TILES,
    }
    assert all(best_tile(side, r) in (0, 2, 4, 6) for side in range(1, 80) for r in (2, 3))


def test_a_compiler_that_lies_is_not_believed(monkeypatch, hasty, fresh):
    monkeypatch.setenv("XDG_CACHE_HOME", str(hasty))
    monkeypatch.setenv("CC", str(hasty / "cc"))
    real = loops._c_sum
    monkeypatch.setattr(loops, "_c_sum", lambda row, names: real([2 * v for v in row], names))
    assert scorer_loops() is None


@pytest.mark.parametrize("variable, value", [("GRAD_NB_ACCEL", "no-loops"), ("CC", "no-such-compiler")])
def test_without_a_compiler(monkeypatch, tmp_path, fresh, variable, value):
    monkeypatch.setenv(variable, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scorer_loops() is None


def test_without_a_home(monkeypatch, fresh):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert scorer_loops() is None


def test_levels_are_the_detectors_one_by_one():
    seen, nets, sizes = pictures(3, 96), [detector(0.25), detector(0.25, 1), detector(0.1, 2)], (96, 64, 48)
    together = score_levels(nets, seen, sizes, batch=2)
    for net, size, maps in zip(nets, sizes, together):
        expected = plain(net, resize_pictures(seen, size)).numpy()
        assert np.abs(maps - expected).max() < tolerance(prepared(net, size)) * expected.std()


def fitted(levels="mvtec_loco"):
    "A model with random weights, as if fitted."
    model = GRAD(preset("demo"), "mvtec_ad", device="cpu", progress=False)
    model.levels_, model.detectors_ = model.preset.levels("mvtec_ad"), [detector(0.25)]
    model.stats_, model.offset_, model.map_limits_ = [evaluation.MapStats(0.0, 1.0)], 0.0, (0.0, 1.0)
    return model


def test_scores_alone_make_no_maps(monkeypatch):
    model, seen = fitted(), pictures(4, 64)
    expected = model.predict(seen)
    assert expected.maps is not None
    monkeypatch.setattr(evaluation, "blur_matrix", lambda *a: pytest.fail("a map was blurred"))
    evaluation.placing.cache_clear()
    assert (model.score_samples(seen) == expected.scores).all() and model.predict(seen, maps=False).maps is None
    scores, none = fuse(
        [np.zeros((1, 8, 8), np.float32)] * 2, [64, 64], [evaluation.MapStats(0, 1)] * 2, 64, with_maps=False
    )
    assert none is None and scores.shape == (1,)


@pytest.mark.slow
def test_the_auroc_of_bottle_is_the_same(real_data):
    category = read_category(real_data / "mvtec_ad", "bottle")
    chosen = category.test[::4]
    seen, labels = load_images(chosen, 128), np.array([s.label for s in chosen])
    d = detector(0.5)
    fast, slow = score_maps(d, seen, 128).max((1, 2)), plain(d, seen).numpy().max((1, 2))
    assert np.abs(fast - slow).max() < TOLERANCE * slow.std() * 10 and image_auroc(fast, labels) == image_auroc(
        slow, labels
    )


@pytest.mark.parametrize(
    "command", ["import grad_nb.grad", "from grad_nb.use.daily import grad_predict; grad_predict.__doc__"]
)
def test_nothing_heavy_is_imported(command):
    heavy = (
        "sklearn",
        "scipy",
        "matplotlib",
        "torchvision",
        "onnx",
        "onnxruntime",
        "anomalib",
        "openvino",
        "IPython",
        "torch._dynamo",
        "torch._inductor",
    )
    code = (
        f"import sys; import torch; before = set(sys.modules); {command}; new = set(sys.modules) - before; "
        f"print(*[n for n in {heavy} if n in new], len(new))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *loaded, count = done.stdout.split()
    assert not loaded, f"{command} imports {loaded}"
    assert int(count) < 900


def test_a_detector_that_is_scored_and_then_trained_on_is_prepared_anew():
    learner, seen = Learner(DetectorConfig(width=0.25), 20), torch.from_numpy(pictures(2, 64))
    before = score_map(learner.detector.eval(), seen).clone()
    for p in learner.detector.parameters():
        p.grad = torch.ones_like(p)
    learner.optimizer.step()
    after = score_map(learner.detector, seen)
    assert not torch.allclose(after, before) and torch.equal(after, score_map(copy.deepcopy(learner.detector), seen))


class Wrapped(nn.Module):
    "A detector that the library does not know: it takes the plain way, as on a GPU."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("sizes", [(96, 64, 48), (64, 96, 48), (96, 96, 64)])
def test_the_plain_way_leaves_the_pictures_to_the_next_level(sizes):
    seen, nets = pictures(3, 96), [Wrapped(detector(0.25, k)) for k in range(3)]
    kept = seen.copy()
    together = score_levels(nets, seen, sizes, batch=2)
    for net, size, maps in zip(nets, sizes, together):
        assert np.allclose(maps, plain(net, resize_pictures(seen, size)), atol=1e-4)
    floats = torch.from_numpy(seen).float()
    score_map(nets[0], floats)
    assert (seen == kept).all() and torch.equal(floats, torch.from_numpy(kept).float())


@pytest.mark.parametrize("bf16, off", [(False, TOLERANCE), (True, 0.1)])
@pytest.mark.parametrize("side", [96, 80])
def test_what_a_gpu_would_record_is_the_same_function(bf16, off, side):
    nets, sizes, seen = [detector(0.25, k) for k in range(3)], (96, 64, 48), pictures(2, side)
    judge = Captured(nets, sizes, 2, side, "cpu", bf16)
    for net, size, (scores, maps) in zip(nets, sizes, judge(torch.from_numpy(seen))):
        expected = plain(net, resize_pictures(seen, size)).numpy()
        assert np.abs(maps.numpy() - expected).max() < off * expected.std() and torch.equal(scores, maps.amax((1, 2)))
    assert judge.precision == ("bf16" if bf16 else "float32")
    known = Captured(nets, sizes, 2, side, "cpu").precision
    assert not any(net in scorer._forms for net in nets), "only its own copies are prepared"
    assert known == arithmetic(nets, sizes)


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 17])
def test_a_stream_of_batches_is_every_picture_once_and_in_order(n):
    nets, sizes, seen = [detector(0.25), detector(0.1, 1)], (64, 48), pictures(n, 64)
    batches = list(Captured(nets, sizes, 4, 64, "cpu").stream(seen))
    assert [len(large) for large, _ in batches] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    for k, expected in enumerate(score_levels(nets, seen, sizes)):
        assert np.allclose(
            np.concatenate([maps[k] for maps in batches]), expected, atol=same(prepared(nets[k], sizes[k]), expected)
        )


class Recorded:
    "Stands in for a recording on a GPU."

    made = []

    def __init__(self, detectors, sizes, batch, side, device, bf16):
        if batch > 8:
            raise torch.OutOfMemoryError("full")
        self.pictures, self.bf16 = torch.empty(batch, side, side, 3), bf16
        self.made.append(batch)


@pytest.fixture
def recorded(monkeypatch):
    Recorded.made = []
    monkeypatch.setattr(recording, "Captured", Recorded)
    monkeypatch.setattr(recording, "_free", lambda device: 10**12)
    return Recorded.made


def test_a_recording_is_kept_until_it_is_too_small_or_old(recorded, monkeypatch):
    one, two = detector(0.1), detector(0.1, 1)
    first = captured_detectors([one], (48,), 4, 48)
    assert (
        captured_detectors([one], (48,), 4, 48) is first is captured_detectors([one], (48,), 2, 48)
        and recorded == [4]
        and first.bf16 is False
    )
    assert (
        captured_detectors([one, two], (48, 48), 4, 48) is not first
        and captured_detectors([one], (48,), 3, 48) is first
    ), "others do not push it out"
    larger = captured_detectors([one], (48,), 8, 48)
    assert larger is not first and captured_detectors([one], (48,), 5, 48) is larger and recorded == [4, 4, 8]
    with torch.no_grad():
        one.head.bias += 1
    assert captured_detectors([one], (48,), 4, 48) is not larger
    monkeypatch.setenv("GRAD_NB_ACCEL", "no-graphs")
    assert captured_detectors([one], (48,), 4, 48) is None


@pytest.mark.parametrize("error", [RuntimeError("cannot"), MemoryError("not even one")])
def test_what_cannot_be_recorded_runs_plainly_and_is_not_tried_again(recorded, monkeypatch, caplog, error):
    def fails(*args, **options):
        recorded.append(0)
        raise error

    monkeypatch.setattr(recording, "Captured", fails)
    one = detector(0.1)
    assert (
        [captured_detectors([one], (48,), n, 48) for n in (4, 8)] == [None, None]
        and recorded == [0]
        and "run plainly" in caplog.text
    )


def test_a_recording_that_does_not_fit_is_made_smaller(recorded):
    one = detector(0.1)
    first = captured_detectors([one], (48,), 100, 48)
    assert len(first.pictures) == 8 and recorded == [8]
    assert captured_detectors([one], (48,), 90, 48) is first and recorded == [8], (
        "it is not recorded anew for every call that wants more than fits"
    )


@pytest.mark.parametrize("bf16, off", [(False, 1e-4), (True, 0.0)])
def test_on_cuda_pictures_go_through_the_recording(monkeypatch, bf16, off):
    nets, seen, asked = [detector(0.1), detector(0.1, 1)], pictures(5, 64), []

    def recorded(detectors, sizes, n, side, bf16):
        asked.append((sizes, n, side, bf16))
        return Captured(detectors, sizes, 4, side, "cpu", bf16 or None)

    expected = recorded(nets, (64, 48), 5, 64, bf16).stream(seen)
    if not bf16:
        expected = score_levels_fast(nets, seen, (64, 48), "cpu", 2)
    asked.clear()
    monkeypatch.setattr(levels, "captured_detectors", recorded)
    monkeypatch.setattr(levels, "_on_device", lambda net, device: net)
    found = score_levels_fast(nets, seen, (64, 48), "cuda", 2, bf16)
    found, expected = ([np.concatenate(maps) for maps in zip(*batches)] for batches in (found, expected))
    assert asked == [((64, 48), 5, 64, bf16)]
    assert all(np.allclose(a, b, atol=off, rtol=0) for a, b in zip(found, expected))


def test_kernels_are_chosen_with_cudnn_on():
    before = torch.backends.cudnn.benchmark
    with recording._choosing():
        assert torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is before


def test_a_stream_of_nothing_is_nothing():
    assert list(Captured([detector(0.1)], (48,), 4, 48, "cpu").stream(pictures(0, 48))) == []


@pytest.mark.parametrize(
    "n, free, batch",
    [(1, 10**12, 1), (5, 10**12, 8), (10**6, 10**12, 1024), (100, 0, 1), (100, 2 * 330 * 64**2 * 5, 4)],
)
def test_a_batch_is_what_half_of_the_memory_holds(n, free, batch):
    assert roomy_batch((64,), 64, n, free) == batch


@pytest.mark.gpu
def test_a_gpu_scores_like_the_cpu(monkeypatch, caplog):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    nets, sizes, seen = [detector(0.5, k) for k in range(3)], (128, 64, 48), pictures(37, 128)
    expected = score_levels(nets, seen, sizes)
    for words, tolerance in (("auto", 0.15), ("no-graphs", 0.02)):
        monkeypatch.setenv("GRAD_NB_ACCEL", words)
        for found, maps in zip(score_levels([copy.deepcopy(net) for net in nets], seen, sizes, "cuda", 8), expected):
            assert np.abs(found - maps).max() < tolerance * maps.std()
    assert "could not be recorded" not in caplog.text


@pytest.mark.skipif(scorer_loops() is None, reason="there is no C compiler")
def test_a_compiler_without_openmp_makes_the_loops_for_one_core(monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls, real = [], native._run

    def run(command, text):
        if "-shared" in command:
            calls.append("-fopenmp" in command)
        if "-fopenmp" in command:
            raise subprocess.CalledProcessError(1, command)
        return real(command, text)

    monkeypatch.setattr(native, "_run", run)
    assert scorer_loops() is not None and calls == [True, False]


def test_a_recording_serves_every_batch_that_it_holds(monkeypatch):
    made = []

    class Recorded:
        def __init__(self, detectors, sizes, batch, side, device, bf16=False):
            self.pictures = torch.zeros(batch, 1)
            made.append(batch)

    monkeypatch.setattr(recording, "Captured", Recorded)
    monkeypatch.setattr(recording, "_free", lambda device: 10**12)
    monkeypatch.setattr(recording, "allowed", lambda name: True)
    one = Detector(0.1)
    for n in range(1, 257):
        captured_detectors([one], (48,), n, 48)
    assert made == sorted(set(made)) and len(made) <= 9 and made[-1] == 256
