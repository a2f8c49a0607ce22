"What tests share."

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from grad_nb.config import Augmentation, override, preset

ROOT = Path(__file__).resolve().parents[1]  # of the repository

PLAIN = Augmentation(rotation=0.0, jitter_p=0.0)  # changes no picture

TINY = (
    "generator.size=64 generator.width=8 generator.steps=6 generator.batch=2 generator.n_samples=4 "
    "generator.sample_steps=3 detector.width=0.1 detector.steps=6 evaluation.map_size=64"
)  # settings of a run that takes seconds

TINY_FIT = {
    "generator.width": 8,
    "generator.steps": 5,
    "generator.batch": 2,
    "generator.n_samples": 4,
    "generator.sample_steps": 2,
    "generator.max_detail_lost": 1.0,
    "detector.width": 0.1,
    "detector.steps": 5,
    "evaluation.map_size": 64,
}  # settings of an estimator that is fitted in seconds


def tiny(**changes):
    "An estimator that is fitted in seconds: `tiny(detector__steps=3)`."
    from grad_nb.grad import GRAD

    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return GRAD(override(preset("demo"), TINY_FIT | settings), device="cpu", progress=False)


def do_all(run) -> dict:
    "Every stage of a run, in this process; its result."
    from grad_nb.runs.stages import detect_stage, evaluate_stage, generate_stage

    for n in run.generator_levels:
        generate_stage(run, n)
    for row in run.levels:
        detect_stage(run, row.level)
    return evaluate_stage(run)


def seeded(seed: int = 0) -> torch.Generator:
    "A generator of torch on the CPU."
    return torch.Generator().manual_seed(seed)


def rng(seed: int = 0) -> np.random.Generator:
    "A generator of NumPy."
    return np.random.default_rng(seed)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    "Standard normal numbers."
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def pictures(n: int, side: int, seed: int = 0) -> np.ndarray:
    "(n, side, side, 3) uint8 of noise."
    return rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    "Whether two networks have the same weights, bit for bit."
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def random_weights(model: nn.Module, scale: float = 0.3, seed: int = 0) -> nn.Module:
    "The same network with random weights, also where it begins with zeros."
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(scale * torch.randn(p.shape, generator=seeded(seed + i), dtype=p.dtype))
    return model


def far(a: Tensor, b: Tensor) -> float:
    "How far a is from b, in lengths of b."
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())
