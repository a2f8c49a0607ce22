"""Scores and figures against brute force, and what must not matter does not."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import correlate1d
from shared import pictures, rng

from grad_nb.config import EvalConfig, Level, Preset
from grad_nb.coords import with_coords
from grad_nb.datasets.readers import resize_pictures
from grad_nb.detector import Detector, map_side
from grad_nb.evaluation import (
    MapStats,
    auroc_by_type,
    blur_matrix,
    fuse,
    gaussian_baseline,
    gaussian_kernel,
    image_auroc,
    image_scores,
    input_size_of,
    mean_map,
    nearest_baseline,
    pixel_auroc,
    pixel_map,
    score_maps,
    summary,
    trivial,
)


def small_detector(seed=0, width=0.1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(width)


# --- AUROC ----------------------------------------------------------------------------------------------------------


def pairs(scores, labels):
    "The AUROC by its meaning: how often an anomaly outscores a normal, a tie counting one half."
    up = [s for s, y in zip(scores, labels) if y]
    down = [s for s, y in zip(scores, labels) if not y]
    if not up or not down:
        return float("nan")
    return sum((a > b) + 0.5 * (a == b) for a in up for b in down) / (len(up) * len(down))


TIED = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)
FINE = st.lists(st.tuples(st.floats(-1e6, 1e6), st.booleans()), min_size=1, max_size=30)


@settings(deadline=None, max_examples=100)
@given(TIED | FINE)
def test_the_auroc_counts_pairs(rows):
    scores, labels = [s for s, _ in rows], [y for _, y in rows]
    assert image_auroc(scores, labels) == pytest.approx(pairs(scores, labels), abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_the_pixel_auroc_counts_pairs_over_all_pictures(seed):
    maps, masks = rng(seed).integers(0, 4, (2, 4, 5)).astype(np.float32), rng(seed + 1).random((2, 4, 5)) < 0.2
    assert pixel_auroc(maps, masks) == pytest.approx(pairs(maps.ravel(), masks.ravel()), abs=1e-12, nan_ok=True)


@settings(deadline=None, max_examples=40)
@given(TIED, st.floats(0.01, 100), st.floats(-100, 100))
def test_the_auroc_depends_on_the_order_alone_and_turns_with_the_sign(rows, a, b):
    scores, labels = np.array([s for s, _ in rows], float), [y for _, y in rows]
    whole = image_auroc(scores, labels)
    assert image_auroc(a * scores + b, labels) == pytest.approx(whole, abs=1e-12, nan_ok=True)
    assert image_auroc(-scores, labels) == pytest.approx(1 - whole, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_the_auroc_of_one_class_is_nan(labels):
    assert np.isnan(image_auroc([1, 2, 3], labels))
    assert np.isnan(pixel_auroc(np.zeros((1, 2, 2)), np.full((1, 2, 2), bool(labels[0]))))


def test_raw_scores_keep_an_order_that_probabilities_in_float32_lose():
    scores, labels = np.array([20.0, 30.0, 40.0, 50.0]), [0, 0, 1, 1]
    assert image_auroc(scores, labels) == 1.0 and image_auroc(scores * 1e30, labels) == 1.0
    saturated = 1 / (1 + np.exp(-scores.astype(np.float32)))
    assert image_auroc(saturated, labels) == 0.5


def test_scores_of_float32_that_differ_in_the_last_bit_are_told_apart():
    low = np.float32(1000.0)
    assert image_auroc(np.array([low, np.nextafter(low, np.float32(2000))]), [0, 1]) == 1.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="not finite"):
        image_auroc([0, bad, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="not finite"):
        pixel_auroc(np.array([[[0, bad]]]), np.array([[[0, 1]]]))


def test_maps_and_masks_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        pixel_auroc(np.zeros((1, 2, 3)), np.zeros((1, 3, 2)))
    with pytest.raises(ValueError):
        image_auroc([1, 2, 3], [0, 1])


def test_masks_of_0_and_255_are_read_as_they_are_meant():
    maps = rng().normal(size=(2, 6, 6))
    mask = rng(1).random((2, 6, 6)) < 0.3
    assert pixel_auroc(maps, mask.astype(np.uint8) * 255) == pixel_auroc(maps, mask)


def test_each_type_is_compared_with_the_normals_alone():
    scores, types = [0, 1, 2, 5, 6, 1.5], ["good", "good", "good", "a", "a", "b"]
    assert auroc_by_type(scores, types) == {"a": 1.0, "b": pytest.approx(2 / 3)}
    other = [0, 1, 2, 5, 6, -99]  # another type's scores change nothing
    assert auroc_by_type(other, types)["a"] == 1.0 and auroc_by_type(other, types)["b"] == 0
    figures = summary(scores, types)
    assert figures["image_auroc"] == pytest.approx(pairs(scores, [t != "good" for t in types]))
    assert figures["image_auroc_mean"] == pytest.approx((1 + 2 / 3) / 2) != figures["image_auroc"]
    assert np.isnan(summary([1, 2], ["good", "good"])["image_auroc"]) and np.isnan(
        summary([1, 2], ["good", "good"])["image_auroc_mean"]
    )
    assert np.isnan(auroc_by_type([1, 2], ["a", "a"])["a"])


# --- maps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [16, 15, 3, 1])
def test_the_blur_is_a_convolution_with_replicated_border(taps):
    x = torch.from_numpy(rng().normal(size=(2, 40, 40)))
    kernel, B = gaussian_kernel(taps, 2.75), blur_matrix(40, taps, 2.75)
    before, after = taps // 2, taps - 1 - taps // 2
    padded = F.pad(x[:, None], (before, after, before, after), mode="replicate")
    by_torch = F.conv2d(padded, (kernel[:, None] * kernel).view(1, 1, taps, taps))[:, 0]
    assert torch.allclose(B @ x @ B.T, by_torch, atol=1e-12)
    by_scipy = correlate1d(correlate1d(x.numpy(), kernel.numpy(), 1, mode="nearest"), kernel.numpy(), 2, mode="nearest")
    assert np.allclose(B @ x @ B.T, by_scipy, atol=1e-12)


def test_the_kernel_is_the_sampled_gaussian():
    kernel = gaussian_kernel(16, 2.75)
    assert len(kernel) == 16 and float(kernel.sum()) == pytest.approx(1) and torch.allclose(kernel, kernel.flip(0))
    assert float(kernel[8] / kernel[10]) == pytest.approx(np.exp((2.5**2 - 0.5**2) / (2 * 2.75**2)))


def test_a_pixel_map_with_blur_is_the_blur_of_the_one_without():
    S = rng().normal(size=(2, 8, 8)).astype(np.float32)
    B = blur_matrix(64).float()
    assert torch.allclose(pixel_map(S, 64), B @ pixel_map(S, 64, blur=False) @ B.T, atol=1e-5)
    other = EvalConfig(blur_kernel=7, blur_sigma=1.0)
    assert not torch.allclose(pixel_map(S, 64, config=other), pixel_map(S, 64), atol=1e-2)


def test_the_input_s_size_is_found_or_refused():
    assert [input_size_of(map_side(256 // d), 256) for d in (1, 2, 4)] == [256, 128, 64]
    with pytest.raises(ValueError, match="7 cells"):
        input_size_of(7, 256)


def test_maps_of_one_picture_do_not_depend_on_the_others():
    detector, test = small_detector(), pictures(7, 50)
    whole = score_maps(detector, test, 50, batch=7)
    for batch in (1, 2, 3, 16):
        assert np.allclose(score_maps(detector, test, 50, batch=batch), whole, atol=1e-4, rtol=1e-4)
    assert whole.shape == (7, 5, 5) and whole.dtype == np.float32 and whole.std() > 1e-3
    assert np.allclose(score_maps(detector, test[::-1], 50), whole[::-1], atol=1e-4)


def test_a_map_is_the_detector_on_the_picture_with_its_coordinates():
    detector, test = small_detector().double(), pictures(2, 42)
    x = torch.from_numpy(test).permute(0, 3, 1, 2).double() / 127.5 - 1
    with torch.inference_mode():
        by_hand = detector(with_coords(x))[:, 0]
    assert np.allclose(score_maps(detector.float(), test, 42), by_hand, atol=1e-4)


def test_no_pictures_give_no_maps():
    assert score_maps(small_detector(), pictures(0, 42), 42).shape == (0, 3, 3)


def test_a_detector_can_be_trained_after_it_has_scored():
    detector = small_detector()
    score_maps(detector, pictures(1, 34), 34)
    detector(torch.zeros(1, 5, 34, 34)).sum().backward()


def test_resizing_is_that_of_pillow_and_keeps_what_fits():
    test = pictures(3, 64)
    assert resize_pictures(test, 64) is test
    made = resize_pictures(test, 24, batch=2)
    theirs = np.stack([np.asarray(Image.fromarray(p).resize((24, 24), Image.Resampling.BILINEAR)) for p in test])
    assert made.dtype == np.uint8 and np.abs(made.astype(int) - theirs).max() <= 1


# --- one detector, several detectors --------------------------------------------------------------------------------


def test_one_detector_s_score_is_the_maximum_of_its_raw_map():
    maps = rng().normal(0, 9, (4, 8, 8)).astype(np.float32)
    scores, fused = fuse([maps], [64], [], 64)
    assert (
        (scores == maps.reshape(4, -1).max(1)).all()
        and scores.dtype == np.float64
        and (image_scores(maps) == scores).all()
    )
    assert (
        fused.shape == (4, 64, 64) and fused.dtype == np.float32 and np.allclose(fused, pixel_map(maps, 64), atol=1e-5)
    )


LEVELS = [rng(1).normal(size=(4, map_side(s), map_side(s))).astype(np.float32) for s in (128, 64)]


@settings(deadline=None, max_examples=25)
@given(st.floats(0.01, 100), st.floats(-100, 100), st.integers(0, 1))
def test_the_scale_of_one_level_s_logits_does_not_matter(a, b, which):
    held_out = [rng(2 + i).normal(size=(3, *m.shape[1:])).astype(np.float64) for i, m in enumerate(LEVELS)]
    change = lambda arrays: [a * m.astype(np.float64) + b if i == which else m for i, m in enumerate(arrays)]
    once = fuse(LEVELS, [128, 64], [MapStats.of(m) for m in held_out], 64)
    again = fuse(change(LEVELS), [128, 64], [MapStats.of(m) for m in change(held_out)], 64)
    assert np.allclose(once[0], again[0], atol=1e-3) and np.allclose(once[1], again[1], atol=1e-3)


def test_the_statistics_matter_when_levels_are_fused():
    plain, shifted = [MapStats(0, 1)] * 2, [MapStats(0, 1), MapStats(0, 5)]
    assert not np.allclose(fuse(LEVELS, [128, 64], plain, 64)[1], fuse(LEVELS, [128, 64], shifted, 64)[1], atol=0.01)


def test_fused_maps_are_the_mean_of_the_standardised_ones():
    stats = [MapStats(0.5, 2.0), MapStats(-1.0, 3.0)]
    scores, fused = fuse(LEVELS, [128, 64], stats, 64)
    parts = lambda blur: (
        sum(pixel_map((m - s.mean) / s.std, 64, d, blur) for m, s, d in zip(LEVELS, stats, (128, 64))).numpy() / 2
    )
    assert np.allclose(fused, parts(True), atol=1e-5) and np.allclose(scores, parts(False).max((1, 2)), atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
def test_positive_maps_hold_what_speaks_for_an_anomaly_and_scores_stay(levels):
    maps, sides = LEVELS[:levels], (128, 64)[:levels]
    stats = [MapStats(0.5, 2.0), MapStats(-1.0, 3.0)][:levels]
    scale = [s.std if levels > 1 else 1.0 for s in stats]
    config = EvalConfig(positive_maps=True)
    scores, fused = fuse(maps, sides, stats, 64, config)
    wanted = sum(pixel_map(np.maximum(m, 0) / s, 64, d) for m, s, d in zip(maps, scale, sides)).numpy() / levels
    assert np.allclose(fused, wanted, atol=1e-5) and (scores == fuse(maps, sides, stats, 64)[0]).all()
    doubtless = [np.where(m < 0, 9 * m, m) for m in maps]
    assert np.array_equal(fused, fuse(doubtless, sides, stats, 64, config)[1])
    assert not fuse([-np.abs(m) for m in maps], sides, stats, 64, config)[1].any()


def test_statistics_need_pictures_and_never_divide_by_zero():
    with pytest.raises(ValueError, match="held-out"):
        MapStats.of(np.empty((0, 4, 4)))
    assert MapStats.of(np.full((2, 4, 4), 3.0)) == MapStats(3.0, 1e-6)
    maps = rng().normal(5, 3, (4, 6, 6))
    assert MapStats.of(maps) == MapStats(pytest.approx(maps.mean()), pytest.approx(maps.std()))


# --- trivial baselines ----------------------------------------------------------------------------------------------


def test_the_gaussian_baseline_measures_the_worst_pixel_in_deviations():
    train = np.zeros((4, 2, 2, 3), np.uint8)
    train[:, 0, 0] = np.array([90, 110, 90, 110])[:, None]  # mean 100, deviation 10
    test = train[:1].repeat(3, 0)
    test[0, 0, 0], test[1, 0, 0] = 100, 130
    test[2, 0, 0], test[2, 1, 1, 2] = 100, 7  # where nothing ever varied, the floor of one grey level
    assert np.allclose(gaussian_baseline(train, test), [0, 3, 7])


def test_the_nearest_baseline_measures_the_distance_to_the_nearest_normal():
    train = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (0, 100, 250)])
    test = np.stack([np.full((2, 2, 3), v, np.uint8) for v in (100, 110, 200)])
    test[1, 0, 0, 0] = 100
    assert np.allclose(nearest_baseline(train, test), [0, np.sqrt(11 / 12) * 10, 50])


def test_the_baselines_find_what_is_plain_to_see():
    train, good = (np.clip(rng(s).normal(128, 3, (20, 64, 64, 3)), 0, 255).astype(np.uint8) for s in (0, 1))
    bad = good[:8].copy()
    bad[:, 20:40, 20:40] = 255
    figures = trivial(train, np.concatenate([good, bad]), ["good"] * 20 + ["hole"] * 8, 32)
    assert all(
        figures[k]["image_auroc"] == 1.0 and figures[k]["by_type"] == {"hole": 1.0} for k in ("gaussian", "nearest")
    )


def test_the_baselines_see_nothing_where_there_is_nothing():
    same = np.full((6, 64, 64, 3), 50, np.uint8)
    figures = trivial(same, same, ["good"] * 3 + ["none"] * 3, 32)
    assert figures["gaussian"]["image_auroc"] == figures["nearest"]["image_auroc"] == 0.5


@pytest.mark.parametrize(
    "wrong", [dict(blur_sigma=0.0), dict(blur_sigma=float("nan")), dict(holdout=1.0), dict(holdout=-0.1)]
)
def test_settings_that_give_no_map_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvalConfig(**wrong)


def test_two_detectors_of_a_preset_have_levels_of_their_own():
    with pytest.raises(ValueError, match="the same level: 34, 34"):
        Preset("mine", levels_ad=(Level(34, 64, (5,)), Level(34, 96, (5,))))


def test_the_mean_of_maps_is_taken_cell_by_cell_and_needs_one():
    one = torch.tensor([1.0, 5.0])
    assert mean_map([one]).equal(one) and mean_map([one, one.flip(0), one]).allclose(torch.tensor([7.0, 11.0]) / 3)
    with pytest.raises(ValueError, match="no maps"):
        mean_map([])
