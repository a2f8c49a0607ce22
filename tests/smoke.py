"""Fit and predict on a few tiny pictures, with the installed package alone: what must work on every system."""

import tempfile
from pathlib import Path

import numpy as np

TINY = {
    "generator.size": 64,
    "generator.width": 8,
    "generator.steps": 3,
    "generator.batch": 2,
    "generator.n_samples": 4,
    "generator.sample_steps": 2,
    "detector.width": 0.1,
    "detector.steps": 3,
    "evaluation.map_size": 64,
}  # a training of seconds


def main() -> None:
    "Fit, save, load and predict; the loaded model judges as the fitted one."
    from grad_nb.config import override, preset
    from grad_nb.grad import GRAD

    rng = np.random.default_rng(0)
    normal, incoming = (rng.integers(60, 200, (n, 64, 64, 3)).astype(np.uint8) for n in (12, 4))
    model = GRAD(override(preset("demo"), TINY), random_state=0, device="cpu").fit(normal)
    scores = model.score_samples(incoming)
    assert scores.shape == (4,) and np.isfinite(scores).all(), scores
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.grad"
        model.save(path)
        loaded = GRAD.load(path)
    found = loaded.predict(incoming)
    assert np.allclose(loaded.score_samples(incoming), scores, rtol=1e-4, atol=1e-4)
    assert len(found.labels) == 4 and len(found.maps) == 4
    print("fit, save, load and predict work:", np.round(scores, 3).tolist())


if __name__ == "__main__":
    main()
