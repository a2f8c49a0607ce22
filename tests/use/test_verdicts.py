"""What is promised of a threshold holds, and nothing looser is promised."""

import html
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import beta
from shared import TINY_FIT

from grad_nb import verdicts
from grad_nb.config import override, preset
from grad_nb.core.files import read_json
from grad_nb.datasets.readers import DataError
from grad_nb.datasets.trays import make_trays
from grad_nb.evaluation import image_auroc
from grad_nb.grad import GRAD, calibration
from grad_nb.use.daily import grad_calibrate, grad_fit
from grad_nb.use.evaluate import grad_evaluate
from grad_nb.verdicts import (
    MOST_KEPT,
    Calibration,
    MapSummary,
    NormalScores,
    best_f1_threshold,
    calibration_of_quantile,
    checked_calibration,
    checked_labels,
    checked_scores,
    f1_at,
    held_out_share,
    labelled_folder,
    percent,
    rank_for,
    threshold_of_labelled,
    threshold_of_normals,
    too_few_words,
)

SIMULATED = 1000  # calibrations


@pytest.mark.parametrize("n, rate", [(1, 0.05), (9, 0.05), (9, 0.3), (40, 0.02), (40, 0.05), (100, 0.05), (300, 0.1)])
@pytest.mark.parametrize("name", ["standard_normal", "standard_exponential", "standard_cauchy"])
def test_both_figures_hold_and_nothing_looser_is_promised(n, rate, name):
    "The real rate of each of 1,000 thresholds, from 1,000 ranks of new scores: its mean and its quantile."
    rng = np.random.default_rng(n)
    uniform = rng.random((SIMULATED, n))  # the distribution function of scores of any continuous distribution
    real, known = [], None
    for scores in uniform:
        threshold, known = threshold_of_normals(scores, rate)
        real.append(1 - threshold)
    assert known is not None
    spread = np.std(real) / np.sqrt(SIMULATED)
    assert abs(np.mean(real) - known.expected) < 4 * spread
    held = np.mean(np.array(real) <= known.bound)
    assert abs(held - 0.9) < 4 * np.sqrt(0.9 * 0.1 / SIMULATED)
    assert known.expected <= rate or (known.too_few and known.k == 1)
    assert known.k == n or known.too_few or Calibration(n, known.k + 1, rate).expected > rate
    drawn, new = getattr(rng, name)((SIMULATED, n)), getattr(rng, name)(20000)
    flagged = [np.mean(new > threshold_of_normals(scores, rate)[0]) for scores in drawn]
    assert abs(np.mean(flagged) - known.expected) < 5 * spread + 4 * np.sqrt(known.expected / len(new))


def test_scores_that_are_equal_keep_the_promise():
    rng = np.random.default_rng(0)
    flagged = []
    for _ in range(SIMULATED):
        threshold, known = threshold_of_normals(rng.integers(0, 5, 12).astype(float), 0.25)
        flagged.append((4 - threshold) / 5)
    assert np.mean(flagged) <= known.expected and np.mean(np.array(flagged) <= known.bound) >= 0.9


def test_the_figures_of_the_text():
    for n, expected, bound in ((9, 0.1, 0.23), (40, 0.024, 0.056)):
        known = Calibration(n, 1, 0.05)
        assert round(known.expected, 3 if n == 40 else 2) == expected and abs(known.bound - bound) < 0.005
    assert Calibration(9, 1, 0.05).bound == pytest.approx(beta.ppf(0.9, 1, 9)) and Calibration(9, 10, 0.05).bound == 1
    words = too_few_words(Calibration(9, 1, 0.05))
    assert words.startswith("only 9 held-out pictures, too few for 5 %: 10 % expected, at most 23 %")
    assert "19 are needed" in words and "--validation" in words and "grad_calibrate" in words
    assert not too_few_words(Calibration(19, 1, 0.05)) and too_few_words(Calibration(18, 1, 0.05))
    assert too_few_words(Calibration(9, 1, 0.05, "new")).endswith("19 are needed: give more good pictures")
    said = str(Calibration(40, 2, 0.05))
    assert said.startswith("the 2nd largest score of 40 held-out normal pictures: 4.9 % false alarms expected")
    assert [percent(x) for x in (0.0244, 0.05, 0.0996, 0.226, 1.0)] == ["2.4 %", "5 %", "10 %", "23 %", "100 %"]


def test_small_rates_keep_two_digits_and_bounds_are_rounded_up():
    said = str(Calibration(10_000, 1, 1e-4))
    assert said.endswith(": 0.01 % false alarms expected, at most 0.024 % with 90 % confidence")
    assert [percent(x) for x in (0, 0.0012, 0.00996)] == ["0 %", "0.12 %", "1 %"]
    assert [percent(x, up=True) for x in (0.0, 0.05, 0.0501, 0.101, 1.0)] == ["0 %", "5 %", "5.1 %", "11 %", "100 %"]
    for n in range(1, 300):
        known = Calibration(n, 1, 0.05)
        assert float(percent(known.bound, up=True).split()[0]) / 100 >= known.bound - 1e-9
        assert percent(known.expected) != "0 %"


@pytest.mark.parametrize(
    "alarms, normal, bound, differ", [(1, 10, 0.094, False), (4, 10, 0.094, True), (9, 9, 1, False)]
)
def test_pictures_are_said_to_differ_only_where_so_many_false_alarms_are_unlikely(alarms, normal, bound, differ):
    counts = {"passed": normal - alarms, "false_alarms": alarms, "missed": 0, "found": 0}
    figures = {"confusion": counts, "promise": {"text": "here", "bound": bound}}
    assert ("differ from those behind" in " ".join(verdicts._rate_lines(figures))) == differ


def test_enough_pictures_are_those_that_are_said_to_be_needed():
    for rate in (0.01, 0.02, 0.05, 0.07, 0.1, 0.3):
        needed = int(too_few_words(Calibration(1, 1, rate)).split("; ")[1].split()[0])
        assert not Calibration(needed, rank_for(needed, rate), rate).too_few
        assert Calibration(needed - 1, 1, rate).too_few


def test_an_interpolated_quantile_is_not_promised_more_than_its_lower_neighbour():
    rng = np.random.default_rng(1)
    for n in (1, 2, 9, 20, 41):
        scores, known = np.sort(rng.random(n)), calibration_of_quantile(n, 0.05)
        assert scores[-known.k] <= np.quantile(scores, 0.95) + 1e-12 and 1 <= known.k <= n


def test_the_best_f1_is_the_best_of_all_thresholds():
    rng = np.random.default_rng(2)
    for trial in range(60):
        labels = rng.random(15) < 0.4
        labels[:2] = True, False
        scores = np.round(rng.normal(labels.astype(float), 1, 15), trial % 3)
        best = max(f1_at(scores, labels, t) for t in [-1e9, *scores])
        threshold = best_f1_threshold(scores, labels)
        assert f1_at(scores, labels, threshold) == pytest.approx(best)
        known = threshold_of_labelled(scores, labels, 0.05)[1]
        above = (scores[~labels] > threshold).sum()
        assert (known.n, known.anomalous, known.k) == ((~labels).sum(), labels.sum(), above + 1)
        assert not too_few_words(known) and "chosen on these very pictures" in str(known)


def test_small_sets_hold_out_more_and_always_leave_enough():
    held = [round(held_out_share(n, None, 4) * n) for n in range(5, 400)]
    assert all(1 <= h <= n - 4 for n, h in zip(range(5, 400), held)) and held == sorted(held)
    assert all(h > max(1, round(0.1 * n)) for n, h in zip(range(7, 40), held[2:35]))
    assert held_out_share(10, 0.1, 4) == 0.1 and held_out_share(400, None, 4) == 0.1


def test_labels_and_calibrations_that_cannot_be_are_refused():
    assert checked_labels([0, 1, True, np.int64(0)], 4).tolist() == [False, True, True, False]
    for wrong, said in (([0, 2], "not 2"), (["good", "bad"], "not 'good'"), ([0], "2 pictures and 1 labels")):
        with pytest.raises(ValueError, match=said):
            checked_labels(wrong, 2)
    good = {"n": 9, "k": 1, "rate": 0.05, "source": "new", "anomalous": 0}
    assert checked_calibration(json.loads(json.dumps(good))) == Calibration(9, 1, 0.05, "new")
    for change in ({"n": 0}, {"k": 11}, {"k": 0}, {"n": 9.0}, {"rate": 2.0}, {"source": "x"}, {"anomalous": -1}):
        with pytest.raises(ValueError, match="no calibration"):
            checked_calibration(good | change)
    with pytest.raises(ValueError, match="both kinds"):
        threshold_of_labelled(np.arange(3.0), np.ones(3, bool), 0.05)
    with pytest.raises(ValueError, match="no scores"):
        threshold_of_normals(np.array([]), 0.05)


def test_scores_in_a_file_that_cannot_be_are_refused():
    kept = NormalScores.of(np.array([0.5, 0.25]), summary_of(np.arange(8, dtype=np.float32).reshape(2, 2, 2)))
    plain = json.loads(json.dumps(kept.as_plain()))
    back = checked_scores(plain, 2)
    assert (back.scores == kept.scores).all() and (back.peaks == [3, 7]).all() and back.median == 3.5
    inf, half = float("inf"), [0.5]
    wrong = [{"scores": half}, {"peaks": [1.0, inf]}, {"median": "x"}, {"scores": [1, 2]}, {"scores": [[0.5], 0.5]}]
    for change in (*wrong, {"scores": half, "peaks": half}, {"more": 1}, {"scores": 3}, {"peaks": None}):
        with pytest.raises((ValueError, TypeError)):
            checked_scores(plain | change, 2)
    with pytest.raises(LookupError):
        checked_scores({"scores": [1.0, 2.0]}, 2)
    many = np.zeros(MOST_KEPT + 1)
    assert NormalScores.of(many, summary_of(many[:, None, None])) is None


def summary_of(maps: np.ndarray) -> MapSummary:
    "All maps at once."
    found = MapSummary()
    found.add(maps)
    return found


def test_a_colour_scale_of_many_maps_takes_little_memory(monkeypatch):
    maps = np.random.default_rng(0).normal(size=(40, 64, 64)).astype(np.float32)
    whole = summary_of(maps)
    assert whole.peaks == list(maps.max((1, 2))) and whole.median() == np.median(maps) and whole.finite
    monkeypatch.setattr(verdicts, "MOST_VALUES", 9_000)
    thin = MapSummary()
    for one in maps:
        thin.add(one[None])
    assert sum(map(len, thin._values)) <= 9_000 and thin.peaks == whole.peaks
    assert abs(thin.median() - whole.median()) < 0.05
    assert not summary_of(np.full((1, 2, 2), np.inf)).finite
    stripes = np.zeros((20, 96, 96), np.float32)
    stripes[:, :, ::3] = 1
    assert summary_of(stripes).median() == 0, "a third of the columns, also where few values are kept"


@pytest.fixture(scope="module")
def trays(tmp_path_factory) -> Path:
    counts = {"train": 12, "validation": 0, "good": 4, "logical": 3, "structural": 3}
    return make_trays(tmp_path_factory.mktemp("data"), seed=3, size=64, progress=False, **counts)


@pytest.fixture(scope="module")
def fitted(trays, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.grad"
    tiny = " ".join(f"{name}={value}" for name, value in TINY_FIT.items())
    grad_fit(str(trays / "train/good"), str(path), preset="demo", overrides=tiny, device="cpu", quiet=True)
    return path


@pytest.fixture
def model(fitted, tmp_path) -> Path:
    return Path(shutil.copy(fitted, tmp_path / "m.grad"))


@pytest.fixture
def parts(trays, tmp_path) -> Path:
    "good/ and two folders of defects, without anything else."
    shutil.copytree(trays / "test", tmp_path / "parts")
    return tmp_path / "parts"


def test_fit_names_both_figures_and_what_to_do(trays, tmp_path, capsys):
    tiny = " ".join(f"{name}={value}" for name, value in TINY_FIT.items())
    path = tmp_path / "m.grad"
    options = {"preset": "demo", "overrides": tiny, "device": "cpu", "quiet": True}
    grad_fit(str(trays / "train/good"), str(path), validation=0.25, **options)
    out = capsys.readouterr().out.splitlines()
    figures = "25 % false alarms expected, at most 54 % with 90 % confidence"
    assert out[0].startswith(f"{path}: threshold ")
    assert out[0].endswith(f"at the largest score of 3 held-out normal pictures: {figures}")
    assert out[1].startswith("only 3 held-out pictures, too few for 5 %: 25 % expected, at most 54 %")
    assert "grad_calibrate" in out[1] and figures in path.with_name("m.grad.md").read_text()


def test_the_command_calibrates_with_good_pictures(model, trays, tmp_path, capsys):
    before = GRAD.load(model, "cpu").set_params(progress=False)
    out = tmp_path / "new.grad"
    grad_calibrate(str(model), str(trays / "test/good"), str(out), false_alarm_rate=0.2, device="cpu", quiet=True)
    said = capsys.readouterr().out
    assert "at the largest score of 4 new normal pictures: 20 % false alarms expected, at most 44 %" in said
    assert f"before: {before.offset_:.3f}" in said and "too few" not in said
    after = GRAD.load(out, "cpu")
    assert after.offset_ == before.score_samples(trays / "test/good").max()
    assert GRAD.load(model, "cpu").offset_ == before.offset_
    assert "4 new normal pictures" in (tmp_path / "new.grad.md").read_text()
    grad_calibrate(str(model), str(trays / "test/good"), device="cpu", quiet=True)
    assert "only 4 new pictures, too few for 5 %" in capsys.readouterr().out
    assert GRAD.load(model, "cpu").offset_ == after.offset_


def test_the_command_calibrates_with_a_labelled_folder(model, trays, parts, capsys):
    for folder in (trays, parts):
        grad_calibrate(str(model), str(folder), device="cpu", quiet=True)
        known = calibration(GRAD.load(model, "cpu"))
        assert (known.n, known.anomalous, known.source) == (4, 6, "new")
        assert "best F1 on 4 normal and 6 anomalous pictures; chosen on these very pictures" in capsys.readouterr().out


def test_a_loose_picture_in_a_labelled_folder_sets_no_threshold(model, parts, capsys):
    shutil.copy(next((parts / "good").iterdir()), parts / "loose.png")
    for name in ("good", "OK"):
        (parts / "good").rename(parts / name)
        grad_calibrate(str(model), str(parts), device="cpu", quiet=True)
        known = calibration(GRAD.load(model, "cpu"))
        assert (known.n, known.anomalous) == (4, 6)
        assert "not used: 1 picture directly in it, without a label" in capsys.readouterr().err
        (parts / name).rename(parts / "good")


def test_a_folder_is_read_from_within(trays, tmp_path, monkeypatch):
    for part in ("test", "ground_truth"):
        shutil.copytree(trays / part, tmp_path / "parts" / part)
    monkeypatch.chdir(tmp_path / "parts/test")
    assert labelled_folder(".").has_masks and labelled_folder(tmp_path / "parts/test").has_masks


def test_masks_and_training_pictures_are_no_kinds_of_defects(trays, parts):
    whole = labelled_folder(trays)
    want = [sample.label for sample in whole.test]
    shutil.copytree(trays / "train/good", parts / "train")
    shutil.copytree(trays / "ground_truth", parts / "ground_truth")
    for name in ("parts", "test"):
        found = labelled_folder(parts.rename(parts.parent / name))
        parts = parts.parent / name
        assert [sample.label for sample in found.test] == want and found.has_masks
        assert "train is not used: its pictures are no defects" in found.notes
    with pytest.raises(DataError, match="is empty"):
        labelled_folder("")


def test_an_empty_name_is_not_the_current_folder(model, parts, monkeypatch, capsys):
    before = model.read_bytes()
    monkeypatch.chdir(parts / "good")
    for command in (lambda: grad_calibrate(str(model), ""), lambda: grad_evaluate(str(model), "")):
        with pytest.raises(SystemExit):
            command()
        assert "the name of the folder is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grad_fit("", str(model) + "2")
    assert model.read_bytes() == before


def test_a_model_that_would_be_a_folder_is_refused_before_the_training(trays, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GRAD, "fit", lambda *_: pytest.fail("trained"))
    for name in ("out/", "out/part.grad/", " "):
        with pytest.raises(SystemExit):
            grad_fit(str(trays / "train/good"), f"{tmp_path}/{name}" if name.strip() else name, device="cpu")
        assert "give another file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_names_of_any_bytes_are_in_the_figures(model, parts, tmp_path):
    odd = parts / os.fsdecode(b"kr\xe4tzer")
    next(p for p in parts.iterdir() if p.name != "good").rename(odd)
    figures, page = tmp_path / "f.json", tmp_path / "p.html"
    grad_evaluate(str(model), str(parts), json=str(figures), page=str(page), device="cpu", quiet=True)
    assert odd.name in read_json(figures)["kinds"] and page.is_file()


def test_a_wrong_mask_is_said_before_pictures_are_judged(model, trays, tmp_path, monkeypatch):
    fitted = GRAD.load(model, "cpu").set_params(progress=False)
    monkeypatch.setattr(GRAD, "predict", lambda *_: pytest.fail("judged"))
    whole = Path(shutil.copytree(trays, tmp_path / "whole"))
    mask = sorted((whole / "ground_truth/structural_anomalies").rglob("*.png"))[-1]
    before = mask.read_bytes()
    Image.open(mask).resize((32, 64)).save(mask)
    for said in ("has 32x64 pixels", mask.name):
        with pytest.raises(DataError, match=said):
            fitted.evaluate(whole)
        mask.write_bytes(before[: len(before) - 30])


def test_outputs_go_over_no_model_and_are_asked_for_first(model, parts, tmp_path, capsys, monkeypatch):
    card = tmp_path / "m.grad.md"
    card.write_text("# GRAD")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.setattr(GRAD, "load", lambda *_: pytest.fail("loaded"))
    for options, said in (
        ({"json": model}, "would be overwritten"),
        ({"page": model}, "would be overwritten"),
        ({"json": tmp_path / "link"}, "would be overwritten"),
        ({"page": card}, "would be overwritten"),
        ({"page": parts}, "it is a folder"),
    ):
        with pytest.raises(SystemExit):
            grad_evaluate(str(model), str(parts), **{name: str(path) for name, path in options.items()})
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grad_evaluate(str(model), str(parts), most=-1)
    assert "--most must be at least 0, not -1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        grad_calibrate(str(model), str(parts), str(card))
    assert "is the card of a model" in capsys.readouterr().err and card.read_text() == "# GRAD"


def test_labelled_folders_are_read_in_any_layout(trays, parts, tmp_path):
    for folder in (trays, trays / "test", parts):
        found = labelled_folder(folder)
        assert found.counts["normal"] == 4 and found.counts["anomalous"] == 6
        assert found.has_masks == (folder != parts)
    assert not labelled_folder(parts).notes
    Image.new("RGB", (64, 64)).save(parts / "loose.png")
    (parts / "empty").mkdir()
    (parts / "good").rename(parts / "Good")
    notes = " ".join(labelled_folder(parts).notes)
    assert "not used: 1 picture directly in" in notes and "empty holds no pictures" in notes
    assert "Good counts as normal: 4 pictures" in notes and labelled_folder(parts).counts["normal"] == 4


def test_labelled_folders_that_cannot_be_are_refused_with_what_to_rename(trays, parts, tmp_path):
    whole = Path(shutil.copytree(trays, tmp_path / "whole"))
    (whole / "test/good").rename(whole / "test/fine")
    (parts / "good").rename(parts / "passed")
    shutil.rmtree(whole / "ground_truth")
    for folder, said in (
        (whole, "it has fine, logical_anomalies, structural_anomalies; put some into a sub-folder good"),
        (parts, "it has logical_anomalies, passed, structural_anomalies; put some into a sub-folder good"),
        (trays / "train", "no anomalous pictures"),
        (trays / "train/good", "it has no labelled pictures"),
        (tmp_path / "gone", "is not a folder"),
    ):
        with pytest.raises(DataError, match=said):
            labelled_folder(folder)


def test_masks_of_some_pictures_alone_are_told_of(trays, tmp_path):
    for part in ("test", "ground_truth"):
        shutil.copytree(trays / part, tmp_path / "parts" / part)
    assert not labelled_folder(tmp_path / "parts").notes
    masks = sorted((tmp_path / "parts/ground_truth/structural_anomalies").iterdir())
    shutil.rmtree(masks[0])
    (note,) = labelled_folder(tmp_path / "parts").notes
    assert note.startswith("no mask for 1 anomalous picture, the first ") and note.endswith("pixel figures are n/a")


def test_evaluate_says_what_the_scores_say(model, trays):
    fitted = GRAD.load(model, "cpu").set_params(progress=False)
    found = fitted.evaluate(trays)
    f, truth = found.figures, np.array([kind != "good" for kind in found.types])
    assert np.allclose(found.scores, fitted.score_samples(list(found.paths)), atol=1e-5)
    assert f["auroc"] == image_auroc(found.scores, truth) and f["auroc_interval"][0] <= f["auroc"]
    assert f["f1"] == f1_at(found.scores, truth, fitted.offset_) <= f["best_f1"]
    above = found.scores > fitted.offset_
    want = {"passed": ~above & ~truth, "false_alarms": above & ~truth, "missed": ~above & truth, "found": above & truth}
    assert f["confusion"] == {name: int(which.sum()) for name, which in want.items()}
    assert set(found.missed) == {*np.flatnonzero(want["missed"])} and (np.diff(found.scores[found.missed]) >= 0).all()
    assert set(found.false_alarms) == {*np.flatnonzero(want["false_alarms"])}
    assert {kind: row["pictures"] for kind, row in f["kinds"].items()} == dict.fromkeys(f["kinds"], 3)
    assert sum(row["found"] for row in f["kinds"].values()) == f["confusion"]["found"]
    assert 0 <= f["au_spro"] <= 1 and "au_pro" not in f and f["promise"]["bound"] == calibration(fitted).bound
    assert json.loads(json.dumps(f, allow_nan=False)) == f


def test_evaluate_takes_arrays_with_labels_and_refuses_what_has_none(model, parts):
    fitted = GRAD.load(model, "cpu").set_params(progress=False)
    folder = fitted.evaluate(parts)
    y = [int(kind != "good") for kind in folder.types]
    arrays = np.stack([np.asarray(Image.open(p)) for p in folder.paths])
    found = fitted.evaluate(arrays, y)
    assert found.figures["auroc"] == folder.figures["auroc"] and found.names[0] == "picture 0"
    assert found.figures["confusion"] == folder.figures["confusion"] and "au_spro" not in folder.figures
    for labels, said in ((None, "labelled folder, or y"), ([3] * len(y), "not 3")):
        with pytest.raises(ValueError, match=said):
            fitted.evaluate(arrays, labels)


def test_masks_beside_a_plain_folder_give_au_pro(model, trays, tmp_path):
    fitted = GRAD.load(model, "cpu").set_params(progress=False)
    for part in ("test", "ground_truth"):
        shutil.copytree(trays / part, tmp_path / "parts" / part)
    assert 0 <= fitted.evaluate(tmp_path / "parts").figures["au_pro"] <= 1


def test_the_command_evaluates_in_a_table_json_and_a_page(model, parts, tmp_path, capsys):
    (parts / "logical_anomalies").rename(parts / "<b>bent & torn")
    (parts / "empty").mkdir()
    shutil.copy(next((parts / "good").iterdir()), parts / "loose.png")
    fitted = GRAD.load(model, "cpu")
    fitted.offset_ = float(np.median(fitted.set_params(progress=False).evaluate(parts).scores))
    fitted.save(model)
    made = tmp_path / "out.json", tmp_path / "out.html"
    grad_evaluate(str(model), str(parts), *map(str, made), device="cpu", quiet=True)
    said = capsys.readouterr().out
    found = fitted.evaluate(parts)
    assert str(found).splitlines()[0] == "10 pictures: 4 normal, 6 anomalous" and str(found).splitlines()[1] in said
    for word in ("AUROC", "average precision", "best F1", "called anomalous", "<b>bent & torn", "false alarms: "):
        assert word in said
    assert all(found.names[i] in said for i in found.missed) and len(found.missed)
    assert json.loads(made[0].read_text()) == json.loads(json.dumps(found.figures))
    page = made[1].read_text()
    assert "<b>" not in page and html.escape("<b>bent & torn") in page and "m.grad on parts" in page
    assert "not used: 1 picture directly in it, without a label" in page and "empty holds no pictures" in page
    assert str(tmp_path) not in page + made[0].read_text(), "what is given away says not where it was made"
    assert page.count("<figure>") == len(found.missed) + len(found.false_alarms) + found.figures["confusion"]["found"]
    assert not re.search(r"https?://", page) and "Missed" in page and f"{calibration(fitted).n} held-out" in page


@pytest.mark.slow
def test_five_small_trainings_flag_no_more_of_200_new_normal_pictures_than_promised(tmp_path):
    counts = {"train": 40, "validation": 0, "good": 200, "logical": 0, "structural": 0}
    real, promised, bounds = [], [], []
    for seed in range(5):
        root = make_trays(tmp_path / str(seed), seed=seed, size=64, progress=False, **counts)
        settings = override(preset("demo"), TINY_FIT | {"detector.steps": 60})
        model = GRAD(settings, random_state=seed, device="cpu", progress=False).fit(root / "train/good")
        real.append(model.predict(root / "test/good", maps=False).labels.mean())
        known = calibration(model)
        promised.append(known.expected)
        bounds.append(known.bound)
    spread = beta.std(known.k, known.n + 1 - known.k) / np.sqrt(5)
    assert np.mean(real) <= np.mean(promised) + spread, (real, promised)
    assert np.mean(np.array(real) <= bounds) >= 0.6 and np.mean(real) <= np.mean(bounds)


def test_what_is_evaluated_needs_no_pictures_to_learn_from(trays, tmp_path):
    whole = Path(shutil.copytree(trays, tmp_path / "whole"))
    for path in sorted((whole / "train/good").iterdir())[1:]:
        path.unlink()
    for folder in (whole, whole / "test"):
        assert labelled_folder(folder).counts["anomalous"] == 6
    (whole / "train/good").rename(whole / "train/ok")
    assert labelled_folder(whole).counts["anomalous"] == labelled_folder(whole / "test").counts["anomalous"] == 6


def test_the_page_names_as_many_wrong_verdicts_as_the_command(model, parts, tmp_path, capsys):
    fitted = GRAD.load(model, "cpu").set_params(progress=False)
    fitted.offset_ = float(fitted.evaluate(parts).scores.max())
    fitted.save(model)
    grad_evaluate(str(model), str(parts), page=str(tmp_path / "p.html"), most=6, device="cpu", quiet=True)
    said = capsys.readouterr().out
    table = html.unescape((tmp_path / "p.html").read_text().split("<pre>")[1].split("</pre>")[0])
    missed = fitted.evaluate(parts).missed
    assert len(missed) == 6 and said.strip() == table.strip()
