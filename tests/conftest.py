"""Fixtures that several test files share."""
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    "The folder that holds mvtec_ad/ and mvtec_loco/; the test is skipped where it is absent."
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("GRAD_NB_DATA") or default).resolve()
    if not folder.is_dir(): pytest.skip("the MVTec pictures are not here; set GRAD_NB_DATA to their folder to run this test")
    return folder
