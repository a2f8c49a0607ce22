"""The method against independent formulas: diffusers' schedulers, equations in NumPy, finite differences."""

import math
import warnings
from itertools import product

import numpy as np
import pytest
import torch
from shared import randn, seeded
from torch import nn

from grad_nb.accel import fast, ops
from grad_nb.accel.fast import unrolled
from grad_nb.accel.winograd import small_map
from grad_nb.beyond import timesteps
from grad_nb.config import DetectorConfig
from grad_nb.contrastive import denoising_loss
from grad_nb.coords import coord_map, with_coords
from grad_nb.detector import TABLE_8, Decoder, Detector, map_side
from grad_nb.diffusion import (
    alpha_bars,
    global_noise,
    posterior_variance,
    q_sample,
    reverse_step,
    sample,
    to_bytes,
    to_model,
)
from grad_nb.patchdiff import PatchDiff, time_embedding
from grad_nb.patches import PATCH, STRIDE, Batch, split_blocks
from grad_nb.regularizers import feature_loss, gradient_penalty, noised
from grad_nb.reweighting import log_density, negative_weight, noisy_weight, reweighted_bce, tail_weight
from grad_nb.training import Learner, batch_gradients

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")


def library():
    "diffusers; a test that needs it is skipped without it."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def scheduler(clip, float64=True):
    "The DDPM scheduler of diffusers with the paper's schedule, its constants in float64 if asked."
    ddpm = library().DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=clip,
        variance_type="fixed_small",
        prediction_type="epsilon",
    )
    if float64:
        ddpm.betas = torch.from_numpy(np.linspace(1e-4, 0.02, 1000))
        ddpm.alphas = 1 - ddpm.betas
        ddpm.alphas_cumprod = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
        ddpm.one = torch.tensor(1.0, dtype=torch.float64)
    return ddpm


# --- the schedule and the reverse process ---------------------------------------------------------------------------


def test_the_schedule_is_that_of_diffusers():
    ours = alpha_bars(1000)
    assert ours.dtype == torch.float64 and ours.shape == (1000,)
    assert torch.allclose(ours, scheduler(False, float64=False).alphas_cumprod.double(), atol=1e-6, rtol=0)
    assert torch.allclose(ours, scheduler(False).alphas_cumprod, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("t", [0, 1, 487, 999])
def test_the_posterior_variance_is_that_of_diffusers(t):
    a = alpha_bars(1000).tolist()
    ours = posterior_variance(a[t], a[t - 1] if t else 1.0)
    assert ours == pytest.approx(float(scheduler(False)._get_variance(t)), rel=1e-9, abs=1e-19)
    assert ours == pytest.approx(float(scheduler(False, float64=False)._get_variance(t)), abs=1e-6)
    beta = np.linspace(1e-4, 0.02, 1000)[t]  # DDPM, Eq. 7, in the printed form
    assert ours == pytest.approx((1 - (a[t - 1] if t else 1.0)) / (1 - a[t]) * beta, rel=1e-9, abs=1e-19)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("t", [0, 1, 487, 999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_reverse_step_is_that_of_diffusers(t, clip, dtype):
    x, eps, a = (
        randn(2, 3, 6, 5, seed=1, dtype=dtype),
        randn(2, 3, 6, 5, seed=2, dtype=dtype),
        alpha_bars(1000).tolist(),
    )
    theirs = scheduler(clip).step(eps, t, x, generator=seeded(3)).prev_sample
    z = torch.randn(x.shape, generator=seeded(3), dtype=dtype) if t else 0.0
    ours = reverse_step(x, eps, z, a[t], a[t - 1] if t else 1.0, clip)
    assert ours.dtype == dtype
    assert torch.allclose(
        ours,
        theirs.to(dtype),
        atol=1e-9 if dtype == torch.float64 else 1e-6 * float(theirs.abs().max().clamp(min=1)),
        rtol=0,
    )
    if t == 999:  # the clip must matter there: x_0 is far outside [-1, 1]
        assert not torch.allclose(ours, reverse_step(x, eps, z, a[t], a[t - 1], not clip), atol=1e-3)


@pytest.mark.parametrize("t", [1, 487, 999])
def test_an_unclipped_reverse_step_is_line_4_of_algorithm_2(t):
    x, eps, z, beta = (
        randn(1, 3, 4, 4, seed=1),
        randn(1, 3, 4, 4, seed=2),
        randn(1, 3, 4, 4, seed=3),
        np.linspace(1e-4, 0.02, 1000),
    )
    a = np.cumprod(1 - beta)
    sigma = math.sqrt((1 - a[t - 1]) / (1 - a[t]) * beta[t])
    printed = (x - beta[t] / math.sqrt(1 - a[t]) * eps) / math.sqrt(1 - beta[t]) + sigma * z
    assert torch.allclose(reverse_step(x, eps, z, a[t], a[t - 1], clip=False), printed, atol=1e-9, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 5, 25, 50, 100, 250, 999, 1000])
def test_the_stride_visits_the_times_of_the_linspace_spacing(steps):
    ddpm = library().DDPMScheduler(num_train_timesteps=1000, timestep_spacing="linspace")
    ddpm.set_timesteps(steps)
    ours = timesteps(1000, steps)
    if steps > 1:
        assert ours == ddpm.timesteps.tolist() and ours[-1] == 0
    assert ours[0] == 999 and len(ours) == steps and all(a > b for a, b in zip(ours, ours[1:]))


@pytest.mark.parametrize(
    "T, steps, spacing", [(1, 1, 2.0), (1000, 30, 1.5), (1000, 30, 2.0), (1000, 1000, 3.0), (7, 7, 1.5), (2, 1, 2.0)]
)
def test_strides_that_shorten(T, steps, spacing):
    times = timesteps(T, steps, spacing)
    assert times[0] == T - 1 and len(times) <= steps and all(a > b for a, b in zip(times, times[1:]))
    if steps > 2:
        strides = [a - b for a, b in zip(times, times[1:])]
        assert times[-1] == 0 and all(a >= b - 1 for a, b in zip(strides, strides[1:])) and strides[0] > (T - 1) / steps
    with pytest.raises(ValueError, match="spacing"):
        timesteps(T, steps, 0.5)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_taken_is_refused(steps):
    with pytest.raises(ValueError, match="1000"):
        timesteps(1000, steps)


MU, S = 0.3, 0.2  # the pictures of the analytic tests: every number is N(MU, S^2)


def analytic(alpha_bar):
    "The perfect denoiser of N(MU, S^2), in closed form."

    def model(x, t):
        a = alpha_bar[int(t[0])]
        return math.sqrt(1 - a) * (x[:, :3] - math.sqrt(a) * MU) / (a * S**2 + 1 - a)

    return model


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [1000, 50, 7])
def test_the_whole_chain_is_that_of_diffusers(steps, clip):
    alpha_bar = alpha_bars(1000).tolist()
    model = analytic(alpha_bar)
    ours = sample(model, 4, 8, alpha_bar, seeded(5), timesteps(1000, steps), clip)
    ddpm, generator = scheduler(clip), seeded(5)
    ddpm.set_timesteps(timesteps=timesteps(1000, steps))
    x = torch.randn(4, 3, 8, 8, generator=generator)
    for t in ddpm.timesteps:
        x = ddpm.step(model(x, t[None]), t, x, generator=generator).prev_sample.float()
    assert torch.allclose(ours, x, atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [1000, 100, 20])
def test_a_perfect_denoiser_brings_back_the_mean_and_the_spread(steps):
    alpha_bar = alpha_bars(1000).tolist()
    model, mean, var = analytic(alpha_bar), 0.0, 1.0  # of x_T
    times = timesteps(1000, steps)
    for t, s in zip(times, times[1:] + [None]):  # the chain is linear: follow its mean and variance exactly
        a, b = alpha_bar[t], 1.0 if s is None else alpha_bar[s]
        k, gain = a / b, (1 - a) / (a * S**2 + 1 - a)  # line 4 of Algorithm 2 with alpha = k
        scale = (1 - (1 - k) / (1 - a) * gain) / math.sqrt(k)
        mean = scale * mean + (1 - k) / (1 - a) * gain * math.sqrt(a) * MU / math.sqrt(k)
        var = scale**2 * var + (0.0 if s is None else (1 - b) / (1 - a) * (1 - k))
    made = sample(model, 24, 32, alpha_bar, seeded(0), times, clip=False)  # 73,728 numbers
    assert float(made.mean()) == pytest.approx(mean, abs=4e-3) and float(made.std()) == pytest.approx(
        math.sqrt(var), abs=4e-3
    )
    assert mean == pytest.approx(MU, abs=3e-3)
    if steps == 1000:
        assert math.sqrt(var) == pytest.approx(S, abs=5e-3)


def test_the_sampler_shows_the_model_the_coordinates_and_the_times():
    seen = []

    def model(x, t):
        seen.append(t.clone())
        assert x.shape == (3, 5, 9, 9) and torch.equal(x[1, 3:], coord_map(9, 9)) and t.dtype == torch.int64
        return torch.zeros_like(x[:, :3])

    sample(model, 3, 9, alpha_bars(1000).tolist(), seeded(0), timesteps(1000, 5))
    assert [t.tolist() for t in seen] == [[t] * 3 for t in (999, 749, 500, 250, 0)]


def test_the_clipped_sampler_stays_inside():
    made = sample(
        lambda x, t: torch.randn(x[:, :3].shape, generator=seeded(int(t[0]))),
        2,
        8,
        alpha_bars(1000).tolist(),
        seeded(0),
        timesteps(1000, 20),
    )
    assert made.abs().max() <= 1


def test_the_forward_process_is_line_6_of_algorithm_1():
    x, eps, g, a = (
        randn(3, 3, 4, 4, seed=1),
        randn(3, 3, 4, 4, seed=2),
        randn(3, 3, 1, 1, seed=3),
        np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)),
    )
    t = [0, 487, 999]
    by_hand = np.stack(
        [np.sqrt(a[k]) * x[i].numpy() + np.sqrt(1 - a[k]) * eps[i].numpy() + g[i].numpy() for i, k in enumerate(t)]
    )
    assert np.allclose(q_sample(x, torch.tensor(t), eps, alpha_bars(1000), g), by_hand, atol=1e-12)
    theirs = scheduler(False).add_noise(x, eps, torch.tensor(t))
    assert torch.allclose(q_sample(x, torch.tensor(t), eps, alpha_bars(1000)), theirs, atol=1e-9)


def test_the_global_noise_has_its_standard_deviation():
    g = global_noise(20_000, 0.02, seeded(0))
    assert (
        g.shape == (20_000, 3, 1, 1) and float(g.std()) == pytest.approx(0.02, rel=0.02) and abs(float(g.mean())) < 5e-4
    )
    assert abs(np.corrcoef(g[:, 0, 0, 0], g[:, 1, 0, 0])[0, 1]) < 0.03, "a vector with independent colours"


def test_the_loss_asks_for_eps_1_and_not_for_the_global_noise():
    "A model that knows x_0 and t can name eps_1 + eps_g / sqrt(1 - a); the loss is the mean square of the last part."
    x_0, alpha_bar, coords = torch.zeros(2000, 3, 2, 2), torch.full((10,), 0.75, dtype=torch.float64), coord_map(2, 2)
    knows = lambda x, t: x[:, :3] / (1 - 0.75) ** 0.5
    assert float(denoising_loss(knows, x_0, coords, alpha_bar, 0.02, seeded(0))) == pytest.approx(
        0.02**2 / 0.25, rel=0.06
    )
    assert float(denoising_loss(knows, x_0, coords, alpha_bar, 0.0, seeded(0))) < 1e-9
    assert float(
        denoising_loss(lambda x, t: torch.zeros_like(x[:, :3]), x_0, coords, alpha_bar, 0.02, seeded(0))
    ) == pytest.approx(1, rel=0.03)


def test_training_times_are_uniform_over_all_steps():
    seen = []

    def model(x, t):
        seen.append(t)
        return x[:, :3]

    denoising_loss(model, torch.zeros(60_000, 3, 1, 1), coord_map(1, 1), alpha_bars(1000), 0.0, seeded(0))
    counts = torch.bincount(seen[0], minlength=1000)
    assert len(counts) == 1000 and counts.min() > 0 and counts.max() < 110  # 60 expected, standard deviation 7.7


def test_the_time_embedding_is_that_of_diffusers():
    library()
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0, 1, 487, 999])
    assert torch.allclose(
        time_embedding(t, 32), get_timestep_embedding(t, 32, flip_sin_to_cos=False, downscale_freq_shift=0), atol=1e-4
    )


def test_bytes_survive_the_range_of_the_models():
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(1, 1, 1, 3)
    assert (
        to_model(every).min() == -1
        and to_model(every).max() == 1
        and (to_bytes(to_model(every)) == every.numpy()).all()
    )


# --- equations 1 to 4 -----------------------------------------------------------------------------------------------


def density_np(z, bank, beta):
    "The denominators of Eq. 1 and 2, as printed."
    out = []
    for a in z:
        total = 0.0
        for b in bank:
            total += np.exp(beta * np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))
        out.append(total)
    return np.array(out)


def features(n, seed, positive=True):
    z = np.random.default_rng(seed).normal(0.3, 1, (n, 16))
    return np.maximum(z, 0) if positive else z  # after a ReLU, as in the detector


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("positive", [True, False])
def test_equations_1_and_2_are_the_printed_ones(beta, positive):
    z, bank = features(20, 1, positive), features(31, 2, positive)
    w = 1 / density_np(z, bank, beta)
    T = torch.from_numpy
    assert np.allclose(log_density(T(z), T(bank), beta), -np.log(w), rtol=1e-12, atol=1e-12)
    assert np.allclose(noisy_weight(T(z), T(bank), beta), w / w.sum(), rtol=1e-10)
    assert np.allclose(tail_weight(T(z), T(bank), beta), w / w.sum(), rtol=1e-10)
    assert np.allclose(noisy_weight(T(z).float(), T(bank).float(), beta), w / w.sum(), rtol=1e-4)


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_equations_3_and_4_are_the_printed_ones(beta):
    z_pos, z_neg, bank_pos, bank_neg = (features(n, s) for n, s in ((9, 1), (14, 2), (25, 3), (40, 4)))
    s_pos, s_neg = np.random.default_rng(5).normal(0, 3, 9), np.random.default_rng(6).normal(0, 3, 14)
    f = lambda s: 1 / (1 + np.exp(-s))
    w_pos, w_tail, w_noisy = (
        1 / density_np(z_pos, bank_pos, beta),
        1 / density_np(z_neg, bank_neg, beta),
        1 / density_np(z_neg, bank_pos, beta),
    )
    lam_pos, lam_neg = w_pos.sum(), (w_tail * w_noisy).sum()
    by_hand = -(w_pos * np.log(1 - f(s_pos))).sum() / lam_pos - (w_tail * w_noisy * np.log(f(s_neg))).sum() / lam_neg
    T = torch.from_numpy
    w_neg = negative_weight(T(z_neg), T(bank_pos), T(bank_neg), beta)
    assert np.allclose(w_neg, w_tail * w_noisy / lam_neg, rtol=1e-10)
    loss = reweighted_bce(T(s_pos), T(s_neg), tail_weight(T(z_pos), T(bank_pos), beta), w_neg)
    assert float(loss) == pytest.approx(by_hand, rel=1e-10)


def test_each_switch_leaves_just_its_own_factor():
    z, pos, neg = (torch.from_numpy(features(n, s)) for n, s in ((14, 2), (25, 3), (40, 4)))
    assert torch.allclose(negative_weight(z, pos, neg, 2.0, noisy=True, tail=False), noisy_weight(z, pos, 2.0))
    assert torch.allclose(negative_weight(z, pos, neg, 2.0, noisy=False, tail=True), tail_weight(z, neg, 2.0))
    assert torch.allclose(negative_weight(z, pos, neg, 2.0, noisy=False, tail=False), torch.full((14,), 1 / 14))
    assert not torch.allclose(noisy_weight(z, pos, 2.0), tail_weight(z, neg, 2.0), rtol=1e-3)


@pytest.mark.parametrize("beta", [50.0, 5000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_never_overflow(beta, dtype):
    z, bank = torch.from_numpy(features(20, 1)).to(dtype), torch.from_numpy(features(31, 2)).to(dtype)
    z[3], bank[5] = 0, 0  # a dead feature has no direction
    z[7] = bank[7]  # a negative that is a normal
    for w in (noisy_weight(z, bank, beta), tail_weight(z, bank, beta), negative_weight(z, bank, z, beta)):
        assert w.dtype in (torch.float32, torch.float64) and w.isfinite().all() and (w >= 0).all()
        assert float(w.sum()) == pytest.approx(1, abs=1e-5)
    assert noisy_weight(z, bank, beta)[7] < noisy_weight(z, bank, beta).max() * 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_are_weighed_in_full_precision(dtype):
    z, bank = torch.from_numpy(features(20, 1)).to(dtype), torch.from_numpy(features(31, 2)).to(dtype)
    w = 1 / density_np(z.double().numpy(), bank.double().numpy(), 2.0)
    assert np.allclose(noisy_weight(z, bank, 2.0), w / w.sum(), rtol=1e-5)


def test_a_feature_without_direction_is_similar_to_nothing():
    assert float(log_density(torch.zeros(1, 4), torch.eye(4), 3.0)) == pytest.approx(math.log(4), rel=1e-6)


def test_the_loss_survives_extreme_logits():
    one = torch.ones(1)
    for s in (1e4, 1e30):
        assert float(reweighted_bce(torch.tensor([s]), torch.tensor([-s]), one, one)) == pytest.approx(2 * s)
    assert float(reweighted_bce(torch.tensor([-1e4]), torch.tensor([1e4]), one, one)) == 0
    assert float(
        reweighted_bce(torch.zeros(3), torch.zeros(5), torch.full((3,), 1 / 3), torch.full((5,), 0.2))
    ) == pytest.approx(2 * math.log(2))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_sharpness_that_is_not_positive_is_refused(beta):
    with pytest.raises(ValueError, match="beta_density"):
        noisy_weight(torch.ones(2, 4), torch.ones(3, 4), beta)


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="empty"):
        noisy_weight(torch.ones(2, 4), torch.empty(0, 4))


# --- equations 5 to 7 -----------------------------------------------------------------------------------------------


def small_detector(seed=0, width=0.05):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detector(width)
        return detector, Decoder(detector.head.in_channels)


def test_equation_5_is_the_mean_over_patches_of_the_squared_error():
    detector, decoder = small_detector()
    detector.double()
    decoder.double()
    x = randn(3, 5, 42, 42)  # blocks of 3 x 3 patches
    total = []
    for block, i, j in product(x, range(3), range(3)):
        c = block[:, 4 * i : 4 * i + 34, 4 * j : 4 * j + 34]
        with torch.no_grad():
            back = decoder.layers(detector.features(c[None])).reshape(5, 34, 34)
        total.append(float(((back - c) ** 2).sum()) / c.numel())
    for patches in (x, split_blocks(x)):  # the decoded patch is cast to float32: hence the tolerance
        assert feature_loss(detector, decoder, patches, 0.0, 0.0).item() == pytest.approx(np.mean(total), rel=1e-5)


def test_equation_5_disturbs_the_patches_and_the_features_but_not_the_target():
    seen = {}

    class Spy(nn.Module):
        def features(self, x):
            seen["x"] = x
            return torch.zeros(len(x), 4, 1, 1)

    def decoder(z):
        seen["z"] = z
        return torch.zeros(len(z), 5, 34, 34)

    x = torch.full((400, 5, 34, 34), 0.5)
    loss = feature_loss(Spy(), decoder, x, 0.1, 0.3, seeded(0))
    assert float((seen["x"] - x).std()) == pytest.approx(0.1, rel=0.01) and float(seen["z"].std()) == pytest.approx(
        0.3, rel=0.1
    )
    assert float(loss) == pytest.approx(0.25, rel=1e-6), "measured against the clean patch"
    with pytest.raises(ValueError, match="generator"):
        feature_loss(Spy(), decoder, x, 0.1, 0.0)


def test_noise_is_standard_normal_times_sigma():
    x = torch.zeros(50_000)
    assert float(noised(x, 0.1, seeded(0)).std()) == pytest.approx(0.1, rel=0.02) and torch.equal(
        noised(x, 0.0, seeded(0)), x
    )


@pytest.mark.parametrize("of", ["logit", "probability"])
def test_equation_6_agrees_with_finite_differences(of):
    detector, _ = small_detector()
    detector.double()
    for layer in detector.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.bias, 0, 0.3, generator=seeded(4))
    with torch.no_grad():
        detector.head.weight.mul_(0.2)
    x, h = randn(2, 5, 34, 34, seed=3), 1e-6
    f = (lambda v: detector(v).flatten()) if of == "logit" else (lambda v: detector(v).flatten().sigmoid())
    norms = []
    with torch.no_grad():
        for patch in x:
            basis = h * torch.eye(patch.numel(), dtype=torch.float64).view(-1, *patch.shape)
            up = torch.cat([f(patch + step) for step in basis.split(250)])
            down = torch.cat([f(patch - step) for step in basis.split(250)])
            norms.append(float((((up - down) / (2 * h)) ** 2).sum()))
    assert float(gradient_penalty(detector, x, of)) == pytest.approx(np.mean(norms), rel=1e-4)
    assert np.mean(norms) > 1e-6


def test_the_gradient_penalty_can_be_learned_from_and_refuses_what_it_cannot_do():
    detector, _ = small_detector()
    patches = randn(4, 5, 34, 34, dtype=torch.float32)
    gradient_penalty(detector, patches).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in detector.named_parameters() if n.endswith("weight")
    )
    assert not patches.requires_grad, "the caller's patches stay as they were"
    with pytest.raises(ValueError, match="38"):
        gradient_penalty(detector, torch.zeros(1, 5, 38, 38))
    with pytest.raises(ValueError, match="odds"):
        gradient_penalty(detector, patches, "odds")


def batch_of(positives, negatives):
    "Eight positives and 24 negatives, each kind of its own seed."
    kinds = [randn(n, 5, 34, 34, seed=seed, dtype=torch.float32) for n, seed in ((8, positives), (24, negatives))]
    return Batch(torch.cat(kinds), 8)


def test_equation_7_of_a_first_step_is_the_sum_of_its_printed_parts():
    config = DetectorConfig(
        width=0.05,
        steps=5,
        patches=8,
        sigma_c=0.0,
        sigma_z=0.0,
        beta_density=2.0,
        alpha_1=0.7,
        alpha_2=0.03,
        bf16=False,
    )
    learner = Learner(config, 5)
    batch = batch_of(1, 2)
    loss, parts = batch_gradients(learner, batch)
    D, x = learner.detector, torch.cat([batch.positives, batch.negatives])
    with torch.no_grad():
        z, s = D.features(x).flatten(1).double().numpy(), D(x).flatten().double().numpy()
    f = 1 / (1 + np.exp(-s))
    w_pos, w_neg = 1 / density_np(z[:8], z[:8], 2.0), 1 / density_np(z[8:], z[:8], 2.0) / density_np(z[8:], z[8:], 2.0)
    rbce = -(w_pos * np.log(1 - f[:8])).sum() / w_pos.sum() - (w_neg * np.log(f[8:])).sum() / w_neg.sum()
    with torch.no_grad():
        feat = float(((learner.decoder(D.features(x)) - x) ** 2).mean())
    grads = []
    for patch in batch.positives:
        patch = patch[None].clone().requires_grad_()
        D(patch).sum().backward()
        grads.append(float((patch.grad**2).sum()))
    assert float(parts["rbce"]) == pytest.approx(rbce, rel=1e-4)
    assert float(parts["feat"]) == pytest.approx(feat, rel=1e-4) and float(parts["grad"]) == pytest.approx(
        np.mean(grads), rel=1e-4
    )
    assert float(loss) == pytest.approx(rbce + 0.7 * feat + 0.03 * np.mean(grads), rel=1e-4)
    assert min(rbce, 0.7 * feat, 0.03 * np.mean(grads)) > 1e-4 * float(loss), "every part counts in this test"


def test_the_second_step_is_weighed_by_the_banks_of_the_first():
    config = DetectorConfig(width=0.05, steps=5, patches=8, alpha_1=0.0, alpha_2=0.0, beta_density=3.0, bf16=False)
    learner = Learner(config, 5)
    first, second = batch_of(1, 2), batch_of(3, 4)
    batch_gradients(learner, first)
    with torch.no_grad():
        z = {
            name: learner.detector.features(x).flatten(1).double().numpy()
            for name, x in dict(
                pos=first.positives, neg=first.negatives, z_pos=second.positives, z_neg=second.negatives
            ).items()
        }
        s_pos, s_neg = (learner.detector(x).flatten().double().numpy() for x in (second.positives, second.negatives))
    w_pos = 1 / density_np(z["z_pos"], z["pos"], 3.0)
    w_neg = 1 / density_np(z["z_neg"], z["pos"], 3.0) / density_np(z["z_neg"], z["neg"], 3.0)
    expected = (w_pos * np.log1p(np.exp(s_pos))).sum() / w_pos.sum() + (
        w_neg * np.log1p(np.exp(-s_neg))
    ).sum() / w_neg.sum()
    loss, parts = batch_gradients(learner, second)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(parts["ess_neg"]) == pytest.approx(w_neg.sum() ** 2 / (w_neg**2).sum() / 24, rel=1e-4)


# --- the networks of the tables -------------------------------------------------------------------------------------


def test_the_networks_have_the_sizes_of_tables_8_and_9():
    layers = (
        (5, 64, 4),
        (64, 128, 4),
        (128, 256, 3),
        (256, 512, 3),
        (512, 256, 3),
        (256, 256, 1),
        (256, 256, 1),
        (256, 1, 1),
    )
    by_hand = sum(k * k * i * o + o for i, o, k in layers)
    count = lambda net: sum(p.numel() for p in net.parameters())
    detector = Detector()
    assert count(detector) == by_hand == 2_923_457
    assert count(Decoder()) == 3 * (256 * 256 + 256) + 256 * 5780 + 5780 == 1_682_836
    convolutions = [m for m in detector.modules() if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions] == list(layers)
    assert [m.stride for m in convolutions] == [(2, 2)] * 2 + [(1, 1)] * 6 and all(
        m.padding == (0, 0) for m in convolutions
    )
    assert sum(isinstance(m, nn.ReLU) for m in detector.modules()) == 7 and len(TABLE_8) == 7


def test_patches_and_strides_follow_from_table_8():
    seen, step = 1, 1
    for _, size, stride in TABLE_8:
        seen, step = seen + (size - 1) * step, step * stride
    assert (seen, step) == (PATCH, STRIDE) == (34, 4)


@pytest.mark.parametrize("height, width", [(34, 34), (35, 37), (38, 34), (50, 63), (64, 64), (71, 40)])
def test_a_dense_map_is_what_single_patches_give(height, width):
    detector, _ = small_detector(1, 0.1)
    detector.double()
    x = randn(2, 5, height, width)
    with torch.inference_mode():
        dense = detector(x)
        assert dense.shape == (2, 1, map_side(height), map_side(width))
        for i in range(dense.shape[2]):
            for j in range(dense.shape[3]):
                one = detector(x[:, :, 4 * i : 4 * i + 34, 4 * j : 4 * j + 34])
                assert one.shape == (2, 1, 1, 1) and torch.allclose(
                    one[:, 0, 0, 0], dense[:, 0, i, j], atol=1e-12, rtol=1e-10
                )


def test_a_picture_smaller_than_a_patch_has_no_map():
    with pytest.raises(ValueError, match="33"):
        map_side(33)
    assert map_side(34) == 1


def test_the_decoder_gives_one_patch_for_each_cell_row_by_row():
    _, decoder = small_detector()
    z = randn(2, decoder.layers[0].in_channels, 3, 4, dtype=torch.float32)
    with torch.no_grad():
        made = decoder(z)
    assert made.shape == (2 * 3 * 4, 5, 34, 34)
    with torch.no_grad():
        one = decoder(z[1:2, :, 2:3, 1:2])
    assert torch.allclose(made[12 + 2 * 4 + 1], one[0], atol=1e-5)


def test_a_fresh_patchdiff_takes_any_size_and_forgets_nothing_of_the_coordinates():
    model = PatchDiff(5, 8).double().eval()
    x = randn(1, 3, 21, 30)
    y = model(with_coords(x), torch.tensor([3]))
    assert y.shape == (1, 3, 21, 30)
    moved = model(with_coords(x, coord_map(21, 30).flip(-1)), torch.tensor([3]))
    assert not torch.allclose(y, moved, atol=1e-3), "position must matter"


# --- small maps as tiles --------------------------------------------------------------------------------------------


def step_gradients(words="auto", **config):
    "The losses of one step with all terms, and the gradients of every parameter."
    usual = {"width": 0.2, "pictures": 2, "patches": 16, "alpha_1": 1.0, "alpha_2": 0.5, "bf16": False}
    config = DetectorConfig(**usual | config)
    learner, side = Learner(config, 10, seed=3), PATCH + STRIDE * (config.block - 1)
    first = 16 // config.block**2
    blocks = ops.channels_together(randn(3 * first, 5, side, side, seed=5, dtype=torch.float32).clamp(-1, 1))
    with ops.use(words):
        loss, parts = batch_gradients(learner, Batch(blocks, first))
    return {"loss": loss, **parts}, [p.grad for net in (learner.detector, learner.decoder) for p in net.parameters()]


@pytest.mark.parametrize(
    "config", [{}, {"block": 2}, {"penalise": "probability"}, {"width": 0.5}, {"width": 0.5, "block": 2}], ids=str
)
def test_a_step_by_tiles_is_the_step_of_plain_convolutions(config):
    ours, g = step_gradients(**config)
    theirs, h = step_gradients("reference", **config)
    assert len(g) == len(h) and float(ours["feat"]) > 0 and float(ours["grad"]) > 0
    for name in ours:
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5), name
    for a, b in zip(g, h):
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def small(*shape):
    return randn(*shape, dtype=torch.float32)


def by_tiles(x, layer):
    "Whether a convolution was done as tiles: what they give lies pixel by pixel in memory."
    return ops.conv(x, layer).permute(2, 3, 0, 1).is_contiguous()


def test_tiles_are_taken_in_training_on_a_cpu_in_full_precision_alone():
    layer, x = nn.Conv2d(3, 4, 3), small(2, 3, 6, 6)
    assert by_tiles(x, layer) and not by_tiles(x, layer.eval())
    layer.train()
    assert not by_tiles(small(2, 3, 6, 7), layer) and not by_tiles(small(2, 3, 11, 11), layer)
    with ops.use("reference"):
        assert not by_tiles(x, layer)
    with torch.no_grad():
        assert not by_tiles(x, layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_tiles(x, layer) and ops.conv(x, layer).dtype == torch.bfloat16
    assert not by_tiles(x.bfloat16(), nn.Conv2d(3, 4, 3).bfloat16())
    assert ops.conv(x, nn.Conv2d(3, 4, 3, bias=False)).shape == (2, 4, 4, 4)
    assert ops.conv(x, nn.Conv2d(3, 4, (3, 1))).shape == (2, 4, 4, 6)
    second = nn.Conv2d(32, 4, 4, 2)
    assert by_tiles(small(2, 32, 16, 16), second) and by_tiles(small(2, 32, 20, 20), second)
    for shape in ((17, 17), (16, 18), (22, 22)):
        assert not by_tiles(small(2, 32, *shape), second)
    assert not by_tiles(small(2, 16, 16, 16), nn.Conv2d(16, 4, 4, 2))
    assert not by_tiles(small(2, 32, 16, 16), nn.Conv2d(32, 4, 3, 2))
    assert not by_tiles(small(2, 32, 9, 9), nn.Conv2d(32, 4, 3, 3))
    with pytest.raises(RuntimeError, match="Kernel size"):
        Detector(0.1)(small(2, 5, 30, 30))
    assert ops.conv(x[0], layer).shape == (4, 4, 4)
    assert ops.conv(small(1, 3, 10, 10), nn.Conv2d(3, 4, 9)).shape == (1, 4, 2, 2)
    assert ops.conv(x.to("meta"), layer.to("meta")).shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    "size, kernel, stride",
    [(1, 1, 1), (6, 1, 1), (3, 3, 1), (5, 3, 1), (6, 3, 1), (4, (3, 2), 1), (4, 4, 2), (8, 4, 2)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_mixed_precision_on_a_cpu_is_the_same_layer(monkeypatch, size, kernel, stride, bias):
    layer, x, found, taken = nn.Conv2d(8, 4, kernel, stride, bias=bias), small(3, 8, size, size), [], []
    monkeypatch.setattr(fast, "unrolled", lambda *args: taken.append(1) or unrolled(*args))
    for forward in (ops.conv, ops.conv.reference):
        with torch.autocast("cpu", torch.bfloat16):
            y = forward(x.requires_grad_(), layer)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *layer.parameters()])])
    assert len(taken) == (stride == 1 and kernel != 1 and size <= 5) and found[0][0].dtype == torch.bfloat16
    for a, b in zip(*found):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.allclose(a.float(), b.float(), rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_mixed_precision_on_a_cpu_refuses_what_a_convolution_refuses():
    with torch.autocast("cpu", torch.bfloat16):
        for size in (30, 32, 33):
            with pytest.raises(RuntimeError, match="Kernel size"):
                Detector(0.1)(small(2, 5, size, size))
        assert ops.conv(small(8, 6, 6), nn.Conv2d(8, 4, 1)).shape == (4, 6, 6)
        assert ops.conv(small(3, 5, 5), nn.Conv2d(3, 4, 3)).shape == (4, 3, 3)


def test_a_step_in_mixed_precision_is_near_the_step_in_full():
    (ours, g), (theirs, h) = (step_gradients(bf16=bf16, width=0.5) for bf16 in (True, False))
    for name in ours:
        assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=0.02), name
    for a, b in zip(g, h):
        assert float((a - b).norm()) < 0.2 * float(b.norm())


def test_the_penalty_s_gradients_are_those_of_plain_convolutions(monkeypatch):
    detector, x = Detector(0.2).double(), randn(3, 5, 34, 34)
    ours = ops.input_gradient(detector, x)
    monkeypatch.setattr(fast, "small_map", lambda *args: False)
    theirs = ops.input_gradient(detector, x)
    assert torch.allclose(ours, theirs, atol=1e-10) and not torch.equal(ours, theirs)
    with torch.autocast("cpu", torch.bfloat16):
        assert not small_map(x, detector.body[4].weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_densities_are_exact_in_mixed_precision(dtype):
    "Densities of real features differ in the third digit; bfloat16 has two."
    z, bank = (1 + 0.1 * torch.randn(n, 16, generator=seeded(n)) for n in (40, 60))
    with torch.autocast("cpu", torch.bfloat16):
        found, weight = log_density(z.to(dtype), bank, 1.0), negative_weight(z, bank, bank)
    exact = log_density(z.to(dtype).double(), bank.double(), 1.0)
    assert found.dtype == weight.dtype == torch.float32 and (found - exact).abs().max() < 1e-5
    assert torch.allclose(weight, negative_weight(z, bank, bank), atol=1e-7)


@pytest.mark.parametrize("of", ["logit", "probability"])
@pytest.mark.parametrize("seed", range(5))
def test_held_gates_change_neither_the_penalty_nor_its_gradient(of, seed):
    torch.manual_seed(seed)
    detector = Detector(0.1).double()
    x = torch.rand(3, 5, 34, 34, generator=seeded(4), dtype=torch.float64)
    plain = torch.nn.Sequential(*detector.body, detector.head)  # not a Detector: its ReLUs are torch's
    gated, ordinary = gradient_penalty(detector, x, of), gradient_penalty(plain, x, of)
    assert torch.allclose(gated, ordinary, rtol=1e-12)
    ours, theirs = (
        torch.autograd.grad(loss, list(detector.parameters()), allow_unused=True) for loss in (gated, ordinary)
    )
    zero = torch.zeros((), dtype=torch.float64)
    for a, b in zip(ours, theirs):
        assert torch.allclose(zero if a is None else a, zero if b is None else b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("side", [34, 41])
def test_the_chain_of_products_is_the_gradient(side):
    "Also where a stride leaves pixels over, and for the sum of several logits."
    detector = Detector(0.1).double()
    x = torch.rand(2, 5, side, side, generator=seeded(4), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(detector(x).sum(), x)
    assert torch.allclose(ops.input_gradient(detector, x.detach()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("body", ["padded", "with a sigmoid", "strange head"])
def test_a_net_that_is_no_plain_chain_has_the_gradient_of_plain_torch(body):
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            last = torch.nn.Sigmoid() if body == "with a sigmoid" else torch.nn.ReLU()
            self.body = torch.nn.Sequential(torch.nn.Conv2d(5, 4, 3, padding=int(body == "padded")), last)
            self.head = torch.nn.Conv2d(4, 1, 8 if body == "padded" else 6 if body == "strange head" else 1)

        def forward(self, x):
            return self.head(self.body(x)).mean((2, 3), keepdim=True)

    net, x = Net(), torch.randn(2, 5, 8, 8)
    with ops.use("reference"):
        expected = ops.input_gradient(net, x)
    torch.testing.assert_close(ops.input_gradient(net, x), expected)


def test_the_penalty_refuses_several_outputs_whatever_the_shape():
    for shape in ((2, 5, 38, 34), (2, 5, 34, 38), (2, 5, 38, 38)):
        for of in ("logit", "probability"):
            with pytest.raises(ValueError, match="single patches"):
                gradient_penalty(Detector(0.1), torch.zeros(shape), of)
