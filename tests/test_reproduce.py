"""The batch as a user starts it: planned, run, broken into, and finished by the same command."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from conftest import TINY

from grad_nb.reproduce import find_categories, hold_folder, in_words, job_done, lock, official, plan_batch

COMMAND = Path(sys.executable).parent / "grad_reproduce"


def arguments(data: Path, runs: Path, *more: str) -> list[str]:
    return [str(COMMAND), "--data", str(data), "--dataset", "trays", "--preset", "demo", "--seeds", "0", "--runs", str(runs),
            "--overrides", TINY, "--device", "cpu", *more]


def reproduce(data: Path, runs: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments(data, runs, *more), capture_output=True, text=True, timeout=900)


def test_the_categories_are_those_of_the_data_sets():
    assert len(official("mvtec_ad")) == 15 and len(official("mvtec_loco")) == 5 and official("trays") == ["trays"]
    with pytest.raises(ValueError, match="no data set 'coco'"): official("coco")


def test_what_is_not_there_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="no category botle"): find_categories(data, "mvtec_ad", ["botle"])
    with pytest.raises(ValueError, match="holds no category"): find_categories(tmp_path, "mvtec_ad")
    with pytest.raises(ValueError, match="each once"): plan_batch(data, "trays", "demo", (0, 0), tmp_path, overrides=TINY, device="cpu")
    assert find_categories(data, "trays") == [("trays", str(data), "trays")]


def test_a_plan_has_every_stage_once_and_waits_for_what_it_needs(data, tmp_path):
    batch = plan_batch(data, "trays", "demo", (0, 1), tmp_path, overrides=TINY, device="cpu")
    markers = [job["marker"] for job in batch["jobs"]]
    count = pd.Series([job["notebook"] for job in batch["jobs"]]).value_counts().to_dict()
    assert count == {"check": 1, "generate": 6, "detect": 2, "table": 2, "tables": 1} and len(set(markers)) == len(markers)
    for i, job in enumerate(batch["jobs"]): assert set(job["needs"]) <= set(markers[:i])
    assert not any(job_done(batch["folder"], job) for job in batch["jobs"])


def test_a_category_that_cannot_be_read_leaves_only_its_check(data, tmp_path):
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(broken / "trays/train")
    batch = plan_batch(broken, "trays", "demo", (0,), tmp_path / "runs", overrides=TINY, device="cpu")
    assert [job["notebook"] for job in batch["jobs"]] == ["check", "tables"]


def test_a_folder_is_held_by_one_batch(tmp_path):
    held = hold_folder(tmp_path)
    with pytest.raises(RuntimeError, match="another batch is running"): hold_folder(tmp_path)
    held.close()
    hold_folder(tmp_path).close()
    assert lock(tmp_path / "x", wait=False) is not None


@pytest.mark.parametrize("seconds, words", [(5, "5 s"), (90, "1.5 min"), (7200, "2.0 h")])
def test_times_in_words(seconds, words): assert in_words(seconds) == words


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_does_nothing(data, tmp_path):
    done = reproduce(data, tmp_path, "--dry-run")
    assert done.returncode == 0 and "7 of 7 notebooks to run" in done.stdout and "total" in done.stdout, done.stderr
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.slow
def test_a_killed_batch_is_finished_by_the_same_command_with_the_same_figures(data, tmp_path):
    driver = subprocess.Popen(arguments(data, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "killed").rglob("generate-*.json")):
        assert driver.poll() is None, "it ended before it could be killed"
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGKILL); driver.wait()
    for name in ("killed", "whole"):
        done = reproduce(data, tmp_path / name)
        assert done.returncode == 0 and "7 of 7 notebooks are done" in done.stdout, done.stdout + done.stderr
        assert (tmp_path / name / "demo/tables/table_1.md").is_file()
    killed, whole = (pd.read_csv(tmp_path / name / "demo/trays/trays/seed0/scores.csv") for name in ("killed", "whole"))
    assert (killed.score == whole.score).all()
    again = reproduce(data, tmp_path / "whole")
    assert again.returncode == 0 and "0 of 7 notebooks to run" in again.stdout


@pytest.mark.slow
def test_a_broken_picture_fails_its_category_and_is_named(data, tmp_path):
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    (broken / "trays/train/good/003.png").write_bytes(b"nonsense")
    done = reproduce(broken, tmp_path / "runs", "--retries", "0")
    assert done.returncode == 1 and "003.png" in done.stdout and "its notebook, with the traceback" in done.stdout, done.stdout + done.stderr
    shutil.copy2(data / "trays/train/good/003.png", broken / "trays/train/good/003.png")
    assert reproduce(broken, tmp_path / "runs").returncode == 0
    assert json.loads((tmp_path / "runs/demo/trays/trays/seed0/result.json").read_text())["category"] == "trays"
