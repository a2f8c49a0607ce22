"""Judge pictures with an exported model, with ONNX Runtime, NumPy and Pillow alone: no torch, no grad_nb.

    grad_export part.grad --output part.onnx                # once, where grad_nb is installed
    python onnx_only.py part.onnx incoming/*.png            # anywhere: path,score,anomalous on stdout
    python onnx_only.py part.onnx incoming/*.png --maps out # and the map of each picture as a 16-bit PNG

The model takes bytes and does all the rest itself. What is left to do here is to make any picture a square of RGB, as
it was done for training: turned upright, 16 bits made 8, transparent pixels over black, resized with Lanczos. A picture
that cannot be read is named on stderr and passed over; the exit status is then 3.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # what a file may hold, whatever its name says
MIN_SIDE = 34  # pixels: one patch of the detector
onnxruntime.disable_telemetry_events()  # what is judged here is nobody else's business


def grey(im: Image.Image, white: float | None, kind: str | None) -> Image.Image:
    "A picture of mode I, I;16 or F as 8-bit grey; `white` is that of the model's training pictures."
    values = np.asarray(im).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or (im.mode != "F" and values.max() > 65535):
        raise ValueError("its values are neither 8 nor 16 bits")
    if white is None and im.mode == "F":
        raise ValueError("it holds floating-point values; convert it to 8 or 16 bits")
    if white is None and im.mode == "I" and kind != "PNG":  # an older Pillow opens PNG of 16 bits so
        raise ValueError("it holds whole numbers of 32 bits; convert it to 8 or 16 bits")
    transparent = values == im.info.get("transparency", -1)
    if white and np.mean(values > white) > 0.5:
        print(
            f"more than half of a picture is brighter than {white:g}, the white of the training pictures",
            file=sys.stderr,
        )
    values = np.floor(np.minimum(values / (white or 65535), 1) * 255 + 0.5)
    return Image.fromarray(np.where(transparent, 0, values).astype(np.uint8))


def read(path: str, size: int, white: float | None = None) -> np.ndarray:  # (size, size, 3) uint8
    "A picture as the model wants it; errors of many kinds if it is damaged."
    with Image.open(path, formats=FORMATS) as im:
        kind = im.format
        im = ImageOps.exif_transpose(im)
    if min(im.size) < MIN_SIDE:
        raise ValueError(f"it has {im.width}x{im.height} pixels; {MIN_SIDE}x{MIN_SIDE} are needed")
    if im.mode == "F" or im.mode.startswith("I"):
        im = grey(im, white, kind)
    elif im.has_transparency_data and not (im.mode == "RGBA" and not im.getchannel("A").getextrema()[1]):
        rgba = im.convert("RGBA")
        im = Image.new("RGB", im.size)
        im.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(im.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def read_all(paths: list[str], size: int, white: float | None) -> tuple[list[str], list[np.ndarray]]:
    "Those of the pictures that can be read; the others are named on stderr."
    found = []
    pictures = []
    for path in paths:
        try:
            pictures.append(read(path, size, white))
        except Exception as e:
            print(f"{path} cannot be judged ({type(e).__name__}: {e})", file=sys.stderr)  # decoders raise anything
        else:
            found.append(path)
    return found, pictures


def write_map(heat: np.ndarray, path: Path) -> None:
    "A pixel map as 16-bit PNG: thousandths, 32768 = 0."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(np.round(heat * 1000) + 32768, 0, 65535).astype(np.uint16)).save(path)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge pictures with an exported model.")
    parser.add_argument("model", help="file that grad_export wrote")
    parser.add_argument("pictures", nargs="+", help="PNG, JPEG, BMP, TIFF or WebP files")
    parser.add_argument("--batch", type=int, default=8, help="pictures judged together (default: 8)")
    parser.add_argument("--maps", type=Path, help="folder for the maps, as 16-bit PNG: 0 = -32.768, 65535 = 32.767")
    given = parser.parse_args()
    if given.batch < 1:
        parser.error("--batch must be 1 or more")
    if given.maps and len({Path(p).name for p in given.pictures}) < len(given.pictures):
        parser.error("with --maps, no two pictures may have the same name")
    try:
        session = onnxruntime.InferenceSession(given.model, providers=["CPUExecutionProvider"])
    except Exception as e:
        parser.error(f"{given.model} cannot be run ({e})")  # the runtime's errors share no class
    about = session.get_modelmeta().custom_metadata_map
    if about.get("kind") == "grad_nb.TileScorer":
        parser.error(f"{given.model} judges tiles of large pictures; read it with OnnxScorer of grad_nb.use.export")
    if about.get("kind") != "grad_nb.Scorer":
        parser.error(f"{given.model} was not made by grad_export")
    white = json.loads(about.get("white", "null"))
    rows = csv.writer(sys.stdout, lineterminator="\n")
    judged = 0
    rows.writerow(["path", "score", "anomalous"])
    for i in range(0, len(given.pictures), given.batch):
        paths, pictures = read_all(given.pictures[i : i + given.batch], int(about["size"]), white)
        if not paths:
            continue
        scores, labels, maps = session.run(["scores", "labels", "maps"], {"pictures": np.stack(pictures)})
        for path, score, label, heat in zip(paths, scores, labels, maps):
            rows.writerow([path, f"{score:.6f}", bool(label)])
            if given.maps:
                write_map(heat, given.maps / f"{Path(path).name}.png")
        judged += len(paths)
    return 0 if judged == len(given.pictures) else 3


if __name__ == "__main__":
    sys.exit(main())
