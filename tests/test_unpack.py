"""Tries to break the unpacker.

Names that leave the folder, links, devices, duplicates, archives that were cut or changed.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import grad_nb.datasets.unpack
from grad_nb.datasets.readers import DataError
from grad_nb.datasets.unpack import ARCHIVES, unpack

quickly = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def archive(path, members, mode="w"):
    "A tar archive of (name, bytes), (name, bytes, type) or TarInfo objects, written as given."
    with tarfile.open(path, mode) as tar:
        for name, content, *kind in members:
            info = tarfile.TarInfo(name)
            if kind:
                info.type = kind[0]
                info.linkname = "../../secret" if kind[0] in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def everything(folder):
    "Names and content of all files under a folder."
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(path, target, **options):
    "The message of the refusal; nothing may have been written but what was there."
    before = everything(target.parent)
    with pytest.raises(DataError) as caught:
        unpack(path, target, progress=False, **({"any_archive": True} | options))
    assert everything(target.parent) == before
    return str(caught.value)


names = st.lists(
    st.text("abcXY01_- é", min_size=1, max_size=6).filter(lambda s: s.strip(" .")), min_size=1, max_size=4
).map("/".join)


@quickly
@given(
    members=st.dictionaries(names, st.binary(max_size=3000), min_size=1, max_size=8),
    mode=st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]),
)
def test_plain_archives_come_out_as_they_went_in(tmp_path_factory, members, mode):
    folder = tmp_path_factory.mktemp("plain")
    known, parents = (
        {n.casefold() for n in members},
        {"/".join(n.casefold().split("/")[:k]) for n in members for k in range(1, n.count("/") + 1)},
    )
    if len(known) < len(members) or known & parents:
        return  # a duplicate, or a file that is also a folder: refused, see below
    path = archive(folder / "a", members.items(), mode)
    assert unpack(path, folder / "out", any_archive=True, progress=False) == len(members)
    assert {n: c for n, c in everything(folder / "out").items() if c is not None} == members
    assert sorted(p.name for p in folder.iterdir()) == ["a", "out"]


@quickly
@given(
    before=st.lists(names, max_size=2),
    bad=st.one_of(
        names.map(lambda n: ("/" + n, b"x")),
        names.map(lambda n: ("../" + n, b"x")),
        names.map(lambda n: (f"a/../../{n}", b"x")),
        names.map(lambda n: (n + "/..", b"x")),
        st.tuples(
            names,
            st.just(b""),
            st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]),
        ),
        names.map(lambda n: ("C:\\" + n, b"x")),
        names.map(lambda n: (n + "\n", b"x")),
    ),
)
def test_whatever_leaves_the_folder_or_is_no_file_is_refused(tmp_path_factory, before, bad):
    folder = tmp_path_factory.mktemp("bad") / "inner"
    folder.mkdir()
    path = archive(folder / "a.tar", [(f"first{i}/{n}", b"fine") for i, n in enumerate(before)] + [bad])
    assert "not unpacked" in refused(path, folder / "out")
    assert [p.name for p in folder.parent.iterdir()] == ["inner"] and not (folder / "secret").exists()


@pytest.mark.parametrize("second", ["a/x.png", "A/X.PNG", "./a/x.png"])
def test_a_name_that_is_there_twice_is_refused(tmp_path, second):
    assert "twice" in refused(archive(tmp_path / "a.tar", [("a/x.png", b"1"), (second, b"2")]), tmp_path / "out")


def test_a_file_that_is_also_a_folder_is_refused(tmp_path):
    refused(archive(tmp_path / "a.tar", [("a", b"1"), ("a/x.png", b"2")]), tmp_path / "out")
    refused(archive(tmp_path / "b.tar", [("a/x.png", b"1"), ("a", b"2")]), tmp_path / "out")


def test_a_link_and_a_file_through_it_write_nothing_outside(tmp_path):
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner/a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("door")
        link.type, link.linkname = tarfile.SYMTYPE, ".."
        tar.addfile(link)
        info = tarfile.TarInfo("door/planted")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    assert "a link" in refused(path, tmp_path / "inner/out")
    assert [p.name for p in tmp_path.iterdir()] == ["inner"]


@quickly
@given(share=st.floats(0, 1, exclude_max=True), mode=st.sampled_from(["w", "w:gz", "w:xz"]))
@example(share=0.3125, mode="w")  # within the header of the second member
def test_an_archive_that_was_cut_anywhere_is_refused(tmp_path_factory, share, mode):
    folder = tmp_path_factory.mktemp("cut")
    path = archive(folder / "a", [(f"p/{i}.png", os.urandom(9000)) for i in range(4)], mode)
    length = path.stat().st_size - (9216 if mode == "w" else 0)  # tar fills its last block of 10,240 bytes with zeros
    path.write_bytes(path.read_bytes()[: int(share * length)])
    assert "damaged" in refused(path, folder / "out")


def test_an_archive_cut_between_two_members_is_refused(tmp_path):
    path = archive(tmp_path / "a.tar", [("a.png", b"x" * 512), ("b.png", b"y" * 512)])
    path.write_bytes(path.read_bytes()[:1024])  # the first member, whole, and nothing after it
    assert "end mark" in refused(path, tmp_path / "out")


@quickly
@given(
    where=st.integers(0, 499).filter(lambda b: b not in (154, 155)), change=st.integers(1, 255), which=st.integers(0, 3)
)
def test_a_broken_header_anywhere_is_refused(
    tmp_path_factory, where, change, which
):  # 154 and 155 only end the checksum
    folder = tmp_path_factory.mktemp("header")
    path = archive(folder / "a", [(f"p/{i}.png", os.urandom(9000)) for i in range(4)])
    content = bytearray(path.read_bytes())
    content[9728 * which + where] ^= change
    path.write_bytes(content)
    refused(path, folder / "out")


@quickly
@given(noise=st.binary(max_size=4000))
def test_noise_is_no_archive(tmp_path_factory, noise):
    folder = tmp_path_factory.mktemp("noise")
    (folder / "a").write_bytes(noise)
    refused(folder / "a", folder / "out")


def test_the_hash_decides(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar", [("a.png", b"x")])
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    message = refused(path, tmp_path / "out", any_archive=False)
    assert sha in message and all(known in message for known in ARCHIVES)
    monkeypatch.setattr(grad_nb.datasets.unpack, "ARCHIVES", {sha: "this very one"})
    assert unpack(path, tmp_path / "out", progress=False) == 1
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert "SHA-256" in refused(path, tmp_path / "other", any_archive=False)


def test_a_folder_in_use_is_left_alone(tmp_path):
    path = archive(tmp_path / "a.tar", [("a.png", b"new")])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.png").write_bytes(b"old")
    assert "not empty" in refused(path, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert unpack(path, tmp_path / "empty", any_archive=True, progress=False) == 1
    assert "No such file" in refused(tmp_path / "absent.tar", tmp_path / "third")


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_kill_leaves_nothing_that_looks_whole_and_the_next_attempt_cleans_up(tmp_path):
    path = archive(tmp_path / "a.tar", [(f"{i}.png", b"x" * 1000) for i in range(50)])
    code = (
        "import os, sys, shutil, grad_nb.datasets.unpack as u\ncopy, done = shutil.copyfileobj, []\n"
        "def dying(*a):\n    done.append(copy(*a))\n    if len(done) == 20: os.kill(os.getpid(), 9)\n"
        "u.shutil.copyfileobj = dying\nu.unpack(sys.argv[1], sys.argv[2], True, False)"
    )
    assert subprocess.run([sys.executable, "-c", code, path, tmp_path / "out"]).returncode == -9
    assert not (tmp_path / "out").exists() and len(list((tmp_path / ".out.unpacking").iterdir())) == 20
    assert unpack(path, tmp_path / "out", any_archive=True, progress=False) == 50
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "out"]


@pytest.mark.skipif(os.name != "posix", reason="needs kernel locks")
def test_two_at_a_time_are_refused(tmp_path):
    import fcntl

    path, work = archive(tmp_path / "a.tar", [("a.png", b"x")]), tmp_path / ".out.unpacking"
    work.mkdir()
    (work / "theirs").write_bytes(b"1")
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another process" in refused(path, tmp_path / "out")
    assert (work / "theirs").exists()
    os.close(handle)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    path = archive(tmp_path / "a.tar", [("a.png", b"x"), ("b.png", b"y")])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grad_nb.datasets.unpack.shutil, "copyfileobj", full)
    assert "No space left" in refused(path, tmp_path / "out")


def test_command(tmp_path):
    def command(*args):
        return subprocess.run(
            [Path(sys.executable).parent / "grad_data", *map(str, args)], capture_output=True, text=True
        )

    made = command("trays", tmp_path / "data", "--size", "64", "--quiet")
    assert made.returncode == 0 and "740 pictures" in made.stdout, made.stderr
    with tarfile.open(tmp_path / "t.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "data/trays", "trays")
    wrong = command("unpack", tmp_path / "t.tar.xz", tmp_path / "copy", "--quiet")
    assert wrong.returncode == 2 and "official" in wrong.stderr and not (tmp_path / "copy").exists()
    done = command("unpack", tmp_path / "t.tar.xz", tmp_path / "copy", "--any-archive", "--quiet")
    assert done.returncode == 0 and "740 pictures" in done.stdout and "no problems" in done.stdout, done.stderr
    (tmp_path / "copy/trays/test/good/000.png").write_bytes(b"")
    checked = command("check", tmp_path / "copy", "--quiet")
    assert checked.returncode == 1 and "000.png is empty" in checked.stdout
    for words in (("look",), ("unpack", "a"), ("check",), ("check", "a", "b")):
        assert command(*words).returncode == 2


def test_a_link_to_an_empty_folder_is_filled_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk")
    path = archive(tmp_path / "a.tar", [("part/x", b"1")])
    assert unpack(path, tmp_path / "data", any_archive=True, progress=False) == 1
    assert (tmp_path / "data").is_symlink() and (tmp_path / "disk/part/x").read_bytes() == b"1"


def test_a_disk_of_its_own_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    assert "disk of its own" in refused(tmp_path / "no archive", tmp_path / "data")


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert "is the current folder" in refused(tmp_path / "no archive", tmp_path / "data")
