"Tries to break the second data set that draws itself."

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from grad_nb.datasets.keys import (
    KINDS,
    TEETH,
    draw_key,
    key_distance,
    key_mask,
    make_keys,
    render_key,
    sample_key,
    spoil_key,
)
from grad_nb.datasets.readers import check_category, load_masks, read_category

SMALL = dict(size=64, train=5, good=3, defective=8, progress=False)


def files(folder):
    "Name and bytes of every file, in short."
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(folder).rglob("*.png")
    }


@pytest.mark.parametrize("seed", range(40))
def test_a_normal_key_lies_in_the_picture_and_is_whole(seed):
    scene = sample_key(np.random.default_rng(seed))
    on = key_distance(scene, 96) <= 0
    assert 0.04 < on.mean() < 0.2
    assert not np.concatenate([on[0], on[-1], on[:, 0], on[:, -1]]).any()
    assert not key_mask(scene, 96).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_is_small_and_changes_nothing_elsewhere(kind):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        twin = sample_key(rng)
        scene = spoil_key(twin, kind, rng)
        mask = key_mask(scene)
        assert 4 <= mask.sum() < 0.05 * mask.size
        differs = np.abs(render_key(scene).astype(int) - render_key(twin)).max(-1) > 0
        assert differs[mask].mean() > 0.6
        rows, columns = np.nonzero(mask)
        assert not differs[: max(rows.min() - 6, 0)].any() and not differs[:, : max(columns.min() - 6, 0)].any()


def test_every_tooth_can_be_missing():
    rng = np.random.default_rng(0)
    scene = sample_key(rng)
    assert {spoil_key(scene, "missing_tooth", rng).missing for _ in range(200)} == set(range(len(TEETH)))


def test_an_unknown_defect_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="missing_tooth"):
        spoil_key(sample_key(rng), "rust", rng)


def test_equal_seeds_give_equal_pictures_and_counts_do_not_matter(tmp_path):
    first = make_keys(tmp_path / "a", **SMALL)
    more = make_keys(tmp_path / "b", **(SMALL | dict(train=7)))
    assert files(first).items() <= files(more).items()
    other = make_keys(tmp_path / "c", seed=1, **SMALL)
    assert not set(files(first).values()) & {v for k, v in files(other).items() if "ground_truth" not in k}
    assert np.array_equal(draw_key(0, 0, 0, 64)[0], draw_key(0, 0, 0, 64)[0])


def test_the_layout_is_that_of_mvtec_ad(tmp_path):
    found = read_category(make_keys(tmp_path, **SMALL))
    assert found.layout == "mvtec_ad" and found.has_masks and len(found.train) == 5
    assert sorted(s.type for s in found.test) == sorted([*KINDS, *KINDS, "good", "good", "good"])
    masks = load_masks(found.test, 64)
    assert [bool(m.any()) for m in masks] == [s.type != "good" for s in found.test]
    assert not list(check_category(found, False))


def test_keys_are_found_again_and_nothing_else_is_overwritten(tmp_path):
    folder = make_keys(tmp_path, **SMALL)
    before = files(folder)
    assert make_keys(tmp_path, **SMALL) == folder and files(folder) == before
    with pytest.raises(ValueError, match="other root|another root"):
        make_keys(tmp_path, seed=2, **SMALL)
    (folder / "keys.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="another root"):
        make_keys(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]


@pytest.mark.parametrize("wrong", [dict(size=20), dict(train=0), dict(seed=-1), dict(good=-1)])
def test_impossible_numbers_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="cannot draw keys"):
        make_keys(tmp_path, **(SMALL | wrong))
    assert not list(tmp_path.iterdir())
