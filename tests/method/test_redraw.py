"Pictures that are real outside of blobs, crops where something has changed, detectors without places."

from dataclasses import replace

import numpy as np
import pytest
import torch

from grad_nb.beyond import blob_masks
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig, preset
from grad_nb.contrastive import beginning, draw_from_real, generate, is_grey, make_contrastive, read_changes
from grad_nb.core.files import read_array
from grad_nb.datasets.compare import PLACE_OF, position_auroc
from grad_nb.patchdiff import new_patchdiff
from grad_nb.patches import ENOUGH, Redrawn, change_sums, draw_batch, draw_crops, most_changed
from grad_nb.training import settled, train_detector

TINY = GeneratorConfig(size=16, width=4, steps=2, batch=4, n_samples=6, sample_steps=5, T=50, start=0.4, redraw=0.3)
SMALL = DetectorConfig(width=0.05, steps=4, pictures=2, patches=8, alpha_1=0.0, alpha_2=0.0, wrong_coordinates=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("share", (0.1, 0.5, 1.0))
def test_masks_have_the_share_that_is_asked_for(share):
    masks = blob_masks(5, 40, share, 6, seeded())
    assert masks.shape == (5, 1, 40, 40) and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert (masks.mean((1, 2, 3)) - share).abs().max() < 0.01
    assert torch.equal(masks, blob_masks(5, 40, share, 6, seeded()))


def test_outside_of_the_blobs_pictures_stay_real():
    normals = torch.from_numpy(pictures(4))
    drawn, real = draw_from_real(lambda x, t: torch.zeros_like(x[:, :3]), normals, 5, TINY, seeded(1))
    same = (drawn == real).all(1).float().mean((1, 2))
    assert (same > 0.6).all() and (same < 1).all()
    everywhere, real = draw_from_real(
        lambda x, t: torch.zeros_like(x[:, :3]), normals, 5, replace(TINY, redraw=1.0), seeded(1)
    )
    assert (everywhere == real).float().mean() < 0.2


def test_a_set_keeps_how_far_it_is_from_real_pictures(tmp_path):
    normals = pictures(5)
    figures, files = make_contrastive(tmp_path, normals, 5, TINY, progress=False)
    made, (change,) = read_array(tmp_path / files[1]), read_changes(tmp_path, [5])
    assert "contrastive/change-05.npy" in files and change.shape == made.shape[:3] == (6, 16, 16)
    real = [np.abs(made[:, None].astype(int) - normals[None]).max(-1)[i] for i in range(6)]
    for i in range(6):
        assert any(np.array_equal(change[i], candidate) for candidate in real[i]), "it is of one of the real pictures"
    make_contrastive(tmp_path, normals, 5, replace(TINY, start=1.0, redraw=1.0), progress=False)
    assert read_changes(tmp_path, [5]) == [], "from noise nothing is known, and nothing old is left"


def test_changes_are_read_from_files_without_a_warning(tmp_path, recwarn):
    make_contrastive(tmp_path, pictures(5), 5, TINY, progress=False)
    assert change_sums(read_changes(tmp_path, [5])[0], 34).shape == (6, 35, 35) and not recwarn.list


@pytest.mark.parametrize("level", (0, 3, 5))
@pytest.mark.parametrize("start", (0.4, 1.0))
@pytest.mark.parametrize("shared", (False, True))
def test_pictures_without_colour_are_drawn_without_colour(tmp_path, level, start, shared):
    config = replace(TINY, start=start, start_to=max(start, 0.7), redraw=0.3 if start < 1 else 1.0, shared=shared)
    normals = pictures(5)
    for name, real in (("grey", normals[..., :1].repeat(3, -1)), ("coloured", normals)):
        _, files = make_contrastive(tmp_path / name, real, level, config, progress=False, levels=[3, 5])
        made = read_array(tmp_path / name / files[int(level > 0)])
        assert made.shape == (6, 16, 16, 3) and is_grey(made) == (name == "grey") and made.std() > 5


def test_one_pixel_of_colour_is_colour():
    grey = pictures(2)[..., :1].repeat(3, -1)
    assert is_grey(grey)
    for channel in range(3):
        other = grey.copy()
        other[1, 5, 7, channel] ^= 1
        assert not is_grey(other)


def test_real_pixels_of_a_grey_picture_stay_what_they_are(tmp_path):
    normals = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    _, files = make_contrastive(tmp_path, normals, 5, TINY, progress=False)
    made, (change,) = read_array(tmp_path / files[1]), read_changes(tmp_path, [5])
    assert np.array_equal(np.abs(made.astype(int) - normals).max(-1), change) and 0.5 < (change == 0).mean() < 1


def test_a_set_is_drawn_again_the_same():
    model = new_patchdiff(5, TINY)
    first, again = (generate(model, TINY, 2, progress=False, normals=pictures(3)) for _ in range(2))
    assert np.array_equal(first, again) and first.shape[-1] == 4


@pytest.mark.parametrize("wrong", [dict(redraw=0.0), dict(redraw=1.2), dict(start=1.0), dict(blobs=0)])
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match="redraw|blobs"):
        replace(TINY, **wrong)
    with pytest.raises(ValueError, match="tries"):
        DetectorConfig(tries=0)


@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_crops_go_where_something_has_changed(flips):
    change = np.zeros((3, 60, 60), np.uint8)
    change[1, 50:54, 3:6] = 255
    sums = change_sums(change, 60)
    turned = torch.tensor(flips)[:, None].bool().expand(2, 1)
    row, column = most_changed(sums, torch.tensor([1]), turned, 34, 300, 40, seeded())
    seen = torch.from_numpy(change[1] > 0)
    for axis, flip in zip((1, 0), flips):
        seen = seen.flip(axis) if flip else seen
    hits = [seen[r : r + 34, c : c + 34].any().item() for r, c in zip(row, column)]
    assert np.mean(hits) > 0.9
    few = most_changed(sums, torch.tensor([1]), turned, 34, 300, 1, seeded())
    assert np.mean([seen[r : r + 34, c : c + 34].any().item() for r, c in few.T]) < 0.3


def test_more_than_enough_change_counts_no_more():
    change = np.full((1, 60, 60), 200, np.uint8)
    change[0, :, :30] = int(2 * ENOUGH)
    row, column = most_changed(
        change_sums(change, 60), torch.tensor([0]), torch.zeros(2, 1).bool(), 34, 400, 4, seeded()
    )
    assert abs(column.float().mean() - 13) < 1.5, "places are drawn evenly"


def test_only_contrastive_crops_are_moved():
    normal, made = pictures(4, 60), pictures(3, 60, 1)
    change = np.zeros((3, 60, 60), np.uint8)
    change[:, :4, :4] = 255
    augmentation = Augmentation(rotation=0.0, jitter_p=0.0)
    config = replace(SMALL, patches=64, tries=16)
    plain = draw_batch(normal, [made], config, augmentation, seeded())
    moved = draw_batch(normal, [Redrawn(made, change_sums(change, 60))], config, augmentation, seeded())
    assert torch.equal(plain.positives, moved.positives)
    corners = draw_crops(made, config, augmentation, 0.0, True, seeded(), change_sums(change, 60)).corners
    assert (corners < 4).all(0).float().mean() > 0.15 > 0.1 > (16 / 27**2)
    once = draw_batch(
        normal, [Redrawn(made, change_sums(change, 60))], replace(config, tries=1), augmentation, seeded()
    )
    assert torch.equal(plain.patches, once.patches)


def test_a_detector_without_coordinates_sees_no_place():
    normal, made = pictures(4, 40), pictures(3, 40, 1)
    detector, _ = train_detector(normal, [made], replace(SMALL, coordinates=False), Augmentation(), progress=False)
    x = torch.randn(2, 5, 40, 40)
    other = torch.cat([x[:, :3], torch.randn(2, 2, 40, 40)], 1)
    assert torch.equal(detector(x), detector(other))
    seeing, _ = train_detector(normal, [made], SMALL, Augmentation(), progress=False)
    assert not torch.equal(seeing(x), seeing(other))


def test_coordinates_follow_the_training_pictures():
    noise = pictures(20, 64)
    asked = DetectorConfig(min_position=0.7)
    new, found = settled(asked, noise)
    assert not new.wrong_coordinates and not new.coordinates
    assert found == pytest.approx(position_auroc(noise, 64 // PLACE_OF))
    blind, found = settled(DetectorConfig(coordinates=False), noise)
    assert found is None and not blind.wrong_coordinates, "with wrong ones it would be the same patch"


def test_parts_of_a_known_place_begin_with_noise(tmp_path):
    y, x = np.mgrid[:24, :24] - 11.5
    disc = 255 * np.exp(-np.hypot(x, y) / 6)[None, :, :, None]
    same = np.broadcast_to(disc.astype(np.uint8), (16, 24, 24, 3)).copy()
    config = replace(TINY, size=24, start_below=0.85)
    found, begun = beginning(config, same)
    assert (found.start, found.start_to, found.redraw) == (1.0, 1.0, 1.0) and begun["position_auroc"] > 0.85
    figures, files = make_contrastive(tmp_path, same, 5, config, progress=False)
    assert figures["start"] == 1.0 and read_changes(tmp_path, [5]) == []
    noise = pictures(16, 24)
    found, begun = beginning(config, noise)
    assert found == config and begun["start"] == config.start and begun["position_auroc"] < 0.75
    assert beginning(replace(config, start_below=1.0), same) == (replace(config, start_below=1.0), {})
    with pytest.raises(ValueError, match="start_below"):
        replace(config, start_below=0.0)


def test_the_presets_say_when_pictures_begin_with_real_ones():
    assert (preset("paper").generator.start, preset("paper").detector.tries) == (1.0, 1)
    demo = preset("demo")
    assert demo.generator.start < 1 and demo.generator.start_below == demo.detector.min_position
