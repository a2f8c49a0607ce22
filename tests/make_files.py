"""Make the small files of one version that tests/test_grad.py reads: python tests/make_files.py tests/files/0.2.0

Each version that changes a format adds a folder, made by its own code; the older ones stay as they are.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from grad_nb.config import override, preset
from grad_nb.grad import GRAD

SETTINGS = {
    "generator.width": 2,
    "generator.steps": 3,
    "generator.batch": 2,
    "generator.n_samples": 4,
    "generator.sample_steps": 2,
    "generator.size": 64,
    "detector.width": 0.05,
    "detector.steps": 3,
    "evaluation.map_size": 64,
}


def pictures(n: int = 8) -> np.ndarray:
    "Pictures (n, 64, 64, 3) that are the same everywhere."
    y, x = np.mgrid[:64, :64]
    tones = [x * (3 + i) % 256 // 2 + y * (2 + k) % 256 // 2 for i in range(n) for k in range(3)]
    return np.stack(tones, -1).reshape(64, 64, n, 3).transpose(2, 0, 1, 3).astype(np.uint8)


def main(folder: Path) -> None:
    "One generator, one detector, one model, and what that says of the pictures."
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        settings = override(preset("demo"), SETTINGS)
        model = GRAD(settings, device="cpu", progress=False, work_dir=work, explain_patches=1).fit(pictures())
        model.save(folder / "model.grad")
        shutil.copyfile(min(Path(work).glob("generator-*.safetensors")), folder / "generator.safetensors")
        shutil.copyfile(min(Path(work).glob("detector-*.safetensors")), folder / "detector.safetensors")
    scores = model.score_samples(pictures()).tolist()
    (folder / "scores.json").write_text(json.dumps(scores) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
