"""Choosing without the test set.

Held-out pictures stay out, masks say what has changed, and the criterion ranks what can be ranked.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import uniform_filter

from grad_nb.contrastive import is_grey
from grad_nb.datasets.readers import DataError
from grad_nb.datasets.trays import draw_tray
from grad_nb.detector import Detector
from grad_nb.study.quality import distance_ratio
from grad_nb.study.selection import (
    PSEUDO,
    Pseudo,
    SelectionConfig,
    changed,
    criterion,
    map_criterion,
    pseudo_anomalies,
    pseudo_sets,
    selection_split,
)


@pytest.fixture(scope="module")
def trays():
    return np.stack([draw_tray(np.random.default_rng([11, i]), 64)[0] for i in range(24)])


FEW = SelectionConfig(per_kind=5)


# held-out pictures


@settings(max_examples=40, deadline=None)
@given(st.integers(6, 60), st.integers(0, 2**31), st.floats(0.05, 0.6), st.integers(1, 4))
def test_no_held_out_picture_is_among_those_to_train_on(n, seed, share, copies):
    pictures = np.zeros((n, 34, 34, 3), np.uint8)
    pictures[:, 0, 0, 0] = np.arange(n) // copies  # `copies` equal pictures each
    try:
        train, held = selection_split(pictures, seed, SelectionConfig(share=share))
    except DataError as e:
        assert "normal pictures" in str(e)
        return
    assert not {pictures[i].tobytes() for i in train} & {pictures[i].tobytes() for i in held} and not set(train) & set(
        held
    )
    assert len(held) >= 2 and len(train) >= 4 and list(train) == sorted(train) and list(held) == sorted(held)
    if copies == 1:
        assert len(train) + len(held) == n and abs(len(held) - share * n) <= 1


def test_split_depends_on_the_seed_alone(trays):
    first, other = (
        selection_split(trays, 0, SelectionConfig(share=0.4)),
        selection_split(trays, 1, SelectionConfig(share=0.4)),
    )
    assert all((a == b).all() for a, b in zip(first, selection_split(trays[::-1], 0, SelectionConfig(share=0.4))))
    assert not np.array_equal(first[1], other[1])


@pytest.mark.parametrize(
    "wrong", [dict(share=0), dict(share=1), dict(per_kind=0), dict(visible=0), dict(tries=0), dict(smallest=1)]
)
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError):
        SelectionConfig(**wrong)


# pseudo-anomalies


@pytest.mark.parametrize("kind", PSEUDO)
@pytest.mark.parametrize("side", [(34, 34), (64, 64), (48, 80)])
@pytest.mark.parametrize("channels", [1, 3])
def test_masks_mark_what_has_changed_and_nothing_else(kind, side, channels):
    rng = np.random.default_rng(3)
    normals = rng.integers(60, 200, (5, *side, channels)).astype(np.uint8).repeat(3 // channels, -1)
    made = pseudo_anomalies(normals, kind, 0, FEW)
    assert is_grey(made.pictures) == (channels == 1), "a grey camera shows no colour"
    assert made.pictures.shape == (5, *side, 3) and made.pictures.dtype == np.uint8 and made.masks.dtype == bool
    for picture, mask, i in zip(made.pictures, made.masks, made.sources):
        before = normals[i]
        assert mask.any() and (picture != before).any(-1)[mask].all(), "what is marked has changed"
        mean_change = np.abs(uniform_filter(picture.astype(float) - before, (3, 3, 0))).max(-1)
        outside = (picture != before).any(-1) & ~mask
        assert not outside.any() or mean_change[outside].max() < 8 + 1e-3, "what is not marked has not changed visibly"
        assert (mean_change[mask] >= 8 - 1e-3).all() and mask.mean() < 0.6


@pytest.mark.parametrize("kind", PSEUDO)
def test_same_seed_same_pictures_another_seed_others(trays, kind):
    a, b, c = (pseudo_anomalies(trays, kind, seed, FEW) for seed in (4, 4, 5))
    assert (
        np.array_equal(a.pictures, b.pictures)
        and np.array_equal(a.masks, b.masks)
        and not np.array_equal(a.pictures, c.pictures)
    )


def test_kinds_do_not_share_random_numbers_and_the_sources_stay_as_they_are(trays):
    before = trays.copy()
    alone, together = pseudo_anomalies(trays, "blob", 0, FEW), pseudo_sets(trays, 0, FEW)
    assert np.array_equal(alone.pictures, together["blob"].pictures) and np.array_equal(before, trays)
    assert set(together) == set(PSEUDO)


def test_sources_go_round_all_held_out_pictures(trays):
    assert list(pseudo_anomalies(trays[:3], "scar", 0, SelectionConfig(per_kind=7)).sources) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("kind", PSEUDO)
def test_shapes_are_of_their_kind(trays, kind):
    share = pseudo_anomalies(trays, kind, 1, SelectionConfig(per_kind=40)).masks.mean((1, 2))
    low, high = {"cut_paste": (0.01, 0.1), "scar": (0.001, 0.03), "blob": (0.01, 0.12), "part_swap": (0.03, 0.35)}[kind]
    assert low < np.median(share) < high


def test_a_part_swap_within_a_picture_keeps_its_colours_elsewhere():
    picture = np.full((64, 64, 3), 100, np.uint8)
    picture[:16, :16] = 200
    rng = np.random.default_rng(0)
    for _ in range(20):
        made = PSEUDO["part_swap"](picture, picture, rng)
        assert made.min() >= 100 and made.max() <= 200, "blocks are moved, not repainted"


def test_uniform_pictures_and_unknown_kinds_are_named():
    with pytest.raises(ValueError, match="too uniform"):
        pseudo_anomalies(np.full((3, 40, 40, 3), 9, np.uint8), "part_swap", 0, SelectionConfig(tries=3))
    with pytest.raises(ValueError, match="no pseudo-anomaly 'rust'; there are cut_paste"):
        pseudo_anomalies(np.zeros((3, 40, 40, 3), np.uint8), "rust", 0)


def test_changed_ignores_weak_noise_and_sees_a_weak_patch():
    rng = np.random.default_rng(0)
    before = rng.integers(50, 200, (64, 64, 3)).astype(np.uint8)
    noise = np.clip(before + rng.normal(0, 3, before.shape), 0, 255).astype(np.uint8)
    assert changed(before, noise).mean() < 0.001
    patch = before.copy()
    patch[10:20, 10:20] += 12
    assert changed(before, patch)[11:19, 11:19].all() and changed(before, patch).sum() <= 100


# criterion


def test_contrastive_pictures_count_for_the_image_figure_only(trays):
    made = pseudo_sets(trays[:6], 0, FEW, kinds=("scar",), contrastive=trays[6:20])
    assert made["contrastive"].masks is None and len(made["contrastive"].pictures) == 5
    found = criterion([Detector(0.1)], [64], trays[:6], made)
    assert (
        set(found["by_kind"]["contrastive"]) == {"image_auroc"}
        and found["pixel_auroc"] == found["by_kind"]["scar"]["pixel_auroc"]
    )
    assert found["image_auroc"] == pytest.approx(np.mean([f["image_auroc"] for f in found["by_kind"].values()]))
    assert found["normals"] == 6 and found["pseudo"] == {"scar": 5, "contrastive": 5}
    with pytest.raises(ValueError, match="do not fit"):
        pseudo_sets(trays, 0, FEW, contrastive=np.zeros((2, 48, 48, 3), np.uint8))


def test_without_masks_the_image_figure_is_the_criterion(trays):
    found = criterion([Detector(0.1)], [64], trays[:4], {"contrastive": Pseudo(trays[4:9], None)})
    assert found["criterion"] == found["image_auroc"] and np.isnan(found["pixel_auroc"])


def test_a_perfect_an_ignorant_and_an_inverted_detector():
    rng = np.random.default_rng(0)
    masks = {k: rng.random((8, 12, 12)) < 0.2 for k in "ab"}
    calm = (np.zeros(6), np.zeros((6, 12, 12), np.float32))
    see = lambda sign: map_criterion(
        calm, {k: (sign * np.ones(8), sign * m.astype(np.float32)) for k, m in masks.items()}, masks
    )["criterion"]
    assert see(1) == 1 and see(0) == 0.5 and see(-1) < 0.1
    with pytest.raises(ValueError, match="at least one"):
        map_criterion(calm, {}, {})


def test_every_kind_weighs_the_same_however_many_pictures_it_has():
    calm = (np.zeros(4), np.zeros((4, 6, 6), np.float32))
    seen, missed = (np.ones(50), np.ones((50, 6, 6), np.float32)), (-np.ones(2), -np.ones((2, 6, 6), np.float32))
    assert map_criterion(calm, {"a": seen, "b": missed}, {"a": None, "b": None})["image_auroc"] == 0.5


def test_a_glow_on_normal_pictures_costs_pixel_figures():
    mask = np.zeros((5, 10, 10), bool)
    mask[:, 2:5, 2:5] = True
    wrong, calm, glowing = mask.astype(np.float32), np.zeros((5, 10, 10), np.float32), np.zeros((5, 10, 10), np.float32)
    glowing[:, 8:] = 2
    figures = [
        map_criterion((m.max((1, 2)), m), {"a": (wrong.max((1, 2)), wrong)}, {"a": mask}) for m in (calm, glowing)
    ]
    assert figures[0]["pixel_ap"] == 1 > 0.5 > figures[1]["pixel_ap"] and figures[1]["image_auroc"] == 0


def test_several_detectors_are_fused(trays):
    made = pseudo_sets(trays[:6], 0, FEW, kinds=("cut_paste",))
    nets = [Detector(0.1), Detector(0.1)]
    both = criterion(nets, [64, 48], trays[:6], made)
    assert 0 <= both["criterion"] <= 1 and both != criterion(nets[:1], [64], trays[:6], made)


def test_pictures_with_a_blank_background_have_no_unit_of_distance():
    blank = np.full((6, 32, 32, 3), 255, np.uint8)
    assert np.isnan(distance_ratio(blank[:4], blank[4:], blank[:4], (5,))[5])
