"""A batch through a real SLURM of one node: the same rules, the same figures.

Install it with  tests/study/slurm_node.sh install
"""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from test_reproduce import finish, outcome

from grad_nb.core.files import read_json
from grad_nb.study.reproduce import LAST

SCRIPT = Path(__file__).with_name("slurm_node.sh")
WHERE = (
    "--default-resources slurm_partition=main runtime=30 mem_mb=800 "
    "--slurm-no-account --slurm-status-command squeue --slurm-init-seconds-before-status-checks 5"
)


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    "SLURM runs while a test does."
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        pytest.skip(f"SLURM is not installed; {SCRIPT} install  does it on Debian")
    if os.geteuid():
        pytest.skip("only root can start SLURM")
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("pip install snakemake-executor-plugin-slurm")
    monkeypatch.setenv("SLURM_NODE_DIR", str(tmp_path / "node"))
    monkeypatch.delenv("SLURM_CONF", raising=False)  # it is found where a cluster has it
    subprocess.run([str(SCRIPT), "start"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run([str(SCRIPT), "stop"], check=True)


@pytest.mark.slow
def test_the_same_figures_through_slurm(data, tmp_path, slurm):
    finish(data, tmp_path / "cluster", "--executor", "slurm", "--options", WHERE)
    finish(data, tmp_path / "local")
    said = (tmp_path / "node/log/slurmctld.log").read_text()
    steps = [job for job in read_json(tmp_path / "cluster/demo/batch.json")["jobs"] if job["notebook"] not in LAST]
    assert said.count("WEXITSTATUS 0") == len(steps) == 7, (
        "every step of a run went through SLURM, and none failed there"
    )
    assert outcome(tmp_path / "cluster") == outcome(tmp_path / "local")
