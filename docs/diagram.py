"""Draw nbs/images/method.png: the method in one picture, with pictures that nbs/00_one_sitting.ipynb has kept.

python docs/diagram.py
"""

import json
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from grad_nb.plots import method_diagram, save_figure

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"


def stored(cell: str) -> np.ndarray:
    "A figure that `00_one_sitting` has kept, by the id of its cell."
    cells = json.loads((NOTEBOOKS / "00_one_sitting.ipynb").read_text(encoding="utf-8"))["cells"]
    (output,) = next(c for c in cells if c["id"] == cell)["outputs"]
    return np.array(Image.open(BytesIO(b64decode(output["data"]["image/jpeg"]))).convert("RGB"))


def runs(blank: np.ndarray) -> list[np.ndarray]:
    "Indices of lines that are not blank, in runs of more than 50."
    parts = np.split(np.arange(len(blank)), np.where(np.diff(blank))[0] + 1)
    return [part for part in parts if not blank[part[0]] and len(part) > 50]


def rows_of(figure: np.ndarray) -> list[list[np.ndarray]]:
    "The pictures of a figure, row by row; titles are no pictures, for they are low."
    light = figure.min(2)  # of a line between two pictures; JPEG leaves it nearly white
    bands = [light[part] for part in runs(np.percentile(light[:, 150:], 5, axis=1) > 225)]
    places = [runs(np.percentile(band, 5, axis=0) > 225) for band in bands]
    rows = [figure[part] for part in runs(np.percentile(light[:, 150:], 5, axis=1) > 225)]
    return [[row[3:-3, part[3:-3]] for part in found] for row, found in zip(rows, places)]


def main():
    real, level_5, level_17 = (row[-10:] for row in rows_of(stored("sit044")))
    kinds = [row[-10:] for row in rows_of(stored("sit047"))]
    pictures, maps = rows_of(stored("sit071"))
    patches = {
        "+ normal, right place": [kinds[0][3], kinds[1][3]],
        "− normal, wrong place": [kinds[2][1], kinds[3][1]],
        "− generated": [kinds[4][5], kinds[4][2]],
        "− generated ": [kinds[5][5], kinds[5][7]],
    }
    figure = method_diagram([real[0], real[3]], {5: level_5[3:5], 17: level_17[4:6]}, patches, [pictures[4], maps[4]])
    print(save_figure(figure, NOTEBOOKS / "images" / "method.png", dpi=118))


if __name__ == "__main__":
    main()
