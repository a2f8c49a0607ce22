"""A detector of single pixels: its field, its geometry, its training, and its place in a model, a file and a run."""

import json

import numpy as np
import pytest
import torch
from shared import PLAIN, TINY, do_all, pictures, randn, rng, same_weights, seeded, tiny

from grad_nb.config import Level, PixelConfig, Preset, from_dict, override, preset, to_dict, trained_levels
from grad_nb.contrastive import make_contrastive, noise_pictures
from grad_nb.core.files import read_array, read_json
from grad_nb.core.loop import TimeUp
from grad_nb.core.tensors import read_tensors
from grad_nb.detector import Detector, load_detector, map_side, save_detector
from grad_nb.evaluation import MapStats, score_levels, score_maps
from grad_nb.grad import GRAD
from grad_nb.level_1 import PixelDetector, draw_pixels, train_pixel_detector
from grad_nb.patches import PATCH, STRIDE
from grad_nb.student import Student, student_maps
from grad_nb.use.export import Scorer, largest_difference

SHORT = PixelConfig(width=8, octaves=2, steps=6, pictures=2, pixels=64)
LEVEL_1 = {"level_1": True, "pixel__width": 8, "pixel__steps": 4, "pixel__pictures": 2, "pixel__pixels": 64}


def net(octaves=2):
    "A detector of random weights in float64."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return PixelDetector(8, octaves).double()


@pytest.mark.parametrize("size", [34, 37, 38, 50, 64, 96])
def test_its_map_has_the_geometry_of_a_detector(size):
    x = randn(2, 5, size, size)
    made = net()
    assert made(x).shape == Detector(0.05).double()(x).shape == (2, 1, map_side(size), map_side(size))
    assert made.features(x).shape == (2, made.head.in_channels, map_side(size), map_side(size))


def test_the_field_of_a_pixel_is_that_pixel():
    x = randn(1, 5, 40, 40).requires_grad_()
    for row, column in ((0, 0), (20, 31), (39, 39)):
        (seen,) = torch.autograd.grad(net().pixels(x)[0, 0, row, column], x)
        assert seen[0].abs().sum(0).nonzero().tolist() == [[row, column]]


def test_the_field_of_a_cell_is_its_patch():
    x = randn(1, 5, 60, 60).requires_grad_()
    (seen,) = torch.autograd.grad(net()(x)[0, 0, 2, 5], x)
    at = seen[0].abs().sum(0).nonzero()
    first = torch.tensor([2 * STRIDE, 5 * STRIDE])
    assert torch.equal(at.min(0).values, first) and torch.equal(at.max(0).values, first + PATCH - 1)


def test_a_cell_is_the_mean_over_its_pixels_and_over_their_features():
    made, x = net(), randn(2, 5, 50, 50)
    pixels = made.pixels(x)
    patches = pixels.unfold(2, PATCH, STRIDE).unfold(3, PATCH, STRIDE).mean((-1, -2))
    assert torch.allclose(made(x), patches) and torch.allclose(made(x), made.classify(made.features(x)))


def test_the_order_of_pixels_does_not_matter_without_coordinates():
    made, x = net(), randn(1, 5, 34, 34)
    mixed = x.flatten(2)[..., torch.randperm(34**2, generator=seeded())].view_as(x)
    assert torch.allclose(made(x), made(mixed)), "each pixel takes its coordinates along"
    mixed[:, 3:] = x[:, 3:]
    assert not torch.allclose(made(x), made(mixed)), "colours alone change places"
    with torch.no_grad():
        made.body[0].weight[:, 3:] = 0
    assert torch.allclose(made(x), made(mixed))


def test_noise_is_uniform_and_independent_and_the_same_for_a_seed():
    noise = noise_pictures(32, 48, 3)
    assert noise.shape == (32, 48, 48, 3) and noise.dtype == np.uint8
    assert np.array_equal(noise, noise_pictures(32, 48, 3)) and not np.array_equal(noise, noise_pictures(32, 48, 4))
    counts = np.bincount(noise.ravel(), minlength=256)
    expected = noise.size / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * np.sqrt(2 * 255), "chi squared"
    x = noise / 127.5 - 1
    for shifted in (np.roll(x, 1, 0), np.roll(x, 1, 1), np.roll(x, 1, 2), np.roll(x, 1, 3)):
        assert abs(np.corrcoef(x.ravel(), shifted.ravel())[0, 1]) < 5 / np.sqrt(x.size)


def test_noise_and_normal_pixels_lie_at_the_same_places():
    coloured = np.zeros((3, 40, 40, 3), np.uint8)
    coloured[:, :, 20:] = 255
    made = noise_pictures(4, 20)
    drawn = draw_pixels(coloured, made, SHORT, PLAIN, seeded())
    assert drawn.shape == (1, 5, 2, 64) and torch.equal(drawn[0, 3:, 0], drawn[0, 3:, 1])
    assert torch.equal(drawn[0, 0, 0] > 0, drawn[0, 3, 0] > 0), "white where x is positive"
    colours = {tuple(c) for c in made.reshape(-1, 3).tolist()}
    found = ((drawn[0, :3, 1].T + 1) * 127.5).round().long().tolist()
    assert all(tuple(colour) in colours for colour in found), "read without interpolation"
    ramp = np.zeros((1, 20, 20, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(20), np.arange(20)[:, None]
    drawn = draw_pixels(coloured, ramp, SHORT, PLAIN, seeded())[0]
    at = ((drawn[3:, 1] + 1) / 2 * 39).round().long()
    assert torch.equal(((drawn[:2, 1] + 1) * 127.5).round().long(), at // 2), "at the same place of a smaller picture"


def trained(checkpoint=None, seed=0, coordinates=True, config=SHORT):
    "A detector after a few steps."
    made = noise_pictures(4, 48)
    return train_pixel_detector(
        pictures(5, 40), made, config, PLAIN, coordinates, seed, "detector-1", "cpu", checkpoint, False
    )


def test_a_seed_gives_the_same_detector():
    once, again, other = trained(), trained(), trained(seed=1)
    assert same_weights(once[0], again[0]) and once[1].equals(again[1]) and not same_weights(once[0], other[0])
    assert list(once[1]) == ["loss", "loss_normal", "loss_noise"] and len(once[1]) == 6


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    from grad_nb.core import loop

    for coordinates in (True, False):
        whole, history = trained(coordinates=coordinates)
        left = iter([1.0] * 4)
        file = tmp_path / f"checkpoint-{coordinates}"
        with monkeypatch.context() as patched:
            patched.setattr(loop, "time_left", lambda left=left: next(left, 0.0))
            with pytest.raises(TimeUp):
                trained(file, coordinates=coordinates)
        resumed, again = trained(file, coordinates=coordinates)
        assert history.equals(again) and same_weights(whole, resumed)


def test_without_coordinates_it_does_not_see_them():
    made, _ = trained(coordinates=False)
    assert not made.body[0].weight[:, 3:].any() and made.body[0].weight[:, :3].any()
    assert trained()[0].body[0].weight[:, 3:].any()


def test_a_colour_is_right_in_its_place_alone():
    left_dark = np.full((6, 48, 48, 3), 40, np.uint8)
    left_dark[:, :, 24:] = 200
    left_dark += rng(0).integers(0, 30, left_dark.shape, dtype=np.uint8)
    config = PixelConfig(width=24, octaves=1, steps=150, pictures=4, pixels=1024, lr=0.01)
    made, history = train_pixel_detector(left_dark, noise_pictures(8, 48), config, PLAIN, progress=False)
    assert history.loss.tail(10).mean() < 0.3 * history.loss.iloc[0]
    asked = np.stack([left_dark[0], left_dark[0, :, ::-1], np.roll(left_dark[0], 1, 1)])
    normal, mirrored, moved = score_maps(made, asked, 48).max((1, 2))
    assert mirrored > normal + 3, "both colours are known, and each is in the other's place"
    assert abs(moved - normal) < 0.3 * (mirrored - normal), "an edge that moves by a pixel hardly matters"


def test_every_way_to_score_gives_its_map():
    from grad_nb.accel import ops
    from grad_nb.inference.captured import Captured

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        nets = [Detector(0.1).eval(), PixelDetector(8).eval()]
    x = pictures(5, 48)
    found = score_levels(nets, x, [64, 48])
    with ops.use("reference"):
        plain = score_levels(nets, x, [64, 48])
    assert all(np.allclose(a, b, atol=1e-4) for a, b in zip(found, plain))
    assert np.array_equal(found[1][2], score_maps(nets[1], x[2:3], 48)[0]), "whatever is beside it"
    for bf16, near in ((None, 1e-4), (False, 1e-4), (True, 0.03)):  # as a CPU does, and as CUDA would
        batches = list(Captured(nets, [64, 48], 2, 48, "cpu", bf16).stream(x))
        maps = [np.concatenate(parts) for parts in zip(*batches)]
        assert all(np.allclose(a, b, atol=near) for a, b in zip(found, maps))


@pytest.mark.parametrize("made", [PixelDetector(8, 1), PixelDetector(), Detector(0.1)])
def test_it_is_read_as_it_was_written(tmp_path, made):
    save_detector(tmp_path / "detector.safetensors", made, 48, 1)
    again, about = load_detector(tmp_path / "detector.safetensors")
    assert type(again) is type(made) and same_weights(again, made)
    assert {name: about[name] for name in ("size", "level")} == {"size": 48, "level": 1}
    x = pictures(2, 48)
    assert np.array_equal(score_maps(again, x, 48), score_maps(made, x, 48))


def test_the_setting_adds_a_row_and_noise():
    for layout, size in (("mvtec_ad", 96), ("mvtec_loco", 96)):
        off, on = preset("demo", layout), override(preset("demo", layout), {"level_1": "true"})
        assert on.levels(layout) == (*off.levels(layout), Level(1, size, (0,)))
        assert on.generator_levels(layout) == (0, *off.generator_levels(layout))
        assert trained_levels(on.generator_levels(layout)) == off.generator_levels(layout)
    assert override(preset("paper"), {"level_1": True}).levels("mvtec_loco")[-1] == Level(1, 64, (0,))
    assert not any(preset(name).level_1 for name in ("paper", "paper-ours", "fast", "demo"))
    assert from_dict(Preset, json.loads(json.dumps(to_dict(on)))) == on
    with_row = {"levels_ad": (Level(34, 96, (3,)), Level(1, 96, (0,)))}
    with pytest.raises(ValueError, match="level 1 already"):
        override(preset("demo"), with_row | {"level_1": True})


@pytest.mark.parametrize("level, generators", [(1, (3,)), (1, (0, 3)), (34, (0,)), (34, (0, 3)), (1, ())])
def test_noise_and_level_1_belong_together(level, generators):
    with pytest.raises(ValueError, match="learns from noise"):
        Level(level, 96, generators)


@pytest.mark.parametrize("wrong", [{"width": 0}, {"steps": 0}, {"octaves": -1}, {"warm_up": 1.0}, {"lr": -1.0}])
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PixelConfig(**wrong)


def test_level_0_trains_nothing(tmp_path):
    config = override(preset("demo").generator, {"n_samples": 3, "size": 16})
    figures, files = make_contrastive(tmp_path, pictures(4, 16), 0, config, seed=2, progress=False)
    assert files == ["contrastive/level-00.npy", "history/generate-00.csv"] and figures["level"] == 0
    assert np.array_equal(read_array(tmp_path / files[0]), noise_pictures(3, 16, 2))
    assert {path.name for path in tmp_path.rglob("*.*")} == {"level-00.npy", "generate-00.csv"}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    "A model, the model with level 1 from the same stages, and when these were written."
    folder = tmp_path_factory.mktemp("work")
    x = pictures(12, 64)
    plain = tiny().set_params(work_dir=folder).fit(x)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    return plain, tiny(**LEVEL_1).set_params(work_dir=folder).fit(x), before


def test_all_other_stages_of_a_fit_stay(fitted):
    plain, made, before = fitted
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert [row.level for row in made.levels_] == [34, 1] and len(made.stats_) == 2
    assert same_weights(plain.detectors_[0], made.detectors_[0]) and isinstance(made.detectors_[1], PixelDetector)
    x = pictures(3, 64, seed=5)
    maps = [(m - s.mean) / s.std for m, s in zip(made._maps(x), made.stats_)]
    assert not np.array_equal(plain.score_samples(x), made.score_samples(x))
    assert maps[0].shape == maps[1].shape


def test_a_model_with_level_1_is_kept_explains_and_describes_itself(fitted, tmp_path):
    _, made, _ = fitted
    made.save(tmp_path / "made.grad")
    again = GRAD.load(tmp_path / "made.grad", "cpu")
    x = pictures(3, 64, seed=5)
    assert np.array_equal(again.score_samples(x), made.score_samples(x)) and again.preset_ == made.preset_
    why = again.explain(x[0])
    assert [level.level for level in why.levels] == [34, 1] and why.levels[1].contrastive.generator == 0
    assert why.plot() is not None and "level 1 at 96 px" in again.card()


def test_a_model_without_has_a_file_as_before(fitted, tmp_path):
    plain, made, _ = fitted
    for model in (plain, made):
        model.save(tmp_path / "model.grad")
        _, meta = read_tensors(tmp_path / "model.grad")
        assert ({"pixel", "level_1"} <= set(meta["preset"])) == (model is made)
        assert meta["format"] == (4 if model is made else 3)


def test_an_export_judges_as_the_model_does(fitted):
    _, made, _ = fitted
    x = pictures(3, 64, seed=5)
    expected = made.predict(x)
    scores, labels, maps = Scorer(made).eval()(torch.from_numpy(x))
    assert np.allclose(scores.numpy(), expected.scores, atol=1e-4)
    assert np.allclose(maps.numpy(), expected.maps, atol=1e-4) and labels.numpy().tolist() == expected.labels.tolist()


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_files_of_other_runtimes_judge_as_the_model_does(fitted, tmp_path, kind):
    from grad_nb.use.export import FORMATS

    pytest.importorskip("onnxscript")
    pytest.importorskip({"onnx": "onnxruntime", "openvino": "openvino"}[kind])
    _, made, _ = fitted
    ending, write, read = FORMATS[kind]
    write(made, tmp_path / f"made{ending}")
    assert largest_difference(made, read(tmp_path / f"made{ending}"), pictures(3, 64, seed=5)) < 1e-3


def test_one_network_learns_its_map_too(fitted, tmp_path):
    x = pictures(12, 64)
    student = {"student__width": 8, "student__steps": 3, "student__batch": 4}
    one = tiny(**LEVEL_1, **student).set_params(work_dir=tmp_path, one_network=True).fit(x)
    first, second = one.student_.branches
    assert second.side == first.side and not second.halvings and len(one.student_.heads) == 2
    maps = student_maps(one.student_, x[:2])
    assert maps[0].shape == maps[1].shape and not np.allclose(maps[0], maps[1])
    one.save(tmp_path / "one.grad")
    assert np.array_equal(GRAD.load(tmp_path / "one.grad", "cpu").score_samples(x), one.score_samples(x))


def test_one_network_for_every_preset():
    for layout in ("mvtec_ad", "mvtec_loco"):
        for name in ("paper", "paper-ours", "fast", "demo"):
            chosen = override(preset(name, layout), {"level_1": True})
            student = Student(chosen.levels(layout), chosen.generator.size, chosen.student)
            assert student.branches[-1].side == map_side(chosen.levels(layout)[-1].size)
            assert student.branches[:-1] == Student(preset(name, layout).levels(layout), chosen.generator.size).branches


def test_a_student_has_no_lessons_of_noise(monkeypatch, tmp_path):
    from grad_nb import grad

    seen = []
    monkeypatch.setattr(grad, "make_student", lambda folder, teachers, levels, normals, sets, *rest: seen.append(sets))
    chosen = tiny(**LEVEL_1).set_params(work_dir=tmp_path, one_network=True)
    with pytest.raises(TypeError):  # what stands in its place makes nothing
        chosen.fit(pictures(12, 64))
    noise = noise_pictures(4, 64)
    assert len(seen[0]) == 3 and not any(np.array_equal(made, noise) for made in seen[0])


def test_tiles_and_level_1(tmp_path, monkeypatch):
    monkeypatch.setattr("grad_nb.grad.TILES_TO_LEARN", 8)
    large = list(rng(0).integers(0, 256, (10, 150, 170, 3), dtype=np.uint8))
    made = tiny(**LEVEL_1).set_params(tile=128, explain_patches=8).fit(large)
    assert not made.detectors_[1].body[0].weight[:, 3:].any(), "a tile may lie anywhere"
    found = made.predict(large[:2])
    made.save(tmp_path / "tiles.grad")
    assert np.array_equal(GRAD.load(tmp_path / "tiles.grad", "cpu").predict(large[:2]).scores, found.scores)


def test_the_key_of_a_watcher_knows_its_weights(fitted):
    from grad_nb.use.watch import model_key

    _, made, _ = fitted
    before = model_key(made)
    weight = made.detectors_[1].head.weight
    with torch.no_grad():
        weight.add_(1.0)
        assert model_key(made) != before
        weight.sub_(1.0)


def test_files_that_ask_for_noise_elsewhere_are_refused(fitted, tmp_path):
    from grad_nb.core.tensors import write_tensors

    _, made, _ = fitted
    made.save(tmp_path / "made.grad")
    tensors, meta = read_tensors(tmp_path / "made.grad")
    for row in ({"level": 34, "size": 96, "generators": [0]}, {"level": 0, "size": 96, "generators": [3]}):
        changed = meta | {"preset": meta["preset"] | {"levels_ad": [row]}}
        write_tensors(tmp_path / "wrong.grad", tensors, changed)
        with pytest.raises(ValueError, match="does not fit its own settings"):
            GRAD.load(tmp_path / "wrong.grad", "cpu")


SETTINGS = f"{TINY} level_1=true pixel.width=8 pixel.steps=4 pixel.pictures=2 pixel.pixels=64"


def folder_of(tmp_path, kind):
    "Trays in the layout of LOCO, with validation pictures, or of one detector and no validation."
    from grad_nb.datasets.trays import make_trays

    validation = 3 if kind == "trays" else 0
    counts = dict(train=12, validation=validation, good=3, logical=3, structural=3)
    return make_trays(tmp_path / kind, seed=1, size=64, **counts, progress=False).parent


@pytest.mark.parametrize("kind", ["trays", "alone"])
def test_a_finished_run_gets_level_1_and_keeps_everything_else(tmp_path, kind):
    from grad_nb.runs.driver import plan
    from grad_nb.runs.stages import holds_out, open_run, result_table
    from grad_nb.study.figures import by_level, field_arrays
    from grad_nb.use.gallery import model_of_run

    parts = (str(folder_of(tmp_path, kind)), "trays", "demo", 0, tmp_path / "runs")
    plain = open_run(*parts, TINY, "cpu", False)
    before = do_all(plain)
    stamps = {path: path.stat().st_mtime_ns for path in plain.folder.rglob("*") if path.is_file()}
    run = open_run(*parts, SETTINGS, "cpu", False)
    assert not holds_out(run) or holds_out(plain)
    left = [[task.name for task in phase] for phase in plan(run)]
    assert left == [["generate-00"], ["detect-001"], ["table"]]
    result = do_all(run)
    changed = {path.relative_to(plain.folder).parts[0] for path, t in stamps.items() if path.stat().st_mtime_ns != t}
    assert changed <= {"evaluate.json", "result.json", "scores.csv", "maps.npy", "manifest.json"}
    assert result["by_level"]["34"]["image_auroc"] == before["image_auroc"] and "1" in result["by_level"]
    assert {"generate-00", "detect-001"} < set(result["stages"])
    assert "  level 1 alone" in result_table(result).index and np.isfinite(result["image_auroc"])
    assert set(by_level(run, 2)) == {"real", *(f"level {n}" for n in run.generator_levels)}
    assert tuple(field_arrays(run)["supports"]) == plain.generator_levels, "what sees nothing has no field to draw"
    model, where = model_of_run(run.folder, run.category, read_json(run.folder / "result.json"), "cpu")
    assert isinstance(model.detectors_[1], PixelDetector)
    assert ("held-out" in where) == (kind == "trays") != ("training pictures" in where)
    again = do_all(plain)
    assert again["image_auroc"] == before["image_auroc"], "and back"


def test_the_page_of_a_run_without_held_out_pictures_judges_as_the_run_did(tmp_path):
    from grad_nb.runs.stages import open_run
    from grad_nb.use.gallery import model_of_run

    run = open_run(str(folder_of(tmp_path, "alone")), "trays", "demo", 0, tmp_path / "runs", SETTINGS, "cpu", False)
    result = do_all(run)
    model, where = model_of_run(run.folder, run.category, result, "cpu")
    kept = [read_array(run.folder / f"scores/held-{row.level:03d}.npy") for row in run.levels]
    assert len(kept) == 2 and model.stats_ == [MapStats.of(maps) for maps in kept]
    assert "training pictures, since none were held out" in where


def test_threads_of_the_other_stages_stay(monkeypatch, tmp_path):
    from grad_nb.runs import driver
    from grad_nb.runs.stages import open_run

    parts = (str(folder_of(tmp_path, "alone")), "trays", "demo", 0, tmp_path / "runs")
    for cores in (1, 2, 5, 16):
        monkeypatch.setattr(driver, "cpu_count", lambda cores=cores: cores)
        plain, made = (
            {task.name: task.threads for phase in driver.plan(open_run(*parts, text, "cpu", False)) for task in phase}
            for text in (TINY, SETTINGS)
        )
        assert {name: made[name] for name in plain} == plain and made["generate-00"] == made["detect-001"] == 1


def test_keys_without_it_know_nothing_of_it(tmp_path):
    from grad_nb.runs.stages import detect_key, generate_key, open_run, student_key

    parts = (str(folder_of(tmp_path, "alone")), "trays", "demo", 0, tmp_path / "runs")
    off, other, on = (
        open_run(*parts, f"{TINY} {more}", "cpu", False) for more in ("", "pixel.steps=7", "level_1=true")
    )
    for level in off.generator_levels:
        assert generate_key(off, level) == generate_key(other, level) == generate_key(on, level)
    assert detect_key(off, 34) == detect_key(other, 34) == detect_key(on, 34)
    assert student_key(off) == student_key(other) != student_key(on)
    assert detect_key(on, 1) != detect_key(open_run(*parts, f"{TINY} level_1=true pixel.steps=7", "cpu", False), 1)
    trunk = f"{TINY} generator.shared=true generator.field_of=network"
    shared = [open_run(*parts, f"{trunk} {more}", "cpu", False) for more in ("", "level_1=true")]
    assert generate_key(shared[0], 3) == generate_key(shared[1], 3), "also where generators share a trunk"


def test_an_ablation_refuses_it_before_any_training(tmp_path):
    from grad_nb.study.ablation import cells, open_ablation

    rest = (tmp_path / "runs", tmp_path / "ablation", "cpu")
    with pytest.raises(ValueError, match="without level_1"):
        cells(open_ablation(str(folder_of(tmp_path, "alone")), "trays", "demo", [0], "table4", SETTINGS, *rest))


def test_how_long_it_takes_can_be_guessed():
    from grad_nb.study.calibration import pixel_seconds

    assert 0 < pixel_seconds(SHORT, Level(1, 40, (0,))) < float("inf")


def test_table_4_leaves_it_out(tmp_path):
    from grad_nb.study.variants import rows_of_table_4, table_4_presets

    for name in ("fast", "demo"):
        for layout in ("mvtec_ad", "mvtec_loco"):
            off = preset(name, layout)
            on = override(off, {"level_1": True})
            assert rows_of_table_4(on, layout) == rows_of_table_4(off, layout)
            assert {k: p.levels(layout) for k, p in table_4_presets(on, layout).items()} == {
                k: p.levels(layout) for k, p in table_4_presets(off, layout).items()
            }
