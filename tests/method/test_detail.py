"What a preset makes of its pictures: how large they are seen, and whether the part may lie anywhere."

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from shared import TINY_FIT

from grad_nb.config import (
    ANYWHERE,
    LARGEST_SIDE,
    PLACED,
    PRESETS,
    TABLE_7,
    GeneratorConfig,
    anywhere,
    enlarged,
    override,
    preset,
)
from grad_nb.datasets.compare import (
    ANYWHERE_FROM,
    LOOKED_AT,
    detail_lost,
    large_enough,
    some_of,
    suited,
)
from grad_nb.grad import GRAD
from grad_nb.runs.stages import open_run


def stripes(period, n=1, size=LARGEST_SIDE):
    "(n, size, size, 3) uint8 waves of so many pixels."
    y, x = np.mgrid[:size, :size]
    shifts = np.arange(n)[:, None, None] / max(n, 1)
    wave = 127 + 100 * np.sin(2 * np.pi * ((x + 0.5 * y)[None] / period + shifts))
    return np.repeat(wave.round().astype(np.uint8)[..., None], 3, -1)


def test_more_is_lost_the_smaller_a_picture_and_the_finer_its_pattern():
    lost = [[detail_lost(stripes(period), size) for size in (32, 64, 128, 256)] for period in (5, 10, 40)]
    assert np.all(np.diff(lost, axis=0) <= 1e-6) and np.all(np.diff(lost, axis=1) <= 1e-6)
    assert lost[0][0] > 0.9 and lost[2][1] < 0.1 and all(row[-1] == 0 for row in lost)


def test_pictures_without_detail_lose_none():
    assert detail_lost(np.full((3, 64, 64, 3), 90, np.uint8), 32) == 0


def test_a_texture_is_seen_larger_and_a_part_is_not():
    demo = preset("demo")
    assert large_enough(demo, stripes(40)) == demo
    seen = large_enough(demo, stripes(8))
    assert seen.generator.size == 128 and seen.levels_ad[0].size == 192
    assert replace(seen, generator=demo.generator, levels_ad=demo.levels_ad, levels_loco=demo.levels_loco) == demo


def test_no_picture_is_made_larger_than_the_papers():
    seen = large_enough(preset("demo"), stripes(2.3))
    assert seen.generator.size == LARGEST_SIDE
    for name in ("fast", "demo"):
        rows = (*enlarged(enlarged(preset(name))).levels_loco, *enlarged(preset(name)).levels_ad)
        assert all(row.size <= LARGEST_SIDE * 34 // row.level for row in rows)


def test_the_paper_and_a_size_that_was_asked_for_are_kept():
    for chosen in (preset("paper"), override(preset("demo"), {"generator.size": 48})):
        assert chosen.generator.max_detail_lost == 1 and large_enough(chosen, stripes(3)) == chosen
    asked = override(preset("demo"), {"generator.size": 48, "generator.max_detail_lost": 0.5})
    assert large_enough(asked, stripes(3)).generator.size > 48


@pytest.mark.parametrize("share", (0.0, -1.0, 1.5, float("nan")))
def test_a_share_that_cannot_be_is_refused(share):
    with pytest.raises(ValueError, match="max_detail_lost"):
        GeneratorConfig(max_detail_lost=share)


@pytest.mark.parametrize("n", (0, 1, LOOKED_AT, LOOKED_AT + 1, 500))
def test_a_few_are_looked_at_and_all_parts_of_the_list(n):
    chosen = some_of(range(n))
    assert len(chosen) == min(n, LOOKED_AT) and sorted(set(chosen)) == list(chosen)
    assert n < 100 or max(chosen) > n - 2 * n / LOOKED_AT


@pytest.mark.parametrize("stream", (False, True))
def test_an_estimator_sees_the_detail(stream):
    settings = override(preset("demo"), TINY_FIT | {"generator.max_detail_lost": 0.5, "generator.crop": 16})
    pictures = stripes(8, 12)
    fitted = GRAD(settings, device="cpu", progress=False).fit(iter(pictures) if stream else pictures)
    assert fitted.preset_.generator.size == 128 and fitted.levels_[0].size == 192
    assert fitted.n_pictures_[0] + fitted.n_pictures_[1] == 12
    assert "128 x 128" in fitted.card() and fitted.preset.generator.size == 64


@pytest.mark.parametrize("stream", (False, True))
@pytest.mark.parametrize("fine, size", ((0, 128), (1, 64)))
def test_an_estimator_is_not_suited_to_pictures_that_are_labelled_anomalous(stream, fine, size):
    settings = override(preset("demo"), TINY_FIT | {"generator.max_detail_lost": 0.5, "generator.crop": 16})
    pictures = np.concatenate([stripes(8, 12), stripes(40, 12)])
    labels = iter([fine] * 12 + [1 - fine] * 12)
    fitted = GRAD(settings, device="cpu", progress=False).fit(iter(pictures) if stream else pictures, labels)
    assert fitted.preset_.generator.size == size and sum(fitted.n_pictures_) == 12


def test_a_run_sees_the_detail(tmp_path):
    for i, picture in enumerate(stripes(8, 6)):
        for part in ("train", "test"):
            file = tmp_path / "cloth" / part / "good" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    for i, picture in enumerate(stripes(40, 2)):
        file = tmp_path / "cloth" / "test" / "torn" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file)
    run = open_run(tmp_path, "cloth", "demo", runs=tmp_path / "runs", progress=False)
    assert run.preset.generator.size == 128 and run.levels[0].size == 192
    asked = open_run(tmp_path, "cloth", "demo", runs=tmp_path / "runs", overrides="generator.size=64", progress=False)
    assert asked.preset.generator.size == 64
    both = "generator.size=64 generator.max_detail_lost=0.5"
    larger = open_run(tmp_path, "cloth", "demo", runs=tmp_path / "runs", overrides=both, progress=False)
    assert larger.preset.generator.size == 128 and larger.levels[0].size == 192


def parts(where, n=40, size=LARGEST_SIDE):
    """(n, size, size, 3) uint8 rings: where = "middle", "anywhere" (one of three places by chance) or "nowhere"."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    place = rng.integers(0, 3, n) if where == "anywhere" else np.ones(n)
    far = np.hypot(y - size / 2, x - (size * (place + 0.5) / 3)[:, None, None])
    rings = 90 * np.exp(-far / 30) * np.sin(far / 5) * (where != "nowhere")
    grey = 120 + rings + rng.normal(0, 8, far.shape)
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, -1)


def test_a_preset_takes_what_it_has_for_parts_that_lie_anywhere(monkeypatch):
    fast = preset("fast")
    for found, lies_anywhere in (
        (0.5, False),
        (ANYWHERE_FROM, True),
        (0.82, True),
        (PLACED, False),
        (1, False),
    ):
        monkeypatch.setattr("grad_nb.datasets.compare.position_auroc", lambda *given, found=found: found)
        seen = suited(fast, stripes(40, LOOKED_AT))
        assert seen == (anywhere(fast) if lies_anywhere else fast)
        assert suited(preset("demo"), stripes(40, LOOKED_AT)) == preset("demo")
    monkeypatch.setattr("grad_nb.datasets.compare.position_auroc", lambda *given: 0.7)
    assert suited(fast, stripes(40, LOOKED_AT - 1)) == fast, "too few pictures to ask"


def test_the_pictures_say_where_a_part_lies():
    fast = preset("fast")
    assert suited(fast, parts("anywhere")).levels_ad == TABLE_7["mvtec_loco"] != fast.levels_ad
    assert suited(fast, parts("nowhere")).levels_ad == suited(fast, parts("middle")).levels_ad == fast.levels_ad


def test_fine_parts_that_lie_anywhere_are_seen_larger_too(monkeypatch):
    monkeypatch.setattr("grad_nb.datasets.compare.position_auroc", lambda *given: 0.7)
    seen = suited(preset("fast"), stripes(8, LOOKED_AT))
    assert seen.generator.size == 128 and seen.generator.redraw < 1 and seen.levels_ad == TABLE_7["mvtec_loco"]


@pytest.mark.parametrize(
    ("path", "asked"),
    [("generator.crop", 40), ("generator.blobs", 4), ("detector.steps", 10), ("detector.min_position", 0.7)],
)
def test_what_was_asked_for_stays(path, asked):
    part, name = path.split(".")
    made = anywhere(override(preset("fast"), {path: asked}))
    assert getattr(getattr(made, part), name) == asked != ANYWHERE["fast"][path]
    again = override(made, {path: ANYWHERE["fast"][path]})
    assert again == anywhere(preset("fast")), "and nothing else differs"


def test_an_own_limit_of_lost_detail_holds_for_parts_that_lie_anywhere_too(monkeypatch):
    monkeypatch.setattr("grad_nb.datasets.compare.position_auroc", lambda *given: 0.7)
    pictures = stripes(12, LOOKED_AT)
    lost = detail_lost(pictures, 64)
    for limit in (lost - 0.01, lost + 0.01):
        seen = suited(override(preset("fast"), {"generator.max_detail_lost": limit}), pictures)
        assert seen.generator.max_detail_lost == limit and seen.levels_ad == TABLE_7["mvtec_loco"]
        assert seen.generator.size == (64 if lost < limit else 128)


@pytest.mark.parametrize(
    "asked",
    [
        {"generator.start": 0.9},
        {"generator.start": 0.3, "generator.redraw": 0.5},
        {"generator.shared": True},
        {"detector.wrong_coordinates": False},
        {"detector.coordinates": False},
    ],
)
def test_who_says_how_pictures_are_drawn_or_whether_places_count_has_decided(asked):
    chosen = override(preset("fast"), asked)
    assert anywhere(chosen) == chosen


def test_pictures_are_looked_at_once_and_again_when_they_change(tmp_path, monkeypatch):
    from grad_nb.datasets.readers import read_category
    from grad_nb.runs import stages

    for i, picture in enumerate(parts("middle", 6, 64)):
        for part in ("train", "test"):
            file = tmp_path / "part" / part / "good" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(file)
    looked = []
    monkeypatch.setattr(stages, "suited", lambda chosen, pictures, asked: looked.append(len(pictures)) or chosen)
    category = read_category(tmp_path, "part")
    for _ in range(3):
        stages.suited_settings(category, "fast")
    assert looked == [6]
    steps = preset("fast").detector.steps
    monkeypatch.setattr(stages, "suited", lambda chosen, pictures, asked: anywhere(chosen, asked))
    assert stages.suited_settings(category, "fast", f"detector.steps={steps}").detector.steps == steps
    monkeypatch.setattr(stages, "suited", lambda chosen, pictures, asked: looked.append(len(pictures)) or chosen)
    Image.fromarray(parts("nowhere", 1, 72)[0]).save(tmp_path / "part/train/good/0.png")
    stages.suited_settings(category, "fast")
    assert looked == [6, 6]


def test_a_size_that_was_asked_for_keeps_the_rest(monkeypatch):
    monkeypatch.setattr("grad_nb.datasets.compare.position_auroc", lambda *given: 0.7)
    for chosen in (override(preset("fast"), {"generator.size": 96}), preset("fast", "mvtec_loco"), preset("paper")):
        assert suited(chosen, stripes(8, LOOKED_AT)) == chosen


def test_presets_of_ones_own_and_all_others_have_nothing_for_it():
    for chosen in (replace(preset("fast"), name="mine"), *(p for p in PRESETS.values() if p.name != "fast")):
        assert anywhere(chosen) == chosen


def test_an_estimator_has_three_detectors_for_a_part_that_lies_anywhere():
    tiny = {path: value for path, value in TINY_FIT.items() if not path.startswith("levels")}
    settings = override(preset("fast"), tiny | {"generator.max_detail_lost": 0.9, "generator.crop": 16})
    fitted = GRAD(settings, device="cpu", progress=False).fit(parts("anywhere"))
    assert [row.level for row in fitted.levels_] == [34, 68, 136] and fitted.preset.levels_ad == preset(
        "fast"
    ).levels_ad
    assert "do not see where" in fitted.card()
