"""Layers for a GPU's memory: interpreted on the CPU where there is no GPU, and held against the same in other words."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from shared import far, pictures, random_weights
from torch import nn

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are made
pytest.importorskip("triton", reason="PyTorch brings Triton for CUDA alone")

from operations import CASES  # noqa: E402

from grad_nb import training  # noqa: E402
from grad_nb.accel import fast, fused, kernels, ops  # noqa: E402
from grad_nb.beyond import timesteps  # noqa: E402
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig  # noqa: E402
from grad_nb.contrastive import generate, train_patchdiff  # noqa: E402
from grad_nb.diffusion import alpha_bars, reverse_step, sample  # noqa: E402
from grad_nb.patchdiff import PatchDiff  # noqa: E402

TINY = GeneratorConfig(size=16, width=16, steps=6, batch=4, n_samples=3, sample_steps=5, sample_batch=2)
DEVICE = "cuda" if CUDA else "cpu"
PLAIN_LAYERS = "no-triton,no-loops"  # PyTorch's, also where there are others
ON_GPU = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
INTERPRETED = pytest.mark.skipif(CUDA, reason="the kernels are compiled here, and need mixed precision")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def in_words(y, bias, mult, add):
    "The same in double precision, in other words."
    y, bias, mult, add = (v.double() for v in (y, bias, mult, add))
    y = y + bias[:, None, None]
    centred = y - y.mean(1, keepdim=True)
    u = (
        centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * mult[:, :, None, None]
        + add[:, :, None, None]
    )
    return u / (1 + (-u).exp())


def some_model(level=9, width=16, fourier=0, seed=0):
    return ops.place(random_weights(PatchDiff(level, width, fourier).eval(), 0.3, seed), DEVICE)


@pytest.fixture
def everywhere(monkeypatch):
    "On the CPU the layers are used, interpreted, wherever they can be on a CPU."
    if not CUDA:
        monkeypatch.setattr(fast, "gpu_layers", lambda x: kernels)


@pytest.fixture
def as_on_a_gpu(everywhere, monkeypatch):
    "On the CPU every choice falls as on a GPU in mixed precision."
    if not CUDA:
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.sampled_from([16, 32, 64]), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_norm_modulation_and_silu_with_their_gradients(n, channels, height, width, seed):
    shapes = ((n, channels, height, width), (channels,), (n, channels), (n, channels))
    inputs = [random(*shape, seed=seed + k).requires_grad_() for k, shape in enumerate(shapes)]
    found, expected, grad = kernels.modulated_on_gpu(*inputs), in_words(*inputs), random(*shapes[0], seed=seed + 9)
    assert (found - expected).abs().max() < 1e-4
    pairs = zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad.double()))
    for mine, exact in pairs:
        assert (mine - exact).norm() <= 1e-4 * exact.norm() + 1e-5


def test_any_order_in_memory_is_taken():
    y, bias, mult, add = random(2, 16, 5, 6).contiguous(), random(16), random(2, 32)[:, ::2], random(2, 16)
    assert torch.allclose(
        kernels.modulated_on_gpu(y, bias, mult, add).double(), in_words(y, bias, mult, add), atol=1e-5
    )


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 700), st.integers(1, 200), st.integers(0, 99))
def test_column_sums(rows, columns, seed):
    x = random(rows, columns, seed=seed, dtype=torch.bfloat16)
    assert torch.allclose(kernels.column_sums(x).double(), x.double().sum(0), rtol=1e-4, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from([(5, 8, 4, 2), (8, 70, 3, 1), (16, 24, 1, 1)]),
    st.integers(4, 9),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_a_convolution_with_its_relu(shape, side, n, seed):
    channels, after, k, stride = shape
    torch.manual_seed(seed)  # of the weights too, so that the same example is the same again
    layer, x = (
        nn.Conv2d(channels, after, k, stride).to(DEVICE),
        random(n, channels, side, side, seed=seed).requires_grad_(),
    )
    inputs, exact = (x, *layer.parameters()), nn.Conv2d(channels, after, k, stride).double().to(DEVICE)
    exact.load_state_dict(layer.state_dict())
    wide = x.detach().double().requires_grad_()
    ours, theirs = kernels.conv_relu_in_bf16(x, layer), F.relu(exact(wide))
    grad = random(*ours.shape, seed=seed + 1)
    assert ours.dtype == torch.bfloat16 and far(ours, theirs) < 0.01
    kept = ((ours > 0) == (theirs > 0)).float()  # rounding decides what is near 0
    for a, b in zip(
        torch.autograd.grad(ours, inputs, (grad * kept).bfloat16()),
        torch.autograd.grad(theirs, (wide, *exact.parameters()), (grad * kept).double()),
    ):
        assert a.dtype == torch.float32 and far(a, b) < 0.03


@pytest.mark.parametrize("results", [1, 3, 8, 20])
def test_a_linear_map_of_few_results_is_the_same_map(results):
    layer, x = nn.Linear(16, results).to(DEVICE), random(3, 4, 16).requires_grad_()
    ours, theirs, grad = kernels.linear(x, layer.weight, layer.bias), layer(x), random(3, 4, results, seed=1)
    assert ours.shape == theirs.shape and far(ours, theirs) < 0.01
    inputs = (x, *layer.parameters())
    for a, b in zip(torch.autograd.grad(ours, inputs, grad.bfloat16()), torch.autograd.grad(theirs, inputs, grad)):
        assert far(a, b) < 0.02


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 98), st.booleans(), st.integers(0, 99))
def test_a_reverse_step(s, clip, seed):
    alpha_bar = alpha_bars(100).to(DEVICE)
    x, eps, z = (3 * random(2, 3, 5, 7, seed=seed + k) for k in range(3))
    now, before = (alpha_bar[s + 1], alpha_bar[s]), x.clone()
    expected = reverse_step(x.double(), eps.double(), z.double(), *now, clip)
    found = kernels.step_back(x, eps, z, *now, clip)
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4) and torch.equal(x, before)


def test_a_reverse_step_needs_float32_in_a_row():
    one, x = torch.ones((), dtype=torch.float64), random(2, 3, 4, 4)
    for wrong in (x.double(), x.transpose(2, 3)):
        with pytest.raises(ValueError, match="contiguous and float32"):
            kernels.step_back(wrong, x, x, one, one)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 20), st.sampled_from([1, 3]))
def test_a_bias_inside(channels, height, width, k):
    conv, x = nn.Conv2d(channels, 4, k, padding=k // 2).to(DEVICE), random(2, channels, height, width)
    seen = fused.pack_channels(x, torch.float32)
    assert seen.shape[1] % 8 == 0 and seen.shape[1] > channels and seen.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(
        F.conv2d(seen, fused.with_bias_inside(conv), padding=k // 2), conv(x), atol=1e-2 if CUDA else 1e-5
    )


@INTERPRETED
@pytest.mark.parametrize("level, side, fourier", [(5, 16, 0), (9, 17, 2), (13, 20, 0), (17, 9, 1)])
def test_a_fused_patchdiff_is_the_same_function(level, side, fourier):
    model, x, t = some_model(level, 16, fourier), random(2, 5, side, side + 3), torch.tensor([3, 700])
    with torch.no_grad():
        expected = model(x, t)
    exact, rounded = (fused.FusedPatchDiff(model, dtype)(x, t) for dtype in (torch.float32, torch.float16))
    assert exact.shape == expected.shape and far(exact, expected) < 1e-5 and 0 < far(rounded, expected) < 0.01


@pytest.mark.parametrize(
    "level, fourier, where",
    [(level, fourier, "everywhere") for level, fourier in ((1, 0), (3, 0), (9, 2), (13, 0))]
    + [(level, fourier, "as_on_a_gpu") for level, fourier in ((3, 0), (9, 2), (13, 0))],
)
def test_a_patchdiff_of_these_layers_has_the_same_gradients(request, monkeypatch, level, fourier, where):
    model, x, target = some_model(level, 16, fourier), random(2, 5, 13, 18), random(2, 3, 13, 18, seed=9)
    t = torch.tensor([3, 600], device=DEVICE)

    def gradients(mixed):
        model.zero_grad()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            (model(x, t).float() - target).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    with ops.use(PLAIN_LAYERS):
        exact, plain = gradients(False), gradients(True)
    request.getfixturevalue(where)
    used, real = [], kernels.modulated_on_gpu
    monkeypatch.setattr(kernels, "modulated_on_gpu", lambda *args: used.append(1) or real(*args))
    found = gradients(True)
    assert used and far(found, exact) < max(1.3 * far(plain, exact), 0.01) < 0.03


ON_A_GPU = [  # operations that have a form of their own on a GPU
    (name, i) for name in fast.BACKENDS_OF if name not in ("norm_silu", "cut_patches") for i in range(len(CASES[name]))
]


@INTERPRETED
@pytest.mark.filterwarnings("ignore:CUDA is not available", "ignore:In CUDA autocast")
@pytest.mark.parametrize("name, case", ON_A_GPU)
def test_an_operation_of_a_gpu_is_its_definition(request, monkeypatch, name, case):
    mixed = name != "input_gradient"  # which is asked for in full precision
    at_most = {"input_gradient": 1e-5, "reverse_step": 1e-6}.get(name, 0.02)
    with ops.use("reference"):
        exact = CASES[name][case]()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            plain = CASES[name][case]()
    request.getfixturevalue("as_on_a_gpu")
    answered, backend = [], fast.BACKENDS_OF[name]

    def answer(*args, **kwargs):
        found = backend(*args, **kwargs)
        answered.append(found is not NotImplemented)
        return found if answered[-1] else getattr(ops, name).reference(*args, **kwargs)

    monkeypatch.setitem(ops._backends, name, [answer])
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        found = CASES[name][case]()
    assert any(answered) == (name != "conv" or case > 3)
    for ours, theirs, right in zip(found, plain, exact, strict=True):
        if right.any():
            assert far(ours, right) < max(1.5 * far(theirs, right), at_most)


@INTERPRETED
def test_a_model_of_another_norm_keeps_it(request):
    model = PatchDiff(5, 16, norm=lambda channels: nn.GroupNorm(1, channels)).eval()
    x, t = random(1, 5, 8, 8), torch.tensor([9])
    with torch.no_grad():
        expected = model(x, t)
        request.getfixturevalue("everywhere")
        with torch.autocast("cpu", torch.bfloat16):
            assert far(model(x, t), expected) < 0.02


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_the_layers_are_for_mixed_precision_on_cuda_and_can_be_switched_off(monkeypatch):
    assert not kernels.triton_fits(torch.zeros(1))
    assert [c for c in range(300) if kernels.fits_channels(c)] == [16, 32, 64, 128, 256]

    class OnCuda:
        is_cuda, device = True, DEVICE

    monkeypatch.setattr(kernels, "_works", lambda device: True)
    assert not kernels.triton_fits(OnCuda)
    with torch.autocast("cuda", torch.float16):
        assert not kernels.triton_fits(OnCuda)
    with torch.autocast("cuda", torch.bfloat16):
        assert kernels.triton_fits(OnCuda) == torch.is_autocast_enabled("cuda")
        for words in ("no-triton", "reference"):
            with ops.use(words):
                assert not kernels.triton_fits(OnCuda)
        monkeypatch.setenv("GRAD_NB_ACCEL", "no-triton")
        assert not kernels.triton_fits(OnCuda)


LAYERS = {"modulated_on_gpu": "modulated", "conv_relu_in_bf16": "conv_relu", "linear": "linear"}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("raises", [True, False])
def test_layers_that_fail_are_not_used(monkeypatch, caplog, name, raises):
    def wrong(x, *args):
        if raises:
            raise RuntimeError("no C compiler")
        return 1.5 * real(x, *args)

    real = getattr(kernels, name)
    monkeypatch.setattr(kernels, name, wrong)
    kernels._works.cache_clear()
    try:
        said = "no C compiler" if raises else f"{LAYERS[name]} is wrong by"
        assert not kernels._works(DEVICE) and said in caplog.text
    finally:
        kernels._works.cache_clear()


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
        x, layer = (
            random(2, channels, 9, 9, dtype=dtype).contiguous(memory_format=torch.channels_last),
            nn.Conv2d(channels, after, k).to(DEVICE, dtype),
        )
        assert far(kernels.relu_of_conv(x, layer.weight, layer.bias, (1, 1)), F.relu(layer(x))) < 0.01


def test_a_model_that_cannot_be_fused_samples_itself(monkeypatch, caplog):
    narrow, model = some_model(), some_model(5, 64)
    assert fused.prepared_to_sample(narrow) is narrow and "a width of 16 was not tried" in caplog.text
    monkeypatch.setattr(
        fused.FusedPatchDiff, "__call__", lambda self, x, t: torch.zeros(len(x), 3, *x.shape[2:], device=x.device)
    )
    assert fused.prepared_to_sample(model) is model and "its result is wrong" in caplog.text


@INTERPRETED
def test_sampling_is_the_same_with_the_kernels(monkeypatch):
    model, alpha_bar, steps = some_model(5), alpha_bars(50).tolist(), []

    def draw(eps_theta):
        return sample(eps_theta, 2, 12, alpha_bar, torch.Generator().manual_seed(0), timesteps(50, 6))

    expected, real = draw(model), kernels.step_back
    monkeypatch.setattr(fast, "gpu_layers", lambda x: kernels)
    monkeypatch.setattr(kernels, "step_back", lambda *args: steps.append(1) or real(*args))
    assert torch.allclose(draw(fused.FusedPatchDiff(model, torch.float32)), expected, atol=1e-3) and len(steps) == 6


@INTERPRETED
def test_a_training_of_these_layers_is_a_training(everywhere, monkeypatch):
    monkeypatch.setattr(ops, "mixed_precision", lambda *args: torch.autocast("cpu", torch.bfloat16))
    model, history = train_patchdiff(pictures(6, 16), 5, replace(TINY, steps=3, batch=2), progress=False)
    assert np.isfinite(history.to_numpy()).all() and all(torch.isfinite(p).all() for p in model.parameters())


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("level", [5, 13])
def test_on_a_gpu_sampling_is_as_exact_as_mixed_precision(level, caplog):
    model, x, t = some_model(level, 64), random(3, 5, 63, 70), torch.tensor([3, 400, 900], device="cuda")
    with torch.inference_mode():
        exact = model.double()(x.double(), t)
        model.float()
        quick = fused.prepared_to_sample(model)
        assert isinstance(quick, fused.FusedPatchDiff), caplog.text
        with torch.autocast("cuda", torch.bfloat16):
            found = quick(x, t)
            with ops.use("no-triton"):
                plain = model(x, t).float()
    print(f"level {level}: fused {far(found, exact):.4f}, mixed precision {far(plain, exact):.4f}")
    assert far(found, exact) < 1.2 * far(plain, exact) < 0.1


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_a_generator_uses_all_of_it(monkeypatch, caplog):
    config, used = replace(TINY, width=64, size=32, steps=8), []
    places = [(kernels, name) for name in ("modulated_on_gpu", "linear", "step_back")]
    for module, name in [*places, (fused.FusedPatchDiff, "__call__")]:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, real=real, name=name: used.append(name) or real(*args))
    model, history = train_patchdiff(pictures(6, 32), 9, config, device="cuda", progress=False)
    made = generate(model, config, device="cuda", progress=False)
    assert set(used) == {"modulated_on_gpu", "linear", "step_back", "__call__"}
    assert made.shape == (3, 32, 32, 3) and np.isfinite(history.to_numpy()).all() and not caplog.text
    assert ops.for_sampling(model, False) is model


def detector_gradients(monkeypatch, config, mixed):
    "All gradients of one step, with the same draws whatever the way."
    learner = training.Learner(config, 5, device=DEVICE)
    sets = [torch.from_numpy(pictures(4, 40, k)).to(DEVICE) for k in range(3)]
    batch = training.draw_batch(sets[0], sets[1:], config, Augmentation(), learner.generator)
    monkeypatch.setattr(ops, "mixed_precision", lambda *args: torch.autocast(DEVICE, torch.bfloat16, enabled=mixed))
    parts = training.batch_gradients(learner, batch)[1]
    weights = [*learner.detector.parameters(), *learner.decoder.parameters()]
    return torch.cat([p.grad.flatten() for p in weights if p.grad is not None]), parts


@pytest.mark.parametrize("change", [{}, dict(alpha_1=0.0), dict(block=2)], ids=str)
def test_a_detector_of_these_layers_has_the_same_gradients(request, monkeypatch, change):
    if CUDA and "block" in change:
        pytest.skip("the ways draw the patch of a block in another order")
    usual = DetectorConfig(width=0.25, pictures=2, patches=16, bank_size=16, sigma_c=0.0, sigma_z=0.0, alpha_2=1e-2)
    config = replace(usual, **change)
    with ops.use(PLAIN_LAYERS):
        exact, plain = (detector_gradients(monkeypatch, config, mixed)[0] for mixed in (False, True))
    if CUDA:
        kernels._works("cuda:0")  # which tries the layers itself
    request.getfixturevalue("as_on_a_gpu")
    used, real = [], kernels.conv_relu_in_bf16
    monkeypatch.setattr(kernels, "conv_relu_in_bf16", lambda *args: used.append(1) or real(*args))
    found, parts = detector_gradients(monkeypatch, config, True)
    assert len(used) == 7 + 3 * bool(config.alpha_1), "one pass for the patches and the noised patches"
    assert parts["grad"] > 0 and far(found, exact) < max(1.5 * far(plain, exact), 0.02) < 0.3
