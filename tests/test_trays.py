"Tries to break the data set that draws itself."

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import distance_transform_edt, label

from grad_nb.datasets import trays
from grad_nb.datasets.readers import check_category, load_defects, load_images, load_mask, read_category
from grad_nb.datasets.trays import (
    DEFECTS,
    LOGICAL,
    PARTS,
    STRUCTURAL,
    defects_config,
    draw_tray,
    drawn_once,
    find_defects,
    make_trays,
    render,
    sample_scene,
    spoil,
)

ANOMALIES = LOGICAL + STRUCTURAL
SMALL = dict(size=64, train=6, validation=3, good=4, logical=8, structural=6, progress=False)
anomaly_and_seed = given(st.sampled_from(ANOMALIES), st.integers(0, 2**32 - 1))


def files(folder):
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in Path(folder).rglob("*")
        if p.is_file()
    }


def twins(anomaly, seed):
    rng = np.random.default_rng(seed)
    return spoil(sample_scene(rng), anomaly, rng)


def near(mask, pixels):
    "Pixels at most so far from a mask: parts have shadows."
    return distance_transform_edt(~mask) <= pixels


def footprint(scene, size, parts):
    "Pixels of the given parts of a scene."
    x, y = trays._grid(size)
    u, v = trays._turn(x - scene.shift[0], y - scene.shift[1], scene.angle)
    return np.any([trays._part_distance(p, u, v) <= 0 for p in parts], axis=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_trays(tmp_path_factory.mktemp("made"), **SMALL)


# ------------------------------------------------------------------ normal pictures
@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_rules_hold_and_all_is_in_the_picture(seed):
    scene = sample_scene(np.random.default_rng(seed))
    assert tuple(p.kind for (p,) in scene.parts) == PARTS and not scene.marks
    assert np.abs(scene.shift).max() <= 0.035 and abs(np.degrees(scene.angle)) <= 4
    x, y = trays._grid(96)
    u, v = trays._turn(x - scene.shift[0], y - scene.shift[1], scene.angle)
    inside = np.any(
        [trays._compartment_distance(c, u, v) <= 0 for c in range(4)], 0
    )  # the rim may touch the edge, a compartment never
    assert not (inside[0].any() or inside[-1].any() or inside[:, 0].any() or inside[:, -1].any())
    for c, (p,) in enumerate(scene.parts):
        shape = trays._part_distance(p, u, v) <= 0
        assert shape.any() and not (shape & (trays._compartment_distance(c, u, v) > 0)).any()
        assert p.cut is None


def test_normal_pictures_have_no_defects_and_differ_a_lot():
    pictures = [draw_tray(np.random.default_rng([7, i]), 64) for i in range(12)]
    assert all(d == [] for _, d in pictures)
    far = [np.abs(a.astype(float) - b).mean() for (a, _), (b, _) in combinations(pictures, 2)]
    assert min(far) > 8  # grey levels; the noise alone gives 3 to 4


def test_parts_use_their_room():
    xy = np.array([[(p.x, p.y) for (p,) in sample_scene(np.random.default_rng([8, i])).parts] for i in range(300)])
    assert (np.ptp(xy, axis=0) > 0.15).all()  # of 0.37 that a compartment is wide and 0.18 that a part takes


def test_every_colour_and_light_stays_within_a_byte():
    bright = [render(sample_scene(np.random.default_rng([9, i])), 64) for i in range(30)]
    assert np.mean([(p == 255).mean() for p in bright]) < 0.01 and np.mean([(p == 0).mean() for p in bright]) < 0.01


def test_same_scene_same_bytes_and_the_noise_is_the_scenes():
    a, b = sample_scene(np.random.default_rng(3)), sample_scene(np.random.default_rng(3))
    assert a == b and np.array_equal(render(a, 64), render(b, 64))
    np.random.seed(0)  # a global seed must not matter, nor be touched
    before = np.random.get_state()[1].copy()
    assert np.array_equal(render(a, 64), render(b, 64)) and np.array_equal(before, np.random.get_state()[1])


def test_a_small_drawing_is_the_large_one_reduced():
    scene = sample_scene(np.random.default_rng(4))
    large = render(scene, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(large - render(scene, 64)).mean() < 5


# ------------------------------------------------------------------ anomalies
@anomaly_and_seed
@settings(max_examples=150, deadline=None)
def test_pictures_differ_only_in_the_masks(anomaly, seed):
    twin, scene = twins(anomaly, seed)
    found, differ = find_defects(twin, scene, 128), np.any(render(twin) != render(scene), -1)
    masks = [m for _, m, _ in found]
    assert all(m.dtype == bool and m.shape == (128, 128) and m.any() for m in masks)
    union = np.any(masks, axis=0)
    if anomaly in ("wrong_kind", "wrong_place"):  # the right part's place may be bare floor now
        gone = [p for a, b in zip(twin.parts, scene.parts) if a != b for p in a]
        assert not (differ & ~near(union | footprint(twin, 128, gone), 5)).any()
    elif anomaly == "missing_part":
        assert not (differ & ~near(union, 3)).any()
    else:
        assert not (differ & ~near(union, 6)).any()
    if anomaly == "missing_part":
        (gone,) = (p for a, b in zip(twin.parts, scene.parts) if a != b for p in a)
        assert differ[footprint(twin, 128, [gone])].mean() > 0.97
    elif anomaly == "double_part":
        (extra,) = set().union(*scene.parts) - set().union(*twin.parts)
        assert differ[footprint(scene, 128, [extra])].mean() > 0.97
    else:
        assert differ[union].mean() > 0.97


@anomaly_and_seed
@settings(max_examples=150, deadline=None)
def test_each_anomaly_is_what_its_name_says(anomaly, seed):
    twin, scene = twins(anomaly, seed)
    assert tuple(p.kind for (p,) in twin.parts) == PARTS and not twin.marks  # a twin is normal
    assert (twin.shift, twin.angle, twin.gain, twin.grain) == (scene.shift, scene.angle, scene.gain, scene.grain)
    counts, kinds = [len(c) for c in scene.parts], [p.kind for c in scene.parts for p in c]
    names = [n for n, _, _ in find_defects(twin, scene, 64)]
    if anomaly == "missing_part":
        assert sorted(counts) == [0, 1, 1, 1] and names == [f"missing_{PARTS[counts.index(0)]}"]
    elif anomaly == "double_part":
        c = counts.index(2)
        first, second = scene.parts[c]
        assert (
            sorted(counts) == [1, 1, 1, 2] and first.kind == second.kind == PARTS[c] and names == [f"double_{PARTS[c]}"]
        )
        reach = trays.RADIUS * (first.scale + second.scale)
        assert np.hypot(first.x - second.x, first.y - second.y) > reach  # even their circles do not touch
    elif anomaly == "wrong_kind":
        assert counts == [1] * 4 and sum(a != b for a, b in zip(kinds, PARTS)) == 1 and names == ["wrong_kind"]
    elif anomaly == "wrong_place":
        assert Counter(kinds) == Counter(PARTS) and sum(a != b for a, b in zip(kinds, PARTS)) == 2
        assert names == ["wrong_place"] * 2
    else:
        assert kinds == list(PARTS) and names == [anomaly]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_a_broken_part_loses_a_third_to_a_half(seed):
    twin, scene = twins("broken_part", seed)
    (c,) = [c for c in range(4) if twin.parts[c] != scene.parts[c]]
    whole, left = (footprint(s, 256, s.parts[c]).sum() for s in (twin, scene))
    assert 0.22 < 1 - left / whole < 0.58  # 0.30 to 0.50 along a straight line; the edge is jagged


@given(st.integers(0, 2**32 - 1), st.sampled_from(["scratch", "stain"]))
@settings(max_examples=60, deadline=None)
def test_marks_lie_on_the_tray_and_are_seen(seed, anomaly):
    twin, scene = twins(anomaly, seed)
    ((_, mask, _),) = find_defects(twin, scene, 128)
    assert label(mask, np.ones((3, 3)))[1] == 1
    side = np.ptp(np.argwhere(mask), axis=0).max() / 128
    assert (0.15 < side < 0.56) if anomaly == "scratch" else (0.06 < side < 0.3)
    change = np.abs(render(twin).astype(float) - render(scene)).mean(-1)[mask]
    assert np.median(change) > 25  # grey levels, in any light and over any part


@given(st.sampled_from(ANOMALIES), st.integers(0, 2**32 - 1), st.sampled_from([48, 64, 100, 256]))
@settings(max_examples=60, deadline=None)
def test_draw_tray_at_any_size(anomaly, seed, size):
    picture, defects = draw_tray(np.random.default_rng(seed), size, anomaly)
    again, same = draw_tray(np.random.default_rng(seed), size, anomaly)
    assert picture.shape == (size, size, 3) and picture.dtype == np.uint8 and np.array_equal(picture, again)
    assert len(defects) == (2 if anomaly == "wrong_place" else 1)
    for (name, mask, area), (_, other, _) in zip(defects, same):
        assert name in DEFECTS and mask.any() and 0 < area <= mask.sum() and np.array_equal(mask, other)
        if anomaly not in ("missing_part", "double_part"):
            assert area == mask.sum()
        else:
            assert area < 0.7 * mask.sum()


parts = st.builds(
    trays.Part,
    st.sampled_from(PARTS),
    st.floats(-0.75, 0.75),
    st.floats(-0.75, 0.75),
    st.floats(0, 7),
    st.just(1.06),
    st.none() | st.tuples(st.floats(0, 7), st.floats(-0.5, 0.5)),
)


@given(parts, st.integers(0, 2**32 - 1), st.sampled_from([48, 64, 101, 128, 256]))
@settings(max_examples=60, deadline=None)
def test_a_part_changes_nothing_beyond_its_window(part, seed, size):
    scene, whole = sample_scene(np.random.default_rng(seed)), (slice(None), slice(None))
    scene = replace(scene, parts=(*scene.parts[:3], (part,)))  # it may lie on the border, or outside
    drawn = render(scene, size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trays, "_window", lambda *_: whole)
        assert np.array_equal(drawn, render(scene, size))
        patch.setattr(trays, "_window", lambda part, *_: (slice(0, 0), slice(0, 0)))
        assert not np.array_equal(drawn, render(scene, size)), "without windows no part is drawn"


def test_draw_tray_draws_the_spoilt_scene():
    picture, _ = draw_tray(np.random.default_rng(5), 64, "stain")
    twin, scene = twins("stain", 5)
    assert np.array_equal(picture, render(scene, 64)) and not np.array_equal(picture, render(twin, 64))


def test_unknown_anomaly_is_refused():
    with pytest.raises(ValueError, match="mising_part.*missing_part"):
        draw_tray(np.random.default_rng(0), 64, "mising_part")


def test_saturation_is_the_area_of_the_smallest_part():
    for e in defects_config(128):
        how, _, kind = e["defect_name"].partition("_")
        if kind not in PARTS:
            continue
        part = trays.Part(kind, 0.0, 0.0, 0.3, 0.94)
        x, y = trays._grid(1024)
        area = (trays._part_distance(part, x, y) <= 0).sum() / 64  # pixels of a picture of 128
        assert not e["relative_saturation"] and abs(e["saturation_threshold"] - area) < 0.02 * area, how


# ------------------------------------------------------------------ files
def test_same_bytes_twice_and_another_seed_differs(made, tmp_path):
    again, other = make_trays(tmp_path / "a", **SMALL), make_trays(tmp_path / "b", **SMALL, seed=1)
    assert files(again) == files(made)
    pictures = {k: v for k, v in files(made).items() if k.split("/")[0] in ("train", "validation", "test")}
    theirs = files(other)
    assert len(pictures) == 27 and all(theirs[k] != v for k, v in pictures.items())
    assert len(set(pictures.values())) == len(pictures)  # no picture is in two splits


def test_picture_k_does_not_depend_on_the_counts(made, tmp_path):
    more = make_trays(tmp_path, **SMALL | dict(train=9, validation=1, good=5, logical=12, structural=3))
    a, b = files(made), files(more)
    shared = [k for k in a.keys() & b.keys() if k.endswith(".png")]
    assert len(shared) > 20 and all(a[k] == b[k] for k in shared)


def test_layout_is_read_back(made):
    category = read_category(made.parent, "trays")
    assert category.layout == "mvtec_loco" and category.name == "trays" and category.notes == ()
    assert (len(category.train), len(category.validation), len(category.test)) == (6, 3, 18)
    assert Counter(s.type for s in category.test) == dict(good=4, logical_anomalies=8, structural_anomalies=6)
    assert all(s.label == (s.type != "good") for s in category.test) and category.has_masks
    assert tuple(d.name for d in category.defects) == DEFECTS
    assert [d.pixel_value for d in category.defects] == list(range(255, 255 - len(DEFECTS), -1))
    assert check_category(category, progress=False) == []
    assert load_images(category.samples, 64).shape == (27, 64, 64, 3)


def test_files_are_what_draw_tray_gives(made):
    category = read_category(made.parent, "trays")
    values = {d.pixel_value: d.name for d in category.defects}
    for split, kind in ((3, LOGICAL), (4, STRUCTURAL)):
        samples = [s for s in category.test if s.type == Path(trays.SPLITS[split]).name]
        for i, sample in enumerate(samples):
            picture, defects = draw_tray(np.random.default_rng([0, split, i]), 64, kind[i % len(kind)])
            assert np.array_equal(np.array(Image.open(sample.path)), picture)
            read = load_defects(sample, category)
            assert len(read) == len(defects) == len(sample.masks)
            for (mask, area), (name, mine, wanted), path in zip(read, defects, sample.masks):
                assert np.array_equal(mask, mine) and area == wanted
                assert values[np.array(Image.open(path)).max()] == name
            assert np.array_equal(load_mask(sample, 64), np.any([m for _, m, _ in defects], axis=0))


def test_anomalies_are_cycled_evenly(made):
    config = {e["pixel_value"]: e["defect_name"] for e in json.loads((made / "defects_config.json").read_text())}
    names = [
        config[int(np.array(Image.open(p / "000.png")).max())].partition("_")[0]
        for p in sorted((made / "ground_truth" / "logical_anomalies").iterdir())
    ]
    assert names == ["missing", "double", "wrong", "wrong"] * 2


def test_an_identical_folder_is_returned_untouched(made, monkeypatch):
    before = {p: p.stat().st_mtime_ns for p in made.rglob("*")}
    monkeypatch.setattr(trays, "draw_tray", lambda *a: pytest.fail("nothing may be drawn again"))
    assert make_trays(made.parent, **SMALL) == made
    assert before == {p: p.stat().st_mtime_ns for p in made.rglob("*")}


@pytest.mark.parametrize("change", [dict(seed=1), dict(size=96), dict(train=7), dict(structural=7)])
def test_a_folder_with_other_parameters_is_refused(made, change):
    before = files(made)
    with pytest.raises(ValueError) as e:
        make_trays(made.parent, **SMALL | change)
    (name,) = change
    assert str(made) in str(e.value) and name in str(e.value) and "choose another root or move" in str(e.value)
    assert files(made) == before


def test_another_version_of_the_drawing_is_refused(made, monkeypatch):
    monkeypatch.setattr(trays, "VERSION", trays.VERSION + 1)
    with pytest.raises(ValueError, match="version"):
        make_trays(made.parent, **SMALL)


@pytest.mark.parametrize("harm", ["lost", "changed", "extra", "no stamp", "broken stamp", "foreign"])
def test_a_folder_that_is_not_whole_is_refused(made, tmp_path, harm):
    folder = shutil.copytree(made, tmp_path / "trays")
    if harm == "lost":
        (folder / "train/good/003.png").unlink()
    if harm == "changed":
        (folder / "test/good/000.png").write_bytes((folder / "test/good/001.png").read_bytes())
    if harm == "extra":
        (folder / "train/good/mine.png").write_bytes(b"x")
    if harm == "no stamp":
        (folder / "trays.json").unlink()
    if harm == "broken stamp":
        (folder / "trays.json").write_text("{")
    if harm == "foreign":
        (folder / "trays.json").write_text("[1]")
    before = files(folder)
    with pytest.raises(ValueError, match=str(folder)):
        make_trays(tmp_path, **SMALL)
    assert files(folder) == before


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 10, 30])
def test_a_kill_in_the_middle_leaves_nothing(tmp_path, monkeypatch, error, after):
    save, calls = trays._save, []

    def fails(path, pixels):
        calls.append(path)
        if len(calls) > after:
            raise error
        save(path, pixels)

    monkeypatch.setattr(trays, "_save", fails)
    with pytest.raises(type(error)):
        make_trays(tmp_path, **SMALL)
    assert len(calls) == after + 1 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(trays, "_save", save)
    assert read_category(make_trays(tmp_path, **SMALL)).counts["train"] == 6


@pytest.mark.parametrize("same", [True, False])
def test_a_faster_process_wins(made, tmp_path, monkeypatch, same):
    write, small = trays.write_json, SMALL if same else SMALL | dict(train=7)

    def slow(path, data):  # another process finishes while this one writes its stamp
        write(path, data)
        if Path(path).name == "trays.json":
            shutil.copytree(made, tmp_path / "trays")

    monkeypatch.setattr(trays, "write_json", slow)
    if same:
        assert make_trays(tmp_path, **small) == tmp_path / "trays"
    else:
        with pytest.raises(ValueError, match="train=6"):
            make_trays(tmp_path, **small)
    assert files(tmp_path / "trays") == files(made) and [p.name for p in tmp_path.iterdir()] == ["trays"]


@pytest.mark.parametrize("wrong", [dict(size=47), dict(train=0), dict(good=-1), dict(seed=-1)])
def test_impossible_numbers_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_trays(tmp_path, **SMALL | wrong)
    assert list(tmp_path.iterdir()) == []


def test_the_whole_folder_is_readable_by_others(made):
    assert made.stat().st_mode & 0o777 == 0o755 and "progress" not in (made / "trays.json").read_text()


def test_what_a_killed_process_has_drawn_goes_with_the_next_drawing(tmp_path):
    left = tmp_path / ".large.a1b2c3d4.part"
    left.mkdir()
    (left / "x.png").write_bytes(b"x")

    def draw(folder):
        assert drawn_once(tmp_path / "large", lambda other: (other / "b").touch(), Path) == tmp_path / "large"
        (folder / "a").touch()

    drawn_once(tmp_path / "large", draw, Path)
    assert [path.name for path in tmp_path.iterdir()] == ["large"] and (tmp_path / "large/b").exists()
