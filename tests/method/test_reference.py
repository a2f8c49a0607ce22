"""With every backend removed the method is the same: each operation, both networks, and short trainings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from operations import ALL, CASES, operations
from shared import PLAIN, pictures, randn, random_weights

from grad_nb.accel import fast, ops
from grad_nb.accel.pixelwise import pixelwise_loops
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig
from grad_nb.contrastive import generate, train_patchdiff
from grad_nb.detector import Detector
from grad_nb.evaluation import score_maps
from grad_nb.patchdiff import PatchDiff
from grad_nb.training import train_detector

TOLERANCE = {"cut_patches": 1e-3}  # of what is computed in another order; else 1e-5, or 1e-4 of the largest number


@pytest.fixture
def reference_only(monkeypatch):
    "A function that removes every backend: no compiler, no Triton, plain torch alone."

    def remove():
        monkeypatch.setattr(ops, "_backends", {})
        monkeypatch.setenv("GRAD_NB_ACCEL", "reference")
        for name in ("gpu_layers", "small_map", "small_conv", "unrolled", "cut_patches_fast", "gates"):
            monkeypatch.setattr(fast, name, lambda *args, name=name: pytest.fail(f"{name} is not plain torch"))

    return remove


@pytest.fixture
def answered(monkeypatch):
    "Names of the operations that a backend has answered."
    names = set()

    def told(name, backend):
        def asked(*args, **kwargs):
            found = backend(*args, **kwargs)
            if found is not NotImplemented:
                names.add(name)
            return found

        return asked

    watched = {name: [told(name, backend) for backend in offers] for name, offers in ops._backends.items()}
    monkeypatch.setattr(ops, "_backends", watched)
    return names


def test_every_operation_has_a_parity_test():
    assert operations().keys() == CASES.keys(), "a new operation needs its cases in tests/operations.py"
    assert ops._backends.keys() <= CASES.keys()


@pytest.mark.parametrize("name, case", ALL)
def test_an_operation_is_its_definition(reference_only, name, case):
    found = CASES[name][case]()
    reference_only()
    expected = CASES[name][case]()
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        at_most = TOLERANCE.get(name) or max(1e-5, 1e-4 * float(b.abs().max()))
        assert a.dtype == b.dtype and float((a - b).abs().max()) <= at_most
        assert a.shape == b.shape or not a.any() and not b.any(), "no gradient is a gradient of zeros"


def test_a_cpu_answers_where_it_can(answered):
    for name, i in ALL:
        CASES[name][i]()
    there = {"norm_modulate_silu", "norm_silu"} if pixelwise_loops() else set()
    assert answered >= {"conv", "input_gradient", "cut_patches", "score_batches"} | there


@pytest.mark.parametrize(
    "level, field_of, fourier", [(1, "network", 0), (3, "network", 1), (9, "network", 2), (9, "bottleneck", 0)]
)
def test_a_patchdiff_is_its_definition(reference_only, level, field_of, fourier):
    model = random_weights(PatchDiff(level, 16, fourier, field_of=field_of))
    x, t = randn(2, 5, 17, 20, dtype=torch.float32), torch.tensor([3, 600])

    def values():
        model.zero_grad()
        y = model(x, t)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in model.parameters())]

    found = values()
    reference_only()
    for a, b in zip(found, values()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max().clamp(min=1e-3)))


@pytest.mark.parametrize("side", [34, 46, 64])
@pytest.mark.parametrize("training", [True, False])
def test_a_detector_is_its_definition(reference_only, side, training):
    detector, x = Detector(0.2).train(training), randn(2, 5, side, side, dtype=torch.float32)

    def values():
        detector.zero_grad()
        y = detector(x)
        y.square().mean().backward()
        return [y.detach(), *(p.grad for p in detector.parameters())]

    found = values()
    reference_only()
    for a, b in zip(found, values()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max().clamp(min=1e-3)))


GENERATOR = GeneratorConfig(size=20, width=16, steps=5, batch=4, n_samples=3, sample_steps=4, bf16=False)
DETECTOR = DetectorConfig(width=0.1, steps=5, patches=16, bank_size=32, bf16=False)


def smooth(n, side, seed):
    "Colours from the middle: nothing is clipped."
    return (pictures(n, side, seed) // 6 + np.array([60, 100, 130])).astype(np.uint8)


def test_a_generator_is_trained_and_drawn_alike(reference_only):
    def values():
        model, history = train_patchdiff(smooth(6, 20, 0), 9, GENERATOR, progress=False)
        return history.to_numpy(), generate(model, GENERATOR, progress=False).astype(int)

    losses, drawn = values()
    reference_only()
    plain_losses, plain = values()
    assert np.allclose(losses, plain_losses, rtol=0, atol=1e-5) and np.abs(drawn - plain).max() <= 1


@pytest.mark.parametrize(
    "augmentation", [PLAIN, Augmentation(True, True, jitter_generated=0.1)], ids=["plain", "augmented"]
)
@pytest.mark.parametrize("config", [DETECTOR, replace(DETECTOR, block=2, penalise="probability")], ids=["1", "2"])
def test_a_detector_is_trained_and_scores_alike(reference_only, config, augmentation):
    def values():
        normal, made = smooth(4, 48, 0), [smooth(3, 48, 1)]
        detector, history = train_detector(normal, made, config, augmentation, progress=False)
        return history.to_numpy(), score_maps(detector, smooth(4, 48, 2), 48)

    losses, scores = values()
    reference_only()
    plain_losses, plain_scores = values()
    assert np.allclose(losses, plain_losses, rtol=0, atol=1e-5)
    assert np.allclose(scores, plain_scores, rtol=0, atol=1e-5)
