"""What lies in a shared place is not trusted: compiled code, work folders, links, folders that variables name."""

import os
import shutil
import stat
import subprocess
import sys
import time

import pytest
from test_unpack import archive

from grad_nb.accel import native
from grad_nb.core.files import folder_variable, private_folder
from grad_nb.datasets.readers import DataError
from grad_nb.datasets.unpack import unpack

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs owners and modes")
compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
PROGRAM = "float t[40000] = {1}; int f(void){return 42;}"
USES = (
    "from grad_nb.accel.native import compiled\n"
    f"print(compiled({PROGRAM!r}, 'loops', lambda l: l.f() == 42, 'slow') is not None)"
)


def compile_(folder):
    return native.compile_c(PROGRAM, "loops", folder, openmp=False)


@compiler
def test_a_library_is_taken_only_as_it_was_compiled(tmp_path):
    library = compile_(tmp_path / "c")
    assert library.parent.stat().st_mode & 0o777 == 0o700 and library.stat().st_mode & 0o077 == 0
    whole, made = library.read_bytes(), library.stat().st_ino
    assert compile_(tmp_path / "c").stat().st_ino == made, "it is not compiled twice"
    for damaged in (b"", whole[:100], whole[:-1], whole[:-1] + b"!", b"\0" * len(whole)):
        library.write_bytes(damaged)
        assert compile_(tmp_path / "c").read_bytes()[:4] == b"\x7fELF"
        assert native._is_whole(compile_(tmp_path / "c"))
    library = compile_(tmp_path / "c")
    library.chmod(0o666)
    assert not native._is_whole(library)
    fresh = compile_(tmp_path / "c")
    shutil.move(fresh, tmp_path / "elsewhere.so")
    fresh.symlink_to(tmp_path / "elsewhere.so")
    assert not native._is_whole(fresh) and not compile_(tmp_path / "c").is_symlink()
    assert (tmp_path / "elsewhere.so").exists()


@compiler
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_damaged_library_does_not_kill_the_process(tmp_path, share):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("GRAD_NB_ACCEL", None)

    def run():
        return subprocess.run([sys.executable, "-c", USES], env=environment, capture_output=True, text=True)

    assert run().stdout == "True\n"
    (library,) = (tmp_path / "grad_nb").glob("*.so")
    os.truncate(library, int(share * library.stat().st_size))
    again = run()
    assert (again.returncode, again.stdout) == (0, "True\n")


def test_a_compiler_that_hangs_is_given_up(tmp_path, monkeypatch):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nsleep 60 & sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GRAD_NB_ACCEL", raising=False)
    monkeypatch.setattr(native, "COMPILER_PATIENCE", 0.2)
    start = time.monotonic()
    assert native.compiled(PROGRAM, "loops", lambda library: True, "slow") is None
    assert time.monotonic() - start < 20


def test_a_folder_of_ours_is_closed_to_others_and_what_was_in_it_is_left_alone(tmp_path):
    folder = private_folder(tmp_path / "a/b")
    assert folder.stat().st_mode & 0o777 == 0o700
    (folder / "kept").touch()
    assert private_folder(folder) == folder and (folder / "kept").exists()
    for i, mode in enumerate((0o770, 0o707, 0o777, 0o720)):
        opened = private_folder(tmp_path / f"opened{i}")
        (opened / "deep").mkdir()
        opened.chmod(mode)
        planted = [opened / "planted", opened / "deep/planted"]
        for path in planted:
            path.touch()
        instead = private_folder(opened)
        assert instead == opened / "private" and instead.stat().st_mode & 0o777 == 0o700 and not list(instead.iterdir())
        assert opened.stat().st_mode & 0o777 == mode & ~0o022 and all(path.exists() for path in planted)
        assert private_folder(opened) == instead, "what was planted is not trusted the next time either"
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OSError):
        private_folder(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        private_folder(tmp_path / "file")


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root")
def test_a_folder_of_another_user_is_refused(tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)
    with pytest.raises(PermissionError, match="another user"):
        private_folder(tmp_path / "theirs")
    (tmp_path / ".out.unpacking").mkdir()
    os.chown(tmp_path / ".out.unpacking", 65534, 65534)
    with pytest.raises(DataError, match="another user"):
        unpack(archive(tmp_path / "a.tar", [("f", b"x")]), tmp_path / "out", True, False)


@pytest.mark.parametrize("value", ["relative", ".", "../up", "~/cache"])
def test_a_relative_folder_in_a_variable_is_refused(monkeypatch, value):
    monkeypatch.setenv("SOME_FOLDER", value)
    with pytest.raises(ValueError, match="SOME_FOLDER must be an absolute path"):
        folder_variable("SOME_FOLDER")
    monkeypatch.setenv("SOME_FOLDER", "")
    assert folder_variable("SOME_FOLDER") is None


def test_unpack_deletes_nothing_through_a_link(tmp_path):
    mine = tmp_path / "thesis"
    (mine / "chapters").mkdir(parents=True)
    (mine / "chapters/1.tex").write_text("years of work")
    path = archive(tmp_path / "a.tar", [("f", b"x")])
    (tmp_path / ".out.unpacking").symlink_to(mine)
    with pytest.raises(DataError, match="a link"):
        unpack(path, tmp_path / "out", True, False)
    (tmp_path / ".out.unpacking").unlink()
    (tmp_path / ".out.unpacking").mkdir()
    (tmp_path / ".out.unpacking").chmod(0o777)
    with pytest.raises(DataError, match="others may write"):
        unpack(path, tmp_path / "out", True, False)
    (tmp_path / ".out.unpacking").chmod(0o700)
    (tmp_path / ".out.unpacking/left").symlink_to(mine)
    assert unpack(path, tmp_path / "out", True, False) == 1
    assert (mine / "chapters/1.tex").exists() and not (tmp_path / "out").is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.parametrize(
    "name", ["CON", "a/nul.png", "com1.txt", "a.", "dir./x", "a\u202egnp.exe", "\x9b31m", "a?b", "x" * 300, "a\u200bb"]
)
def test_names_that_some_systems_cannot_hold_or_that_show_as_another_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="not unpacked"):
        unpack(archive(tmp_path / "a.tar", [(name, b"x")]), tmp_path / "out", True, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar"]


def test_ordinary_names_are_unpacked(tmp_path):
    names = ["console.png", "é/ü.png", "日本.png", "a b.png", "communism", "lpt.png", ".hidden"]
    assert unpack(archive(tmp_path / "a.tar", [(n, b"x") for n in names]), tmp_path / "out", True, False) == len(names)
