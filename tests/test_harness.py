"""The harness that kills commands: it finds what is not whole, and (slow) it finds nothing in ten minutes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.damage import damaged, whole_pictures
from harness.server import Command, litter, to_the_end
from shared import ROOT, rng

from grad_nb.core.files import atomic_path
from grad_nb.use.errors import plain_errors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def writer(path: Path, whole: bool):
    "A command that writes a hundred pieces, into a file that is whole or absent or into the file itself."

    @plain_errors
    def command() -> None:
        if whole:
            with atomic_path(path) as part:
                pieces(part)
        else:
            pieces(path)

    def pieces(to: Path) -> None:
        with open(to, "wb", buffering=0) as f:
            for _ in range(100):
                f.write(b"x" * 100)
                time.sleep(0.002)

    return command


@pytest.mark.parametrize("whole", [True, False])
def test_the_harness_finds_what_is_not_whole(tmp_path, whole):
    path = tmp_path / "in" / "result"
    path.parent.mkdir()

    def look() -> list[str]:
        return ["torn"] if path.exists() and path.stat().st_size != 10_000 else []

    met, wrong = to_the_end(writer(path, whole), tmp_path / "w", random.Random(1), 0.3, 12, look)
    assert met > 3
    assert (wrong + litter(path.parent) == []) if whole else ("torn" in wrong)


def test_the_harness_finds_a_child_that_works_on(tmp_path):
    def careless() -> None:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
        time.sleep(100)

    command = Command(careless, tmp_path / "c")
    until = time.monotonic() + 20
    while not command.left() and time.monotonic() < until:
        time.sleep(0.01)
    assert len(command.left()) == 1
    os.kill(command.left()[0], signal.SIGKILL)
    assert command.kill() == []


def test_damage_is_damage():
    whole = whole_pictures()["png"]
    assert len({damaged(whole, rng(seed)) for seed in range(50)} - {whole}) > 40


@pytest.mark.slow
def test_the_harness_for_ten_minutes(tmp_path):
    "GRAD_NB_HARNESS names a file where counts accumulate, GRAD_NB_HARNESS_MINUTES how long it goes on."
    state = os.environ.get("GRAD_NB_HARNESS") or str(tmp_path / "state.json")
    minutes = os.environ.get("GRAD_NB_HARNESS_MINUTES", "10")
    command = [sys.executable, ROOT / "tests/harness/run.py", "--minutes", minutes, "--state", state]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout)  # the figures: pytest -s shows them
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
