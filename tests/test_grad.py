"""The estimator as a user meets it: any form of input, interruptions, another process, bad settings."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from make_files import pictures
from PIL import Image
from shared import TINY_FIT, tiny
from sklearn.base import clone

from grad_nb.config import override, preset
from grad_nb.core import stages
from grad_nb.core.files import read_json
from grad_nb.core.tensors import checked_format, read_tensors
from grad_nb.datasets.readers import DataError, hold_out, picture_files, read_image
from grad_nb.datasets.trays import make_trays
from grad_nb.detector import load_detector
from grad_nb.grad import GRAD, _preset_of, calibration, colour_limits
from grad_nb.patchdiff import load_patchdiff
from grad_nb.runs.stages import open_run
from grad_nb.verdicts import Calibration, f1_at, percent

FILES = Path(__file__).parent / "files"  # one file of each version, see make_files.py


@pytest.fixture(scope="module")
def trays(tmp_path_factory) -> Path:
    return make_trays(
        tmp_path_factory.mktemp("data"),
        seed=11,
        size=64,
        train=20,
        validation=0,
        good=7,
        logical=0,
        structural=0,
        progress=False,
    )


@pytest.fixture(scope="module")
def model(trays) -> GRAD:
    return tiny().fit(trays / "train/good")


def test_colours_span_something_where_the_maps_of_normal_pictures_are_empty():
    assert colour_limits(np.zeros((4, 8, 8), np.float32), 0.1) == (0.0, 1.0)
    low, high = colour_limits(np.arange(256, dtype=np.float32).reshape(4, 8, 8), 0.5)
    assert low == 191.0 and high == 2 * 191.0 - 127.5, "the value of a map, and two maps of four are above or at it"


def test_every_form_of_input_scores_alike(model, trays):
    folder = trays / "test/good"
    files = sorted(folder.glob("*.png"))
    array = np.stack([np.asarray(Image.open(p)) for p in files])
    want = model.score_samples(folder)
    forms = (str(folder), files, [str(p) for p in files], array, (p for p in files), (a for a in array), list(array))
    for form in forms:
        assert (model.score_samples(form) == want).all()
    assert model.score_samples(files[0])[0] == pytest.approx(want[0], abs=1e-6)


def test_a_stream_is_judged_in_flat_memory(model, trays):
    picture = np.asarray(Image.open(next((trays / "test/good").glob("*.png"))))

    def endless():
        while True:
            yield picture

    for i, part in enumerate(model.stream(endless())):
        assert len(part.scores) == model.preset.evaluation.batch and part.maps.shape[1:] == (64, 64)
        if i == 3:
            break


def test_scores_do_not_depend_on_the_batch(model, trays):
    other = clone(model)
    for name in ("levels_", "detectors_", "light_", "stats_", "offset_"):
        setattr(other, name, getattr(model, name))
    want = model.score_samples(trays / "train/good")
    for batch in (1, 3, 7):
        other.made_with_ = model.settings_ | {"preset": override(model.preset, {"evaluation.batch": batch})}
        assert np.allclose(other.score_samples(trays / "train/good"), want, rtol=0, atol=1e-5)


def test_maps_are_kept_only_if_asked_for(model, trays):
    whole, bare = model.predict(trays / "test/good"), model.predict(trays / "test/good", maps=False)
    assert (
        whole.maps.shape == (7, 64, 64)
        and bare.maps is None
        and (whole.scores == bare.scores).all()
        and whole.paths == bare.paths
    )


def test_nothing_to_judge_or_to_learn_from_is_said(model, trays, tmp_path):
    for nothing in ([], np.empty((0, 64, 64, 3), np.uint8), iter(())):
        with pytest.raises(DataError, match="no pictures"):
            model.score_samples(nothing)
    with pytest.raises(DataError, match="holds no pictures"):
        model.predict(tmp_path)
    with pytest.raises(DataError, match="too few"):
        tiny().fit(sorted((trays / "train/good").glob("*.png"))[:4])
    (tmp_path / "bad.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="bad.png"):
        model.predict(tmp_path)
    for wrong in (np.zeros((3, 64, 64, 3)), np.zeros((64, 64, 3), np.int64)):
        with pytest.raises(ValueError, match="uint8"):
            model.predict(wrong)
    for rate in (0, 1, -1, 5):
        with pytest.raises(ValueError, match="false_alarm_rate"):
            tiny().set_params(false_alarm_rate=rate).fit(trays / "train/good")


def test_the_threshold_is_a_score_of_held_out_normals_whose_expected_rate_is_the_one_wanted(trays):
    strict, loose = (
        tiny().set_params(false_alarm_rate=r, validation=0.4).fit(trays / "train/good") for r in (0.01, 0.5)
    )
    assert strict.offset_ > loose.offset_
    files = np.array(sorted((trays / "train/good").iterdir()))
    for fitted, rate in ((strict, 0.01), (loose, 0.5)):
        held = fitted.score_samples(list(files[hold_out(20, 0.4, 0)[1]]))
        known = calibration(fitted)
        assert fitted.offset_ == pytest.approx(np.sort(held)[-known.k], abs=1e-5) and known.n == len(held) == 8
        assert known.k == max(1, int(rate * 9)) and known.too_few == (rate == 0.01)
        bound = percent(known.bound, up=True)
        assert f"{percent(known.expected)} false alarms expected, at most {bound}" in fitted.card()
        assert ("only 8 held-out pictures, too few for 1 %" in fitted.card()) == known.too_few


def test_too_few_held_out_pictures_are_said_before_the_training(trays, caplog, monkeypatch):
    monkeypatch.setattr(GRAD, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(pytest.fail.Exception):
        tiny().fit(trays / "train/good")
    assert "only 5 held-out pictures, too few for 5 %: 17 % expected, at most 37 %" in caplog.text


def test_calibrate_sets_the_threshold_with_new_pictures_and_trains_nothing(model, trays, tmp_path, monkeypatch):
    model.save(tmp_path / "m.grad")
    again = GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False)
    monkeypatch.setattr(GRAD, "_train", lambda *_: pytest.fail("trained"))
    found = again.predict(trays / "test/good")
    assert again.calibrate(trays / "test/good", false_alarm_rate=0.3) is again
    assert again.offset_ == np.sort(found.scores)[-2] and again.map_limits_ == colour_limits(found.maps, 0.3)
    assert calibration(again) == Calibration(7, 2, 0.3, "new") and again.n_pictures_ == model.n_pictures_
    assert "7 new normal pictures: 25 % false alarms expected" in again.card() and "30 % was wanted" in again.card()
    again.save(tmp_path / "again.grad")
    kept = GRAD.load(tmp_path / "again.grad", "cpu")
    assert kept.offset_ == again.offset_ and calibration(kept) == calibration(again) and kept.card() == again.card()
    assert kept.map_limits_ == again.map_limits_ and kept.false_alarm_rate == 0.3


def test_calibrate_with_labels_takes_the_best_f1(model, trays):
    again = GRAD(**model.get_params())
    vars(again).update(vars(model))
    good = np.stack([np.asarray(Image.open(p)) for p in sorted((trays / "test/good").iterdir())])
    both, y = np.concatenate([good, 255 - good]), [0] * 7 + [1] * 7
    scores, labels = again.score_samples(both), np.array(y, bool)
    again.calibrate(both, y)
    assert f1_at(scores, labels, again.offset_) == max(f1_at(scores, labels, t) for t in [-1e9, *scores])
    assert "best F1 on 7 normal and 7 anomalous pictures" in again.card()
    for wrong in ([0, 2] * 7, [1] * 14, [0] * 14, [0, 1]):
        with pytest.raises(ValueError, match="label|both kinds|no picture is"):
            again.calibrate(both, wrong)
    with pytest.raises(ValueError, match="false_alarm_rate"):
        again.calibrate(good, false_alarm_rate=1.5)


def test_pictures_that_come_from_no_file_are_named_by_their_number(model, trays):
    good = [np.asarray(Image.open(p)) for p in sorted((trays / "test/good").iterdir())]
    for wrong, said in ((good[2][:20], "picture 2: a picture has 64x20 pixels"), (good[2] / 255, "picture 2: a pict")):
        given = [*good[:2], wrong]
        for use in (model.predict, copy_of(model).calibrate, clone(model).fit, lambda x: model.predict(iter(x))):
            with pytest.raises(ValueError, match=said):
                use(given)
    with pytest.raises(DataError, match="^a picture has 64x20"):
        model.predict(good[2][:20])


def test_equal_pictures_count_once(model, trays, caplog):
    files = sorted((trays / "test/good").iterdir())
    again = copy_of(model).calibrate([files[0]] * 40)
    assert calibration(again) == Calibration(1, 1, 0.05, "new") and len(again.normals_.scores) == 1
    assert "39 of 40 pictures are equal to others of them, and count once" in caplog.text
    twice, once = copy_of(model).calibrate(files + files[:3]), copy_of(model).calibrate(files)
    assert (twice.offset_, twice.map_limits_) == (once.offset_, once.map_limits_)
    caplog.clear()
    y = [0] * 6 + [1]
    twice, once = copy_of(model).calibrate(files * 2, y * 2), copy_of(model).calibrate(files, y)
    assert calibration(twice) == calibration(once) and "7 of 14 pictures" in caplog.text


def test_pictures_that_were_learnt_from_do_not_count(model, trays, tmp_path, caplog):
    files = np.array(sorted((trays / "train/good").iterdir()))
    train, held = (list(files[i]) for i in hold_out(20, 5 / 20, 0))
    assert model.n_pictures_ == (len(train), len(held))
    model.save(tmp_path / "m.grad")
    again = GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False)
    offset = again.offset_
    with pytest.raises(ValueError, match="all 15 normal pictures are among those that the model learnt from"):
        again.calibrate(train)
    with pytest.raises(ValueError, match="all 15 normal pictures"):
        again.calibrate(train + held[:1], [0] * 15 + [1])
    assert again.offset_ == offset and not caplog.text
    again.calibrate(files)
    assert calibration(again).n == 5 and "15 of 20 pictures are among those" in caplog.text
    again.learnt_ = frozenset()  # as of an older file
    again.save(tmp_path / "m.grad")
    assert calibration(GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False).calibrate(files)).n == 20


def test_a_held_out_copy_of_another_picture_says_nothing(trays, caplog):
    files = np.array(sorted((trays / "train/good").iterdir()))
    train, held = hold_out(20, 0.25, 0)
    names = files.copy()
    names[held[1:3]] = files[train[0]], files[held[0]]
    calibrated = tiny().set_params(validation=0.25).fit(list(names))
    assert calibrated.n_pictures_ == (15, 3) and calibration(calibrated).n == 3
    assert "2 held-out pictures are copies of others, and are left out" in caplog.text
    names[held] = files[train[0]]
    copied = tiny().set_params(validation=0.25).fit(list(names))
    assert calibration(copied).n == 1, "what copies say is no more than what one of them says"
    assert "all 5 held-out pictures are copies of others; calibrate with new ones" in caplog.text


def test_a_stream_longer_than_its_labels_is_read_to_the_first_picture_too_many(model, trays):
    picture = np.asarray(Image.open(next((trays / "test/good").glob("*.png"))))
    read = []

    def endless():
        while True:
            read.append(0)
            yield picture

    for use in (copy_of(model).calibrate, model.evaluate, tiny().fit):
        read.clear()
        with pytest.raises(ValueError, match="more pictures than the 3 labels"):
            use(endless(), [0, 1, 0])
        assert len(read) == 4
        with pytest.raises(ValueError, match="2 pictures and 3 labels"):
            use([picture] * 2, [0, 1, 0])
        with pytest.raises(ValueError, match="2 pictures and 3 labels"):
            use(iter([picture] * 2), [0, 1, 0])


def test_a_model_of_0_2_0_says_what_its_interpolated_threshold_promises():
    old = GRAD.load(FILES / "0.2.0" / "model.grad", "cpu")
    assert calibration(old) == Calibration(1, 1, 0.05) and "only 1 held-out picture, too few for 5 %" in old.card()


def test_a_fit_without_work_dir_leaves_nothing_behind(trays, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tiny().fit(trays / "train/good")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error, change", [(ValueError, {"detector.lr": 1e38}), (KeyboardInterrupt, {"detector.steps": 6})]
)
def test_a_fit_that_fails_leaves_the_model_as_it_was(trays, tmp_path, monkeypatch, error, change):
    fitted, pictures = tiny().fit(trays / "train/good"), trays / "test/good"
    want, card = fitted.score_samples(pictures), fitted.card()
    if error is KeyboardInterrupt:
        monkeypatch.setattr(GRAD, "_keep_patches", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(error):
        fitted.set_params(preset=override(fitted.preset, change), layout="mvtec_loco").fit(trays / "train/good")
    assert (fitted.score_samples(pictures) == want).all() and fitted.card() == card


def test_settings_that_are_changed_after_the_fit_wait_for_the_next_one(trays, tmp_path):
    fitted, pictures = tiny().fit(trays / "train/good"), trays / "test/good"
    want = fitted.score_samples(pictures)
    fitted.set_params(
        preset=override(fitted.preset, {"generator.size": 128, "detector.width": 0.2, "evaluation.blur_kernel": 1}),
        random_state=9,
        explain_patches=3,
    )
    fitted.save(tmp_path / "m.grad")
    again = GRAD.load(tmp_path / "m.grad", "cpu")
    assert (fitted.score_samples(pictures) == want).all() and (again.score_samples(pictures) == want).all()
    assert again.preset.generator.size == 64 and again.random_state == 0 and again.card() == fitted.card()


CHILD = """
import sys
from grad_nb.config import override, preset
from grad_nb.grad import GRAD
import grad_nb.training, grad_nb.patchdiff, grad_nb.core.files, json
settings, pictures, folder = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
model = GRAD(override(preset("demo"), settings), device="cpu", progress=False, work_dir=folder)
model.fit(pictures).save(folder + "/m.grad")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["generator-05.checkpoint", "detector-034.checkpoint"])
def test_a_killed_fit_continues_bit_for_bit(trays, tmp_path, stage):
    settings = TINY_FIT | {"generator.steps": 450, "detector.steps": 450}

    def start(folder):
        command = [sys.executable, "-c", CHILD, json.dumps(settings), str(trays / "train/good"), str(folder)]
        return subprocess.Popen(command)

    first = start(tmp_path / "killed")
    while not (tmp_path / "killed" / stage).exists():
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "killed/m.grad").exists()
    for folder in ("killed", "whole"):
        assert start(tmp_path / folder).wait() == 0
    killed, whole = (GRAD.load(tmp_path / folder / "m.grad", "cpu") for folder in ("killed", "whole"))
    assert killed.offset_ == whole.offset_
    assert (killed.score_samples(trays / "test/good") == whole.score_samples(trays / "test/good")).all()
    assert not list((tmp_path / "killed").rglob("*.checkpoint")) and not list((tmp_path / "killed").rglob("*.part"))


def test_other_settings_do_not_take_the_old_stages(trays, tmp_path):
    first = tiny().set_params(work_dir=tmp_path).fit(trays / "train/good").score_samples(trays / "test/good")
    for other in (
        tiny(detector__lr=0.01),
        tiny(generator__lr=0.05),
        tiny().set_params(random_state=1),
    ):
        fresh = clone(other).fit(trays / "train/good").score_samples(trays / "test/good")
        kept = other.set_params(work_dir=tmp_path).fit(trays / "train/good").score_samples(trays / "test/good")
        assert (fresh == kept).all() and not (fresh == first).all()


def test_a_saved_model_scores_the_same_in_another_process(model, trays, tmp_path):
    model.save(tmp_path / "m.grad")
    code = (
        "import sys, json; from grad_nb.grad import GRAD; "
        "m = GRAD.load(sys.argv[1], 'cpu').set_params(progress=False); "
        "print(json.dumps(m.score_samples(sys.argv[2]).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.grad"), str(trays / "test/good")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == model.score_samples(trays / "test/good").tolist()


def test_a_model_that_was_changed_or_lost_its_checksum_is_refused(model, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    model.save(tmp_path / "m.grad")
    with safe_open(str(tmp_path / "m.grad"), framework="pt") as f:
        tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    other = {
        "changed": about | {"json": about["json"].replace('"offset": ', '"offset": 1')},
        "bare": {"json": about["json"]},
    }
    said = {"changed": "was changed after it was written", "bare": "has no checksum"}
    for name, metadata in other.items():
        save_file(tensors, str(tmp_path / f"{name}.grad"), metadata=metadata)
        with pytest.raises(ValueError, match=f"{name}.grad {said[name]}"):
            GRAD.load(tmp_path / f"{name}.grad", "cpu")
    save_file(tensors, str(tmp_path / "same.grad"), metadata=about)
    assert GRAD.load(tmp_path / "same.grad", "cpu").offset_ == model.offset_


@pytest.mark.parametrize("version", sorted(p.name for p in FILES.iterdir() if p.is_dir() and p.name != "0.1.0"))
def test_a_model_of_an_older_version_still_loads_and_judges_as_it_did(version):
    old = GRAD.load(FILES / version / "model.grad", "cpu").set_params(progress=False)
    assert old.score_samples(pictures()) == pytest.approx(read_json(FILES / version / "scores.json"), abs=1e-5)
    assert old.explain(pictures()[0]).levels and "64 x 64" in old.card()


@pytest.mark.parametrize("version", sorted(p.name for p in FILES.iterdir() if p.is_dir()))
@pytest.mark.parametrize("name, kind", [("model.grad", "GRAD"), ("generator", "PatchDiff"), ("detector", "Detector")])
def test_a_file_says_its_kind_and_one_of_the_first_version_is_refused(version, name, kind, tmp_path):
    path = FILES / version / (name if "." in name else f"{name}.safetensors")
    assert path.stat().st_size < 60_000
    _, meta = read_tensors(path)
    with pytest.raises(ValueError, match=f"{path.name} does not hold a Scorer"):
        checked_format(meta, path, "Scorer", 9)
    if version == "0.1.0":
        with pytest.raises(ValueError, match=f"{path.name} was made by grad_nb 0.1.0, whose files .* fit again"):
            checked_format(meta, path, kind, 9)


@pytest.mark.parametrize("name, load", [("generator", load_patchdiff), ("detector", load_detector)])
def test_generators_and_detectors_are_read_from_the_second_version_on(name, load):
    load(FILES / "0.2.0" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=f"0.1.0/{name}.safetensors was made by grad_nb 0.1.0, .* fit again"):
        load(FILES / "0.1.0" / f"{name}.safetensors")


def test_a_model_of_the_first_version_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="0.1.0/model.grad was made by grad_nb 0.1.0, whose files .* fit again"):
        GRAD.load(FILES / "0.1.0" / "model.grad", "cpu")


def test_a_fit_takes_no_stage_that_code_of_another_format_made(trays, tmp_path, monkeypatch):
    fitted = tiny().set_params(work_dir=tmp_path).fit(trays / "train/good")
    made = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
    for kind, again in (("detect", {"detector-034"}), ("generate", {"detector-034", "generator-05"})):
        monkeypatch.setattr(stages, "STAGE_FORMATS", stages.STAGE_FORMATS | {kind: 99})
        fitted.fit(trays / "train/good")
        now = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("*.safetensors")}
        changed = {name.removesuffix(".safetensors") for name in now if now[name] != made[name]}
        assert again <= changed and (kind == "generate" or changed == again)
        made = now


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_that_some_library_refuses_is_refused_before_any_work(trays, tmp_path, seed):
    with pytest.raises(ValueError, match="random_state must be a whole number from 0"):
        tiny().set_params(random_state=seed).fit(trays / "train/good")
    if isinstance(seed, int):
        with pytest.raises(ValueError, match="seed must be a whole number from 0 to 4294967295"):
            open_run(trays.parent, "trays", "demo", seed, tmp_path)


def test_parameters_are_those_of_the_constructor(model):
    assert clone(model).get_params() == model.get_params()
    assert set(model.get_params(deep=False)) == {
        "preset",
        "layout",
        "augmentation",
        "validation",
        "false_alarm_rate",
        "random_state",
        "device",
        "progress",
        "work_dir",
        "explain_patches",
        "white",
        "one_network",
        "tile",
    }


def test_a_picture_in_any_form_has_the_same_score(model, trays):
    "A file, its bytes, an array, one with transparency, a picture of Pillow, a tensor either way; alone or in a list."
    path = sorted((trays / "test/good").iterdir())[0]
    pixels = np.asarray(Image.open(path).convert("RGB"))
    opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])
    tensor = torch.from_numpy(pixels.copy())
    (want,) = model.score_samples([path])
    forms = (path, path.read_bytes(), pixels, opaque, Image.open(path), tensor, tensor.permute(2, 0, 1))
    for one in forms:
        assert model.score_samples(one) == want == model.score_samples([one]), type(one)
        assert model.explain(one).score == pytest.approx(want)
    assert model.score_samples(list(forms)) == pytest.approx(want, abs=1e-6)
    assert model.predict(list(forms)).paths == (), "not all of them are files"
    batch = torch.stack([tensor, tensor])
    for two in (batch, batch.permute(0, 3, 1, 2)):
        assert model.score_samples(two) == pytest.approx(want, abs=1e-6)
    grey = pixels[..., 0]
    (grey_score,) = model.score_samples(np.repeat(grey[..., None], 3, -1))
    for one in (grey, grey[..., None], torch.from_numpy(grey.copy()), Image.fromarray(grey), [grey]):
        assert model.score_samples(one) == grey_score


@pytest.mark.parametrize(
    "wrong, said",
    [
        (np.zeros((64, 64, 3)), "float64"),
        (np.zeros((3, 64, 64), np.uint8), "channels first or 3 grey"),
        (torch.zeros(3, 64, 3, dtype=torch.uint8), "channels first or last"),
        (torch.zeros(3, 64, 64), "float32"),
        (b"no picture", "10 bytes is not a PNG"),
        (np.zeros((20, 64, 3), np.uint8), "64x20"),
        (7, "not a int"),
        ([7], "not a int"),
    ],
)
def test_a_picture_that_cannot_be_meant_is_refused_with_what_to_give(model, wrong, said):
    with pytest.raises(ValueError, match=said):
        model.predict(wrong)


def test_labelled_pictures_are_left_out_of_the_training_and_counted(trays, caplog):
    good = np.stack([np.asarray(Image.open(p)) for p in sorted((trays / "train/good").iterdir())])
    both = np.concatenate([255 - good[:2], good])
    y = np.arange(len(both)) < 2
    mixed, alone = tiny().fit(both, y), tiny().fit(good)
    assert (mixed.score_samples(good) == alone.score_samples(good)).all() and mixed.n_pictures_ == alone.n_pictures_
    assert f"2 of {len(both)} pictures are labelled anomalous and left out" in caplog.text
    assert (tiny().fit(good, [0] * len(good)).score_samples(good) == alone.score_samples(good)).all()
    column = (np.arange(len(both)) < 2)[:, None]
    for wrong in ([2] * len(both), [-1] * len(both), ["good"] * len(both), [0], column):
        with pytest.raises(ValueError, match="label"):
            tiny().fit(both, wrong)
    numbers = mixed.banks_[0][0].places[:, 1]
    assert numbers.min() >= 2 and set(numbers) - set(alone.banks_[0][0].places[:, 1]), "numbers of those given"


@pytest.mark.parametrize(
    "wrong", [{"false_alarm_rate": "0.1"}, {"false_alarm_rate": None}, {"validation": "0.1"}, {"white": "a"}]
)
def test_a_parameter_of_a_wrong_kind_is_named(wrong, trays):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny().set_params(**wrong).fit(trays / "train/good")


def test_of_files_and_arrays_together_none_has_the_name_of_another(model, trays):
    files = sorted((trays / "test/good").iterdir())
    both = [files[0], np.asarray(Image.open(files[1])), files[2]]
    found = model.predict(both)
    assert found.paths == () and (found.scores == model.score_samples(files[:3])).all()
    assert model.evaluate(both, [0, 1, 0]).names == ("picture 0", "picture 1", "picture 2")
    assert model.predict(files[:3]).paths == tuple(files[:3])


def test_a_setting_that_a_command_was_given_stays_where_a_preset_is_suited(monkeypatch, trays):
    asked = []
    monkeypatch.setattr("grad_nb.grad.suited", lambda chosen, pictures, paths: asked.append(paths) or chosen)
    made = tiny(generator__max_detail_lost=0.5)
    made._asked = ("detector.steps",)
    made.fit(trays / "train/good")
    assert asked == [("detector.steps",)]


def copy_of(model: GRAD) -> GRAD:
    again = GRAD(**model.get_params()).set_params(progress=False)
    vars(again).update(vars(model))
    return again.set_params(progress=False)


@pytest.mark.parametrize("labelled", [False, True])
def test_another_rate_acts_at_once_as_if_it_had_been_wanted_before(model, trays, tmp_path, caplog, labelled):
    "With no picture: threshold, scale, promise, card and file are those of a calibration with that rate."
    pictures = sorted((trays / "test/good").iterdir())
    labels = [0] * (len(pictures) - 1) + [1] if labelled else None
    asked, told = copy_of(model).calibrate(pictures, labels), copy_of(model)
    told.calibrate(pictures[:-1] if labelled else pictures, false_alarm_rate=0.4)
    assert asked.offset_ != told.offset_ and asked.map_limits_ != told.map_limits_
    assert asked.set_params(false_alarm_rate=0.4) is asked and not caplog.text
    assert (asked.offset_, asked.map_limits_, asked.calibration_) == (told.offset_, told.map_limits_, told.calibration_)
    for one, name in ((asked, "asked"), (told, "told")):
        one.save(tmp_path / name)
    assert (tmp_path / "asked").read_bytes() == (tmp_path / "told").read_bytes()
    back = GRAD.load(tmp_path / "asked", "cpu").set_params(false_alarm_rate=0.2)
    assert back.offset_ == told.set_params(false_alarm_rate=0.2).offset_ and back.map_limits_ == told.map_limits_
    back.set_params(false_alarm_rate=0.001)
    assert "too few for 0.1 %" in caplog.text and back.calibration_.too_few
    for wrong in (0, 1, 1.5, "x"):
        with pytest.raises(ValueError, match="false_alarm_rate"):
            back.set_params(false_alarm_rate=wrong)
        assert back.false_alarm_rate == back.settings_["false_alarm_rate"] == 0.001


def test_a_fit_and_another_rate_are_a_fit_with_that_rate(trays):
    fitted = [
        tiny().set_params(false_alarm_rate=rate, validation=0.5).fit(trays / "train/good") for rate in (0.05, 0.4)
    ]
    assert fitted[0].offset_ > fitted[1].offset_
    fitted[0].set_params(false_alarm_rate=0.4)
    assert fitted[0].offset_ == fitted[1].offset_ and fitted[0].map_limits_ == fitted[1].map_limits_
    assert fitted[0].card() == fitted[1].card()


def test_a_rate_waits_where_the_scores_are_not_kept(model, trays, caplog):
    again = copy_of(model)
    again.normals_ = None
    offset = again.offset_
    assert again.set_params(false_alarm_rate=model.false_alarm_rate).offset_ == offset and not caplog.text
    again.set_params(false_alarm_rate=0.3)
    assert "stays where it is until calibrate or fit" in caplog.text and again.offset_ == offset
    assert calibration(again.calibrate(trays / "test/good")).rate == 0.3


def test_representations_are_short_and_an_explanation_draws_itself(model, trays):
    assert repr(GRAD()) == "GRAD()" and repr(GRAD("demo", random_state=3)) == "GRAD(preset='demo', random_state=3)"
    found = model.predict(trays / "test/good")
    why = model.explain(sorted((trays / "test/good").iterdir())[0])
    for one in (model, found, why):
        assert len(repr(one)) < 200, repr(one)
    assert f"pictures={len(found.scores)}" in repr(found) and why.plot().axes
    assert all(f"{name} : " in GRAD.__doc__ for name in model.get_params()) and "COLOR_BGR2RGB" in GRAD.__doc__


def test_threads_fit_the_same_model(trays):
    from concurrent.futures import ThreadPoolExecutor

    pictures = np.stack([read_image(file) for file in picture_files(trays / "train/good")])
    before = torch.default_generator.get_state()

    def score(_):
        return tiny().fit(pictures).score_samples(pictures[:2]).tolist()

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(score, range(3))) == [score(0)] * 3
    assert torch.equal(torch.default_generator.get_state(), before)


def test_what_is_left_out_does_not_set_the_white(trays):
    deep = [read_image(file)[..., 0].astype(np.uint16) * 4 for file in picture_files(trays / "train/good")]
    glare = [np.full_like(deep[0], 4095)]
    assert tiny().fit(deep + glare, [0] * len(deep) + [1]).white_ == tiny().fit(deep).white_ == 1023


def test_a_camera_of_twelve_bits_has_one_white_in_model_file_and_verdicts(trays, tmp_path):
    "Trained on 12 bits in 16, a model judges as one that was trained on the same pictures in 8 bits."
    (tmp_path / "deep").mkdir()
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted((trays / "train/good").iterdir())):
        grey = np.asarray(Image.open(path).convert("L"))
        grey = np.where(np.arange(grey.size).reshape(grey.shape) == 0, 255, grey).astype(np.uint8)
        Image.fromarray(grey).save(tmp_path / f"flat/{i:03}.png")
        twelve = (grey.astype(np.uint32) * 4095 + 127) // 255
        Image.fromarray(twelve.astype(np.uint16)).save(tmp_path / f"deep/{i:03}.png")
    deep, flat = tiny().fit(tmp_path / "deep"), tiny().fit(tmp_path / "flat")
    assert deep.white_ == 4095 and flat.white_ is None
    deep.save(tmp_path / "deep.grad")
    kept = GRAD.load(tmp_path / "deep.grad", "cpu")
    want = flat.score_samples(tmp_path / "flat")
    assert (deep.score_samples(tmp_path / "deep") == want).all() and kept.white_ == 4095
    assert (kept.score_samples(tmp_path / "deep") == want).all() and '"white": 4095' in kept.card()
    given = tiny().set_params(white=4095).fit(tmp_path / "deep")
    assert (given.score_samples(tmp_path / "deep") == want).all()
    with pytest.raises(ValueError, match="white must be a number above 0"):
        tiny().set_params(white=0).fit(tmp_path / "deep")


def test_a_child_of_a_process_that_has_judged_judges_too(model, trays, tmp_path):
    "A server that forks after it has tried the model."
    code = """
import os, sys, time
import torch
from grad_nb.grad import GRAD
torch.set_num_threads(2)
model = GRAD.load(sys.argv[1], "cpu").set_params(progress=False)
want = model.score_samples(sys.argv[2])
child = os.fork()
if not child:
    os._exit(int(abs(model.score_samples(sys.argv[2]) - want).max() > 1e-6))
end = time.time() + 60
while time.time() < end:
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(os.waitstatus_to_exitcode(status))
    time.sleep(0.05)
os.kill(child, 9)
sys.exit("the child hangs")
"""
    model.save(tmp_path / "m.grad")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m.grad", trays / "test/good"], timeout=120)
    assert done.returncode == 0


def test_numbers_of_numpy_are_numbers(model, trays, tmp_path):
    given = {"white": np.uint16(4095), "validation": np.float32(0.25), "random_state": np.int64(3)}
    made = tiny().set_params(**given, tile=np.int64(64), false_alarm_rate=np.float32(0.1)).fit(trays / "train/good")
    made.offset_ = np.quantile(made.score_samples(trays / "test/good"), 0.9)
    made.save(tmp_path / "m.grad")
    made.set_params(false_alarm_rate=np.float32(0.2)).save(tmp_path / "m.grad")
    made.calibrate(trays / "test/good", false_alarm_rate=np.float32(0.3)).save(tmp_path / "m.grad")
    again = GRAD.load(tmp_path / "m.grad", "cpu")
    assert again.get_params()["white"] == 4095.0 and again.offset_ == made.offset_ and again.tile_ == 64
    copy = copy_of(model)
    copy.offset_ = np.float64("nan")
    with pytest.raises(ValueError, match="must be finite"):
        copy.save(tmp_path / "n.grad")


@pytest.mark.parametrize("chosen", ["demo", override(preset("demo"), TINY_FIT | {"generator.steps": 7})])
def test_a_model_from_a_file_is_fitted_again_as_it_was(tmp_path, chosen):
    "Its preset and its white were made to suit its pictures: in tiles it has no coordinates. That was not asked for."
    for i, values in enumerate(np.random.default_rng(0).integers(4096, size=(12, 64, 64))):
        Image.fromarray(values.astype(np.uint16)).save(tmp_path / f"{i:02d}.png")
    made = tiny().set_params(tile=64) if isinstance(chosen, str) else tiny().set_params(preset=chosen, tile=64)
    made._asked = ("generator.steps",)
    made.fit(sorted(tmp_path.glob("*.png")))
    assert not made.preset_.detector.coordinates and made.white_ == 4095
    made.asked_ = chosen, made._asked, None
    made.save(tmp_path / "m.grad")
    again = GRAD.load(tmp_path / "m.grad", "cpu")
    assert again.preset == chosen and again._asked == ("generator.steps",) and again.white is None
    assert again.white_ == 4095 and again.settings_["preset"] == made.settings_["preset"]
    assert _preset_of(clone(again)).detector.coordinates
    assert clone(again)._asked == ("generator.steps",), "a clone is fitted with what was asked for, too"
    again.save(tmp_path / "again.grad")
    assert (tmp_path / "again.grad").read_bytes() == (tmp_path / "m.grad").read_bytes()
