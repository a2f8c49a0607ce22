"""Judge pictures with an exported model, with ONNX Runtime, NumPy and Pillow alone: no torch, no grad_nb.

    grad_export part.grad --output part.onnx                # once, where grad_nb is installed
    python onnx_only.py part.onnx incoming/*.png            # anywhere: path,score,anomalous on stdout
    python onnx_only.py part.onnx incoming/*.png --maps out # and the map of each picture as a 16-bit PNG

The model takes bytes and does all the rest itself; what is left to do here is to make any picture a square of RGB, as it was done for
training: turned upright, transparent pixels over black, shrunk with Lanczos.
"""
import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read(path: str, size: int) -> np.ndarray:  # (size, size, 3) uint8
    "A picture of 8 bits as the model wants it; `ValueError` for one of 16 bits or in floating point."
    with Image.open(path) as im:
        im = ImageOps.exif_transpose(im)
    if im.mode[0] in "IF": raise ValueError(f"{path} has pixels of mode {im.mode}; convert it to 8 bits")
    if im.has_transparency_data:
        rgba, im = im.convert("RGBA"), Image.new("RGB", im.size)
        im.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(im.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge pictures with an exported model.")
    parser.add_argument("model", help="file that grad_export wrote")
    parser.add_argument("pictures", nargs="+", help="PNG, JPEG, BMP, TIFF or WebP files")
    parser.add_argument("--batch", type=int, default=8, help="pictures judged together (default: 8)")
    parser.add_argument("--maps", type=Path, help="folder for the maps, as 16-bit PNG: 0 = -32.768, 65535 = 32.767")
    given = parser.parse_args()
    session = onnxruntime.InferenceSession(given.model, providers=["CPUExecutionProvider"])
    size = int(session.get_modelmeta().custom_metadata_map["size"])
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["path", "score", "anomalous"])
    for i in range(0, len(given.pictures), given.batch):
        paths = given.pictures[i : i + given.batch]
        scores, labels, maps = session.run(None, {"pictures": np.stack([read(path, size) for path in paths])})
        for path, score, label, heat in zip(paths, scores, labels, maps):
            rows.writerow([path, f"{score:.6f}", bool(label)])
            if given.maps:
                given.maps.mkdir(parents=True, exist_ok=True)
                levels = np.clip(np.round(heat * 1000) + 32768, 0, 65535).astype(np.uint16)
                Image.fromarray(levels).save(given.maps / f"{Path(path).name}.png")


if __name__ == "__main__": main()
