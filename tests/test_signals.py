"""Signals and kills: a command ends as cleanly as by Ctrl-C, its children end with it, its litter goes."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grad_nb.core import files
from grad_nb.core.files import atomic_path
from grad_nb.core.processes import Stopped, clean_end

posix = pytest.mark.skipif(os.name != "posix", reason="needs signals")

COMMAND = """
import sys, tempfile, time
from pathlib import Path
from grad_nb.core.files import atomic_path
from grad_nb.use.errors import plain_errors
@plain_errors
def work(folder):
    with tempfile.TemporaryDirectory(dir=folder), atomic_path(Path(folder, "result")) as part:
        part.write_text("half")
        print("ready", flush=True)
        time.sleep(60)
work(sys.argv[1])
"""


def started(code: str, *arguments, **options) -> subprocess.Popen:
    "A process that has said it is ready."
    command = [sys.executable, "-c", code, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline().strip() == "ready", process.stderr.read()
    return process


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_and_leaves_nothing(tmp_path, number):
    process = started(COMMAND, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    process.send_signal(number)
    process.send_signal(number) if number != signal.SIGINT else None
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and err == "work: stopped\n"
    assert list(tmp_path.iterdir()) == []


PHASE = """
import signal, threading
from types import SimpleNamespace
from grad_nb.runs import driver
from grad_nb.use.errors import plain_errors
def notebook(task, folder, values, threads, line, stop, *_):
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    stop.wait(60)
    return 0.0
driver.run_notebook = notebook
@plain_errors
def work():
    print("ready", flush=True)
    driver.run_phase([SimpleNamespace(name="a", threads=1)], SimpleNamespace(device="cpu", folder=None), {})
work()
"""


@posix
def test_a_signal_that_reaches_another_thread_ends_a_phase():
    "After a pause, as of a suspended job, the kernel gives a signal to whichever thread wakes first."
    process = started(PHASE)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and err == "work: stopped\n"


@posix
def test_what_nohup_ignores_stays_ignored_and_handlers_come_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with clean_end():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        with pytest.raises(Stopped), clean_end():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
    thread = threading.Thread(target=lambda: clean_end().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@posix
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    dead, living = (started(COMMAND, tmp_path) for _ in range(2))
    dead.kill()
    dead.wait()
    mine = tmp_path / ".result.notes.part"
    mine.write_text("somebody else's")
    assert len(list(tmp_path.glob(".result.????????.part"))) == 2
    files._remove_left.cache_clear()
    with atomic_path(tmp_path / "other") as part:
        part.write_text("1")
    assert len(list(tmp_path.glob(".result.????????.part"))) == 1 and mine.exists()
    living.terminate()
    living.wait()
    assert not list(tmp_path.glob(".result.????????.part"))


@posix
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children only on Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(tmp_path, number):
    child = "from grad_nb.core.processes import end_with_parent\nimport time\nend_with_parent()\n"
    child += f"open({str(tmp_path / 'up')!r}, 'w').close()\nwhile True: time.sleep(0.1)"
    parent = "import os, subprocess, sys, time\nfrom grad_nb.core.processes import PARENT\n"
    parent += "environment = os.environ | {PARENT: str(os.getpid())}\n"
    parent += "p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], env=environment)\n"
    parent += "while not os.path.exists(sys.argv[2]): time.sleep(0.05)\n"
    parent += "print('ready', flush=True)\nprint(p.pid, flush=True)\ntime.sleep(60)"
    process = started(parent, child, tmp_path / "up")
    number_of_child = int(process.stdout.readline())
    process.send_signal(number)
    process.wait()
    end = time.monotonic() + 10
    while Path(f"/proc/{number_of_child}/stat").exists():
        if Path(f"/proc/{number_of_child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        assert time.monotonic() < end, "it works on"
        time.sleep(0.05)


def test_a_replaced_file_keeps_its_mode_and_a_full_disk_names_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("1")
    for mode in (0o640, 0o600, 0o664):
        path.chmod(mode)
        with atomic_path(path) as part:
            part.write_text("2")
        assert path.stat().st_mode & 0o777 == mode
    for number in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(OSError) as said, atomic_path(path):
            raise OSError(number, os.strerror(number))
        assert str(path) in str(said.value) and [p.name for p in tmp_path.iterdir()] == ["a"]
