"""The fast way to a score map is the plain way: same function, same scores, fewer multiplications."""
import copy
import ctypes
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

from grad_nb import evaluation, inference, native
from grad_nb.config import DetectorConfig, preset
from grad_nb.coords import with_coords
from grad_nb.data import load_images, read_category
from grad_nb.detector import Detector
from grad_nb.evaluation import fuse, image_auroc, resize_pictures, score_levels, score_maps
from grad_nb.grad import GRAD
from grad_nb.inference import NEAR, TILES, WAYS, Captured, FastDetector, Winograd, best_tile, loops, prepared, roomy_batch, score_map, unstrided
from grad_nb.training import Learner
from grad_nb.winograd import winograd, winograd_matrices

TOLERANCE = 1e-3  # of the standard deviation of the logits, of torch's own ways


def plain(detector, pictures):
    "Logits by the network as it stands in Table 8."
    x = torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.inference_mode(): return detector(with_coords(x))[:, 0]


def pictures(n, size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def detector(width=1.0, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Detector(width).eval()
        for conv in made.modules():
            if isinstance(conv, nn.Conv2d): nn.init.normal_(conv.bias, std=0.1)
        return made


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("r", [2, 3])
def test_the_matrices_are_exact(m, r):
    AT, G, BT = winograd_matrices(m, r)
    g, d = torch.randn(r, dtype=torch.float64), torch.randn(m + r - 1, dtype=torch.float64)
    assert torch.allclose(AT @ ((G @ g) * (BT @ d)), d.unfold(0, r, 1) @ g, atol=1e-10)


def test_a_tile_without_points_is_an_error():
    with pytest.raises(ValueError, match="points"): winograd_matrices(8, 3)


@settings(max_examples=15, deadline=None)
@given(m=st.sampled_from([2, 4, 6]), r=st.sampled_from([2, 3]), h=st.integers(3, 17), w=st.integers(3, 17), c=st.integers(1, 5), k=st.integers(1, 5))
def test_the_reference_is_a_convolution(m, r, h, w, c, k):
    x, weight, bias = torch.randn(2, h, w, c).double(), torch.randn(k, c, r, r).double(), torch.randn(k).double()
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    assert torch.allclose(winograd(x, weight, bias, m), expected, atol=1e-8)


@pytest.fixture(autouse=True)
def the_same_numbers_each_time():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@lru_cache(maxsize=None)
def library_for(way):
    "The compiled loops of one way to multiply, or None where the compiler or the processor does not know it. Loops that compile have to be right."
    if way == "3 x bf16" and not inference.has_unit(): return None
    with tempfile.TemporaryDirectory() as folder:
        try: made = ctypes.CDLL(str(native.compile_c(inference.source(way), "winograd", folder)))
        except (OSError, subprocess.SubprocessError): return None
    assert WAYS[made.way()] == way and inference._right(made)
    return made


def compiled_for(way):
    "The same; skips where they cannot be had."
    return library_for(way) or pytest.skip("the compiler or the processor does not know it")


@pytest.fixture(scope="module", params=WAYS)
def library(request): return compiled_for(request.param)


def near(library): return NEAR[WAYS[library.way()]]


def tolerance(fast): return NEAR[fast.precision]


def same(fast, maps): return 1e-4 if fast.precision != "int16" else tolerance(fast) * maps.std()  # the last bit of a first layer may become the last of sixteen


@pytest.mark.parametrize("m, r, fold", [(2, 3, 1), (4, 3, 1), (6, 3, 1), (2, 2, 2), (4, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("side", [8, 13, 19])
def test_the_compiled_layer_is_a_convolution_with_relu(library, m, r, fold, side):
    if m == 6 and WAYS[library.way()] != "float32": pytest.skip("its tiles are smaller")
    C, K = 32 * fold if side == 13 else 64, 96
    x, weight, bias = torch.randn(3, side, side, C), torch.randn(K, C, r * fold, r * fold) / C, torch.randn(K)
    expected = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), fold).relu().permute(0, 2, 3, 1)
    layer = Winograd(unstrided(weight) if fold == 2 else weight, bias, side, fold, m, library)
    found = layer(x, [torch.full((n,), torch.nan) for n in layer.memory(3)], torch.full(expected.shape, torch.nan))
    assert layer.out == expected.shape[1] and (found - expected).abs().max() < near(library) * expected.std() and found.min() == 0


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 15, 16, 17, 31, 32, 33, 49, 63, 64, 65, 81, 241])
def test_the_product_takes_any_number_of_rows(library, rows):
    V, U, bias, room = torch.randn(rows, 64), torch.randn(1, 64, 96), torch.randn(96), -(-rows // 16) * 16
    M = torch.full((room + 1, 96), torch.nan)
    native.call(library.product, V, inference._packed(U, library), bias, 1, rows, 64, 96, 0, 0, 48, M)
    assert torch.allclose(M[:rows], (V @ U[0] + bias).relu(), atol=near(library)) and M[-1].isnan().all()


def tiles(V):
    "(N, T, C) as a matrix unit reads it: 16 rows and 32 channels together, the larger parts of them, then the smaller."
    large = V.bfloat16()
    parts = torch.stack([large, (V - large).bfloat16()], 1)  # (N, 2, T, C)
    parts = F.pad(parts, (0, 0, 0, -V.shape[1] % 16)).unflatten(3, (-1, 32)).unflatten(2, (-1, 16))  # (N, 2, T / 16, 16, C / 32, 32)
    return parts.permute(0, 2, 4, 1, 3, 5).contiguous().view(torch.float32).reshape(len(V), -1, V.shape[2])


def whole(V):
    "(N, T, C) as pairs of integers are read: every 32 numbers scaled to a length of 32760 and rounded, then all scales."
    scale = V.unflatten(2, (-1, 32)).norm(dim=3).clamp_min(1e-20) / 32760
    integers = (V / scale.repeat_interleave(32, 2)).round().short().contiguous().view(torch.float32)
    return torch.cat([integers.flatten(1), scale.flatten(1)], 1)


def as_read(V, library): return {"3 x bf16": tiles, "int16": whole, "float32": torch.clone}[WAYS[library.way()]](V)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 49, 241, 300])
def test_several_products_at_once(library, rows):
    V, U, apart = torch.randn(3, rows, 64), torch.randn(3, 64, 96), 16
    seen = F.pad(as_read(V, library).flatten(1), (0, apart))
    made = torch.full((3, -(-rows // 16) * 16 * 96 + apart), torch.nan)
    native.call(library.product, seen, inference._packed(U, library), None, 3, rows, 64, 96, seen.shape[1], made.shape[1], 240, made)
    assert torch.allclose(made[:, : rows * 96].view(3, rows, 96), V @ U, atol=near(library)) and made[:, -apart:].isnan().all()


def test_what_is_left_of_a_number(library):
    "16 bits of each with the unit; with integers 16 bits of the largest, or fewer the more numbers share its scale."
    V, U, M = torch.rand(64, 32) + 1, torch.eye(32)[None], torch.empty(64, 32)
    native.call(library.product, V, inference._packed(U, library), torch.zeros(32), 1, 64, 32, 32, 0, 0, 48, M)
    worst = ((M - V) / V).abs().max()
    low, high = {"3 x bf16": (1e-9, 2**-16), "int16": (1e-9, 2**-12), "float32": (-1, 0)}[WAYS[library.way()]]
    assert low < worst <= high


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), C=st.sampled_from([32, 64, 256]), kind=st.sampled_from(["aligned", "opposite", "one", "spread", "flat"]), scale=st.sampled_from([1e-12, 1e-3, 1, 1e6]))
def test_a_sum_of_integers_never_overflows(seed, C, kind, scale):
    "Rows that are multiples of the columns reach the bound of Cauchy and Schwarz; an overflow would be wrong by the whole sum."
    library, drawn = compiled_for("int16"), torch.Generator().manual_seed(seed)
    u = torch.randn(C, generator=drawn)
    if kind == "one": u *= torch.arange(C) % 32 == seed % 32
    if kind == "spread": u *= torch.logspace(-6, 0, C)
    if kind == "flat": u = torch.ones(C)
    V, U = u.repeat(13, 1) * (-scale if kind == "opposite" else scale), u[None, :, None].repeat(1, 1, 32)
    made, rectified = torch.full((13, 32), torch.nan), torch.full((13, 32), torch.nan)
    native.call(library.product, whole(V[None]).flatten(), inference._packed(U, library), None, 1, 13, C, 32, 0, 0, 240, made)
    native.call(library.product, V, inference._packed(U, library), torch.zeros(32), 1, 13, C, 32, 0, 0, 48, rectified)
    assert torch.allclose(made, V @ U[0], rtol=1e-3, atol=0) and torch.allclose(rectified, (V @ U[0]).relu(), rtol=1e-3, atol=0)


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 30), scale=st.sampled_from([1e-8, 1.0, 1e12]), dark=st.booleans())
def test_every_row_has_scales_of_its_own(rows, scale, dark):
    library = compiled_for("int16")
    V, U = torch.randn(rows, 64) * torch.logspace(0, -6, rows)[:, None] * scale, torch.randn(1, 64, 32)
    if dark: V[rows // 2] = 0
    M = torch.empty(rows, 32)
    native.call(library.product, V, inference._packed(U, library), torch.zeros(32), 1, rows, 64, 32, 0, 0, 48, M)
    expected = (V.double() @ U[0].double()).relu()
    assert ((M - expected).abs() <= 1e-3 * V.norm(dim=1, keepdim=True) * 8).all()


def test_a_filter_of_zeros_gives_zeros(library):
    V, M = torch.randn(5, 32), torch.empty(16, 32)
    native.call(library.product, V, inference._packed(torch.zeros(1, 32, 32), library), torch.zeros(32), 1, 5, 32, 32, 0, 0, 48, M)
    assert M[:5].eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_stay_none(library, bad):
    V, M = torch.randn(5, 64), torch.empty(16, 32)
    V[2, 40] = bad
    native.call(library.product, V, inference._packed(torch.ones(1, 64, 32), library), torch.zeros(32), 1, 5, 64, 32, 0, 0, 48, M)
    assert not M[2].isfinite().any() and M[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("first, there", [("float32", ("float32",)), ("int16", ("int16", "float32"))])
def test_a_way_can_be_named(monkeypatch, first, there):
    monkeypatch.setenv("GRAD_NB_PRODUCTS", first)
    assert inference.ways() == there
    compiled_for(first)
    loops.cache_clear()
    try: assert WAYS[loops().way()] == first
    finally: loops.cache_clear()


def test_a_named_way_that_is_not_there_is_reported(monkeypatch, caplog):
    monkeypatch.setenv("GRAD_NB_PRODUCTS", "3 x bf16")
    monkeypatch.setattr(inference, "has_unit", lambda: False)
    monkeypatch.setattr(inference, "has_pairs", lambda: False)
    loops.cache_clear()
    try: loops()
    finally: loops.cache_clear()
    assert "cannot multiply as GRAD_NB_PRODUCTS says (3 x bf16); it does so by float32" in caplog.text


def test_what_is_not_wanted_is_not_asked_for(monkeypatch):
    monkeypatch.setenv("GRAD_NB_PRODUCTS", "float32")
    monkeypatch.setattr(inference, "has_unit", lambda: pytest.fail("the unit was asked for"))
    assert inference.ways() == ("float32",)


def test_vectors_of_floats_are_not_taken_for_integers(monkeypatch, tmp_path):
    "A compiler that does not know the processor's instruction would make a slower way of it."
    monkeypatch.setattr(inference, "has_pairs", lambda: True)
    program = inference.source("int16").replace("defined __AVX512VNNI__", "0").replace("defined __AVXVNNI__", "0")
    with pytest.raises(subprocess.CalledProcessError): native.compile_c(program, "without", tmp_path)


def test_by_default_the_best_way_that_is_there_comes_first(monkeypatch):
    monkeypatch.delenv("GRAD_NB_PRODUCTS", raising=False)
    for unit, pairs in ((True, True), (True, False), (False, True), (False, False)):
        monkeypatch.setattr(inference, "has_unit", lambda unit=unit: unit)
        monkeypatch.setattr(inference, "has_pairs", lambda pairs=pairs: pairs)
        assert inference.ways() == ("3 x bf16",) * unit + ("int16",) * pairs + ("float32",)


@pytest.mark.parametrize("flags, pairs", [("fpu avx2 avx_vnni", True), ("fpu avx512f avx512_vnni", True), ("fpu avx2 avx512f", False), ("", False)])
def test_pairs_are_known_by_the_flags(monkeypatch, flags, pairs):
    monkeypatch.setattr(native, "_processor", lambda: ["model name : one with avx_vnni", f"flags\t\t: {flags}"])
    assert inference.has_pairs() == pairs


def test_an_unknown_way_is_an_error_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAD_NB_PRODUCTS", "int8")
    for work in (inference.named_way, inference.ways, lambda: GRAD("demo").fit(tmp_path), lambda: GRAD.load(tmp_path / "part.grad")):
        with pytest.raises(ValueError, match="GRAD_NB_PRODUCTS must be one of '3 x bf16', 'int16', 'float32', not 'int8'"): work()


WRONG = [("UNIT", "#include <immintrin.h>", "#error no"), ("BY_UNIT", "FILTERS_AT(b + 512) MULTIPLY", ""), ("PRODUCT_BY_UNIT", "else by_unit(0, C, a, b, next, share, y, K);", "else ;"),
         ("PRODUCT_BY_UNIT", "split(V + n * sv + t * C + c", "split(V + n * sv + c"), ("PRODUCT_BY_UNIT", "+ bias[k + q]", "- bias[k + q]"), ("PRODUCT_BY_UNIT", "(first + t) * K", "t * K"),
         ("PAIRS", "#include <immintrin.h>", "#error no"), ("SPLIT", "12582912.0f", "12582913.0f"), ("SPLIT", "scale = 32760 / size", "scale = 36000 / size"), ("BY_PAIRS", "if (c > CH / 2) z += *to;", ""), ("BY_PAIRS", "size[i * parts]", "size[0]"),
         ("BY_PAIRS", "column + k * W", "column"), ("BY_PAIRS", "(last - first) * C / 2}", "0}")]


@pytest.mark.parametrize("name, right, wrong", WRONG, ids=["unknown unit", "two products", "a row block", "first rows", "bias", "parts",
                                                           "unknown pairs", "rounding", "too long", "the sum so far", "scales of rows", "scales of columns", "where scales are"])
def test_loops_that_are_wrong_are_not_used(monkeypatch, caplog, tmp_path, name, right, wrong):
    way = "3 x bf16" if "UNIT" in name else "int16"
    compiled_for(way)
    monkeypatch.setenv("GRAD_NB_PRODUCTS", way)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert getattr(inference, name).count(right) == 1
    monkeypatch.setattr(inference, name, getattr(inference, name).replace(right, wrong))
    loops.cache_clear()
    try:
        following = inference.ways()[1]
        with caplog.at_level("INFO"): assert WAYS[loops().way()] == following
        assert f"products by {following} do the work" in caplog.text
    finally: loops.cache_clear()


@pytest.mark.parametrize("width, size", [(1.0, 64), (1.0, 75), (0.5, 100), (0.25, 64), (0.25, 256), (0.1, 50), (0.25, 34)])
@pytest.mark.parametrize("way", [*WAYS, "torch"])
def test_fast_is_plain(width, size, way, monkeypatch):
    made = None if way == "torch" else compiled_for(way)
    monkeypatch.setattr(inference, "loops", lambda: made)
    d = detector(width)
    fast, seen = FastDetector(d, size), pictures(5 if size < 256 else 1, size)
    expected = plain(d, seen)
    assert (fast(torch.from_numpy(seen)) - expected).abs().max() < tolerance(fast) * (expected.std() if size > 34 else 1)
    assert way == "torch" or width < 0.25 or size == 34 or any(isinstance(layer, Winograd) for layer in fast.layers)
    assert fast.precision == (way if way != "torch" and width >= 0.25 else "float32")


@pytest.mark.skipif(loops() is None, reason="there is no C compiler")
@pytest.mark.parametrize("tiles", [1, 7, 30])
def test_large_pictures_go_through_in_strips(tiles, monkeypatch):
    d, seen = detector(0.25), pictures(2, 134)
    expected = plain(d, seen)
    monkeypatch.setattr(inference, "STRIP", tiles)
    fast = FastDetector(d, 134)
    assert any(isinstance(layer, Winograd) and layer.strip < layer.tiles for layer in fast.layers)
    assert (fast(torch.from_numpy(seen)) - expected).abs().max() < tolerance(fast) * expected.std()


def test_any_batch_gives_the_same_scores():
    d, seen = detector(0.5), pictures(19, 64)
    whole = score_maps(d, seen, 64, batch=19)
    for batch in (1, 3, 16): assert np.allclose(score_maps(d, seen, 64, batch=batch), whole, atol=TOLERANCE * whole.std())


def test_memory_is_not_shared_between_calls():
    d, seen = detector(0.25), pictures(2, 64)
    first = score_map(d, torch.from_numpy(seen[:1]))
    kept = first.clone()
    score_map(d, torch.from_numpy(seen[1:]))
    assert torch.equal(first, kept)


def test_nothing_that_is_not_a_number_is_hidden():
    d = detector(0.25)
    with torch.no_grad(): d.body[4].weight[0, 0, 0, 0] = torch.nan
    assert score_map(d, torch.from_numpy(pictures(1, 64))).isnan().any()


def test_new_weights_are_seen():
    d, seen = detector(0.25), torch.from_numpy(pictures(1, 64))
    before, form = score_map(d, seen), prepared(d, 64)
    assert prepared(d, 64) is form
    with torch.no_grad(): d.body[0].bias += 0.5
    assert prepared(d, 64) is not form and not torch.allclose(score_map(d, seen), before)
    d.load_state_dict(detector(0.25, seed=1).state_dict())
    assert torch.allclose(score_map(d, seen), score_map(detector(0.25, seed=1), seen), atol=1e-4)


def test_other_networks_take_the_plain_way():
    net = nn.Conv2d(5, 1, 34, 4)
    x = torch.from_numpy(pictures(2, 50))
    assert torch.allclose(score_map(net, x), net(with_coords(x.permute(0, 3, 1, 2).float() / 127.5 - 1))[:, 0], atol=1e-5)


def test_the_rule_takes_the_shape_and_the_way():
    assert best_tile(58, 3) == 6 and best_tile(8, 3) == 2 and best_tile(62, 2) == 4
    assert {(best_tile(side, r, way), r) for side in range(1, 80) for r in (2, 3) for way in ("3 x bf16", "int16")} <= {(0, 2), (0, 3), *TILES}
    assert all(best_tile(side, r) in (0, 2, 4, 6) for side in range(1, 80) for r in (2, 3))


def test_a_compiler_that_lies_is_not_believed(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inference, "_sum", lambda row, names, real=inference._sum: real([2 * v for v in row], names))
    loops.cache_clear()
    try: assert loops() is None
    finally: loops.cache_clear()


@pytest.mark.parametrize("variable, value", [("GRAD_NB_NATIVE", "0"), ("CC", "no-such-compiler")])
def test_without_a_compiler(monkeypatch, tmp_path, variable, value):
    monkeypatch.setenv(variable, value); monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loops.cache_clear()
    try: assert loops() is None
    finally: loops.cache_clear()


def test_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    loops.cache_clear()
    try: assert loops() is None
    finally: loops.cache_clear()


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
    scores, none = fuse([np.zeros((1, 8, 8), np.float32)] * 2, [64, 64], [evaluation.MapStats(0, 1)] * 2, 64, with_maps=False)
    assert none is None and scores.shape == (1,)


@pytest.mark.slow
def test_the_auroc_of_bottle_is_the_same(real_data):
    category = read_category(real_data / "mvtec_ad", "bottle")
    chosen = category.test[::4]
    seen, labels = load_images(chosen, 128), np.array([s.label for s in chosen])
    d = detector(0.5)
    fast, slow = score_maps(d, seen, 128).max((1, 2)), plain(d, seen).numpy().max((1, 2))
    assert np.abs(fast - slow).max() < TOLERANCE * slow.std() * 10 and image_auroc(fast, labels) == image_auroc(slow, labels)


@pytest.mark.parametrize("command", ["import grad_nb.grad", "from grad_nb.cli import grad_predict; grad_predict.__doc__"])
def test_nothing_heavy_is_imported(command):
    heavy = ("sklearn", "scipy", "matplotlib", "torchvision", "onnx", "onnxruntime", "anomalib", "openvino", "IPython", "torch._dynamo", "torch._inductor")
    code = f"import sys; import torch; before = set(sys.modules); {command}; new = set(sys.modules) - before; print(*[n for n in {heavy} if n in new], len(new))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *loaded, count = done.stdout.split()
    assert not loaded, f"{command} imports {loaded}"
    assert int(count) < 900


def test_a_detector_that_is_scored_and_then_trained_on_is_prepared_anew():
    learner, seen = Learner(DetectorConfig(width=0.25), 20), torch.from_numpy(pictures(2, 64))
    before = score_map(learner.detector.eval(), seen).clone()
    for p in learner.detector.parameters(): p.grad = torch.ones_like(p)
    learner.optimizer.step()
    after = score_map(learner.detector, seen)
    assert not torch.allclose(after, before) and torch.equal(after, score_map(copy.deepcopy(learner.detector), seen))


class Wrapped(nn.Module):
    "A detector that the library does not know: it takes the plain way, as on a GPU."

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x): return self.inner(x)


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
    assert not any(net in inference._prepared for net in nets), "only its own copies are prepared"
    assert known == inference.arithmetic(nets, sizes)


@pytest.mark.parametrize("n", [1, 4, 5, 8, 9, 17])
def test_a_stream_of_batches_is_every_picture_once_and_in_order(n):
    nets, sizes, seen = [detector(0.25), detector(0.1, 1)], (64, 48), pictures(n, 64)
    batches = list(Captured(nets, sizes, 4, 64, "cpu").stream(seen))
    assert [len(large) for large, _ in batches] == [4] * (n // 4) + [n % 4] * (n % 4 > 0)
    for k, expected in enumerate(score_levels(nets, seen, sizes)):
        assert np.allclose(np.concatenate([maps[k] for maps in batches]), expected, atol=same(prepared(nets[k], sizes[k]), expected))


class Recorded:
    "Stands in for a recording on a GPU."
    made = []

    def __init__(self, detectors, sizes, batch, side, device, bf16):
        if batch > 8: raise torch.OutOfMemoryError("full")
        self.pictures, self.bf16 = torch.empty(batch, side, side, 3), bf16
        self.made.append(batch)


@pytest.fixture
def recorded(monkeypatch):
    Recorded.made = []
    monkeypatch.setattr(inference, "Captured", Recorded); monkeypatch.setattr(inference, "_free", lambda device: 10**12)
    return Recorded.made


def test_a_recording_is_kept_until_it_is_too_small_or_old(recorded, monkeypatch):
    one, two = detector(0.1), detector(0.1, 1)
    first = inference.captured([one], (48,), 4, 48)
    assert inference.captured([one], (48,), 4, 48) is first is inference.captured([one], (48,), 2, 48) and recorded == [4] and first.bf16 is False
    assert inference.captured([one, two], (48, 48), 4, 48) is not first and inference.captured([one], (48,), 3, 48) is first, "others do not push it out"
    larger = inference.captured([one], (48,), 8, 48)
    assert larger is not first and inference.captured([one], (48,), 5, 48) is larger and recorded == [4, 4, 8]
    with torch.no_grad(): one.head.bias += 1
    assert inference.captured([one], (48,), 4, 48) is not larger
    monkeypatch.setenv("GRAD_NB_GRAPHS", "0")
    assert inference.captured([one], (48,), 4, 48) is None


@pytest.mark.parametrize("error", [RuntimeError("cannot"), MemoryError("not even one")])
def test_what_cannot_be_recorded_runs_plainly_and_is_not_tried_again(recorded, monkeypatch, caplog, error):
    def fails(*args, **options): recorded.append(0); raise error
    monkeypatch.setattr(inference, "Captured", fails)
    one = detector(0.1)
    assert [inference.captured([one], (48,), n, 48) for n in (4, 8)] == [None, None] and recorded == [0] and "run plainly" in caplog.text


def test_a_recording_that_does_not_fit_is_made_smaller(recorded):
    one = detector(0.1)
    first = inference.captured([one], (48,), 100, 48)
    assert len(first.pictures) == 8 and recorded == [8]
    assert inference.captured([one], (48,), 90, 48) is first and recorded == [8], "it is not recorded anew for every call that wants more than fits"


def test_on_cuda_pictures_go_through_the_recording(monkeypatch):
    nets, seen = [detector(0.1), detector(0.1, 1)], pictures(5, 64)
    expected = [np.concatenate(parts) for parts in zip(*evaluation._batches(nets, seen, (64, 48), torch.device("cpu"), 2))]
    asked = []
    def captured(detectors, sizes, n, side): asked.append((sizes, n, side)); return Captured(detectors, sizes, 4, side, "cpu")
    monkeypatch.setattr(evaluation, "captured", captured)
    found = [np.concatenate(parts) for parts in zip(*evaluation._batches(nets, seen, (64, 48), torch.device("cuda"), 2))]
    assert asked == [((64, 48), 5, 64)] and all(np.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))


def test_kernels_are_chosen_with_cudnn_on():
    before = torch.backends.cudnn.benchmark
    with inference._choosing(): assert torch.backends.cudnn.enabled and torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark is before


def test_a_stream_of_nothing_is_nothing():
    assert list(Captured([detector(0.1)], (48,), 4, 48, "cpu").stream(pictures(0, 48))) == []


@pytest.mark.parametrize("n, free, batch", [(1, 10**12, 1), (5, 10**12, 8), (10**6, 10**12, 1024), (100, 0, 1), (100, 2 * 330 * 64**2 * 5, 4)])
def test_a_batch_is_what_half_of_the_memory_holds(n, free, batch):
    assert roomy_batch((64,), 64, n, free) == batch


@pytest.mark.gpu
def test_a_gpu_scores_like_the_cpu(monkeypatch, caplog):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    nets, sizes, seen = [detector(0.5, k) for k in range(3)], (128, 64, 48), pictures(37, 128)
    expected = score_levels(nets, seen, sizes)
    for graphs, tolerance in (("1", 0.15), ("0", 0.02)):
        monkeypatch.setenv("GRAD_NB_GRAPHS", graphs)
        for found, maps in zip(score_levels([copy.deepcopy(net) for net in nets], seen, sizes, "cuda", 8), expected):
            assert np.abs(found - maps).max() < tolerance * maps.std()
    assert "could not be recorded" not in caplog.text


@pytest.mark.skipif(loops() is None, reason="there is no C compiler")
def test_a_compiler_without_openmp_makes_the_loops_for_one_core(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls, real = [], subprocess.run
    def run(command, **options):
        calls.append("-fopenmp" in command)
        if calls[-1]: raise subprocess.CalledProcessError(1, command)
        return real(command, **options)
    monkeypatch.setattr(native.subprocess, "run", run)
    loops.cache_clear()
    try: assert loops() is not None and calls == [True, False]
    finally: loops.cache_clear()
