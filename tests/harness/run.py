"""Commands killed at random moments and started again, and files damaged at random: nothing may come of it.

    python tests/harness/run.py --minutes 10 --state counts.json

The state takes the counts and what was found; the next call with it goes on with the trial after the last one. The
same seed and number give the same trial, but for what the machine does meanwhile. Status 1 if anything was found.
"""

import argparse
import atexit
import json
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process with threads cannot be forked
CACHE = tempfile.mkdtemp(prefix="harness-")  # what is killed ends without this clean-up
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", CACHE)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# ruff: noqa: E402
from harness.jobs import JOBS, ORDER, Bench

LONG = {"demo": 150.0, "reproduce": 240.0}  # seconds that must be left for one


def loaded() -> None:
    "Import once what every command needs."
    import torch

    import grad_nb.grad
    import grad_nb.study.commands
    import grad_nb.use.daily
    import grad_nb.use.demo
    import grad_nb.use.export
    import grad_nb.use.watch  # noqa: F401

    torch.set_num_threads(1)


def main(arguments: list[str] | None = None) -> int:
    "Run trials until the time is over; 1 if anything was found."
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--trials", type=int, default=10**9, help="at most so many")
    parser.add_argument("--state", type=Path, help="file with what earlier runs gave; this one adds to it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the trials work; a temporary one if not given")
    parser.add_argument("--only", nargs="+", choices=sorted(JOBS), default=(), help="no other jobs")
    given = parser.parse_args(arguments)
    end = time.monotonic() + 60 * given.minutes
    state = {"seed": given.seed, "trials": 0, "counts": {}, "found": []}
    if given.state and given.state.exists():
        state |= json.loads(given.state.read_text())
    warnings.simplefilter("ignore")
    loaded()
    with tempfile.TemporaryDirectory(prefix="harness-") as temporary:
        bench = Bench(given.folder or Path(temporary))
        for _ in range(given.trials):
            name = (given.only or ORDER)[state["trials"] % len(given.only or ORDER)]
            if time.monotonic() > end:
                break
            state["trials"] += 1
            if end - time.monotonic() > LONG.get(name, 0.0):
                one_trial(bench, name, state)
            if given.state:
                given.state.write_text(json.dumps(state, indent=1) + "\n")
    print(json.dumps(state["counts"], indent=1))
    for line in state["found"]:
        print("FOUND:", line)
    return int(bool(state["found"]))


def one_trial(bench: Bench, name: str, state: dict) -> None:
    "Run a trial and add what it gave."
    number = state["trials"]
    start = time.monotonic()
    outcome = JOBS[name](bench, random.Random(f"{state['seed']} {number}"))
    for what, count in outcome.counts.items():
        state["counts"][what] = state["counts"].get(what, 0) + count
    state["counts"][f"trials of {name}"] = state["counts"].get(f"trials of {name}", 0) + 1
    state["found"] += [f"trial {number}, {name}: {line}" for line in outcome.wrong]
    print(f"{number} {name}: {time.monotonic() - start:.1f} s {outcome.counts} {outcome.wrong or ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
