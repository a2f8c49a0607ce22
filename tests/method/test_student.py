"""One network for all levels: its cost, its geometry, its training, and its place in a model, a file and a run."""

import json

import numpy as np
import pytest
import torch
from shared import PLAIN, TINY, TINY_FIT, do_all, rng, seeded, tiny

from grad_nb.config import Level, StudentConfig, from_dict, override, preset, to_dict
from grad_nb.core.loop import TimeUp
from grad_nb.core.tensors import read_tensors
from grad_nb.datasets.light import even_light
from grad_nb.datasets.readers import resized
from grad_nb.detector import Detector, map_side
from grad_nb.grad import GRAD
from grad_nb.student import (
    Student,
    branches,
    draw_lessons,
    input_side,
    load_student,
    multiplications,
    paste_rectangles,
    save_student,
    student_maps,
    train_student,
)
from grad_nb.use.export import Scorer

THREE = (Level(34, 256, (5,)), Level(68, 128, (5,)), Level(136, 64, (5,)))
SMALL = StudentConfig(width=8, coarse_width=8, steps=6, batch=4)


def pictures(n, size=64, seed=0):
    "Noise."
    return rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("layout, most", [("mvtec_ad", 0.4e9), ("mvtec_loco", 0.6e9)])
@pytest.mark.parametrize("name", ["paper", "paper-ours", "fast", "demo"])
def test_it_takes_few_multiplications(name, layout, most):
    chosen = preset(name, layout)
    student = Student(chosen.levels(layout), chosen.generator.size, chosen.student)
    assert multiplications(student) <= most


@pytest.mark.parametrize("picture, side", [(256, 256), (200, 256), (128, 128), (64, 64), (32, 64), (300, 256)])
def test_the_input_is_the_smallest_in_which_nothing_is_lost(picture, side):
    assert input_side(THREE, picture) == side


@pytest.mark.parametrize("picture", [256, 128, 64])
def test_a_cell_sees_its_patch_and_little_more(picture):
    student = Student(THREE, picture, SMALL).double()
    x = torch.full((1, 3, student.size, student.size), 128.0, dtype=torch.float64, requires_grad=True)
    for layer in student.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.constant_(layer.weight, 0.01)
    for row, branch, maps in zip(THREE, student.branches, student(x)):
        assert maps.shape == (1, branch.side, branch.side) and branch.side == map_side(row.size)
        i = branch.side // 2
        (seen,) = torch.autograd.grad(maps[0, i, i], x, retain_graph=True)
        at = seen[0, 0].abs().sum(0).nonzero().flatten()
        low, high = (int(edge) * row.size / student.size for edge in (at.min(), at.max() + 1))
        assert low <= 4 * i + 1 and high >= 4 * i + 33, "its patch, but for a pixel at the border"
        assert low >= 4 * i - 8 and high <= 4 * i + 34 + 8, "and a quarter of the patch on each side at most"
        assert abs((low + high) / 2 - (4 * i + 17)) <= 1, "in its middle"


def test_levels_of_any_other_size_are_refused():
    with pytest.raises(ValueError, match="96, 64 px"):
        branches((Level(34, 96, (5,)), Level(51, 64, (5,))))
    model = GRAD(override(preset("demo"), {"levels_loco": (Level(34, 96, (5,)), Level(51, 64, (5,)))}), "mvtec_loco")
    with pytest.raises(ValueError, match="one network"):
        model.set_params(one_network=True).fit(pictures(8))


def test_two_levels_of_one_size_share_everything_but_the_head():
    first, second = branches((Level(34, 96, (5,)), Level(35, 96, (5,))))
    assert first.layers and not second.layers and not second.halvings and first.side == second.side


def test_rectangles_come_from_other_pictures():
    grey = torch.arange(4.0)[:, None, None, None].expand(4, 3, 32, 32)
    made = paste_rectangles(grey, 1.0, seeded())
    assert set(made.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0} and (made != grey).any()
    assert torch.equal(paste_rectangles(grey, 0.0, seeded()), grey)


def test_half_of_the_lessons_are_contrastive():
    dark, bright = np.zeros((5, 64, 64, 3), np.uint8), np.full((5, 64, 64, 3), 255, np.uint8)
    drawn = draw_lessons(dark, [bright, bright], StudentConfig(batch=8, paste=0.0), PLAIN, seeded())
    assert drawn.shape == (8, 64, 64, 3) and drawn.dtype == torch.uint8
    assert (drawn.float().mean((1, 2, 3)) > 128).sum() == 4


def trained(checkpoint=None, **changes):
    "A student of a random detector after a few steps."
    levels = (Level(34, 64, (5,)),)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Detector(0.1).eval()
    config = StudentConfig(**{"width": 8, "steps": 6, "batch": 4} | changes)
    sets = [pictures(4, seed=1)]
    return train_student([teacher], levels, pictures(6), sets, config, PLAIN, 0, "cpu", checkpoint, False), teacher


def test_it_learns_the_maps_of_its_teacher():
    (student, history), teacher = trained(steps=60, batch=8, paste=0.0)
    assert history.loss.tail(10).mean() < 0.5 * history.loss.head(10).mean()
    from grad_nb.evaluation import score_maps

    x = pictures(8, seed=3)
    theirs, mine = score_maps(teacher, x, 64), student_maps(student, x)[0]
    assert mine.shape == theirs.shape and abs(mine.mean() - theirs.mean()) < 3 * theirs.std(), "on its scale"


def test_a_stopped_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    from grad_nb.core import loop

    (whole, history), _ = trained()
    left = iter([1.0] * 4)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "time_left", lambda: next(left, 0.0))
        with pytest.raises(TimeUp):
            trained(tmp_path / "checkpoint")
    (resumed, again), _ = trained(tmp_path / "checkpoint")
    assert history.equals(again)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))


def test_it_is_read_as_it_was_written(tmp_path):
    student = Student(THREE, 64, SMALL)
    save_student(tmp_path / "student.safetensors", student, THREE, 64, SMALL)
    again = load_student(tmp_path / "student.safetensors")
    x = pictures(2)
    assert all(np.array_equal(a, b) for a, b in zip(student_maps(student, x), student_maps(again, x)))


def test_the_maps_of_a_picture_depend_on_it_alone():
    student = Student(THREE, 64, SMALL)
    x = pictures(3, 80)
    together, alone = student_maps(student, x), [student_maps(student, x[i : i + 1]) for i in range(3)]
    assert all(np.array_equal(m[i], alone[i][k][0]) for k, m in enumerate(together) for i in range(3))
    plain = student(resized(torch.from_numpy(x).permute(0, 3, 1, 2).float(), 64))
    assert all(np.allclose(a, b.detach().numpy(), atol=1e-4) for a, b in zip(together, plain))


def test_settings_that_cannot_be_meant_are_refused():
    for wrong in ({"width": 0}, {"paste": 1.5}, {"batch": 1}, {"lr": -1.0}, {"optimizer": "sgd"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            StudentConfig(**wrong)
    chosen = override(preset("fast"), {"student.steps": "7", "one_network": "true"})
    assert chosen.student.steps == 7 and chosen.one_network
    assert from_dict(type(chosen), json.loads(json.dumps(to_dict(chosen)))) == chosen


STUDENT = {"student__width": 8, "student__steps": 3, "student__batch": 4}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    "A model, the model with one network from the same stages, and their folder."
    folder = tmp_path_factory.mktemp("work")
    x = pictures(12)
    plain = tiny(**STUDENT).set_params(work_dir=folder).fit(x)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    one = tiny(**STUDENT).set_params(work_dir=folder, one_network=True).fit(x)
    return plain, one, before


def test_after_a_fit_only_the_student_is_trained(fitted):
    plain, one, before = fitted
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert plain.student_ is None and one.student_ is not None
    assert all(torch.equal(a, b) for a, b in zip(plain.detectors_[0].parameters(), one.detectors_[0].parameters()))
    x = pictures(3, seed=5)
    assert not np.array_equal(plain.score_samples(x), one.score_samples(x))
    assert np.array_equal(one.score_samples(x), student_maps(one.student_, even_light(x, one.light_))[0].max((1, 2)))


def test_a_model_with_one_network_is_kept_and_explains(fitted, tmp_path):
    _, one, _ = fitted
    one.save(tmp_path / "one.grad")
    again = GRAD.load(tmp_path / "one.grad", "cpu")
    x = pictures(3, seed=5)
    assert np.array_equal(again.score_samples(x), one.score_samples(x)) and again.preset_ == one.preset_
    why = again.explain(x[0])
    assert why.score == one.score_samples(x[:1])[0] == why.levels[0].score and why.levels[0].normal is not None
    assert "judges in their place" in again.card()
    assert again.get_params()["one_network"] is True


def test_a_model_without_one_has_a_file_as_before(fitted, tmp_path):
    plain, _, _ = fitted
    plain.save(tmp_path / "plain.grad")
    tensors, meta = read_tensors(tmp_path / "plain.grad")
    assert not any(name.startswith("student.") for name in tensors)
    assert not {"student", "one_network"} & set(meta["preset"])


def test_an_export_judges_as_the_model_does(fitted):
    _, one, _ = fitted
    x = pictures(3, seed=5)
    expected = one.predict(x)
    scores, labels, maps = Scorer(one).eval()(torch.from_numpy(x))
    assert np.allclose(scores.numpy(), expected.scores, atol=1e-4)
    assert np.allclose(maps.numpy(), expected.maps, atol=1e-4) and labels.numpy().tolist() == expected.labels.tolist()


def test_the_command_distils_a_finished_training(tmp_path):
    from PIL import Image

    from grad_nb.use.daily import grad_fit

    (tmp_path / "good").mkdir()
    for i, picture in enumerate(pictures(12)):
        Image.fromarray(picture).save(tmp_path / "good" / f"{i}.png")
    settings = " ".join(f"{name.replace('__', '.')}={value}" for name, value in (TINY_FIT | STUDENT).items())
    rest = dict(preset="demo", overrides=settings, work_dir=str(tmp_path / "work"), device="cpu", quiet=True)
    grad_fit(str(tmp_path / "good"), str(tmp_path / "whole.grad"), **rest)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.json")}
    grad_fit(str(tmp_path / "good"), str(tmp_path / "one.grad"), one_network=True, **rest)
    assert before and all(path.stat().st_mtime_ns == time for path, time in before.items())
    whole, one = (GRAD.load(tmp_path / f"{name}.grad", "cpu") for name in ("whole", "one"))
    assert whole.student_ is None and one.student_ is not None
    assert "judges in their place" in (tmp_path / "one.grad.md").read_text()


def test_a_run_has_one_stage_more(tmp_path):
    from grad_nb.datasets.trays import make_trays
    from grad_nb.runs.driver import plan
    from grad_nb.runs.stages import evaluate_stage, open_run, result_table, student_stage

    make_trays(tmp_path, seed=1, size=64, train=6, validation=3, good=3, logical=3, structural=3, progress=False)
    parts = (str(tmp_path), "trays", "demo", 0, tmp_path / "runs")
    plain = open_run(*parts, TINY, "cpu", False)
    before = do_all(plain)
    run = open_run(*parts, f"{TINY} one_network=true student.steps=3 student.batch=4 student.width=8", "cpu", False)
    assert [[task.name for task in phase] for phase in plan(run)] == [["student"], ["table"]]
    with pytest.raises(FileNotFoundError, match="student stage"):
        evaluate_stage(run)
    record = student_stage(run)
    assert record["parameters"] > 0 and record["multiplications"] > 0
    result = evaluate_stage(run)
    assert {name: result[name] for name in ("image_auroc", "pixel_auroc")} == {
        name: before[name] for name in ("image_auroc", "pixel_auroc")
    }, "the figures are the detectors'"
    assert 0 <= result["one_network"]["image_auroc"] <= 1 and "student" in result["stages"]
    assert "one network" in result_table(result).index
    assert student_stage(run)["skipped"]
