"""Layers for a GPU's memory: interpreted on the CPU where there is no GPU, and there held against the same in other words."""
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

CUDA = torch.cuda.is_available()
if not CUDA: os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made
pytest.importorskip("triton", reason="PyTorch brings Triton for CUDA alone")

from grad_nb import detector, diffusion, fused, kernels, patchdiff, training  # noqa: E402
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig  # noqa: E402
from grad_nb.diffusion import alpha_bars, reconstruct, reverse_step, sample  # noqa: E402
from grad_nb.patchdiff import PatchDiff, train_patchdiff  # noqa: E402

TINY = GeneratorConfig(size=16, width=16, steps=6, batch=4, n_samples=3, sample_steps=5, sample_batch=2)
DEVICE = "cuda" if CUDA else "cpu"
ON_GPU = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
INTERPRETED = pytest.mark.skipif(CUDA, reason="the kernels are compiled here, and need mixed precision")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def pictures(n, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def in_words(y, bias, mult, add):
    "The same in double precision, in other words."
    y, bias, mult, add = (v.double() for v in (y, bias, mult, add))
    y = y + bias[:, None, None]
    centred = y - y.mean(1, keepdim=True)
    u = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * mult[:, :, None, None] + add[:, :, None, None]
    return u / (1 + (-u).exp())


def some_model(level=9, width=16, fourier=0, seed=0):
    model = PatchDiff(level, width, fourier).eval()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()): p.copy_(0.3 * random(*p.shape, seed=seed + k))
    return model.to(DEVICE, memory_format=torch.channels_last)


def far(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def everywhere(monkeypatch):
    "On the CPU the layers are used, interpreted, as on a GPU in mixed precision."
    monkeypatch.setattr(patchdiff, "gpu_layers", lambda x: kernels)
    return kernels


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.sampled_from([16, 32, 64]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_norm_modulation_and_silu_with_their_gradients(n, channels, height, width, seed):
    shapes = ((n, channels, height, width), (channels,), (n, channels), (n, channels))
    inputs = [random(*shape, seed=seed + k).requires_grad_() for k, shape in enumerate(shapes)]
    found, expected, grad = kernels.modulated(*inputs), in_words(*inputs), random(*shapes[0], seed=seed + 9)
    assert (found - expected).abs().max() < 1e-4
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad.double()))
    for mine, exact in pairs: assert (mine - exact).norm() <= 1e-4 * exact.norm() + 1e-5


def test_any_order_in_memory_is_taken():
    y, bias, mult, add = random(2, 16, 5, 6).contiguous(), random(16), random(2, 32)[:, ::2], random(2, 16)
    assert torch.allclose(kernels.modulated(y, bias, mult, add).double(), in_words(y, bias, mult, add), atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 700), st.integers(1, 200), st.integers(0, 99))
def test_column_sums(rows, columns, seed):
    x = random(rows, columns, seed=seed, dtype=torch.bfloat16)
    assert torch.allclose(kernels.column_sums(x).double(), x.double().sum(0), rtol=1e-4, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(5, 8, 4, 2), (8, 70, 3, 1), (16, 24, 1, 1)]), st.integers(4, 9), st.integers(1, 4), st.integers(0, 99))
def test_a_convolution_with_its_relu(shape, side, n, seed):
    channels, after, k, stride = shape
    layer, x = nn.Conv2d(channels, after, k, stride).to(DEVICE), random(n, channels, side, side, seed=seed).requires_grad_()
    inputs, exact = (x, *layer.parameters()), nn.Conv2d(channels, after, k, stride).double().to(DEVICE)
    exact.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    ours, theirs = kernels.conv_relu(x, layer), F.relu(exact(wide))
    grad = random(*ours.shape, seed=seed + 1)
    assert ours.dtype == torch.bfloat16 and far(ours, theirs) < 0.01
    kept = ((ours > 0) == (theirs > 0)).float()  # rounding decides what is near 0
    for a, b in zip(torch.autograd.grad(ours, inputs, (grad * kept).bfloat16()), torch.autograd.grad(theirs, (wide, *exact.parameters()), (grad * kept).double())):
        assert a.dtype == torch.float32 and far(a, b) < 0.03


@pytest.mark.parametrize("results", [1, 3, 8, 20])
def test_a_linear_map_of_few_results_is_the_same_map(results):
    layer, x = nn.Linear(16, results).to(DEVICE), random(3, 4, 16).requires_grad_()
    ours, theirs, grad = kernels.linear(x, layer.weight, layer.bias), layer(x), random(3, 4, results, seed=1)
    assert ours.shape == theirs.shape and far(ours, theirs) < 0.01
    inputs = (x, *layer.parameters())
    for a, b in zip(torch.autograd.grad(ours, inputs, grad.bfloat16()), torch.autograd.grad(theirs, inputs, grad)): assert far(a, b) < 0.02


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 98), st.booleans(), st.integers(0, 99))
def test_a_reverse_step(s, clip, seed):
    alpha_bar = alpha_bars(100).to(DEVICE)
    x, eps, z = (3 * random(2, 3, 5, 7, seed=seed + k) for k in range(3))
    expected = reverse_step(x.double(), eps.double(), z.double(), alpha_bar[s + 1], alpha_bar[s], clip)
    found = kernels.step_back(x, eps, z, torch.stack([torch.tensor(0.0, dtype=torch.float64, device=DEVICE), alpha_bar[s + 1], alpha_bar[s]]), clip)
    assert found is x and torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_reverse_step_is_made_in_place():
    with pytest.raises(ValueError, match="contiguous and float32"): kernels.step_back(random(2, 3, 4, 4).double(), *(random(2, 3, 4, 4),) * 2, torch.ones(3))


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]))
def test_a_bias_inside(channels, height, width, k):
    conv, x = nn.Conv2d(channels, 4, k, padding=k // 2).to(DEVICE), random(2, channels, height, width)
    seen = fused.packed(x, torch.float32)
    assert seen.shape[1] % 8 == 0 and seen.shape[1] > channels and seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(F.conv2d(seen, fused.with_bias_inside(conv), padding=k // 2), conv(x), atol=1e-2 if CUDA else 1e-5)


@INTERPRETED
@pytest.mark.parametrize("level, side, fourier", [(5, 16, 0), (9, 17, 2), (13, 20, 0), (17, 9, 1)])
def test_a_fused_patchdiff_is_the_same_function(level, side, fourier):
    model, x, t = some_model(level, 16, fourier), random(2, 5, side, side + 3), torch.tensor([3, 700])
    with torch.no_grad(): expected = model(x, t)
    exact, rounded = (fused.FusedPatchDiff(model, dtype)(x, t) for dtype in (torch.float32, torch.float16))
    assert exact.shape == expected.shape and far(exact, expected) < 1e-5 and 0 < far(rounded, expected) < 0.01


@pytest.mark.parametrize("level, fourier", [(1, 0), (3, 0), (9, 2), (13, 0)])
def test_a_patchdiff_of_these_layers_has_the_same_gradients(monkeypatch, level, fourier):
    model, x, t, target = some_model(level, 16, fourier), random(2, 5, 13, 18), torch.tensor([3, 600], device=DEVICE), random(2, 3, 13, 18, seed=9)
    def gradients(mixed):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed): (model(x, t).float() - target).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    if CUDA: monkeypatch.setenv("GRAD_NB_FUSED", "0")
    with monkeypatch.context() as torchs:
        torchs.setattr(patchdiff.pixelwise, "fits", lambda x: False)  # the loops of a CPU round less
        exact, plain = gradients(False), gradients(True)
    if CUDA: monkeypatch.delenv("GRAD_NB_FUSED")
    else: monkeypatch.setattr(patchdiff, "gpu_layers", lambda x: kernels)
    used = []
    monkeypatch.setattr(kernels, "modulated", lambda *args, real=kernels.modulated: used.append(1) or real(*args))
    found = gradients(True)
    assert used and far(found, exact) < max(1.3 * far(plain, exact), 0.01) < 0.2


@INTERPRETED
def test_a_model_of_another_norm_keeps_it(everywhere, monkeypatch):
    model = PatchDiff(5, 16, norm=lambda channels: nn.GroupNorm(1, channels)).eval()
    x, t = random(1, 5, 8, 8), torch.tensor([9])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16): found = model(x, t)
    monkeypatch.setattr(patchdiff, "gpu_layers", lambda x: None)
    with torch.no_grad(): assert far(found, model(x, t)) < 0.02


def test_the_layers_are_for_mixed_precision_on_cuda_and_can_be_switched_off(monkeypatch):
    assert not kernels.fits(torch.zeros(1)) and [c for c in range(300) if kernels.fits_channels(c)] == [16, 32, 64, 128, 256]
    class OnCuda: is_cuda, device = True, DEVICE
    monkeypatch.setattr(kernels, "_works", lambda device: True)
    assert not kernels.fits(OnCuda)
    with torch.autocast("cuda", torch.float16): assert not kernels.fits(OnCuda)
    with torch.autocast("cuda", torch.bfloat16):
        assert kernels.fits(OnCuda) == torch.is_autocast_enabled("cuda")
        monkeypatch.setenv("GRAD_NB_FUSED", "0")
        assert not kernels.fits(OnCuda)


@pytest.mark.parametrize("name", ["modulated", "conv_relu", "linear"])
@pytest.mark.parametrize("raises", [True, False])
def test_layers_that_fail_are_not_used(monkeypatch, caplog, name, raises):
    def wrong(x, *args):
        if raises: raise RuntimeError("no C compiler")
        return 1.5 * real(x, *args)
    real = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, wrong)
    kernels._works.cache_clear()
    try: assert not kernels._works(DEVICE) and ("no C compiler" if raises else f"{name} is wrong by") in caplog.text
    finally: kernels._works.cache_clear()


@INTERPRETED
def test_a_library_that_cannot_join_is_left_alone(caplog):
    kernels._joins.cache_clear()
    assert not kernels._joins("cpu", torch.float32) and "two operations here" in caplog.text
    x, layer = random(2, 8, 6, 6), nn.Conv2d(8, 16, 3)
    assert torch.equal(kernels.relu_of_conv(x, layer.weight, layer.bias, (1, 1)), F.relu(layer(x)))


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_library_joins(dtype, caplog):
    assert kernels._joins("cuda:0", dtype), caplog.text
    for channels, after, k in ((8, 16, 3), (16, 24, 1), (13, 26, 3)):
        x, layer = random(2, channels, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last), nn.Conv2d(channels, after, k).to(DEVICE, dtype)
        assert far(kernels.relu_of_conv(x, layer.weight, layer.bias, (1, 1)), F.relu(layer(x))) < 0.01


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_pictures_are_reconstructed():
    config = replace(TINY, width=64, size=32, reconstruct=0.1)
    model = patchdiff.new_patchdiff(5, config).cuda()
    assert patchdiff.reconstruct_normals(model, pictures(3, 32), config, device="cuda", progress=False).shape == (3, 32, 32, 3)


def test_a_model_that_cannot_be_fused_samples_itself(monkeypatch, caplog):
    narrow, model = some_model(), some_model(5, 64)
    assert fused.ready(narrow) is narrow and "a width of 16 was not tried" in caplog.text
    monkeypatch.setattr(fused.FusedPatchDiff, "__call__", lambda self, x, t: torch.zeros(len(x), 3, *x.shape[2:], device=x.device))
    assert fused.ready(model) is model and "its result is wrong" in caplog.text


@INTERPRETED
@pytest.mark.parametrize("again", [False, True])
def test_sampling_is_the_same_with_the_kernels(monkeypatch, again):
    model, alpha_bar, x_0 = some_model(5), alpha_bars(50).tolist(), random(2, 3, 12, 12).clamp(-1, 1)
    def draw(eps_theta):
        generator = torch.Generator().manual_seed(0)
        return reconstruct(eps_theta, x_0, 20, alpha_bar, generator, 20) if again else sample(eps_theta, 2, 12, alpha_bar, generator, 6)
    expected = draw(model)
    monkeypatch.setattr(diffusion, "gpu_layers", lambda x: kernels)
    assert torch.allclose(draw(fused.FusedPatchDiff(model, torch.float32)), expected, atol=1e-3)


@INTERPRETED
def test_a_training_of_these_layers_is_a_training(everywhere, monkeypatch):
    monkeypatch.setattr(patchdiff, "autocast", lambda *args: torch.autocast("cpu", torch.bfloat16))
    model, history = train_patchdiff(pictures(6, 16), 5, replace(TINY, steps=3, batch=2), progress=False)
    assert np.isfinite(history.to_numpy()).all() and all(torch.isfinite(p).all() for p in model.parameters())


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("level", [5, 13])
def test_on_a_gpu_sampling_is_as_exact_as_mixed_precision(monkeypatch, level, caplog):
    model, x, t = some_model(level, 64), random(3, 5, 63, 70), torch.tensor([3, 400, 900], device="cuda")
    with torch.inference_mode():
        exact = model.double()(x.double(), t); model.float()
        quick = fused.ready(model)
        assert isinstance(quick, fused.FusedPatchDiff), caplog.text
        with torch.autocast("cuda", torch.bfloat16):
            found = quick(x, t)
            monkeypatch.setenv("GRAD_NB_FUSED", "0")
            plain = model(x, t).float()
    print(f"level {level}: fused {far(found, exact):.4f}, mixed precision {far(plain, exact):.4f}")
    assert far(found, exact) < 1.2 * far(plain, exact) < 0.1


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_a_generator_uses_all_of_it(monkeypatch, caplog):
    config, used = replace(TINY, width=64, size=32, steps=8), []
    for module, name in ((kernels, "modulated"), (kernels, "linear"), (kernels, "step_back"), (fused.FusedPatchDiff, "__call__")):
        monkeypatch.setattr(module, name, lambda *args, real=getattr(module, name), name=name: used.append(name) or real(*args))
    model, history = train_patchdiff(pictures(6, 32), 9, config, device="cuda", progress=False)
    made = patchdiff.generate(model, config, device="cuda", progress=False)
    assert set(used) == {"modulated", "linear", "step_back", "__call__"} and made.shape == (3, 32, 32, 3) and np.isfinite(history.to_numpy()).all()
    assert not caplog.text
    assert patchdiff._ready(model, replace(config, bf16=False)) is model


def detector_gradients(monkeypatch, config, mixed):
    "All gradients of one step, with the same draws whatever the way."
    learner = training.Learner(config, 5, device=DEVICE)
    sets = [torch.from_numpy(pictures(4, 40, k)).to(DEVICE) for k in range(3)]
    batch = training.draw_batch(sets[0], sets[1:], config, Augmentation(), learner.generator)
    monkeypatch.setattr(training, "autocast", lambda *args: torch.autocast(DEVICE, torch.bfloat16, enabled=mixed))
    parts = training.gradients(learner, batch)[1]
    return torch.cat([p.grad.flatten() for net in (learner.detector, learner.decoder) for p in net.parameters() if p.grad is not None]), parts


@pytest.mark.parametrize("change", [{}, dict(alpha_1=0.0), dict(shared_pass=True), dict(block=2)], ids=str)
def test_a_detector_of_these_layers_has_the_same_gradients(monkeypatch, change):
    if CUDA and "block" in change: pytest.skip("the ways draw the patch of a block in another order")
    config = replace(DetectorConfig(width=0.25, pictures=2, patches=16, bank_size=16, sigma_c=0.0, sigma_z=0.0, alpha_2=1e-2), **change)
    if CUDA: monkeypatch.setenv("GRAD_NB_FUSED", "0")
    exact, plain = detector_gradients(monkeypatch, config, False)[0], detector_gradients(monkeypatch, config, True)[0]
    if CUDA: monkeypatch.delenv("GRAD_NB_FUSED")
    else: [monkeypatch.setattr(module, "gpu_layers", lambda x: kernels) for module in (training, detector)]
    used, _ = [], kernels._works("cuda:0") if CUDA else None  # which tries the layers itself
    monkeypatch.setattr(kernels, "conv_relu", lambda *args, real=kernels.conv_relu: used.append(1) or real(*args))
    found, parts = detector_gradients(monkeypatch, config, True)
    assert len(used) == 7 + 3 * bool(config.alpha_1) and parts["grad"] > 0, "one pass for the patches and the noised patches"
    assert far(found, exact) < max(1.5 * far(plain, exact), 0.02) < 0.3
