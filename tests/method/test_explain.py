"""Explanations against what they claim: place, patch, nearest neighbour by brute force; and the model's card."""

import ast
import json
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from grad_nb.config import Level, Preset, from_dict, override, preset, to_dict
from grad_nb.coords import with_coords
from grad_nb.datasets.light import even_light
from grad_nb.datasets.readers import hold_out, resize_pictures
from grad_nb.datasets.trays import draw_tray
from grad_nb.diffusion import to_model
from grad_nb.explain import PatchBank, cell_box, nearest
from grad_nb.grad import GRAD
from grad_nb.plots import explanation_figure, heat_overlay

TINY = {
    "generator.size": 96,
    "generator.width": 8,
    "generator.steps": 3,
    "generator.batch": 2,
    "generator.n_samples": 4,
    "generator.sample_steps": 2,
    "detector.width": 0.1,
    "detector.steps": 4,
    "evaluation.map_size": 48,
    "levels_loco": (Level(34, 96, (5, 9)), Level(68, 48, (9,))),
}


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rng = np.random.default_rng(8)
    return np.stack([draw_tray(rng, 96)[0] for _ in range(10)])


@pytest.fixture(scope="module")
def model(pictures) -> GRAD:
    "Two detectors, at 96 and at 48 pixels."
    return GRAD(
        override(preset("demo"), TINY), "mvtec_loco", validation=0.1, device="cpu", progress=False, explain_patches=40
    ).fit(pictures)


def test_the_statistics_of_each_level_are_those_of_held_out_pictures(model, pictures):
    held = model._maps(pictures[hold_out(10, 0.1, 0)[1]])
    assert [s.mean for s in model.stats_] == pytest.approx([m.mean() for m in held], rel=1e-4)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_the_nearest_is_the_nearest(n, dims, seed, ties):
    rng = np.random.default_rng(seed)
    features = rng.normal(0, 3, (n, dims)).astype(np.float32)
    if ties:
        features = np.round(features)
    bank = PatchBank(
        features,
        rng.integers(0, 256, (n, 34, 34, 3), dtype=np.uint8),
        np.stack([np.arange(n)] * 2 + [rng.integers(0, 4, n)] * 2, 1),
    )
    query = rng.normal(0, 3, dims).astype(np.float32)
    best, where = None, None
    for i in range(n):  # in plain Python, on purpose
        d = sum((float(a) - float(b)) ** 2 for a, b in zip(features[i], query)) ** 0.5
        if best is None or d < best - 1e-12:
            best, where = d, i
    found = nearest(bank, query, 64, (64, 64))
    assert found.distance == pytest.approx(best, rel=1e-9, abs=1e-9)
    if not ties:
        assert (
            found.picture == where
            and (found.patch == bank.patches[where]).all()
            and found.box == cell_box(*bank.places[where, 2:], 64, (64, 64))
        )


def dense(model, pixels, number):
    "Map and features of a whole picture, as the detector sees it when it judges."
    detector, row = model.detectors_[number], model.levels_[number]
    x = with_coords(to_model(torch.from_numpy(np.array(resize_pictures(pixels[None], row.size)))))
    with torch.inference_mode():
        return detector(x)[0, 0].numpy(), detector.features(x)[0].numpy()


def test_every_level_points_at_its_highest_cell_and_its_true_neighbours(model, pictures):
    for pixels in pictures[:4]:
        explanation = model.explain(pixels)
        pixels = even_light(pixels[None], model.light_)[0]
        assert [e.level for e in explanation.levels] == [34, 68]
        for number, (e, row, banks, stats) in enumerate(
            zip(explanation.levels, model.levels_, model.banks_, model.stats_)
        ):
            score_map, features = dense(model, pixels, number)
            r, c = np.unravel_index(score_map.argmax(), score_map.shape)
            assert e.score == pytest.approx((score_map.max() - stats.mean) / stats.std, abs=1e-3)
            assert e.box == cell_box(r, c, row.size, (96, 96))
            assert (e.patch == resize_pictures(pixels[None], row.size)[0, 4 * r : 4 * r + 34, 4 * c : 4 * c + 34]).all()
            for found, bank in zip((e.normal, e.contrastive), banks):
                distances = [
                    float(np.sqrt(((known.astype(np.float64) - features[:, r, c]) ** 2).sum()))
                    for known in bank.features
                ]
                assert found.distance == pytest.approx(min(distances), abs=1e-3)
                assert (found.patch == bank.patches[int(np.argmin(distances))]).all()


def test_the_explanation_is_of_the_same_verdict_as_predict(model, pictures):
    told = model.predict(pictures)
    for i in (0, 5, 9):
        e = model.explain(pictures[i])
        assert (
            e.score == pytest.approx(told.scores[i], abs=1e-5)
            and e.anomalous == told.labels[i]
            and np.allclose(e.heat_map, told.maps[i], atol=1e-5)
        )
        assert e.threshold == model.offset_ and e.limits == model.map_limits_ and (e.picture == pictures[i]).all()


def test_patches_are_where_they_are_said_to_be(model, pictures):
    "A kept patch is the crop of the picture that it names, of those given to fit; and it is found at distance 0."
    pictures = even_light(pictures, model.light_)
    for row, (normal, made), detector in zip(model.levels_, model.banks_, model.detectors_):
        assert (
            set(normal.places[:, 0]) == {0}
            and set(made.places[:, 0]) == set(row.generators)
            and len(normal.patches) == len(made.patches) == 40
        )
        for patch, features, (_, k, r, c) in zip(normal.patches, normal.features, normal.places):
            whole = resize_pictures(pictures[k : k + 1], row.size)[0]
            assert (patch == whole[4 * r : 4 * r + 34, 4 * c : 4 * c + 34]).all() and nearest(
                normal, features, row.size, (96, 96)
            ).distance == 0
        x = with_coords(to_model(torch.from_numpy(np.array(whole[None]))))
        with torch.inference_mode():
            assert np.allclose(detector.features(x)[0, :, r, c].numpy(), normal.features[-1], atol=1e-4)


def test_boxes_stretch_with_the_picture(model, pictures, tmp_path):
    wide = np.asarray(Image.fromarray(pictures[0]).resize((192, 96)))
    Image.fromarray(wide).save(tmp_path / "wide.png")
    e = model.explain(tmp_path / "wide.png")
    assert e.picture.shape == (96, 192, 3)
    for found, row in zip(e.levels, model.levels_):
        left, top, right, bottom = found.box
        assert right - left == pytest.approx(34 * 192 / row.size, abs=1) and bottom - top == pytest.approx(
            34 * 96 / row.size, abs=1
        )
        assert 0 <= left < right <= 192 and 0 <= top < bottom <= 96


def test_a_model_explains_alike_after_loading(model, pictures, tmp_path):
    model.save(tmp_path / "m.grad")
    a, b = model.explain(pictures[3]), GRAD.load(tmp_path / "m.grad", "cpu").explain(pictures[3])
    assert a.score == pytest.approx(b.score, abs=1e-5)
    for one, two in zip(a.levels, b.levels):
        assert (
            one.box == two.box
            and one.normal.picture == two.normal.picture
            and (one.contrastive.patch == two.contrastive.patch).all()
        )


def test_without_patches_there_is_still_a_place(model, pictures):
    kept = model.banks_
    model.banks_ = [None] * 2
    try:
        e = model.explain(pictures[0])
    finally:
        model.banks_ = kept
    assert all(found.normal is None and found.contrastive is None for found in e.levels)
    figure = explanation_figure(e)
    assert "none kept" in "".join(ax.get_title() for ax in figure.axes)
    plt.close(figure)


@pytest.mark.parametrize(
    "wrong", [np.zeros((96, 96, 7), np.uint8), np.zeros((96, 96, 3)), np.zeros((1, 96, 96, 3), np.uint8)]
)
def test_a_wrong_array_is_refused(model, wrong):
    with pytest.raises(ValueError, match="uint8"):
        model.explain(wrong)


def test_the_figure_shows_the_evidence(model, pictures):
    e = model.explain(pictures[0])
    figure = explanation_figure(e)
    titles, shown = (
        [ax.get_title() for ax in figure.axes],
        [ax.images[0].get_array() for ax in figure.axes if ax.images],
    )
    assert f"{e.score:.2f}" in figure.get_suptitle() and f"{e.threshold:.2f}" in figure.get_suptitle()
    assert figure.get_suptitle().startswith("anomalous" if e.anomalous else "normal")
    for found in e.levels:
        assert any(f"level {found.level}" in t for t in titles)
        for image in (found.patch, found.normal.patch, found.contrastive.patch):
            assert any(a.shape == image.shape and (a == image).all() for a in shown)
        assert any(f"{found.normal.distance:.2f}" in t for t in titles) and any(
            f"{found.contrastive.distance:.2f}" in t for t in titles
        )
    overlay = heat_overlay(e.picture, e.heat_map, e.limits)
    assert any(a.shape == overlay.shape and (a == overlay).all() for a in shown)
    plt.close(figure)


def test_the_card_says_what_the_model_is(model, tmp_path):
    card = model.card()
    assert (
        f"{model.offset_:.6g}" in card
        and "rate of 5 % was wanted" in card
        and "Apache-2.0" in card
        and "level 34 at 96 px" in card
        and "level 68 at 48 px" in card
    )
    train, held = model.n_pictures_
    assert (
        f"{train} normal pictures, and {held} held out" in card
        and train + held == 10
        and "No anomalous picture was learnt from" in card
        and "do not see where" not in card
    )
    for name, number in model.versions_.items():
        assert f"{name} {number}" in card
    said = json.loads(re.search(r"```json\n(.*?)\n```", card, re.DOTALL)[1])
    assert (
        from_dict(Preset, said["preset"]) == model.preset
        and said["layout"] == "mvtec_loco"
        and said["preset"] == json.loads(json.dumps(to_dict(model.preset)))
    )
    ast.parse(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1])
    model.save(tmp_path / "m.grad")
    assert GRAD.load(tmp_path / "m.grad", "cpu").card() == card, (
        "the card is the model's, not the machine's that loads it"
    )
    assert not re.search(r"\{\w*\}", card.split("```json")[0]), "no placeholder is left"
