"""What a step must keep to be recorded and replayed: fixed places in memory, and no number read back by the host."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from shared import pictures, seeded
from shared import same_weights as same
from torch.utils._python_dispatch import TorchDispatchMode

from grad_nb.accel import ops
from grad_nb.accel.capture import Replayed
from grad_nb.beyond import TimestepWeighting, timesteps
from grad_nb.config import Augmentation, DetectorConfig, GeneratorConfig
from grad_nb.contrastive import draw_pictures, generate, loss_gradients, train_patchdiff
from grad_nb.coords import coord_map
from grad_nb.diffusion import alpha_bars, sample
from grad_nb.patchdiff import new_patchdiff
from grad_nb.training import Learner, batch_gradients, draw_batch, train_detector

SMALL = DetectorConfig(width=0.05, steps=8, patches=8, bank_size=16, bf16=False)
TINY = GeneratorConfig(
    size=16,
    width=8,
    steps=8,
    batch=4,
    crop=8,
    timestep_weighting=0.75,
    n_samples=5,
    sample_steps=6,
    sample_batch=2,
    bf16=False,
)


class Fixed:
    "Stands in for a CUDA graph: every replay writes its result to the same place."

    made = []

    def __init__(self, work, generators):
        self.work, self.result = work, None
        self.made.append(self)

    def replay(self):
        found = self.work()
        self.result = found.clone() if self.result is None else self.result
        return self.result.copy_(found)


@pytest.fixture
def fixed(monkeypatch):
    "All steps are replayed by the stand-in."
    Fixed.made = []
    monkeypatch.setattr(ops, "Replayed", partial(Replayed, graph=Fixed))


def detector(device="cpu", config=SMALL):
    return train_detector(pictures(4, 40), [pictures(3, 40, 1)], config, Augmentation(), device=device, progress=False)


def test_a_replayed_detector_training_equals_the_plain_one(request):
    plain, history = detector()
    request.getfixturevalue("fixed")
    replayed, again = detector()
    assert len(Fixed.made) == 2 and same(plain, replayed) and history.equals(again), "the batch and the step"


def test_a_replayed_generator_equals_the_plain_one(request):
    plain, history = train_patchdiff(pictures(6, 16), 5, TINY, progress=False)
    made = generate(plain, TINY, progress=False)
    request.getfixturevalue("fixed")
    replayed, again = train_patchdiff(pictures(6, 16), 5, TINY, progress=False)
    assert len(Fixed.made) == 1 and same(plain, replayed) and history.equals(again)
    assert (generate(replayed, TINY, progress=False) == made).all() and len(Fixed.made) == 4, "one for each batch"


def test_full_banks_and_running_means_stay_where_they_are():
    learner, places = Learner(SMALL, 8), []
    for _ in range(5):
        batch = draw_batch(pictures(4, 40), [pictures(3, 40, 1)], SMALL, Augmentation(), learner.generator)
        batch_gradients(learner, batch)
        places.append([bank.features.data_ptr() for bank in learner.banks.values()])
    assert places[2] == places[3] == places[4]
    weighting = TimestepWeighting(1000, 0.5)
    before = weighting.mean.data_ptr(), weighting.mean.clone()
    weighting(torch.tensor([3]), torch.tensor([0.1]))
    weighting.load_state_dict({"mean": weighting.mean + 1})
    assert weighting.mean.data_ptr() == before[0] and not torch.equal(weighting.mean, before[1])


class NoReading(TorchDispatchMode):
    "Raises where the host would have to wait for a number of the device."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2"):
            raise AssertionError(f"{name} reads from the device")
        return func(*args, **(kwargs or {}))


def test_reading_is_noticed():
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        torch.ones(1).item()


@pytest.mark.parametrize(
    "change",
    [{}, dict(block=2, patches=16), dict(penalise="probability"), dict(tail_reweighting=False)],
    ids=str,
)
def test_a_detector_step_reads_nothing_back(change):
    config = replace(SMALL, **change)
    learner, data = Learner(config, 8), [torch.from_numpy(pictures(4, 40, k)) for k in range(3)]
    for _ in range(2):
        with NoReading():
            augmentation = Augmentation(vertical_flip=True)
            batch_gradients(learner, draw_batch(data[0], data[1:], config, augmentation, learner.generator))


@pytest.mark.parametrize("crop", [0, 8])
def test_a_generator_step_reads_nothing_back(crop):
    model, coords, weighting = new_patchdiff(5, TINY), coord_map(16, 16), TimestepWeighting(TINY.T, 0.75)
    data, alpha_bar, generator = torch.from_numpy(pictures(6, 16)), alpha_bars(TINY.T), seeded()
    with NoReading():
        x, places = draw_pictures(data, coords, 4, crop, generator)
        loss_gradients(model, weighting, x, places, alpha_bar, TINY, generator, 4)


def test_sampling_reads_nothing_back():
    model, alpha_bar, times = new_patchdiff(5, TINY), alpha_bars(10).tolist(), []
    visited = timesteps(10, 10)  # on the host, before the first step

    def watched(x, t):
        times.append(t)
        return model(x, t)

    with NoReading():
        sample(watched, 2, 16, alpha_bar, seeded(), visited)
    assert [t.tolist() for t in times] == [[t, t] for t in range(9, -1, -1)]


@pytest.mark.gpu
def test_on_a_gpu_replaying_changes_no_figure(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config, recorded = replace(SMALL, steps=40, patches=64, width=0.25), []
    replayed, history = detector("cuda", config)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "Replayed", lambda work, *args, **kwargs: recorded.append(1) or work)
        plain, again = detector("cuda", config)
    assert recorded and np.allclose(history, again, rtol=1e-4, atol=1e-5)
    assert all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(plain.state_dict().values(), replayed.state_dict().values())
    )


@pytest.mark.gpu
def test_on_a_gpu_the_steps_are_recorded(caplog):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    detector("cuda", replace(SMALL, steps=20))
    model, _ = train_patchdiff(pictures(6, 16), 5, TINY, device="cuda", progress=False)
    generate(model, TINY, device="cuda", progress=False)
    assert "could not be recorded" not in caplog.text


@pytest.mark.gpu
def test_on_a_gpu_a_step_does_not_wait():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    learner, data = Learner(SMALL, 8, device="cuda"), [torch.from_numpy(pictures(4, 40, k)).cuda() for k in range(3)]
    step = lambda: batch_gradients(learner, draw_batch(data[0], data[1:], SMALL, Augmentation(), learner.generator))
    for _ in range(4):
        step()
        learner.optimizer.step()
        learner.schedule.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        learner.optimizer.step()
        learner.schedule.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recording_can_be_switched_off(monkeypatch):
    assert Replayed(int, "cuda").graph_of is not None
    for words in ("no-graphs", "reference", "no-loops,no-graphs"):
        monkeypatch.setenv("GRAD_NB_ACCEL", words)
        assert Replayed(int, "cuda").graph_of is None and Replayed(int, "cuda", graph=Fixed).graph_of is Fixed


def test_a_generator_that_is_lost_with_a_recording_ends_the_training_with_advice():
    class Stuck:
        def get_state(self):
            return 1

        def set_state(self, state):
            raise RuntimeError("still capturing")

    def cannot(work, generators):
        raise RuntimeError("no recording here")

    step = Replayed(int, "cpu", [Stuck()], plain=0, graph=cannot)
    with pytest.raises(RuntimeError, match="no recording here.*GRAD_NB_ACCEL=no-graphs"):
        step()
