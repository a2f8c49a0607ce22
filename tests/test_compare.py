"What patches give away: two questions to training pictures."

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from grad_nb import contrastive
from grad_nb.config import DetectorConfig, GeneratorConfig
from grad_nb.contrastive import draw_from_real, generate, told_apart
from grad_nb.datasets.compare import patch_vectors, position_auroc, two_sample_auroc
from grad_nb.datasets.keys import draw_key
from grad_nb.datasets.trays import draw_tray
from grad_nb.patchdiff import new_patchdiff
from grad_nb.training import settled

TINY = GeneratorConfig(steps=2, size=16, width=4, batch=2, n_samples=10, sample_steps=8, sample_batch=5, bf16=False)


@pytest.fixture(scope="module")
def trays():
    return np.stack([draw_tray(np.random.default_rng([3, 0, i]), 64)[0] for i in range(60)])


@pytest.fixture(scope="module")
def keys():
    return np.stack([draw_key(3, 0, i, 64)[0] for i in range(60)])


def test_patch_vectors_are_the_pixels_or_their_means():
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    corners, chosen = np.array([[0, 0], [3, 7]]), np.array([1, 0])
    found = patch_vectors(pictures, 5, corners, chosen)
    assert np.array_equal(found[1], pictures[0, 3:8, 7:12].ravel())
    large = patch_vectors(pictures, 34, corners, chosen)
    assert large.shape == (2, 9 * 9 * 3)
    whole = pictures[0, 3:37, 7:41].astype(float)
    assert large[1].reshape(9, 9, 3)[0, 0] == pytest.approx(whole[:4, :4].mean((0, 1)), abs=1e-3)


def test_equal_sets_cannot_be_told_apart_and_others_can(trays, keys):
    assert two_sample_auroc(trays[:30], trays[30:], 5, 600) == pytest.approx(0.5, abs=0.08)
    assert two_sample_auroc(trays, keys, 5, 600) > 0.95


def test_place_is_told_from_aligned_parts_only(trays, keys):
    assert position_auroc(trays, 20, 800) > position_auroc(keys, 20, 800) + 0.05
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    assert position_auroc(noise, 20, 500) == pytest.approx(0.5, abs=0.08)


def test_a_single_picture_tells_nothing(trays):
    assert np.isnan(two_sample_auroc(trays[:1], trays, 5)) and np.isnan(position_auroc(trays[:1], 20))


def test_a_generator_that_did_not_get_there_is_warned_about(trays, caplog):
    with caplog.at_level(logging.INFO, contrastive.__name__):
        assert told_apart(trays, np.random.default_rng(0).integers(0, 256, trays.shape, dtype=np.uint8), 5) > 0.95
        assert caplog.records[-1].levelno == logging.WARNING and "did not get there" in caplog.text
        caplog.clear()
        told_apart(trays[:30], trays[30:], 5)
    assert [r.levelno for r in caplog.records] == [logging.INFO]


def test_wrong_coordinates_follow_the_training_pictures(trays, keys):
    config = DetectorConfig()
    assert settled(config, trays) == (config, None)
    asked = replace(config, min_position=0.7)
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    new, found = settled(asked, noise)
    assert not new.wrong_coordinates and found < 0.65
    y, x = np.mgrid[:64, :64] - 31.5
    disc = 255 * np.exp(-np.hypot(x, y) / 16)[None, :, :, None]
    aligned = np.broadcast_to(disc.astype(np.uint8), (10, 64, 64, 3)).copy()
    assert settled(asked, aligned)[0].wrong_coordinates
    off = replace(asked, wrong_coordinates=False)
    assert settled(off, aligned) == (off, None)


def test_a_lamp_does_not_tell_the_place():
    noise = np.random.default_rng(0).normal(120, 5, (20, 48, 48, 3))
    lamp = np.linspace(0.6, 1.4, 48)[None, :, None, None] * np.linspace(0.7, 1.3, 48)[None, None, :, None]
    plain, lit = (position_auroc((p + 0.5).astype(np.uint8), 16, 600) for p in (noise, noise * lamp))
    assert abs(plain - 0.5) < 0.08 and lit < 0.75


def test_samples_from_real_pictures_need_them_and_repeat(trays):
    config = replace(TINY, start=0.3)
    model = new_patchdiff(5, config, 0)
    with pytest.raises(ValueError, match="normals"):
        generate(model, config, progress=False)
    normals = np.ascontiguousarray(trays[:, ::4, ::4])
    first, again = (generate(model, config, 3, progress=False, normals=normals) for _ in range(2))
    assert first.shape == (10, 16, 16, 4) and np.array_equal(first, again)
    other = generate(model, config, 4, progress=False, normals=normals)
    assert not np.array_equal(first, other)


def test_the_later_the_start_the_nearer_the_real_picture():
    def exact(x, t):  # the noise in pictures that are all grey 0.5
        from grad_nb.diffusion import alpha_bars

        a = alpha_bars(1000)[t].to(x)[:, None, None, None]
        return (x[:, :3] - a.sqrt() * 0.5) / (1 - a).sqrt()

    normals = torch.full((3, 16, 16, 3), 191, dtype=torch.uint8)
    found, _ = draw_from_real(exact, normals, 6, replace(TINY, start=0.05), torch.Generator().manual_seed(0))
    assert found.shape == (6, 3, 16, 16) and (found - 0.5).abs().max() < 0.05


def test_samples_start_between_the_two_times():
    seen = []

    def listen(x, t):
        seen.append(int(t[0]))
        return torch.zeros_like(x[:, :3])

    normals = torch.full((3, 16, 16, 3), 191, dtype=torch.uint8)
    config = replace(TINY, start=0.3, start_to=0.5, sample_steps=1000)
    for seed in range(5):
        seen.clear()
        draw_from_real(listen, normals, 1, config, torch.Generator().manual_seed(seed))
        assert 299 <= seen[0] <= 499 and seen[-1] == 0


@pytest.mark.parametrize("wrong", [dict(start=0.0), dict(start=1.5), dict(start_to=0.5), dict(light=3), dict(light=-2)])
def test_values_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(TINY, **wrong)


def test_the_paper_stays_the_paper():
    assert (GeneratorConfig().light, GeneratorConfig().start, DetectorConfig().min_position) == (-1, 1.0, 0.0)
