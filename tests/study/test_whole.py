"""Every stage of a batch through papermill, one notebook after the other: on a GPU, and by the same test on the CPU."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from shared import TINY

from grad_nb.core.devices import device_name, pick_device
from grad_nb.core.files import read_json, write_json
from grad_nb.study.reproduce import job_done, plan_batch, run_job
from grad_nb.study.speed import SPEED_FILE

pytest.importorskip("papermill", reason="the notebooks need papermill: pip install 'grad_nb[run]'")


def through_papermill(data: Path, runs: Path, device: str) -> dict:
    "Run every notebook of a batch on the trays; the plan."
    batch = plan_batch(data, "trays", "demo", (0,), runs, overrides=TINY, device=device)
    write_json(batch["batch"], batch)
    for job in batch["jobs"]:
        run_job(batch["batch"], job["marker"])
        assert job_done(batch["folder"], job), job["marker"]
    return batch


def named(device: str) -> str:
    "The name of a device without its threads, of which each stage of a batch has its own number."
    return re.sub(r"\d+ threads?(, )?", "", device)


def check_whole(batch: dict, device: str) -> None:
    "What the notebooks of a batch have left, and where they computed."
    folder = Path(batch["folder"])
    stages = [job["notebook"] for job in batch["jobs"]]
    assert stages == ["speed", "check", *["generate"] * 3, "detect", "table", "tables", "figures"]
    for path in folder.rglob("notebooks/*.ipynb"):
        cells = read_json(path)["cells"]
        errors = [output for cell in cells for output in cell.get("outputs", []) if output["output_type"] == "error"]
        assert not errors, path
    here = named(device_name(pick_device(device)))
    run = folder / "trays/trays/seed0"
    for name in ("generate-03", "generate-05", "generate-17", "detect-034"):
        assert named(read_json(run / f"{name}.json")["device"]) == here, name
    result = read_json(run / "result.json")
    assert here in named(result["device"]) and 0 <= result["image_auroc"] <= 1
    assert {path.stem for path in (folder / "tables").glob("*.md")} == {f"table_{n}" for n in (1, 2, 3, 4, 10)}
    assert {path.stem for path in (folder / "figures").glob("*.png")} == {f"figure-{n}" for n in range(1, 7)}
    assert pd.read_csv(folder / "tables/table_1.csv", index_col=0).loc["trays", "GRAD here"] != "-"
    third = pd.read_csv(folder / "tables/table_3.csv")
    rows = read_json(folder / SPEED_FILE)["protocol"]
    assert (third.device.map(named) == here).sum() >= len(rows) > 0
    assert {named(row["device"]) for row in rows} == {here}


@pytest.mark.slow
def test_every_stage_through_papermill(data, tmp_path):
    check_whole(through_papermill(data, tmp_path, "cpu"), "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_every_stage_through_papermill_on_cuda(data, tmp_path):
    batch = through_papermill(data, tmp_path, "cuda")
    check_whole(batch, "cuda")
    rows = read_json(Path(batch["folder"]) / SPEED_FILE)["protocol"]
    assert {(row["way"], row["transfers"]) for row in rows} == {("one graph", "inside"), ("one graph", "outside")}
