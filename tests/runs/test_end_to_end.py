"""The whole job through papermill and the command line, on trays of 64 pixels and with settings that take seconds."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from shared import TINY

from grad_nb.accel.backends import PRODUCTS
from grad_nb.config import override, preset
from grad_nb.core.files import write_json
from grad_nb.runs.driver import check_parameters, plan, template, template_parameters
from grad_nb.runs.stages import (
    Run,
    detect_key,
    detect_stage,
    evaluate_stage,
    generate_key,
    generate_stage,
    open_run,
    split_normals,
)


def command(name: str, *args: str, **kwargs) -> subprocess.CompletedProcess:
    "Run one of the package's commands as a user does."
    return subprocess.run(
        [Path(sys.executable).parent / name, *args], capture_output=True, text=True, timeout=600, **kwargs
    )


def demo_options(data: Path, runs: Path, settings: str = TINY) -> list[str]:
    "grad_demo on the trays of a folder, in a folder of runs."
    where = ["--data", str(data), "--category", "trays", "--runs", str(runs)]
    return [*where, "--overrides", settings, "--device", "cpu"]


def tiny_run(data: Path, runs: Path, **changes) -> Run:
    return open_run(data, "trays", runs=runs, overrides=TINY, device="cpu", progress=False, **changes)


def do_all(run: Run) -> dict:
    for n in run.generator_levels:
        generate_stage(run, n)
    for row in run.levels:
        detect_stage(run, row.level)
    return evaluate_stage(run)


@pytest.fixture(scope="module")
def demo(data, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    "One grad_demo on the trays, and its folder of runs."
    runs = tmp_path_factory.mktemp("runs")
    return command("grad_demo", *demo_options(data, runs)), runs


def test_demo_prints_the_table_and_keeps_what_it_made(demo):
    done, runs = demo
    assert done.returncode == 0, done.stderr
    for word in (
        "GRAD",
        "per-pixel Gaussian",
        "nearest picture",
        "logical_anomalies",
        "structural_anomalies",
        "pixel",
        "seconds by stage",
        "picture:",
    ):
        assert word in done.stdout, word
    folder = runs / "demo/trays/trays/seed0"
    levels = preset("demo").generator_levels("mvtec_loco")
    for name in [f"generate-{n:02d}" for n in levels] + ["detect-034", "table"]:
        assert (folder / f"notebooks/{name}.ipynb").is_file()
    for picture in ("contrastive.png", "maps.png", "scores.png"):
        assert (folder / "pictures" / picture).stat().st_size > 1000
    assert not list(folder.rglob("*.part")) and not list(folder.rglob("*.checkpoint"))


def test_result_says_how_it_was_made(demo):
    result = json.loads((demo[1] / "demo/trays/trays/seed0/result.json").read_text())
    want = {
        "image_auroc",
        "pixel_auroc",
        "by_type",
        "trivial",
        "preset",
        "dataset",
        "category",
        "seed",
        "seconds",
        "device",
        "versions",
        "data_sha256",
        "config",
    }
    assert want <= set(result) and result["config"]["detector"]["steps"] == 6 and result["dataset"] == "trays"
    assert result["stages"]["detect-034"]["products"] in PRODUCTS, "the precision of the scores"
    assert "products" not in result["stages"]["generate-03"]
    assert result["stages"]["generate-03"]["two_sample_auroc"] is None, "too few pictures to say how far it got"
    assert all(0 <= v <= 1 for v in (result["image_auroc"], result["pixel_auroc"], *result["by_type"].values()))


def test_figures_are_those_of_the_stored_scores(demo):
    from sklearn.metrics import roc_auc_score

    folder = demo[1] / "demo/trays/trays/seed0"
    result, scores = json.loads((folder / "result.json").read_text()), pd.read_csv(folder / "scores.csv")
    assert result["image_auroc"] == pytest.approx(roc_auc_score(scores.label, scores.score))
    assert result["image_auroc_mean"] == pytest.approx(np.mean(list(result["by_type"].values())))


def test_executed_notebooks_hold_no_error_and_got_their_parameters(demo):
    for path in (demo[1] / "demo/trays/trays/seed0/notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        assert not [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
        assert any(
            "injected-parameters" in c["metadata"].get("tags", []) and TINY in "".join(c["source"]) for c in cells
        )


def test_demo_says_what_is_planned_and_what_is_done_already(demo):
    plan = "5 stages: 3 generators, 1 detector and the table; 8 pictures to learn from, seen at 64 x 64 pixels"
    assert plan in demo[0].stderr and "%|" not in demo[0].stderr


def test_a_mask_that_the_evaluation_would_refuse_stops_the_demo_before_the_training(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    mask = next((tmp_path / "data/trays/ground_truth").rglob("*.png"))
    Image.fromarray(np.zeros_like(np.asarray(Image.open(mask)))).save(mask)
    done = command("grad_demo", *demo_options(tmp_path / "data", tmp_path / "runs"))
    assert done.returncode == 2 and str(mask) in done.stderr and "marks no pixel" in done.stderr
    assert not list((tmp_path / "runs").rglob("*.safetensors"))


def spoil_kinds(root: Path) -> None:
    shutil.rmtree(root / "test/good")
    shutil.rmtree(root / "validation")


def spoil_picture(root: Path) -> None:
    next((root / "test").rglob("*.png")).write_bytes(b"nonsense")


def spoil_size(root: Path) -> None:
    mask = next((root / "ground_truth").rglob("*.png"))
    Image.fromarray(np.asarray(Image.open(mask))[:-1]).save(mask)


def spoil_name(root: Path) -> None:
    picture = next((root / "test/logical_anomalies").rglob("*.png"))
    Image.open(picture).convert("RGB").save(picture.with_suffix(".jpg"))


@pytest.mark.parametrize(
    "spoil, said", [(spoil_picture, "whatever its name says"), (spoil_size, "size"), (spoil_name, "would share a mask")]
)
def test_what_can_be_known_before_the_training_is_the_same_for_every_command(data, tmp_path, spoil, said):
    "The check of grad_demo, of grad_run and of the batch's notebook is one."
    from grad_nb.datasets.readers import DataError, read_category
    from grad_nb.runs.check import check_run, check_stage

    root = Path(shutil.copytree(data / "trays", tmp_path / "data/trays"))
    spoil(root)
    messages = []
    for check in (
        lambda: check_stage(tmp_path / "batch", read_category(root), progress=False),
        lambda: check_run(tiny_run(tmp_path / "data", tmp_path / "runs"), print),
    ):
        with pytest.raises(DataError) as e:
            check()
        messages.append(str(e.value))
    assert messages[0] == messages[1] and str(root) in messages[0] and said in messages[0]


def test_what_a_check_notes_says_not_where_it_was_made(data, tmp_path):
    from grad_nb.datasets.readers import read_category
    from grad_nb.runs.check import check_stage

    root = Path(shutil.copytree(data / "trays", tmp_path / "data/trays"))
    picture = next((root / "test/good").rglob("*.png"))
    Image.open(picture).convert("RGB").save(picture.with_suffix(".jpg"))
    (note,) = check_stage(tmp_path / "batch", read_category(root), progress=False)["notes"]
    assert "would have maps of one name" in note and note.startswith("test/good/") and str(tmp_path) not in note


def test_one_kind_of_test_pictures_and_a_doubtful_mask_are_said_before_the_training(data, tmp_path):
    from grad_nb.runs.check import check_run

    root = Path(shutil.copytree(data / "trays", tmp_path / "data/trays"))
    spoil_kinds(root)
    notes = []
    run = tiny_run(tmp_path / "data", tmp_path / "runs")
    check_run(run, notes.append)
    assert "all 14 test pictures are anomalous: figures that need both kinds will be n/a" in notes
    again = []
    check_run(run, again.append)
    assert again == notes, "it is said again, and not looked for again"


def test_a_run_that_does_not_fit_on_the_disk_is_refused(data, tmp_path, monkeypatch):
    from grad_nb.datasets.readers import DataError
    from grad_nb.runs import check

    run = tiny_run(data, tmp_path / "runs")
    needed = check.run_bytes(run)
    monkeypatch.setattr(check, "room_left", lambda folder: needed - 1)
    with pytest.raises(DataError, match="No space left for this: up to .* MB are needed"):
        check.check_run(run, print)
    keys = {f"generate-{level:02d}": generate_key(run, level) for level in (3, 5, 17)}
    keys["detect-034"] = detect_key(run, 34)
    for name in keys:
        write_json(run.folder / f"{name}.json", {"fingerprint": "of other settings"})
    assert check.run_bytes(run) == needed, "they will all be made again"
    for name, key in keys.items():
        write_json(run.folder / f"{name}.json", {"fingerprint": key})
    assert 0 < check.run_bytes(run) < needed
    check.check_run(run, print)


def test_second_run_does_nothing_again(demo, data):
    stamps = {p: p.stat().st_mtime_ns for p in demo[1].rglob("*.safetensors")}
    start = time.time()
    again = command("grad_demo", *demo_options(data, demo[1]))
    assert again.returncode == 0 and "generate-" not in again.stdout.split("seconds by stage")[0]
    assert time.time() - start < 120
    assert stamps and stamps == {p: p.stat().st_mtime_ns for p in demo[1].rglob("*.safetensors")}


def test_other_detector_settings_keep_the_generators(demo, data):
    run = open_run(data, "trays", runs=demo[1], overrides=TINY + " detector.lr=0.002", device="cpu", progress=False)
    assert [[t.notebook for t in phase] for phase in plan(run)] == [["detect"], ["table"]]
    assert [
        t.notebook for t in plan(open_run(data, "trays", seed=1, runs=demo[1], overrides=TINY, device="cpu"))[0]
    ] == ["generate"] * len(run.generator_levels)


def test_settings_that_cannot_be_are_said_by_the_command_in_a_line(data, tmp_path):
    bad = command("grad_demo", *demo_options(data, tmp_path, TINY + " detector.block=3"))
    assert bad.returncode == 2 and "patches=128 is not a multiple" in bad.stderr and "Traceback" not in bad.stderr


def test_unknown_parameters_settings_and_presets_are_errors_before_anything_runs(data, tmp_path):
    with pytest.raises(ValueError, match="no parameter levle"):
        check_parameters(template("generate"), {"levle": 3})
    for name in ("generate", "detect", "table"):
        assert {"data", "category", "preset", "seed", "runs", "overrides", "device"} <= set(
            template_parameters(template(name))
        )
    wrong = {"detector.stepz=3": "did you mean 'steps'", "steps": "setting=value", "detector.steps=many": "number"}
    for text, said in wrong.items():
        with pytest.raises(ValueError, match=said):
            open_run(data, "trays", runs=tmp_path, overrides=text)
    with pytest.raises(ValueError, match="no preset"):
        open_run(data, "trays", "huge", runs=tmp_path)
    assert open_run(data, "trays", "fast", runs=tmp_path, overrides="generator.steps=7").preset == override(
        preset("fast", "mvtec_loco"), {"generator.steps": 7}
    )
    assert not list(tmp_path.iterdir())


def test_same_seed_same_scores_other_seed_others(data, tmp_path):
    first, second, other = (
        do_all(tiny_run(data, tmp_path / str(i), seed=s))
        and pd.read_csv(tmp_path / str(i) / f"demo/trays/trays/seed{s}/scores.csv").score
        for i, s in enumerate((0, 0, 1))
    )
    assert (first == second).all() and not (first == other).all()


def test_detect_before_generate_says_what_to_do(data, tmp_path):
    run = tiny_run(data, tmp_path)
    with pytest.raises(FileNotFoundError, match="run the generate stage"):
        detect_stage(run, 34)
    with pytest.raises(FileNotFoundError, match="run the detect stage"):
        evaluate_stage(run)
    with pytest.raises(ValueError, match="no level-4 PatchDiff"):
        generate_stage(run, 4)


def test_three_detectors_are_fused_by_held_out_normals(data, tmp_path):
    from dataclasses import replace

    from grad_nb.config import Level

    run = open_run(data, "trays", runs=tmp_path, overrides=TINY + " detector.block=1", device="cpu", progress=False)
    levels = (Level(34, 64, (3, 5)), Level(45, 48, (5,)), Level(64, 34, (5, 9)))
    run = replace(run, preset=replace(run.preset, levels_loco=levels))
    result = do_all(run)
    scores = pd.read_csv(run.folder / "scores.csv")
    assert set(result["by_level"]) == {"34", "45", "64"} and {"score_34", "score_45", "score_64", "score"} <= set(
        scores
    )
    assert len(split_normals(run)[1]) == 4
    without = replace(run, category=replace(run.category, validation=()))
    train, held = split_normals(without)
    assert len(train) == 7 and len(held) == 1 and not set(train) & set(held)


def test_a_changed_picture_changes_the_hash_of_the_data(data, tmp_path):
    import shutil

    copy = Path(shutil.copytree(data, tmp_path / "data"))
    before = tiny_run(copy, tmp_path / "runs")
    picture = before.category.train[0].path
    from PIL import Image

    pixels = np.asarray(Image.open(picture)).copy()
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(picture)
    assert tiny_run(copy, tmp_path / "runs").data_sha256 != before.data_sha256


@pytest.mark.slow
def test_a_killed_demo_goes_on(data, tmp_path):
    settings = TINY.replace("generator.steps=6", "generator.steps=800")
    args = [str(Path(sys.executable).parent / "grad_demo"), *demo_options(data, tmp_path, settings)]
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list(tmp_path.rglob("*.checkpoint")):
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, 9)
    process.wait()
    done = subprocess.run(args, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "GRAD" in done.stdout
    whole = command("grad_demo", *demo_options(data, tmp_path / "whole", settings))
    assert whole.returncode == 0
    read = lambda root: pd.read_csv(root / "demo/trays/trays/seed0/scores.csv").score
    assert (read(tmp_path) == read(tmp_path / "whole")).all()


def test_fit_and_predict_from_the_shell(data, tmp_path):
    trays = data / "trays"
    model = tmp_path / "m.grad"
    options = ["--preset", "demo", "--overrides", TINY, "--device", "cpu", "--quiet"]
    fit = command("grad_fit", str(trays / "train/good"), "--model", str(model), *options)
    assert fit.returncode == 0 and model.is_file(), fit.stderr
    notes = fit.stderr.splitlines()
    assert notes.pop(-1 if notes[-1].startswith("only ") else 0).startswith("only "), "too few pictures for that rate"
    assert all("generator did not get there" in line for line in notes), fit.stderr
    lines = command("grad_predict", str(model), str(trays / "test/good")).stdout.splitlines()
    assert lines[0] == "path,score,anomalous" and len(lines) == 7
    again = command("grad_predict", str(model), str(trays / "test/good"), "--format", "jsonl")
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    assert [f"{r['score']}" for r in rows] == [line.split(",")[1] for line in lines[1:]]


def test_errors_are_one_line(data, tmp_path):
    (tmp_path / "m.grad").write_bytes(b"not a model")
    for args, said in (
        (("grad_predict", str(tmp_path / "m.grad"), str(data)), "m.grad is not a whole safetensors file"),
        (("grad_demo", "--data", str(tmp_path), "--category", "nothing"), "nothing"),
        (("grad_fit", str(tmp_path / "empty")), "does not exist"),
        (("grad_demo", "--device", "cuda:9", "--data", str(data), "--category", "trays"), "cuda:9"),
    ):
        done = command(*args)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_help_of_every_command():
    for name in ("grad_demo", "grad_data", "grad_fit", "grad_predict", "grad_export", "grad_bench"):
        done = command(name, "--help")
        assert done.returncode == 0 and "usage" in done.stdout and len(done.stdout) > 200


def test_grad_data_makes_trays_and_finds_broken_pictures(tmp_path):
    made = command("grad_data", "trays", str(tmp_path), "--size", "64", "--quiet")
    assert made.returncode == 0 and "740 pictures" in made.stdout and "no problems" in made.stdout, made.stderr
    assert command("grad_data", "trays", str(tmp_path), "--size", "96").returncode == 2  # others are there
    victim = tmp_path / "trays/train/good/003.png"
    victim.write_bytes(
        bytes(b ^ 255 if 60 < i < 90 else b for i, b in enumerate(victim.read_bytes()))
    )  # whole from outside
    assert command("grad_data", "check", str(tmp_path), "--quiet").returncode == 0
    broken = command("grad_data", "check", str(tmp_path), "--decode", "--quiet")
    assert broken.returncode == 1 and "003.png" in broken.stdout and "1 problems" in broken.stdout


def test_templates_run_with_their_own_defaults():
    from grad_nb.config import PRESETS

    for name, levels in (
        ("generate", lambda p: p.generator_levels("mvtec_loco")),
        ("detect", lambda p: [r.level for r in p.levels("mvtec_loco")]),
    ):
        values = template_parameters(template(name))
        assert values["level"] in levels(PRESETS[values["preset"]])


def test_a_category_without_a_folder_or_without_test_pictures_is_refused_at_once(data, tmp_path):
    import shutil

    bare = Path(shutil.copytree(data / "trays/train/good", tmp_path / "parts"))
    for args, said in (
        (("--category", "bottle"), "needs --data"),
        (("--data", str(bare.parent), "--category", "parts"), "no test pictures"),
    ):
        done = command("grad_demo", *args, "--runs", str(tmp_path / "runs"))
        assert done.returncode == 2 and said in done.stderr and not (tmp_path / "runs").exists()


def test_files_and_arrays_of_the_same_pictures_score_alike(data):
    from grad_nb.datasets.readers import read_image
    from grad_nb.grad import GRAD
    from grad_nb.runs.stages import parse_overrides

    settings = override(
        preset("demo"),
        parse_overrides(
            TINY.replace("generator.size=64", "generator.size=48") + " detector.block=1 detector.pictures=4"
        ),
    )
    from dataclasses import replace

    from grad_nb.config import Level

    settings = replace(settings, levels_ad=(Level(34, 48, (3,)),))
    folder = data / "trays/test/good"
    model = GRAD(settings, device="cpu", progress=False).fit(data / "trays/train/good")
    array = np.stack([read_image(p) for p in sorted(folder.glob("*.png"))])
    assert (model.score_samples(folder) == model.score_samples(array)).all()


@pytest.mark.parametrize(
    "text",
    [
        "detector=5",
        "levels_loco=34",
        "name=x",
        "detector.block=0",
        "generator.steps=-5",
        "generator.width=7",
        "generator.sample_steps=2000",
        "detector.lr=nan",
        "detector.beta_density=0",
    ],
)
def test_impossible_settings_are_refused(text):
    from grad_nb.runs.stages import parse_overrides

    with pytest.raises(ValueError):
        override(preset("demo"), parse_overrides(text))
