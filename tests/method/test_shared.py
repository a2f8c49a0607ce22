"One trunk for several levels: each level is an ordinary PatchDiff with its own field, trained once, made by any stage."

from dataclasses import replace

import numpy as np
import pytest
import torch

from grad_nb.beyond import TimestepWeighting
from grad_nb.config import GeneratorConfig, override, preset
from grad_nb.contrastive import make_contrastive, train_patchdiff, train_shared
from grad_nb.core.files import read_array
from grad_nb.patchdiff import PatchDiff, SharedPatchDiff, bounding_box, gradient_support, load_patchdiff

TINY = GeneratorConfig(size=16, width=4, steps=4, batch=4, n_samples=3, sample_steps=3, T=50, shared=True)


def pictures(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("k, level", list(enumerate((3, 5, 9, 13, 17))))
def test_each_level_sees_its_own_field(k, level):
    model = SharedPatchDiff([3, 5, 9, 13, 17], 4)
    support = gradient_support(model.nets[k], 44, 21, 22, torch.Generator().manual_seed(k))
    top, bottom, left, right = bounding_box(support)
    assert (bottom - top + 1, right - left + 1) == (level, level) and support.sum() == level**2


def test_in_one_pass_the_levels_answer_as_they_do_alone():
    model = SharedPatchDiff([5, 3, 13], 4, fourier=1)
    for w in model.parameters():
        torch.nn.init.normal_(w, std=0.2)
    x, t = torch.randn(2, 5, 12, 15), torch.tensor([1, 40])
    together = model(x, t)
    assert model.levels == (3, 5, 13) and together.shape == (3, 2, 3, 12, 15)
    for net, found in zip(model.nets, together):
        torch.testing.assert_close(net(x, t), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [(5,), (1, 5), (5, 8), ()])
def test_levels_that_cannot_share_are_refused(levels):
    with pytest.raises(ValueError, match="level"):
        SharedPatchDiff(levels, 4)


def test_a_mirrored_decoder_cannot_be_shared():
    with pytest.raises(ValueError, match="mirrored"):
        replace(TINY, field_of="bottleneck")
    assert not any(
        preset(name, layout).generator.shared for name in ("paper",) for layout in ("mvtec_ad", "mvtec_loco")
    )


def test_weights_of_the_times_are_each_levels_own():
    t, loss = torch.tensor([1, 30]), torch.tensor([[1.0, 0.5], [0.1, 0.2]])
    both = TimestepWeighting(50, 1.0, bins=2, levels=2)
    alone = [TimestepWeighting(50, 1.0, bins=2) for _ in range(2)]
    for _ in range(3):
        assert torch.equal(both(t, loss), torch.stack([one(t, row) for one, row in zip(alone, loss)]))


def test_a_training_that_is_cut_ends_as_one_that_is_not(tmp_path):
    from grad_nb.core.loop import TimeUp, time_limit

    whole, losses = train_shared(pictures(5), [3, 9], TINY, 7, progress=False)
    assert list(losses) == ["loss_3", "loss_9"] and len(losses) == 4
    file = tmp_path / "trunk.checkpoint"
    for _ in range(20):
        try:
            with time_limit(1e-9):
                again, _ = train_shared(pictures(5), [3, 9], TINY, 7, "cpu", file, progress=False)
            break
        except TimeUp:
            pass
    else:
        again, _ = train_shared(pictures(5), [3, 9], TINY, 7, "cpu", file, progress=False)
    for level in (3, 9):
        for name, w in whole[level].state_dict().items():
            assert torch.equal(w, again[level].state_dict()[name]), name


def test_levels_are_made_from_one_training(tmp_path):
    normals = pictures(5)
    figures, files = make_contrastive(tmp_path, normals, 9, TINY, progress=False, levels=(5, 9))
    trunk = (tmp_path / "trunk.json").read_bytes()
    make_contrastive(tmp_path, normals, 5, TINY, progress=False, levels=(5, 9))
    assert (tmp_path / "trunk.json").read_bytes() == trunk, "trained once"
    assert not list(tmp_path.rglob("*.checkpoint")) and figures["level"] == 9
    a, b = (load_patchdiff(tmp_path / f"generator-{n:02d}.safetensors") for n in (5, 9))
    assert torch.equal(a.stem.weight, b.stem.weight) and not torch.equal(a.out.weight, b.out.weight)
    assert read_array(tmp_path / files[1]).shape == (3, 16, 16, 3)
    with pytest.raises(ValueError, match="level 13"):
        make_contrastive(tmp_path, normals, 13, TINY, progress=False, levels=(5, 9))


def test_alone_a_level_is_trained_as_ever():
    config = replace(TINY, shared=False)
    model, history = train_patchdiff(pictures(5), 5, config, progress=False)
    assert isinstance(model, PatchDiff) and list(history) == ["loss"]


def test_the_estimator_learns_with_shared_generators():
    from grad_nb.grad import GRAD

    changes = {
        "generator.steps": 3,
        "generator.n_samples": 4,
        "generator.sample_steps": 3,
        "generator.field_of": "network",
        "generator.shared": True,
        "detector.steps": 2,
    }
    model = GRAD(override(preset("demo"), changes), progress=False).fit(pictures(12, 64))
    assert model.score_samples(pictures(2, 64)).shape == (2,)
