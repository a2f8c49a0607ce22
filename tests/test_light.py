"Light that changes slowly is taken away, and nothing else is."

import numpy as np
import pytest
import torch
from PIL import Image

from grad_nb.config import Level, override, preset
from grad_nb.contrastive import is_grey
from grad_nb.datasets.keys import KINDS, draw_key
from grad_nb.datasets.light import DARKEST_AND_BRIGHTEST, LIGHT_ORDERS, SPREAD, Light, even_light, fit_light
from grad_nb.datasets.readers import load_images
from grad_nb.datasets.trays import draw_tray
from grad_nb.detector import Detector
from grad_nb.evaluation import MapStats
from grad_nb.grad import GRAD
from grad_nb.study.lamps import lamp_table, under_lamp
from grad_nb.use.export import OnnxScorer, Scorer, to_onnx

RAMP = (np.arange(64) + 0.5) / 64 - 0.5


def trays(n, split=0, kind=""):
    return np.stack([draw_tray(np.random.default_rng([5, split, i]), 64, kind)[0] for i in range(n)])


def keys(n, split=0, kind=""):
    return np.stack([draw_key(5, split, i, 64, kind)[0] for i in range(n)])


def lit(pictures, factor):
    return np.clip(pictures * factor + 0.5, 0, 255).astype(np.uint8)


def away(a, b):
    return np.abs(a.astype(float) - b).mean()


@pytest.mark.parametrize("draw", [trays, keys])
@pytest.mark.parametrize("factor", [0.7, 0.9, 1.1])
def test_brightness_is_taken_away(draw, factor):
    light = fit_light(draw(40), 0)
    test = draw(10, 1)
    before, after = away(lit(test, factor), test), away(even_light(lit(test, factor), light), even_light(test, light))
    assert after < 0.15 * before


@pytest.mark.parametrize("draw", [trays, keys])
@pytest.mark.parametrize("order", [1, 2])
def test_a_gradient_is_taken_away(draw, order):
    light = fit_light(draw(40), order)
    test = draw(10, 1)
    factor = (1 + 0.2 * RAMP)[None, :, None, None] * (1 - 0.1 * RAMP)[None, None, :, None]
    before, after = away(lit(test, factor), test), away(even_light(lit(test, factor), light), even_light(test, light))
    assert after < 0.2 * before


@pytest.mark.parametrize("kind", KINDS)
def test_a_defect_stays_what_it_is(kind):
    light = fit_light(keys(40), 1)
    rng = np.random.default_rng
    from grad_nb.datasets.keys import render_key, sample_key, spoil_key

    for seed in range(5):
        twin = sample_key(rng(seed))
        scene = spoil_key(twin, kind, rng(seed + 100))
        pair = np.stack([render_key(twin, 64), render_key(scene, 64)])
        before, after = (np.abs(p[0].astype(float) - p[1]).max(-1) for p in (pair, even_light(pair, light)))
        assert np.abs(after - before)[before == 0].max() <= 3  # elsewhere nothing appears
        assert after.max() > 0.8 * before.max()


@pytest.mark.parametrize("order", [0, 1, 2])
def test_grey_pictures_stay_grey(tmp_path, order):
    grey = keys(12)[..., 0]
    for k, picture in enumerate(grey):
        Image.fromarray(picture).save(tmp_path / f"{k:02d}.png")  # one channel
    read = load_images(sorted(tmp_path.glob("*.png")), 48, progress=False)
    assert is_grey(read) and is_grey(even_light(read, fit_light(read, order)))


def test_overexposed_places_stay_so_and_do_not_pull():
    rng = np.random.default_rng(0)
    part = np.full((30, 64, 64, 3), 255.0)
    part[:, 20:44, 20:44] = 90 + rng.normal(0, 4, (30, 24, 24, 3))
    normals = part.astype(np.uint8)
    light = fit_light(normals, 1)
    found = even_light(lit(normals, 1.1), light)
    assert (found[:, 2:10] >= 253).all()
    assert abs(found[:, 22:42, 22:42].mean() - normals[:, 22:42, 22:42].mean()) < 2


def test_black_and_white_pictures_come_out_as_pictures():
    light = fit_light(trays(20), 2)
    for level in (0, 255):
        found = even_light(np.full((1, 64, 64, 3), level, np.uint8), light)
        assert found.dtype == np.uint8 and found.shape == (1, 64, 64, 3)
    only = fit_light(np.zeros((3, 64, 64, 3), np.uint8), 1)
    assert not even_light(np.zeros((1, 64, 64, 3), np.uint8), only).any()


def test_no_light_leaves_pictures_alone_and_sizes_may_differ():
    pictures = trays(4)
    assert fit_light(pictures, -1) is None
    assert even_light(pictures, None) is pictures
    light = fit_light(pictures, 1)
    large = pictures.repeat(2, 1).repeat(2, 2)
    assert away(even_light(large, light)[:, ::2, ::2], even_light(pictures, light)) < 1.0


def test_each_picture_is_evened_alone():
    light = fit_light(trays(20), 1)
    test = trays(7, 1)
    alone = np.concatenate([even_light(p[None], light) for p in test])
    assert np.array_equal(even_light(test, light, batch=3), alone)


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="order"):
        fit_light(trays(2), 3)
    assert set(LIGHT_ORDERS) == {-1, 0, 1, 2}


# ------------------------------------------------------------------ with a model
@pytest.fixture(scope="module")
def lit_model():
    "A model with random weights that evens light, as `fit` leaves it."
    config = override(
        preset("demo"),
        {"generator.size": 64, "generator.light": 1, "detector.width": 0.1, "evaluation.map_size": 64}
        | {"levels_ad": (Level(34, 48, (5,)),)},
    )
    model = GRAD(config, device="cpu", progress=False, explain_patches=0)
    model.levels_ = config.levels("mvtec_ad")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.detectors_ = [Detector(0.1)]
    model.light_ = fit_light(keys(30), 1)
    model.stats_ = [MapStats.of(m) for m in model._maps(keys(4, 1))]
    model.offset_ = float(np.median(model._score(keys(6, 1))[0]))
    model.map_limits_ = (0.0, 1.0)
    model.banks_ = [None]
    model.n_pictures_ = (30, 4)
    model.versions_ = {}
    return model


def test_a_model_judges_in_even_light(lit_model):
    test = keys(6, 1)
    found, dim = lit_model.predict(test), lit_model.predict(lit(test, 0.85 * (1 + 0.1 * RAMP)[None, None, :, None]))
    without = lit_model.light_
    lit_model.light_ = None
    raw, raw_dim = (lit_model.predict(p) for p in (test, lit(test, 0.85)))
    lit_model.light_ = without
    assert np.abs(dim.maps - found.maps).mean() < 0.2 * np.abs(raw_dim.maps - raw.maps).mean()


def test_a_model_keeps_its_light(lit_model, tmp_path):
    lit_model.save(tmp_path / "a.grad")
    again = GRAD.load(tmp_path / "a.grad", device="cpu")
    assert again.light_.order == 1
    assert np.array_equal(again.score_samples(keys(3, 1)), lit_model.score_samples(keys(3, 1)))
    kept = lit_model.light_
    lit_model.light_ = Light(1, kept.median[:4], kept.weight[:4])
    lit_model.save(tmp_path / "b.grad")
    lit_model.light_ = kept
    with pytest.raises(ValueError, match="does not fit"):
        GRAD.load(tmp_path / "b.grad", device="cpu")


def test_the_exported_module_evens_light_too(lit_model, tmp_path):
    test = keys(3, 1)
    expected = lit_model.predict(test)
    scores, labels, maps = Scorer(lit_model)(torch.from_numpy(test))
    assert np.allclose(scores, expected.scores, rtol=0, atol=1e-4)
    assert np.allclose(maps, expected.maps, rtol=0, atol=1e-4)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    to_onnx(lit_model, tmp_path / "model.onnx")
    dim = lit(test, 0.8)
    exported = OnnxScorer(tmp_path / "model.onnx")(dim)
    assert np.allclose(exported[0], lit_model.predict(dim).scores, rtol=0, atol=1e-4)


def test_the_card_says_that_light_is_evened(lit_model):
    assert "slow light evened out" in lit_model.card()


def test_lamps_change_a_judge_of_brightness_and_not_one_of_edges():
    good, defective = keys(20, 1), keys(8, 2, "stain")
    table = lamp_table(lambda x: -x.mean((1, 2, 3), dtype=float), good, defective)
    assert list(table.index) == ["own", "0.9", "1.1", "gradient"]
    assert table.loc["own", "change of false alarms"] == 0 and table.loc["0.9", "change of false alarms"] > 20
    assert np.array_equal(under_lamp(good, "0.9"), lit(good, 0.9))


def test_the_grey_levels_of_a_dark_data_set_are_spread_once_for_all():
    dim = (keys(40) // 5).astype(np.uint8)
    light = fit_light(dim, 1, max_gain=10)
    low, high = np.quantile(even_light(dim, light), DARKEST_AND_BRIGHTEST)
    assert light.gain > 3 and abs(low - SPREAD[0]) < 4 and abs(high - SPREAD[1]) < 8
    assert fit_light(dim, 1, max_gain=2).gain == 2
    brighter = np.clip(dim[:1].astype(int) + 40, 0, 255).astype(np.uint8)
    assert even_light(brighter, light).mean() > even_light(dim[:1], light).mean()


def test_pictures_that_use_the_grey_levels_stay_as_they_are():
    pictures = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    plain, free = fit_light(pictures, 1), fit_light(pictures, 1, max_gain=6)
    assert (free.low, free.gain) == (0, 1) and np.array_equal(even_light(pictures, free), even_light(pictures, plain))
    assert fit_light(pictures // 8, 1).gain == 1  # nobody asked


def test_black_pictures_have_no_levels_to_spread():
    light = fit_light(np.zeros((3, 64, 64, 3), np.uint8), 1, max_gain=6)
    assert (
        np.isfinite([light.low, light.gain]).all() and even_light(np.zeros((1, 64, 64, 3), np.uint8), light).max() < 20
    )


def test_a_model_and_its_export_keep_the_spread(lit_model, tmp_path):
    dim = keys(30) // 5
    before = lit_model.light_
    lit_model.light_ = fit_light(dim, 1, max_gain=6)
    assert lit_model.light_.gain > 2
    scores = lit_model.score_samples(dim[:4])
    lit_model.save(tmp_path / "a.grad")
    exported = Scorer(lit_model)(torch.from_numpy(dim[:4]))[0]
    lit_model.light_ = before
    again = GRAD.load(tmp_path / "a.grad", device="cpu")
    assert (again.light_.low, again.light_.gain) == (
        fit_light(dim, 1, max_gain=6).low,
        fit_light(dim, 1, max_gain=6).gain,
    )
    assert np.array_equal(again.score_samples(dim[:4]), scores)
    assert np.allclose(exported, scores, rtol=0, atol=1e-4)
