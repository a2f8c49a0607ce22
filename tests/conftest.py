"""Fixtures that several test files share."""

import os
import signal
from pathlib import Path

import torch

if not torch.cuda.is_available():  # the kernels for a GPU are interpreted; said before anything imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

# ruff: noqa: E402
import pytest
from hypothesis import settings
from shared import ROOT, TINY

from grad_nb.datasets.trays import make_trays

__all__ = ["TINY", "data", "real_data"]

# A shell's background job ignores Ctrl-C, and so would every command started here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run: a red run is a change's fault. HYPOTHESIS_PROFILE=new looks for others.
settings.register_profile("same", derandomize=True, database=None)
settings.register_profile("new", print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    "A folder that holds a few trays; a test that changes them copies it first."
    root = tmp_path_factory.mktemp("data")
    make_trays(root, seed=7, size=64, train=8, validation=4, good=6, logical=8, structural=6, progress=False)
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder that holds mvtec_ad/ and mvtec_loco/; the test is skipped where it is absent."
    default = ROOT / ".." / "shared" / "data"
    folder = Path(os.environ.get("GRAD_NB_DATA") or default).resolve()
    if not folder.is_dir():
        pytest.skip("the MVTec pictures are not here; set GRAD_NB_DATA to their folder to run this test")
    return folder
