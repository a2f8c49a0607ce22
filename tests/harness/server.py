"""A small fork server: it has imported the package once, so a command starts at once and can be killed often."""

import contextlib
import os
import random
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path

MARK = "GRAD_NB_HARNESS"  # variable of the environment of a command and of all that it starts
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Command:
    "A command in a process of its own, forked from this one."

    def __init__(self, work: Callable[[], None], out: Path):
        "Start `work` with stdout and stderr in files beside `out`."
        self.mark = uuid.uuid4().hex
        self.status: int | None = None
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._run(work, out)

    def _run(self, work: Callable[[], None], out: Path) -> None:
        "In the child: run, and leave without the parent's clean-up."
        status = 1
        try:
            os.setsid()
            for number in (signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ[MARK] = self.mark
            for number, ending in ((1, "out"), (2, "err")):
                file = os.open(f"{out}.{ending}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(file, number)
            work()
            status = 0
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else int(bool(e.code))
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def ended(self) -> bool:
        "Whether it has; `status` is then its exit status, negative for a signal."
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float, meanwhile: Callable[[], None] | None = None) -> bool:
        "Wait for its end, at most so long."
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() >= end:
                return False
            if meanwhile:
                meanwhile()
            time.sleep(0.003)
        return True

    def kill(self, number: int = signal.SIGKILL) -> list[str]:
        "Send a signal and wait for the end; what is wrong with that end."
        os.kill(self.pid, number)
        wrong = []
        if not self.wait(60):
            wrong.append(f"{signal.Signals(number).name} did not end it within a minute")
            os.kill(self.pid, signal.SIGKILL)
            self.wait(60)
        end = time.monotonic() + 20
        while left := self.left():
            if time.monotonic() > end:
                wrong.append(f"after {signal.Signals(number).name} {len(left)} of its processes work on")
                for pid in left:
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        return wrong

    def left(self) -> list[int]:
        "Processes that it started, directly or not, and that have not ended."
        mark = f"{MARK}={self.mark}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == self.pid:
                continue
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    if (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                        found.append(int(entry.name))
        return found


def to_the_end(
    work: Callable[[], None],  # the command
    out: Path,  # where its stdout and stderr go, less their endings
    rng: random.Random,
    length: float,  # seconds that it takes undisturbed
    kills: int,  # at most so many, each at a random moment
    look: Callable[[], list[str]] = list,  # after each kill: what is wrong then
    patience: float = 600.0,  # seconds for the last one, at least; three times as long as undisturbed if that is more
) -> tuple[int, list[str]]:  # kills that met a working command, and what was wrong
    "Start a command again and again, kill it at random moments, and let the last one end."
    wrong: list[str] = []
    met = 0
    for _ in range(kills):
        command = Command(work, out)
        if command.wait(rng.random() * 2 * length / (kills + 1)):
            wrong += [f"it ended with status {command.status} before it was killed"] if command.status else []
            break
        wrong += command.kill(rng.choice(SIGNALS)) + look()
        met += 1
    last = Command(work, out)
    patience = max(patience, 3 * length)
    if not last.wait(patience):
        last.kill()
        return met, [*wrong, f"the last one did not end within {patience:.0f} s"]
    if last.status:
        said = Path(f"{out}.err").read_text(errors="replace").splitlines()
        wrong.append(f"the last one ended with status {last.status}: {' / '.join(said[-3:])}")
    return met, wrong


def litter(*folders: Path) -> list[str]:
    "What a dead command has left where nothing of it should be."
    ours = (".part", ".unpacking", ".reading")
    found = [p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.name.endswith(ours)]
    return [f"{path} was left" for path in found]
