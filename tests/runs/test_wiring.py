"""What is handed to what: small changes of a line that would leave every shape right and every figure wrong."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from shared import TINY

import grad_nb.core.progress
import grad_nb.grad
import grad_nb.regularizers
import grad_nb.runs.driver
import grad_nb.runs.stages
import grad_nb.study.ablation
import grad_nb.training
from grad_nb.accel.crops import affine_grid, crop_lines, recolour, rotation_matrices
from grad_nb.config import (
    TABLE_7,
    Augmentation,
    DetectorConfig,
    EvalConfig,
    GeneratorConfig,
    Level,
    augmentation,
    override,
    preset,
)
from grad_nb.contrastive import generate, loss_gradients
from grad_nb.coords import coord_map
from grad_nb.core.files import atomic_path, write_array, write_json
from grad_nb.core.loop import one_cycle, run_steps
from grad_nb.core.progress import BARS
from grad_nb.core.stages import run_stage
from grad_nb.datasets.light import even_light
from grad_nb.datasets.readers import load_images
from grad_nb.detector import map_side
from grad_nb.diffusion import alpha_bars
from grad_nb.evaluation import MapStats, fuse
from grad_nb.patchdiff import new_patchdiff
from grad_nb.patches import Batch, allowed_flips, draw_batch, draw_crops, draw_group
from grad_nb.reweighting import noisy_weight, tail_weight
from grad_nb.runs.check import run_bytes, stage_bytes
from grad_nb.runs.driver import last_progress
from grad_nb.runs.stages import evaluate_key

LEVELS = (Level(34, 64, (3, 5)), Level(64, 34, (5, 9)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def run(data, tmp_path):
    "A run with two detectors."
    run = grad_nb.runs.stages.open_run(
        data, "trays", runs=tmp_path, overrides=TINY + " detector.block=1", device="cpu", progress=False
    )
    return replace(run, preset=replace(run.preset, levels_loco=LEVELS))


# ---- the pipeline ---------------------------------------------------------------------------------------------------


def test_maps_are_fused_by_the_statistics_of_held_out_pictures(run, monkeypatch):
    rng, n = np.random.default_rng(0), {"held": 4, "test": len(run.category.test)}
    maps = {
        "held": [
            rng.normal(5 * i, 1 + 9 * i, (4, map_side(row.size), map_side(row.size))).astype(np.float32)
            for i, row in enumerate(LEVELS)
        ],
        "test": [
            rng.normal(0, 1, (n["test"], map_side(row.size), map_side(row.size))).astype(np.float32) for row in LEVELS
        ],
    }
    for kind, of_level in maps.items():
        for row, m in zip(LEVELS, of_level):
            write_array(run.folder / f"scores/{kind}-{row.level:03d}.npy", m)
    for name, made in (
        ("manifest", {}),
        ("provenance", {"seconds": {}}),
        ("trivial", {}),
        ("load_images", None),
        ("pixel_figures", {}),
    ):
        monkeypatch.setattr(grad_nb.runs.stages, name, lambda *a, made=made, **k: made)
    grad_nb.runs.stages._evaluate(run)
    want = fuse(maps["test"], [64, 34], [MapStats.of(m) for m in maps["held"]], 64, run.preset.evaluation)[0]
    assert np.allclose(pd.read_csv(run.folder / "scores.csv").score, want)


def test_a_detector_learns_from_its_own_sets_and_from_no_held_out_picture(run, monkeypatch):
    run, room = replace(run, category=replace(run.category, validation=(), name="bottle")), grad_nb.runs.stages
    (train, held), seen, scored = room.split_normals(run), {}, []
    monkeypatch.setattr(room, "run_stage", lambda folder, name, key, make, device: make()[0])
    monkeypatch.setattr(room, "contrastive_set", lambda run, n: n)
    monkeypatch.setattr(
        room,
        "make_detector",
        lambda folder, normals, sets, row, config, augmentation, *_: (
            seen.update(normals=normals, sets=sets, augmentation=augmentation) or ({"parts": {}}, ["detector"])
        ),
    )
    monkeypatch.setattr(room, "load_detector", lambda path: (None, {}))
    monkeypatch.setattr(
        room, "_score", lambda run, detector, row, samples, light: scored.append(samples) or np.zeros((0, 1, 1))
    )
    monkeypatch.setattr(room, "arithmetic", lambda detectors, sizes, bf16: "int16")
    assert room.detect_stage(run, 64)["products"] == "int16"
    assert (
        seen["sets"] == [5, 9]
        and seen["augmentation"] == augmentation("bottle") != Augmentation()
        and scored == [held, run.category.test]
    )
    assert (
        np.array_equal(seen["normals"], even_light(load_images(train, 64), room.run_light(run)))
        and held
        and len(train) + len(held) == len(run.category.train)
    )


def test_sets_and_their_changes_come_from_the_run_that_made_them(run, monkeypatch):
    other, room, asked = replace(run, made=run.folder / "made"), grad_nb.runs.stages, []
    monkeypatch.setattr(room, "run_stage", lambda folder, name, key, make, device: make()[0])
    monkeypatch.setattr(room, "stage_done", lambda folder, name, key: asked.append(folder) or True)
    monkeypatch.setattr(room, "read_array", lambda path: asked.append(path.parent.parent))
    monkeypatch.setattr(room, "read_changes", lambda folder, levels: asked.append(folder) or "the changes")
    monkeypatch.setattr(room, "normals_in_light", lambda run: asked.append("normals") or ("normals", "light"))
    monkeypatch.setattr(room, "make_detector", lambda *args: asked.append(args[-2]) or ({"parts": {}}, ["detector"]))
    monkeypatch.setattr(room, "load_detector", lambda path: (None, {}))
    lights = []
    monkeypatch.setattr(room, "_score", lambda *args: lights.append(args[-1]) or np.zeros((0, 1, 1)))
    monkeypatch.setattr(room, "arithmetic", lambda detectors, sizes, bf16: "int16")
    room.detect_stage(other, 64)
    assert {place for place in asked if not isinstance(place, str)} == {other.made}
    assert asked.count("normals") == 1 and "the changes" in asked, "training pictures are read once"
    assert lights == ["light", "light"]


def test_a_stage_is_made_again_for_what_it_depends_on_and_for_nothing_else(run):
    keys = lambda r: (
        grad_nb.runs.stages.generate_key(r, 5),
        grad_nb.runs.stages.detect_key(r, 34),
        grad_nb.runs.stages.evaluate_key(r),
    )
    same = lambda other: [a == b for a, b in zip(keys(run), keys(other))]
    change = lambda path, value: replace(run, preset=override(run.preset, {path: value}))
    for other in (
        replace(run, data_sha256="0" * 64),
        replace(run, seed=1),
        change("generator.sigma_g", 0.5),
        replace(run, category=replace(run.category, validation=())),
    ):
        assert same(other) == [False, False, False]
    assert same(change("detector.lr", 0.1)) == [True, False, False] and same(change("evaluation.blur_kernel", 3)) == [
        True,
        True,
        False,
    ]


def test_fit_gives_each_detector_its_own_sets_and_the_augmentation(tmp_path, monkeypatch):
    room, flips, seen = grad_nb.grad, Augmentation(True, True), []
    model = room.GRAD(
        override(preset("demo"), {"levels_loco": LEVELS}), "mvtec_loco", flips, device="cpu", progress=False
    )
    model.levels_ = LEVELS
    monkeypatch.setattr(
        room, "run_stage", lambda folder, name, key, make, device: make() if name.startswith("detector") else {}
    )
    monkeypatch.setattr(room, "read_array", lambda path: path.stem)
    monkeypatch.setattr(room, "load_detector", lambda path: (None, {}))
    monkeypatch.setattr(
        room,
        "make_detector",
        lambda folder, known, sets, row, config, augmentation, *_: seen.append((sets, augmentation)),
    )
    model._train(tmp_path, np.zeros((4, 64, 64, 3), np.uint8), "cpu")
    assert seen == [(["level-03", "level-05"], flips), (["level-05", "level-09"], flips)]


def test_a_generator_is_judged_by_pictures_that_it_has_not_learnt(data, tmp_path, monkeypatch):
    room, seen = grad_nb.study.ablation, []
    made = room.open_ablation(
        data,
        "trays",
        "demo",
        (0,),
        {"a": {"generator.sigma_g": 0.0}},
        TINY,
        tmp_path / "r",
        tmp_path / "a",
        "cpu",
        "share=0.3",
        progress=False,
    )
    cell = room.cells(made)[0]
    monkeypatch.setattr(
        room,
        "make_contrastive",
        lambda folder, normals, *_: seen.append(normals) or (_ for _ in ()).throw(RuntimeError("enough")),
    )
    with pytest.raises(RuntimeError, match="enough"):
        room.judge_generator(cell)
    normals = grad_nb.runs.stages.load_normals(cell.run)
    assert np.array_equal(seen[0], normals[room.selection_split(normals, 0, made.selection)[0]])


def test_a_notebook_that_fails_is_named_with_its_error(run, monkeypatch):
    class Failed:
        returncode = 1

        def __init__(self, *a, **k):
            pass

        def communicate(self, timeout=None):
            return None, "Traceback\nValueError: it broke\n\n"

    monkeypatch.setattr(grad_nb.runs.driver.subprocess, "Popen", Failed)
    values = dict(data="d", category="c", preset="demo", seed=0, runs="r", overrides="", device="cpu")
    with pytest.raises(RuntimeError, match=r"generate-05 failed: ValueError: it broke\n.*notebooks/generate-05.ipynb"):
        grad_nb.runs.driver.run_phase([grad_nb.runs.driver.Task("generate", "generate-05", 5)], run, values)


@pytest.mark.parametrize("cores", [1, 2, 3, 8])
def test_a_notebook_has_the_same_threads_whatever_is_done_already(run, monkeypatch, cores):
    driver = grad_nb.runs.driver
    done: set[str] = set()
    monkeypatch.setattr(driver, "cpu_count", lambda: cores)
    monkeypatch.setattr(driver, "stage_done", lambda folder, name, key: name in done)
    whole = {task.name: task.threads for phase in driver.plan(run) for task in phase}
    assert len(whole) > 3 and min(whole.values()) >= 1
    for left_out in range(1, len(whole)):
        for chosen in combinations(sorted(set(whole) - {"table"}), left_out):
            done = {*chosen}
            left = {task.name: task.threads for phase in driver.plan(run) for task in phase}
            assert left == {name: count for name, count in whole.items() if name not in done}


def test_a_plan_knows_what_the_stages_of_a_run_cost_beside_each_other(run):
    "The table is no detector, and five times the steps take five times as long."
    driver = grad_nb.runs.driver

    def costs(steps):
        preset = replace(run.preset, detector=replace(run.preset.detector, steps=steps))
        return driver.planned(replace(run, preset=preset), driver.plan(run)).costs

    usual, longer = costs(2000), costs(10000)
    assert set(usual) == {task.name for phase in driver.plan(run) for task in phase}
    detector = next(name for name in usual if name.startswith("detect"))
    assert longer[detector] == pytest.approx(5 * usual[detector]) and usual["table"] < 0.2 * usual[detector]
    assert all(longer[name] == usual[name] for name in usual if name.startswith("generate"))


def test_only_the_steps_of_a_loop_say_how_far_a_stage_is(monkeypatch, capsys):
    "Other bars, as that of pictures being read, ran to their end before: the time that was left became hours."
    monkeypatch.setenv(BARS, "1")
    driver = grad_nb.runs.driver
    assert driver.share_shown("reading pictures:  70%|#######   | 236/335 [00:01<00:00, 213.25it/s]") is None
    monkeypatch.setattr(grad_nb.core.progress, "DELAY", 0.0)
    run_steps(lambda i: torch.zeros(1), 4, ["loss"], {}, label="detector-34")
    shown = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "%|" in line]
    assert shown and driver.share_shown(shown[0]) == 0.0 and driver.share_shown(shown[-1]) == 1.0


# ---- the detector's training ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noisy, tail", [(True, False), (False, True)])
def test_each_switch_of_a_training_is_that_of_its_equation(noisy, tail):
    z_pos, z_neg, pos, neg = (torch.randn(n, 13, generator=seeded(n)) for n in (8, 24, 20, 21))
    learner = grad_nb.training.Learner(
        DetectorConfig(width=0.05, patches=8, beta_density=3.0, noisy_reweighting=noisy, tail_reweighting=tail), 5
    )
    learner.banks["pos"].push(pos)
    learner.banks["neg"].push(neg)
    w_pos, w_neg = grad_nb.training.weights(learner, z_pos, z_neg)
    assert torch.allclose(w_neg, noisy_weight(z_neg, pos, 3.0) if noisy else tail_weight(z_neg, neg, 3.0))
    assert torch.allclose(w_pos, tail_weight(z_pos, pos, 3.0) if tail else torch.full((8,), 1 / 8))


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_each_noise_goes_where_it_belongs_and_f_is_the_one_asked_for(monkeypatch, micro_batch):
    noises, of, room, rules = set(), set(), grad_nb.training, grad_nb.regularizers
    real, penalty = rules.noised, rules.gradient_penalty
    for place in (room, rules):
        monkeypatch.setattr(
            place, "noised", lambda x, sigma, g: noises.add((x.shape[1] == 5, sigma)) or real(x, sigma, g)
        )
    monkeypatch.setattr(room, "gradient_penalty", lambda d, x, how="logit": of.add(how) or penalty(d, x, how))
    config = DetectorConfig(width=0.05, patches=8, sigma_c=0.2, sigma_z=0.4, penalise="probability", bf16=False)
    batch = Batch(torch.randn(24, 5, 34, 34, generator=seeded(1)), 8)
    room.batch_gradients(room.Learner(config, 5), batch, micro_batch)
    assert noises == {(True, 0.2), (False, 0.4)} and of == {"probability"}


# ---- patches --------------------------------------------------------------------------------------------------------


def test_normal_and_generated_pictures_have_a_jitter_of_their_own():
    grey, at = np.full((2, 40, 40, 3), 100, np.uint8), 100 / 127.5 - 1
    batch = draw_batch(
        grey,
        [grey],
        DetectorConfig(),
        Augmentation(rotation=0.0, jitter_p=1.0, jitter_normal=0.0, jitter_generated=0.5),
        seeded(),
    )
    away = lambda x: (x[:, :3] - at).abs().amax((1, 2, 3))
    assert (
        away(batch.positives).max() < 1e-3
        and away(batch.negatives[:128]).max() < 1e-3 < away(batch.negatives[128:]).min()
    )


def test_a_recolouring_by_hand():
    x, means = torch.rand(6, 3, 4, 4, generator=seeded(1)) * 2 - 1, torch.tensor([-0.3, 0.1, 0.6])
    factors, want = torch.tensor([[0.7, 1.2, 1.4], [1.3, 0.6, 0.8], [0.5, 1.5, 0.9]]), []
    for i, patch in enumerate((x.numpy() + 1) / 2):
        b, c, s = factors[:, i // 2].numpy()
        pivot = b * (float(means[i // 2]) + 1) / 2
        v = np.clip(pivot + c * (np.clip(b * patch, 0, 1) - pivot), 0, 1)
        grey = np.tensordot([0.299, 0.587, 0.114], v, 1)
        want.append(2 * np.clip(grey + s * (v - grey), 0, 1) - 1)
    assert np.allclose(recolour(x.clone(), means, factors), np.stack(want), atol=1e-5)


def test_each_crop_is_turned_by_the_matrix_of_its_picture():
    angles, chances = 60 * torch.rand(4, generator=seeded()) - 30, torch.rand(2, 4, generator=seeded(3))
    A = rotation_matrices(angles, allowed_flips(chances, Augmentation(True, True)))
    x, y = (crop_lines(torch.randint(20, (16,), generator=seeded(k)), 7, 40) for k in (1, 2))
    grid = torch.stack([x[:, None, :].expand(-1, 7, -1), y[:, :, None].expand(-1, -1, 7)], -1)
    assert torch.allclose(
        affine_grid(x, y, A), torch.einsum("bij,bhwj->bhwi", A.repeat_interleave(4, 0), grid), atol=1e-6
    )


def test_a_group_draws_its_numbers_in_one_order_so_that_old_seeds_keep_their_batches():
    data, config, generator = (
        np.arange(5 * 40 * 40 * 3).astype(np.uint8).reshape(5, 40, 40, 3),
        DetectorConfig(patches=16),
        seeded(3),
    )
    both = Augmentation(True, True)
    plan, n = draw_crops(data, config, both, 0.5, False, seeded(3)), config.pictures
    draw = lambda high, count: torch.randint(high, (count,), generator=generator)
    assert np.array_equal(plan.pictures, data[draw(5, n)])
    assert all(torch.equal(row, draw(7, 16)) for row in plan.corners), "the first rows, then the first columns"
    chances = [torch.rand(n, generator=generator) for _ in range(7)]
    assert torch.equal(plan.angles, -5 + 10 * chances[0]) and torch.equal(plan.flips, torch.stack(chances[1:3]) < 0.5)
    expected = torch.stack([torch.where(chances[3] < 0.2, 0.5 + chance, 1.0) for chance in chances[4:]])
    assert torch.equal(plan.factors, expected), "whether, then brightness, contrast, saturation"
    assert all(torch.equal(row, draw(7, 16)) for row in plan.given)


@pytest.mark.parametrize("axis", [0, 1])
def test_wrong_coordinates_are_wrong_along_both_axes(axis):
    y, x = np.mgrid[:80, :80]
    ramp = np.stack([3 * x, 3 * y, 0 * x], -1).astype(np.uint8)[None].repeat(2, 0)
    crops = draw_group(
        ramp, DetectorConfig(patches=1024), Augmentation(rotation=0.0, jitter_p=0.0), 0.0, False, seeded()
    )
    assert abs(np.corrcoef(crops[:, axis, 0, 0], crops[:, 3 + axis, 0, 0])[0, 1]) < 0.15


# ---- the generator --------------------------------------------------------------------------------------------------


def test_the_times_that_are_visited_have_the_spacing_of_the_settings():
    config = GeneratorConfig(size=16, width=8, n_samples=1, sample_steps=5, spacing=2.0, bf16=False)
    model, seen = new_patchdiff(5, config), []
    model.register_forward_pre_hook(lambda m, given: seen.append(int(given[1][0])))
    generate(model, config, progress=False)
    assert seen == [999, 562, 250, 62, 0]


def test_the_weights_of_the_times_weigh_the_gradients():
    config, x = GeneratorConfig(width=8, bf16=False), torch.randn(4, 3, 16, 16, generator=seeded(1))

    def gradients(weight):
        model = new_patchdiff(5, config)
        torch.nn.init.normal_(model.out.weight, generator=seeded(9))
        loss_gradients(
            model,
            lambda t, loss: torch.full_like(loss, weight),
            x,
            coord_map(16, 16),
            alpha_bars(),
            config,
            seeded(),
            4,
        )
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert (
        torch.allclose(gradients(3.0), 3 * gradients(1.0), rtol=1e-3, atol=1e-5) and gradients(1.0).abs().max() > 1e-2
    )


@pytest.mark.parametrize(
    "config", [GeneratorConfig(weight_decay=0.03, lr=0.02), DetectorConfig(weight_decay=0.03, lr=0.02)]
)
def test_the_optimiser_has_the_rate_and_the_decay_of_the_settings(config):
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer, _ = one_cycle(parameters, 10, config.lr, config.warm_up, config.weight_decay)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["weight_decay"] == 0.03 and group["max_lr"] == 0.02
    if isinstance(config, DetectorConfig):
        (group,) = grad_nb.training.Learner(config, 10).optimizer.param_groups
        assert group["weight_decay"] == 0.03 and group["max_lr"] == 0.02


# ---- the paper ------------------------------------------------------------------------------------------------------


def test_the_values_that_the_paper_gives():
    assert {n: [(r.level, r.size, r.generators) for r in rows] for n, rows in TABLE_7.items()} == {
        "mvtec_ad": [(34, 256, (5, 9, 13))],
        "mvtec_loco": [(34, 256, (5, 9, 13)), (68, 128, (5, 9, 13)), (136, 64, (9, 13, 17))],
    }
    names = (
        "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood zipper "
        "breakfast_box screw_bag pushpins splicing_connectors juice_bottle"
    ).split()
    both = "bottle carpet grid hazelnut leather screw tile wood zipper screw_bag pushpins splicing_connectors".split()
    flips = {n: (augmentation(n).vertical_flip, augmentation(n).horizontal_flip) for n in names}
    assert flips == {n: (n in both, n in both or n in ("toothbrush", "transistor")) for n in names}
    a, g, d = Augmentation(), GeneratorConfig(), DetectorConfig()
    assert (a.rotation, a.jitter_p, a.jitter_normal, a.jitter_generated) == (5, 0.2, 0.05, 0.5)
    assert (g.T, g.sigma_g, g.lr, g.weight_decay, g.steps, g.n_samples, g.sample_steps, g.fourier) == (
        1000,
        0.02,
        1e-3,
        1e-4,
        10_000,
        1000,
        1000,
        0,
    )
    assert (d.epochs, d.pictures, d.patches, d.bank_size, d.lr, d.width, d.block) == (
        2000,
        4,
        128,
        512,
        1e-3,
        1.0,
        1,
    ) and EvalConfig().blur_kernel == 16


def test_the_last_line_of_a_long_log_is_found_at_its_end(tmp_path):
    log = tmp_path / "log"
    assert last_progress(log) == ""
    log.write_bytes(
        "é".encode()[1:] + b"stage:   1%|  | 1/100 [00:01]\r" * 100_000 + b"stage:  99%|##| 99/100 [01:00]\r"
    )
    assert last_progress(log) == "stage:  99%|##| 99/100 [01:00]"
    log.write_bytes(b"\n")
    assert last_progress(log) == ""


def test_room_for_pictures_is_that_of_their_checkpoint_too():
    for name, channels in (("paper", 3), ("demo", 4)):
        generator = preset(name).generator
        assert (generator.start == 1) == (channels == 3)
        written = generator.n_samples * generator.size**2 * channels
        assert 2 * written < stage_bytes("generate", preset(name), 0) < 2 * written + 50_000_000


def test_a_row_of_table_4_needs_no_room_for_the_pictures_of_its_run(run, tmp_path):
    row = replace(run, folder=tmp_path / "row", made=run.folder)
    assert run_bytes(row) == stage_bytes("variant", run.preset, len(run.category.test))
    write_json(row.folder / "evaluate.json", {"fingerprint": "of other settings"})
    assert run_bytes(row) > 0
    write_json(row.folder / "evaluate.json", {"fingerprint": evaluate_key(row)})
    assert run_bytes(row) == 0


def test_a_stage_leaves_files_that_another_process_writes(tmp_path):
    with atomic_path(tmp_path / "table4/row/.detector-034.checkpoint") as temporary:
        temporary.write_bytes(b"half")
        run_stage(tmp_path, "detect-034", "key", lambda: ({}, []))
    assert (tmp_path / "table4/row/.detector-034.checkpoint").read_bytes() == b"half"
