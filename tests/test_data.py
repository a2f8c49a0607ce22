"""Tries to break the readers: damaged files, odd modes, wrong layouts, missing masks."""

import io
import json
import os
import shutil
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from grad_nb.core.files import write_json
from grad_nb.datasets.pictures import of_known_white, picture_pixels, picture_sources, whitest
from grad_nb.datasets.readers import (
    OFFICIAL,
    Category,
    DataError,
    Defect,
    Sample,
    _head,
    category_folders,
    check_category,
    data_sha256,
    find_white,
    load_defects,
    load_images,
    load_mask,
    load_masks,
    mask_files,
    passed_over,
    picture_files,
    read_category,
    read_image,
    shrink_mask,
    survey,
    upright_shape,
)


def noise(height=40, width=50, channels=3, seed=20):
    "A random picture (height, width, channels) uint8; (height, width) for one channel."
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(array, path, mode=None, **options):
    "Write an array or a PIL image, making the folders."
    path.parent.mkdir(parents=True, exist_ok=True)
    im = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (im.convert(mode) if mode else im).save(path, **options)
    return path


def refused(function, *arguments):
    "The message of the DataError that a call must raise."
    with pytest.raises(DataError) as caught:
        function(*arguments)
    return str(caught.value)


# ---- modes ----------------------------------------------------------------------------------------------------------


def test_rgb_is_exact(tmp_path):
    x = noise()
    got = read_image(save(x, tmp_path / "a.png"))
    assert got.dtype == np.uint8 and got.flags.writeable and (got == x).all()


def test_grey_and_one_bit(tmp_path):
    x = noise(channels=1)
    assert (read_image(save(x, tmp_path / "l.png")) == x[..., None]).all()
    bits = x > 127
    assert (read_image(save(bits, tmp_path / "1.png")) == 255 * bits[..., None]).all()


def test_transparent_pixels_are_black(tmp_path):
    x, alpha = noise(), noise(channels=1, seed=1)
    alpha[:10] = 0
    alpha[10:20] = 255
    got = read_image(save(np.dstack([x, alpha]), tmp_path / "rgba.png")).astype(float)
    assert (got[:10] == 0).all() and (got[10:20] == x[10:20]).all()
    assert abs(got - x * (alpha[..., None] / 255)).max() <= 1
    grey = read_image(save(np.dstack([x[..., 0], alpha]), tmp_path / "la.png")).astype(float)
    assert abs(grey - (x[..., 0] * (alpha / 255))[..., None]).max() <= 1


def test_an_alpha_of_0_everywhere_hides_no_picture(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    x[..., 3] = 0
    assert np.array_equal(read_image(save(x, tmp_path / "x.png")), x[..., :3])


def test_a_picture_far_brighter_than_white_is_told_of(tmp_path, caplog):
    x = np.full((40, 40), 30_000, np.uint16)
    path = save(x, tmp_path / "x.png")
    assert read_image(path, white=4095).min() == 255
    assert "more than half of a picture is brighter than 4095" in caplog.text
    caplog.clear()
    x[8:] = 4000  # overexposed in places, as pictures are
    assert read_image(save(x, tmp_path / "y.png"), white=4095)[0].min() == 255 and not caplog.text


def test_transparent_edges_do_not_bleed_when_resized(tmp_path):
    x = np.full((64, 64, 4), 255, np.uint8)
    x[:, 32:, 3] = 0  # the right half is hidden white
    got = read_image(save(x, tmp_path / "a.png"), 32)
    assert (got[:, 24:] == 0).all() and (got[:, :8] == 255).all()


def test_palette_with_and_without_transparency(tmp_path):
    indices = np.zeros((40, 40), np.uint8)
    indices[:, 20:] = 1
    im = Image.fromarray(indices).convert("P")
    im.putpalette([200, 10, 20, 30, 40, 250])
    opaque = read_image(save(im, tmp_path / "p.png"))
    assert (opaque[:, :20] == (200, 10, 20)).all() and (opaque[:, 20:] == (30, 40, 250)).all()
    hidden = read_image(save(im, tmp_path / "pt.png", transparency=0))
    assert (hidden[:, :20] == 0).all() and (hidden[:, 20:] == (30, 40, 250)).all()


def test_colour_key_transparency(tmp_path):
    x = noise()
    x[:5] = (1, 2, 3)
    assert (read_image(save(x, tmp_path / "rgb.png", transparency=(1, 2, 3)))[:5] == 0).all()
    g = noise(channels=1) // 2
    g[:5] = 200
    got = read_image(save(g, tmp_path / "l.png", transparency=200))
    assert (got[:5] == 0).all() and (got[5:] == g[5:, :, None]).all()


def test_colour_key_of_sixteen_bits(tmp_path):
    x = np.full((40, 40), 40_000, np.uint16)
    x[:5] = 50_000
    got = read_image(save(x, tmp_path / "a.png", transparency=50_000))
    assert (got[:5] == 0).all() and (got[5:] == 156).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    x = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = read_image(save(x, tmp_path / f"a{suffix}"))
    assert (got == np.round(x / 257).astype(np.uint8)[..., None]).all()
    dark = np.full((40, 40), 100, np.uint16)  # a dark 16-bit picture is dark, not 8-bit
    assert (read_image(save(dark, tmp_path / f"dark{suffix}")) == 0).all()


def test_big_endian_sixteen_bits(tmp_path):
    x = (np.arange(1600, dtype=np.uint16) * 40).reshape(40, 40)
    im = Image.frombytes("I;16B", (40, 40), x.astype(">u2").tobytes())
    assert (read_image(save(im, tmp_path / "a.tif")) == np.round(x / 257)[..., None]).all()


def test_thirty_two_bits_need_a_white_and_no_picture_is_its_own_scale(tmp_path):
    x = noise(channels=1).astype(np.int32)
    assert (read_image(save(x, tmp_path / "8.tif"), white=255.0) == x[..., None]).all()
    assert (read_image(save(x * 257, tmp_path / "16.tif"), white=65535.0) == x[..., None]).all()
    for name in ("8.tif", "16.tif"):
        assert f"{name} (mode I) cannot be made RGB: it holds whole numbers of 32 bits" in refused(
            read_image, tmp_path / name
        )
    dark = save((x // 300).astype(np.uint16), tmp_path / "dark.png")
    assert not read_image(dark).any(), "16 bits have one white, whatever is in a picture"
    assert "32.tif" in refused(read_image, save(x + 70_000, tmp_path / "32.tif"))
    assert "neg.tif" in refused(read_image, save(x - 300, tmp_path / "neg.tif"))


def test_cmyk(tmp_path):
    x = np.zeros((40, 40, 4), np.uint8)
    x[:, :20, 0] = 255  # cyan left, white right
    im = Image.frombytes("CMYK", (40, 40), x.tobytes())
    got = read_image(save(im, tmp_path / "a.tif"))
    assert (got[:, :20] == (0, 255, 255)).all() and (got[:, 20:] == 255).all()
    jpeg = read_image(save(im, tmp_path / "a.jpg", quality=95))
    assert abs(jpeg[:, 2:14].astype(int) - (0, 255, 255)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    "Orientation says where the stored row 0 and column 0 lie in the upright picture (EXIF 2.3)."
    x, exif = noise(40, 60), Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: x,
        2: x[:, ::-1],
        3: x[::-1, ::-1],
        4: x[::-1],
        5: x.transpose(1, 0, 2),
        6: np.rot90(x, -1),
        7: x[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(x, 1),
    }[orientation]
    for name in ("a.png", "a.tiff"):
        file = save(x, tmp_path / name, exif=exif)
        got = read_image(file)
        assert got.shape == upright.shape and (got == upright).all()
        assert upright_shape(file) == upright.shape[:2] == _head(file)[0][::-1]


def test_float_says_convert(tmp_path):
    message = refused(read_image, save(noise(channels=1).astype(np.float32), tmp_path / "a.tif"))
    assert "a.tif" in message and "floating-point" in message and "convert" in message


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".PNG", ".JPG"])
def test_every_suffix_is_listed_and_read(tmp_path, suffix):
    for i in range(4):
        save(noise(), tmp_path / "c" / f"{i}{suffix}")
    category = read_category(tmp_path / "c")
    assert len(category.train) == 4 and load_images(category.train, 34).shape == (4, 34, 34, 3)


# ---- size -----------------------------------------------------------------------------------------------------------


def test_smallest_side(tmp_path):
    assert read_image(save(noise(34, 34), tmp_path / "ok.png")).shape == (34, 34, 3)
    for h, w in ((33, 90), (90, 33), (1, 1)):
        message = refused(read_image, save(noise(h, w), tmp_path / "small.png"), 64)
        assert "small.png" in message and f"{w}x{h}" in message and "34" in message


def test_resize_is_square_lanczos_and_antialiased(tmp_path):
    x = noise(128, 256)
    got = read_image(save(x, tmp_path / "a.png"), 64)
    assert (got == np.asarray(Image.fromarray(x).resize((64, 64), Image.Resampling.LANCZOS))).all()
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255  # must become grey, not stripes or black
    fine = read_image(save(stripes, tmp_path / "s.png"), 32)[:, 4:-4].astype(int)
    assert abs(fine - 127).max() < 12


def test_own_size_is_untouched(tmp_path):
    x = noise(64, 64)
    assert (read_image(save(x, tmp_path / "a.png"), 64) == x).all()


# ---- damaged files --------------------------------------------------------------------------------------------------


def test_files_that_are_no_pictures(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello, I am a text file\n" * 50)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nothing.png")
    says = {
        "empty.png": "0 bytes",
        "text.png": "is not a",
        "folder.png": "is a folder",
        "link.png": "a link to nothing",
        "absent.png": "does not exist",
    }
    for name, word in says.items():
        message = refused(read_image, tmp_path / name)
        assert str(tmp_path / name) in message and word in message, message
    for name in ("a\0b.png", "x" * 300 + ".png"):
        assert name in refused(read_image, tmp_path / name)  # impossible names


def test_a_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "pipe.png" in refused(read_image, tmp_path / "pipe.png")


def test_other_formats_are_refused(tmp_path):
    "Only the named decoders run: a PostScript file called .png must never reach an interpreter."
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\nshowpage\n")
    save(noise(), tmp_path / "gif.png", format="GIF")
    for name in ("eps.png", "gif.png"):
        assert "is not a PNG" in refused(read_image, tmp_path / name)


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tif", ".webp"])
def test_truncated(tmp_path, suffix):
    whole = save(noise(), tmp_path / f"whole{suffix}").read_bytes()
    for share in (0.01, 0.1, 0.5, 0.8):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[: max(1, int(len(whole) * share))])
        assert str(path) in refused(read_image, path)


def test_decompression_bomb(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    message = refused(read_image, tmp_path / "bomb.png")
    assert "bomb.png has 60000x60000 pixels" in message and "GRAD_NB_MAX_PIXELS" in message


def test_unreadable_file_and_folder(tmp_path, monkeypatch):
    "Done by a stub, because an administrator may read everything."
    for i in range(4):
        save(noise(), tmp_path / "c/train/good" / f"{i}.png")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", denied)
    assert "0.png may not be read" in refused(read_image, tmp_path / "c/train/good/0.png")
    monkeypatch.setattr(Path, "iterdir", denied)
    assert "good cannot be listed" in refused(read_category, tmp_path / "c")


MODES = {
    "1": ".png",
    "L": ".png",
    "LA": ".png",
    "P": ".png",
    "RGB": ".jpg",
    "RGBA": ".webp",
    "CMYK": ".jpg",
    "I": ".tif",
    "I;16": ".png",
    "YCbCr": ".tif",
    "LAB": ".tif",
    "RGBX": ".tif",
}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(sorted(MODES)),
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    size=st.none() | st.integers(1, 80),
    seed=st.integers(0, 99),
)
def test_any_mode_any_size(tmp_path, mode, height, width, size, seed):
    x = noise(height, width, seed=seed)
    if mode == "I;16":
        im = Image.fromarray(np.ascontiguousarray(x[..., 0]).astype(np.uint16) * 200)
    elif mode == "LAB":
        im = Image.frombytes("LAB", (width, height), x.tobytes())
    elif mode == "RGBX":
        im = Image.frombytes("RGBX", (width, height), noise(height, width, 4, seed).tobytes())
    else:
        im = Image.fromarray(x).convert(mode)
    path = tmp_path / f"a{MODES[mode]}"
    im.save(path)
    if min(height, width) < 34:
        assert "34" in refused(read_image, path, size)
        return
    got = read_image(path, size, 255.0 if mode == "I" else None)
    assert got.dtype == np.uint8 and got.shape == ((height, width, 3) if size is None else (size, size, 3))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_fuzz(tmp_path):
    "200 damaged files: an array of the right form, or a DataError that names the file; nothing else."
    rng = np.random.default_rng(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = Image.fromarray(noise(5, 6)).resize((60, 50))
    sources = []
    for options in (
        dict(format="PNG", exif=exif),
        dict(format="JPEG", exif=exif),
        dict(format="JPEG", progressive=True),
    ):
        stream = io.BytesIO()
        smooth.save(stream, **options)
        sources.append(stream.getvalue())
    stream = io.BytesIO()
    smooth.quantize(9).save(stream, "PNG", transparency=1)
    sources.append(stream.getvalue())
    path, outcomes = tmp_path / "fuzz.img", {"read": 0, "refused": 0}
    for i in range(200):
        data = bytearray(sources[i % len(sources)])
        area = len(data) if i % 3 else min(len(data), 120)  # a third of them only in the header
        for _ in range(rng.integers(1, 8)):
            data[rng.integers(area)] = rng.integers(256)
        if i % 5 == 0:
            data = data[: rng.integers(1, len(data))]
        path.write_bytes(data)
        try:
            x = read_image(path, 40)
        except DataError as e:
            outcomes["refused"] += 1
            assert str(path) in str(e)
        else:
            outcomes["read"] += 1
            assert x.shape == (40, 40, 3) and x.dtype == np.uint8
    assert min(outcomes.values()) >= 20, outcomes  # both ways were taken


# ---- layouts --------------------------------------------------------------------------------------------------------


def make_ad(root, n=5):
    "A small MVTec AD category: n normals, 2 good and 3 broken test pictures."
    for i in range(n):
        save(noise(seed=i), root / f"train/good/{i:03}.png")
    for i in range(2):
        save(noise(seed=50 + i), root / f"test/good/{i:03}.png")
    for i in range(3):
        save(noise(seed=60 + i), root / f"test/broken/{i:03}.png")
        mask = np.zeros((40, 50), np.uint8)
        mask[5:15, 5 : 10 + i] = 255
        save(mask, root / f"ground_truth/broken/{i:03}_mask.png")
    return root


CONFIG = [
    dict(defect_name="missing", pixel_value=255, saturation_threshold=30, relative_saturation=False),
    dict(defect_name="bent", pixel_value=249, saturation_threshold=0.5, relative_saturation=True),
    dict(defect_name="huge", pixel_value=248, saturation_threshold=99999, relative_saturation=False),
]


def make_loco(root, good=2, values=((255,), (249, 248))):
    "A small LOCO category; `values` gives, per logical anomaly, the value of each of its masks (each 10 x 8 pixels)."
    for i in range(4):
        save(noise(seed=i), root / f"train/good/{i:03}.png")
    for i in range(3):
        save(noise(seed=20 + i), root / f"validation/good/{i:03}.png")
    for i in range(good):
        save(noise(seed=40 + i), root / f"test/good/{i:03}.png")
    for i, marks in enumerate(values):
        save(noise(seed=60 + i), root / f"test/logical_anomalies/{i:03}.png")
        for j, value in enumerate(marks):
            mask = np.zeros((40, 50), np.uint8)
            mask[20 * j : 20 * j + 10, :8] = value
            save(mask, root / f"ground_truth/logical_anomalies/{i:03}/{j:03}.png")
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def test_ad_layout(tmp_path):
    c = read_category(make_ad(tmp_path / "part").parent, "part")
    assert (c.name, c.layout, c.root, c.notes, c.defects) == ("part", "mvtec_ad", tmp_path / "part", (), ())
    assert [s.path.name for s in c.train] == [f"{i:03}.png" for i in range(5)] and c.validation == ()
    assert {(s.label, s.type) for s in c.train} == {(0, "good")}
    assert [(s.type, s.label, s.path.name) for s in c.test] == [
        ("broken", 1, "000.png"),
        ("broken", 1, "001.png"),
        ("broken", 1, "002.png"),
        ("good", 0, "000.png"),
        ("good", 0, "001.png"),
    ]
    assert c.test[1].masks == (tmp_path / "part/ground_truth/broken/001_mask.png",) and c.test[3].masks == ()
    assert c.counts == dict(train=5, validation=0, test=5, normal=2, anomalous=3, masks=3) and c.has_masks
    assert "part (mvtec_ad): 5 train" in str(c)


def test_name_comes_from_the_folder(tmp_path, monkeypatch):
    root = make_ad(tmp_path / "part")
    assert read_category(root).name == "part" == read_category(str(root) + "/").name
    monkeypatch.chdir(root)
    assert read_category(".").name == "part"
    assert read_category("../part/train/..").name == "part"


def test_ad_without_test(tmp_path):
    shutil.rmtree(make_ad(tmp_path / "part") / "test")
    c = read_category(tmp_path / "part")
    assert c.layout == "mvtec_ad" and len(c.train) == 5 and c.test == () and not c.has_masks


@pytest.mark.parametrize(
    "mark", ["validation/good", "defects_config.json", "test/logical_anomalies", "test/structural_anomalies"]
)
def test_each_mark_of_loco(tmp_path, mark):
    for i in range(4):
        save(noise(seed=i), tmp_path / f"train/good/{i}.png")
    assert read_category(tmp_path).layout == "mvtec_ad"
    if mark.endswith("json"):
        (tmp_path / mark).write_text("[]")
    else:
        (tmp_path / mark).mkdir(parents=True)
    assert read_category(tmp_path).layout == "mvtec_loco"


def test_loco_layout(tmp_path):
    c = read_category(make_loco(tmp_path / "box"))
    assert c.layout == "mvtec_loco" and c.notes == ()
    assert c.counts == dict(train=4, validation=3, test=4, normal=2, anomalous=2, masks=3)
    assert [len(s.masks) for s in c.test] == [0, 0, 1, 2] and c.test[3].type == "logical_anomalies"
    assert c.defects[1] == Defect("bent", 249, 0.5, True) and len(c.defects) == 3


def test_loco_stand_in(tmp_path):
    c = read_category(make_loco(tmp_path / "box", good=0))
    assert c.notes == ("validation/good stands in for test/good, which is absent",) and c.notes[0] in str(c)
    assert c.validation == () and [(s.label, s.type) for s in c.test[:3]] == [(0, "good")] * 3
    assert [s.path.parent.parent.name for s in c.test[:3]] == ["validation"] * 3 and len(c.test) == 5


def test_nothing_stands_in_when_there_are_no_anomalies(tmp_path):
    c = read_category(make_loco(tmp_path / "box", good=0, values=()))
    assert len(c.validation) == 3 and c.test == () and c.notes == ()


def test_plain_folder(tmp_path):
    for i in range(4):
        save(noise(seed=i), tmp_path / "mine" / f"{i}.jpg")
    c = read_category(tmp_path, "mine")
    assert (c.layout, c.name, len(c.train), c.validation, c.test) == ("folder", "mine", 4, (), ())


def test_other_files_and_deeper_folders_are_ignored(tmp_path):
    root = make_ad(tmp_path / "part")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._000.png", ".hidden.png"):
        (root / "train/good" / name).write_text("x")
    save(noise(), root / "train/good/deeper/x.png")
    (root / "train/good/looks_like.png").mkdir()
    save(noise(), root / "test/.cache/000.png")
    c = read_category(root)
    assert len(c.train) == 5 and len(c.test) == 5


def test_links_to_files_are_followed(tmp_path):
    root = make_ad(tmp_path / "part")
    elsewhere = save(noise(seed=99), tmp_path / "elsewhere/q.png")
    (root / "train/good/900.png").symlink_to(elsewhere)
    c = read_category(root)
    assert len(c.train) == 6 and (load_images([c.train[-1]], 34) == load_images([elsewhere], 34)).all()


def test_a_dead_link_is_not_dropped_in_silence(tmp_path):
    root = make_ad(tmp_path / "part")
    (root / "train/good/900.png").symlink_to(tmp_path / "gone.png")
    assert "900.png" in refused(load_images, read_category(root).train, 34)


def test_order_is_by_name_not_by_disk(tmp_path):
    for name in "dbca":
        save(noise(), tmp_path / f"{name}.png")
    assert [s.path.stem for s in read_category(tmp_path).train] == list("abcd")


def test_missing_category_lists_the_others(tmp_path):
    make_ad(tmp_path / "bolt")
    make_loco(tmp_path / "box")
    (tmp_path / "empty").mkdir()
    message = refused(read_category, tmp_path, "blot")
    assert "blot does not exist" in message and "bolt, box" in message and "empty" not in message
    assert "bolt, box" in refused(read_category, tmp_path / "blot")
    assert "bolt, box" in refused(read_category, tmp_path)  # the data set, where a category was wanted
    assert "bolt, box" in refused(read_category, tmp_path, "empty")
    (tmp_path / "file").write_text("x")
    assert "file is not a folder" in refused(read_category, tmp_path, "file")
    assert "does not exist" in refused(read_category, tmp_path / "no/such", "thing")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_too_few_normals(tmp_path, n):
    for i in range(n):
        save(noise(), tmp_path / f"train/good/{i}.png")
    (tmp_path / "train/good").mkdir(parents=True, exist_ok=True)
    message = refused(read_category, tmp_path)
    assert str(tmp_path / "train" / "good") in message and f"holds {n} normal" in message and "4" in message
    for i in range(n, 4):
        save(noise(), tmp_path / f"train/good/{i}.png")
    assert len(read_category(tmp_path).train) == 4


def test_no_ground_truth_at_all(tmp_path):
    for root in (make_ad(tmp_path / "a"), make_loco(tmp_path / "b")):
        shutil.rmtree(root / "ground_truth")
        c = read_category(root)
        assert c.notes == ("no ground truth: pixel figures are n/a",) and not c.has_masks
        anomalous = [s for s in c.test if s.label]
        assert anomalous and all(s.masks == () for s in anomalous)
        assert str(anomalous[0].path) in refused(load_mask, anomalous[0], 40)
        assert str(anomalous[0].path) in refused(load_defects, anomalous[0], c)


def test_some_masks_missing(tmp_path):
    root = make_ad(tmp_path / "a")
    (root / "ground_truth/broken/001_mask.png").unlink()
    message = refused(read_category, root)
    assert str(root / "test/broken/001.png") in message and str(root / "ground_truth/broken/001_mask.png") in message
    root = make_loco(tmp_path / "b")
    (root / "ground_truth/logical_anomalies/000/000.png").unlink()
    message = refused(read_category, root)
    assert (
        str(root / "test/logical_anomalies/000.png") in message
        and str(root / "ground_truth/logical_anomalies/000") in message
    )


def row(**changes):
    return dict(CONFIG[0]) | changes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        '"text"',
        "[1]",
        '[{"defect_name": "a"}]',
        '{"defect_name": "a"}',
        "\xff",
        "[" * 100_000,
        json.dumps([row(pixel_value=0)]),
        json.dumps([row(pixel_value=256)]),
        json.dumps([row(pixel_value="x")]),
        json.dumps([row(pixel_value=1.5)]),
        json.dumps([row(pixel_value=None)]),
        json.dumps([row(pixel_value=[])]),
        json.dumps([row(saturation_threshold=0)]),
        json.dumps([row(saturation_threshold=float("nan"))]),
        json.dumps([row(saturation_threshold=float("inf"))]),
        json.dumps([row(saturation_threshold=None)]),
        json.dumps([row(saturation_threshold=10**400)]),
        json.dumps([row(relative_saturation="false")]),
        json.dumps([row(relative_saturation=None)]),
        json.dumps([row(), row()]),
    ],
)
def test_broken_defects_config(tmp_path, text):
    root = make_loco(tmp_path / "box")
    (root / "defects_config.json").write_bytes(text.encode("latin-1"))
    assert str(root / "defects_config.json") in refused(read_category, root)


# ---- pictures and masks ---------------------------------------------------------------------------------------------


def test_load_images(tmp_path):
    c = read_category(make_ad(tmp_path / "part"))
    x = load_images(c.train, 34)
    assert x.shape == (5, 34, 34, 3) and x.dtype == np.uint8
    for i, s in enumerate(c.train):
        assert (x[i] == read_image(s.path, 34)).all()
    assert (load_images([str(s.path) for s in c.train], 34) == x).all() and load_images([], 34).shape == (0, 34, 34, 3)
    c.train[2].path.write_bytes(b"")
    assert str(c.train[2].path) in refused(load_images, c.train, 34)


@pytest.mark.parametrize("kind", ["tif", "webp", "png"])
def test_a_file_of_several_pictures_is_told_of_once(tmp_path, caplog, kind):
    pages = [Image.fromarray(np.full((40, 50, 3), 50 * i, np.uint8)) for i in range(3)]
    pages[0].save(tmp_path / f"one.{kind}")
    pages[0].save(tmp_path / f"many.{kind}", save_all=True, append_images=pages[1:], lossless=True)
    for _ in range(2):
        for name in ("one", "many"):
            assert (read_image(tmp_path / f"{name}.{kind}") <= 8).all()
    assert caplog.text.count("pictures, and the first of them is read") == 1
    assert f"many.{kind} holds 3 pictures" in caplog.text


def test_progress_is_shown_only_when_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GRAD_NB_BARS", "1")  # as on a terminal
    monkeypatch.setattr("grad_nb.core.progress.DELAY", 0.0)
    c = read_category(make_ad(tmp_path / "part"))
    load_images(c.train, 34)
    assert capsys.readouterr().err == ""
    load_images(c.train, 34, progress=True)
    assert "reading pictures" in capsys.readouterr().err
    check_category(c, progress=False)
    assert capsys.readouterr().err == ""


def test_mask_is_the_union_of_any_value(tmp_path):
    c = read_category(make_loco(tmp_path / "box", values=((249, 1),)))
    s = c.test[-1]
    union = np.zeros((40, 50), bool)
    union[:10, :8] = union[20:30, :8] = True
    want = np.asarray(Image.fromarray(union.astype(np.uint8)).resize((64, 64), Image.Resampling.NEAREST)) > 0
    got = load_mask(s, 64)
    assert got.dtype == bool and got.shape == (64, 64) and (got == want).all() and 0 < got.sum() < got.size
    masks = load_masks(c.test, 64)
    assert masks.dtype == bool and masks.shape == (3, 64, 64) and not masks[:2].any() and (masks[2] == want).all()
    assert load_masks([], 64).shape == (0, 64, 64)


def test_a_cell_of_a_smaller_mask_is_defective_by_the_share_of_its_area(tmp_path):
    c = read_category(make_ad(tmp_path / "part"))
    mask = np.zeros((40, 50), np.uint8)
    mask[4:20, 10:30] = 255  # whole cells of 4 x 5 pixels
    mask[20:22, 10:30] = 255  # half of a row of cells
    mask[4:20, 30:32] = 255  # two fifths of a column
    save(mask, c.test[0].masks[0])
    want = np.zeros((10, 10), bool)
    want[1:6, 2:6] = True
    assert (load_mask(c.test[0], 10) == want).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 999), size=st.integers(5, 40), height=st.integers(34, 130), width=st.integers(34, 130))
def test_no_defect_vanishes_when_a_mask_is_made_smaller(seed, size, height, width):
    "Specks and scratches of a pixel's width: each has a cell, and each keeps at least its area."
    rng = np.random.default_rng(seed)
    for _ in range(4):
        mask = np.zeros((height, width), bool)
        y, x = rng.integers(height), rng.integers(width)
        mask[y : y + rng.integers(1, height), x : x + rng.integers(1, 4)] = True
        small = shrink_mask(mask, size)
        if max(height, width) > size:
            assert small.sum() >= max(1, round(mask.sum() * size * size / (height * width)))
    both = np.zeros((200, 200), bool)
    both[:100, :100] = both[150, 150] = True  # a large defect does not hide a speck
    assert shrink_mask(both, 20)[15, 15] and shrink_mask(both, 20).sum() == 101


def test_masks_mean_the_same_however_they_were_stored(tmp_path):
    "Soft edges, JPEG's greys, a defect in the alpha channel, a palette without black, numbers of labels."
    root = make_ad(tmp_path / "part")
    y, x = np.mgrid[:200, :200]
    true = (y - 90) ** 2 + (x - 110) ** 2 < 40**2
    hard = Image.fromarray(np.uint8(255 * true))
    palette = Image.fromarray(np.uint8(true)).convert("P")
    palette.putpalette([255, 255, 255, 255, 0, 0] + [0] * 762)
    soft = hard.resize((50, 50), Image.Resampling.LANCZOS).resize((200, 200), Image.Resampling.BICUBIC)
    stored = {
        "alpha.png": Image.merge("LA", [Image.new("L", hard.size, 255), hard]),
        "palette.png": palette,
        "soft.png": soft,
        "jpeg.jpg": hard,
        "labels.png": Image.fromarray(np.uint8(true) * (1 + (x > 110).astype(np.uint8))),
        "deep.png": Image.fromarray(np.uint16(60_000 * true)),
    }
    save(noise(200, 200), root / "test/broken/000.png")
    for name, mask in stored.items():
        (root / "ground_truth/broken/000_mask.png").unlink(missing_ok=True)
        (root / "ground_truth/broken/000_mask.jpg").unlink(missing_ok=True)
        save(mask, root / f"ground_truth/broken/000_mask{Path(name).suffix}")
        c = read_category(root)
        assert (load_mask(c.test[0], 200) != true).mean() < 0.01, name
        assert not [p for p, _ in check_category(c, progress=False)], name
    (root / "ground_truth/broken/000_mask.jpg").unlink(missing_ok=True)
    doubtful = {"inverted": Image.fromarray(np.uint8(255 * ~true)), "two-valued": soft.point(lambda v: v // 3 + 2)}
    for said, mask in doubtful.items():
        save(mask, root / "ground_truth/broken/000_mask.png")
        problems = check_category(read_category(root), progress=False)
        assert [said in text for _, text in problems] == [True] == [said in text for text in survey(root).problems]


@pytest.mark.parametrize("ending, name", [(".PNG", "{}_mask.PNG"), (".png", "{}.png"), (".png", "{}_MASK.tif")])
def test_the_check_and_the_reader_find_the_same_masks(tmp_path, ending, name):
    root = make_ad(tmp_path / "part")
    for i in range(3):
        (root / f"test/broken/{i:03}.png").rename(root / f"test/broken/{i:03}{ending}")
        mask = Image.open(root / f"ground_truth/broken/{i:03}_mask.png")
        mask.load()
        (root / f"ground_truth/broken/{i:03}_mask.png").unlink()
        mask.save(root / f"ground_truth/broken/{name.format(f'{i:03}')}")
    assert survey(root).problems == [] and load_masks(read_category(root).test, 40).any((1, 2)).sum() == 3
    (root / f"ground_truth/broken/{name.format('001')}").unlink()
    assert any("001" in problem for problem in survey(root).problems)
    assert "holds masks of 000, 002" in refused(read_category, root)


def test_the_check_refuses_what_the_reader_will_refuse(tmp_path):
    root = make_ad(tmp_path / "part")
    save(np.zeros((40, 50), np.uint8), root / "ground_truth/broken/000_mask.png")
    assert any("marks no pixel" in problem for problem in survey(root).problems)
    assert "marks no pixel" in refused(load_mask, read_category(root).test[0], 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    for c in read_category(make_ad(tmp_path / "turned")).test[:3]:
        save(np.ascontiguousarray(np.rot90(noise(), -1)), c.path, exif=exif, format="PNG")
    assert survey(tmp_path / "turned").problems == []
    assert load_masks(read_category(tmp_path / "turned").test, 40).any()
    shutil.rmtree(tmp_path / "turned/ground_truth")
    found = survey(tmp_path / "turned")
    assert found.problems == [] and "pixel figures are n/a" in str(found)
    for i in range(3):
        (tmp_path / f"turned/train/good/{i:03}.png").unlink()
    assert any("at least 4" in problem for problem in survey(tmp_path / "turned").problems)


@pytest.mark.parametrize("name", ["Good", "GOOD", "OK", "normal"])
def test_another_word_for_good_is_refused_with_what_to_do(tmp_path, name):
    root = make_ad(tmp_path / "part")
    (root / "test/good").rename(root / "test" / name)
    assert name in refused(read_category, root) and "rename that folder to good" in refused(read_category, root)
    assert any("rename" in problem for problem in survey(root).problems)
    (root / "test" / name).rename(root / "test/good")
    (root / "train/good").rename(root / "train" / name)
    assert "must be called good" in refused(read_category, root)


def test_what_is_not_used_is_counted_and_named(tmp_path):
    root = make_ad(tmp_path / "part")
    for name in ("test/dent/top/0.png", "test/dent/top/1.png", "train/good/cam2/0.png", "test/777.png"):
        save(noise(), root / name)
    save(noise(), root / "test/broken/x.jfif", format="JPEG")
    save(np.uint8(255 * (noise(channels=1) > 99)), root / "ground_truth/broken/009_mask.png")
    told = read_category(root).notes
    for said in (
        "2 pictures in test/dent/top",
        "1 picture in train/good/cam2",
        "1 picture in test (777.png)",
        "1 .jfif picture in test/broken",
        "1 picture in ground_truth/broken",
    ):
        assert any(said in note for note in told), told
        assert said in str(survey(root)) and said in str(read_category(root))


def test_it_is_said_when_there_are_too_many_files_to_look_through(tmp_path, monkeypatch):
    save(noise(), tmp_path / "0.png")
    save(noise(), tmp_path / "deep/er/1.png")
    monkeypatch.setattr("grad_nb.datasets.readers.MOST_ENTRIES", 1)
    assert passed_over(tmp_path)[-1] == "not all folders were looked through: there are more than 1 files"
    monkeypatch.setattr("grad_nb.datasets.readers.MOST_ENTRIES", 9)
    assert len(passed_over(tmp_path)) == 2


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("suffix, kind", [(".png", np.uint16), (".tif", np.uint16), (".tif", np.int32), (".tif", "F")])
def test_pictures_of_a_camera_have_one_white(tmp_path, bits, suffix, kind):
    "All pictures of a data set are scaled by one white, however dark each is, and the check knows it too."
    kind = np.float32 if kind == "F" else kind
    ramp = np.tile(np.linspace(0, 2**bits - 1, 256), (40, 1)).astype(kind)
    for i, share in enumerate((1, 2, 4, 8)):
        save(Image.fromarray((ramp // share).astype(kind)), tmp_path / f"train/good/{i}{suffix}")
    c = read_category(tmp_path)
    assert c.train[0].white == 2**bits - 1 and any(f"white is {2**bits - 1}" in note for note in c.notes)
    x = load_images(c.train, 256)
    assert x[0].max() == 255 and len(np.unique(x[0])) > 240
    assert np.abs(x[0].astype(int) // 8 - x[3]).max() <= 1
    assert check_category(c, progress=False) == []


def test_floats_from_0_to_1_are_read_with_their_data_set(tmp_path):
    for i in range(4):
        save(np.random.default_rng(i).random((40, 40), np.float32), tmp_path / f"mine/{i}.tif")
    c = read_category(tmp_path / "mine")
    assert c.train[0].white == 1.0 and load_images(c.train, 40).max() == 255
    save(np.full((40, 40), -1.0, np.float32), tmp_path / "mine/9.tif")
    assert "9.tif" in refused(read_category, tmp_path / "mine")


def test_a_picture_that_may_be_far_too_dark_is_named(tmp_path, caplog):
    ramp = np.tile(np.arange(0, 4096, 16, dtype=np.uint16), (40, 1))
    read_image(save(ramp, tmp_path / "a.png"))
    assert "values up to 4080 only" in caplog.text


def test_a_one_bit_mask_counts_as_255(tmp_path):
    c = read_category(make_loco(tmp_path / "box"))
    save(Image.open(c.test[2].masks[0]).convert("1"), c.test[2].masks[0])
    assert load_defects(c.test[2], c)[0][1] == 30


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGB", "RGBA", "I;16"])
def test_masks_of_other_modes(tmp_path, mode):
    c = read_category(make_ad(tmp_path / "part"))
    where = np.asarray(Image.open(c.test[0].masks[0])) > 0
    im = (
        Image.fromarray(where.astype(np.uint16) * 300)
        if mode == "I;16"
        else Image.fromarray(np.uint8(255 * where)).convert(mode)
    )
    im.save(c.test[0].masks[0])
    ((mask, saturation),) = load_defects(c.test[0], c)
    assert (mask == where).all() and saturation == where.sum()


@pytest.mark.parametrize("shape", [(50, 40), (80, 100), (40, 51)])
def test_mask_of_another_size(tmp_path, shape):
    c = read_category(make_ad(tmp_path / "part"))
    s = c.test[0]
    save(np.full(shape, 255, np.uint8), s.masks[0])
    for call in (lambda: load_mask(s, 40), lambda: load_defects(s, c)):
        message = refused(call)
        assert all(t in message for t in (str(s.path), str(s.masks[0]), "50x40", f"{shape[1]}x{shape[0]}"))


def test_mask_of_a_turned_picture(tmp_path):
    "A mask is compared with the picture as it is read, upright."
    c, exif = read_category(make_ad(tmp_path / "part")), Image.Exif()
    exif[0x0112] = 6
    save(noise(50, 40), c.test[0].path, exif=exif)  # stored 40 wide and 50 high, read 50 wide and 40 high
    assert read_image(c.test[0].path).shape == (40, 50, 3) and load_mask(c.test[0], 40).any()


def test_broken_masks(tmp_path):
    c = read_category(make_ad(tmp_path / "part"))
    c.test[0].masks[0].write_bytes(c.test[0].masks[0].read_bytes()[:60])
    c.test[1].masks[0].unlink()
    save(np.ones((40, 50), np.float32), c.test[2].masks[0], format="TIFF")
    for s in c.test[:3]:
        assert str(s.masks[0]) in refused(load_mask, s, 40)


# ---- defects --------------------------------------------------------------------------------------------------------


def test_saturation(tmp_path):
    c = read_category(make_loco(tmp_path / "box"))
    ((mask, saturation),) = load_defects(c.test[2], c)
    assert mask.shape == (40, 50) and mask.dtype == bool and mask.sum() == 80 and mask[:10, :8].all()
    assert saturation == 30  # pixels
    (_, bent), (second, huge) = load_defects(c.test[3], c)
    assert bent == 40 and huge == 80  # half of the area; capped at the area
    assert second[20:30, :8].all() and second.sum() == 80
    assert load_defects(c.test[0], c) == []


def test_saturation_without_a_table(tmp_path):
    c = read_category(make_ad(tmp_path / "part"))
    ((mask, saturation),) = load_defects(c.test[1], c)
    assert saturation == mask.sum() == 60


def test_unknown_mask_value(tmp_path):
    c = read_category(make_loco(tmp_path / "box", values=((17,),)))
    message = refused(load_defects, c.test[-1], c)
    assert str(c.test[-1].masks[0]) in message and "17" in message and "248, 249, 255" in message
    assert load_mask(c.test[-1], 40).any()  # as an area it is still good


def test_two_values_in_one_mask_and_no_value(tmp_path):
    c = read_category(make_loco(tmp_path / "box"))
    mask = np.zeros((40, 50), np.uint8)
    mask[0, 0] = 255
    mask[1, 1] = 249
    save(mask, c.test[2].masks[0])
    assert "249, 255" in refused(load_defects, c.test[2], c)
    save(0 * mask, c.test[2].masks[0])
    assert "no pixel" in refused(load_defects, c.test[2], c)


# ---- hash and check -------------------------------------------------------------------------------------------------


def test_hash_does_not_depend_on_the_place(tmp_path, monkeypatch):
    root = make_loco(tmp_path / "a" / "box")
    want = data_sha256(read_category(root))
    shutil.copytree(root, tmp_path / "b" / "other_name")
    assert data_sha256(read_category(tmp_path / "b" / "other_name")) == want and len(want) == 64
    monkeypatch.chdir(tmp_path)
    assert data_sha256(read_category("a", "box")) == want
    (root / "readme.txt").write_text("not data")
    assert data_sha256(read_category(root)) == want


@pytest.mark.parametrize(
    "name",
    [
        "train/good/000.png",
        "validation/good/001.png",
        "test/good/000.png",
        "defects_config.json",
        "test/logical_anomalies/001.png",
        "ground_truth/logical_anomalies/001/001.png",
    ],
)
def test_hash_changes_with_any_byte(tmp_path, name):
    root = make_loco(tmp_path / "box")
    before = data_sha256(read_category(root))
    with open(root / name, "ab") as f:
        f.write(b" ")
    assert data_sha256(read_category(root)) != before


def test_hash_changes_with_any_name_and_swap(tmp_path):
    root = make_ad(tmp_path / "part")
    hashes = {data_sha256(read_category(root))}
    (root / "train/good/000.png").rename(root / "train/good/00.png")
    hashes.add(data_sha256(read_category(root)))
    (root / "train/good/00.png").rename(root / "t")
    (root / "train/good/001.png").rename(root / "train/good/00.png")
    (root / "t").rename(root / "train/good/001.png")
    hashes.add(data_sha256(read_category(root)))
    (root / "train/good/004.png").unlink()
    hashes.add(data_sha256(read_category(root)))
    assert len(hashes) == 4


def test_hash_names_a_file_that_has_gone(tmp_path):
    c = read_category(make_ad(tmp_path / "part"))
    c.train[0].path.unlink()
    assert str(c.train[0].path) in refused(data_sha256, c)


def test_check_lists_all_problems(tmp_path):
    root = make_loco(tmp_path / "box", values=((255,), (249, 248), (17,), (255,), (255,)))
    c = read_category(root)
    assert [p for p, _ in check_category(c, progress=False)] == [c.test[4].masks[0]]
    c.train[1].path.write_bytes(b"")
    save(noise(20, 20), c.validation[0].path)
    c.test[0].path.write_text("text")
    save(np.full((41, 50), 255, np.uint8), c.test[3].masks[1])
    c.test[5].path.write_bytes(b"x")
    c.test[5].masks[0].write_bytes(b"y")  # both are reported
    save(np.zeros((40, 50), np.uint8), c.test[6].masks[0])
    problems = check_category(c, progress=False)
    assert [p for p, _ in problems] == [
        c.train[1].path,
        c.validation[0].path,
        c.test[0].path,
        c.test[3].masks[1],
        c.test[4].masks[0],
        c.test[5].path,
        c.test[5].masks[0],
        c.test[6].masks[0],
    ]
    assert all(str(path) in text for path, text in problems)


def test_records_are_frozen(tmp_path):
    c = read_category(make_ad(tmp_path / "part"))
    for record, field in ((c, "train"), (c.train[0], "label"), (Defect("a", 1, 1.0, True), "name")):
        with pytest.raises(AttributeError):
            setattr(record, field, None)
    assert isinstance(c, Category) and hash(c) == hash(replace(c)) and Sample(Path("a"), 0, "good").masks == ()


# ---- the real data --------------------------------------------------------------------------------------------------


def real(folder, *names):
    "A real category, or a skip."
    if not folder.joinpath(*names).is_dir():
        pytest.skip(f"{'/'.join(names)} is not among the real data")
    return read_category(folder.joinpath(*names[:-1]), names[-1])


def test_bottle(real_data):
    c = real(real_data, "mvtec_ad", "bottle")
    assert (c.layout, len(c.train), len(c.validation), len(c.test), c.notes) == ("mvtec_ad", 209, 0, 83, ())
    assert c.counts["masks"] == c.counts["anomalous"] == 63 and c.has_masks
    masks = load_masks(c.test, 64)
    assert [bool(m.any()) for m in masks] == [bool(s.label) for s in c.test]
    assert load_images(c.test[:3], 64).std() > 10


def test_juice_bottle(real_data):
    c = real(real_data, "mvtec_loco", "juice_bottle")
    if (c.root / "test/good").is_dir():
        pytest.skip("this is the whole juice_bottle, the test is for the part without test/good")
    assert c.layout == "mvtec_loco" and len(c.train) == 335 and len(c.validation) == 0 and len(c.defects) == 18
    assert [s.type for s in c.test] == ["good"] * 54 + ["logical_anomalies"] * 142
    assert c.notes == ("validation/good stands in for test/good, which is absent",)
    for s in c.test[54:60]:
        for mask, saturation in load_defects(s, c):
            assert 0 < saturation <= mask.sum() == load_mask(s, mask.shape[0]).sum()


@pytest.mark.slow
@pytest.mark.parametrize("names", [("mvtec_ad", "bottle"), ("mvtec_loco", "juice_bottle")])
def test_real_data_have_no_problems(real_data, names):
    assert check_category(real(real_data, *names), progress=False) == []


# ---- a data set against the official counts --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toothbrush(tmp_path_factory):
    "The smallest official category, with noise for pictures."
    root = tmp_path_factory.mktemp("ad") / "toothbrush"
    for folder, n in OFFICIAL["toothbrush"].pictures.items():
        for i in range(n):
            save(noise(34, 36, seed=i), root / folder / f"{i:03}.png")
    for i in range(30):
        save(noise(34, 36, 1), root / f"ground_truth/defective/{i:03}_mask.png")
    return root


def test_a_whole_category_has_no_problems(toothbrush):
    found = survey(toothbrush)
    assert (
        found.problems == []
        and found.pictures == {"train/good": 60, "test/good": 12, "test/defective": 30}
        and found.masks == {"defective": 30}
    )
    assert (
        "102 of 102 pictures, 30 of 30 anomalous ones with masks, 36x34 pixels (official: 1024x1024)\n  complete"
        in str(found)
    )


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda r: (r / "train/good/007.png").unlink(), ["train/good: 59 of 60 pictures; missing 007"]),
        (lambda r: (r / "test/good/011.png").unlink(), ["test/good: 11 of 12 pictures; missing 011"]),
        (lambda r: shutil.rmtree(r / "test/good"), ["test/good: absent; it should hold 12 pictures"]),
        (
            lambda r: shutil.copy(r / "test/good/000.png", r / "test/good/copy.png"),
            ["test/good: not of the official set: copy"],
        ),
        (
            lambda r: shutil.copy(r / "test/good/000.png", r / "test/good/000.jpg"),
            ["test/good: twice, with two endings: 000"],
        ),
        (
            lambda r: save(noise(), r / "test/odd/000.png"),
            [
                "test/odd: 1 picture in a folder that the official set does not have",
                "ground_truth/odd: 1 of 1 pictures have no mask: 000",
            ],
        ),
        (
            lambda r: (r / "ground_truth/defective/003_mask.png").unlink(),
            ["ground_truth/defective: 1 of 30 pictures have no mask: 003"],
        ),
        (
            lambda r: (r / "test/defective/029.png").unlink(),
            ["test/defective: 29 of 30 pictures; missing 029", "ground_truth/defective: masks without a picture: 029"],
        ),
        (
            lambda r: save(noise(50, 50, 1), r / "ground_truth/defective/004_mask.png"),
            ["has 50x50 pixels but its picture 36x34"],
        ),
        (lambda r: (r / "train/good/001.png").write_bytes(b""), ["001.png is empty"]),
        (lambda r: (r / "train/good/001.png").write_bytes(b"no picture"), ["001.png is not a picture"]),
        (
            lambda r: (r / "train/good/001.png").write_bytes((r / "train/good/001.png").read_bytes()[:-7]),
            ["001.png is cut off"],
        ),
        (lambda r: (r / "ground_truth/defective/000_mask.png").write_bytes(b""), ["000_mask.png is empty"]),
        (lambda r: shutil.rmtree(r / "train"), ["train/good: absent; it should hold 60 pictures"]),
    ],
)
def test_what_is_missing_extra_or_damaged_is_named(toothbrush, tmp_path, damage, said):
    root = shutil.copytree(toothbrush, tmp_path / "toothbrush")
    damage(root)
    problems = survey(root).problems
    assert len(problems) == len(said) and all(text in problem for text, problem in zip(said, problems)), problems
    assert category_folders(tmp_path) == [root]


def test_other_files_do_not_count_and_the_survey_opens_no_pixels(toothbrush, tmp_path, monkeypatch):
    root = shutil.copytree(toothbrush, tmp_path / "toothbrush")
    for name in ("Thumbs.db", ".DS_Store", "license.txt"):
        (root / "train/good" / name).write_bytes(b"x")

    def decoded(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", decoded)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    assert survey(root).problems == []


def test_a_category_of_loco_needs_its_table_of_defects_and_a_mask_folder(tmp_path):
    root = tmp_path / "mvtec_loco/mine"
    for i in range(4):
        save(noise(), root / f"train/good/{i}.png")
    save(noise(), root / "validation/good/0.png")
    save(noise(), root / "test/logical_anomalies/000.png")
    (root / "ground_truth/logical_anomalies/000").mkdir(parents=True)
    assert survey(root).problems == [
        "ground_truth/logical_anomalies: 1 of 1 pictures have no mask: 000",
        "defects_config.json is missing",
    ]
    save(noise(channels=1), root / "ground_truth/logical_anomalies/000/000.png")
    (root / "defects_config.json").write_text("[]")
    assert survey(root).problems == [] and "official counts are not known" in str(survey(root))
    assert (
        category_folders(tmp_path) == [root]
        and "plain folder" in refused(category_folders, root / "train/good")
        and "does not exist" in refused(category_folders, tmp_path / "no")
    )


def test_the_real_categories_are_recognised(real_data):
    bottle = survey(real_data / "mvtec_ad/bottle")
    assert (
        bottle.problems == []
        and sum(bottle.pictures.values()) == 292
        and bottle.masks == {"broken_large": 20, "broken_small": 22, "contamination": 21}
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_no_result_can_hold_is_refused_before_the_training(tmp_path):
    root = make_ad(tmp_path / "part")
    good = next((root / "train/good").iterdir())
    good.rename(os.fsdecode(os.fsencode(good.parent) + b"/\xff.png"))
    assert "not UTF-8" in refused(read_category, root)


def test_two_masks_for_one_picture_are_an_error_that_names_both(tmp_path):
    for name in ("000_mask.png", "001_mask.png", "001.png", "002_mask.png"):
        save(noise(), tmp_path / name)
    found = mask_files(tmp_path)
    assert {stem: [p.name for p in paths] for stem, paths in found.items()} == {
        "000": ["000_mask.png"],
        "001": ["001_mask.png"],
        "002": ["002_mask.png"],
    }
    save(noise(), tmp_path / "000_mask.bmp")
    with pytest.raises(DataError, match="000_mask.bmp and 000_mask.png may both be the mask of one picture"):
        mask_files(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes")
def test_a_pipe_among_pictures_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    save(noise(), tmp_path / "b.png")
    assert find_white(picture_files(tmp_path)) is None
    with pytest.raises(ValueError, match="a.png is a pipe"):
        upright_shape(tmp_path / "a.png")


def test_a_damaged_picture_of_pillow_is_named_like_a_damaged_file(tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:6000])
    with Image.open(tmp_path / "a.png") as damaged:
        with pytest.raises(DataError, match="a.png cannot be decoded .*; copy it again or leave it out"):
            picture_pixels(damaged)


def deep_png(x):
    "The bytes of a PNG (H, W, 3) of 16 bits a colour, which Pillow cannot write."
    block = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x)
    head = struct.pack(">IIBBBBB", x.shape[1], x.shape[0], 16, 2, 0, 0, 0)
    blocks = (b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(block(*one) for one in blocks)


def test_colours_of_sixteen_bits_are_read_as_such_or_refused(tmp_path, caplog):
    x = np.random.default_rng(0).integers(0, 65536, (40, 48, 3))
    full, dark = tmp_path / "full.png", tmp_path / "dark.png"
    full.write_bytes(deep_png(x))
    dark.write_bytes(deep_png(x // 16))
    assert find_white([full]) == find_white([full, dark]) == 65535
    for white in (None, 65535.0):
        assert (read_image(full, white=white) == x // 256).all()
    assert not caplog.records
    read_image(dark)
    assert "say which is white" in caplog.text
    assert find_white([dark]) == 4095
    opened = Image.open(dark)
    for source in (dark, dark.read_bytes(), opened, opened):
        said = refused(picture_pixels, source, 4095.0)
        assert "has colours of 16 bits" in said and "scale the pictures to 8 bits" in said
    assert whitest([opened]) == 4095, "a picture that is decoded is known for what it was"


def test_pictures_come_in_any_collection_or_stream(tmp_path):
    from collections import deque

    import pandas as pd
    from tqdm import tqdm

    files = [str(save(noise(), tmp_path / f"{i}.png")) for i in range(3)]
    for many in (files, tuple(files), deque(files), np.array(files), pd.Series(files), dict.fromkeys(files).keys()):
        sources = picture_sources(many)
        assert len(sources) == 3 and [*sources] == [*sources] == files
    for stream in (iter(files), tqdm(iter(files), disable=True), tqdm(iter(files), total=3, disable=True)):
        assert list(picture_sources(stream)) == files
    for wrong, said in (
        (np.array("parts"), "holds no pictures"),
        (io.BytesIO(Path(files[0]).read_bytes()), "not a BytesIO; give what is in it"),
        (" ", "is empty; give a folder"),
    ):
        with pytest.raises(ValueError, match=said):
            picture_sources(wrong)


def test_white_is_found_in_pictures_that_are_no_files(tmp_path):
    x = np.random.default_rng(0).integers(0, 4096, (40, 48)).astype(np.uint16)
    file = save(x, tmp_path / "a.png")
    for source in (file, str(file), file.read_bytes(), Image.open(file), x):
        assert whitest([source]) == 4095
        assert picture_pixels(source, 4095.0).max() >= 254
        with pytest.raises(ValueError, match="white is not found in a stream; say which value it is"):
            list(of_known_white(iter([noise(), source])))
    assert len(list(of_known_white(iter([noise(), b"no picture"])))) == 2
    assert whitest([noise(), b"no picture", torch.zeros(3, 40, 40)]) is None


def test_floating_point_pictures_may_overshoot_a_little(tmp_path):
    x = np.random.default_rng(0).random((40, 48)).astype(np.float32)
    x[0, 0] = 1.0001
    file = save(Image.fromarray(x), tmp_path / "a.tif")
    assert find_white([file]) == 1.0 and read_image(file, white=1.0).max() == 255
    assert find_white([save(Image.fromarray(200 * x), tmp_path / "b.tif")]) == 255


def test_the_survey_says_what_the_check_before_a_run_would_refuse(tmp_path):
    root = make_ad(tmp_path / "part")
    shutil.copy(root / "test/broken/000.png", root / "test/broken/000.bmp")
    assert sum("would share a mask; rename one of them" in problem for problem in survey(root).problems) == 1
    loco = tmp_path / "mvtec_loco/mine"
    for name in (*(f"train/good/{i}.png" for i in range(4)), "validation/good/0.png", "test/logical_anomalies/000.png"):
        save(noise(), loco / name)
    mask = np.zeros((40, 50), np.uint8)
    mask[5:9] = 255
    save(mask, loco / "ground_truth/logical_anomalies/000/000.png")
    row = {"defect_name": "a", "pixel_value": 200, "saturation_threshold": 1, "relative_saturation": True}
    write_json(loco / "defects_config.json", [row])
    problems = survey(loco).problems
    assert len(problems) == 1 and "holds the value 255" in problems[0]
    write_json(loco / "defects_config.json", [row | {"pixel_value": 255}])
    assert survey(loco).problems == []


def test_a_png_with_bytes_behind_its_end_is_whole(tmp_path):
    root = make_ad(tmp_path / "part")
    picture = root / "train/good/000.png"
    picture.write_bytes(picture.read_bytes() + b"appended by a camera")
    assert survey(root).problems == []
    picture.write_bytes(picture.read_bytes()[:-40])
    assert any("000.png is cut off" in problem for problem in survey(root).problems)


def test_a_survey_goes_on_after_masks_that_cannot_be_told_apart(tmp_path):
    for i in range(5):
        save(noise(), tmp_path / f"train/good/{i}.png")
    for kind in ("hole", "scratch"):
        save(noise(), tmp_path / f"test/{kind}/000.png")
    for name in ("hole/000_mask.png", "hole/000_mask.bmp", "scratch/001_mask.png"):
        save(noise(channels=1), tmp_path / "ground_truth" / name)
    problems = " ".join(survey(tmp_path).problems)
    assert "may both be the mask of one picture" in problems and "ground_truth/scratch: 1 of 1 pictures" in problems
