"""Whole files, and what damage makes of them."""

import io

import numpy as np
from PIL import Image


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
    }
    made = {}
    for name, (picture, options) in kinds.items():
        stream = io.BytesIO()
        picture.save(stream, **options)
        made[name] = stream.getvalue()
    return made
