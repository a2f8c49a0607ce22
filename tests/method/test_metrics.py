"""The metrics beyond AUROC against loops over all thresholds, and what must not matter does not."""

import itertools
import tracemalloc
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from grad_nb import evaluation
from grad_nb.core.files import read_array, read_json, write_array
from grad_nb.datasets.readers import Sample, load_defects, load_masks, upright_shape
from grad_nb.datasets.trays import make_trays
from grad_nb.metrics import (
    OnDemand,
    area_to,
    au_pro,
    au_spro,
    auroc_interval,
    average_precision,
    f1_max,
    pixel_auroc_ap,
    pro_curve,
    resize_map,
    spro_curve,
    write_tiff_maps,
)
from grad_nb.runs import stages as pipeline

LIMITS = (0.01, 0.05, 0.1, 0.3, 0.5, 1.0)
same = lambda value: pytest.approx(value, abs=1e-12, nan_ok=True)


def rng(seed=0):
    return np.random.default_rng(seed)


# --- brute force: every threshold, every pixel, in fractions --------------------------------------------------------


def corners(maps, defects):
    "False-positive rate and mean saturated overlap at every threshold, from none to all pixels; None if undefined."
    normal = [
        (i, y, x)
        for i, m in enumerate(maps)
        for y, x in np.ndindex(m.shape)
        if not any(mask[y, x] for mask, _ in defects[i])
    ]
    channels = [
        (i, [(y, x) for y, x in np.ndindex(mask.shape) if mask[y, x]], Fraction(s))
        for i, ds in enumerate(defects)
        for mask, s in ds
    ]
    channels = [c for c in channels if c[1]]
    if not normal or not channels:
        return None
    found = [(Fraction(0), Fraction(0))]
    for t in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        fpr = Fraction(sum(bool(maps[i][y, x] >= t) for i, y, x in normal), len(normal))
        shares = [
            min(Fraction(sum(bool(maps[i][y, x] >= t) for y, x in pixels)) / s, Fraction(1))
            for i, pixels, s in channels
        ]
        found.append((fpr, sum(shares) / len(shares)))
    return found


def area(found, limit):
    "Trapezoids between the corners, the last one cut at the limit."
    if found is None:
        return float("nan")
    limit, total = Fraction(limit), Fraction(0)
    for (x0, y0), (x1, y1) in itertools.pairwise(found):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        at_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
        total += (end - x0) * (y0 + at_end) / 2
    return float(total / limit)


def components(mask):
    "8-connected components by flooding."
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        flood, part = [left.pop()], np.zeros(mask.shape, bool)
        while flood:
            y, x = flood.pop()
            part[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            flood += near
        found.append((part, int(part.sum())))
    return found


@st.composite
def judged(draw, channels=2):
    "Small maps with many ties, and for each picture a few defects that may overlap, be empty or saturate."
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    values = st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0]) | st.floats(-8, 8, width=16)
    maps, defects = [], []
    for _ in range(draw(st.integers(1, 3))):
        maps.append(draw(arrays(draw(st.sampled_from([np.float16, np.float32, np.float64])), shape, elements=values)))
        masks = [draw(arrays(bool, shape)) for _ in range(draw(st.integers(0, channels)))]
        defects.append([(m, draw(st.sampled_from([0.5, 1, 2.5, 4, 20, max(1, int(m.sum()))]))) for m in masks])
    return maps, defects


@settings(deadline=None, max_examples=120)
@given(judged())
def test_spro_is_that_of_all_thresholds(case):
    maps, defects = case
    curve, found = spro_curve(maps, defects), corners(maps, defects)
    for limit in LIMITS:
        assert area_to(*curve, limit) == same(area(found, limit))
    assert au_spro(maps, defects) == same(area(found, 0.05))


@settings(deadline=None, max_examples=120)
@given(judged(channels=1))
def test_pro_is_that_of_all_thresholds(case):
    maps, defects = case
    masks = [d[0][0] if d else np.zeros(m.shape, bool) for m, d in zip(maps, defects)]
    found = corners(maps, [components(mask) for mask in masks])
    for limit in LIMITS:
        assert au_pro(maps, masks, limit) == same(area(found, limit))
    assert au_pro(maps, masks) == same(area(found, 0.3))
    assert au_pro(maps, [255 * m.astype(np.uint8) for m in masks]) == same(area(found, 0.3))


def test_pro_agrees_on_a_larger_case_without_ties():
    maps, masks = rng().normal(size=(3, 24, 20)), rng(1).random((3, 24, 20)) < 0.12
    masks[2] = False
    found = corners(maps, [components(m) for m in masks])
    assert len(found) > 1000 and len(components(masks[0])) > 10
    for limit in LIMITS:
        assert au_pro(maps, masks, limit) == same(area(found, limit))


@settings(deadline=None, max_examples=100)
@given(judged(channels=1))
def test_pixel_figures_are_those_of_scikit_learn(case):
    maps, defects = case
    masks = [d[0][0] if d else np.zeros(m.shape, bool) for m, d in zip(maps, defects)]
    flat, truth = (
        np.concatenate([m.ravel() for m in maps]).astype(np.float64),
        np.concatenate([m.ravel() for m in masks]),
    )
    auroc, ap = pixel_auroc_ap(maps, masks)
    assert ap == same(average_precision_score(truth, flat) if truth.any() else float("nan"))
    assert auroc == same(roc_auc_score(truth, flat) if truth.any() and not truth.all() else float("nan"))
    assert evaluation.pixel_auroc(maps, masks) == same(auroc)


# --- what is undefined, what is perfect, what does not matter -------------------------------------------------------

BLOB = np.zeros((2, 8, 9), bool)
BLOB[0, 2:5, 3:6] = True


@pytest.mark.parametrize("masks", [np.zeros_like(BLOB), np.ones_like(BLOB)], ids=["all normal", "all defect"])
def test_undefined_is_nan_and_silent(masks):
    maps = rng().normal(size=BLOB.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (
            np.isnan(au_pro(maps, masks))
            and np.isnan(au_spro(maps, [[(m, 3.0)] for m in masks]))
            and np.isnan(pixel_auroc_ap(maps, masks)[0])
        )
        assert np.isnan(pixel_auroc_ap(maps, masks)[1]) == (not masks.any())
    assert all(len(part) == 0 for part in pro_curve(maps, masks))


def test_no_pictures_give_nan():
    assert np.isnan(au_pro([], [])) and np.isnan(au_spro([], [])) and np.isnan(pixel_auroc_ap([], [])).all()


def test_an_empty_mask_is_no_defect():
    maps = rng().normal(size=BLOB.shape)
    plain, more = [[(BLOB[0], 4.0)], []], [[(BLOB[0], 4.0), (BLOB[1], 0.0)], [(BLOB[1], 7.0)]]
    assert au_spro(maps, plain, 0.3) == au_spro(maps, more, 0.3)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_perfect_map_has_all_the_area_and_the_worst_has_none(limit):
    assert au_pro(BLOB + 0.0, BLOB, limit) == same(1) and au_spro(BLOB + 0.0, [[(BLOB[0], 2.0)], []], limit) == same(1)
    assert au_pro(-1.0 * BLOB, BLOB, limit) == same(0) and pixel_auroc_ap(BLOB + 0.0, BLOB) == (1, 1)


@pytest.mark.parametrize("limit", LIMITS)
def test_a_constant_map_is_the_diagonal(limit):
    assert au_pro(np.zeros(BLOB.shape), BLOB, limit) == same(limit / 2)


def test_a_defect_is_found_once_its_saturation_area_is():
    half = np.where(BLOB, 0.0, -1.0)
    half[0, 2:5, 3] = 1.0  # three of nine pixels, before everything else
    for saturation, share in ((1, 1), (3, 1), (4, 3 / 4), (9, 3 / 9), (18, 3 / 18)):
        fpr, overlap = spro_curve(half, [[(BLOB[0], saturation)], []])
        assert overlap[fpr == 0].max() == pytest.approx(min(9 / saturation, 1)) and share in [
            pytest.approx(v) for v in overlap
        ]
    half[half == 0] = -2  # the rest of it after everything else
    for saturation, share in ((1, 1), (3, 1), (4, 3 / 4), (9, 3 / 9), (18, 3 / 18)):
        assert au_spro(half, [[(BLOB[0], saturation)], []], 0.05) == same(share)


def test_a_pixel_of_two_defects_counts_for_both_and_is_not_normal():
    left, right = np.array([[1, 1, 0, 0, 0, 0]], bool), np.array([[0, 1, 1, 0, 0, 0]], bool)
    scored = np.array([[0, 9, 0, 5, 0, 0]])
    fpr, overlap = spro_curve([scored], [[(left, 2), (right, 2)]])
    assert overlap[fpr == 0].max() == same(0.5) and au_spro([scored], [[(left, 2), (right, 2)]], 1 / 3) == same(0.5)


def test_every_region_counts_the_same_whatever_its_size():
    mask = np.zeros((1, 20, 20), bool)
    mask[0, :10, :10] = mask[0, 15, 15] = True
    wide, tiny = np.zeros((2, 1, 20, 20))
    wide[0, :10, :10] = tiny[0, 15, 15] = 1
    assert (
        au_pro(wide, mask, 0.01) == same(au_pro(tiny, mask, 0.01))
        and pixel_auroc_ap(wide, mask)[0] > 0.99 > 0.6 > pixel_auroc_ap(tiny, mask)[0]
    )
    both = [[(mask[0], float(mask.sum()))]]  # one mask file with two parts is one defect
    assert au_spro(tiny, both, 0.01) < 0.1 < au_pro(tiny, mask, 0.01)


@settings(deadline=None, max_examples=30)
@given(judged(), st.randoms(use_true_random=False))
def test_only_the_order_of_values_and_nothing_of_pictures_matters(case, random):
    maps, defects = [m.astype(np.float64) for m in case[0]], case[1]
    before = spro_curve(maps, defects)
    order = random.sample(range(len(maps)), len(maps))
    for changed in ([np.exp(m) for m in maps], [7 * m**3 for m in maps]):
        after = spro_curve([changed[i] for i in order], [defects[i] for i in order])
        assert len(before[0]) == len(after[0]) and np.allclose(before, after, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(judged())
def test_curves_rise_from_zero_and_areas_stay_in_the_unit_interval(case):
    fpr, overlap = spro_curve(*case)
    if not len(fpr):
        return
    assert (
        fpr[0] == overlap[0] == 0
        and fpr[-1] == 1
        and (np.diff(fpr) >= 0).all()
        and (np.diff(overlap) >= 0).all()
        and overlap[-1] <= 1
    )
    areas = [area_to(fpr, overlap, limit) for limit in LIMITS]
    assert all(0 <= a <= 1 for a in areas) and (np.diff(areas) >= -1e-12).all(), (
        "a curve that rises has a mean that rises"
    )


@pytest.mark.parametrize("limit", [0, -0.1, 1.0001, float("nan")])
def test_impossible_limits_are_refused(limit):
    with pytest.raises(ValueError, match="limit"):
        au_pro(BLOB + 0.0, BLOB, limit)
    with pytest.raises(ValueError, match="limit"):
        au_spro(BLOB + 0.0, [[], []], limit)


def test_what_does_not_fit_is_refused():
    maps = np.zeros(BLOB.shape)
    with pytest.raises(ValueError, match="shape"):
        au_pro(maps, BLOB.transpose(0, 2, 1))
    with pytest.raises(ValueError, match="shape"):
        au_spro(maps, [[(BLOB[0, :2], 3)], []])
    with pytest.raises(ValueError, match="fewer ground truths than maps"):
        au_pro(maps, BLOB[:1])
    with pytest.raises(ValueError, match="more ground truths than maps"):
        au_spro(maps[:1], [[], []])
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="saturation"):
            au_spro(maps, [[(BLOB[0], bad)], []])
    for bad, at in itertools.product((np.nan, np.inf, -np.inf), (0, 1)):  # in an anomalous and in a normal picture
        broken = maps.copy()
        broken[at, 0, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            au_pro(broken, BLOB)
        with pytest.raises(ValueError, match="not finite"):
            au_spro(broken, [[(BLOB[0], 3)], []])


# --- where maps come from -------------------------------------------------------------------------------------------


def test_maps_may_be_a_memory_map_a_list_an_iterator_or_made_on_demand(tmp_path):
    maps, masks = rng().normal(size=(4, 30, 20)).astype(np.float16), rng(1).random((4, 30, 20)) < 0.1
    write_array(tmp_path / "maps.npy", maps)
    mapped, want = read_array(tmp_path / "maps.npy"), au_pro(maps.astype(np.float64), masks)
    assert mapped.dtype == np.float16 and isinstance(mapped, np.memmap)
    for given_ in (mapped, list(maps), (m for m in maps), OnDemand(4, lambda i: maps[i])):
        assert au_pro(given_, masks) == want
    assert au_pro(mapped, (m for m in masks)) == want and pixel_auroc_ap(iter(mapped), iter(masks)) == pixel_auroc_ap(
        maps, masks
    )


def test_pictures_may_differ_in_size():
    sizes = [(6, 9), (12, 5), (7, 7)]
    maps = [rng(i).normal(size=s) for i, s in enumerate(sizes)]
    defects = [
        [(rng(9).random(sizes[0]) < 0.3, 4.0)],
        [],
        [(rng(8).random(sizes[2]) < 0.3, 2.0), (rng(7).random(sizes[2]) < 0.2, 3.0)],
    ]
    found = corners(maps, defects)
    for limit in LIMITS:
        assert au_spro(maps, defects, limit) == same(area(found, limit))


def test_integers_too_large_for_float32_are_told_apart():
    maps, mask = np.array([[2**24 + 1, 2**24, 2**24 + 1, 0]]), np.array([[1, 0, 0, 0]])
    assert au_pro([maps], [mask], 0.5) == same(2 / 3), "tied with one normal pixel of three; in float32 it would be two"


def test_memory_does_not_grow_with_the_number_of_pictures():
    mask = np.zeros((256, 256), bool)
    mask[100:110, 100:110] = True

    def peak(n):
        maps = OnDemand(n, lambda i: rng(i).random((256, 256), np.float32))
        tracemalloc.start()
        value = au_spro(maps, OnDemand(n, lambda i: [(mask, 50.0)] if i < 3 else []), 1.0)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert 0 < value < 1
        return top

    few, many = peak(5), peak(60)
    assert many < 1.2 * few and many < 20 * 4 * 256**2, (few, many)


def test_items_made_on_demand_are_those_of_a_list():
    squares = OnDemand(4, lambda i: i * i)
    assert len(squares) == 4 and list(squares) == [0, 1, 4, 9] and 9 in squares
    for i in (4, -1):
        with pytest.raises(IndexError):
            squares[i]


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (16, 24)])
def test_resizing_a_map_is_that_of_pillow(shape):
    m = rng().normal(size=(32, 32)).astype(np.float16)
    theirs = Image.fromarray(m.astype(np.float32)).resize(shape[::-1], Image.Resampling.BILINEAR)
    assert np.allclose(resize_map(m, shape), theirs, atol=1e-4) and resize_map(m, (32, 32)).dtype == np.float32
    assert np.array_equal(resize_map(m, (32, 32)), m.astype(np.float32))


# --- pictures -------------------------------------------------------------------------------------------------------

ROWS = st.lists(st.tuples(st.integers(-3, 3) | st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=25)


@settings(deadline=None, max_examples=60)
@given(ROWS)
def test_f1_and_precision_are_those_of_all_thresholds(rows):
    scores, labels = np.array([s for s, _ in rows], float), np.array([y for _, y in rows])
    best, ap, recall = 0.0, 0.0, 0.0
    for t in sorted(set(scores), reverse=True):
        hit, alarms = (labels & (scores >= t)).sum(), (scores >= t).sum()
        if not labels.any():
            break
        best = max(best, 2 * hit / (alarms + labels.sum()))
        ap, recall = ap + (hit / labels.sum() - recall) * hit / alarms, hit / labels.sum()
    nan = float("nan")
    assert f1_max(scores, labels) == same(best if labels.any() else nan) and average_precision(scores, labels) == same(
        ap if labels.any() else nan
    )
    assert f1_max(4 * scores, labels) == same(f1_max(scores, labels)), "only the order counts"


def test_picture_figures_without_an_anomaly_are_nan_and_with_anomalies_alone_are_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(f1_max([1, 2], [0, 0])) and np.isnan(average_precision([1, 2], [0, 0]))
        assert f1_max([1, 2], [1, 1]) == average_precision([1, 2], [1, 1]) == 1
        assert np.isnan(auroc_interval([1, 2], [0, 0])).all() and np.isnan(auroc_interval([1, 2], [1, 1])).all()


@pytest.mark.parametrize("figure", [f1_max, average_precision, auroc_interval])
def test_scores_that_cannot_be_judged_are_refused(figure):
    with pytest.raises(ValueError, match="not finite"):
        figure([0, np.nan, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="3 scores and 2 labels"):
        figure([1, 2, 3], [0, 1])


def test_the_interval_is_the_bootstrap_that_draws_pictures():
    scores, labels = (
        np.concatenate([rng(1).integers(0, 8, 40), rng(2).integers(2, 11, 25)]).astype(float),
        np.repeat([0, 1], [40, 25]),
    )
    r, drawn = rng(3), []
    for _ in range(4000):
        up, down = scores[r.integers(40, 65, 25)][:, None], scores[r.integers(0, 40, 40)]
        drawn.append(((up > down) + 0.5 * (up == down)).mean())
    want = np.quantile(drawn, [0.025, 0.975, 0.1, 0.9])
    low, high = auroc_interval(scores, labels, n=20000)
    assert (low, high) == pytest.approx(tuple(want[:2]), abs=0.012) and auroc_interval(
        scores, labels, 0.8, 20000
    ) == pytest.approx(tuple(want[2:]), abs=0.012)
    assert low < roc_auc_score(labels, scores) < high


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    truth = norm.cdf(1 / np.sqrt(2))
    inside = []
    for i in range(200):
        r = rng(i)
        low, high = auroc_interval(
            np.concatenate([r.normal(0, 1, 60), r.normal(1, 1, 60)]), np.repeat([0, 1], 60), n=300, seed=i
        )
        inside.append(low <= truth <= high)
    assert 0.88 <= np.mean(inside) <= 0.99


def test_the_interval_is_repeatable_and_turns_with_the_sign():
    scores, labels = rng().normal(size=50) + np.repeat([0, 1], 25), np.repeat([0, 1], 25)
    assert (
        auroc_interval(scores, labels, seed=4)
        == auroc_interval(scores, labels, seed=4)
        != auroc_interval(scores, labels, seed=5)
    )
    low, high = auroc_interval(scores, labels, n=5000)
    assert auroc_interval(-scores, labels, n=5000) == pytest.approx((1 - high, 1 - low), abs=0.02)
    assert auroc_interval(scores, labels, 0.5)[0] > low and auroc_interval(labels, labels) == (1, 1)
    for level, n in ((0, 10), (1, 10), (float("nan"), 10), (0.9, 0)):
        with pytest.raises(ValueError, match="level"):
            auroc_interval(scores, labels, level, n)


def test_large_test_sets_are_drawn_in_pieces():
    scores, labels = rng().normal(size=30_000), np.arange(30_000) % 2
    low, high = auroc_interval(scores, labels, n=150)
    assert low < roc_auc_score(labels, scores) < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(30_001 / (12 * 15_000**2)), rel=0.3), (
        "the width that theory gives without a difference"
    )


# --- TIFF -----------------------------------------------------------------------------------------------------------

SAMPLES = [
    Sample(Path(f"bottle/test/{kind}/{stem}.png"), int(kind != "good"), kind)
    for kind in ("good", "broken")
    for stem in ("000", "001")
]


def test_tiff_maps_lie_where_the_scripts_of_mvtec_look_and_hold_floats(tmp_path):
    maps = [rng(i).normal(size=(20 + i, 30)).astype(np.float16) for i in range(4)]
    paths = write_tiff_maps(tmp_path, "bottle", SAMPLES, maps)
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert found == sorted(
        f"anomaly_maps/bottle/test/{kind}/{stem}.tiff" for kind in ("good", "broken") for stem in ("000", "001")
    )
    for path, want in zip(paths, maps):
        with Image.open(path) as im:
            assert im.format == "TIFF" and im.mode == "F" and im.tag_v2[258] == (32,) and im.tag_v2[339] == (3,), (
                "32 bits, IEEE floats"
            )
            assert np.array_equal(np.asarray(im), want.astype(np.float32))


def test_a_killed_writer_leaves_whole_files_only(tmp_path, monkeypatch):
    maps = rng().normal(size=(4, 8, 8))
    write_tiff_maps(tmp_path, "bottle", SAMPLES, maps)
    real, calls = Image.Image.save, []

    def save(self, path, **kwargs):
        calls.append(path)
        if len(calls) == 3:
            Path(path).write_bytes(b"II*\0half a")
            raise OSError("disk full")
        real(self, path, **kwargs)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="disk full"):
        write_tiff_maps(tmp_path, "bottle", SAMPLES, maps + 1)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 4 and all(p.suffix == ".tiff" for p in files)
    first = [
        float(np.asarray(Image.open(tmp_path / f"anomaly_maps/bottle/test/{s.type}/{s.path.stem}.tiff"))[0, 0])
        for s in SAMPLES
    ]
    assert first == pytest.approx([maps[0, 0, 0] + 1, maps[1, 0, 0] + 1, maps[2, 0, 0], maps[3, 0, 0]])


def test_tiff_maps_that_would_overwrite_each_other_or_are_too_few_are_refused(tmp_path):
    twins = [SAMPLES[0], Sample(SAMPLES[0].path.with_suffix(".jpg"), 0, "good")]
    with pytest.raises(ValueError, match="rename"):
        write_tiff_maps(tmp_path, "bottle", twins, np.zeros((2, 4, 4)))
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="more ground truths"):
        write_tiff_maps(tmp_path, "bottle", SAMPLES, np.zeros((3, 4, 4)))


# --- a run ----------------------------------------------------------------------------------------------------------

TINY = (
    "generator.size=64 generator.width=8 generator.steps=2 generator.batch=2 generator.n_samples=4 "
    "generator.sample_steps=2 "
    "detector.width=0.1 detector.steps=2 evaluation.map_size=48"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run on a few trays, evaluated."
    root = tmp_path_factory.mktemp("run")
    make_trays(root, seed=7, size=80, train=8, validation=4, good=5, logical=6, structural=5, progress=False)
    run = pipeline.open_run(root, "trays", runs=root / "runs", overrides=TINY, device="cpu", progress=False)
    for n in run.generator_levels:
        pipeline.generate_stage(run, n)
    for row in run.levels:
        pipeline.detect_stage(run, row.level)
    pipeline.evaluate_stage(run)
    return run


def test_the_figures_of_a_run_are_those_of_its_maps_at_the_size_of_the_pictures(run):
    result, maps, test = read_json(run.folder / "result.json"), read_array(run.folder / "maps.npy"), run.category.test
    assert set(result["au_spro"]) == {"0.01", "0.05", "0.1", "0.3", "1"} and result["au_pro"] is None
    whole = [
        np.asarray(Image.fromarray(m.astype(np.float32)).resize((80, 80), Image.Resampling.BILINEAR)) for m in maps
    ]
    defects = [load_defects(s, run.category) for s in test]
    for kind, figures in result["au_spro_by_type"].items():
        keep = [i for i, s in enumerate(test) if s.type in ("good", kind)]
        for limit, value in figures.items():
            assert value == pytest.approx(
                au_spro([whole[i] for i in keep], [defects[i] for i in keep], float(limit)), abs=2e-3
            )
    for limit, value in result["au_spro"].items():
        assert value == pytest.approx(au_spro(whole, defects, float(limit)), abs=2e-3)
        assert result["au_spro_mean"][limit] == pytest.approx(
            np.mean([f[limit] for f in result["au_spro_by_type"].values()])
        )
    assert len(result["au_spro_by_type"]) == 2 and result["pixel_ap"] == pytest.approx(
        pixel_auroc_ap(maps, load_masks(test, 48))[1], abs=2e-3
    )
    low, high = result["image_auroc_interval"]
    assert low <= result["image_auroc"] <= high and 0 < result["image_ap"] <= 1 and 0 < result["image_f1_max"] <= 1
    table = pipeline.result_table(result)
    assert (
        table.loc["GRAD", "sPRO@0.05"] == pytest.approx(100 * result["au_spro_mean"]["0.05"])
        and "AU-PRO" not in table
        and table["sPRO@0.05"].notna().sum() == 1
    )


def test_tiff_maps_of_a_run_have_the_size_of_its_pictures(run):
    assert not (run.folder / "anomaly_maps").exists()
    assert pipeline.evaluate_stage(run, tiff=True)["skipped"]
    paths, maps = (
        sorted((run.folder / "anomaly_maps" / "trays" / "test").glob("*/*.tiff")),
        read_array(run.folder / "maps.npy"),
    )
    assert {(p.parent.name, p.stem) for p in paths} == {(s.type, s.path.stem) for s in run.category.test} and len(
        paths
    ) == 16
    for sample, m in zip(run.category.test, maps):
        with Image.open(run.folder / "anomaly_maps/trays/test" / sample.type / f"{sample.path.stem}.tiff") as im:
            assert im.size == (80, 80) and np.array_equal(np.asarray(im), resize_map(m, (80, 80)))


def test_a_run_that_is_not_evaluated_has_no_tiff_maps(run):
    other = pipeline.open_run(
        run.category.root.parent, "trays", runs=run.folder / "elsewhere", overrides=TINY, device="cpu", progress=False
    )
    with pytest.raises(FileNotFoundError, match="run the evaluate stage"):
        pipeline.write_tiffs(other)


def test_mvtec_ad_has_au_pro_and_no_ground_truth_has_nothing(tmp_path):
    for i, place in enumerate(["train/good"] * 4 + ["test/good"] * 3 + ["test/broken"] * 3):
        for folder, name, shape in [(place, f"{i:03d}.png", (50, 60, 3))] + [
            ("ground_truth/broken", f"{i:03d}_mask.png", (50, 60))
        ] * place.endswith("broken"):
            (tmp_path / "cup" / folder).mkdir(parents=True, exist_ok=True)
            picture = (
                rng(i).integers(0, 256, shape).astype(np.uint8)
                if len(shape) == 3
                else 255 * (rng(i).random(shape) < 0.01).astype(np.uint8)
            )
            Image.fromarray(picture).save(tmp_path / "cup" / folder / name)
    opened = lambda: pipeline.open_run(
        tmp_path, "cup", runs=tmp_path / "runs", overrides=TINY, device="cpu", progress=False
    )
    maps = rng().normal(size=(6, 48, 48)).astype(np.float32)
    figures, masks = pipeline.pixel_figures(opened(), maps), load_masks(opened().category.test, 48)
    assert (
        figures["au_pro"] == au_pro(maps, masks)
        and 0 < figures["au_pro"] < 1
        and figures["pixel_auroc"] == same(roc_auc_score(masks.ravel(), maps.ravel()))
    )
    assert np.isnan(list(figures["au_spro"].values())).all() and figures["au_spro_by_type"] == {}
    for path in (tmp_path / "cup/ground_truth/broken").iterdir():
        path.unlink()
    (tmp_path / "cup/ground_truth/broken").rmdir()
    (tmp_path / "cup/ground_truth").rmdir()
    figures = pipeline.pixel_figures(opened(), maps)
    assert np.isnan(
        [figures["pixel_auroc"], figures["pixel_ap"], figures["au_pro"], *figures["au_spro"].values()]
    ).all()


def test_the_size_of_a_picture_is_that_of_the_picture_upright(tmp_path):
    for orientation, want in ((1, (40, 60)), (6, (60, 40)), (3, (40, 60))):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
        assert upright_shape(tmp_path / "a.jpg") == want


def test_the_evaluation_notebook_offers_every_metric():
    for name in (
        "au_pro",
        "au_spro",
        "auroc_interval",
        "average_precision",
        "f1_max",
        "pixel_auroc_ap",
        "write_tiff_maps",
    ):
        assert name in evaluation.__all__ and callable(getattr(evaluation, name))
