"""Whole files, and what damage makes of them."""

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    "A file with bytes changed, cut off, doubled, left out, or a number made extreme; a third of it hits the head."
    data = bytearray(whole)
    for _ in range(rng.integers(1, 6)):
        end = max(1, len(data) if rng.random() < 0.6 else min(len(data), 200))
        at = int(rng.integers(end))
        match rng.integers(7):
            case 0 | 1:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 2:
                data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(8)))]) if data else b"x"
            case 3:
                data = data[: at + 1]
            case 4:
                data[at:at] = data[at : at + int(rng.integers(1, 60))]
            case 5:
                del data[at : at + int(rng.integers(1, 60))]
            case 6:
                data[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"][
                    rng.integers(4)
                ]
        if not data:
            data = bytearray(b"\0")
    return bytes(data)


def whole_pictures() -> dict[str, bytes]:
    "Whole pictures of many kinds, small so that damage hits what matters."
    exif = Image.Exif()
    exif[0x0112] = 6
    smooth = Image.fromarray(np.random.default_rng(5).integers(0, 256, (5, 6, 3), np.uint8)).resize((60, 50))
    deep = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 200)
    kinds = {
        "png": (smooth, dict(format="PNG", exif=exif)),
        "palette": (smooth.quantize(9), dict(format="PNG", transparency=1)),
        "rgba": (smooth.convert("RGBA"), dict(format="PNG")),
        "png16": (deep, dict(format="PNG")),
        "one bit": (smooth.convert("1"), dict(format="PNG")),
        "jpeg": (smooth, dict(format="JPEG", exif=exif)),
        "progressive": (smooth, dict(format="JPEG", progressive=True)),
        "cmyk": (smooth.convert("CMYK"), dict(format="JPEG")),
        "bmp": (smooth, dict(format="BMP")),
        "bmp palette": (smooth.quantize(9), dict(format="BMP")),
        "tiff": (smooth, dict(format="TIFF")),
        "lzw": (smooth, dict(format="TIFF", compression="tiff_lzw")),
        "deflate": (deep, dict(format="TIFF", compression="tiff_adobe_deflate")),
        "tiff jpeg": (smooth, dict(format="TIFF", compression="jpeg")),
        "webp": (smooth, dict(format="WEBP", exif=exif)),
        "webp lossless": (smooth.convert("RGBA"), dict(format="WEBP", lossless=True)),
        "webp animated": (smooth, dict(format="WEBP", save_all=True, append_images=[smooth.rotate(90)])),
        "png animated": (smooth, dict(format="PNG", save_all=True, append_images=[smooth.rotate(90)])),
        "grey": (smooth.convert("L"), dict(format="PNG", transparency=7)),
        "grey and alpha": (smooth.convert("LA"), dict(format="PNG")),
        "jpeg grey": (smooth.convert("L"), dict(format="JPEG")),
        "jpeg restarts": (smooth, dict(format="JPEG", quality=95, subsampling=0, restart_marker_blocks=2)),
        "bmp one bit": (smooth.convert("1"), dict(format="BMP")),
        "bmp alpha": (smooth.convert("RGBA"), dict(format="BMP")),
        "packbits": (smooth, dict(format="TIFF", compression="packbits")),
        "fax": (smooth.convert("1"), dict(format="TIFF", compression="group4")),
        "tiff palette": (smooth.quantize(9), dict(format="TIFF")),
        "tiff cmyk": (smooth.convert("CMYK"), dict(format="TIFF", compression="tiff_lzw")),
        "tiff alpha": (smooth.convert("RGBA"), dict(format="TIFF", compression="tiff_adobe_deflate")),
        "big tiff": (smooth, dict(format="TIFF", big_tiff=True)),
        "pages": (smooth, dict(format="TIFF", save_all=True, append_images=[smooth.rotate(90)])),
    }
    made = {}
    for name, (picture, options) in kinds.items():
        stream = io.BytesIO()
        picture.save(stream, **options)
        made[name] = stream.getvalue()
    return made


JUNK = [
    None,
    "x",
    "",
    [],
    {},
    [1],
    True,
    -1,
    0,
    1,
    0.5,
    1e300,
    10**18,
    -(10**18),
    {"a": 1},
    "1",
    3e9,
    "\x00",
    [[]],
    2**64,
]


def places(value: Any, where: tuple = ()) -> Iterator[tuple]:
    "The places of all values in nested data."
    yield where
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*where, key))


def other_data(meta: Any, rng: np.random.Generator) -> Any:
    "Plain data with a value or two replaced, left out, doubled, or made much larger."
    meta = json.loads(json.dumps(meta))
    for _ in range(rng.integers(1, 3)):
        found = [where for where in places(meta) if where]
        where = found[rng.integers(len(found))]
        inside = meta
        for key in where[:-1]:
            inside = inside[key]
        old = inside[where[-1]]
        match rng.integers(6):
            case 0 | 1 | 2:
                inside[where[-1]] = JUNK[rng.integers(len(JUNK))]
            case 3:
                inside.pop(where[-1])
            case 4:
                inside[where[-1]] = [old, old]
            case 5:
                number = isinstance(old, (int, float)) and not isinstance(old, bool)
                inside[where[-1]] = old * 10 ** int(rng.integers(1, 12)) if number else str(old)
    return meta


def other_tensors(tensors: dict[str, Tensor], rng: np.random.Generator) -> dict[str, Tensor]:
    "Tensors of which one is absent, renamed, of another shape or type, or holds what is no number."
    made = {name: tensor.clone() for name, tensor in tensors.items()}
    name = sorted(made)[rng.integers(len(made))]
    old = made.pop(name)
    match rng.integers(6):
        case 0:
            pass
        case 1:
            made[f"{name}x"] = old
        case 2:
            made[name] = old.reshape(-1)[: max(0, old.numel() - 1)]
        case 3:
            made[name] = old.to(torch.float64 if old.dtype != torch.float64 else torch.int16)
        case 4:
            made[name] = torch.full_like(old, float("nan")) if old.is_floating_point() else old[:0]
        case 5:
            made[name] = old.unsqueeze(0) * (float("inf") if old.is_floating_point() else 1)
    return made
