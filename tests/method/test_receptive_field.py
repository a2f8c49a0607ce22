"""A PatchDiff of level n sees n x n pixels: not one more, not one less."""

import numpy as np
import pytest
import torch
from shared import seeded
from torch import nn

from grad_nb.accel import ops
from grad_nb.config import GeneratorConfig
from grad_nb.coords import with_coords
from grad_nb.patchdiff import PatchDiff, PixelNorm, bounding_box, check_level, gradient_support, new_patchdiff

LEVELS = [1, 3, 5, 9, 13, 17, 21]


def window(level, pixel):
    "First and last pixel that an output pixel sees along one axis; from level 5 on it is centred on even pixels."
    centre = pixel if level < 5 else 2 * (pixel // 2)
    return centre - level // 2, centre + level // 2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("row, column", [(24, 24), (24, 25), (25, 24), (25, 25), (22, 27)])
def test_the_support_is_exactly_n_by_n(level, row, column):
    support = gradient_support(PatchDiff(level, 4), 50, row, column, seeded())
    top, bottom, left, right = bounding_box(support)
    assert (top, bottom) == window(level, row) and (left, right) == window(level, column)
    assert support.sum() == level**2 and (bottom - top + 1, right - left + 1) == (level, level)
    assert top <= row <= bottom and left <= column <= right


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size, row, column", [(30, 0, 0), (30, 29, 29), (31, 30, 30), (31, 0, 30), (30, 1, 28)])
def test_at_the_border_the_window_is_clipped(level, size, row, column):
    support = gradient_support(PatchDiff(level, 4), size, row, column, seeded())
    expected = np.zeros((size, size), bool)
    (top, bottom), (left, right) = window(level, row), window(level, column)
    expected[max(top, 0) : bottom + 1, max(left, 0) : right + 1] = True
    assert (support == expected).all()


@pytest.mark.parametrize("level", LEVELS)
def test_no_pixel_outside_the_window_changes_the_output(level):
    "The same without gradients: replace all that should not be seen, and then one corner of what should."
    model, row, column = PatchDiff(level, 4).double().eval(), 25, 24
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(1), dtype=p.dtype) * 0.4)
    x, t = with_coords(torch.randn(1, 3, 50, 50, generator=seeded(2), dtype=torch.float64)), torch.tensor([300])
    inside = torch.zeros(50, 50, dtype=torch.bool)
    (top, bottom), (left, right) = window(level, row), window(level, column)
    inside[top : bottom + 1, left : right + 1] = True
    other = torch.where(inside, x, torch.randn(x.shape, generator=seeded(3), dtype=x.dtype))
    with torch.inference_mode():
        before, after = model(x, t)[0, :, row, column], model(other, t)[0, :, row, column]
    assert torch.allclose(before, after, atol=1e-12, rtol=0)
    for r, c in ((top, left), (top, right), (bottom, left), (bottom, right)):
        corner = x.clone()
        corner[0, :3, r, c] += 100
        with torch.inference_mode():
            assert not torch.allclose(model(corner, t)[0, :, row, column], before, atol=1e-11, rtol=0)


@pytest.mark.parametrize("fourier", [0, 4])
def test_fourier_features_do_not_widen_the_view(fourier):
    assert gradient_support(PatchDiff(9, 4, fourier), 40, 20, 20, seeded()).sum() == 81


def test_the_model_that_is_trained_has_the_same_view():
    assert gradient_support(new_patchdiff(13, GeneratorConfig(width=4)), 40, 21, 20, seeded()).sum() == 169


@pytest.mark.parametrize("level", [5, 13])
def test_group_norm_sees_the_whole_picture(level):
    broken = PatchDiff(level, 8, norm=lambda channels: nn.GroupNorm(4, channels))
    assert gradient_support(broken, 40, 20, 20, seeded()).all()


def test_batch_norm_in_training_would_see_the_whole_picture_but_pixel_norm_does_not():
    x = torch.randn(2, 8, 6, 6, generator=seeded()).requires_grad_()
    for norm, seen in ((PixelNorm(8), 1), (nn.BatchNorm2d(8).train(), 72)):
        (gradient,) = torch.autograd.grad(norm(x)[0, 0, 2, 3].square(), x)
        assert int((gradient != 0).any(1).sum()) == seen


@pytest.mark.parametrize("level", [2, 4, 6, 7, 8, 11, 15, 19, 0, -1, -3, -5])
def test_a_level_that_cannot_be_is_refused(level):
    with pytest.raises(ValueError, match=f"not {level}$"):
        PatchDiff(level, 4)
    with pytest.raises(ValueError):
        check_level(level)


def test_deeper_levels_have_one_block_more_each():
    assert [check_level(level) for level in LEVELS] == [0, 0, 0, 1, 2, 3, 4]
    assert [len(PatchDiff(level, 4).bottleneck) for level in LEVELS] == [0, 0, 0, 1, 2, 3, 4]


def test_the_view_is_the_same_at_every_time():
    "Time is seen by every pixel alike; it must not open the window."
    model = PatchDiff(9, 4)
    gradient_support(model, 8, 4, 4, seeded())  # random weights, float64
    x = with_coords(torch.randn(1, 3, 30, 30, generator=seeded(2), dtype=torch.float64)).requires_grad_()
    for t in (0, 999):
        (gradient,) = torch.autograd.grad(model(x, torch.tensor([t]))[0, :, 14, 14].square().sum(), x)
        assert bounding_box((gradient[0] != 0).any(0).numpy()) == (10, 18, 10, 18)


def test_bounding_box_names_first_and_last():
    support = np.zeros((7, 9), bool)
    support[2, 3] = support[5, 8] = True
    assert bounding_box(support) == (2, 5, 3, 8)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("row, column", [(40, 40), (40, 41), (41, 41)])
def test_with_a_mirrored_decoder_the_network_sees_2n_minus_1(level, row, column):
    support = gradient_support(PatchDiff(level, 4, field_of="bottleneck"), 82, row, column, seeded())
    top, bottom, left, right = bounding_box(support)
    assert support.sum() == (2 * level - 1) ** 2 and (bottom - top, right - left) == (2 * level - 2, 2 * level - 2)
    assert top <= row <= bottom and left <= column <= right


@pytest.mark.parametrize("level", [5, 9, 17])
def test_with_a_mirrored_decoder_the_bottleneck_sees_n(level):
    model = PatchDiff(level, 4, field_of="bottleneck").double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=seeded(), dtype=p.dtype) * 0.3)
    x = with_coords(torch.randn(1, 3, 40, 40, generator=seeded(1), dtype=torch.float64)).requires_grad_()
    h, time = model.inputs(x, torch.tensor([500]))
    h = ops.conv(ops.conv(h, model.stem), model.down)
    for block in model.bottleneck:
        h = block(h, time)
    (gradient,) = torch.autograd.grad(h[0, :, 10, 10].square().sum(), x)
    assert bounding_box((gradient[0] != 0).any(0).numpy()) == (20 - level // 2, 20 + level // 2) * 2


def test_the_two_readings_differ_in_the_decoder_alone():
    plain, mirrored = PatchDiff(13, 4), PatchDiff(13, 4, field_of="bottleneck")
    assert len(plain.bottleneck) == len(mirrored.bottleneck) == len(mirrored.decoder) == 2 and len(plain.decoder) == 0
    assert new_patchdiff(5, GeneratorConfig(width=4, field_of="bottleneck")).field_of == "bottleneck"
