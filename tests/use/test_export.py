"""The exported model against the model: bytes of resizing, verdicts at the threshold, files and messages."""

import csv
import io
import json
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from shared import ROOT
from sklearn.exceptions import NotFittedError

from grad_nb.config import Level, override, preset
from grad_nb.datasets.light import fit_light
from grad_nb.datasets.readers import HALF_DOWN, load_images, read_image, resize_pictures
from grad_nb.datasets.trays import draw_tray
from grad_nb.detector import Detector
from grad_nb.evaluation import MapStats
from grad_nb.grad import GRAD
from grad_nb.use import export
from grad_nb.use.daily import grad_export
from grad_nb.use.export import (
    FORMATS,
    OnnxScorer,
    OpenvinoScorer,
    Scorer,
    TorchScorer,
    float32_below,
    largest_difference,
    random_pictures,
    resize_matrix,
    to_int8,
    to_onnx,
    to_openvino,
    to_openvino_int8,
    to_torch,
)

SIZE = 96
LEVELS = {
    "mvtec_ad": (Level(34, 96, (5,)),),
    "mvtec_loco": (Level(34, 96, (5,)), Level(51, 64, (5,)), Level(68, 48, (5,))),
}


def pictures(n, size=SIZE, seed=0):
    "Smooth colours with some noise on them, so that the score maps are not all alike."
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 255, (n, 3, 6, 6)))
    x = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear") + torch.from_numpy(
        rng.normal(0, 9, (n, 3, size, size))
    )
    return x.round().clamp(1, 254).byte().permute(0, 2, 3, 1).numpy()


def fitted(layout="mvtec_loco", **changes):
    "A model as `fit` leaves it, with random weights; the threshold lies between the scores of `pictures`."
    config = override(
        preset("paper"),
        {
            "generator.size": SIZE,
            "detector.width": 0.1,
            "evaluation.map_size": 80,
            "levels_ad": LEVELS["mvtec_ad"],
            "levels_loco": LEVELS["mvtec_loco"],
            **changes,
        },
    )
    model = GRAD(config, layout, device="cpu", progress=False)
    model.levels_ = config.levels(layout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.detectors_ = [Detector(0.1) for _ in model.levels_]
    model.stats_ = [MapStats.of(maps) for maps in model._maps(pictures(4, seed=1))]
    model.offset_ = 0.0
    model.map_limits_ = (0.0, 1.0)
    model.banks_ = [None] * len(model.levels_)
    model.n_pictures_ = None
    model.versions_ = {}
    model.offset_ = float(np.median(model.score_samples(pictures(3)))) - 1e-3
    return model


@pytest.fixture(scope="module", params=["mvtec_ad", "mvtec_loco"])
def exported(request, tmp_path_factory):
    "A model and the file made of it."
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    model, path = fitted(request.param), tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(model, path)
    return model, path


@given(st.integers(34, 160), st.integers(34, 160), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_matrix_resizes_to_the_same_bytes(size, small, seed):
    x = np.random.default_rng(seed).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    R = resize_matrix(size, small)
    planes = torch.from_numpy(x).permute(0, 3, 1, 2).float().contiguous()
    ours = (R @ (planes @ R.T) - HALF_DOWN).round().permute(0, 2, 3, 1).numpy()
    off = np.abs(ours - resize_pictures(x, small))
    assert off.max() <= 1 and (off > 0).mean() < 2e-3  # only an exact half may round the other way


def test_resizing_keeps_a_flat_picture():
    for small in (34, 48, 64, 128):
        assert torch.allclose(resize_matrix(96, small).sum(1), torch.ones(small), atol=1e-6)


@given(st.floats(-(2.0**99), 2.0**99), st.floats(-(2.0**99), 2.0**99, width=32))
def test_no_verdict_changes_in_float32(threshold, score):
    assert (score > threshold) == bool(np.float32(score) > np.float32(float32_below(threshold)))


@given(st.floats(-(2.0**99), 2.0**99, width=32))
def test_a_score_at_the_threshold_is_normal(score):
    assert float32_below(score) == score
    just_below = float(np.nextafter(score, -np.inf))
    assert np.float32(score) > np.float32(float32_below(just_below))


@pytest.mark.parametrize("layout", ["mvtec_ad", "mvtec_loco"])
@pytest.mark.parametrize("n", [1, 3])
def test_the_scorer_is_predict(layout, n):
    model, x = fitted(layout), pictures(3)[:n]
    expected = model.predict(x)
    scores, labels, maps = Scorer(model)(torch.from_numpy(x))
    assert scores.dtype == torch.float32 and labels.dtype == torch.bool and maps.shape == (n, 80, 80)
    assert np.allclose(scores, expected.scores, rtol=0, atol=1e-4)
    assert np.allclose(maps, expected.maps, rtol=0, atol=1e-4)
    assert (labels.numpy() == expected.labels).all()


def test_both_verdicts_occur():
    labels = Scorer(fitted())(torch.from_numpy(pictures(3)))[1]
    assert labels.any() and not labels.all()


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation.placement": "stretch"},
        {"evaluation.placement": "patch"},
        {"evaluation.blur_kernel": 5},
        {"evaluation.positive_maps": True},
        {"generator.size": 128},
        {"generator.size": 192},
        {"generator.size": 100},
    ],
)
def test_the_settings_reach_the_scorer(changes):
    model, plain = fitted(**changes), fitted()
    x = pictures(2, model.preset.generator.size)
    maps = Scorer(model)(torch.from_numpy(x))[2].numpy()
    assert np.allclose(maps, model.predict(x).maps, rtol=0, atol=1e-4)
    if "generator.size" not in changes:
        assert not np.allclose(maps, plain.predict(x).maps, rtol=0, atol=1e-4)


def test_the_scorer_is_a_copy():
    model = fitted()
    scorer, x = Scorer(model), torch.from_numpy(pictures(1))
    before = scorer(x)[0]
    with torch.no_grad():
        model.detectors_[0].head.bias.add_(5)
    assert torch.equal(scorer(x)[0], before) and not any(p.requires_grad for p in scorer.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, 96, 64, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 96, 96, dtype=torch.uint8),
        torch.zeros(96, 96, 3, dtype=torch.uint8),
        torch.zeros(1, 96, 96, 3),
    ],
)
def test_other_pictures_are_refused(bad):
    with pytest.raises(ValueError, match=r"\(B, 96, 96, 3\) of uint8"):
        Scorer(fitted())(bad)


@pytest.mark.parametrize("n", [1, 3])
def test_onnx_runtime_agrees(exported, n):
    model, path = exported
    assert largest_difference(model, OnnxScorer(path, threads=1), pictures(3)[:n]) < 1e-4


def test_onnx_types_and_batch_of_many(exported):
    model, path = exported
    scores, labels, maps = OnnxScorer(path, threads=1)(pictures(7))
    assert (scores.dtype, labels.dtype, maps.dtype) == (np.float32, np.bool_, np.float32) and maps.shape == (7, 80, 80)
    assert largest_difference(model, OnnxScorer(path, threads=1), pictures(7)) < 1e-4


def test_no_pictures_are_an_error_and_many_go_in_parts(exported, monkeypatch):
    model, path = exported
    with pytest.raises(ValueError, match="there are no pictures"):
        OnnxScorer(path, threads=1)(pictures(3)[:0])
    monkeypatch.setattr(export, "MOST", 2)
    assert largest_difference(model, OnnxScorer(path, threads=1), pictures(7)) < 1e-4


def test_a_label_may_differ_where_the_score_crosses_the_threshold_and_nowhere_else(exported):
    model, offset = exported[0], exported[0].offset_
    try:
        model.offset_ = float(model.score_samples(pictures(3))[0])
        found = model.predict(pictures(3))
        nudged = found.scores + np.array([1e-6, 0, 0])
        wrong = found.labels ^ np.array([False, True, False])
        assert not found.labels[0]
        by_rounding = largest_difference(model, lambda _: (nudged, nudged > model.offset_, found.maps), pictures(3))
        assert by_rounding == pytest.approx(1e-6, rel=1e-3)
        assert largest_difference(model, lambda _: (found.scores, wrong, found.maps), pictures(3)) == np.inf
    finally:
        model.offset_ = offset


def test_a_difference_is_seen(exported):
    model, path = exported
    scorer, x, offset = OnnxScorer(path, threads=1), pictures(3), model.offset_
    try:
        model.offset_ = 1e9
        assert largest_difference(model, scorer, x) == np.inf
    finally:
        model.offset_ = offset
    with torch.no_grad():
        model.detectors_[0].head.bias.add_(1)
    try:
        assert largest_difference(model, scorer, x) > 0.1
    finally:
        with torch.no_grad():
            model.detectors_[0].head.bias.sub_(1)


def test_the_file_says_what_it_is(exported):
    model, path = exported
    import onnx

    proto = onnx.load(path, load_external_data=False)
    meta = {p.key: p.value for p in proto.metadata_props}
    assert meta["kind"] == "grad_nb.Scorer" and int(meta["size"]) == SIZE and float(meta["threshold"]) == model.offset_
    assert json.loads(meta["levels"]) == [[row.level, row.size] for row in model.levels_]
    assert "torch" in json.loads(meta["versions"])
    assert not any(t.external_data for t in proto.graph.initializer)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert proto.opset_import[0].version >= 17 and proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param


def test_export_is_quiet_and_all_or_nothing(tmp_path, capfd, monkeypatch):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name)
    import onnx

    target = tmp_path / "model.onnx"
    target.write_bytes(b"the old file")
    monkeypatch.setattr(onnx.checker, "check_model", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        to_onnx(fitted("mvtec_ad"), target)
    assert target.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [target]
    assert capfd.readouterr() == ("", "")


def test_an_unfitted_model_is_refused(tmp_path):
    with pytest.raises(NotFittedError):
        Scorer(GRAD())
    with pytest.raises(NotFittedError):
        to_onnx(GRAD(), tmp_path / "m.onnx")


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install 'grad_nb\[export\]'"):
        to_onnx(fitted(), tmp_path / "m.onnx")
    fitted().save(tmp_path / "m.grad")
    with pytest.raises(SystemExit) as stop:
        grad_export(str(tmp_path / "m.grad"), str(tmp_path / "m.onnx"))
    assert stop.value.code == 2 and "pip install" in capsys.readouterr().err and not (tmp_path / "m.onnx").exists()


def test_a_wrong_file_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="x.onnx is not an ONNX file"):
        OnnxScorer(tmp_path / "x.onnx")
    with pytest.raises(FileNotFoundError, match="y.onnx"):
        OnnxScorer(tmp_path / "y.onnx")


def test_the_command(tmp_path, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    fitted("mvtec_ad").save(tmp_path / "m.grad")
    grad_export(str(tmp_path / "m.grad"), str(tmp_path / "m.onnx"))
    out = capsys.readouterr().out
    assert "96 x 96 pixels" in out and float(out.strip().rsplit(" ", 1)[1]) < 1e-4
    grad_export(str(tmp_path / "m.grad"), format="torch")
    out = capsys.readouterr().out
    assert str(tmp_path / "m.pt2") in out and float(out.strip().rsplit(" ", 1)[1]) < 1e-4
    before = (tmp_path / "m.grad").read_bytes()
    for wrong in ({"format": "pickle"}, {"output": str(tmp_path / "m.grad")}):
        with pytest.raises(SystemExit) as stop:
            grad_export(str(tmp_path / "m.grad"), **wrong)
        assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
        assert (tmp_path / "m.grad").read_bytes() == before


def test_models_whose_names_differ_by_their_end_have_exports_of_their_own(tmp_path, capsys):
    for name in ("line.1", "line.2", "line.grad"):
        fitted("mvtec_ad").save(tmp_path / name)
        grad_export(str(tmp_path / name), format="torch")
    assert {p.name for p in tmp_path.glob("*.pt2")} == {"line.1.pt2", "line.2.pt2", "line.pt2"}


def test_an_export_goes_over_no_card_and_is_not_made_for_nothing(tmp_path, monkeypatch, capsys):
    fitted("mvtec_ad").save(tmp_path / "m.grad")
    (tmp_path / "m.grad.md").write_text("# GRAD")
    (tmp_path / "kept.pt2").touch(0o444)
    monkeypatch.setattr(GRAD, "load", lambda *_: pytest.fail("loaded"))
    for output, said in (
        ("m.grad.md", "would be overwritten"),
        ("kept.pt2", "write-protected"),
        ("", "it is a folder"),
    ):
        with pytest.raises(SystemExit):
            grad_export(str(tmp_path / "m.grad"), str(tmp_path / output), format="torch")
        assert said in capsys.readouterr().err
    assert (tmp_path / "m.grad.md").read_text() == "# GRAD"


def test_what_an_exported_file_cannot_judge_is_said(tmp_path):
    to_torch(model := fitted("mvtec_ad"), tmp_path / "m.pt2")
    scorer, x = TorchScorer(tmp_path / "m.pt2"), random_pictures(2, 96)
    for wrong, said in (
        (x[0], r"the array is \(96, 96, 3\) of uint8"),
        (x / 255, r"the array is \(2, 96, 96, 3\) of float64"),
        (x[:, :64], r"\(2, 64, 96, 3\)"),
        ([x[0], x[1, :64]], r"picture 1 is \(64, 96, 3\) of uint8"),
    ):
        with pytest.raises(ValueError, match=r"\(B, H, W, 3\) of uint8 of 96 x 96 pixels.*" + said):
            scorer(wrong)
    assert len(scorer(x[:1])[0]) == 1 and np.allclose(scorer(list(x))[0], model.predict(x).scores, atol=1e-4)


def test_weights_beside_a_file_do_not_replace_the_model(tmp_path, capsys):
    fitted("mvtec_ad").save(tmp_path / "m.bin")
    before = (tmp_path / "m.bin").read_bytes()
    with pytest.raises(SystemExit):
        grad_export(str(tmp_path / "m.bin"), str(tmp_path / "m.xml"), format="openvino")
    assert "would be overwritten" in capsys.readouterr().err and (tmp_path / "m.bin").read_bytes() == before


def test_eight_bits_are_small_and_keep_the_order(tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnx

    model, seen = fitted(), pictures(32)
    to_onnx(model, tmp_path / "exact.onnx")
    to_int8(model, tmp_path / "small.onnx", pictures(12, seed=1))
    exact, small = (OnnxScorer(tmp_path / f"{name}.onnx") for name in ("exact", "small"))
    a, b = exact(seen)[0], small(seen)[0]
    assert small.meta.items() >= exact.meta.items()
    assert 0 < np.abs(a - b).max() < a.std() and np.corrcoef(a, b)[0, 1] > 0.95, "rounded, and not by much"
    weights = {t.name: t for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    stored = [t.data_type for name, t in weights.items() if len(t.dims) == 4]
    assert stored.count(onnx.TensorProto.INT8) == 4 * len(model.levels_), "the four large convolutions of every level"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["exact.onnx", "small.onnx"]
    with pytest.raises(ValueError, match="at least one normal picture"):
        to_int8(model, tmp_path / "no.onnx", seen[:0])


def test_the_command_for_eight_bits(tmp_path, capsys):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    fitted("mvtec_ad").save(tmp_path / "m.grad")
    (tmp_path / "good").mkdir()
    for wrong in (
        {"format": "int8"},
        {"normals": str(tmp_path / "good")},
        {"format": "int8", "normals": str(tmp_path / "good")},
    ):
        with pytest.raises(SystemExit) as stop:
            grad_export(str(tmp_path / "m.grad"), **wrong)
        assert stop.value.code == 2 and "normal picture" in capsys.readouterr().err
    for i, x in enumerate(pictures(4)):
        Image.fromarray(x).save(tmp_path / f"good/{i}.png")
    grad_export(str(tmp_path / "m.grad"), str(tmp_path / "m8.onnx"), "int8", str(tmp_path / "good"))
    out = capsys.readouterr().out
    assert "on 4 normal pictures: largest difference of a score" in out and "of 4" not in out.split(" verdict")[1]
    model, small, seen = GRAD.load(tmp_path / "m.grad", "cpu"), OnnxScorer(tmp_path / "m8.onnx"), pictures(4)
    away = np.abs(small(seen)[0] - model.predict(seen).scores).max()
    assert f"score {away:.2g}," in out and f"threshold at {model.offset_:.3f}" in out
    assert "m8.onnx" in out and OnnxScorer(tmp_path / "m8.onnx")(pictures(2))[0].shape == (2,)
    assert len({suffix for suffix, *_ in FORMATS.values()}) == len(FORMATS), "no format overwrites another's export"


@pytest.mark.parametrize("layout", ["mvtec_ad", "mvtec_loco"])
def test_openvino_judges_as_the_model_does(layout, tmp_path, capsys):
    for name in ("onnx", "onnxscript", "openvino"):
        pytest.importorskip(name)
    model = fitted(layout)
    model.save(tmp_path / "m.grad")
    grad_export(str(tmp_path / "m.grad"), format="openvino")
    out = capsys.readouterr().out
    assert str(tmp_path / "m.xml") in out and float(out.strip().rsplit(" ", 1)[1]) < 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.bin", "m.grad", "m.xml"]
    scorer = OpenvinoScorer(tmp_path / "m.xml")
    assert float(scorer.meta["threshold"]) == model.offset_ and scorer.meta["size"] == "96"
    for n in (1, 5):
        assert largest_difference(model, scorer, pictures(n)) < 1e-3
    (tmp_path / "m.bin").rename(tmp_path / "away.bin")
    with pytest.raises(FileNotFoundError, match="m.bin does not exist"):
        OpenvinoScorer(tmp_path / "m.xml")
    (tmp_path / "away.bin").rename(tmp_path / "m.bin")
    (tmp_path / "m.xml").write_text("<net/>")
    with pytest.raises(ValueError, match="m.xml was not made by grad_export"):
        OpenvinoScorer(tmp_path / "m.xml")


@pytest.mark.parametrize("layout", LEVELS)
def test_openvino_in_eight_bits_is_near(layout, tmp_path):
    "Convolutions alone are in eight bits, whatever else a model computes, such as even light."
    for name in ("onnx", "onnxscript", "openvino", "nncf"):
        pytest.importorskip(name)
    import openvino as ov

    model, x = fitted(layout), pictures(8)
    if layout == "mvtec_ad":
        model.light_ = fit_light(pictures(8, seed=2), 2)
    to_openvino(model, tmp_path / "exact.xml")
    to_openvino_int8(model, tmp_path / "small.xml", x)
    exact, rounded = (OpenvinoScorer(tmp_path / name)(x)[0] for name in ("exact.xml", "small.xml"))
    assert 0 < np.abs(exact - rounded).max() < 0.5 * exact.std() + 0.1 * np.abs(exact).max()
    graph = ov.Core().read_model(tmp_path / "small.xml")
    for layer in graph.get_ordered_ops():
        if layer.get_type_name() == "FakeQuantize":
            readers = {reader.get_node().get_type_name() for reader in layer.output(0).get_target_inputs()}
            assert readers == {"Convolution"}, layer.get_friendly_name()
    with pytest.raises(ValueError, match="at least one normal picture"):
        to_openvino_int8(model, tmp_path / "none.xml", x[:0])


def test_without_openvino_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    fitted().save(tmp_path / "m.grad")
    with pytest.raises(SystemExit):
        grad_export(str(tmp_path / "m.grad"), format="openvino")
    assert "pip install 'grad_nb[openvino]'" in capsys.readouterr().err and not (tmp_path / "m.xml").exists()


def trays(n, size=SIZE):
    rng = np.random.default_rng(5)
    return np.stack([draw_tray(rng, size)[0] for _ in range(n)])


@pytest.fixture(scope="module", params=["mvtec_ad", "mvtec_loco"])
def program(request, tmp_path_factory):
    "A model and the torch.export program made of it."
    model, path = fitted(request.param), tmp_path_factory.mktemp("torch") / "model.pt2"
    to_torch(model, path)
    return model, path


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_onnx_runtime_agrees_on_trays(exported, n):
    model, path = exported
    assert largest_difference(model, OnnxScorer(path, threads=1), trays(n)) < 1e-4


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_torch_export_agrees(program, n):
    model, path = program
    scorer = TorchScorer(path)
    assert largest_difference(model, scorer, trays(n)) < 1e-4 and largest_difference(model, scorer, pictures(n)) < 1e-4
    assert float(scorer.meta["threshold"]) == model.offset_ and [p.name for p in path.parent.iterdir()] == ["model.pt2"]


def test_a_file_that_is_no_program_is_named(tmp_path, program):
    (tmp_path / "x.pt2").write_bytes(b"not a program")
    with pytest.raises(ValueError, match="x.pt2 is not a program"):
        TorchScorer(tmp_path / "x.pt2")
    with pytest.raises(FileNotFoundError, match="y.pt2"):
        TorchScorer(tmp_path / "y.pt2")
    other = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.zeros(2),)), other)
    (tmp_path / "z.pt2").write_bytes(other.getvalue())
    with pytest.raises(ValueError, match="z.pt2 was not made by grad_export"):
        TorchScorer(tmp_path / "z.pt2")


def test_onnx_runtime_agrees_on_real_bottles(exported, real_data):
    model, path = exported
    files = [
        p
        for kind in ("good", "broken_large")
        for p in sorted((real_data / "mvtec_ad/bottle/test" / kind).glob("*.png"))[:3]
    ]
    if not files:
        pytest.skip("no bottles in the folder of MVTec pictures")
    for n in (1, len(files)):
        assert largest_difference(model, OnnxScorer(path, threads=1), load_images(files[:n], SIZE)) < 1e-4


def odd_pictures(folder):
    "Pictures of other sizes and kinds, as cameras and people make them."
    x = Image.fromarray(trays(1, 300)[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    x.save(folder / "large.png")
    x.resize((150, 90)).save(folder / "wide.jpg", quality=90, exif=turned)
    x.convert("L").save(folder / "grey.bmp")
    x.quantize(16).save(folder / "palette.png")
    x.resize((96, 96)).save(folder / "same.tif")
    glass = x.convert("RGBA")
    glass.putalpha(Image.linear_gradient("L").resize(glass.size))
    glass.save(folder / "glass.png")
    x.resize((40, 200)).save(folder / "tall.webp")
    deep = np.linspace(0, 65535, 110 * 80).reshape(80, 110).astype(np.uint16)
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(deep).save(folder / "deep.tif")
    x.convert("1").save(folder / "bits.png")
    x.convert("CMYK").save(folder / "print.jpg")
    x.convert("L").save(folder / "keyed.png", transparency=int(np.asarray(x.convert("L")).min()))
    x.convert("LA").save(folder / "la.png")
    return sorted(folder.iterdir())


def without_torch(path, files, *options):
    "The example, in a process in which neither torch nor this package can be imported."
    away = ("torch", "torchvision", "grad_nb", "sklearn", "scipy", "pandas")
    code = (
        f"import runpy, sys\nfor name in {away}: sys.modules[name] = None\n"
        f"runpy.run_path({str(ROOT / 'examples/onnx_only.py')!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *map(str, (path, *files, *options))]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_example_reads_as_the_library_does(tmp_path):
    "To the last bit, whatever the size and kind of a picture; and what one refuses, the other does."
    files = odd_pictures(tmp_path)
    read = runpy.run_path(str(ROOT / "examples/onnx_only.py"))["read"]
    for f in files:
        for size in (64, SIZE):
            assert (read(f, size) == load_images([f], size)[0]).all(), f.name
    ramp = np.tile(np.linspace(0, 4095, 90), (80, 1))
    for name, kind in (("deep.png", np.uint16), ("deep.tif", np.int32), ("real.tif", np.float32)):
        Image.fromarray(ramp.astype(kind)).save(tmp_path / name)
        assert (read(tmp_path / name, SIZE, 4095.0) == read_image(tmp_path / name, SIZE, 4095.0)).all(), name
    for f in broken_pictures(tmp_path):
        for reader in (read, read_image):
            with pytest.raises((OSError, ValueError)):
                reader(f, SIZE)


def broken_pictures(folder):
    "Pictures that nobody can judge."
    (folder / "half.png").write_bytes((folder / "large.png").read_bytes()[:900])
    (folder / "empty.png").touch()
    Image.new("L", (33, 90)).save(folder / "small.png")
    Image.new("F", (64, 64)).save(folder / "float.tif")
    Image.new("I", (64, 64)).save(folder / "whole.tif")
    Image.new("L", (64, 64)).save(folder / "gif.png", "GIF")
    names = ("half.png", "empty.png", "small.png", "float.tif", "whole.tif", "gif.png", "gone.png")
    return [folder / name for name in names]


def test_the_example_runs_without_torch_and_scores_alike(exported, tmp_path):
    "On pictures as they come; a broken one is named and passed over."
    model, path = exported
    (tmp_path / "in").mkdir()
    files = odd_pictures(tmp_path / "in")
    broken = broken_pictures(tmp_path / "in")
    done = without_torch(path, [broken[0], *files, *broken[1:]], "--batch", 3, "--maps", tmp_path / "maps")
    rows, want = list(csv.DictReader(io.StringIO(done.stdout))), model.predict(files)
    assert [r["path"] for r in rows] == [str(f) for f in files]
    assert [r["anomalous"] == "True" for r in rows] == want.labels.tolist()
    assert np.allclose([float(r["score"]) for r in rows], want.scores, rtol=0, atol=1e-4)
    for f, heat in zip(files, want.maps):
        stored = (np.asarray(Image.open(tmp_path / "maps" / f"{f.name}.png")).astype(np.int64) - 32768) / 1000
        assert np.abs(stored - heat).max() < 1e-3
    named = [line.split(" cannot be judged ")[0] for line in done.stderr.splitlines() if " cannot be judged " in line]
    assert done.returncode == 3 and named == list(map(str, broken)) and "Traceback" not in done.stderr
    assert len(list((tmp_path / "maps").iterdir())) == len(files)


def test_the_example_says_what_is_wrong(exported, tmp_path):
    _, path = exported
    Image.fromarray(trays(1)[0]).save(tmp_path / "a.png")
    whole = without_torch(path, [tmp_path / "a.png"])
    assert whole.returncode == 0 and len(whole.stdout.splitlines()) == 2
    for model, options, said in (
        (tmp_path / "gone.onnx", (), "gone.onnx cannot be run"),
        (tmp_path / "a.png", (), "a.png cannot be run"),
        (path, ("--batch", 0), "--batch"),
        (path, (tmp_path / "b/a.png", "--maps", tmp_path), "the same name"),
    ):
        done = without_torch(model, [tmp_path / "a.png"], *options)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr and not done.stdout


@pytest.mark.slow
def test_the_source_package_carries_the_example(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (whole,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(whole) as files:
        assert [n for n in files.getnames() if n.endswith("/examples/onnx_only.py")]
