"""Pictures in tiles: how they are cut and joined, what a model with tiles keeps, and what they are worth."""

import json
import re
import tracemalloc
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import label
from shared import pictures, seeded, tiny

from grad_nb import grad
from grad_nb.config import Level, override, preset
from grad_nb.core.tensors import read_tensors
from grad_nb.datasets.large import LARGE, draw_large, make_large, small_mark
from grad_nb.datasets.light import even_light, even_tiles, fit_light
from grad_nb.datasets.readers import DataError, hold_out, read_category
from grad_nb.evaluation import image_auroc
from grad_nb.grad import GRAD
from grad_nb.inference.tiles import Tiling, check_tile, cut_tiles, join_matrix, judge_in_tiles, random_tiles
from grad_nb.use.daily import grad_export, grad_fit, grad_predict
from grad_nb.use.evaluate import grad_evaluate
from grad_nb.use.export import (
    OnnxScorer,
    OpenvinoScorer,
    TorchScorer,
    largest_difference,
    read_normals,
    to_int8,
    to_onnx,
    to_openvino_int8,
    to_torch,
)
from grad_nb.use.watch import watch

SIZE, TILE = 300, 96


@pytest.fixture(scope="module")
def large():
    "Pictures of 300 pixels."
    return [draw_large(np.random.default_rng(i), SIZE)[0] for i in range(8)]


@pytest.fixture(scope="module")
def few_tiles():
    "So few tiles that a model learns from them in seconds."
    patch = pytest.MonkeyPatch()
    patch.setattr(grad, "TILES_TO_LEARN", 12)
    patch.setattr(grad, "FEWEST_TILES", 2)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def model(large, few_tiles) -> GRAD:
    return tiny().set_params(tile=TILE).fit(large)


def tiling(tile=64, size=64, sides=(64,), map_size=256, placement="geometry", blur=1) -> Tiling:
    return Tiling(tile, size, sides, map_size, placement, blur, 1.0)


def darkness(side):
    "A judge: how dark the middle of each patch is, as a detector of that side would place it."

    def judge(tiles, whole, windows):
        x = torch.from_numpy(255.0 - tiles.mean(-1)).float()[:, None]
        x = torch.nn.functional.interpolate(x, (side, side), mode="area") if x.shape[-1] != side else x
        h = (side - 34) // 4 + 1
        middle = x[:, 0, 16 : 16 + 4 * h, 16 : 16 + 4 * h]
        return [torch.nn.functional.max_pool2d(middle, 4, 4).numpy()]

    return judge


@pytest.mark.parametrize("placement", ["geometry", "patch", "stretch"])
@pytest.mark.parametrize("side, size, tile, length", [(64, 64, 64, 300), (96, 64, 128, 1000), (34, 34, 50, 333)])
def test_tiles_cover_a_side_and_their_weights_sum_to_one(placement, side, size, tile, length):
    t = tiling(tile, size, (side,), 200, placement)
    starts = t.starts(length)
    assert starts[0] == 0 and starts[-1] == length - tile and t.starts(tile) == (0,)
    steps = np.diff(starts)
    cells = (side - 34) // 4 + 1
    assert (steps <= max(tile - 34 * tile / side, 4 * tile / side) + 1).all() and np.ptp(steps) <= 1
    matrix = join_matrix(starts, length, tile, side, 200, placement)
    assert matrix.shape == (len(starts), 200, cells)
    assert torch.allclose(matrix.sum((0, 2)), torch.ones(200), atol=1e-5) and (matrix >= 0).all()


def test_of_tiles_too_a_map_may_show_positive_values_alone():
    plain = tiling(sides=(64, 64))

    def waves(tiles, whole, windows):
        cells = np.sin(np.arange(64.0)).reshape(1, 8, 8).repeat(len(tiles), 0).astype(np.float32)
        return [cells, 2 * cells]

    def positive(tiles, whole, windows):
        return [np.maximum(cells - 0.5, 0) for cells in waves(tiles, whole, windows)]

    picture = np.zeros((300, 500, 3), np.uint8)
    found = judge_in_tiles(picture, replace(plain, zeros=(0.5, 0.5)), waves)
    assert found.score == judge_in_tiles(picture, plain, waves).score
    assert np.array_equal(found.heat_map, judge_in_tiles(picture, plain, positive).heat_map)


def test_a_constant_stays_a_constant_and_a_slope_a_slope():
    t = tiling()

    def constant(tiles, whole, windows):
        return [np.full((len(tiles), 8, 8), 2.5, np.float32)]

    found = judge_in_tiles(np.zeros((300, 500, 3), np.uint8), t, constant)
    assert found.score == 2.5 and np.allclose(found.heat_map, 2.5, atol=1e-5)

    def slope(tiles, whole, windows):
        at = windows[:, :1] + windows[:, 2:3] * (17 + 4 * np.arange(8)) / 64  # of each cell, as a share of the width
        return [np.repeat(at[:, None], 8, 1).astype(np.float32)]

    joined = judge_in_tiles(np.zeros((300, 300, 3), np.uint8), t, slope).heat_map
    wanted = (np.arange(256) + 0.5) / 256
    inside = slice(20, 236)  # beyond the first and last cell the map stays as it is there
    assert np.abs(joined[:, inside] - wanted[inside]).max() < 1 / 256


@pytest.mark.parametrize("size, side, tile", [(64, 64, 64), (64, 96, 128), (128, 128, 256)])
def test_a_defect_across_a_border_is_one_region_in_its_place(size, side, tile):
    t = tiling(tile, size, (side,), 512)
    border = t.starts(900)[1] + tile // 4  # where the first two tiles overlap, or end
    for row, column in ((border, border), (t.starts(900)[1], 450), (tile, t.starts(900)[2])):
        picture = np.full((900, 900, 3), 200, np.uint8)
        picture[row - 10 : row + 10, column - 10 : column + 10] = 20
        heat = judge_in_tiles(picture, t, darkness(side)).heat_map
        regions, count = label(heat > (heat.min() + heat.max()) / 2)
        assert count == 1
        middle = np.mean(np.nonzero(regions), 1) * 900 / 512
        assert np.abs(middle - (row, column)).max() < 4 * tile / side + 2


def test_the_score_is_the_highest_cell_and_memory_that_of_a_row_of_tiles():
    rows = []

    def judge(tiles, whole, windows):
        rows.append(len(tiles))
        return [np.full((len(tiles), 8, 8), windows[0, 1], np.float32)]

    picture = np.zeros((6000, 5000, 3), np.uint8)
    t = tiling(600, 64, (64,))
    judge_in_tiles(picture[:600, :600], t, judge)  # what is cached
    rows.clear()
    tracemalloc.start()
    found = judge_in_tiles(picture, t, judge)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert set(rows) == {len(t.starts(5000))} and len(rows) == len(t.starts(6000))
    assert found.score == pytest.approx(5400 / 6000) and found.corner[0] == 5400
    assert peak < 30e6 < picture.nbytes


def test_of_several_levels_the_tile_of_the_score_is_shown():
    t = tiling(64, 64, (64, 64))
    picture = np.zeros((64, 128, 3), np.uint8)

    def judge(tiles, whole, windows):
        cells = np.zeros((2, len(tiles), 8, 8), np.float32)
        cells[0, 0, 0, 0] = cells[1, 0, 7, 7] = 10  # at different places of the first tile
        cells[:, -1, 4, 4] = 8
        return list(cells)

    found = judge_in_tiles(picture, t, judge)
    assert found.corner == (0, t.starts(128)[-1])
    half = found.heat_map.shape[1] // 2
    assert found.heat_map[:, half:].max() > found.heat_map[:, :half].max()


def test_several_levels_count_alike_and_the_score_is_of_their_mean():
    t = tiling(sides=(64, 48))

    def judge(tiles, whole, windows):
        return [np.full((len(tiles), 8, 8), 1.0, np.float32), np.full((len(tiles), 4, 4), 3.0, np.float32)]

    found = judge_in_tiles(np.zeros((150, 150, 3), np.uint8), t, judge)
    assert found.score == pytest.approx(2, abs=1e-5) and np.allclose(found.heat_map, 2, atol=1e-5)


def test_tiles_are_evened_out_in_the_light_of_the_whole():
    normals = pictures(20, 64) // 4 + np.linspace(40, 150, 64).astype(np.uint8)[:, None, None]
    light = fit_light(normals, 2)
    bright = np.clip(normals[:1] * 1.3, 0, 255).astype(np.uint8)
    corners = [(r, c) for r in (0, 16, 32) for c in (0, 32)]
    tiles, windows = cut_tiles(bright[0], corners, 32, 32)
    evened, whole = even_tiles(tiles, bright, windows, light), even_light(bright, light)[0]
    for part, (r, c) in zip(evened, corners):
        assert np.abs(part.astype(int) - whole[r : r + 32, c : c + 32]).max() <= 1


def test_random_tiles_are_those_of_their_generator():
    picture = pictures(1, 200)[0]
    one, two = (random_tiles(picture, 64, 64, 5, seeded(3)) for _ in range(2))
    assert (one[0] == two[0]).all() and (one[1] == two[1]).all() and one[0].shape == (5, 64, 64, 3)
    for tile, (left, top, _, _) in zip(*one):
        row, column = round(top * 200), round(left * 200)
        assert (tile == picture[row : row + 64, column : column + 64]).all()


@pytest.mark.parametrize("wrong", [-1, 20, 2.5, True, "64", None])
def test_a_wrong_tile_is_named_before_the_training(wrong, large, monkeypatch):
    monkeypatch.setattr(GRAD, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="tile"):
        tiny().set_params(tile=wrong).fit(large)


def test_a_tile_larger_than_a_picture_or_smaller_than_what_is_seen_is_refused(large, tmp_path, monkeypatch):
    monkeypatch.setattr(GRAD, "_train", lambda *_: pytest.fail("trained"))
    for i, picture in enumerate(large):
        Image.fromarray(picture[: 200 if i == 5 else SIZE]).save(tmp_path / f"{i}.png")
    with pytest.raises(DataError, match="5.png has 300x200 pixels, less than a tile of 256; give larger"):
        tiny().set_params(tile=256).fit(tmp_path)
    with pytest.raises(ValueError, match="tile=100 is too small.*256 x 256 pixels; give 128 or more"):
        check_tile(100, 256)
    small = np.zeros((60, 300, 3), np.uint8)
    for use in (
        lambda: random_tiles(small, 64, 64, 1, seeded()),
        lambda: judge_in_tiles(small, tiling(), darkness(64)),
    ):
        with pytest.raises(ValueError, match="300x60 pixels, less than a tile of 64"):
            use()


def test_tiles_of_fine_detail_are_seen_at_twice_their_side_at_most(large, few_tiles, tmp_path):
    fine = np.random.default_rng(0).integers(0, 256, (6, 220, 220, 3), dtype=np.uint8)
    found = tiny(generator__max_detail_lost=0.5).set_params(tile=100).fit(fine)
    assert found.preset_.generator.size == 128, "256 pixels would need a tile of 128"
    found.save(tmp_path / "m.grad")
    assert GRAD.load(tmp_path / "m.grad", "cpu").tile_ == 100


def test_scores_and_maps_are_of_the_whole_picture(model, large, tmp_path):
    found = model.predict(large[:2])
    assert found.maps.shape == (2, 256, 256) and found.scores.shape == (2,)
    assert (model.score_samples(large[:2]) == found.scores).all()
    wide = np.concatenate([large[0], large[1]], 1)
    assert model.predict(wide).maps.shape == (1, 256, 256)
    assert model.predict(wide).scores[0] > found.scores.min() - 0.05
    assert model.n_pictures_ == (6, 2) and not model.preset_.detector.coordinates
    model.save(tmp_path / "m.grad")
    again = GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False)
    assert again.tile == again.tile_ == TILE and "tiles of 96 x 96 pixels" in again.card()
    kept = again.predict(large[:2])
    assert (kept.scores == found.scores).all() and (kept.maps == found.maps).all()
    assert read_tensors(tmp_path / "m.grad")[1]["format"] == 4
    new = [draw_large(np.random.default_rng(20 + i), SIZE)[0] for i in range(4)]
    assert again.calibrate(new, false_alarm_rate=0.3).offset_ in again.score_samples(new)
    with pytest.raises(ValueError, match="among those that the model learnt from"):
        again.calibrate([large[i] for i in hold_out(8, 0.25, 0)[0]])


def test_a_picture_without_room_for_a_tile_is_named_wherever_it_is_given(model, large, tmp_path):
    small = large[0][:80]
    for use in (model.explain, lambda x: model.predict([x, large[1]]), lambda x: model.evaluate([large[1], x], [0, 1])):
        with pytest.raises(DataError, match="less than a tile of 96; give larger pictures, or a model with a smaller"):
            use(small)
    Image.fromarray(large[1]).save(tmp_path / "0.png")
    Image.fromarray(small).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1.png has 300x80 pixels, less than a tile of 96"):
        read_normals(tmp_path, None, tile=TILE)
    assert len(read_normals(tmp_path, None, tile=64)) == 2


def test_predict_takes_another_tile_for_pictures_of_another_scale(model, large):
    twice = np.asarray(Image.fromarray(large[0]).resize((600, 600)))
    (want,), (found,) = model.score_samples(large[0]), model.predict(twice, tile=192).scores
    assert found == pytest.approx(want, abs=0.1)
    for wrong, words in ((0, "another model"), (20, "too small"), (1.5, "whole number")):
        with pytest.raises(ValueError, match=words):
            model.predict(large[0], tile=wrong)
    with pytest.raises(DataError, match="less than a tile of 96"):
        model.predict(large[0][:80])


def test_the_place_of_the_highest_score_is_explained_in_the_whole_picture(model, large):
    spoilt = large[0].copy()
    spoilt[200:220, 240:260] = (255, 0, 255)
    why = model.explain(spoilt)
    assert why.score == model.score_samples(spoilt)[0] and why.picture.shape == (SIZE, SIZE, 3)
    for level in why.levels:
        left, top, right, bottom = level.box
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE and level.normal.picture < 8
        assert abs(right - left - 34) <= 1


def test_a_picture_that_shrinks_by_more_than_four_is_said_once(large, caplog, few_tiles):
    whole = tiny().fit(large)
    said = [record.message for record in caplog.records if "times smaller" in record.message]
    assert len(said) == 1 and "a picture of 300 pixels is seen at 64 x 64, 4.69 times smaller" in said[0]
    assert "tile=128" in said[0]
    caplog.clear()
    whole.predict(large[:2])
    assert "times smaller" not in caplog.text
    whole.shrink_told_ = False
    for _ in range(2):
        whole.predict(large[:2])
    assert caplog.text.count("times smaller") == 1
    with pytest.raises(ValueError, match="fitted without tiles"):
        whole.predict(large[0], tile=96)
    caplog.clear()
    tiny().set_params(tile=TILE).fit(large)
    assert "times smaller" not in caplog.text


def test_a_folder_that_is_watched_is_judged_in_tiles(model, large, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(large[0]).save(tmp_path / "in/a.png")
    Image.fromarray(large[0][:80]).save(tmp_path / "in/b.png")
    good, small = watch(model, tmp_path / "in", every=0.01, looks=9)
    assert good["score"] == round(model.score_samples(large[0])[0], 6)
    assert "b.png has 300x80 pixels, less than a tile of 96" in str(small["error"])


@pytest.mark.parametrize("light", [1, -1])
def test_an_export_agrees_with_its_model_on_whole_pictures(light, model, large, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model.save(tmp_path / "m.grad")
    model = GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False)
    if light < 0:
        model.light_ = None
    to_onnx(model, tmp_path / "m.onnx")
    scorer = OnnxScorer(tmp_path / "m.onnx", threads=1)
    wide = np.concatenate([large[2], large[3]], 1)
    for given in (large[:2], [wide]):
        assert largest_difference(model, scorer, given) < 1e-4
    assert scorer.meta["kind"] == "grad_nb.TileScorer"
    four = np.asarray(Image.fromarray(large[0]).resize((2048, 2048)))
    scorer.meta = scorer.meta | {"tiling": json.dumps(json.loads(scorer.meta["tiling"]) | {"tile": 512})}
    expected, (scores, labels, maps) = model.predict(four, tile=512), scorer([four])
    assert np.abs(scores - expected.scores).max() < 1e-4 and np.abs(maps - expected.maps).max() < 1e-4
    assert (labels == expected.labels).all()


def test_levels_and_the_other_formats_agree_too(large, few_tiles, tmp_path):
    levels = (Level(34, 96, (3,)), Level(51, 64, (3,)))
    small = tiny()
    chosen = replace(small.preset, levels_ad=levels)
    fitted = small.set_params(preset=chosen, tile=TILE).fit(large)
    to_torch(fitted, tmp_path / "m.pt2")
    assert largest_difference(fitted, TorchScorer(tmp_path / "m.pt2"), large[:2]) < 1e-4
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    to_onnx(fitted, tmp_path / "m.onnx")
    assert largest_difference(fitted, OnnxScorer(tmp_path / "m.onnx", threads=1), large[:2]) < 1e-4
    to_int8(fitted, tmp_path / "m.int8.onnx", large[:3])
    scores, labels, maps = OnnxScorer(tmp_path / "m.int8.onnx", threads=1)(large[:2])
    assert np.isfinite(scores).all() and maps.shape == (2, 256, 256) and labels.dtype == bool


@pytest.mark.parametrize("sides", [(64,), (96, 64)])
def test_openvino_agrees_with_its_model_on_whole_pictures(sides, large, few_tiles, tmp_path, capsys):
    for name in ("onnx", "onnxscript", "openvino"):
        pytest.importorskip(name)
    small = tiny()
    levels = tuple(Level(34 + 17 * i, side, (3,)) for i, side in enumerate(sides))
    fitted = small.set_params(preset=replace(small.preset, levels_ad=levels), tile=TILE).fit(large)
    fitted.save(tmp_path / "m.grad")
    grad_export(str(tmp_path / "m.grad"), format="openvino")
    said, difference = capsys.readouterr().out.strip().splitlines()
    assert "tiles of 96, seen at 64 x 64 pixels" in said and float(difference.rsplit(" ", 1)[1]) < 1e-3
    scorer = OpenvinoScorer(tmp_path / "m.xml")
    assert scorer.meta["kind"] == "grad_nb.TileScorer" and json.loads(scorer.meta["tiling"])["tile"] == TILE
    new = [draw_large(np.random.default_rng(i), SIZE)[0] for i in (20, 21)]  # none of them set the threshold
    for given in (new, [np.concatenate(new, 1)]):
        expected, (scores, labels, maps) = fitted.predict(given), scorer(given)
        assert np.abs(scores - expected.scores).max() < 1e-4 and (labels == expected.labels).all()
        assert np.abs(maps - expected.maps).max() < 1e-3  # light that is rounded otherwise, as for whole pictures


def test_openvino_in_eight_bits_judges_in_tiles_too(model, large, tmp_path):
    for name in ("onnx", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(name)
    to_openvino_int8(model, tmp_path / "m.int8.xml", large[:3])
    scores, labels, maps = OpenvinoScorer(tmp_path / "m.int8.xml")(large[:2])
    assert np.isfinite(scores).all() and maps.shape == (2, 256, 256) and (labels == (scores > model.offset_)).all()


def test_a_labelled_folder_is_evaluated_in_tiles(model, large, tmp_path, capsys):
    masks = tmp_path / "parts/ground_truth/bad"
    for folder in (tmp_path / "parts/good", tmp_path / "parts/bad", masks):
        folder.mkdir(parents=True)
    for i, picture in enumerate(large[:6]):
        wide = np.concatenate([picture, large[6]], 1)
        mask = np.zeros(wide.shape[:2], np.uint8)
        if i >= 3:
            wide[100:130, 420:450], mask[100:130, 420:450] = (255, 0, 255), 255
            Image.fromarray(mask).save(masks / f"{i}.png")
        Image.fromarray(wide).save(tmp_path / f"parts/{'bad' if i >= 3 else 'good'}/{i}.png")
    model.save(tmp_path / "m.grad")
    strict = GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False)
    found = strict.evaluate(tmp_path / "parts")
    strict.offset_ = float(np.median(found.scores))
    strict.save(tmp_path / "m.grad")
    made = tmp_path / "out.json", tmp_path / "out.html"
    grad_evaluate(str(tmp_path / "m.grad"), str(tmp_path / "parts"), *map(str, made), device="cpu", quiet=True)
    figures, page = json.loads(made[0].read_text()), made[1].read_text()
    assert (found.scores == model.score_samples(list(found.paths))).all() and found.maps.shape == (6, 256, 256)
    assert 0 <= figures["au_pro"] <= 1 and f"AUROC              {figures['auroc']:.3f}" in capsys.readouterr().out
    shown = [Image.open(BytesIO(b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    assert len(shown) == 2 * page.count("<figure>") >= 6 and {picture.size for picture in shown} == {(320, 160)}


def test_the_page_judges_in_tiles(model, large):
    pn = pytest.importorskip("panel")
    from grad_nb.use.page import judged_views, make_page

    files = [encoded(large[0]), encoded(np.concatenate([large[1], large[2]], 1)), encoded(large[0][:80])]
    first, second, small = judged_views(model, files, ["a.png", "b.png", "c.png"])
    for view, picture in ((first, large[0]), (second, np.concatenate([large[1], large[2]], 1))):
        score = model.score_samples(picture)[0]
        assert any(f"score {score:.3f}" in pane.object for pane in view.select(pn.pane.HTML))
        (drawn,) = view.select(pn.pane.PNG)
        assert Image.open(BytesIO(drawn.object)).width > 300
    assert "c.png has 300x80 pixels, less than a tile of 96" in small.object
    assert make_page(model, "m.grad")[0].object.count("m.grad, threshold") == 1


def encoded(picture):
    "A picture as the bytes of a PNG file."
    with BytesIO() as buffer:
        Image.fromarray(picture).save(buffer, format="PNG")
        return buffer.getvalue()


def test_the_commands_know_tiles(large, few_tiles, tmp_path, capsys):
    (tmp_path / "good").mkdir()
    for i, picture in enumerate(large):
        Image.fromarray(picture).save(tmp_path / f"good/{i}.png")
    settings = "generator.width=8 generator.steps=5 generator.batch=2 generator.n_samples=4 generator.sample_steps=2"
    settings += " generator.max_detail_lost=1.0 detector.width=0.1 detector.steps=5 evaluation.map_size=64"
    path = str(tmp_path / "m.grad")
    grad_fit(str(tmp_path / "good"), path, "demo", tile=TILE, overrides=settings, device="cpu", quiet=True)
    assert GRAD.load(path).tile_ == TILE
    capsys.readouterr()
    grad_predict(path, str(tmp_path / "good/0.png"), maps=str(tmp_path / "maps"), device="cpu")
    one = capsys.readouterr().out
    grad_predict(path, str(tmp_path / "good/0.png"), tile=192, device="cpu")
    other = capsys.readouterr().out
    assert one.split(",")[3] != other.split(",")[3] and (tmp_path / "maps/0.png").is_file()
    grad_export(path, format="torch")
    assert "tiles of 96, seen at 64 x 64 pixels" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        grad_fit(str(tmp_path / "good"), path, "demo", tile=20, device="cpu", quiet=True)
    assert "tile=20 is too small" in capsys.readouterr().err


def test_large_trays_are_whole_seeded_and_marked(tmp_path):
    made = make_large(tmp_path, seed=4, size=256, train=4, good=1, defective=2, progress=False)
    category = read_category(made)
    assert category.has_masks and category.counts["train"] == 4
    for sample in category.test:
        if sample.label:
            mask = np.asarray(Image.open(sample.masks[0])) > 0
            assert 4 < mask.sum() < 24 * 24 and label(mask)[1] == 1
    assert make_large(tmp_path, seed=4, size=256, train=4, good=1, defective=2, progress=False) == made
    with pytest.raises(ValueError, match="something else"):
        make_large(tmp_path, seed=5, size=256, train=4, good=1, defective=2, progress=False)
    for seed in range(20):
        for kind in LARGE:
            rows, columns = np.nonzero(small_mark(kind, np.random.default_rng(seed))[0] >= 0.5)
            across = max(np.hypot(rows[:, None] - rows, columns[:, None] - columns).ravel()) + 1
            assert 14.5 <= across <= 25.5
    with pytest.raises(ValueError, match="no defect"):
        small_mark("dent", np.random.default_rng(0))


@pytest.mark.slow
def test_small_defects_of_large_pictures_are_found_with_tiles_alone(tmp_path):
    "Trays of 2,048 px with defects of 16 to 24 px, `demo` with fewer steps; `fast` finds more of them (any part)."
    made = make_large(tmp_path, seed=0, progress=False)
    category = read_category(made)
    files, truth = [s.path for s in category.test], [s.label for s in category.test]
    chosen = override(preset("demo"), {"generator.steps": 300, "generator.n_samples": 128, "detector.steps": 1200})
    found = {}
    for tile in (128, 0):
        model = GRAD(chosen, tile=tile, device="cpu", progress=False).fit(made / "train/good")
        found[tile] = image_auroc(model.score_samples(files), truth)
    print(found)
    assert found[128] >= 0.80 and found[128] - found[0] >= 0.15
