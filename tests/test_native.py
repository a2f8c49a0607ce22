"""The compiled loops: what they compute, when they are used, and what happens without them."""

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from grad_nb.accel import backends, native, pixelwise, winograd
from grad_nb.bench.operations import threads_of
from grad_nb.config import GeneratorConfig
from grad_nb.inference import loops as scorer
from grad_nb.patchdiff import new_patchdiff

compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
CLEAR = (pixelwise._compiled_once.cache_clear, scorer._first_right.cache_clear, winograd._compiled_tiles.cache_clear)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    "Nothing compiled yet; afterwards everything as before."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for clear in CLEAR:
        clear()
    yield monkeypatch
    monkeypatch.undo()
    for clear in CLEAR:
        clear()


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(model):
    "With weights that are not zero: the last layers of a new one are."
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * drawn(p.numel(), *p.shape))
    return model


@compiler
def test_where_there_is_a_compiler_there_are_loops():
    assert (
        pixelwise.pixelwise_loops() is not None
        and scorer.scorer_loops() is not None
        and winograd.tile_loops() is not None
    )
    assert (
        pixelwise.loops_fit(torch.zeros(1, 16, 2, 2))
        and not pixelwise.loops_fit(torch.zeros(1, 12, 2, 2))
        and not pixelwise.loops_fit(torch.zeros(1, 16, 2, 2).double())
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert pixelwise.loops_fit(torch.zeros(1, 16, 2, 2)) and pixelwise.loops_fit(
            torch.zeros(1, 16, 2, 2).bfloat16()
        )
    with torch.autocast("cpu", torch.float16):
        assert not pixelwise.loops_fit(torch.zeros(1, 16, 2, 2))
    assert not pixelwise.loops_fit(torch.zeros(1, 16, 2, 2).bfloat16())


@compiler
@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.integers(1, 10),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.booleans(),
)
def test_one_pass_is_norm_modulation_and_silu(seed, B, eights, H, W, scale, last):
    C = 8 * eights
    y = scale * drawn(seed, B, C, H, W)
    y = (y.contiguous(memory_format=torch.channels_last) if last else y).requires_grad_()
    tables = [
        drawn(seed + 1, C).requires_grad_(),
        drawn(seed + 2, C).requires_grad_(),
        drawn(seed + 3, B, C).requires_grad_(),
    ]
    wide = lambda bias, mult, add: (bias, mult.expand(B, -1), add)  # one table for all pictures
    exact = [v.detach().double().requires_grad_() for v in (y, *tables)]
    ours, theirs = pixelwise.modulated_on_cpu(y, *wide(*tables)), pixelwise.plainly(exact[0], *wide(*exact[1:]))
    assert ours.shape == y.shape and torch.allclose(ours.double(), theirs, atol=1e-4)
    g = drawn(seed + 4, *y.shape)
    for a, b in zip(torch.autograd.grad(ours, (y, *tables), g), torch.autograd.grad(theirs, exact, g.double())):
        assert a.shape == b.shape and torch.allclose(a.double(), b, atol=2e-4 * float(1 + b.abs().max()))


@compiler
@pytest.mark.parametrize("channels", [8, 24, 40, 128])
def test_mixed_precision_rounds_once(channels):
    y, g = (drawn(n, 3, channels, 5, 7).mul(2).bfloat16().contiguous(memory_format=torch.channels_last) for n in (1, 2))
    tables = [
        drawn(n, *shape).requires_grad_() for n, shape in ((3, (channels,)), (4, (3, channels)), (5, (3, channels)))
    ]
    y, exact = y.requires_grad_(), [v.detach().double().requires_grad_() for v in (y, *tables)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = pixelwise.modulated_on_cpu(y, *tables)
    theirs = pixelwise.plainly(*exact)
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.double(), theirs, rtol=2**-8, atol=1e-5)
    for a, b, v in zip(
        torch.autograd.grad(ours, (y, *tables), g), torch.autograd.grad(theirs, exact, g.double()), (y, *tables)
    ):
        assert a.dtype == v.dtype and torch.allclose(
            a.double(), b, rtol=2**-8 if v is y else 1e-4, atol=1e-4 * float(b.std())
        )


@compiler
def test_a_patchdiff_in_mixed_precision_is_the_same_with_and_without(fresh):
    model, x, t, found = (
        shaken(new_patchdiff(17, GeneratorConfig(width=24, field_of="bottleneck", fourier=2))),
        drawn(1, 4, 5, 20, 22),
        torch.tensor([3, 700, 10, 900]),
        [],
    )

    def gradients(y):
        model.zero_grad()
        y.float().square().sum().backward()
        return [y.detach().float(), *(p.grad.clone() for p in model.parameters())]

    exact = gradients(model(x, t))
    for switch in ("auto", "no-loops"):
        fresh.setenv("GRAD_NB_ACCEL", switch)
        for clear in CLEAR:
            clear()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, t)
        found.append([float((a - b).norm() / b.norm()) for a, b in zip(gradients(y), exact)])
    assert max(found[0]) < 0.1 and sum(found[0]) < 1.1 * sum(found[1]), (
        "no further from full precision than torch's layers"
    )


@compiler
def test_a_model_in_bfloat16_takes_torchs_layers():
    model = shaken(new_patchdiff(9, GeneratorConfig(width=16))).bfloat16()
    assert model(drawn(1, 2, 5, 12, 12).bfloat16(), torch.tensor([3, 700])).dtype == torch.bfloat16


@compiler
def test_extremes_are_as_in_torch():
    y = torch.cat(
        [
            torch.zeros(1, 16, 1, 1),
            torch.full((1, 16, 1, 1), 1e4),
            drawn(0, 1, 16, 1, 1) * 1e6,
            torch.full((1, 16, 1, 1), torch.nan),
        ],
        3,
    )
    tables = torch.zeros(16), torch.full((1, 16), 300.0), torch.tensor([[-1e5, 1e5] * 8])
    ours, theirs = pixelwise.modulated_on_cpu(y, *tables), pixelwise.plainly(y, *tables)
    assert (
        torch.allclose(ours[..., :3], theirs[..., :3], rtol=1e-5, atol=1e-4)
        and ours[..., 3].isnan().all()
        and not ours[..., :3].isnan().any()
    )


@compiler
def test_the_numbers_do_not_depend_on_the_cores():
    given, g, found = (
        [
            drawn(1, 5, 24, 9, 7).requires_grad_(),
            drawn(2, 24).requires_grad_(),
            drawn(3, 5, 24).requires_grad_(),
            drawn(4, 5, 24).requires_grad_(),
        ],
        drawn(5, 5, 24, 9, 7),
        [],
    )
    for threads in (1, 2, 3):
        with threads_of(threads):
            z = pixelwise.modulated_on_cpu(*given)
            found.append([z, *torch.autograd.grad(z, given, g)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@compiler
@pytest.mark.parametrize(
    "level, width, field_of", [(3, 16, "network"), (17, 24, "bottleneck"), (5, 8, "network"), (9, 12, "network")]
)
def test_a_patchdiff_is_the_same_with_and_without(fresh, level, width, field_of):
    model = shaken(new_patchdiff(level, GeneratorConfig(width=width, field_of=field_of, fourier=2)))
    x, t, found = drawn(1, 2, 5, 20, 22), torch.tensor([3, 700]), []
    for switch in ("auto", "no-loops"):
        fresh.setenv("GRAD_NB_ACCEL", switch)
        for clear in CLEAR:
            clear()
        assert pixelwise.loops_fit(torch.zeros(1, width, 2, 2)) == (switch == "auto" and width % 8 == 0)
        model.zero_grad()
        y = model(x, t)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-7)


@compiler
def test_one_time_for_all_pictures():
    model, x = shaken(new_patchdiff(3, GeneratorConfig(width=16))), drawn(1, 64, 5, 12, 12)
    assert torch.allclose(model(x, torch.tensor([500])), model(x, torch.full((64,), 500)), atol=1e-5)


@compiler
@pytest.mark.parametrize("wrong", ["double", "channels", "tables", "bias"])
def test_what_the_loops_cannot_read_is_refused(wrong):
    y, bias, mult, add = drawn(1, 2, 16, 3, 3), drawn(2, 16), drawn(3, 2, 16), drawn(4, 2, 16)
    if wrong == "double":
        y = y.double()
    if wrong == "channels":
        y, bias, mult, add = y[:, :12], bias[:12], mult[:, :12], add[:, :12]
    if wrong == "tables":
        mult = mult[:, :8]
    if wrong == "bias":
        bias = bias.double()
    with pytest.raises(ValueError, match="float32|type"):
        pixelwise.modulated_on_cpu(y, bias, mult, add)


@compiler
def test_a_default_type_changes_nothing(fresh):
    given, g = (
        [
            drawn(1, 2, 16, 3, 3).requires_grad_(),
            drawn(2, 16).requires_grad_(),
            drawn(3, 2, 16).requires_grad_(),
            drawn(4, 2, 16).requires_grad_(),
        ],
        drawn(5, 2, 16, 3, 3),
    )
    expected = torch.autograd.grad(pixelwise.modulated_on_cpu(*given), given, g)
    pixelwise._compiled_once.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert all(
            torch.equal(a, b)
            for a, b in zip(expected, torch.autograd.grad(pixelwise.modulated_on_cpu(*given), given, g))
        )
    finally:
        torch.set_default_dtype(torch.float32)


@compiler
def test_a_gradient_of_a_gradient():
    given = [v.requires_grad_() for v in (drawn(1, 2, 8, 3, 3), drawn(2, 8), drawn(3, 2, 8), drawn(4, 2, 8))]
    second = lambda f: torch.autograd.grad(
        torch.autograd.grad(f(*given).square().sum(), given[0], create_graph=True)[0].square().sum(), given
    )
    for a, b in zip(second(pixelwise.modulated_on_cpu), second(pixelwise.plainly)):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))
    given[1].requires_grad_(False)
    assert torch.autograd.grad(pixelwise.modulated_on_cpu(*given).sum(), given[0])[0].shape == given[0].shape


@compiler
def test_a_patchdiff_can_be_traced_and_used_in_other_modes():
    model, x, t = (
        shaken(new_patchdiff(3, GeneratorConfig(width=16))).eval(),
        drawn(1, 2, 5, 12, 12),
        torch.tensor([3, 700]),
    )
    expected = model(x, t).detach()
    with torch.no_grad():
        assert torch.allclose(torch.jit.trace(model, (x, t))(x, t), expected, atol=1e-5)
    with torch.inference_mode():
        assert torch.equal(model(x, t), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(x, t).float(), expected, atol=0.1)
    assert model(x[:0], t[:0]).shape == (0, 3, 12, 12)
    first = torch.func.grad(lambda x: model(x, t).sum())(x)
    assert torch.allclose(
        first, torch.autograd.grad(model(given := x.clone().requires_grad_(), t).sum(), given)[0], atol=1e-4
    )


@compiler
@pytest.mark.parametrize(
    "wrong",
    [
        ("NORM", pixelwise.NORM.replace("1e-5f", "1e-1f")),
        (
            "NUMBER_TYPES",
            pixelwise.NUMBER_TYPES | {"_half": pixelwise.NUMBER_TYPES["_half"].replace("uvec) << 16", "uvec) << 15")},
        ),
    ],
    ids=["float32", "bfloat16"],
)
def test_wrong_loops_are_not_believed(fresh, caplog, wrong):
    fresh.setattr(pixelwise, *wrong)
    with caplog.at_level("INFO"):
        assert pixelwise.pixelwise_loops() is None
    assert "not right" in caplog.text and "torch's layers" in caplog.text


@compiler
def test_a_program_that_does_not_compile_says_why(fresh, caplog):
    fresh.setattr(pixelwise, "PIXEL", "nonsense;")
    with caplog.at_level("INFO"):
        assert pixelwise.pixelwise_loops() is None
    assert "nonsense" in caplog.text


@compiler
def test_a_library_belongs_to_what_the_compiler_makes_of_the_processor(fresh, tmp_path):
    made = [native.compile_c("int one(void) { return 1; }", "one", tmp_path)]
    fresh.setattr(native, "_target", lambda compiler: "another processor")
    made.append(native.compile_c("int one(void) { return 1; }", "one", tmp_path))
    assert len(set(made)) == 2 and all(path.exists() for path in made)


@compiler
def test_the_word_in_force_is_asked_each_time(fresh):
    source, asked = "int one(void) { return 1; }", []
    right = lambda library: asked.append(library) is None
    with backends.use("no-loops"):
        assert native.compiled(source, "one", right, "nothing") is None and asked == []
    assert native.compiled(source, "one", right, "nothing") is not None and len(asked) == 1


@compiler
@pytest.mark.parametrize("loops", [pixelwise.pixelwise_loops, winograd.tile_loops])
def test_loops_that_were_first_asked_for_where_they_are_forbidden_are_there_later(fresh, loops):
    with backends.use("no-loops"):
        assert loops() is None
    assert loops() is not None
    with backends.use("reference"):
        assert loops() is None


@compiler
def test_a_library_is_compiled_once(fresh, tmp_path):
    calls, real = [], native._run

    def run(command, text):
        calls.extend([command] * ("-shared" in command))
        return real(command, text)

    fresh.setattr(native, "_run", run)
    for _ in range(2):
        pixelwise._compiled_once.cache_clear()
        assert pixelwise.pixelwise_loops() is not None
    assert len(calls) == 1 and [p.suffix for p in (tmp_path / "grad_nb").iterdir()] == [".so"]


# --- the transformations of tiles -----------------------------------------------------------------------------------


@compiler
@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 7),
    st.sampled_from([1, 2]),
)
def test_a_small_map_by_loops_is_a_convolution_and_so_are_its_derivatives(seed, n, before, after, r, more, stride):
    side, taps, both = stride * (r + more), stride * r, (stride, stride)
    x, weight, bias = (
        drawn(seed + i, *shape).requires_grad_()
        for i, shape in enumerate(((n, before, side, side), (after, before, taps, taps), (after,)))
    )
    exact, g = (
        [v.detach().double().requires_grad_() for v in (x, weight, bias)],
        drawn(seed + 3, n, after, more + 1, more + 1).requires_grad_(),
    )
    near = lambda a, b: torch.allclose(a.double(), b, atol=1e-4 * float(1 + b.detach().abs().max()))
    ours, theirs = winograd.small_conv(x, weight, bias, both), torch.nn.functional.conv2d(*exact, stride)
    assert ours.shape == theirs.shape and near(ours, theirs)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight, bias), g.detach()),
        torch.autograd.grad(theirs, exact, g.detach().double()),
    ):
        assert near(a, b)
    ours, theirs = (
        winograd.small_conv_back(g, weight, side, both),
        torch.nn.functional.conv_transpose2d(g.detach().double(), exact[1], stride=stride),
    )
    assert ours.shape == theirs.shape == x.shape and near(ours, theirs)


@compiler
def test_tiles_do_not_depend_on_the_cores_and_can_be_differentiated_twice():
    x, weight, found = drawn(1, 7, 24, 16, 16).requires_grad_(), drawn(2, 5, 24, 4, 4).requires_grad_(), []
    for threads in (1, 2, 3):
        with threads_of(threads):
            y = winograd.small_conv(x, weight, None, (2, 2))
            (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            found.append([y, first, *torch.autograd.grad(first.square().sum(), (x, weight))])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1])) and all(
        torch.equal(a, b) for a, b in zip(found[0], found[2])
    )
    y = torch.nn.functional.conv2d(x, weight, None, 2)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for a, b in zip(found[0], [y, first, *torch.autograd.grad(first.square().sum(), (x, weight))]):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


@compiler
def test_without_the_loops_matrix_products_give_the_same(fresh, caplog):
    x, weight, found = drawn(1, 3, 32, 16, 16).requires_grad_(), drawn(2, 5, 32, 4, 4).requires_grad_(), []
    for switch in ("auto", "no-loops"):
        fresh.setenv("GRAD_NB_ACCEL", switch)
        winograd._compiled_tiles.cache_clear()
        assert (winograd.tile_loops() is None) == (switch == "no-loops")
        y = winograd.small_conv(x, weight, None, (2, 2))
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, weight))])
    for a, b in zip(*found):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    fresh.setenv("GRAD_NB_ACCEL", "auto")
    winograd._compiled_tiles.cache_clear()
    wrong = winograd.TRANSFORM_ROWS.replace("M[q * n + k] * AT(d + k * far);", "M[k] * AT(d + k * far);")
    fresh.setattr(winograd, "TRANSFORM_ROWS", wrong)
    with caplog.at_level("INFO"):
        assert winograd.tile_loops() is None
    assert "not right" in caplog.text


@compiler
def test_tiles_take_an_empty_batch_and_other_modes():
    weight = drawn(2, 5, 32, 4, 4)
    assert winograd.small_conv(torch.zeros(0, 32, 16, 16), weight, None, (2, 2)).shape == (0, 5, 7, 7)
    x = drawn(1, 2, 32, 16, 16)
    expected = torch.nn.functional.conv2d(x, weight, None, 2)
    with torch.inference_mode():
        assert torch.allclose(winograd.small_conv(x, weight, None, (2, 2)), expected, atol=5e-3)
    with torch.device("meta"):
        assert torch.allclose(winograd.small_conv(x, weight, None, (2, 2)), expected, atol=5e-3)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.allclose(winograd.small_conv(x, weight, None, (2, 2)), expected, atol=5e-3)
    finally:
        torch.set_default_dtype(torch.float32)
    f, plain = (
        (lambda x: winograd.small_conv(x, weight, None, (2, 2))),
        lambda x: torch.nn.functional.conv2d(x, weight, None, 2),
    )
    near = lambda a, b: a.shape == b.shape and torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))
    assert near(f(torch._neg_view(x)), plain(-x)) and near(make_fx(f)(x)(2 * x), plain(2 * x))
    for made in (
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.jvp(f, (x,), (x + 1,))[1],
    ):
        assert near(made(f), made(plain))
    part = x[:1, :, :, :].clone().requires_grad_()
    g = drawn(3, 4, 1, 5, 7, 7)
    assert near(*(torch.autograd.grad(h(part), part, g, is_grads_batched=True)[0] for h in (f, plain)))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x + 1)
        assert near(*(torch.autograd.forward_ad.unpack_dual(h(dual)).tangent for h in (f, plain)))


@pytest.mark.parametrize(
    "x, matrix, squares",
    [
        ((49, 256), "A", (2, 32)),
        ((49, 256), "A^T", (2, 32)),
        ((3, 256), "B^T", None),
        ((256,), "B^T", None),
        ((), "B^T", None),
        ((36, 4), "BT", None),
        ((2, 32, 8, 8), "B^T", (2, 32)),
    ],
)
def test_what_cannot_be_transformed_is_refused(x, matrix, squares):
    with pytest.raises(ValueError, match="matrix|shape"):
        winograd.tile_transform(torch.zeros(x), matrix, 16, 4, squares)
    for stride in ([2, 2], 2, (1, 2), (3, 3)):
        with pytest.raises(ValueError, match="stride"):
            winograd.small_conv(torch.zeros(1, 32, 16, 16), torch.zeros(4, 32, 4, 4), None, stride)


@compiler
def test_a_map_that_is_too_large_for_the_loop_is_a_product():
    x, weight = drawn(1, 1, 2, 60, 60), drawn(2, 3, 2, 3, 3)
    assert torch.allclose(winograd.small_conv(x, weight, None), torch.nn.functional.conv2d(x, weight), atol=1e-3)
