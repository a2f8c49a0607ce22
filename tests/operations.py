"Every operation behind the door, on inputs where a faster form may answer."

import sys
from functools import partial

import torch
from shared import pictures, randn, random_weights, seeded
from torch import Tensor, nn

import grad_nb.inference.levels  # noqa: F401  offers the fast way to score batches
from grad_nb import evaluation
from grad_nb.accel import ops
from grad_nb.config import Augmentation, DetectorConfig
from grad_nb.detector import Detector
from grad_nb.diffusion import alpha_bars, reverse_step
from grad_nb.patchdiff import Block, PatchDiff, PixelNorm, Pointwise
from grad_nb.patches import block_side, cut_patches, draw_crops


def operations():
    "name → operation, of the door and of every module of ours that is imported."
    found = {}
    for name, module in [*sys.modules.items()]:
        if name.startswith("grad_nb."):
            for value in vars(module).values():
                if callable(value) and hasattr(value, "reference"):
                    found[value.reference.__name__] = value
    return found


def small(*shape: int, seed: int = 0) -> Tensor:
    "(…) float32, channels together if it has some."
    x = randn(*shape, seed=seed, dtype=torch.float32)
    return ops.channels_together(x) if x.ndim == 4 else x


def made(layer: nn.Module, seed: int = 0) -> nn.Module:
    "A layer with random weights, in training."
    return random_weights(layer, 0.3, seed).train()


def with_gradients(operation, *inputs, weights=(), **settings) -> list[Tensor]:
    "What an operation gives, and the gradients for its inputs and weights."
    inputs = [x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    y = operation(*inputs, **settings)
    outputs = list(y) if isinstance(y, tuple) else [y]
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad] + list(weights)
    total = sum((out.float() * small(*out.shape, seed=50 + i)).sum() for i, out in enumerate(outputs))
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    return [*(out.detach() for out in outputs), *(g if g is not None else torch.zeros(()) for g in gradients)]


def convolution(operation, before, after, kernel, stride, padding, side):
    layer = made(nn.Conv2d(before, after, kernel, stride, padding))
    return with_gradients(operation, small(3, before, side, side), layer, weights=layer.parameters())


CONVOLUTIONS = [  # channels before and after, kernel, stride, padding, side
    (32, 8, 3, 1, 0, 6),  # tiles in training
    (32, 8, 4, 2, 0, 16),
    (5, 16, 4, 2, 0, 34),
    (16, 8, 3, 1, 0, 3),  # few outputs
    (16, 8, 1, 1, 0, 4),  # a pixel's layer
]


def pointwise():
    layer = made(Pointwise(16, 24))
    return with_gradients(ops.pointwise, small(2, 16, 5, 7), layer, weights=layer.parameters())


def norm_modulate_silu(layer):
    norm = made(PixelNorm(16), 3)
    tables = small(2, 16, seed=4), small(2, 16, seed=5)
    weights = [*layer.parameters(), *norm.parameters()]
    y = partial(ops.norm_modulate_silu, layer=layer, norm=norm)
    named = lambda x, scale, shift: y(x, scale=scale, shift=shift)
    return with_gradients(named, small(2, 16, 7, 6), *tables, weights=weights)


def norm_silu():
    norm = made(PixelNorm(16), 3)
    return with_gradients(ops.norm_silu, small(2, 16, 7, 6), norm, weights=norm.parameters())


def merge_skip(height, width):
    up, merge = made(Pointwise(32, 64)), made(Pointwise(32, 16), 2)
    x, h = small(2, 16, height, width), small(2, 32, -(-height // 2), -(-width // 2), seed=1)
    return with_gradients(ops.merge_skip, x, h, up, merge, weights=[*up.parameters(), *merge.parameters()])


def blocks_to_noise(kernel):
    blocks = nn.ModuleList([made(Block(16, 8, kernel)), made(Block(16, 8, 1), 9)])
    norm, out = made(PixelNorm(16), 20), made(Pointwise(16, 3), 22)
    weights = [p for part in (blocks, norm, out) for p in part.parameters()]
    inputs = small(2, 16, 6, 9), small(2, 8, seed=2), blocks, norm, out
    return with_gradients(ops.blocks_to_noise, *inputs, weights=weights)


def input_gradient(side):
    detector = made(Detector(0.1))
    return with_gradients(lambda: ops.input_gradient(detector, small(2, 5, side, side)), weights=detector.parameters())


def both():
    detector = made(Detector(0.1))
    x, y = small(2, 5, 34, 34), small(2, 5, 34, 34, seed=1)
    return with_gradients(partial(ops.both, detector.features), x, y, weights=detector.body.parameters())


def for_sampling(level):
    model = ops.place(random_weights(PatchDiff(level, 64).eval(), 0.05), "cpu")
    with torch.no_grad():
        return [ops.for_sampling(model, True)(small(2, 5, 12, 14), torch.tensor([3, 700]))]


def step_back(t, clip):
    alpha_bar = alpha_bars(100)
    x, eps, z = (3 * randn(2, 3, 5, 7, seed=k, dtype=torch.float32) for k in range(3))
    later = alpha_bar[t - 1] if t else torch.ones((), dtype=torch.float64)
    return [reverse_step(x, eps, z if t else 0.0, alpha_bar[t], later, clip)]


def patches(augmentation, block):
    "Colours from the middle, so that nothing is clipped."
    tinted = torch.tensor([150, 120, 105]) + torch.from_numpy(pictures(4, 56) // 6).float() - 21
    data = tinted.round().to(torch.uint8)
    config = DetectorConfig(patches=64, block=block)
    groups = [draw_crops(data, config, augmentation, 0.12, right, seeded(3)) for right in (True, False)]
    return [cut_patches(groups, block_side(block))]


def scores():
    detectors = [random_weights(Detector(0.1), 0.1, seed).eval() for seed in (0, 1)]
    parts = evaluation.score_batches(detectors, pictures(5, 64), (64, 48), "cpu", 2)
    return [torch.from_numpy(level) for part in parts for level in part]


AUGMENTATIONS = (
    Augmentation(rotation=0.0, jitter_p=0.0),
    Augmentation(True, True, rotation=0.0, jitter_p=0.0),
    Augmentation(rotation=45.0, jitter_p=0.0),
    Augmentation(rotation=0.0, jitter_p=1.0),
    Augmentation(True, True, rotation=10.0, jitter_p=0.7),
)

# name → what is compared: functions that call the operation and give tensors.
CASES = {
    "conv": [partial(convolution, ops.conv, *shape) for shape in (*CONVOLUTIONS, (5, 16, 3, 1, 1, 12))],
    "conv_relu": [partial(convolution, ops.conv_relu, *shape) for shape in CONVOLUTIONS],
    "pointwise": [pointwise],
    "norm_modulate_silu": [
        lambda: norm_modulate_silu(made(Pointwise(16, 16))),
        lambda: norm_modulate_silu(made(nn.Conv2d(16, 16, 3, padding=1))),
    ],
    "norm_silu": [norm_silu],
    "merge_skip": [partial(merge_skip, 6, 8), partial(merge_skip, 7, 5)],
    "blocks_to_noise": [partial(blocks_to_noise, 1), partial(blocks_to_noise, 3)],
    "input_gradient": [partial(input_gradient, 34), partial(input_gradient, 41)],
    "both": [both],
    "for_sampling": [partial(for_sampling, 5), partial(for_sampling, 9)],
    "reverse_step": [partial(step_back, t, clip) for t in (0, 1, 60, 99) for clip in (True, False)],
    "cut_patches": [partial(patches, way, block) for way in AUGMENTATIONS for block in (1, 2)],
    "score_batches": [scores],
}
ALL = [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
