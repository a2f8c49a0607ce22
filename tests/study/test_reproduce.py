"""The batch as a user starts it: planned, run, broken into, and finished by the same command."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY
from shared import ROOT

from grad_nb.config import GeneratorConfig, to_dict
from grad_nb.core.files import file_sha256, read_json, write_json
from grad_nb.core.progress import BARS, tell_plan
from grad_nb.datasets.readers import DataError
from grad_nb.runs.stages import generate_key, open_run, split_normals, standardising
from grad_nb.study import calibration
from grad_nb.study import reproduce as reproduce_module
from grad_nb.study.reproduce import (
    HOLDER,
    LAST,
    announce,
    at_once,
    batch_summary,
    estimate,
    failures,
    find_categories,
    forecast,
    hold_folder,
    hold_or_inherit,
    in_words,
    job_done,
    log_of,
    official,
    plan_batch,
    plan_of,
    report_of,
    room_left,
    room_needed,
    snakemake_call,
)
from grad_nb.study.speed import SPEED_FILE
from grad_nb.study.tables import VARIANTS, variant
from grad_nb.study.variants import table_4_presets, variant_run

COMMAND = Path(sys.executable).parent / "grad_reproduce"


def arguments(data: Path, runs: Path, *more: str) -> list[str]:
    return [
        str(COMMAND),
        "--data",
        str(data),
        "--dataset",
        "trays",
        "--preset",
        "demo",
        "--seeds",
        "0",
        "--runs",
        str(runs),
        "--overrides",
        TINY,
        "--device",
        "cpu",
        *more,
    ]


def reproduce(data: Path, runs: Path, *more: str) -> subprocess.CompletedProcess:
    return subprocess.run(arguments(data, runs, *more), capture_output=True, text=True, timeout=1800)


def finish(data: Path, runs: Path, *more: str) -> str:
    "The same command again: everything must be done then; what it said."
    done = reproduce(data, runs, *more)
    batch = read_json(runs / "demo/batch.json")
    assert done.returncode == 0 and f"{len(batch['jobs'])} of {len(batch['jobs'])} notebooks are done" in done.stdout, (
        done.stdout + done.stderr
    )
    return done.stdout


def outcome(runs: Path, run: str = "trays/trays/seed0") -> dict:
    "All figures of a run to the last digit: every score, and every figure of the result."
    result = read_json(runs / "demo" / run / "result.json")
    figures = {k: v for k, v in result.items() if k not in ("seconds", "git", "versions", "stages", "device")}
    return {"scores": pd.read_csv(runs / "demo" / run / "scores.csv").to_dict("list"), "figures": figures}


def processes(*words: str) -> list[int]:
    "Processes whose command line has all these words."
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            said = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if all(word in said for word in words):
            found.append(int(path.parent.name))
    return found


def wait_for(found, driver: subprocess.Popen, seconds: float = 900):
    "What `found` gives as soon as it is something; the driver must not end before."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if said := found():
            return said
        assert driver.poll() is None, "it ended before it could be disturbed"
        time.sleep(0.05)
    raise AssertionError("nothing to disturb came up")


def test_the_categories_are_those_of_the_data_sets():
    assert len(official("mvtec_ad")) == 15 and len(official("mvtec_loco")) == 5 and official("trays") == ["trays"]
    with pytest.raises(ValueError, match="no data set 'coco'"):
        official("coco")


def test_what_is_not_there_is_said(data, tmp_path):
    with pytest.raises(ValueError, match="no category botle"):
        find_categories(data, "mvtec_ad", ["botle"])
    with pytest.raises(ValueError, match="holds no category"):
        find_categories(tmp_path, "mvtec_ad")
    with pytest.raises(ValueError, match="each once"):
        plan_batch(data, "trays", "demo", (0, 0), tmp_path, overrides=TINY, device="cpu")
    write_json(tmp_path / "bench.json", {"x": 1})
    with pytest.raises(ValueError, match="not a file of grad_bench"):
        plan_batch(
            data, "trays", "demo", (0,), tmp_path, overrides=TINY, device="cpu", bench=str(tmp_path / "bench.json")
        )
    assert find_categories(data, "trays") == [("trays", str(data), "trays")]


def test_a_plan_has_every_stage_once_and_waits_for_what_it_needs(data, tmp_path):
    batch = plan_batch(data, "trays", "demo", (0, 1), tmp_path, overrides=TINY, device="cpu")
    markers = [job["marker"] for job in batch["jobs"]]
    count = Counter(job["notebook"] for job in batch["jobs"])
    last = {name: count.pop(name, 0) for name in LAST}
    assert count == {"speed": 1, "check": 1, "generate": 6, "detect": 2, "table": 2} and len(set(markers)) == len(
        markers
    )
    assert last["tables"] == 1 and last["figures"] <= 1
    for i, job in enumerate(batch["jobs"]):
        assert set(job["needs"]) <= set(markers[:i])
    assert not any(job_done(batch["folder"], job) for job in batch["jobs"])


def test_a_plan_with_one_network_has_one_stage_more(data, tmp_path):
    overrides = f"{TINY} one_network=true"
    batch = plan_batch(data, "trays", "demo", (0,), tmp_path, overrides=overrides, device="cpu", table4=True)
    jobs = {job["notebook"]: job for job in batch["jobs"]}
    assert list(jobs["student"]["needs"]) == [jobs["detect"]["marker"]], "it waits for its teachers"
    assert jobs["student"]["marker"] in jobs["table"]["needs"] and batch["threads"]["student"] >= 1
    run = open_run(data, "trays", "demo", 0, tmp_path, overrides, "cpu", False)
    assert not variant_run(run, jobs["variant"]["values"]["variant"]).preset.one_network


def test_a_plan_with_table_4_takes_the_pictures_that_are_made_once(data, tmp_path):
    plain, whole = (
        plan_batch(data, "trays", "demo", (0,), tmp_path, overrides=TINY, device="cpu", table4=table4)
        for table4 in (False, True)
    )
    there = [job["marker"] for job in plain["jobs"]]
    more = [job for job in whole["jobs"] if job["marker"] not in there]
    generate = {job["marker"] for job in plain["jobs"] if job["notebook"] == "generate"}
    assert [job["values"]["variant"] for job in more] == list(VARIANTS.values())
    assert all(set(job["needs"]) == generate and job["notebook"] == "variant" for job in more)
    assert {job["marker"] for job in more} <= set(whole["jobs"][-1]["needs"]), "tables wait for the variants"
    default = plan_batch(data, "trays", "demo", (0,), tmp_path, overrides=TINY, device="cpu")
    assert len(default["jobs"]) == len(plain["jobs"]), "the rows of Table 4 are asked for, but for the paper's preset"


def test_a_variant_has_the_paper_s_detectors_and_one_loss(data, tmp_path):
    run = open_run(data, "trays", "demo", 0, tmp_path, TINY, "cpu", False)
    variants = {name: variant_run(run, name) for name in table_4_presets(run.preset, run.category.layout)}
    for name, other in variants.items():
        assert {row.level: row.size for row in other.levels} == {34: 256, 68: 128, 136: 64}
        assert variant(to_dict(other.preset.detector)) == name and other.made == run.folder
        assert [generate_key(other, n) for n in other.generator_levels] == [
            generate_key(run, n) for n in run.generator_levels
        ]
    assert len({other.folder for other in variants.values()}) == 4
    with pytest.raises(ValueError, match="no variant of 'demo' here; there are baseline"):
        variant_run(run, "whole")


def test_a_category_that_cannot_be_read_leaves_only_its_check(data, tmp_path):
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    shutil.rmtree(broken / "trays/train")
    batch = plan_batch(broken, "trays", "demo", (0,), tmp_path / "runs", overrides=TINY, device="cpu")
    assert [job["notebook"] for job in batch["jobs"]] == [
        "speed",
        "check",
        *(job["notebook"] for job in batch["jobs"] if job["notebook"] in LAST),
    ]


def test_a_picture_that_cannot_be_read_keeps_no_other_category_from_being_planned(data, tmp_path):
    root = tmp_path / "mvtec_ad"
    for category in ("bottle", "cable"):
        shutil.copytree(data / "trays", root / category)
        (root / category / "trays.json").unlink()
    first = min((root / "cable/train/good").iterdir())
    first.write_bytes(b"\x89PNG broken")
    plan = lambda **more: plan_batch(tmp_path, "mvtec_ad", "demo", (0,), tmp_path / "runs", device="cpu", **more)
    notebooks = Counter(job["folder"].split("/")[1] for job in plan()["jobs"] if "/" in job["folder"])
    assert notebooks["cable"] == 1 and notebooks["bottle"] > 4
    with pytest.raises(ValueError, match="no setting"):
        plan(overrides="detector.step=3")


def test_a_job_that_runs_has_not_failed(data, tmp_path):
    batch = plan_batch(data, "trays", "demo", (0,), tmp_path, overrides=TINY, device="cpu")
    job = next(job for job in batch["jobs"] if job["notebook"] == "generate")
    log = log_of(batch["folder"], job)
    log.parent.mkdir(parents=True)
    log.write_text("")
    assert list(failures(batch)) == [job["marker"]]
    with reproduce_module._job_lock(Path(batch["folder"]), job):
        assert not failures(batch)
    assert list(failures(batch)) == [job["marker"]]


def test_one_gpu_that_is_named_is_the_only_one(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(reproduce_module, "pick_device", lambda name: torch.device("cuda" if name == "auto" else name))
    found = {device: reproduce_module._gpus_for(device, "") for device in ("auto", "cuda", "cuda:1", "cpu")}
    assert found == {"auto": 4, "cuda": 4, "cuda:1": 1, "cpu": 0}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    batch = {"gpu": 1, "gpus": 1, "folder": str(tmp_path)}
    reproduce_module._free_gpu(batch, {"notebook": "generate"}).close()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2,3", "its number counts among those"


def test_a_folder_is_held_by_one_batch(tmp_path):
    held = hold_folder(tmp_path)
    with pytest.raises(RuntimeError, match="another batch is running"):
        hold_folder(tmp_path)
    with pytest.raises(RuntimeError, match="another batch is running"):
        hold_or_inherit(tmp_path)
    held.close()
    hold_or_inherit(tmp_path).close()


def test_a_batch_that_is_inherited_ends_with_its_command(tmp_path):
    "The command holds the folder and starts Snakemake; killed, it takes Snakemake with it, and the folder is free."
    child = (
        "import time\n"
        "from grad_nb.study.reproduce import hold_or_inherit\n"
        f"assert hold_or_inherit({str(tmp_path)!r}) is None\n"
        "print('in', flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = (
        "import os, subprocess, sys\n"
        "from grad_nb.study.reproduce import HOLDER, hold_folder\n"
        f"held = hold_folder({str(tmp_path)!r})\n"
        f"env = os.environ | {{HOLDER: f'{{os.getpid()}} ' + {str(tmp_path)!r}}}\n"
        f"p = subprocess.Popen([sys.executable, '-c', {child!r}], pass_fds=[held.fileno()], env=env)\n"
        "p.wait()\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "in\n"
    with pytest.raises(RuntimeError, match="another batch is running"):
        hold_folder(tmp_path)
    driver.kill()
    driver.wait()
    for _ in range(200):
        try:
            return hold_folder(tmp_path).close()
        except RuntimeError:
            time.sleep(0.05)
    raise AssertionError(f"what was started by the killed command still holds {tmp_path}, {HOLDER}")


def planned(data: Path, runs: Path, seeds=(0,)) -> dict:
    batch = plan_batch(data, "trays", "demo", seeds, runs, overrides=TINY, device="cpu")
    write_json(batch["batch"], batch)
    return batch


def leave(batch: dict, job: dict, seconds: float = 7.0) -> None:
    "What a job that is done leaves, without its work."
    folder = Path(batch["folder"])
    if job["record"]:
        write_json(folder / job["record"], {"fingerprint": "f", "outputs": {}, "seconds": seconds})
    write_json(folder / job["marker"], {"key": job["key"]} | ({"record": "f"} if job["record"] else {}))


def test_what_is_left_is_what_is_not_done_with_these_settings(data, tmp_path):
    batch = planned(data, tmp_path)
    for job in batch["jobs"]:
        leave(batch, job)
    assert (
        all(job_done(batch["folder"], job) for job in batch["jobs"])
        and list(batch_summary(batch))[0] == f"{len(batch['jobs'])} of {len(batch['jobs'])} notebooks are done"
    )
    other = plan_batch(data, "trays", "demo", (0,), tmp_path, overrides=f"{TINY} detector.lr=0.5", device="cpu")
    again = Counter(job["notebook"] for job in other["jobs"] if not job_done(other["folder"], job))
    assert again == {"detect": 1, "table": 1} | {
        name: 1 for name in LAST if any(job["notebook"] == name for job in other["jobs"])
    }


def test_a_job_whose_files_were_changed_after_its_record_is_not_done(data, tmp_path):
    batch = planned(data, tmp_path)
    job = next(job for job in batch["jobs"] if job["notebook"] == "detect")
    folder, record = Path(batch["folder"]), Path(batch["folder"]) / job["record"]
    record.parent.mkdir(parents=True, exist_ok=True)
    weights = record.with_name("weights")
    weights.write_text("a")
    write_json(record, {"fingerprint": "f", "outputs": {"weights": file_sha256(weights)}})
    write_json(folder / job["marker"], {"key": job["key"], "record": "f"})
    later = record.stat().st_mtime + 10
    os.utime(weights, (later, later))
    assert job_done(folder, job), "the same file, touched"
    weights.write_text("b")
    os.utime(weights, (later, later))
    assert not job_done(folder, job), "an interrupted run with other settings has begun to write"


def test_a_cluster_gets_threads_that_do_not_depend_on_this_machine(data, tmp_path, monkeypatch):
    where = {"data": data, "dataset": "trays", "preset": "demo", "seeds": (0,), "runs": tmp_path, "overrides": TINY}
    plans = []
    for cores in (1, 128):
        monkeypatch.setattr(reproduce_module, "cpu_count", lambda cores=cores: cores)
        plans.append(plan_batch(**where, device="cuda", executor="slurm")["threads"])
        assert plan_batch(**where, device="cpu")["threads"]["speed"] == cores, "nothing runs beside it"
    assert plans[0] == plans[1] and set(plans[0].values()) == {reproduce_module.CLUSTER_THREADS}


def test_the_estimate_guesses_first_and_then_knows(data, tmp_path):
    batch = planned(data, tmp_path, (0, 1))
    times, guessed = forecast(batch)
    work, here = estimate(batch, times)
    assert guessed == 8 and 0 < here <= work
    for job in batch["jobs"]:
        if job["marker"].startswith("trays/trays/seed0") or job["notebook"] in ("check", "speed"):
            leave(batch, job, 1000.0)
    times, guessed = forecast(batch)
    work, here = estimate(batch, times)
    assert guessed == 0 and 5000 < work < 5200, "five stages of the other seed, 1000 seconds each"
    assert here < work or at_once(batch, "generate") == 1
    more = f"{TINY} generator.steps=9 detector.steps=9"
    other = plan_batch(data, "trays", "demo", (0, 1), tmp_path, overrides=more, device="cpu")
    assert forecast(other)[1] == 8, "those took other steps"


def test_a_longer_training_is_guessed_to_take_longer(data, tmp_path):
    guesses = [
        estimate(plan_batch(data, "trays", "demo", (0,), tmp_path / name, overrides=more, device="cpu"))[0]
        for name, more in (("short", TINY), ("long", f"{TINY} detector.steps=100000000"))
    ]
    assert guesses[1] > 20 * guesses[0]


def test_the_second_detector_of_a_notebook_is_further_than_the_first(data, tmp_path):
    "A row of Table 4 trains three in one notebook: what is done does not fall when the next one begins."
    batch = plan_batch(data, "trays", "demo", (0,), tmp_path, overrides=TINY, device="cpu", table4=True)
    plan, names = plan_of(batch, dict.fromkeys((job["marker"] for job in batch["jobs"]), 100.0))
    row = next(names[job["marker"]] for job in batch["jobs"] if job["notebook"] == "variant")
    shares = []
    for share in (0.1, 0.9, 0.1, 0.9, 0.1, 0.9):
        plan.at(row, share)
        shares.append(plan.shares[row])
    assert shares == sorted(shares) and shares[1] < 0.4 and shares[-1] > 0.9


def test_the_speed_is_measured_unless_a_file_of_it_is_given(data, tmp_path):
    where = dict(data=data, dataset="trays", preset="demo", seeds=(0,), overrides=TINY, device="cpu", runs=tmp_path)
    batch = plan_batch(**where)
    speed, last = batch["jobs"][0], batch["jobs"][-1]
    assert speed["marker"] == "done/speed" and speed["marker"] in last["needs"]
    assert last["values"]["bench"] == str(tmp_path / "demo" / SPEED_FILE), "it need not be there when they run"
    assert speed["key"] != plan_batch(**where | {"overrides": f"{TINY} detector.width=0.2"})["jobs"][0]["key"]
    write_json(tmp_path / "bench.json", {"detectors": []})
    given = plan_batch(**where, bench=str(tmp_path / "bench.json"))
    assert "speed" not in {job["notebook"] for job in given["jobs"]}
    assert given["jobs"][-1]["values"]["bench"] == str(tmp_path / "bench.json")


def test_a_batch_tells_in_a_line_how_far_it_is(data, tmp_path, monkeypatch, capsys):
    batch = planned(data, tmp_path)
    folder = Path(batch["folder"])
    plan, names = plan_of(batch, dict.fromkeys([job["marker"] for job in batch["jobs"]], 60.0))
    monkeypatch.setenv(BARS, "0")
    jobs = {job["stage"]: job for job in batch["jobs"]}
    log = log_of(folder, jobs["generate-05"])
    log.parent.mkdir(parents=True)
    log.write_text("PatchDiff 5:  50%|##### | 1/2 [00:01<00:01,  1.00step/s]")
    leave(batch, jobs["check"])
    capsys.readouterr()
    left = reproduce_module._without_done(folder, batch["jobs"], (plan, names))
    assert len(left) == len(batch["jobs"]) - 1 and "done: trays/trays/check" in capsys.readouterr().out
    reproduce_module._tell(folder, left, (plan, names))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("1 of 9 stages done · ") and "min left · " in said[0]
    assert said[0].endswith("trays/trays/seed0/generate-05: PatchDiff 5:  50%|##### | 1/2 [00:01<00:01,  1.00step/s]")
    tell_plan(plan, "something else")
    assert not capsys.readouterr().err, "a line a minute"
    log_of(folder, jobs["generate-03"]).write_text("")
    reproduce_module._tell(folder, left, (plan, names))
    assert names[jobs["generate-03"]["marker"]] in plan.began, "a notebook that starts takes time"
    assert plan.shares[names[jobs["generate-05"]["marker"]]] < 0.5, "half of the first of its two loops"
    endless, _ = plan_of(batch, dict.fromkeys(names, float("inf")))
    tell_plan(endless, "x")
    assert not capsys.readouterr().err, "nothing is known of the time yet"


def test_a_failure_names_its_reason_and_its_notebook(data, tmp_path):
    batch = planned(data, tmp_path)
    notebook = Path(batch["folder"]) / "trays/trays/notebooks/check.ipynb"
    error = {"output_type": "error", "ename": "DataError", "evalue": "003.png is broken\nmore", "traceback": []}
    write_json(notebook, {"cells": [{"cell_type": "code", "outputs": [error]}]})
    notebook.with_suffix(".log").write_text("")
    assert failures(batch) == {"trays/trays/done/check": ("DataError: 003.png is broken", notebook)}
    said = "\n".join(batch_summary(batch))
    assert "failed: trays/trays/check: DataError: 003.png is broken" in said and str(notebook) in said
    notebook.write_text("{")
    notebook.with_suffix(".log").write_text("x\nOSError: [Errno 28] No space left on device\n")
    assert "No space left" in failures(batch)["trays/trays/done/check"][0]
    notebook.with_suffix(".log").write_text(
        "check failed: it was ended from outside, by signal 9\nits notebook, with the traceback: x\n"
    )
    assert failures(batch)["trays/trays/done/check"][0] == "it was ended from outside, by signal 9"


def test_a_report_of_a_batch_that_has_not_run(data, tmp_path):
    with pytest.raises(ValueError, match="no batch to report on"):
        report_of(tmp_path, "demo")
    planned(data, tmp_path)
    assert "0 of " in report_of(tmp_path, "demo").read_text()


def test_errors_are_one_line_and_with_debug_a_traceback(tmp_path):
    call = [str(COMMAND), "--report", "--runs", str(tmp_path)]
    plain, debug = (
        subprocess.run(call + more, capture_output=True, text=True, timeout=300) for more in ([], ["--debug"])
    )
    assert plain.returncode == 2 and len(plain.stderr.splitlines()) == 1 and "batch.json" in plain.stderr
    assert debug.returncode == 1 and "Traceback" in debug.stderr


def test_every_rule_runs_a_template_and_a_job_names_no_parameter_that_it_lacks(data, tmp_path):
    from grad_nb.runs.driver import check_parameters, package_file, template

    rules = {
        line.split()[1].rstrip(":")
        for line in package_file("Snakefile").read_text().splitlines()
        if line.startswith("rule ")
    } - {"all", "runs", "last"}
    batch = planned(data, tmp_path)
    assert {job["notebook"] for job in batch["jobs"]} <= rules
    for job in batch["jobs"]:
        check_parameters(template(job["notebook"]), job["values"])
    assert (package_file("Snakefile").parent / "slurm/config.yaml").is_file() and "slurm" not in " ".join(
        snakemake_call(batch)
    ).split("Snakefile")[1]


@pytest.mark.parametrize("seconds, words", [(5, "5 s"), (90, "1.5 min"), (7200, "2.0 h"), (172800, "2.0 days")])
def test_times_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.slow
def test_a_dry_run_says_what_would_be_done_and_does_nothing(data, tmp_path):
    done = reproduce(data, tmp_path / "runs", "--dry-run")
    n = len(plan_batch(data, "trays", "demo", (0,), tmp_path / "runs", overrides=TINY, device="cpu")["jobs"])
    assert done.returncode == 0 and f"{n} of {n} notebooks to run" in done.stdout, done.stderr
    assert "of work" in done.stdout and "were timed just now" in done.stdout and "GB free" in done.stdout
    assert not (tmp_path / "runs").exists()
    plan = tmp_path / "plan.json"
    done = reproduce(data, tmp_path / "runs", "--plan", str(plan))
    assert done.returncode == 0 and str(plan) in done.stdout and len(read_json(plan)["jobs"]) == n
    both = reproduce(data, tmp_path / "runs", "--table4", "--no-table4")
    assert both.returncode and "cannot both be meant" in both.stderr


def test_a_plan_that_is_not_run_draws_no_trays_into_the_runs(tmp_path):
    batch = plan_batch("", "trays", "demo", (0,), tmp_path / "runs", device="cpu", scratch=tmp_path / "scratch")
    assert len(batch["jobs"]) == 9 and not (tmp_path / "runs").exists()
    assert 0 < room_needed(batch) < 2e9 and room_left(tmp_path / "a/b") == shutil.disk_usage(tmp_path).free


def test_months_on_a_cpu_are_one_sentence(data, tmp_path, monkeypatch):
    batch = plan_batch(data, "trays", "paper", (0,), tmp_path, device="cpu")
    monkeypatch.setattr(reproduce_module, "guess", lambda job, threads: 3e6)
    said = list(announce(batch, "trays", "", ""))
    assert "this preset needs a GPU: on this CPU the batch would take more than 10.0 days" in said
    assert not any("of work" in line for line in said)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the device is there")
def test_a_node_without_a_gpu_plans_for_a_cluster_that_has_them(data, tmp_path):
    where = {"data": data, "dataset": "trays", "preset": "demo", "seeds": (0,), "runs": tmp_path, "overrides": TINY}
    with pytest.raises(ValueError, match="cuda"):
        plan_batch(**where, device="cuda")
    for device in ("auto", "cpu"):
        batch = plan_batch(**where, device=device, executor="slurm")
        assert (batch["gpu"], batch["gpus"]) == (0, 0)
        assert any("with --device cuda each training does" in line for line in announce(batch, "trays", "slurm", ""))
    batch = plan_batch(**where, device="cuda", executor="slurm")
    assert (batch["gpu"], batch["gpus"]) == (1, 1)
    assert {job["values"]["device"] for job in batch["jobs"] if "device" in job["values"]} == {"cuda"}
    here = plan_batch(**where, device="cpu")
    assert [job["key"] for job in batch["jobs"][1:-2]] == [job["key"] for job in here["jobs"][1:-2]]
    times, guessed = forecast(batch)
    assert len(times) == len(batch["jobs"]) and guessed == 0 and math.isinf(estimate(batch, times)[1])
    said = list(announce(batch, "trays", "slurm", ""))
    assert "how long it will take is not known: this machine has no GPU to time a few steps on" in said
    assert not any("for a GPU" in line or "needs a GPU" in line for line in said)
    assert plan_of(batch, times)[0].in_seconds is False


def test_the_time_of_a_stage_is_that_of_its_steps(monkeypatch):
    now = iter([0.0, 1.0, 10.0, 17.0, 20.0, 23.0])  # one step 1 s, six 7 s, two 3 s
    monkeypatch.setattr(calibration.time, "perf_counter", lambda: next(now))
    done = []
    assert calibration.seconds_of_a_step(done.append) == 1.0 and done == [1, 1, 6, 2]
    now = iter([0.0, 100.0])
    assert calibration.seconds_of_a_step(done.append) == 100.0, "a long step is its own measure"


def test_a_category_with_too_few_pictures_is_named(data, tmp_path):
    few = tmp_path / "mvtec_loco/juice_bottle"
    shutil.copytree(data / "trays", few, ignore=shutil.ignore_patterns("trays.json", "validation"))
    for file in sorted((few / "train/good").iterdir())[4:]:
        file.unlink()
    with pytest.raises(DataError, match="juice_bottle: 4 normal pictures are too few"):
        plan_batch(tmp_path, "mvtec_loco", "paper", (0,), tmp_path / "runs", device="cpu")


def test_a_short_diffusion_is_measured_too():
    sizes = dict(size=34, width=2, steps=2, batch=2, n_samples=2, T=1, sample_steps=1, bf16=False)
    assert calibration.generate_seconds(GeneratorConfig(**sizes), 5) > 0


@pytest.mark.slow
def test_a_wheel_carries_all_that_a_batch_needs(data, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            str(ROOT),
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import sys, grad_nb\n"
        "assert '/site/' in grad_nb.__file__, grad_nb.__file__\n"
        "from grad_nb.study.commands import grad_reproduce\n"
        "grad_reproduce()\n"
    )
    (tmp_path / "run.py").write_text(code)  # what the installed command is
    call = [
        sys.executable,
        str(tmp_path / "run.py"),
        *arguments(data, tmp_path / "runs", "--plan", str(tmp_path / "plan.json"))[1:],
    ]
    done = subprocess.run(
        call,
        capture_output=True,
        text=True,
        cwd=tmp_path / "elsewhere",
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        timeout=600,
    )
    assert done.returncode == 0 and "/site/grad_nb/reproduce/Snakefile" in done.stdout, done.stdout + done.stderr
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    "The folder of runs of a batch that nothing disturbed."
    runs = tmp_path_factory.mktemp("whole")
    finish(data, runs)
    return runs


@pytest.mark.slow
def test_table_4_from_the_same_command(data, whole, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(whole, runs)
    made = {path: path.stat().st_mtime_ns for path in (runs / "demo/trays/trays/seed0").glob("generator-*.safetensors")}
    said = finish(data, runs, "--table4")
    assert {path: path.stat().st_mtime_ns for path in made} == made, "no generator is trained twice"
    table = (runs / "demo/tables/table_4.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| baseline", "| +"))]
    assert len(rows) == 4 and not any("| -" in row for row in rows), table
    assert (runs / "demo/tables/table_1.md").read_text() == (whole / "demo/tables/table_1.md").read_text()
    assert "table_4.md" in said


@pytest.mark.slow
def test_a_finished_batch_is_not_run_again(data, whole):
    assert (whole / "demo/tables/table_1.md").is_file()
    before = {path: path.stat().st_mtime_ns for path in (whole / "demo").rglob("*.ipynb")}
    assert f"0 of {len(read_json(whole / 'demo/batch.json')['jobs'])} notebooks to run: none" in finish(data, whole)
    assert before == {path: path.stat().st_mtime_ns for path in (whole / "demo").rglob("*.ipynb")}


@pytest.mark.slow
def test_a_result_says_where_it_comes_from(whole):
    run = whole / "demo/trays/trays/seed0"
    result, files = read_json(run / "result.json"), read_json(run / "manifest.json")
    assert (
        set(result["seconds"]) == {"generate-03", "generate-05", "generate-17", "detect-034", "evaluate"}
        and min(result["seconds"].values()) >= 0
    )
    assert {"config", "seed", "versions", "device", "git", "data_sha256"} <= set(result) and all(
        len(sha) == 64 for sha in files.values()
    )
    import hashlib

    assert hashlib.sha256(json.dumps(list(files.items())).encode()).hexdigest() == result["data_sha256"], (
        "the manifest is what was hashed"
    )


@pytest.mark.slow
def test_the_page_of_a_finished_batch(whole):
    import re
    from urllib.parse import unquote

    done = subprocess.run(
        [str(COMMAND), "--report", "--runs", str(whole), "--preset", "demo"], capture_output=True, text=True
    )
    text = (whole / "demo/report.html").read_text()
    assert done.returncode == 0 and str(whole / "demo/report.html") in done.stdout, done.stderr
    links = [unquote(target) for target in re.findall(r'href="([^"#]+)"', text)]
    assert len(links) > 10 and all((whole / "demo" / target).is_file() for target in links), (
        "every link leads to a file of the batch"
    )
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text) and "trays / trays, seed 0" in text


@pytest.mark.slow
def test_the_driver_killed_in_every_stage(data, whole, tmp_path):
    for stage in ("check", "generate-05", "detect-034", "table", "tables"):
        driver = subprocess.Popen(arguments(data, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(
            lambda stage=stage: processes("grad_nb.runs.notebooks", f"/notebooks/{stage}.ipynb", str(tmp_path)), driver
        )
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        end = time.monotonic() + 60
        while left := processes(str(tmp_path), "ipykernel"):
            assert time.monotonic() < end, f"notebooks go on without their driver: {left}"
            time.sleep(0.2)
    finish(data, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_driver_alone_does_not_wait_for_what_runs(data, tmp_path, number):
    long = f"{TINY} detector.steps=1000000"
    driver = subprocess.Popen(arguments(data, tmp_path, "--overrides", long), stdout=subprocess.PIPE, text=True)
    wait_for(lambda: processes("grad_nb.runs.notebooks", "/notebooks/detect-034.ipynb", str(tmp_path)), driver)
    driver.send_signal(number)
    driver.communicate(timeout=600)
    assert driver.returncode in (128 + number, 130)
    assert not processes(str(tmp_path), "ipykernel") and not processes(str(tmp_path), "snakemake")


@pytest.mark.slow
def test_a_job_killed_in_every_stage(data, whole, tmp_path):
    driver = subprocess.Popen(arguments(data, tmp_path), stdout=subprocess.PIPE, text=True)
    for stage in ("generate-05", "detect-034", "table", "tables"):
        for pid in wait_for(
            lambda stage=stage: processes("grad_nb.runs.notebooks", f"/notebooks/{stage}.ipynb", str(tmp_path)), driver
        ):
            os.kill(pid, signal.SIGKILL)
    said, _ = driver.communicate(timeout=1800)
    assert driver.returncode == 1 and "failed: done/tables: it was ended from outside" in said, (
        f"all others are tried again by themselves; {said}"
    )
    assert said.count("failed: ") == 1 and "tables.ipynb" in said
    finish(data, tmp_path)
    assert outcome(tmp_path) == outcome(whole)


@pytest.mark.slow
def test_the_second_driver_in_a_folder_is_refused(data, tmp_path):
    first = subprocess.Popen(arguments(data, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for((tmp_path / "demo/batch.json").is_file, first)
        plan = (tmp_path / "demo/batch.json").read_bytes()
        second = reproduce(data, tmp_path, "--retries", "5")
        assert second.returncode == 2 and second.stderr.strip().splitlines()[-1].startswith(
            "grad_reproduce: another batch is running in"
        ), second.stderr
        call = snakemake_call(read_json(tmp_path / "demo/batch.json"))
        third = subprocess.run(call, capture_output=True, text=True)
        assert third.returncode and "another batch is running" in third.stdout + third.stderr, (
            "a Snakemake started by hand too"
        )
        assert first.poll() is None and plan == (tmp_path / "demo/batch.json").read_bytes()
    finally:
        first.kill()
        first.wait()


@pytest.mark.slow
def test_a_full_disk(data, whole, tmp_path):
    "A small file system in memory, filled up; with room again, the same command finishes with the same figures."
    runs = tmp_path / "small"
    runs.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(runs)], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        assert reproduce(data, runs, "--plan", str(tmp_path / "plan.json")).returncode == 0
        room = os.statvfs(runs)
        (runs / "filler").write_bytes(b"x" * (room.f_bavail * room.f_frsize - 150_000))
        full = reproduce(data, runs, "--retries", "0")
        assert full.returncode in (1, 2) and "No space left" in full.stdout + full.stderr, full.stdout + full.stderr
        (runs / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=100m", str(runs)], check=True)
        finish(data, runs)
        assert outcome(runs) == outcome(whole)
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


@pytest.mark.slow
def test_a_broken_picture_and_a_missing_category_do_not_stop_the_others(data, tmp_path):
    for name in ("pushpins", "juice_bottle"):
        shutil.copytree(
            data / "trays", tmp_path / "data/mvtec_loco" / name, ignore=shutil.ignore_patterns("trays.json")
        )
    broken = tmp_path / "data/mvtec_loco/juice_bottle/train/good/003.png"
    broken.write_bytes(b"nonsense")
    call = [
        str(COMMAND),
        "--data",
        str(tmp_path / "data"),
        "--dataset",
        "mvtec_loco",
        "--categories",
        "pushpins",
        "juice_bottle",
        "screw_bag",
        "--preset",
        "demo",
        "--seeds",
        "0",
        "--runs",
        str(tmp_path),
        "--overrides",
        TINY,
        "--device",
        "cpu",
        "--retries",
        "0",
    ]
    done, batch = subprocess.run(call, capture_output=True, text=True, timeout=1800), tmp_path / "demo"
    assert done.returncode == 1 and done.stdout.count("failed: ") == 2, done.stdout + done.stderr
    for name, reason in (("juice_bottle", "003.png"), ("screw_bag", "screw_bag")):
        line = next(
            line for line in done.stdout.splitlines() if line.startswith(f"failed: mvtec_loco/{name}/check: DataError")
        )
        notebook = batch / "mvtec_loco" / name / "notebooks/check.ipynb"
        assert (
            reason in line and f"with the traceback: {notebook}" in done.stdout and "Traceback" in notebook.read_text()
        )
    table = pd.read_csv(batch / "tables/table_1.csv", index_col=0, dtype=str)["GRAD here"]
    assert table["pushpins"] not in ("-", "n/a") and table["juice_bottle"] == table["screw_bag"] == "-"
    before = {path: path.stat().st_mtime_ns for path in (batch / "mvtec_loco/pushpins").rglob("*.json")}
    shutil.copy2(data / "trays/train/good/003.png", broken)
    shutil.copytree(tmp_path / "data/mvtec_loco/juice_bottle", tmp_path / "data/mvtec_loco/screw_bag")
    assert subprocess.run(call, capture_output=True, timeout=1800).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}, "what was done is not done again"
    assert "-" not in set(
        pd.read_csv(batch / "tables/table_1.csv", index_col=0, dtype=str)["GRAD here"][
            ["pushpins", "juice_bottle", "screw_bag"]
        ]
    )


def test_the_rows_of_table_4_are_of_the_data_set_that_it_averages(data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data / "trays", root / "trays")
    for name in ("mvtec_ad/bottle", "mvtec_loco/juice_bottle"):
        shutil.copytree(data / "trays", root / name, ignore=shutil.ignore_patterns("trays.json"))
    several = plan_batch(root, "all", "demo", (0,), tmp_path, overrides=TINY, device="cpu", table4=True)
    of = {job["folder"].split("/")[1] for job in several["jobs"] if job["notebook"] == "variant"}
    assert of == {"juice_bottle"}
    one = plan_batch(root, "mvtec_ad", "demo", (0,), tmp_path, overrides=TINY, device="cpu", table4=True)
    assert {job["folder"].split("/")[1] for job in one["jobs"] if job["notebook"] == "variant"} == {"bottle"}


@pytest.mark.parametrize("levels", ["demo", "paper"])  # one detector of its own, and three
def test_a_variant_learns_from_what_its_run_learns_from_without_a_validation_folder(data, tmp_path, levels):
    root = Path(shutil.copytree(data / "trays", tmp_path / "data/part"))
    shutil.rmtree(root / "validation")
    run = open_run(root.parent, "part", levels, 0, tmp_path, TINY if levels == "demo" else "", "cpu", False)
    assert not run.category.validation
    variant_of_it = variant_run(run, "baseline")
    assert len(variant_of_it.levels) == 3
    assert split_normals(variant_of_it) == split_normals(run)
    level = run.generator_levels[0]
    assert generate_key(variant_of_it, level) == generate_key(run, level), "its contrastive sets fit"
    assert standardising(variant_of_it)
