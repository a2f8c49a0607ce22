"""nbs/00_one_sitting.ipynb is the method in its shortest form: does it agree with the package, does it find defects?"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shared import ROOT, seeded

from grad_nb import diffusion, regularizers, reweighting
from grad_nb.beyond import timesteps
from grad_nb.config import EvalConfig
from grad_nb.coords import with_coords
from grad_nb.detector import Decoder, Detector
from grad_nb.evaluation import gaussian_baseline, nearest_baseline, pixel_map
from grad_nb.patchdiff import PatchDiff, bounding_box

NOTEBOOK = ROOT / "nbs" / "00_one_sitting.ipynb"
ALLOWED = {"matplotlib", "numpy", "pandas", "torch", "sklearn"}  # and three modules of grad_nb


def code_cells(path: Path = NOTEBOOK) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    "What Python sees of a cell: no directives of nbdev, no commands of IPython."
    return "\n".join(line for line in "".join(cell["source"]).splitlines() if not line.startswith(("#|", "%")))


def stored_auroc(path: Path) -> dict[str, float]:
    "The figures that the notebook printed, by method."
    for cell in code_cells(path):
        for output in cell["outputs"]:
            text = "".join(output.get("data", {}).get("text/plain", ""))
            if text.startswith("{'GRAD'"):
                return ast.literal_eval(text)
    raise AssertionError(f"{path} has no AUROC among its outputs")


@pytest.fixture(scope="module")
def book() -> SimpleNamespace:
    "The definitions of the notebook: its imports, tables, functions and classes, but nothing that it computes."
    names: dict = {}
    for cell in code_cells():
        tree = ast.parse(source(cell))
        simple = [
            n for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
        ]
        if all(
            isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") in ("TABLE_8", "TABLE_9", "alpha_bar")
            for n in simple
        ):
            exec(compile(tree, str(NOTEBOOK), "exec"), names)
    return SimpleNamespace(**names)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def test_it_is_short_enough_to_be_read_in_one_sitting():
    lines = [line for cell in code_cells() for line in "".join(cell["source"]).splitlines()]
    code = [line for line in lines if line.strip() and not line.startswith("#|")]
    assert len(code) <= 200 and max(map(len, code)) <= 120
    for cell in code_cells():
        starts = [node.lineno for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.stmt)]
        assert len(starts) == len(set(starts)), source(cell)  # one statement a line


def test_it_imports_the_trays_the_plots_and_the_metrics_alone():
    for cell in code_cells():
        for node in ast.walk(ast.parse(source(cell))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                ours = name in ("grad_nb.datasets.trays", "grad_nb.plots", "grad_nb.metrics")
                assert ours or name.split(".")[0] in ALLOWED, name


def test_its_outputs_are_stored():
    data = [out.get("data", {}) for cell in code_cells() for out in cell["outputs"]]
    assert not any(out["output_type"] == "error" for cell in code_cells() for out in cell["outputs"])
    assert sum(any(kind.startswith("image/") for kind in d) for d in data) >= 8
    assert NOTEBOOK.stat().st_size < 2.5e6
    auroc = stored_auroc(NOTEBOOK)
    assert auroc["GRAD"] >= 0.85 and auroc["GRAD"] == max(auroc.values()) and len(auroc) == 3


def test_cells_that_compute_for_long_are_flagged():
    for cell in code_cells():
        text = "".join(cell["source"])
        computes = re.search(r"^[^#\n]*(models|contrastive|detector|history|scores|%config)\b", text, re.M)
        defines = re.search(r"^(def|class) ", text, re.M)
        assert defines or not computes or text.startswith("#| slow"), text


def test_the_schedule_and_the_noised_picture(book):
    torch.testing.assert_close(book.alpha_bar, diffusion.alpha_bars())
    x_0, eps_1, eps_g, t = (
        randn(3, 3, 8, 8),
        randn(3, 3, 8, 8, seed=1),
        randn(3, 3, 1, 1, seed=2),
        torch.tensor([0, 7, 999]),
    )
    torch.testing.assert_close(
        book.q_sample(x_0, t, eps_1, eps_g), diffusion.q_sample(x_0, t, eps_1, diffusion.alpha_bars(), eps_g)
    )


def test_pictures_and_coordinates(book):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 10, 10, 3), np.uint8)
    x = book.to_model(pictures)
    torch.testing.assert_close(x, diffusion.to_model(torch.from_numpy(pictures)))
    assert (book.to_bytes(x) == pictures).all() and (book.to_bytes(9 * x) == diffusion.to_bytes(9 * x)).all()
    torch.testing.assert_close(book.with_coords(x), with_coords(x))


def test_the_reverse_step(book):
    x_t, eps_hat, z = (randn(2, 3, 8, 8, seed=seed) for seed in range(3))
    for a_t, a_s in ((0.2, 0.5), (0.9, 1.0)):
        args = x_t, eps_hat, z, a_t, a_s
        torch.testing.assert_close(book.reverse_step(*args), diffusion.reverse_step.reference(*args))


def twin(model: torch.nn.Module, level: int) -> PatchDiff:
    "The package's PatchDiff with the weights of the notebook's."
    depth, theirs = (level - 5) // 4, PatchDiff(level, 16, 3, field_of="bottleneck")
    weights = {}
    for name, value in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "deep":
            k, _, rest = rest.partition(".")
            part, rest = ("bottleneck", f"{k}.{rest}") if int(k) < depth else ("decoder", f"{int(k) - depth}.{rest}")
        linear = part in ("up", "merge", "out") or rest.endswith("out.weight")
        weights[f"{part}.{rest}"] = value.flatten(1) if linear and value.ndim == 4 else value
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and all("norm." in name or name.endswith("out.bias") for name in missing)
    return theirs


@pytest.mark.parametrize("level", [5, 17])
def test_its_patchdiff_is_the_package_s(book, level):
    torch.manual_seed(level)
    model = book.PatchDiff(level)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, t = with_coords(randn(2, 3, 24, 24)), torch.tensor([3, 800])
    theirs = twin(model, level)
    torch.testing.assert_close(model(x, t), theirs(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", [5, 9, 17])
def test_its_bottleneck_sees_n_pixels_and_the_network_2n_minus_1(book, level):
    torch.manual_seed(0)
    model = book.PatchDiff(level, width=4)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    down = (level - 5) // 4
    last = model.deep[down - 1] if down else model.down
    seen = {}
    last.register_forward_hook(lambda module, inputs, output: seen.update(h=output))
    x = book.with_coords(randn(1, 3, 60, 60)).requires_grad_()
    out = model(x, torch.tensor([500]))
    for y, side in ((seen["h"][0, :, 15, 15], level), (out[0, :, 30, 30], 2 * level - 1)):
        (gradient,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        top, bottom, left, right = bounding_box((gradient[0] != 0).any(0).numpy())
        assert (bottom - top + 1, right - left + 1) == (side, side)


def test_it_visits_the_times_of_the_package(book):
    visited = []

    def model(x, t):
        visited.append(int(t[0]))
        return torch.zeros(len(x), 3, 64, 64)

    pictures = book.sample(model, 1, seeded())
    assert visited == timesteps(1000, 15, 1.5) and pictures.shape == (1, 3, 64, 64)


def test_crops_keep_their_coordinates_and_wrong_places_do_not(book):
    x = with_coords(randn(3, 3, 96, 96))
    batch = book.draw_batch(x, [x, x], 5, seeded())
    assert batch.shape == (20, 5, 38, 38)
    where = {tuple(c[:, 0, 0].tolist()): i for i, c in enumerate(x[0, 3:].permute(1, 2, 0).reshape(-1, 2, 1, 1))}
    for i, patch in enumerate(batch):
        row, column = divmod(where[tuple(patch[3:, 0, 0].tolist())], 96)
        there = x[:, :3, row : row + 38, column : column + 38]
        assert (5 <= i < 10) != any(torch.equal(patch[:3], rgb) for rgb in there)


@pytest.fixture(scope="module")
def pair(book) -> tuple:
    "The notebook's detector and decoder, and the package's with the same weights."
    torch.manual_seed(0)
    nets = book.convolutions(book.TABLE_8), book.convolutions(book.TABLE_9)
    theirs = Detector(0.25), Decoder(64)
    for net, other in zip(nets, theirs):
        other.load_state_dict(dict(zip(other.state_dict(), net.state_dict().values())))
    return *nets, *theirs


def test_its_detector_is_table_8(pair):
    detector, _, theirs, _ = pair
    x = randn(2, 5, 96, 96)
    assert detector(x).shape == (2, 1, 16, 16)
    torch.testing.assert_close(detector(x), theirs(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(detector[:-1](x), theirs.features(x), rtol=1e-4, atol=1e-5)


def test_the_weights_of_equations_1_and_2(book):
    z_pos, z_neg, bank_pos, bank_neg = (randn(n, 64, seed=n) for n in (16, 48, 100, 101))
    w_pos, w_neg = book.weights(z_pos, z_neg, bank_pos, bank_neg, 2.0)
    torch.testing.assert_close(w_pos, reweighting.tail_weight(z_pos, bank_pos, 2.0))
    torch.testing.assert_close(w_neg, reweighting.negative_weight(z_neg, bank_pos, bank_neg, 2.0))
    product = reweighting.noisy_weight(z_neg, bank_pos, 2.0) * reweighting.tail_weight(z_neg, bank_neg, 2.0)
    torch.testing.assert_close(w_neg, product / product.sum())


def test_equation_3(book):
    args = randn(16), randn(48, seed=1), torch.softmax(randn(16, seed=2), 0), torch.softmax(randn(48, seed=3), 0)
    torch.testing.assert_close(book.reweighted_bce(*args), reweighting.reweighted_bce(*args))
    f_pos, f_neg = args[0].sigmoid(), args[1].sigmoid()
    by_hand = -(args[2] * (1 - f_pos).log()).sum() - (args[3] * f_neg.log()).sum()
    torch.testing.assert_close(book.reweighted_bce(*args), by_hand)


def test_equation_5(book, pair):
    detector, decoder, theirs, their_decoder = pair
    c = randn(4, 5, 34, 34)
    found = book.feature_loss(detector, decoder, c, seeded(), sigma=0.0)  # both draw noise, in another order
    expected = regularizers.feature_loss(theirs, their_decoder, c, 0.0, 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(book.feature_loss(detector, decoder, c, seeded()), found, rtol=0.3, atol=0.0)


def test_equation_6(book, pair):
    detector, _, theirs, _ = pair
    c = randn(4, 5, 34, 34)
    torch.testing.assert_close(
        book.gradient_penalty(detector, c), regularizers.gradient_penalty(theirs, c), rtol=1e-4, atol=1e-6
    )


def test_its_map_is_the_package_s(book):
    cells = randn(2, 16, 16)
    expected = pixel_map(cells, 96, 96, config=EvalConfig(placement="geometry"))
    torch.testing.assert_close(book.pixel_map(cells[:, None]), expected, rtol=1e-4, atol=1e-4)


def test_its_baselines_are_the_package_s():
    rng = np.random.default_rng(0)
    normal, test = (rng.integers(0, 256, (n, 64, 64, 3), np.uint8) for n in (400, 264))
    (cell,) = (source(cell) for cell in code_cells() if "cdist" in source(cell))
    names = dict(normal=normal, test=test, torch=torch)
    exec(cell, names)
    np.testing.assert_allclose(names["gaussian"], gaussian_baseline(normal, test))
    np.testing.assert_allclose(names["nearest"] / np.sqrt(64 * 64 * 3), nearest_baseline(normal, test), rtol=1e-6)


@pytest.mark.slow
def test_it_finds_the_defects(tmp_path):
    command = [sys.executable, "-m", "jupyter", "nbconvert", "--to", "notebook", "--execute", str(NOTEBOOK)]
    options = ["--output-dir", str(tmp_path), "--ExecutePreprocessor.timeout=3600"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, *options], check=True, env=environment)
    auroc = stored_auroc(tmp_path / NOTEBOOK.name)
    assert auroc["GRAD"] >= 0.85
    assert auroc["GRAD"] > max(auroc["per-pixel Gaussian"], auroc["nearest tray"])
