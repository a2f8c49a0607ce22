"The script that other systems run, run here."

import subprocess
import sys

from shared import ROOT


def test_the_smoke_script_fits_and_predicts(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "tests/smoke.py")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "work:" in done.stdout, done.stderr
