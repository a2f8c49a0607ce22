"""What must hold for any input: weights, memory banks, geometry, crops."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from shared import PLAIN, pictures, randn, seeded
from torch import nn

from grad_nb.accel import fast, ops, winograd
from grad_nb.accel.crops import affine_grid, crop_lines, grid_sample, recolour, rotation_matrices
from grad_nb.accel.winograd import small_conv, small_conv_back
from grad_nb.beyond import TimestepWeighting
from grad_nb.config import Augmentation, DetectorConfig, EvalConfig
from grad_nb.contrastive import stratified_times
from grad_nb.coords import coord_map, with_coords
from grad_nb.detector import Detector, cell_centre, map_side
from grad_nb.diffusion import alpha_bars, global_noise, q_sample
from grad_nb.evaluation import blur_matrix, pixel_map, upsampling_matrix
from grad_nb.patches import (
    PATCH,
    allowed_flips,
    block_side,
    draw_batch,
    draw_group,
    jitter_factors,
    split_blocks,
)
from grad_nb.regularizers import one_patch_each
from grad_nb.reweighting import (
    MemoryBank,
    effective_sample_size,
    log_density,
    negative_weight,
    noisy_weight,
    tail_weight,
)
from grad_nb.training import Learner, batch_gradients, batches_of

SEED = st.integers(0, 2**32 - 1)
FAST = settings(deadline=None, max_examples=40)
FEW = settings(deadline=None, max_examples=15)


# --- convolutions ---------------------------------------------------------------------------------------------------


@FAST
@given(
    SEED,
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 5),
    st.integers(-1, 5),
    st.booleans(),
)
def test_a_layer_and_its_gradients_are_those_of_torch(seed, n, before, after, k, more_rows, more_columns, last):
    more_columns = more_rows if more_columns < 0 else more_columns
    x = randn(n, before, k + more_rows, k + more_columns, seed=seed)
    x = ops.channels_together(x) if last else x
    weight, bias = randn(after, before, k, k, seed=seed + 1), randn(after, seed=seed + 2)
    layer = nn.Conv2d(before, after, k).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    given = [t.requires_grad_() for t in (x, weight, bias)]
    y, plain = ops.conv(x, layer), nn.functional.conv2d(*given)
    G = randn(*y.shape, seed=seed + 3)
    assert torch.allclose(y, plain)
    for a, b in zip(torch.autograd.grad(y, (x, layer.weight, layer.bias), G), torch.autograd.grad(plain, given, G)):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-10)


MEMORY = {
    "plain": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "pixels first": lambda x: x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
    "a part": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]],
}


@FAST
@given(
    SEED,
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(0, 14),
    st.sampled_from([1, 2]),
    st.sampled_from(sorted(MEMORY)),
)
def test_a_map_as_tiles_is_a_convolution_and_so_are_its_derivatives(seed, n, before, after, r, more, stride, memory):
    side, taps, both = stride * (r + more), stride * r, (stride, stride)
    shapes = (n, before, side, side), (after, before, taps, taps), (after,)
    x, weight, bias = (randn(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes))
    g = randn(n, after, more + 1, more + 1, seed=seed + 3).requires_grad_()
    ours = small_conv(MEMORY[memory](x), weight, bias, both)
    theirs = nn.functional.conv2d(x, weight, bias, stride)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-9)
    found, expected = (torch.autograd.grad(y, (x, weight, bias), g.detach()) for y in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected))
    ours = small_conv_back(MEMORY[memory](g), weight, side, both)
    theirs = nn.functional.conv_transpose2d(g, weight, stride=stride)
    assert ours.shape == theirs.shape == x.shape and torch.allclose(ours, theirs, atol=1e-9)
    found, expected = (torch.autograd.grad(y, (g, weight), x.detach()) for y in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found, expected))


def test_matrices_that_were_made_in_another_mode_serve_in_training():
    for cache in (winograd._matrices, winograd._map_matrices):
        cache.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        small_conv(
            torch.zeros(1, 2, 5, 5, device="cpu"), torch.zeros(3, 2, 3, 3, device="cpu"), torch.zeros(3, device="cpu")
        )
    weight = randn(3, 2, 3, 3).requires_grad_()
    small_conv(randn(1, 2, 5, 5), weight, randn(3)).sum().backward()
    assert weight.grad is not None


# --- weights --------------------------------------------------------------------------------------------------------


@FAST
@given(SEED, st.integers(1, 40), st.integers(1, 40), st.integers(1, 20), st.floats(0.01, 20))
def test_weights_are_positive_sum_to_one_and_carry_no_gradient(seed, n, m, dim, beta):
    z, bank, other = (randn(k, dim, seed=seed + i).requires_grad_() for i, k in enumerate((n, m, 5)))
    for w in (
        noisy_weight(z, bank, beta),
        tail_weight(z, bank, beta),
        negative_weight(z, bank, other, beta),
        negative_weight(z, bank, other, beta, False, False),
    ):
        assert w.shape == (n,) and (w > 0).all() and float(w.sum()) == pytest.approx(1, abs=1e-6)
        assert not w.requires_grad and w.grad_fn is None
        assert 1 - 1e-6 <= float(effective_sample_size(w)) <= n * (1 + 1e-6)


@FAST
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=30), st.floats(0.1, 10))
@example([-1.0, 1.0, 0.0], 5.0)
def test_the_more_a_negative_looks_normal_the_less_it_weighs(cosines, beta):
    "The bank has one direction, so similarity is the cosine to it."
    c = torch.tensor(sorted(cosines), dtype=torch.float64)
    z = (
        torch.stack([c, (1 - c**2).clamp(min=0).sqrt()], 1)
        * torch.linspace(0.5, 3, len(c), dtype=torch.float64)[:, None]
    )
    w = noisy_weight(z, torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(7, 1), beta)
    assert (w.diff() <= 1e-12).all()
    if c[-1] - c[0] > 1e-3:
        assert w[0] > w[-1]


@FAST
@given(SEED, st.floats(0.1, 10))
def test_weights_fall_with_the_density_and_tail_weights_lift_the_rare(seed, beta):
    z, bank = randn(20, 6, seed=seed), randn(30, 6, seed=seed + 1)
    order = log_density(z, bank, beta).argsort()
    assert (noisy_weight(z, bank, beta)[order].diff() <= 1e-12).all()
    crowd = torch.tensor([[1.0, 0.0]], dtype=torch.float64) + 0.01 * randn(20, 2, seed=seed)
    both = torch.cat([crowd, torch.tensor([[0.0, 1.0]], dtype=torch.float64)])
    w = tail_weight(both, both, beta)
    assert int(w.argmax()) == 20


@FAST
@given(SEED, st.floats(0.1, 10))
def test_the_order_of_features_does_not_matter(seed, beta):
    z, pos, neg = randn(12, 6, seed=seed), randn(20, 6, seed=seed + 1), randn(15, 6, seed=seed + 2)
    p, q = torch.randperm(12, generator=seeded(seed)), torch.randperm(20, generator=seeded(seed))
    w = negative_weight(z, pos, neg, beta)
    assert torch.allclose(negative_weight(z[p], pos, neg, beta), w[p], atol=1e-12)
    assert torch.allclose(negative_weight(z, pos[q], neg, beta), w, atol=1e-12)
    assert torch.allclose(negative_weight(z * 7.5, pos * 0.1, neg, beta), w, atol=1e-10), (
        "the length of a feature does not matter"
    )


@FAST
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=30))
def test_the_effective_sample_size_lies_between_one_and_n(values):
    w = torch.tensor(values, dtype=torch.float64)
    assert 1 - 1e-9 <= float(effective_sample_size(w / w.sum())) <= len(values) + 1e-9


def test_the_effective_sample_size_of_equal_weights_is_n_and_of_one_is_one():
    assert (
        float(effective_sample_size(torch.full((8,), 1 / 8))) == 8
        and float(effective_sample_size(torch.eye(5)[2])) == 1
    )


# --- the memory bank ------------------------------------------------------------------------------------------------


@FAST
@given(st.integers(1, 20), st.lists(st.integers(0, 30), max_size=8))
@example(5, [0, 3, 0, 12, 1])
@example(4, [4, 4])
def test_a_bank_keeps_exactly_the_latest_rows(size, pushes):
    bank, pushed = MemoryBank(size), torch.empty(0, 2)
    for n in pushes:
        new = torch.arange(100 * len(pushed), 100 * len(pushed) + n).float()[:, None].repeat(1, 2)
        bank.push(new)
        if n > size:
            new = new[
                torch.linspace(0, n - 1, size).round().long()
            ]  # a step larger than the bank leaves an even share of itself
        pushed = torch.cat([pushed, new])
        assert torch.equal(bank.features[:, :1], pushed[-size:, :1]) if len(pushed) else len(bank.features) == 0
    other = MemoryBank(size)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.features, bank.features)


def test_a_bank_keeps_its_own_copy_without_a_gradient():
    bank, z = MemoryBank(4), torch.ones(3, 2, requires_grad=True)
    bank.push(z * 1)
    assert not bank.features.requires_grad and torch.equal(bank.or_else(torch.zeros(1, 2)), torch.ones(3, 2))
    memory = torch.ones(3, 2)
    bank.push(memory)
    memory.fill_(9)
    assert not (bank.features == 9).any()
    assert torch.equal(MemoryBank(4).or_else(z), z) and not MemoryBank(4).or_else(z).requires_grad
    with pytest.raises(ValueError, match="at least one"):
        MemoryBank(0)


# --- where a cell of the score map lies -----------------------------------------------------------------------------


def open_detector():
    "A narrow detector with positive weights, on positive inputs: no ReLU ever hides a pixel."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        detector = Detector(0.02).double()
    with torch.no_grad():
        for p in detector.parameters():
            p.abs_().add_(1e-3)
    return detector.eval()


@FEW
@given(st.integers(34, 120), st.data())
@example(34, None)
def test_a_cell_sees_its_own_34_pixels_and_no_others(size, data):
    side = map_side(size)
    i, j = (data.draw(st.integers(0, side - 1)) for _ in range(2)) if data else (0, 0)
    x = torch.rand(1, 5, size, size, generator=seeded(0), dtype=torch.float64).requires_grad_()
    out = open_detector()(x)
    assert out.shape == (1, 1, side, side)
    (gradient,) = torch.autograd.grad(out[0, 0, i, j], x)
    seen = (gradient[0] != 0).any(0).nonzero()
    assert seen.min(0).values.tolist() == [4 * i, 4 * j] and seen.max(0).values.tolist() == [4 * i + 33, 4 * j + 33]
    assert len(seen) == 34**2 and cell_centre(i) == (4 * i + 4 * i + 33) / 2


@FAST
@given(st.integers(42, 300), st.floats(0.5, 3), st.data())
def test_an_upsampled_cell_is_brightest_at_its_centre(input_size, zoom, data):
    size, side = round(input_size * zoom), map_side(input_size)
    assume(side >= 3)
    i = data.draw(st.integers(1, side - 2))  # the outermost cells are continued to the border
    brightest = int(upsampling_matrix(side, size, input_size)[:, i].argmax())
    where = (brightest + 0.5) * input_size / size - 0.5  # in pixels of the detector's input
    assert abs(where - cell_centre(i)) <= 0.5 * input_size / size + 1e-9


@FEW
@given(SEED, st.sampled_from([64, 96, 130]))
def test_a_bright_spot_lights_the_pixel_map_where_it_is(seed, size):
    "From end to end: a stand-in detector that adds up each patch; the centre of its map is the centre of the spot."

    class Sum(nn.Module):
        def forward(self, x):
            return nn.functional.avg_pool2d(x[:, :1], PATCH, 4)

    r, c = np.random.default_rng(seed).integers(34, size - 34 + 1, 2) if size > 68 else (32, 32)
    x = torch.zeros(1, 5, size, size)
    x[0, 0, r, c] = 1
    placed = pixel_map(Sum()(x)[:, 0], size, size, blur=False)[0]
    axis = torch.arange(size).float()
    centre = [float((placed.sum(d) * axis).sum() / placed.sum()) for d in (1, 0)]
    inner = size > 68 and all(50 <= p < size - 50 for p in (r, c))
    assert abs(centre[0] - r) <= (2.1 if inner else 12) and abs(centre[1] - c) <= (2.1 if inner else 12)


@FAST
@given(st.integers(1, 60), st.integers(1, 200), st.integers(34, 300), st.sampled_from(["geometry", "stretch"]))
def test_rows_of_the_upsampling_are_means(cells, size, input_size, placement):
    U = upsampling_matrix(cells, size, input_size, placement)
    assert (
        U.shape == (size, cells)
        and (U >= 0).all()
        and torch.allclose(U.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-12)
    )
    assert ((U > 0).sum(1) <= 2).all()


@FAST
@given(st.integers(34, 200), st.floats(0.5, 3), st.data())
def test_by_patch_a_pixel_is_the_mean_of_the_cells_whose_patches_cover_it(input_size, zoom, data):
    size, side = round(input_size * zoom), map_side(input_size)
    p = data.draw(st.integers(0, size - 1))
    at = (p + 0.5) * input_size / size - 0.5
    weight = [max(0.0, 1 - abs(at - cell_centre(i)) / 17) for i in range(side)]
    row = upsampling_matrix(side, size, input_size, "patch")[p]
    if sum(weight) > 1e-3:
        assert np.allclose(row, np.array(weight) / sum(weight), atol=2e-3)
    else:
        assert row.argmax() == np.abs([at - cell_centre(i) for i in range(side)]).argmin() and row.max() > 0.9, (
            "beyond the last patch the nearest cell goes on"
        )
    assert row.sum() == pytest.approx(1) and (row >= 0).all()


def test_by_patch_only_the_map_is_spread_and_the_score_stays():
    S = torch.zeros(1, 16, 16)
    S[0, 5, 7] = 1
    ways = {name: EvalConfig(placement=name) for name in ("geometry", "patch")}
    assert torch.equal(*(pixel_map(S, 96, 96, blur=False, config=c) for c in ways.values()))
    lit = {name: (pixel_map(S, 96, 96, config=c)[0] > 1e-3).sum() for name, c in ways.items()}
    assert lit["patch"] > 2 * lit["geometry"]


@FAST
@given(st.integers(1, 80), st.integers(1, 20), st.floats(0.1, 10))
def test_rows_of_the_blur_are_means(size, taps, sigma):
    B = blur_matrix(size, taps, sigma)
    assert (
        B.shape == (size, size)
        and (B >= 0).all()
        and torch.allclose(B.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-12)
    )


@FAST
@given(SEED, st.integers(1, 12), st.integers(20, 90), st.sampled_from(["geometry", "patch", "stretch"]))
def test_a_pixel_map_commutes_with_flips(seed, cells, size, placement):
    "Exactly without blur; the even blur is half a pixel off, so that a flip moves its result by one pixel."
    input_size, config = 34 + 4 * (cells - 1), EvalConfig(placement=placement)
    S = randn(2, cells, cells, seed=seed).float()
    for axis in (1, 2):
        plain = pixel_map(S, size, input_size, blur=False, config=config)
        assert torch.allclose(
            pixel_map(S.flip(axis), size, input_size, blur=False, config=config), plain.flip(axis), atol=1e-4
        )
        blurred, flipped = (pixel_map(s, size, input_size, config=config) for s in (S, S.flip(axis)))
        assert torch.allclose(
            flipped.narrow(axis, 1, size - 1), blurred.flip(axis).narrow(axis, 0, size - 1), atol=1e-4
        )


@FAST
@given(SEED, st.integers(1, 10), st.integers(20, 70), st.booleans())
def test_a_pixel_map_is_linear_keeps_constants_and_stays_between_extremes(seed, cells, size, blur):
    input_size = 34 + 4 * (cells - 1) + seed % 4
    S, T = randn(1, cells, cells, seed=seed).float(), randn(1, cells, cells, seed=seed + 1).float()
    place = lambda s: pixel_map(s, size, input_size, blur)
    assert torch.allclose(place(2 * S - 3 * T), 2 * place(S) - 3 * place(T), atol=1e-4)
    assert torch.allclose(place(torch.full_like(S, -4.5)), torch.full((1, size, size), -4.5), atol=1e-5)
    assert place(S).min() >= S.min() - 1e-5 and place(S).max() <= S.max() + 1e-5
    assert torch.allclose(place(S.transpose(1, 2)), place(S).transpose(1, 2), atol=1e-5)
    assert torch.allclose(place(torch.cat([S, T]))[1:], place(T), atol=1e-6)


# --- crops ----------------------------------------------------------------------------------------------------------


def places_of(crops, size):
    "First row and column of each crop, from its coordinate channels alone."
    first = (crops[:, 3:, 0, 0].double() + 1) / 2 * (size - 1)
    assert (first - first.round()).abs().max() < 1e-3
    return first.round().long().flip(1).tolist()


@FEW
@given(SEED, st.sampled_from([1, 2, 4]), st.integers(0, 40))
def test_a_crop_has_the_pixels_of_the_place_that_its_coordinates_name(seed, block, more):
    side = block_side(block)
    size = side + more
    data, config = pictures(5, size, seed), DetectorConfig(block=block)
    crops = draw_group(data, config, PLAIN, 0.5, True, seeded(seed))
    assert crops.shape == (128 // block**2, 5, side, side) and crops[:, 3:].abs().max() <= 1 + 1e-6
    coords, known = coord_map(size, size), torch.from_numpy(data).permute(0, 3, 1, 2).float() / 127.5 - 1
    each = len(crops) // 4
    for k, (crop, (r, c)) in enumerate(zip(crops, places_of(crops, size))):
        assert 0 <= r <= size - side and 0 <= c <= size - side
        assert torch.allclose(crop[3:], coords[:, r : r + side, c : c + side], atol=1e-5)
        cut = known[:, :, r : r + side, c : c + side]
        errors = (cut - crop[:3]).abs().flatten(1).max(1).values
        assert errors.min() < 1e-3
        if k % each == 0:
            source = int(errors.argmin())
        assert int(errors.argmin()) == source, "crops come picture by picture, each picture the same number"


@pytest.mark.parametrize("right", [True, False])
def test_every_place_is_drawn_up_to_the_last(right):
    crops = torch.cat(
        [draw_group(pictures(1, 38, 0), DetectorConfig(), PLAIN, 0.0, right, seeded(s)) for s in range(4)]
    )
    assert {tuple(p) for p in places_of(crops, 38)} == {(r, c) for r in range(5) for c in range(5)}


@FEW
@given(SEED, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_a_group_has_its_patches_from_so_many_pictures(seed, block, n):
    side = block_side(block)
    config = DetectorConfig(pictures=n, block=block)
    data = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(side + 3, 1).repeat(side + 3, 2).repeat(3, 3) * 4
    crops = draw_group(data, config, Augmentation(jitter_p=0.0), 0.5, True, seeded(seed))
    patches = split_blocks(crops)
    assert patches.shape == (128, 5, 34, 34)
    colours, counts = ((patches[:, 0].mean((1, 2)) + 1) * 127.5).round().unique(return_counts=True)
    assert 1 <= len(colours) <= n and (counts % (128 // n) == 0).all() and counts.sum() == 128


def test_pictures_are_drawn_from_the_whole_set():
    data = np.arange(60, dtype=np.uint8)[:, None, None, None].repeat(34, 1).repeat(34, 2).repeat(3, 3) * 4
    seen = [
        ((draw_group(data, DetectorConfig(patches=4), PLAIN, 0.0, True, seeded(s))[:, 0, 0, 0] + 1) * 127.5 / 4).round()
        for s in range(150)
    ]
    assert len(torch.cat(seen).unique()) == 60


@FEW
@given(SEED, st.integers(1, 2), st.floats(0, 1), st.booleans())
def test_a_batch_is_its_groups_one_after_the_other(seed, block, p, flip):
    normal, made = pictures(5, 50, seed), pictures(4, 50, seed + 1)
    config, turned = DetectorConfig(patches=16, block=block), Augmentation(flip, flip, 20.0, p)
    batch, generator = draw_batch(normal, [made], config, turned, seeded(seed)).patches, seeded(seed)
    groups = [
        draw_group(data, config, turned, strength, right, generator)
        for data, strength, right in (
            (normal, turned.jitter_normal, True),
            (normal, turned.jitter_normal, False),
            (made, turned.jitter_generated, True),
        )
    ]
    assert torch.equal(batch, torch.cat(groups)) and batch.is_contiguous(memory_format=torch.channels_last)


@FEW
@given(SEED, st.integers(0, 3), st.booleans(), st.sampled_from([1, 2]))
def test_a_batch_has_128_patches_for_every_group(seed, k, wrong, block):
    assume(k or wrong)
    config = DetectorConfig(wrong_coordinates=wrong, block=block)
    batch = draw_batch(
        pictures(3, 44, seed),
        [pictures(2, 44, seed + i) for i in range(k)],
        config,
        Augmentation(),
        seeded(seed),
    )
    assert len(split_blocks(batch.positives)) == 128 and len(split_blocks(batch.negatives)) == 128 * (k + wrong)
    assert batch.positives.abs().max() <= 1 + 1e-6 and batch.negatives.abs().max() <= 1 + 1e-6


def test_a_batch_without_negatives_is_refused_and_the_order_of_groups_is_kept():
    normal, sets = np.full((2, 40, 40, 3), 0, np.uint8), [np.full((2, 40, 40, 3), v, np.uint8) for v in (100, 200)]
    with pytest.raises(ValueError, match="negatives"):
        draw_batch(normal, [], DetectorConfig(wrong_coordinates=False), PLAIN, seeded(0))
    batch = draw_batch(normal, sets, DetectorConfig(), PLAIN, seeded(0))
    colours = ((batch.negatives[:, 0, 0, 0] + 1) * 127.5).round()
    assert colours.tolist() == [0] * 128 + [100] * 128 + [200] * 128
    with pytest.raises(ValueError, match="33"):
        draw_group(np.zeros((1, 33, 33, 3), np.uint8), DetectorConfig(), PLAIN, 0.0, True, seeded(0))


@settings(deadline=None, max_examples=6)
@given(SEED)
def test_wrong_places_have_nothing_to_do_with_the_content(seed):
    size = 80
    ramp = np.broadcast_to(
        np.arange(size, dtype=np.uint8)[None, None, :, None] * 3, (2, size, size, 3)
    ).copy()  # a column names itself
    content = lambda crops: ((crops[:, 0, 0, 0] + 1) * 127.5 / 3).round()
    named = lambda crops: (crops[:, 3, 0, 0] + 1) / 2 * (size - 1)
    config = DetectorConfig(patches=1024)
    right, wrong = (draw_group(ramp, config, PLAIN, 0.0, flag, seeded(seed)) for flag in (True, False))
    assert (content(right) - named(right)).abs().max() < 1e-2
    assert abs(np.corrcoef(content(wrong), named(wrong))[0, 1]) < 0.15  # five standard deviations of 1,024 pairs
    assert torch.equal(content(right), content(wrong)), "the content is drawn in the same way"
    assert len(named(wrong).round().unique()) > 35


@FEW
@given(SEED, st.floats(0.05, 0.5), st.sampled_from([1, 2]))
def test_the_colours_of_a_picture_change_together_and_of_pictures_apart(seed, strength, block):
    data = np.full((1, 50, 50, 3), 128, np.uint8)
    data[..., 1] = 90
    crops = draw_group(data, DetectorConfig(block=block), Augmentation(jitter_p=1.0), strength, True, seeded(seed))
    by_picture = crops[:, :3].unflatten(0, (4, -1)).transpose(1, 2).flatten(2)  # (4, 3, pixels)
    assert by_picture.std(2).max() < 1e-4, "all patches of a picture have one colour"
    assert (by_picture.mean(2).diff(dim=0).abs().max(1).values > 1e-5).all(), "each picture has its own"
    untouched = draw_group(data, DetectorConfig(block=block), Augmentation(jitter_p=0.0), strength, True, seeded(seed))
    assert (((untouched[:, :3] + 1) * 127.5).mean((0, 2, 3)) - torch.tensor([128.0, 90, 128])).abs().max() < 1e-2


def jitter(patches, means, p, strength, seed):
    return recolour(patches, means, jitter_factors(torch.rand(4, len(means), generator=seeded(seed)), p, strength))


@FAST
@given(SEED, st.floats(0, 0.9))
def test_jitter_stays_in_range_and_leaves_black_and_grey_colourless(seed, strength):
    x = torch.rand(6, 3, 4, 4, generator=seeded(seed)) * 2 - 1
    y = jitter(x, x.unflatten(0, (3, 2)).mean((1, 2, 3, 4)), 1.0, strength, seed)
    assert y.abs().max() <= 1 + 1e-6
    grey = x[:, :1].expand(-1, 3, -1, -1)
    made = jitter(grey, torch.zeros(3), 1.0, strength, seed)
    assert torch.allclose(made, made[:, :1].expand_as(made), atol=1e-5)
    assert torch.allclose(jitter(x, torch.zeros(3), 1.0, 0.0, seed), x, atol=1e-5)


def test_no_jitter_turns_colours_over():
    factors = jitter_factors(torch.rand(4, 500, generator=seeded(0)), 1.0, 1.5)
    assert factors.min() >= 0 and factors.max() > 2


def test_jitter_comes_with_its_probability_per_picture():
    x = torch.full((4000, 3, 1, 1), 0.2)
    x[:, 1] = -0.3
    changed = (jitter(x, torch.zeros(4000), 0.2, 0.5, 0) - x).abs().amax((1, 2, 3)) > 1e-4
    assert 0.17 < float(changed.float().mean()) < 0.23


@FAST
@given(SEED, st.booleans(), st.booleans(), st.floats(0, 45))
def test_random_turns_are_rotations_and_the_allowed_flips(seed, vertical, horizontal, angle):
    chances = torch.rand(3, 64, generator=seeded(seed))
    augmentation = Augmentation(vertical_flip=vertical, horizontal_flip=horizontal, rotation=angle)
    A = rotation_matrices(2 * angle * chances[0] - angle, allowed_flips(chances[1:], augmentation)).double()
    assert torch.allclose(A @ A.transpose(1, 2), torch.eye(2, dtype=torch.float64).expand(64, 2, 2), atol=1e-5)
    assert (A[:, 0, 0].abs() >= np.cos(np.deg2rad(angle)) - 1e-5).all()
    assert bool((A[:, 0, 0] < 0).any()) == horizontal and bool((A[:, 1, 1] < 0).any()) == vertical


def test_flips_mirror_the_picture_and_not_the_coordinates():
    data = pictures(1, 34, 0)
    known = torch.from_numpy(data[0]).permute(2, 0, 1).float() / 127.5 - 1
    augmentation = Augmentation(vertical_flip=True, horizontal_flip=True, rotation=0.0, jitter_p=0.0)
    seen = set()
    for seed in range(12):
        for crop in draw_group(data, DetectorConfig(patches=4), augmentation, 0.0, True, seeded(seed)):
            assert torch.allclose(crop[3:], coord_map(34, 34), atol=1e-6)
            fits = [axes for axes in ((), (1,), (2,), (1, 2)) if torch.allclose(crop[:3], known.flip(axes), atol=1e-3)]
            assert len(fits) == 1
            seen.add(fits[0])
    assert len(seen) == 4


def test_a_turn_is_about_the_centre_of_the_picture():
    x = torch.zeros(1, 3, 41, 41)
    x[:, :, 20, 20] = 1
    line, A = crop_lines(torch.tensor([0]), 41, 41), torch.tensor([[[0.0, -1.0], [1.0, 0.0]]])  # a quarter turn
    turned = grid_sample(x, affine_grid(line, line, A))
    assert torch.allclose(turned, x, atol=1e-5)
    spread = torch.rand(1, 3, 41, 41, generator=seeded(0))
    assert torch.allclose(grid_sample(spread, affine_grid(line, line, A)), spread.rot90(1, (2, 3)), atol=1e-4)


@FEW
@given(SEED, st.integers(1, 5), st.integers(1, 3))
def test_patches_of_a_block_come_in_the_order_of_the_detector_s_outputs(seed, block, n):
    x = torch.rand(n, 5, block_side(block), block_side(block), generator=seeded(seed), dtype=torch.float64)
    detector = open_detector()
    with torch.inference_mode():
        dense, single = detector(x).flatten(), detector(split_blocks(x)).flatten()
    assert len(dense) == n * block**2 and torch.allclose(dense, single, rtol=1e-10)
    if len(dense) > 1:
        assert dense.std() > 0


@FAST
@given(SEED, st.integers(1, 4), st.integers(1, 5))
def test_one_patch_of_each_block_is_taken(seed, block, n):
    x = torch.rand(n, 5, block_side(block), block_side(block), generator=seeded(seed))
    chosen, every = one_patch_each(x, seeded(seed)), split_blocks(x).unflatten(0, (n, -1))
    assert chosen.shape == (n, 5, 34, 34)
    for patch, own in zip(chosen, every):
        assert (own == patch).all(3).all(2).all(1).any()


# --- noise and coordinates ------------------------------------------------------------------------------------------


@FAST
@given(SEED, st.integers(0, 999))
def test_the_global_noise_moves_all_pixels_of_a_picture_alike(seed, t):
    x, eps = torch.randn(3, 3, 5, 5, generator=seeded(seed)), torch.randn(3, 3, 5, 5, generator=seeded(seed + 1))
    g = global_noise(3, 0.02, seeded(seed))
    shift = q_sample(x, torch.full((3,), t), eps, alpha_bars(), g) - q_sample(x, torch.full((3,), t), eps, alpha_bars())
    assert torch.allclose(shift, g.expand_as(shift), atol=1e-5) and g.flatten().unique().numel() == 9


@FAST
@given(st.integers(2, 70), st.integers(2, 70))
def test_the_coordinate_map_is_symmetric_and_ends_at_one(height, width):
    coords = coord_map(height, width)
    x, y = coords
    assert coords.shape == (2, height, width) and coords.dtype == torch.float32
    assert torch.allclose(x.flip(1), -x, atol=1e-6) and torch.allclose(y.flip(0), -y, atol=1e-6)
    assert (x[:, 0] == -1).all() and (x[:, -1] == 1).all() and (y[0] == -1).all() and (y[-1] == 1).all()
    assert (x.diff(dim=1) > 0).all() and (y.diff(dim=0) > 0).all()
    assert (x.diff(dim=0) == 0).all() and (y.diff(dim=1) == 0).all()
    other = coord_map(width, height)
    assert torch.equal(other[0].T, y) and torch.equal(other[1].T, x)


def test_coordinates_are_appended_after_the_colours():
    x = torch.randn(2, 3, 4, 6, generator=seeded(0))
    y = with_coords(x)
    assert torch.equal(y[:, :3], x) and torch.equal(y[1, 3:], coord_map(4, 6)) and y.shape == (2, 5, 4, 6)
    own = torch.randn(2, 2, 4, 6, generator=seeded(1))
    assert torch.equal(with_coords(x, own)[:, 3:], own)
    for bad in ((0, 3), (3, 0), (-1, 2)):
        with pytest.raises(ValueError, match="at least one pixel"):
            coord_map(*bad)


@given(st.integers(1, 64), st.integers(1, 1000), st.integers(0, 2**31))
def test_stratified_times_take_one_from_each_stratum(n, T, seed):
    t = stratified_times(n, T, torch.Generator().manual_seed(seed))
    assert t.dtype == torch.int64 and len(t) == n and t.min() >= 0 and t.max() < T and (t.diff() >= 0).all()
    low = torch.arange(n) * T / n
    assert (t >= low.floor() - 1e-3).all() and (t <= (low + T / n).ceil()).all()


def test_a_weighting_of_zero_is_the_plain_mean_and_one_levels_all_times():
    generator = seeded()
    plain, level = TimestepWeighting(1000, 0.0), TimestepWeighting(1000, 1.0)
    true = torch.logspace(-4, 0, 20)
    for _ in range(3000):
        t = torch.randint(1000, (8,), generator=generator)
        loss = true[t * 20 // 1000]
        assert (plain(t, loss) == 1).all()
        weighted = level(t, loss) * loss
    assert torch.allclose(weighted, torch.ones(8), atol=1e-3)
    state = level.state_dict()
    other = TimestepWeighting(1000, 1.0)
    other.load_state_dict(state)
    assert (other(t, loss) == level(t, loss)).all()


# --- batches and micro-batches --------------------------------------------------------------------------------------


def prefetched(seed, block):
    "The batches of a training, eight of them drawn at once as on a GPU."
    config = DetectorConfig(pictures=2, patches=8, block=block)
    learner = SimpleNamespace(config=config, device=torch.device("cpu"), generator=seeded(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "depth", lambda device: 8)
        return batches_of(learner, pictures(5, 44, 1), [pictures(4, 44, 2)], Augmentation(True, True), seeded(seed))


def taken(batches, steps):
    "The batches of some steps."
    found = []
    for i in steps:
        batches.prepare(i)
        found.append(batches.batch().clone())
    return found


@FEW
@given(SEED, st.integers(0, 20), st.integers(0, 20), st.sampled_from([1, 2]))
@example(0, 8, 16, 1)
@example(0, 7, 9, 1)
@example(0, 0, 0, 2)
def test_a_training_killed_and_resumed_at_any_step_sees_the_same_batches(seed, stop, again, block):
    "Killed twice, at any two steps, and each time resumed by batches that have begun otherwise."
    whole = taken(prefetched(seed, block), range(21))
    killed, seen, done = prefetched(seed, block), [], 0
    for end in (*sorted((stop, again)), 21):
        seen += taken(killed, range(done, end))
        resumed, done = prefetched(seed + 1, block), end
        taken(resumed, range(3))
        resumed.load_state_dict(killed.state_dict())
        killed = resumed
    assert len(seen) == 21 and all(torch.equal(a, b) for a, b in zip(seen, whole))


def gradients_in(size, config):
    "Losses, effective sample sizes, gradients and banks of one step of Eq. 7, `size` blocks at a time."
    learner = Learner(config, 10)
    batch = draw_batch(pictures(4, 44), [pictures(3, 44, 1)], config, Augmentation(), learner.generator)
    loss, parts = batch_gradients(learner, batch, size)
    weights = [*learner.detector.parameters(), *learner.decoder.parameters()]
    return [loss, *parts.values(), *(w.grad for w in weights), *(bank.features for bank in learner.banks.values())]


ONE_BY_ONE = dict(width=0.1, pictures=2, sigma_c=0.0, sigma_z=0.0, alpha_2=0.1, bf16=False)


@pytest.mark.parametrize(
    "config",
    [
        DetectorConfig(patches=8, **ONE_BY_ONE),
        DetectorConfig(patches=8, beta_density=5.0, penalise="probability", **ONE_BY_ONE),
        DetectorConfig(patches=16, block=2, **ONE_BY_ONE | dict(alpha_2=0.0)),
        DetectorConfig(patches=16, block=2, **ONE_BY_ONE | dict(alpha_1=0.0)),
    ],
    ids=["all losses", "of the probability", "blocks without Eq. 6", "blocks without Eq. 5"],
)
def test_micro_batches_of_any_size_give_the_gradients_of_the_whole(config):
    whole, n = gradients_in(None, config), 3 * config.patches // config.block**2
    for size in range(1, n + 2):
        for part, right in zip(gradients_in(size, config), whole, strict=True):
            assert (part is None) == (right is None)
            if right is not None:
                assert torch.allclose(part, right, rtol=1e-4, atol=1e-5 * max(1.0, float(right.abs().max()))), size


def test_micro_batches_find_the_size_that_fits_and_begin_anew(monkeypatch):
    config = DetectorConfig(patches=8, **ONE_BY_ONE)
    whole, features, seen = gradients_in(None, config), Detector.features, []

    def small_device(self, x):
        seen.append(len(x))
        if len(x) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return features(self, x)

    monkeypatch.setattr(Detector, "features", small_device)
    monkeypatch.setattr(ops.log, "disabled", True)
    micro_batches = ops.MicroBatches(24)
    found = micro_batches(lambda size: gradients_in(size, config))
    assert micro_batches.size == 3 and seen[:3] == [24, 12, 6] and set(seen[3:]) == {3}
    for part, right in zip(found, whole, strict=True):
        assert right is None or torch.allclose(part, right, rtol=1e-4, atol=1e-5 * max(1.0, float(right.abs().max())))
