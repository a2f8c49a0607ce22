"""How far work is: bars on a terminal, a line a minute in a log, a plan with the minutes that are left."""

import io
import re
import sys
from pathlib import Path

import pytest
from shared import tiny

from grad_nb.core import progress
from grad_nb.core.loop import run_steps
from grad_nb.core.progress import Plan, counted, in_minutes, plan_line, plan_text, seconds_left, tell_plan, tqdm
from grad_nb.datasets.trays import make_trays


@pytest.fixture
def clock(monkeypatch):
    "A clock that the test moves."
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_a_minute_and_short_work_none(clock, capsys):
    for _ in tqdm(range(100), "judging"):
        clock[0] += 0.5
    assert capsys.readouterr().err == ""
    for _ in tqdm(range(100), "judging"):
        clock[0] += 3.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 and lines[0] == "judging: 20 of 100 · 4 min left" and "\r" not in "".join(lines)
    for _ in tqdm(range(100), "judging", disable=True):
        clock[0] += 3.0
    assert capsys.readouterr().err == ""


def test_a_terminal_has_bars_with_what_the_plan_says(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    plan = Plan({"generate-05": 1.0, "detect-034": 1.0})
    with plan.stage("generate-05"):
        for _ in tqdm(range(3), "PatchDiff 5", file=sys.stderr, delay=0.0):
            pass
    assert "stage 1 of 2 · PatchDiff 5" in sys.stderr.getvalue()


def test_a_bar_that_is_full_still_belongs_to_its_stage():
    plan = Plan({"generate-05": 1.0, "detect-034": 1.0}, show=False)
    with plan.stage("generate-05"):
        plan.at("generate-05", 1.0)
        assert str(plan) == "stage 1 of 2"
    assert str(plan) == "stage 2 of 2"


def test_a_plan_measures_each_kind_and_leaves_the_first_step_out(clock):
    plan = Plan({"generate-05": 1.0, "generate-09": 2.0, "detect-034": 3.0}, show=False)
    clock[0] += 100.0  # the first step also prepares
    plan.at("generate-05", 0.1)
    assert seconds_left(plan) is None
    clock[0] += 9.0
    plan.at("generate-05", 0.2)
    assert seconds_left(plan) == pytest.approx(90 * (0.8 + 2 + 3))
    plan.end("generate-05")
    plan.at("generate-09", 0.0)
    clock[0] += 90.0
    plan.at("generate-09", 0.5)
    plan.end("generate-09")
    plan.at("detect-034", 0.0)
    clock[0] += 300.0
    plan.at("detect-034", 0.5)
    assert plan_text(plan) == "stage 3 of 3 · 5 min left"


def test_a_stage_whose_bar_is_full_is_not_done_before_it_says_so():
    plan = Plan({"generate-05": 1.0, "tables": 1.0}, show=False)
    plan.now = "generate-05: 100%"
    plan.at("generate-05", 1.0)
    assert plan_line(plan).startswith("0 of 2 stages done")
    plan.end("generate-05")
    assert plan_line(plan).startswith("1 of 2 stages done")
    plan.at("tables", 1.0)
    plan.at("tables", 0.1)
    assert plan_line(plan).startswith("1 of 2 stages done"), "the number of stages done never falls"


def test_a_stage_of_two_loops_does_not_begin_again(clock):
    plan = Plan({"generate-05": 1.0}, show=False, parts={"generate": (0.8, 0.2)})
    for share, whole in ((0.5, 0.4), (1.0, 0.8), (0.5, 0.9), (1.0, 0.99)):
        plan.at("generate-05", share)
        assert plan.shares["generate-05"] == pytest.approx(whole)


def test_every_bar_is_one_that_a_log_does_not_get(capsys, tmp_path):
    "Bars come from `core.progress`, but for the two that are not there at all where stderr is no terminal."
    for path in Path(progress.__file__).parents[1].rglob("*.py"):
        text = path.read_text("utf-8")
        if re.search(r"^from tqdm import tqdm$", text, re.MULTILINE):
            assert all("disable=None" in line for line in text.splitlines() if re.search(r"\btqdm\(", line)), path
    make_trays(tmp_path, seed=1, size=64, train=8, validation=0, good=1, logical=0, structural=0)
    assert capsys.readouterr().err == ""


def test_loops_tell_the_plan(clock, capsys):
    import torch

    def step(i):
        clock[0] += 10.0
        return torch.zeros(1)

    plan = Plan({"a-1": 1.0, "a-2": 1.0})
    plan.announce("2 stages")
    for name in ("a-1", "a-2"):
        with plan.stage(name):
            run_steps(step, 20, ["loss"], {}, progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == ["2 stages", "stage 1 of 2 · 6 min left", "stage 1 of 2 · 5 min left"]
    assert lines[-1] == "stage 2 of 2 · less than 1 min left" and 6 <= len(lines) <= 9


def test_fit_says_what_it_will_do_and_what_it_makes_again(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(progress, "SOON", 1e9)  # however slow this machine is
    good = make_trays(tmp_path, seed=1, size=64, train=8, validation=0, good=1, logical=0, structural=0, progress=False)
    good = good / "train/good"
    model = tiny().set_params(progress=True, work_dir=tmp_path / "work").fit(good)
    line = "4 stages: 3 generators and 1 detector; 6 pictures to learn from, seen at 64 x 64 pixels\n"
    assert capfd.readouterr().err == line and "made again" not in caplog.text
    model.fit(good)
    assert capfd.readouterr().err == f"{line.strip()}; done before: 4\n" and "made again" not in caplog.text
    tiny(detector__lr=0.01).set_params(work_dir=tmp_path / "work").fit(good)
    assert "are made again: detector-034" in caplog.text and "generate-" not in caplog.text
    assert capfd.readouterr().err == ""


def test_known_times_are_said_until_the_work_knows_better_and_shared_by_what_goes_on_side_by_side(clock):
    costs = {f"table-{i}": 60.0 for i in range(4)} | {"tables-0": 30.0}
    plan = Plan(costs, show=False, at_once={"table": 2}, in_seconds=True)
    assert seconds_left(plan) == 4 * 60 / 2 + 30
    plan.at("table-0", 0.0)
    clock[0] += 60.0
    plan.at("table-0", 0.5)  # twice as long as was thought
    assert seconds_left(plan) == pytest.approx(3.5 * 120 / 2 + 30)
    for i in range(3):
        plan.end(f"table-{i}")
    tell_plan(plan, "bottle: 12%")
    assert plan_line(plan) == "3 of 5 stages done · 2 min left · bottle: 12%", "one is left, and nothing beside it"


def test_one_thing_is_not_called_many():
    assert (counted(0, "stage"), counted(1, "stage"), counted(2, "stage")) == ("0 stages", "1 stage", "2 stages")


@pytest.mark.parametrize(
    "seconds, words", [(10, "less than 1 min"), (600, "10 min"), (5400, "90 min"), (9000, "2.5 h")]
)
def test_times_that_are_left_in_words(seconds, words):
    assert in_minutes(seconds) == words
