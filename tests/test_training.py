"""Training: repeatable, killable, and every part can be switched off."""
import functools
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from grad_nb import patchdiff, store, training
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig
from grad_nb.evaluation import image_auroc, score_maps
from grad_nb.patchdiff import (
    draw_pictures,
    generate,
    load_patchdiff,
    new_patchdiff,
    one_cycle,
    save_patchdiff,
    to_model,
    train_patchdiff,
)
from grad_nb.store import load_checkpoint, read_tensors, write_tensors
from grad_nb.training import LOGGED, Learner, batch_losses, train_detector, training_steps

PLAIN = Augmentation(rotation=0.0, jitter_p=0.0)
TINY = GeneratorConfig(size=16, width=8, steps=12, batch=4, n_samples=5, sample_steps=6, sample_batch=2, bf16=False)
SMALL = DetectorConfig(width=0.05, steps=8, patches=8, bf16=False)


def pictures(n, side, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), np.uint8)


def weights_of(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def global_state():
    return torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()


def no_parts(folder):
    return not [p.name for p in folder.iterdir() if p.suffix == ".part"]


# --- the same seed gives the same weights ---------------------------------------------------------------------------

def test_patchdiff_training_depends_on_its_seed_alone():
    data = pictures(6, 16)
    a, history = train_patchdiff(data, 5, TINY, 0, progress=False)
    torch.manual_seed(1234); np.random.seed(1234)  # what the caller does with the global generators does not matter
    b, again = train_patchdiff(data, 5, TINY, 0, progress=False)
    c, _ = train_patchdiff(data, 5, TINY, 1, progress=False)
    assert same(a, b) and history.equals(again) and not same(a, c)
    assert len(history) == TINY.steps and list(history.columns) == ["loss"] and not a.training


def test_generating_depends_on_its_seed_alone():
    model = new_patchdiff(5, TINY)
    made = generate(model, TINY, 0, progress=False)
    torch.manual_seed(1234)
    assert (generate(model, TINY, 0, progress=False) == made).all() and (generate(model, TINY, 1, progress=False) != made).any()
    assert made.shape == (5, 16, 16, 3) and made.dtype == np.uint8
    assert all((made[i] != made[j]).any() for i in range(5) for j in range(i)), "five pictures, not one"


def test_detector_training_depends_on_its_seed_and_stage_alone():
    run = lambda seed, stage="detector": train_detector(pictures(4, 40), [pictures(3, 40, 1)], SMALL, Augmentation(), seed, stage, progress=False)
    a, history = run(0)
    torch.manual_seed(1234); np.random.seed(1234)
    b, again = run(0)
    assert same(a, b) and history.equals(again) and not same(a, run(1)[0]) and not same(a, run(0, "detector-68")[0])
    assert list(history.columns) == list(LOGGED) and len(history) == 8 and np.isfinite(history.to_numpy()).all() and not a.training


def test_a_memory_map_an_array_and_a_tensor_train_the_same_detector(tmp_path):
    store.write_array(tmp_path / "n.npy", pictures(4, 40)); store.write_array(tmp_path / "c.npy", pictures(3, 40, 1))
    config = replace(SMALL, steps=3)
    runs = [train_detector(n, [c], config, Augmentation(), progress=False)[0] for n, c in (
        (pictures(4, 40), pictures(3, 40, 1)),
        (store.read_array(tmp_path / "n.npy"), store.read_array(tmp_path / "c.npy")),
        (torch.from_numpy(pictures(4, 40)), torch.from_numpy(pictures(3, 40, 1))))]
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
    new_patchdiff(5, TINY); Learner(SMALL, 3)
    assert not seeded


def test_first_weights_depend_on_seed_and_level():
    first = lambda level, seed: new_patchdiff(level, TINY, seed).stem.weight
    assert torch.equal(first(5, 0), first(5, 0)) and not torch.equal(first(5, 0), first(9, 0)) and not torch.equal(first(5, 0), first(5, 1))


# --- kill and resume ------------------------------------------------------------------------------------------------

KILLED = GeneratorConfig(size=16, width=8, steps=420, batch=2, balance=0.75, bf16=False)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "A training that was killed with SIGKILL after its first checkpoint, its continuation, and one that was never disturbed."
    folder = tmp_path_factory.mktemp("killed")
    checkpoint = folder / "c.safetensors"
    script = textwrap.dedent(f"""
        import sys, numpy as np, torch
        from grad_nb.config import GeneratorConfig
        from grad_nb.patchdiff import train_patchdiff
        torch.set_num_threads({torch.get_num_threads()})
        data = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), np.uint8)
        train_patchdiff(data, 5, GeneratorConfig(size=16, width=8, steps=420, batch=2, balance=0.75, bf16=False), 7, checkpoint=sys.argv[1], progress=False)
    """)
    child = subprocess.Popen([sys.executable, "-c", script, str(checkpoint)])
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < deadline: time.sleep(0.005)
    alive = child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    code = child.wait()
    assert alive and code == -signal.SIGKILL and checkpoint.exists(), "the child was killed in the middle"
    parts = [p for p in folder.iterdir() if p.suffix == ".part"]  # one only if it was killed while it wrote
    done = read_tensors(checkpoint)[1]["state"]["done"]
    steps, loss = [], patchdiff.denoising_losses
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patchdiff, "denoising_losses", lambda *args: (steps.append(1), loss(*args))[1])
        resumed = train_patchdiff(pictures(6, 16), 5, KILLED, 7, checkpoint=checkpoint, progress=False)
    whole = train_patchdiff(pictures(6, 16), 5, KILLED, 7, progress=False)
    return SimpleNamespace(folder=folder, done=done, steps=len(steps), resumed=resumed, whole=whole, parts=parts)


def test_after_a_kill_only_the_missing_steps_are_made(killed):
    assert killed.done in (200, 400) and killed.steps == 420 - killed.done


def test_after_a_kill_the_history_before_the_checkpoint_is_kept(killed):
    assert len(killed.resumed[1]) == 420 and killed.resumed[1][: killed.done].equals(killed.whole[1][: killed.done])
    assert killed.resumed[1].loss[killed.done] == killed.whole[1].loss[killed.done], "weights and random numbers are those of the checkpoint"


def test_after_a_kill_the_final_weights_are_bit_equal(killed):
    assert same(killed.resumed[0], killed.whole[0]) and killed.resumed[1].equals(killed.whole[1])


def test_after_a_kill_and_a_resume_no_new_part_is_left(killed):
    assert [p for p in killed.folder.iterdir() if p.suffix == ".part"] == killed.parts


class Killed(RuntimeError):
    pass


DATA = dict(normal=pictures(4, 40), contrastive=[pictures(3, 40, 1)])


def detector_run(monkeypatch, checkpoint=None, stop=None, config=SMALL, seed=0, data=DATA, augmentation=PLAIN):
    "Train with a checkpoint at every third step; raise before step `stop`. The result and the number of steps made."
    drawn, draw = [], training.draw_batch

    def stopping(*args):
        if len(drawn) == stop: raise Killed
        drawn.append(1)
        return draw(*args)

    with monkeypatch.context() as patch:
        patch.setattr(training, "run_steps", functools.partial(store.run_steps, every=3))
        patch.setattr(training, "draw_batch", stopping)
        try: result = train_detector(data["normal"], data["contrastive"], config, augmentation, seed, checkpoint=checkpoint, progress=False)
        except Killed: result = None, None
    return *result, len(drawn)


def test_a_resumed_detector_is_bit_equal(monkeypatch, tmp_path):
    whole, history, _ = detector_run(monkeypatch)
    assert detector_run(monkeypatch, tmp_path / "c", stop=5)[0] is None
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c")
    assert steps == 5 and same(whole, resumed) and history.equals(again)


@pytest.mark.parametrize("stop", [2, 3, 5, 7])
def test_a_resumed_detector_makes_the_missing_steps_from_the_right_place(monkeypatch, tmp_path, stop):
    whole, history, _ = detector_run(monkeypatch)
    detector_run(monkeypatch, tmp_path / "c", stop=stop)
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c")
    done = stop // 3 * 3
    assert steps == 8 - done and len(again) == 8
    assert again[: done + 1].equals(history[: done + 1]), "weights, banks and random numbers are those of the checkpoint"
    assert no_parts(tmp_path)


def test_the_checkpoint_holds_banks_random_numbers_and_schedule(monkeypatch, tmp_path):
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(training, "Learner", lambda *args: made.append(Learner(*args)) or made[-1])
        detector_run(monkeypatch, tmp_path / "c", stop=6)
        first = made[-1]
        state = {k: store._state_of(v) for k, v in first.state.items()}
        detector_run(monkeypatch, tmp_path / "c", stop=0)  # restores, then makes no step
        second = made[-1]
    assert second is not first and torch.equal(second.generator.get_state(), state["generator"])
    for name in ("pos", "neg"):
        assert torch.equal(second.banks[name].features, first.banks[name].features) and len(second.banks[name].features) > 0
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


@pytest.mark.parametrize("change", [
    dict(seed=1),
    dict(config=replace(SMALL, beta_density=1.5)),
    dict(config=replace(SMALL, lr=2e-3)),
    dict(augmentation=replace(PLAIN, horizontal_flip=True)),
    dict(data=DATA | dict(normal=pictures(4, 40, 9))),
    dict(data=DATA | dict(contrastive=[pictures(3, 40, 9)])),
    dict(data=DATA | dict(contrastive=[pictures(3, 40, 1)] * 2)),
], ids=["seed", "beta", "lr", "augmentation", "normal", "contrastive", "number of sets"])
def test_a_checkpoint_of_another_detector_training_is_ignored(monkeypatch, tmp_path, change):
    detector_run(monkeypatch, tmp_path / "c", stop=5)
    fresh, history, _ = detector_run(monkeypatch, **change)
    got, again, steps = detector_run(monkeypatch, tmp_path / "c", **change)
    assert steps == 8 and same(fresh, got) and history.equals(again)


@pytest.mark.parametrize("change", [dict(seed=1), dict(config=replace(TINY, sigma_g=0.03)), dict(level=9), dict(data=pictures(6, 16, 9))],
                         ids=["seed", "config", "level", "pictures"])
def test_a_checkpoint_of_another_patchdiff_training_is_ignored(monkeypatch, tmp_path, change):
    monkeypatch.setattr(patchdiff, "run_steps", functools.partial(store.run_steps, every=5))
    settings = dict(data=pictures(6, 16), level=5, config=TINY, seed=0)
    run = lambda c, data, level, config, seed: train_patchdiff(data, level, config, seed, checkpoint=c, progress=False)
    run(tmp_path / "c", **settings)
    assert (tmp_path / "c").exists()
    fresh, history = run(None, **settings | change)
    got, again = run(tmp_path / "c", **settings | change)
    assert same(fresh, got) and history.equals(again)


@pytest.mark.parametrize("damage", ["half", "empty", "noise", "other file"])
def test_a_damaged_checkpoint_is_ignored_and_not_fatal(monkeypatch, tmp_path, damage):
    path = tmp_path / "c"
    detector_run(monkeypatch, path, stop=5)
    whole = path.read_bytes()
    if damage == "other file": write_tensors(path, {"a": torch.zeros(3)}, {"kind": "Detector"})
    else: path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "noise": bytes(range(256)) * 40}[damage])
    fresh, _, _ = detector_run(monkeypatch)
    got, _, steps = detector_run(monkeypatch, path)
    assert steps == 8 and same(fresh, got) and no_parts(tmp_path)


def test_a_checkpoint_is_made_by_whole_trainings_too_and_can_be_read(monkeypatch, tmp_path):
    detector_run(monkeypatch, tmp_path / "c")
    meta = read_tensors(tmp_path / "c")[1]
    assert meta["state"]["done"] == 6 and load_checkpoint(tmp_path / "c", meta["fingerprint"])["done"] == 6


def supply(several, config=replace(SMALL, pictures=2, patches=8), seed=0):
    shades = [np.full((9, 40, 40, 3), 0, np.uint8) + np.arange(0, 180, 20, dtype=np.uint8)[:, None, None, None] for _ in range(2)]  # nine plain pictures
    return training.Supply(shades[0], shades[1:], config, PLAIN, torch.Generator().manual_seed(seed), several)


def test_batches_that_are_drawn_together_are_batches_like_others():
    together, alone = supply(3), supply(1)
    seen = []
    for i in range(7):
        together.prepare(i); alone.prepare(i)
        batch, like = together.batch(), alone.batch()
        assert batch.patches.shape == like.patches.shape == (24, 5, 34, 34) and len(batch.positives) == 8 and batch.patches.is_contiguous(memory_format=torch.channels_last)
        for group in batch.patches.split(8): assert len(group[:, 0].mean((1, 2)).round(decimals=3).unique()) <= 2, "two pictures for a group"
        seen.append(batch.patches.clone())
        assert batch.patches.data_ptr() == together.now.data_ptr()
    assert not any(torch.equal(a, b) for k, a in enumerate(seen) for b in seen[:k])


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_batches_that_are_drawn_together_go_on_after_a_kill(stop):
    whole, killed, resumed, seen = supply(3), supply(3), supply(3, seed=9), []
    for i in range(7): whole.prepare(i); seen.append(whole.batch().patches.clone())
    for i in range(stop): killed.prepare(i)
    resumed.load_state_dict(killed.state_dict())
    for i in range(stop, 7):
        resumed.prepare(i)
        assert torch.equal(resumed.batch().patches, seen[i])


@pytest.mark.gpu
def test_on_a_gpu_a_training_resumes_bit_for_bit(monkeypatch, tmp_path):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    monkeypatch.setattr(training, "train_detector", functools.partial(train_detector, device="cuda"))
    monkeypatch.setitem(globals(), "train_detector", functools.partial(train_detector, device="cuda"))
    monkeypatch.setattr(training, "pause_of", lambda device: 0.0)
    whole, history, _ = detector_run(monkeypatch)
    detector_run(monkeypatch, tmp_path / "c", stop=5)
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c")
    assert steps == 5 and len(again) == 8 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights_of(whole).values(), weights_of(resumed).values()))


def test_a_restored_bank_is_used_on_the_device_of_the_features():
    "The meta device stands in for the GPU."
    from grad_nb.reweighting import MemoryBank
    bank = MemoryBank(4)
    bank.load_state_dict({"features": torch.zeros(4, 2)})
    z = torch.zeros(3, 2, device="meta")
    assert bank.or_else(z).device == z.device


@pytest.mark.parametrize("switch", [dict(ema=0.9), dict(ess_target=0.5)], ids=str)
def test_the_switches_are_off_by_default_do_something_and_survive_a_kill(monkeypatch, tmp_path, switch):
    config = replace(SMALL, **switch)
    plain, whole, history = detector_run(monkeypatch)[0], *detector_run(monkeypatch, config=config)[:2]
    detector_run(monkeypatch, tmp_path / "c", stop=5, config=config)
    resumed, again, steps = detector_run(monkeypatch, tmp_path / "c", config=config)
    assert steps == 5 and same(whole, resumed) and history.equals(again) and not same(plain, whole)


def test_a_mean_of_weights_is_what_a_training_gives(monkeypatch):
    means, mean_of = [], training.WeightEMA
    monkeypatch.setattr(training, "WeightEMA", lambda *args: means.append(mean_of(*args)) or means[-1])
    model, _ = train_detector(DATA["normal"], DATA["contrastive"], replace(SMALL, ema=0.5), PLAIN, progress=False)
    assert means[0].steps == SMALL.steps and all(torch.equal(w, means[0].mean[name]) for name, w in model.state_dict().items())
    generator, _ = train_patchdiff(pictures(6, 16), 5, replace(TINY, ema=0.5), progress=False)
    last, _ = train_patchdiff(pictures(6, 16), 5, TINY, progress=False)
    assert not same(generator, last) and all(torch.isfinite(w).all() for w in generator.state_dict().values())


def test_a_target_moves_beta_towards_it():
    learner = Learner(replace(SMALL, ess_target=0.9, beta_density=20.0, alpha_1=0.0, alpha_2=0.0), 5)
    share = []
    for seed in range(40):
        batch = training.draw_batch(*DATA.values(), learner.config, PLAIN, torch.Generator().manual_seed(seed))
        share.append(float(batch_losses(learner, batch)[1]["ess_neg"]))
    assert (learner.beta.value < 20) == (np.mean(share[:3]) < 0.9) and abs(np.mean(share[-5:]) - 0.9) < abs(np.mean(share[:3]) - 0.9)


# --- what it learns -------------------------------------------------------------------------------------------------

def toy(n, rough, seed, side=42):
    "Smooth grey ramps with a random direction; the rough ones have noise on them."
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    phi = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    ramp = 128 + 100 * (np.cos(phi) * x + np.sin(phi) * y)[..., None] + rng.normal(0, 30 if rough else 0, (n, side, side, 3))
    return np.clip(ramp, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("block", [1, 2])
def test_a_detector_tells_smooth_from_noisy(block):
    config = DetectorConfig(width=0.1, steps=60, patches=16, block=block, wrong_coordinates=False, lr=3e-3, shared_pass=True, bf16=False)
    detector, history = train_detector(toy(12, False, 0), [toy(12, True, 1)], config, PLAIN, progress=False)
    scores = score_maps(detector, np.concatenate([toy(10, False, 2), toy(10, True, 3)]), 42).max((1, 2))
    assert image_auroc(scores, [0] * 10 + [1] * 10) == 1.0
    assert history.rbce[-5:].mean() < 0.5 * history.rbce[0]


def test_a_detector_learns_the_place_from_wrong_coordinates():
    "Left half dark, right half bright: a picture turned around is right everywhere but for its place."
    half = np.zeros((6, 60, 60, 3), np.uint8)
    half[:, :, 30:] = 255
    config = DetectorConfig(width=0.1, steps=80, patches=16, lr=3e-3, shared_pass=True, alpha_2=0.0, bf16=False)
    detector, _ = train_detector(half, [], config, PLAIN, progress=False)
    normal, turned = score_maps(detector, np.stack([half[0], half[0, :, ::-1]]), 60)
    assert (turned[:, 0] > normal[:, 0].max()).all() and (turned[:, -1] > normal[:, -1].max()).all()


def test_patchdiff_learns_to_denoise():
    data = np.full((4, 16, 16, 3), 200, np.uint8)
    config = replace(TINY, steps=150, lr=3e-3, n_samples=4, sample_steps=50)
    model, history = train_patchdiff(data, 5, config, progress=False)
    assert history.loss[-30:].mean() < 0.35 < history.loss[:5].mean()
    assert generate(model, config, progress=False).mean() > 150, "towards the 200 of its pictures; noise has 128"


@pytest.mark.parametrize("off", [
    dict(alpha_1=0.0), dict(alpha_2=0.0), dict(alpha_1=0.0, alpha_2=0.0), dict(noisy_reweighting=False), dict(tail_reweighting=False),
    dict(noisy_reweighting=False, tail_reweighting=False), dict(wrong_coordinates=False), dict(shared_pass=True), dict(shared_pass=True, alpha_1=0.0),
    dict(penalise="probability"), dict(block=2, patches=16), dict(block=2, patches=16, shared_pass=True), dict(reweight_from=0.5), dict(bank_size=1), dict(bank_size=7),
    dict(sigma_c=0.0, sigma_z=0.0), dict(steps=1), dict(steps=0, epochs=2), dict(bf16=True),
], ids=str)
def test_every_part_can_be_switched(off):
    config = replace(SMALL, **{"steps": 3} | off)
    data = pictures(4, 50), [pictures(3, 50, 1), pictures(3, 50, 2)]
    _, history = train_detector(*data, config, Augmentation(), progress=False)
    assert len(history) == training_steps(config, 4) and np.isfinite(history.to_numpy()).all()
    assert (history.feat > 0).all() == bool(config.alpha_1) and (history.grad > 0).all() == bool(config.alpha_2)
    assert ((history.ess_neg > 0) & (history.ess_neg <= 1 + 1e-5)).all() and ((history.ess_pos > 0) & (history.ess_pos <= 1 + 1e-5)).all()
    assert np.allclose(history.loss, history.rbce + config.alpha_1 * history.feat + config.alpha_2 * history.grad, rtol=1e-5)
    if not config.noisy_reweighting and not config.tail_reweighting: assert np.allclose(history[["ess_pos", "ess_neg"]], 1)
    if config.reweight_from == 0.5: assert (np.isclose(history.ess_neg, 1, atol=1e-6) == [True, True, False]).all()


def test_block_4_runs():
    _, history = train_detector(pictures(4, 50), [pictures(3, 50, 1)], replace(SMALL, steps=2, patches=64, block=4), Augmentation(), progress=False)
    assert len(history) == 2 and np.isfinite(history.to_numpy()).all()


def test_banks_hold_the_features_of_the_latest_steps():
    learner = Learner(replace(SMALL, bank_size=20, alpha_1=0.0, alpha_2=0.0), 5)
    batch = lambda seed: training.draw_batch(*DATA.values(), learner.config, PLAIN, torch.Generator().manual_seed(seed))
    latest = []
    for seed in range(3):
        patches = batch(seed)
        with torch.no_grad(): latest.append(learner.detector.features(patches.positives).flatten(1))
        batch_losses(learner, patches)
    assert torch.allclose(learner.banks["pos"].features, torch.cat(latest)[-20:], atol=1e-5)
    assert len(learner.banks["neg"].features) == 20 and not learner.banks["neg"].features.requires_grad


def test_weights_carry_no_gradient():
    "With constant logits the loss must not change the features: only the weights could carry a gradient there."
    learner = Learner(replace(SMALL, alpha_1=0.0, alpha_2=0.0), 5)
    with torch.no_grad(): learner.detector.head.weight.zero_()
    loss, _ = batch_losses(learner, training.draw_batch(*DATA.values(), SMALL, PLAIN, torch.Generator().manual_seed(0)))
    loss.backward()
    assert all((p.grad == 0).all() for p in learner.detector.body.parameters()) and (learner.detector.head.weight.grad != 0).any()


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
        learner.optimizer.step(); learner.schedule.step()
    peak = int(np.argmax(rates))
    assert max(rates) == pytest.approx(1e-2, rel=1e-2) and 20 < peak < 40 and rates[0] < 5e-4 and rates[-1] < 1e-4
    assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) < 0).all()


# --- crops and files of PatchDiff -----------------------------------------------------------------------------------

def test_crops_of_patchdiff_carry_their_own_coordinates():
    coords = patchdiff.coord_map(16, 16)
    data = torch.from_numpy(np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), (3, 16, 16, 3)).copy())  # a pixel names its place
    x, F = draw_pictures(data, coords, 50, 6, torch.Generator().manual_seed(0))
    assert x.shape == (50, 3, 6, 6) and F.shape == (50, 2, 6, 6)
    place = ((x[:, 0] + 1) * 127.5).round().long()
    assert torch.allclose(F[:, 0], coords[0].flatten()[place]) and torch.allclose(F[:, 1], coords[1].flatten()[place])
    assert {int(p) for p in place[:, 0, 0]} <= {16 * r + c for r in range(11) for c in range(11)} and len({int(p) for p in place[:, 0, 0]}) > 20
    whole, F = draw_pictures(data, coords, 5, 0, torch.Generator().manual_seed(0))
    assert whole.shape == (5, 3, 16, 16) and F is coords and torch.equal(whole, to_model(data[:1]).expand(5, -1, -1, -1))


def test_a_saved_patchdiff_makes_the_same_pictures_and_other_files_are_refused(tmp_path):
    model = new_patchdiff(5, TINY)
    with torch.no_grad(): model.out[2].weight.add_(0.1)
    save_patchdiff(tmp_path / "g.safetensors", model)
    assert (generate(load_patchdiff(tmp_path / "g.safetensors"), TINY, progress=False) == generate(model, TINY, progress=False)).all()
    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "Detector"})
    with pytest.raises(ValueError, match="other.safetensors"): load_patchdiff(tmp_path / "other.safetensors")


@pytest.mark.parametrize("warm_up, peak", [(0.0, 0), (0.1, 9), (0.3, 29), (0.6, 59)])
def test_the_rate_peaks_when_it_is_told(warm_up, peak):
    optimizer, schedule = one_cycle([torch.nn.Parameter(torch.zeros(1))], DetectorConfig(warm_up=warm_up, lr=0.1), 100, "cpu")
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step(); schedule.step()
    assert int(np.argmax(rates)) == peak and max(rates) == pytest.approx(0.1, rel=1e-3) and rates[-1] == pytest.approx(0.1 / 250_000)


@pytest.mark.parametrize("warm_up, steps", [(0, 10), (0.1, 10), (0.5, 2), (0.01, 100), (0.99, 3), (0.3, 1)])
def test_any_warm_up_has_a_schedule(warm_up, steps):
    optimizer, schedule = one_cycle([torch.nn.Parameter(torch.zeros(1))], DetectorConfig(warm_up=warm_up, lr=0.1), steps, "cpu")
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(max(steps, 2) - 1): optimizer.step(); schedule.step(); rates.append(optimizer.param_groups[0]["lr"])
    assert all(0 < rate <= 0.1 + 1e-9 for rate in rates) and rates[-1] == pytest.approx(0.1 / 250_000)


def test_the_first_weights_are_he_s_or_torch_s():
    he, default = (Learner(DetectorConfig(width=0.25, init=init), 4).detector.body[4] for init in ("he", "torch"))
    fan = he.weight[0].numel()
    assert float(he.weight.std()) == pytest.approx((2 / fan) ** 0.5, rel=0.05) and not he.bias.any()
    assert float(default.weight.std()) == pytest.approx((1 / fan / 3) ** 0.5, rel=0.05) and default.bias.any()
