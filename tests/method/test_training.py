"""Training: repeatable, killable, and every part can be switched off."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from shared import PLAIN, pictures, seeded
from shared import same_weights as same
from torch import nn

from grad_nb import contrastive, training
from grad_nb.accel import fast
from grad_nb.beyond import Muon
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig
from grad_nb.contrastive import draw_pictures, generate, train_patchdiff
from grad_nb.coords import coord_map
from grad_nb.core import files, loop
from grad_nb.core.loop import one_cycle
from grad_nb.core.tensors import load_checkpoint, read_tensors, write_tensors
from grad_nb.diffusion import to_model
from grad_nb.evaluation import image_auroc, score_maps
from grad_nb.patchdiff import load_patchdiff, new_patchdiff, save_patchdiff
from grad_nb.patches import draw_batch
from grad_nb.training import LOGGED, Learner, batch_gradients, batches_of, train_detector, training_steps

TINY = GeneratorConfig(size=16, width=8, steps=12, batch=4, n_samples=5, sample_steps=6, sample_batch=2, bf16=False)
SMALL = DetectorConfig(width=0.05, steps=8, patches=8, bf16=False)


def global_state():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def no_parts(folder):
    return not [p.name for p in folder.iterdir() if p.suffix == ".part"]


# --- the same seed gives the same weights ---------------------------------------------------------------------------


def test_patchdiff_training_depends_on_its_seed_alone():
    data = pictures(6, 16)
    a, history = train_patchdiff(data, 5, TINY, 0, progress=False)
    torch.manual_seed(1234)
    np.random.seed(1234)  # what the caller does with the global generators does not matter
    b, again = train_patchdiff(data, 5, TINY, 0, progress=False)
    c, _ = train_patchdiff(data, 5, TINY, 1, progress=False)
    assert same(a, b) and history.equals(again) and not same(a, c)
    assert len(history) == TINY.steps and list(history.columns) == ["loss"] and not a.training


def test_generating_depends_on_its_seed_alone():
    model = new_patchdiff(5, TINY)
    made = generate(model, TINY, 0, progress=False)
    torch.manual_seed(1234)
    assert (generate(model, TINY, 0, progress=False) == made).all()
    assert (generate(model, TINY, 1, progress=False) != made).any()
    assert made.shape == (5, 16, 16, 3) and made.dtype == np.uint8
    assert all((made[i] != made[j]).any() for i in range(5) for j in range(i)), "five pictures, not one"


def test_detector_training_depends_on_its_seed_and_stage_alone():
    run = lambda seed, stage="detector": train_detector(
        pictures(4, 40), [pictures(3, 40, 1)], SMALL, Augmentation(), seed, stage, progress=False
    )
    a, history = run(0)
    torch.manual_seed(1234)
    np.random.seed(1234)
    b, again = run(0)
    assert same(a, b) and history.equals(again) and not same(a, run(1)[0]) and not same(a, run(0, "detector-68")[0])
    assert (
        list(history.columns) == list(LOGGED)
        and len(history) == 8
        and np.isfinite(history.to_numpy()).all()
        and not a.training
    )


def test_a_memory_map_an_array_and_a_tensor_train_the_same_detector(tmp_path):
    files.write_array(tmp_path / "n.npy", pictures(4, 40))
    files.write_array(tmp_path / "c.npy", pictures(3, 40, 1))
    config = replace(SMALL, steps=3)
    runs = [
        train_detector(n, [c], config, Augmentation(), progress=False)[0]
        for n, c in (
            (pictures(4, 40), pictures(3, 40, 1)),
            (files.read_array(tmp_path / "n.npy"), files.read_array(tmp_path / "c.npy")),
            (torch.from_numpy(pictures(4, 40)), torch.from_numpy(pictures(3, 40, 1))),
        )
    ]
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])


def test_no_training_touches_the_global_generators():
    before = global_state()
    model, _ = train_patchdiff(pictures(3, 16), 5, replace(TINY, steps=3), progress=False)
    generate(model, TINY, progress=False)
    train_detector(pictures(3, 40), [pictures(3, 40, 1)], replace(SMALL, steps=2), Augmentation(), progress=False)
    after = global_state()
    assert torch.equal(before[0], after[0]) and (before[1] == after[1]).all() and before[2] == after[2]


def test_first_weights_do_not_seed_the_gpus(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    new_patchdiff(5, TINY)
    Learner(SMALL, 3)
    assert not seeded


def test_first_weights_depend_on_seed_and_level():
    first = lambda level, seed: new_patchdiff(level, TINY, seed).stem.weight
    assert (
        torch.equal(first(5, 0), first(5, 0))
        and not torch.equal(first(5, 0), first(9, 0))
        and not torch.equal(first(5, 0), first(5, 1))
    )


# --- kill and resume ------------------------------------------------------------------------------------------------

KILLED = GeneratorConfig(size=16, width=8, steps=420, batch=2, timestep_weighting=0.75, bf16=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A training that was killed with SIGKILL after its first checkpoint, its continuation, and an undisturbed one."
    folder = tmp_path_factory.mktemp("killed")
    checkpoint = folder / "c.safetensors"
    script = textwrap.dedent(f"""
        import sys, numpy as np, torch
        from grad_nb.config import GeneratorConfig
        from grad_nb.contrastive import train_patchdiff
        torch.set_num_threads({torch.get_num_threads()})
        data = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
        config = GeneratorConfig(size=16, width=8, steps=420, batch=2, timestep_weighting=0.75, bf16=False)
        train_patchdiff(data, 5, config, 7, checkpoint=sys.argv[1], progress=False)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, str(checkpoint)])
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    alive = child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    code = child.wait()
    assert alive and code == -signal.SIGKILL and checkpoint.exists(), "the child was killed in the middle"
    parts = [p for p in folder.iterdir() if p.suffix == ".part"]  # one only if it was killed while it wrote
    done = read_tensors(checkpoint)[1]["state"]["done"]
    steps, loss = [], contrastive.denoising_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "denoising_losses", lambda *args: (steps.append(1), loss(*args))[1])
        resumed = train_patchdiff(pictures(6, 16), 5, KILLED, 7, checkpoint=checkpoint, progress=False)
    whole = train_patchdiff(pictures(6, 16), 5, KILLED, 7, progress=False)
    return SimpleNamespace(folder=folder, done=done, steps=len(steps), resumed=resumed, whole=whole, parts=parts)


def test_after_a_kill_only_the_missing_steps_are_made(killed):
    assert killed.done in (200, 400) and killed.steps == 420 - killed.done


def test_after_a_kill_the_history_before_the_checkpoint_is_kept(killed):
    assert len(killed.resumed[1]) == 420 and killed.resumed[1][: killed.done].equals(killed.whole[1][: killed.done])
    assert killed.resumed[1].loss[killed.done] == killed.whole[1].loss[killed.done], (
        "weights and random numbers are those of the checkpoint"
    )


def test_after_a_kill_the_final_weights_are_bit_equal(killed):
    assert same(killed.resumed[0], killed.whole[0]) and killed.resumed[1].equals(killed.whole[1])


def test_after_a_kill_and_a_resume_no_new_part_is_left(killed):
    assert [p for p in killed.folder.iterdir() if p.suffix == ".part"] == killed.parts


class Killed(RuntimeError):
    pass


DATA = dict(normal=pictures(4, 40), contrastive=[pictures(3, 40, 1)])


def detector_run(monkeypatch, checkpoint=None, stop=None, config=SMALL, seed=0, data=DATA, augmentation=PLAIN):
    "Train with a checkpoint at every third step; raise before step `stop`. The result and the number of steps made."
    made = []

    def steps_until(step, *args, **kwargs):
        def counted(i):
            if len(made) == stop:
                raise Killed
            made.append(i)
            return step(i)

        return loop.run_steps(counted, *args, every=3, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_steps", steps_until)
        try:
            result = train_detector(
                data["normal"], data["contrastive"], config, augmentation, seed, checkpoint=checkpoint, progress=False
            )
        except Killed:
            result = None, None
    return *result, len(made)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_detector_is_bit_equal(monkeypatch, tmp_path, optimizer):
    config = replace(SMALL, optimizer=optimizer)
    whole, history, _ = detector_run(monkeypatch, config=config)
    assert detector_run(monkeypatch, tmp_path / "c", stop=5, config=config)[0] is None
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c", config=config)
    assert steps == 5 and same(whole, resumed) and history.equals(again)


def test_muon_moves_matrices_by_their_directions_and_the_rest_as_adamw_does():
    torch.manual_seed(0)
    muon, adamw = (nn.Linear(6, 1) for _ in range(2))
    adamw.load_state_dict(muon.state_dict())
    optimisers = (
        Muon(muon.parameters(), lr=0.01, weight_decay=0.1),
        torch.optim.AdamW(adamw.parameters(), 0.01, betas=(0.95, 0.999), weight_decay=0.1),
    )
    for net, optimiser in zip((muon, adamw), optimisers):
        for i in range(5):
            optimiser.zero_grad()
            (net(torch.full((3, 6), float(i))) ** 2).sum().backward()
            optimiser.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(muon.parameters(), adamw.parameters())), "one output"
    matrix = nn.Parameter(torch.zeros(4, 3, 2, 2))
    optimiser = Muon([matrix], lr=1.0, weight_decay=0.0)
    matrix.grad = 1e-6 * torch.randn(4, 3, 2, 2)
    optimiser.step()
    values = torch.linalg.svdvals(matrix.detach().reshape(4, 12)) / (0.2 * 12**0.5)
    assert values.min() > 0.5 and values.max() < 1.3, "every direction as far, however small the gradient"
    with pytest.raises(ValueError, match="adamw"):
        replace(SMALL, optimizer="sgd")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_detector_without_coordinates_learns_nothing_from_them(monkeypatch, optimizer):
    config = replace(SMALL, optimizer=optimizer, coordinates=False, wrong_coordinates=False)
    one, _, _ = detector_run(monkeypatch, config=config)
    weight = next(one.parameters()).detach()
    assert not weight[:, 3:].any() and weight[:, :3].any()
    learner = Learner(config, 4)
    moves = []
    for scale in (1.0, 100.0):
        again = Learner(config, 4)
        again.detector.load_state_dict(learner.detector.state_dict())
        weight = next(again.detector.parameters())
        weight.grad = torch.ones_like(weight)
        weight.grad[:, 3:] *= scale
        again.forget_places()
        again.optimizer.step()
        moves.append(weight.detach() - next(learner.detector.parameters()).detach())
    assert torch.equal(*moves) and moves[0][:, :3].any(), "whatever the gradient of the places is"


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_detector_whose_batches_are_drawn_together_resumes_bit_for_bit(monkeypatch, tmp_path, stop):
    alone, _, _ = detector_run(monkeypatch)
    monkeypatch.setattr(fast, "depth", lambda device: 4)
    whole, history, _ = detector_run(monkeypatch)
    detector_run(monkeypatch, tmp_path / "c", stop=stop)
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c")
    assert steps == 8 - stop // 3 * 3 and same(whole, resumed) and history.equals(again) and not same(whole, alone)


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_resumed_detector_makes_the_missing_steps_from_the_right_place(monkeypatch, tmp_path, stop):
    whole, history, _ = detector_run(monkeypatch)
    detector_run(monkeypatch, tmp_path / "c", stop=stop)
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c")
    done = stop // 3 * 3
    assert steps == 8 - done and len(again) == 8
    assert again[: done + 1].equals(history[: done + 1]), (
        "weights, banks and random numbers are those of the checkpoint"
    )
    assert no_parts(tmp_path)


def test_the_checkpoint_holds_banks_random_numbers_and_schedule(monkeypatch, tmp_path):
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "Learner", lambda *args: made.append(Learner(*args)) or made[-1])
        detector_run(monkeypatch, tmp_path / "c", stop=6)
        first = made[-1]
        state = {k: loop._state_of(v) for k, v in first.state.items()}
        detector_run(monkeypatch, tmp_path / "c", stop=0)  # restores, then makes no step
        second = made[-1]
    assert second is not first and torch.equal(second.generator.get_state(), state["generator"])
    for name in ("pos", "neg"):
        assert (
            torch.equal(second.banks[name].features, first.banks[name].features)
            and len(second.banks[name].features) > 0
        )
    assert second.schedule.get_last_lr() == first.schedule.get_last_lr() and second.schedule.last_epoch == 6
    assert same(second.detector, first.detector) and same(second.decoder, first.decoder)


def test_the_moments_of_the_optimiser_keep_their_layout(monkeypatch, tmp_path):
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "Learner", lambda *args: made.append(Learner(*args)) or made[-1])
        detector_run(monkeypatch, tmp_path / "c", stop=6)
        detector_run(monkeypatch, tmp_path / "c", stop=0)
    for learner in made:
        for p, moments in learner.optimizer.state.items():
            assert moments["exp_avg"].stride() == p.stride() and moments["exp_avg_sq"].stride() == p.stride()


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1),
        dict(config=replace(SMALL, beta_density=1.5)),
        dict(config=replace(SMALL, lr=2e-3)),
        dict(augmentation=replace(PLAIN, horizontal_flip=True)),
        dict(data=DATA | dict(normal=pictures(4, 40, 9))),
        dict(data=DATA | dict(contrastive=[pictures(3, 40, 9)])),
        dict(data=DATA | dict(contrastive=[pictures(3, 40, 1)] * 2)),
    ],
    ids=["seed", "beta", "lr", "augmentation", "normal", "contrastive", "number of sets"],
)
def test_a_checkpoint_of_another_detector_training_is_ignored(monkeypatch, tmp_path, change):
    detector_run(monkeypatch, tmp_path / "c", stop=5)
    fresh, history, _ = detector_run(monkeypatch, **change)
    got, again, steps = detector_run(monkeypatch, tmp_path / "c", **change)
    assert steps == 8 and same(fresh, got) and history.equals(again)


@pytest.mark.parametrize(
    "change",
    [dict(seed=1), dict(config=replace(TINY, sigma_g=0.03)), dict(level=9), dict(data=pictures(6, 16, 9))],
    ids=["seed", "config", "level", "pictures"],
)
def test_a_checkpoint_of_another_patchdiff_training_is_ignored_and_said(monkeypatch, tmp_path, change, caplog):
    monkeypatch.setattr(contrastive, "run_steps", partial(loop.run_steps, every=5))
    settings = dict(data=pictures(6, 16), level=5, config=TINY, seed=0)
    run = lambda c, data, level, config, seed: train_patchdiff(data, level, config, seed, checkpoint=c, progress=False)
    run(tmp_path / "c", **settings)
    assert (tmp_path / "c").exists()
    fresh, history = run(None, **settings | change)
    assert not caplog.messages
    got, again = run(tmp_path / "c", **settings | change)
    assert same(fresh, got) and history.equals(again)
    assert ["begun with other pictures or settings" in said for said in caplog.messages] == [True]


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "other file"])
def test_a_damaged_checkpoint_is_ignored_and_said_and_not_fatal(monkeypatch, tmp_path, damage, caplog):
    path = tmp_path / "c"
    detector_run(monkeypatch, path, stop=5)
    whole = path.read_bytes()
    if damage == "other file":
        write_tensors(path, {"a": torch.zeros(3)}, {"kind": "Detector"})
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(256)) * 40}[damage])
    fresh, _, _ = detector_run(monkeypatch)
    got, _, steps = detector_run(monkeypatch, path)
    assert steps == 8 and same(fresh, got) and no_parts(tmp_path)
    assert any("cannot be read, and begins anew" in said for said in caplog.messages)


def test_a_checkpoint_is_made_by_whole_trainings_too_and_can_be_read(monkeypatch, tmp_path):
    detector_run(monkeypatch, tmp_path / "c")
    meta = read_tensors(tmp_path / "c")[1]
    assert meta["state"]["done"] == 6 and load_checkpoint(tmp_path / "c", meta["fingerprint"])["done"] == 6


@pytest.fixture
def prefetcher(monkeypatch):
    "(depth, seed=0) → the batches of a training, `depth` of them drawn at once as on a GPU."

    def made(depth, config=replace(SMALL, pictures=2, patches=8), seed=0):
        greys = np.arange(0, 180, 20, dtype=np.uint8)[:, None, None, None]
        plain = np.zeros((9, 40, 40, 3), np.uint8) + greys  # nine plain pictures
        learner = SimpleNamespace(config=config, device=torch.device("cpu"), generator=seeded(seed))
        monkeypatch.setattr(fast, "depth", lambda device: depth)
        return batches_of(learner, plain, [plain], PLAIN, seeded(seed))

    return made


def test_batches_that_are_drawn_together_are_batches_like_others(prefetcher):
    together, alone = prefetcher(3), prefetcher(1)
    assert (together.depth, alone.depth, together.groups, alone.groups) == (3, 1, 3, 3)
    seen = []
    for i in range(7):
        together.prepare(i)
        alone.prepare(i)
        patches, like = together.batch(), alone.batch()
        assert patches.shape == like.shape == (24, 5, 34, 34)
        assert patches.is_contiguous(memory_format=torch.channels_last)
        for group in patches.split(8):
            assert len(group[:, 0].mean((1, 2)).round(decimals=3).unique()) <= 2, "two pictures for a group"
        seen.append(patches.clone())
        assert patches.data_ptr() == together.now.data_ptr()
    assert not any(torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_batches_that_are_drawn_together_go_on_after_a_kill(prefetcher, stop):
    whole, killed, resumed, seen = prefetcher(3), prefetcher(3), prefetcher(3, seed=9), []
    for i in range(7):
        whole.prepare(i)
        seen.append(whole.batch().clone())
    for i in range(stop):
        killed.prepare(i)
    resumed.load_state_dict(killed.state_dict())
    for i in range(stop, 7):
        resumed.prepare(i)
        assert torch.equal(resumed.batch(), seen[i])


@pytest.mark.gpu
def test_on_a_gpu_a_training_resumes_bit_for_bit(monkeypatch, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    monkeypatch.setattr(training, "train_detector", partial(train_detector, device="cuda"))
    monkeypatch.setitem(globals(), "train_detector", partial(train_detector, device="cuda"))
    monkeypatch.setattr(training, "pause_of", lambda device: 0.0)
    whole, history, _ = detector_run(monkeypatch)
    detector_run(monkeypatch, tmp_path / "c", stop=5)
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c")
    assert steps == 5 and len(again) == 8
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_restored_bank_is_used_on_the_device_of_the_features():
    "The meta device stands in for the GPU."
    from grad_nb.reweighting import MemoryBank

    bank = MemoryBank(4)
    bank.load_state_dict({"features": torch.zeros(4, 2)})
    z = torch.zeros(3, 2, device="meta")
    assert bank.or_else(z).device == z.device


# --- what it learns -------------------------------------------------------------------------------------------------


def toy(n, rough, seed, side=42):
    "Smooth grey ramps with a random direction; the rough ones have noise on them."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    phi = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    ramp = (
        128
        + 100 * (np.cos(phi) * x + np.sin(phi) * y)[..., None]
        + rng.normal(0, 30 if rough else 0, (n, side, side, 3))
    )
    return np.clip(ramp, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("block", [1, 2])
def test_a_detector_tells_smooth_from_noisy(block):
    config = DetectorConfig(width=0.1, steps=60, patches=16, block=block, wrong_coordinates=False, lr=3e-3, bf16=False)
    detector, history = train_detector(toy(12, False, 0), [toy(12, True, 1)], config, PLAIN, progress=False)
    scores = score_maps(detector, np.concatenate([toy(10, False, 2), toy(10, True, 3)]), 42).max((1, 2))
    assert image_auroc(scores, [0] * 10 + [1] * 10) == 1.0
    assert history.rbce[-5:].mean() < 0.5 * history.rbce[0]


def test_a_detector_learns_the_place_from_wrong_coordinates():
    "Left half dark, right half bright: a picture turned around is right everywhere but for its place."
    half = np.zeros((6, 60, 60, 3), np.uint8)
    half[:, :, 30:] = 255
    config = DetectorConfig(width=0.1, steps=80, patches=16, lr=3e-3, alpha_2=0.0, bf16=False)
    detector, _ = train_detector(half, [], config, PLAIN, progress=False)
    normal, turned = score_maps(detector, np.stack([half[0], half[0, :, ::-1]]), 60)
    assert (turned[:, 0] > normal[:, 0].max()).all() and (turned[:, -1] > normal[:, -1].max()).all()


def test_patchdiff_learns_to_denoise():
    data = np.full((4, 16, 16, 3), 200, np.uint8)
    config = replace(TINY, steps=150, lr=3e-3, n_samples=4, sample_steps=50)
    model, history = train_patchdiff(data, 5, config, progress=False)
    assert history.loss[-30:].mean() < 0.35 < history.loss[:5].mean()
    assert generate(model, config, progress=False).mean() > 150, "towards the 200 of its pictures; noise has 128"


@pytest.mark.parametrize(
    "off",
    [
        dict(alpha_1=0.0),
        dict(alpha_2=0.0),
        dict(alpha_1=0.0, alpha_2=0.0),
        dict(noisy_reweighting=False),
        dict(tail_reweighting=False),
        dict(noisy_reweighting=False, tail_reweighting=False),
        dict(wrong_coordinates=False),
        dict(penalise="probability"),
        dict(block=2, patches=16),
        dict(bank_size=1),
        dict(bank_size=7),
        dict(sigma_c=0.0, sigma_z=0.0),
        dict(steps=1),
        dict(steps=0, epochs=2),
        dict(bf16=True),
    ],
    ids=str,
)
def test_every_part_can_be_switched(off):
    config = replace(SMALL, **{"steps": 3} | off)
    data = pictures(4, 50), [pictures(3, 50, 1), pictures(3, 50, 2)]
    _, history = train_detector(*data, config, Augmentation(), progress=False)
    assert len(history) == training_steps(config, 4) and np.isfinite(history.to_numpy()).all()
    assert (history.feat > 0).all() == bool(config.alpha_1) and (history.grad > 0).all() == bool(config.alpha_2)
    assert ((history.ess_neg > 0) & (history.ess_neg <= 1 + 1e-5)).all() and (
        (history.ess_pos > 0) & (history.ess_pos <= 1 + 1e-5)
    ).all()
    assert np.allclose(
        history.loss, history.rbce + config.alpha_1 * history.feat + config.alpha_2 * history.grad, rtol=1e-5
    )
    if not config.noisy_reweighting and not config.tail_reweighting:
        assert np.allclose(history[["ess_pos", "ess_neg"]], 1)


def test_block_4_runs():
    _, history = train_detector(
        pictures(4, 50),
        [pictures(3, 50, 1)],
        replace(SMALL, steps=2, patches=64, block=4),
        Augmentation(),
        progress=False,
    )
    assert len(history) == 2 and np.isfinite(history.to_numpy()).all()


def test_banks_hold_the_features_of_the_latest_steps():
    learner = Learner(replace(SMALL, bank_size=20, alpha_1=0.0, alpha_2=0.0), 5)
    latest = []
    for seed in range(3):
        batch = draw_batch(*DATA.values(), learner.config, PLAIN, seeded(seed))
        with torch.no_grad():
            latest.append(learner.detector.features(batch.positives).flatten(1))
        batch_gradients(learner, batch)
    assert torch.allclose(learner.banks["pos"].features, torch.cat(latest)[-20:], atol=1e-5)
    assert len(learner.banks["neg"].features) == 20 and not learner.banks["neg"].features.requires_grad


def test_weights_carry_no_gradient():
    "With constant logits the loss must not change the features: only the weights could carry a gradient there."
    learner = Learner(replace(SMALL, alpha_1=0.0, alpha_2=0.0), 5)
    with torch.no_grad():
        learner.detector.head.weight.zero_()
    batch_gradients(learner, draw_batch(*DATA.values(), SMALL, PLAIN, seeded()))
    assert all((p.grad == 0).all() for p in learner.detector.body.parameters())
    assert (learner.detector.head.weight.grad != 0).any()


def test_a_step_changes_detector_and_decoder_by_one_optimiser():
    learner = Learner(SMALL, 5)
    ids = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert ids == {id(p) for net in (learner.detector, learner.decoder) for p in net.parameters()}


def test_an_epoch_is_a_quarter_of_the_pictures():
    assert training_steps(DetectorConfig(), 209) == 104_500 and training_steps(DetectorConfig(steps=7), 209) == 7
    assert training_steps(DetectorConfig(epochs=1), 1) == 1


def test_the_learning_rate_is_a_one_cycle(monkeypatch):
    learner = Learner(replace(SMALL, lr=1e-2), 100)
    rates = []
    for _ in range(100):
        rates.append(learner.schedule.get_last_lr()[0])
        learner.optimizer.step()
        learner.schedule.step()
    peak = int(np.argmax(rates))
    assert max(rates) == pytest.approx(1e-2, rel=1e-2) and 20 < peak < 40 and rates[0] < 5e-4 and rates[-1] < 1e-4
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()


# --- crops and files of PatchDiff -----------------------------------------------------------------------------------


def test_crops_of_patchdiff_carry_their_own_coordinates():
    coords = coord_map(16, 16)
    named = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)  # a pixel names its place
    data = torch.from_numpy(np.broadcast_to(named, (3, 16, 16, 3)).copy())
    x, places = draw_pictures(data, coords, 50, 6, seeded())
    assert x.shape == (50, 3, 6, 6) and places.shape == (50, 2, 6, 6)
    name = ((x[:, 0] + 1) * 127.5).round().long()
    assert torch.allclose(places[:, 0], coords[0].flatten()[name])
    assert torch.allclose(places[:, 1], coords[1].flatten()[name])
    corners = {int(p) for p in name[:, 0, 0]}
    assert corners <= {16 * r + c for r in range(11) for c in range(11)} and len(corners) > 20
    whole, places = draw_pictures(data, coords, 5, 0, seeded())
    assert whole.shape == (5, 3, 16, 16) and places is coords
    assert torch.equal(whole, to_model(data[:1]).expand(5, -1, -1, -1))


def test_a_saved_patchdiff_makes_the_same_pictures_and_other_files_are_refused(tmp_path):
    model = new_patchdiff(5, TINY)
    with torch.no_grad():
        model.out.weight.add_(0.1)
    save_patchdiff(tmp_path / "g.safetensors", model)
    assert (
        generate(load_patchdiff(tmp_path / "g.safetensors"), TINY, progress=False)
        == generate(model, TINY, progress=False)
    ).all()
    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "Detector"})
    with pytest.raises(ValueError, match="other.safetensors"):
        load_patchdiff(tmp_path / "other.safetensors")


@pytest.mark.parametrize("warm_up, peak", [(0.0, 0), (0.1, 9), (0.3, 29), (0.6, 59)])
def test_the_rate_peaks_when_it_is_told(warm_up, peak):
    optimizer, schedule = one_cycle([torch.nn.Parameter(torch.zeros(1))], 100, 0.1, warm_up)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert (
        int(np.argmax(rates)) == peak
        and max(rates) == pytest.approx(0.1, rel=1e-3)
        and rates[-1] == pytest.approx(0.1 / 250_000)
    )


@pytest.mark.parametrize("warm_up, steps", [(0, 10), (0.1, 10), (0.5, 2), (0.01, 100), (0.99, 3), (0.3, 1)])
def test_any_warm_up_has_a_schedule(warm_up, steps):
    optimizer, schedule = one_cycle([torch.nn.Parameter(torch.zeros(1))], steps, 0.1, warm_up)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(max(steps, 2) - 1):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert all(0 < rate <= 0.1 + 1e-9 for rate in rates) and rates[-1] == pytest.approx(0.1 / 250_000)


def test_the_first_weights_are_he_s_or_torch_s():
    learners = [Learner(DetectorConfig(width=0.25, init=init), 4) for init in ("he", "torch")]
    he, default = (learner.detector.body[4].requires_grad_(False) for learner in learners)
    fan = he.weight[0].numel()
    assert float(he.weight.std()) == pytest.approx((2 / fan) ** 0.5, rel=0.05) and not he.bias.any()
    assert float(default.weight.std()) == pytest.approx((1 / fan / 3) ** 0.5, rel=0.05) and default.bias.any()
