"""What reading anything may cost: pictures, archives, models. Small files that claim much are refused, unread."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grad_nb.core.tensors import read_tensors, write_tensors
from grad_nb.datasets.pictures import picture_pixels
from grad_nb.datasets.readers import MAX_PIXELS, DataError, UnavailableError, max_pixels, read_image, upright_shape
from grad_nb.datasets.unpack import MAX_TAR_HEADER, unpack

quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def png(width: int, height: int, depth: int = 8) -> bytes:
    "The head of a grey PNG and no pixels."

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def peak_of(code: str, *arguments) -> float:
    "Megabytes of memory that some code takes at most, in a process of its own, more than its imports do."
    before = "import resource, sys\npeak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
    text = f"{before}{code.format(start='start = peak()')}\nprint(peak() - start)"
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@quickly
@given(width=st.integers(1, 2**31 - 1), height=st.integers(1, 2**31 - 1), depth=st.sampled_from([1, 8, 16]))
def test_a_picture_is_refused_by_its_head(tmp_path, width, height, depth):
    path = tmp_path / "a.png"
    path.write_bytes(png(width, height, depth))
    with pytest.raises(DataError, match="a.png") as said:
        read_image(path, 64)
    if MAX_PIXELS < width * height:  # also where Pillow has a limit of its own
        assert "GRAD_NB_MAX_PIXELS" in str(said.value)


def test_a_larger_limit_than_that_of_pillow_counts(tmp_path, monkeypatch, recwarn):
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (50, 40), (9, 9, 9)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (40, 50, 3) and upright_shape(tmp_path / "a.png") == (40, 50)
    assert picture_pixels((tmp_path / "a.png").read_bytes()).shape == (40, 50, 3) and not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 100 < before


def test_the_limit_of_pixels_is_a_setting(tmp_path, monkeypatch):
    for kind in ("png", "bmp", "tif", "webp", "jpg"):
        path = tmp_path / f"a.{kind}"
        Image.new("RGB", (50, 40), (9, 9, 9)).save(path)
        assert read_image(path).shape == (40, 50, 3)
        monkeypatch.setenv("GRAD_NB_MAX_PIXELS", "1999")
        with pytest.raises(DataError, match=r"50x40 pixels and at most 1,999 .* GRAD_NB_MAX_PIXELS"):
            read_image(path)
        monkeypatch.setenv("GRAD_NB_MAX_PIXELS", "2000")
        read_image(path)
        monkeypatch.delenv("GRAD_NB_MAX_PIXELS")
    for wrong in ("0", "-1", "many", "1e6", "1" * 30):
        monkeypatch.setenv("GRAD_NB_MAX_PIXELS", wrong)
        with pytest.raises(ValueError, match="GRAD_NB_MAX_PIXELS"):
            max_pixels()


def test_a_tile_larger_than_its_picture_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    data = zlib.compress(bytes(99))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 60000, 323: 60000, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(tags)) + entries + bytes(4))
    with pytest.raises(DataError, match="pixels and at most"):
        read_image(path)


def test_a_huge_file_of_a_small_picture_is_refused(tmp_path):
    "A WebP file is read whole by its decoder; one with holes costs nothing on the disk."
    path = tmp_path / "a.webp"
    Image.new("RGB", (64, 64)).save(path)
    os.truncate(path, 8 * MAX_PIXELS + 2**25)
    with pytest.raises(DataError, match="too large|decoded"):
        read_image(path)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted otherwise")
@pytest.mark.parametrize("depth", [1, 16])
def test_the_largest_picture_has_a_bounded_cost(tmp_path, depth):
    path, side = tmp_path / "a.png", 7990
    values = np.zeros((side, side), np.uint16 if depth == 16 else np.uint8)
    image = Image.fromarray(values)
    (image.convert("1") if depth == 1 else image).save(path, compress_level=1)
    code = "from grad_nb.datasets.readers import read_image\n{start}\nread_image(sys.argv[1], 64)"
    assert peak_of(code, path) < 1400


def test_what_cannot_be_opened_is_told_from_what_cannot_be_decoded(tmp_path):
    with pytest.raises(UnavailableError):
        read_image(tmp_path / "gone.png")
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(DataError) as said:
        read_image(tmp_path / "a.png")
    assert not isinstance(said.value, UnavailableError)


@pytest.mark.parametrize("kind", [b"x", b"g", b"X", b"L", b"K", b"S"])
@pytest.mark.parametrize("size", [MAX_TAR_HEADER + 1, 1 << 28, 1 << 33])
def test_headers_of_archives_are_bounded(tmp_path, kind, size):
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(DataError, match="not unpacked"):
        unpack(tmp_path / "a.tar", tmp_path / "out", True, False)
    assert not (tmp_path / "out").exists()


def test_a_map_of_holes_without_end_and_nested_headers_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("f")
        info.size = 512
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
        tar.addfile(info, io.BytesIO(b"99999999\n".ljust(512, b"\0")))
    with pytest.raises(DataError, match="holes"):
        unpack(tmp_path / "a.tar", tmp_path / "out", True, False)
    info = tarfile.TarInfo("x")
    info.type, info.size = b"L", 2
    (tmp_path / "b.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + b"a\0".ljust(512, b"\0")) * 3000)
    with pytest.raises(DataError):
        unpack(tmp_path / "b.tar", tmp_path / "out", True, False)
    assert not (tmp_path / "out").exists()


@quickly
@given(
    shape=st.lists(st.integers(-3, 2**62), max_size=4),
    offsets=st.lists(st.integers(-3, 2**62), min_size=0, max_size=3),
    kind=st.sampled_from(["F32", "F64", "U8", "C64", "", None]),
    length=st.one_of(st.none(), st.integers(0, 2**63)),
)
def test_what_the_head_of_a_model_claims_is_compared_with_its_file(tmp_path, shape, offsets, kind, length):
    "Nothing is made before the claims fit: an error at once, whatever is claimed."
    head = json.dumps({"a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}).encode()
    size = len(head) if length is None else length
    (tmp_path / "m").write_bytes(size.to_bytes(8, "little") + head)
    with pytest.raises(ValueError, match="m "):
        read_tensors(tmp_path / "m")


def test_every_cut_and_every_added_byte_of_a_model_is_refused(tmp_path):
    path = tmp_path / "m"
    write_tensors(path, {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.uint8), "c": torch.zeros(0, 4)}, {})
    whole = path.read_bytes()
    for data in [whole[:n] for n in range(len(whole))] + [whole + b"\0"]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="m "):
            read_tensors(path)


def test_a_model_is_read_without_a_second_copy(tmp_path):
    path = tmp_path / "m"
    write_tensors(path, {f"{i}": torch.ones(1 << 24) for i in range(4)}, {})  # 256 MB
    code = "import torch\nfrom grad_nb.core.tensors import read_tensors\n{start}\nread_tensors(sys.argv[1])"
    assert peak_of(code, path) < 330


def test_a_model_that_was_read_survives_its_file(tmp_path):
    path = tmp_path / "m"
    write_tensors(path, {"a": torch.ones(100_000)}, {})
    tensors, _ = read_tensors(path)
    with open(path, "rb+") as f:
        f.write(bytes(300_000))
    os.truncate(path, 10)
    assert (tensors["a"] == 1).all()


def test_others_read_our_files_and_equal_tensors_give_equal_bytes(tmp_path):
    from safetensors.torch import load_file

    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    tensors = {f"t{i}": torch.ones(3, i, dtype=kind) for i, kind in enumerate(types)} | {"scalar": torch.tensor(2.5)}
    write_tensors(tmp_path / "a", tensors, {"x": 1, "a": 2})
    write_tensors(tmp_path / "b", dict(reversed(tensors.items())), {"a": 2, "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    theirs, (ours, meta) = load_file(tmp_path / "a"), read_tensors(tmp_path / "a")
    assert meta == {"a": 2, "x": 1} and set(theirs) == set(ours) == set(tensors)
    assert all(torch.equal(theirs[n], t) and torch.equal(ours[n], t) for n, t in tensors.items())
