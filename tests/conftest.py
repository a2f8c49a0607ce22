"""Fixtures that several test files share."""
import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from grad_nb.trays import make_trays

TINY = ("generator.size=64 generator.width=8 generator.steps=6 generator.batch=2 generator.n_samples=4 generator.sample_steps=3 "
        "detector.width=0.1 detector.steps=6 evaluation.map_size=64")  # settings of a run that takes seconds

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job ignores Ctrl-C, and so would every command started here
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("same", derandomize=True, database=None)  # the same examples in each run: a red run is a change's fault
settings.register_profile("new", print_blob=True)  # HYPOTHESIS_PROFILE=new looks for others
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
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("GRAD_NB_DATA") or default).resolve()
    if not folder.is_dir(): pytest.skip("the MVTec pictures are not here; set GRAD_NB_DATA to their folder to run this test")
    return folder
