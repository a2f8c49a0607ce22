"""A run that is cut into pieces ends with the figures of one that was not."""

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from grad_nb.config import GeneratorConfig
from grad_nb.contrastive import generate
from grad_nb.core import loop, progress, tensors
from grad_nb.core.files import read_json
from grad_nb.core.loop import TimeUp, run_steps, time_left, time_limit
from grad_nb.core.stages import run_stage
from grad_nb.patchdiff import new_patchdiff
from grad_nb.study import runner
from grad_nb.study.commands import grad_run


def after(monkeypatch, steps):
    "The time of the loops is over after so many steps."
    left = iter([1.0] * steps)
    monkeypatch.setattr(loop, "time_left", lambda: next(left, 0.0))


def test_a_time_limit_ends_and_an_inner_one_does_not_last():
    assert time_left() == float("inf")
    with time_limit(100):
        with time_limit(1):
            assert 0 < time_left() <= 1
        assert 1 < time_left() <= 100
    assert time_left() == float("inf")


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_a_loop_cut_after_any_step_goes_on_without_losing_one(monkeypatch, tmp_path, cut):
    seen = []

    def go():
        generator = torch.Generator().manual_seed(0)

        def step(i):
            seen.append(i)
            return torch.rand(1, generator=generator)

        return run_steps(step, 8, ["u"], dict(generator=generator), tmp_path / "c", "k", progress=False)

    with monkeypatch.context() as patch:
        after(patch, cut)
        with pytest.raises(TimeUp, match=f"{cut} of 8"):
            go()
    assert seen == list(range(cut))
    rows = go()
    assert seen == list(range(8)) and len(rows) == 8 and rows.u.nunique() == 8
    assert np.allclose(
        rows.u, torch.cat([torch.rand(1, generator=g) for g in [torch.Generator().manual_seed(0)] for _ in range(8)])
    )


def test_without_a_checkpoint_the_time_still_ends(monkeypatch):
    after(monkeypatch, 2)
    with pytest.raises(TimeUp):
        run_steps(lambda i: torch.zeros(1), 5, ["u"], {}, progress=False)


def test_pictures_made_in_pieces_are_the_same(monkeypatch, tmp_path):
    config = GeneratorConfig(size=16, width=8, n_samples=7, sample_batch=2, sample_steps=4, bf16=False)
    model = new_patchdiff(5, config)
    calls = []

    def make(**where):
        return generate(model, config, progress=False, **where)

    def piece(steps):
        with monkeypatch.context() as patch:
            after(patch, steps)
            return make(checkpoint=tmp_path / "c")

    whole = make()
    for _ in range(3):
        with pytest.raises(TimeUp, match="sampling 5"):
            piece(1)
        calls.append(tensors.read_tensors(tmp_path / "c")[1]["state"]["done"])
    assert calls == [1, 2, 3] and (piece(9) == whole).all()
    with torch.no_grad():
        model.out.bias.add_(0.5)
    assert (make(checkpoint=tmp_path / "c") != whole).any(), "pictures of other weights are not taken"


def test_the_seconds_of_a_cut_stage_add_up(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("grad_nb.core.stages.time.perf_counter", lambda: clock[0])

    def make(seconds, done):
        clock[0] += seconds
        if not done:
            raise TimeUp("cut")
        return {}, []

    for seconds in (10, 20):
        with pytest.raises(TimeUp):
            run_stage(tmp_path, "s", "k", lambda s=seconds: make(s, False))

    def interrupted():
        clock[0] += 7
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path, "s", "k", interrupted)
    assert run_stage(tmp_path, "s", "k", lambda: make(5, True))["seconds"] == 42
    assert run_stage(tmp_path, "s", "other", lambda: make(5, True))["seconds"] == 5, "of another run, nothing is added"


def test_a_training_that_diverges_ends_with_an_error(tmp_path):
    done = []

    def step(i):
        done.append(i)
        return torch.tensor([math.nan if i >= 6 else 1.0])

    for steps in (10, 8):  # before a checkpoint, and at the end
        file = tmp_path / str(steps)
        with pytest.raises(ValueError, match="net diverged: its loss is not a finite number from step 7 on"):
            run_steps(step, steps, ["loss"], {"w": torch.nn.Linear(1, 1)}, file, "k", 4, "net", progress=False)
        assert tensors.read_tensors(file)[1]["state"]["done"] == 4, "the last that was right"
    assert max(done) == 7


def test_the_evaluation_waits_for_a_piece_of_its_own(monkeypatch):
    made = []
    stage = lambda name, skipped: (name, lambda: made.append(name) or {"skipped": skipped})
    monkeypatch.setattr(runner, "stages", lambda run: [stage("detect-034", False), stage("evaluate", False)])
    with time_limit(30), pytest.raises(TimeUp, match="evaluate"):
        runner.do_stages(None, lambda text: None)
    monkeypatch.setattr(runner, "stages", lambda run: [stage("detect-034", True), stage("evaluate", False)])
    with time_limit(30):
        runner.do_stages(None, lambda text: None)
    assert made == ["detect-034", "detect-034", "evaluate"]


@pytest.mark.slow
def test_the_command_cut_by_its_own_minutes_gives_the_figures_of_an_undisturbed_run(data, tmp_path):
    settings = TINY.replace("generator.steps=6", "generator.steps=300").replace(
        "detector.steps=6", "detector.steps=300"
    )

    def piece(runs, minutes):
        command = [
            Path(sys.executable).with_name("grad_run"),
            "--data",
            str(data),
            "--category",
            "trays",
            "--preset",
            "demo",
            "--overrides",
            settings,
            "--device",
            "cpu",
            "--minutes",
            str(minutes),
            "--runs",
            str(tmp_path / runs),
            "--quiet",
        ]
        return subprocess.run(command, capture_output=True, text=True)

    begun = time.perf_counter()
    whole = piece("whole", 30)
    assert whole.returncode == 0, whole.stderr
    quarter = (time.perf_counter() - begun) / 4 / 60  # minutes: on a busy machine everything takes longer, starting too
    pieces = [piece("cut", quarter)]
    while pieces[-1].returncode == runner.MORE and len(pieces) < 40:
        pieces.append(piece("cut", quarter))
    assert pieces[-1].returncode == 0 and len(pieces) > 2, pieces[-1].stdout + pieces[-1].stderr
    a, b = (read_json(next((tmp_path / runs).rglob("result.json"))) for runs in ("whole", "cut"))
    assert {k: v for k, v in a.items() if k not in ("seconds", "stages")} == {
        k: v for k, v in b.items() if k not in ("seconds", "stages")
    }
    assert {p.name for p in (tmp_path / "cut").rglob("*.png")} == {"contrastive.png", "maps.png"}
    assert not list((tmp_path / "cut").rglob("*.checkpoint")) and not list((tmp_path / "cut").rglob(".*.pieces.json"))


def test_the_command_says_which_stage_of_how_many_and_how_long(data, tmp_path, capsys, monkeypatch):
    "In a log: before anything runs, then as soon as it is known, and after a cut which stages were done before."
    monkeypatch.setattr(progress, "SOON", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    options = {"overrides": TINY, "device": "cpu", "runs": str(tmp_path)}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        after(patch, 8)
        grad_run(str(data), "trays", "demo", **options)
    first = capsys.readouterr().err.splitlines()
    grad_run(str(data), "trays", "demo", **options)
    then = capsys.readouterr().err.splitlines()
    (planned,) = [line for line in first if line.startswith("5 stages: 3 generators, 1 detector and the table; ")]
    assert "done before" not in planned and f"{planned}; done before: 1" in then
    assert "stage 1 of 5 · less than 1 min left" in first and "stage 4 of 5 · less than 1 min left" in then
    grad_run(str(data), "trays", "demo", quiet=True, **options)
    assert "stage" not in capsys.readouterr().err


def test_a_category_without_test_pictures_is_refused_at_once(tmp_path, capsys):
    for i in range(5):
        (tmp_path / "data/part").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)).save(
            tmp_path / f"data/part/{i}.png"
        )
    with pytest.raises(SystemExit):
        grad_run(str(tmp_path / "data"), "part", "demo", runs=str(tmp_path / "runs"), device="cpu", quiet=True)
    assert "no test pictures" in capsys.readouterr().err and not (tmp_path / "runs").exists()
