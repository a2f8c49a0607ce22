"""What goes wrong in the hands of others: bad pictures and settings, full disks, kills, two at once, little memory."""

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import weakref
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from shared import TINY_FIT, do_all, tiny
from sklearn.base import clone

import grad_nb.contrastive
import grad_nb.core.stages
import grad_nb.inference.levels
import grad_nb.patchdiff
import grad_nb.training
from grad_nb.accel.ops import halving
from grad_nb.config import ON_LOCO, Augmentation, DetectorConfig, override, preset
from grad_nb.core.files import exclusive_lock, lock, read_array, read_json, write_array, write_json
from grad_nb.core.loop import run_steps, time_limit
from grad_nb.core.stages import run_stage
from grad_nb.core.tensors import read_tensors, write_tensors
from grad_nb.datasets.readers import DataError, hold_out
from grad_nb.datasets.trays import make_trays
from grad_nb.detector import Detector
from grad_nb.grad import FORMAT, GRAD
from grad_nb.patches import draw_batch

# The least that is a training.
FEW = {"detector.block": 1, "detector.patches": 16, "generator.steps": 4, "detector.steps": 4}


def fitted_values(model: GRAD) -> list[np.ndarray]:
    "Everything that a training decides, for comparisons bit by bit."
    return [t.numpy() for d in model.detectors_ for t in d.state_dict().values()] + [
        np.array([model.offset_, *model.map_limits_])
    ]


def same(first: GRAD, second: GRAD) -> bool:
    return all((a == b).all() for a, b in zip(fitted_values(first), fitted_values(second)))


@pytest.fixture(scope="module")
def trays(tmp_path_factory) -> Path:
    return make_trays(
        tmp_path_factory.mktemp("data"),
        seed=11,
        size=64,
        train=10,
        validation=0,
        good=3,
        logical=2,
        structural=2,
        progress=False,
    )


@pytest.fixture(scope="module")
def normal(trays) -> Path:
    return trays / "train/good"


@pytest.fixture(scope="module")
def model(normal) -> GRAD:
    return small().fit(normal)


def small(**changes) -> GRAD:
    return tiny(**{k.replace(".", "__"): v for k, v in FEW.items()} | changes).set_params(validation=0.1)


# ---- pictures that are none, and pictures of every kind -------------------------------------------------------------


def bad_pictures(folder: Path) -> dict[str, str]:
    "Files that are no usable pictures → a word of what is said of each."
    good = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(good).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:2000])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("no picture at all\n" * 40)
    (folder / "folder.png").mkdir()
    (folder / "dead.png").symlink_to(folder / "gone")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    Image.fromarray(good[:20]).save(folder / "small.png")
    Image.fromarray(good[..., 0].astype(np.float32)).save(folder / "float.tif")
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    (folder / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    )
    return {
        "cut.png": "decoded",
        "empty.png": "0 bytes",
        "text.png": "not a",
        "folder.png": "folder",
        "dead.png": "link",
        "loop.png": "",
        "small.png": "64x20",
        "float.tif": "floating",
        "bomb.png": "GRAD_NB_MAX_PIXELS",
        "x" * 300 + ".png": "",
        "nul\0.png": "",
        "gone/at all.png": "exist",
    }


def test_each_bad_picture_is_named_by_fit_and_by_predict(model, normal, tmp_path):
    for name, said in bad_pictures(tmp_path).items():
        path = tmp_path / name
        uses = [model.predict, lambda X: small().fit([*sorted(normal.iterdir()), *X])]
        for use in uses[:1] if name == "float.tif" else uses:  # fit finds what is white in it
            with pytest.raises(DataError) as error:
                use([path])
            assert str(path) in str(error.value) and said in str(error.value), error.value
            assert "\n" not in str(error.value)


def test_fit_counts_and_names_all_pictures_that_cannot_be_read(normal, tmp_path, caplog):
    bad = [tmp_path / name for name in bad_pictures(tmp_path) if name in ("cut.png", "empty.png", "text.png")]
    with pytest.raises(DataError, match="3 pictures cannot be used, the first: ") as error:
        small().fit([*sorted(normal.iterdir()), *bad])
    said = f"{error.value} {caplog.text}"
    assert all(said.count(str(path)) == 1 for path in bad)


def test_bad_pictures_are_passed_over_if_somebody_listens(model, normal, tmp_path):
    bad, good = [tmp_path / name for name in bad_pictures(tmp_path)], sorted(normal.iterdir())[:3]
    told = []
    mixed = [bad[0], good[0], *bad[1:6], good[1], *bad[6:], good[2]]
    parts = list(model.stream(mixed, lambda path, error: told.append(Path(path))))
    assert told == bad and [p for part in parts for p in part.paths] == good
    assert (np.concatenate([p.scores for p in parts]) == model.score_samples(good)).all()


def test_a_path_that_cannot_be_one_is_said(model):
    for X in ("x" * 5000, "a\0b", Path("gone/at all")):
        with pytest.raises(DataError):
            model.predict(X)


def test_the_same_picture_in_any_dress_scores_the_same(model, normal, tmp_path):
    palette = Image.open(sorted(normal.iterdir())[0]).convert("RGB").quantize(50)
    picture = palette.convert("RGB")
    grey, turned = picture.convert("L"), Image.Exif()
    turned[0x0112] = 6
    dresses = [
        (
            picture,
            {
                "palette.png": palette,
                "rgba.png": picture.convert("RGBA"),
                "bmp.bmp": picture,
                "tif.tiff": picture,
                "Ünïcödé 零.png": picture,
                "n" * 250 + ".png": picture,
                "no suffix that counts.dat": picture,
            },
        ),
        (
            grey.convert("RGB"),
            {"grey.png": grey, "deep.png": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)},
        ),
    ]
    for plain, others in dresses:
        want = model.score_samples([np.asarray(plain)])
        for name, dressed in others.items():
            dressed.save(tmp_path / name, format="PNG" if name.endswith(".dat") else None)
            assert (model.score_samples([tmp_path / name]) == want).all(), name
    picture.rotate(90).save(tmp_path / "exif.png", exif=turned)
    assert (model.score_samples([tmp_path / "exif.png"]) == model.score_samples([np.asarray(picture)])).all()
    shutil.copy(tmp_path / "rgba.png", tmp_path / "mislabelled.jpg")
    assert (model.score_samples([tmp_path / "mislabelled.jpg"]) == model.score_samples([np.asarray(picture)])).all()


def test_a_file_that_may_not_be_read(model):
    "As a user who is not the administrator, who may read everything."
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / "secret.png"
        Image.new("RGB", (64, 64)).save(path)
        folder.chmod(0o755)
        path.chmod(0)
        other = os.geteuid() == 0
        if other:
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match="secret.png may not be read; change its permissions"):
                model.predict([path])
            if other:
                os.seteuid(0)
                folder.chmod(0o100)
                os.seteuid(65534)
            else:
                folder.chmod(0o100)
            with pytest.raises(DataError, match="permissions"):
                model.predict(folder)
        finally:
            if other:
                os.seteuid(0)
    finally:
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_arrays_that_cannot_be_pictures(model):
    byte = np.zeros((2, 64, 64, 3), np.uint8)
    nan = np.full((2, 64, 64, 3), np.nan)
    for wrong in (
        nan,
        byte / 255,
        byte.astype(np.int64),
        byte[..., :2],
        np.zeros((2, 64, 64, 5), np.uint8),
        byte.astype(bool),
        byte.astype(object),
    ):
        for use in (model.predict, tiny().fit):
            with pytest.raises(ValueError, match="uint8"):
                use(wrong)
    for wrong in (np.zeros((2, 33, 64, 3), np.uint8), np.zeros((2, 0, 64, 3), np.uint8)):
        with pytest.raises(DataError, match="34x34"):
            model.predict(wrong)
    for wrong in (
        None,
        5,
        [None],
        [b"a.png"],
    ):
        with pytest.raises(ValueError, match="file|not a PNG"):
            model.predict(wrong)


def test_too_few_and_equal_pictures(model, normal, tmp_path, caplog):
    files = sorted(normal.iterdir())
    for n in (1, 3, 4):
        with pytest.raises(DataError, match="too few"):
            small().fit(files[:n])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/inside").mkdir()
    shutil.copy(files[0], tmp_path / "empty/inside")
    with pytest.raises(DataError, match="holds no pictures"):
        small().fit(tmp_path / "empty")
    equal = small().fit([files[0]] * 6)
    assert "are equal" in caplog.text
    equal.save(tmp_path / "equal.grad")
    scores = GRAD.load(tmp_path / "equal.grad", "cpu").set_params(progress=False).score_samples(files)
    assert np.isfinite(scores).all() and scores[0] == pytest.approx(equal.offset_, abs=1e-5)


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        dict(preset="fats"),
        dict(preset=7),
        dict(layout="mnist"),
        dict(augmentation=None),
        dict(validation=1.0),
        dict(validation=-0.1),
        dict(validation=float("nan")),
        dict(false_alarm_rate=0),
        dict(random_state=None),
        dict(random_state=-1),
        dict(explain_patches=0.5),
        dict(device="cuda:99"),
        dict(device="abacus"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_a_picture_is_read(wrong, monkeypatch):
    monkeypatch.setattr(grad_nb.grad, "picture_batches", lambda *_: pytest.fail("pictures were read"))
    with pytest.raises(ValueError):
        small().set_params(**wrong).fit("anything")


def test_a_preset_may_be_given_by_its_name():
    named = GRAD("demo", progress=False)
    assert (
        clone(named).get_params()["preset"] == "demo" and named.settings_["preset"] == preset("demo") == named.preset_
    )
    assert GRAD().preset_ == preset("fast") == GRAD("fast", "folder").preset_


def test_a_preset_by_name_follows_the_layout_and_one_that_is_given_does_not():
    "Logical anomalies are large: `fast` makes and reads smaller pictures for LOCO, unless the user brings settings."
    named, given = (GRAD(which, "mvtec_loco", progress=False).preset_ for which in ("fast", preset("fast")))
    assert named == preset("fast", "mvtec_loco") == override(preset("fast"), ON_LOCO["fast"]) != given == preset("fast")
    assert named.generator.size < given.generator.size and named.name == given.name
    assert preset("paper", "mvtec_loco") == preset("paper") and preset("demo", "mvtec_loco") == preset("demo")


def test_cuda_asked_for_but_absent_and_auto(model, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert clone(model).set_params(device="auto").device == "auto" and grad_nb.grad.pick_device("auto").type == "cpu"
    model.save(tmp_path / "m.grad")
    assert (
        GRAD.load(tmp_path / "m.grad", "auto")
        .set_params(progress=False)
        .score_samples(np.zeros((1, 64, 64, 3), np.uint8))
        .shape
    ) == (1,)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert grad_nb.grad.pick_device("auto").type == "cuda"
    if not torch.cuda.device_count():
        with pytest.raises(ValueError, match="'cuda' cannot be used here .* try 'cpu' or 'auto'"):
            GRAD.load(tmp_path / "m.grad", "cuda")


def test_fit_changes_no_parameter_no_thread_count_and_no_global_generator(normal):
    model = small()
    state = lambda: (
        model.get_params(),
        torch.get_num_threads(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
    )
    before, threads = state(), torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        model.fit(normal).score_samples(normal)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert state() == before


# ---- what is told, and what is seen ---------------------------------------------------------------------------------


def test_a_library_user_hears_nothing_unless_asked(model, normal, trays, tmp_path, capfd, caplog, monkeypatch):
    with caplog.at_level(logging.INFO, "grad_nb"):
        quiet = small().fit(normal)
        quiet.save(tmp_path / "m.grad")
        GRAD.load(tmp_path / "m.grad", "cpu").set_params(progress=False).predict(trays / "test/good")
    assert capfd.readouterr() == ("", "")
    told = [record.getMessage() for record in caplog.records]
    assert (
        any("9 pictures to train on, 1 held out" in line for line in told)
        and sum("generate-" in line for line in told) == 3
        and sum("detector-034" in line for line in told) == 1
    )
    monkeypatch.setattr("grad_nb.core.progress.SOON", 1e9)  # however slow this machine is
    model = clone(model).set_params(progress=True).fit(normal)
    for path in sorted(normal.iterdir()):
        model.score_samples(path)
    out, err = capfd.readouterr()
    assert out == "" and [line.split(";")[0] for line in err.splitlines()] == ["4 stages: 3 generators and 1 detector"]
    monkeypatch.setenv("GRAD_NB_BARS", "1")
    monkeypatch.setattr("grad_nb.core.progress.DELAY", 0.0)
    model.fit(normal).score_samples(normal)
    out, err = capfd.readouterr()
    assert out == "" and "reading pictures" in err and "PatchDiff" in err and "detector-34" in err and "judging" in err
    assert "stage 4 of 4" in err


AUDIT = {"on": False, "opened": []}


def _audit(event, args):
    if AUDIT["on"] and event == "open" and isinstance(args[0], (str, bytes)):
        AUDIT["opened"].append(os.path.realpath(os.fsdecode(args[0])))


def test_fit_opens_the_given_pictures_and_nothing_else(trays, normal, tmp_path):
    if not AUDIT.get("hooked"):
        sys.addaudithook(_audit)
        AUDIT["hooked"] = True
    AUDIT.update(on=True, opened=[])
    try:
        small().set_params(work_dir=tmp_path).fit(normal)
    finally:
        AUDIT["on"] = False
    assert {p for p in AUDIT["opened"] if p.startswith(str(trays.resolve()))} == {
        str(p.resolve()) for p in normal.iterdir()
    }


def test_held_out_pictures_set_the_threshold_and_nothing_else(normal):
    pictures = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in sorted(normal.iterdir())])
    held = hold_out(len(pictures), 0.1, 0)[1]
    changed = pictures.copy()
    changed[held] = 255 - changed[held]
    first, second = (small().set_params(validation=0.1).fit(p) for p in (pictures, changed))
    *weights, threshold = fitted_values(first)
    *others, other = fitted_values(second)
    assert all((a == b).all() for a, b in zip(weights, others)) and (threshold != other).any()


def test_pictures_are_read_one_after_the_other(model):
    "However large the batch, no two whole pictures are in memory."
    alive, most = [], 0

    def camera():
        nonlocal most
        for i in range(12):
            picture = np.full((900, 1100, 3), i, np.uint8)
            alive.append(weakref.ref(picture))
            most = max(most, sum(ref() is not None for ref in alive))
            yield picture
            del picture

    assert len(model.score_samples(camera())) == 12 and most <= 2


def resident() -> int:
    "Memory of this process, bytes."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_is_flat_over_some_hundred_pictures(model):
    picture, marks = np.zeros((64, 64, 3), np.uint8), []

    def camera(n):
        for i in range(n):
            if i % 100 == 99:
                marks.append(resident())
            yield picture

    assert len(model.score_samples(camera(600))) == 600
    assert max(marks[2:]) - marks[1] < 4e6, marks  # 400 more pixel maps would be 6.5 MB


FLAT = """
import sys, resource, numpy as np
from grad_nb.grad import GRAD
model = GRAD.load(sys.argv[1], "cpu").set_params(progress=False)
files, n = sys.argv[3:], int(sys.argv[2])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
model.score_samples(files[:1] * min(n, 1000))
before = peak()
scores = model.score_samples((files[i % len(files)] for i in range(n)))
print(peak() - before, len(scores))
"""


@pytest.mark.slow
@pytest.mark.parametrize("n, side, allowed", [(10_000, 64, 8e6), (16, 4096, 60e6)])
def test_the_peak_of_memory_does_not_grow_with_the_pictures(model, tmp_path, n, side, allowed):
    "10,000 pictures; and a batch of 16 of 4096 x 4096, of which a single one is 50 MB."
    model.save(tmp_path / "m.grad")
    pixels = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for path in files:
        Image.fromarray(pixels).save(path, compress_level=1)
    done = subprocess.run(
        [sys.executable, "-c", FLAT, str(tmp_path / "m.grad"), str(n), *map(str, files)],
        capture_output=True,
        text=True,
        check=True,
    )
    more, scored = map(int, done.stdout.split())
    assert scored == n and more < allowed, f"{more / 1e6:.1f} MB more"


# ---- too little memory ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def device_for(monkeypatch, owner, name: str, most: int):
    "A function fails as on a full GPU if it is given more than `most` pictures or patches; gives how many there were."
    real, sizes = getattr(owner, name), []

    def limited(*args, **kwargs):
        n = max(len(a) for a in args if isinstance(a, torch.Tensor) and a.ndim == 4)
        if n > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        sizes.append(n)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        yield sizes


def test_predict_goes_on_with_half_the_batch(model, normal, monkeypatch, caplog):
    want = model.predict(normal)
    for most in (7, 3, 1):
        with device_for(monkeypatch, grad_nb.inference.levels, "score_map", most) as sizes:
            found = model.predict(normal)
        assert max(sizes) <= most and sum(sizes) == len(want.scores) * len(model.levels_)
        assert np.allclose(found.scores, want.scores, rtol=0, atol=1e-5) and np.allclose(
            found.maps, want.maps, rtol=0, atol=1e-5
        )
    assert "out of memory (CUDA out of memory); going on with" in caplog.text
    with (
        device_for(monkeypatch, grad_nb.inference.levels, "score_map", 0),
        pytest.raises(MemoryError, match="not even one"),
    ):
        model.predict(normal)


def test_fit_goes_on_with_half_the_batch(normal, monkeypatch, caplog):
    "Generators, sampling, detector: with room for a part of each batch only, all is trained, and scores are finite."
    with (
        device_for(monkeypatch, grad_nb.patchdiff.PatchDiff, "forward", 1) as small_pictures,
        device_for(monkeypatch, Detector, "features", 30) as few_patches,
    ):
        model = small(generator__batch=4).set_params(explain_patches=20).fit(normal)
    assert set(small_pictures) == {1} and max(few_patches) <= 30 and np.isfinite(model.offset_)
    assert caplog.text.count("out of memory") >= 4


def test_a_step_in_micro_batches_is_the_step():
    "Without noise, loss, gradients and banks of a detector's step do not depend on how many are worked on at a time."
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    for changes in ({}, dict(alpha_2=0.0), dict(alpha_1=0.0, alpha_2=0.0, block=2)):
        config = DetectorConfig(width=0.1, pictures=2, patches=8, bf16=False, sigma_c=0.0, sigma_z=0.0, **changes)
        found = []
        for micro_batch in (None, 7):
            learner = grad_nb.training.Learner(config, 10)
            batch = draw_batch(pictures, [pictures, pictures], config, Augmentation(), learner.generator)
            loss, parts = grad_nb.training.batch_gradients(learner, batch, micro_batch)
            gradients = [p.grad for p in learner.detector.parameters()]
            found.append([loss, *parts.values(), *gradients, *(bank.features for bank in learner.banks.values())])
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(*found, strict=True))


def test_a_step_that_ran_out_of_memory_leaves_the_banks_alone(monkeypatch):
    pictures = np.zeros((4, 64, 64, 3), np.uint8)
    config = DetectorConfig(width=0.1, patches=16, bf16=False)
    learner = grad_nb.training.Learner(config, 10)
    batch = draw_batch(pictures, [pictures], config, Augmentation(), learner.generator)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    for micro_batch in (None, 4):
        with pytest.raises(torch.OutOfMemoryError):
            grad_nb.training.batch_gradients(learner, batch, micro_batch)
        assert not any(len(bank.features) for bank in learner.banks.values())


def test_halving_ends():
    tried = []

    def never(n):
        tried.append(n)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(MemoryError, match="not even one"):
        halving(never, 13)
    assert tried == [13, 6, 3, 1]
    with pytest.raises(RuntimeError, match="other"):
        halving(lambda n: (_ for _ in ()).throw(RuntimeError("other")), 13)


# ---- two at once ----------------------------------------------------------------------------------------------------

HOLD = """
import fcntl, os, sys, time
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
f = open(sys.argv[1], "ab")
fcntl.flock(f, fcntl.LOCK_EX)
print(1, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def another_process(path: Path):
    "Another process that holds a lock, until it is killed."
    process = subprocess.Popen([sys.executable, "-S", "-c", HOLD, str(path)], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_work_folder_in_use_is_refused_until_the_other_dies(normal, tmp_path):
    with another_process(tmp_path / "work/.lock") as other:
        with pytest.raises(ValueError, match="work is in use by another process"):
            small().set_params(work_dir=tmp_path / "work").fit(normal)
        assert [p.name for p in (tmp_path / "work").iterdir()] == [".lock"]
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
        small().set_params(work_dir=tmp_path / "work").fit(normal)
    with lock(tmp_path / "work/.lock", wait=False) as free:
        assert free  # and it is given back


def test_a_stage_in_use_is_refused_and_is_not_made_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(grad_nb.core.stages, "LOCK_PATIENCE", 0.1)
    made = []

    def make():
        made.append(1)
        write_json(tmp_path / "a.json", 1)
        return {}, ["a.json"]

    with another_process(tmp_path / ".stage.lock"):
        with pytest.raises(ValueError, match="stage.*in use by another process"):
            run_stage(tmp_path, "stage", "k", make)
    assert (
        not made
        and not run_stage(tmp_path, "stage", "k", make)["skipped"]
        and run_stage(tmp_path, "stage", "k", make)["skipped"]
        and len(made) == 1
    )

    # another process has finished it while this one waited
    def slow(path, *_, **__):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "later").rename(tmp_path / "other.json")
        return contextlib.nullcontext()

    write_json(tmp_path / "later", read_json(tmp_path / "stage.json") | {"stage": "other"})
    monkeypatch.setattr(grad_nb.core.stages, "exclusive_lock", slow)
    assert run_stage(tmp_path, "other", "k", make)["skipped"] and len(made) == 1


def test_a_lock_waits_and_goes_with_its_owner(tmp_path):
    with exclusive_lock(tmp_path / ".l"), pytest.raises(ValueError, match="in use"):
        with exclusive_lock(tmp_path / ".l"):
            pass
    with another_process(tmp_path / ".l") as other:
        start = time.monotonic()
        with pytest.raises(ValueError), exclusive_lock(tmp_path / ".l", patience=0.3):
            pass
        assert time.monotonic() - start >= 0.3 and lock(tmp_path / ".l", wait=False) is None
        other.kill()
        other.wait()
        with exclusive_lock(tmp_path / ".l"):
            pass


# ---- full disks -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_of(size: int):
    "No file may grow beyond `size` bytes: writing fails as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_whole(model, tmp_path):
    import pandas as pd

    from grad_nb.core.stages import write_table
    from grad_nb.plots import save_picture

    big, noise = np.arange(40_000), np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    writers = {
        "m.grad": model.save,
        "a.npy": lambda p: write_array(p, big),
        "a.json": lambda p: write_json(p, big.tolist()),
        "a.csv": lambda p: write_table(p, pd.DataFrame(big)),
        "a.safetensors": lambda p: write_tensors(p, {"a": torch.from_numpy(big)}),
        "a.png": lambda p: save_picture(noise, p),
    }
    for name, write in writers.items():
        path = tmp_path / name
        for old in (None, b"the old file"):
            if old:
                path.write_bytes(old)
            with disk_of(20_000), pytest.raises(OSError):
                write(path)
            assert (path.read_bytes() if old else path.exists()) == (old or False), name
        write(path)
    assert {p.name for p in tmp_path.iterdir()} == set(writers)
    GRAD.load(tmp_path / "m.grad", "cpu")


def test_a_training_that_filled_the_disk_continues_bit_for_bit(model, normal, tmp_path):
    with disk_of(20_000), pytest.raises(OSError):
        small().set_params(work_dir=tmp_path).fit(normal)
    assert not list(tmp_path.rglob("*.part"))
    assert same(small().set_params(work_dir=tmp_path).fit(normal), model)


@pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("mount"), reason="only an administrator can make a small disk"
)
def test_a_really_full_disk(model, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        (disk / "m.grad").write_bytes(b"the old file")
        with pytest.raises(OSError, match="m.grad|No space"):
            model.save(disk / "m.grad")
        assert [p.name for p in disk.iterdir()] == ["m.grad"] and (disk / "m.grad").read_bytes() == b"the old file"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ---- kills ----------------------------------------------------------------------------------------------------------


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path):
    "A process that does nothing but write the same file, killed at any moment, twelve times."
    path, rng = tmp_path / "m.safetensors", random.Random(0)
    versions = [{"a": torch.full((300_000,), float(i)), "n": torch.tensor(i)} for i in range(2)]
    write_tensors(path, versions[0])
    for _ in range(12):
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                for i in range(100_000):
                    write_tensors(path, versions[i % 2], {"i": i})
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        tensors, _ = read_tensors(path)
        assert (tensors["a"] == tensors["n"]).all()
    assert all(p.name.startswith(".") and p.suffix == ".part" for p in tmp_path.iterdir() if p != path)


def test_parts_of_a_killed_process_are_cleared_away_by_the_next_fit(normal, tmp_path):
    for name in ("contrastive", "history"):
        (tmp_path / name).mkdir()
    litter = [
        tmp_path / name
        for name in (
            ".generator-05.safetensors.0a1b2c31.part",
            ".detector-034.checkpoint.0a1b2c32.part",
            "contrastive/.level-05.npy.0a1b2c33.part",
            ".contrastive-05.checkpoint.0a1b2c34.part",
            ".normal-05.checkpoint.0a1b2c35.part",
            "history/.detect-034.csv.0a1b2c36.part",
        )
    ]
    mine = [tmp_path / ".mine.part", tmp_path / "notes.part"]
    for path in litter + mine:
        path.write_bytes(b"half")
    small().set_params(work_dir=tmp_path).fit(normal)
    assert not any(p.exists() for p in litter) and all(p.exists() for p in mine)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(
    "module, name, at",
    [
        ("contrastive", "draw_pictures", 1),
        ("contrastive", "draw_pictures", 4),
        ("contrastive", "draw_pictures", 6),
        ("contrastive", "sample", 1),
        ("training", "draw_batch", 3),
        ("training", "draw_batch", 4),
        ("training", "save_detector", 1),
    ],
)
def test_an_interrupted_fit_continues_bit_for_bit(model, normal, tmp_path, monkeypatch, module, name, at, error):
    "Ended in any stage: in both generators, before and after a checkpoint, in sampling, in the detector, in saving it."
    for part in (grad_nb.contrastive, grad_nb.training):
        monkeypatch.setattr(part, "run_steps", partial(run_steps, every=2))
    owner, calls = getattr(grad_nb, module), []
    real = getattr(owner, name)

    def ended(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, ended)
    with pytest.raises(error):
        small().set_params(work_dir=tmp_path).fit(normal)
    again = small().set_params(work_dir=tmp_path).fit(normal)
    assert same(again, model) and (again.score_samples(normal) == model.score_samples(normal)).all()
    total = {"draw_pictures": 3 * 4, "draw_batch": 4, "sample": 3, "save_detector": 1}[name]
    redone = {"draw_pictures": 1 if at % 2 else 2, "draw_batch": 1 if at % 2 else 2}.get(
        name, 1
    )  # back to the checkpoint
    assert len(calls) == total + redone, f"{len(calls)} calls: what was done is not done again"
    assert not list(tmp_path.rglob("*.checkpoint")) and not list(tmp_path.rglob("*.part"))


def test_stages_of_other_pictures_or_settings_are_not_taken(model, normal, tmp_path):
    pictures = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in sorted(normal.iterdir())])
    others = [
        (small(), 255 - pictures),
        (small(generator__sigma_g=0.5), pictures),
        (small().set_params(augmentation=Augmentation(True, True)), pictures),
        (small().set_params(random_state=3), pictures),
    ]
    for other, X in others:
        other.set_params(work_dir=tmp_path).fit(X)
    assert same(small().set_params(work_dir=tmp_path).fit(normal), model) and not same(others[-1][0], model)


def test_damaged_stages_are_made_again(model, normal, tmp_path):
    kept = small().set_params(work_dir=tmp_path).fit(normal)
    files = sorted(
        p
        for p in tmp_path.rglob("*")
        if p.is_file() and p.name != ".lock" and p.suffix in (".json", ".npy", ".safetensors")
    )
    assert len(files) >= 8
    for i, path in enumerate(files):
        path.write_bytes((b"", path.read_bytes()[:-1], b'{"fingerprint": 1}', path.read_bytes() + b"x")[i % 4])
    assert same(small().set_params(work_dir=tmp_path).fit(normal), kept)


@pytest.mark.slow
def test_ctrl_c_in_the_shell_and_the_same_command_again(normal, tmp_path):
    "grad_fit: one line, status 130, no model; then the model of a run that was not stopped."
    settings = " ".join(f"{k}={v}" for k, v in (TINY_FIT | {"generator.steps": 450, "detector.steps": 450}).items())

    def start(folder):
        return subprocess.Popen(
            [
                str(Path(sys.executable).parent / "grad_fit"),
                str(normal),
                "--model",
                str(tmp_path / folder / "m.grad"),
                "--preset",
                "demo",
                "--device",
                "cpu",
                "--work-dir",
                str(tmp_path / folder / "work"),
                "--overrides",
                settings,
                "--quiet",
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    for stage in ("generator-05.checkpoint", "detector-034.checkpoint"):
        process = start("stopped")
        while not (tmp_path / "stopped/work" / stage).exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert (
            process.returncode == 130
            and err.strip() == "grad_fit: stopped"
            and out == ""
            and not (tmp_path / "stopped/m.grad").exists()
        )
    for folder in ("stopped", "whole"):
        process = start(folder)
        assert process.communicate(timeout=600)[1] == "" and process.returncode == 0
    first, second = (GRAD.load(tmp_path / folder / "m.grad", "cpu") for folder in ("stopped", "whole"))
    assert same(first, second)


# ---- a model's file -------------------------------------------------------------------------------------------------


def rewritten(path: Path, to: Path, seal: bool = True, **changes) -> Path:
    "A model's file with some of its plain data changed, and its checksum made to fit."
    with safe_open(str(path), framework="pt") as f:
        tensors, about = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()
    meta = {k: v for k, v in (json.loads(about["json"]) | changes).items() if v is not ...}
    if seal:
        write_tensors(to, tensors, meta)
    else:
        save_file(tensors, str(to), metadata={"json": json.dumps(meta)})
    return to


def test_files_of_other_versions_are_refused_with_what_to_do(model, tmp_path):
    model.save(tmp_path / "m.grad")
    cases = {
        "newer": (
            dict(format=FORMAT + 1, versions={"grad_nb": "9.1"}),
            f"written by a newer grad_nb .grad_nb 9.1, format {FORMAT + 1}.*upgrade",
        ),
        "bare": (dict(format=FORMAT + 1, versions=["odd"]), "written by a newer grad_nb .grad_nb ?"),
        "older": (
            dict(format=1, versions={"grad_nb": "0.0.9"}),
            "made by grad_nb 0.0.9, whose files this version does not read; fit again",
        ),
        "none": (dict(format=...), "does not say which version"),
        "text": (dict(format="2"), "does not say which version"),
        "true": (dict(format=True), "does not say which version"),
        "kind": (dict(kind="PatchDiff"), "does not hold a GRAD model"),
    }
    for name, (changes, said) in cases.items():
        with pytest.raises(ValueError, match=said):
            GRAD.load(rewritten(tmp_path / "m.grad", tmp_path / f"{name}.grad", **changes), "cpu")
    first = rewritten(
        tmp_path / "m.grad",
        tmp_path / "one.grad",
        seal=False,
        format=1,
        map_limits=...,
        card=...,
        licence=...,
        pictures=...,
        explain_patches=...,
    )
    with pytest.raises(ValueError, match="no checksum.*before its first release"):
        GRAD.load(first, "cpu")  # the layout of format 1
    assert GRAD.load(rewritten(tmp_path / "m.grad", tmp_path / "same.grad"), "cpu").offset_ == model.offset_


def test_claims_that_do_not_fit_are_refused(model, tmp_path):
    model.save(tmp_path / "m.grad")
    with safe_open(str(tmp_path / "m.grad"), framework="pt") as f:
        meta = json.loads(f.metadata()["json"])
    cases = [
        dict(offset=None),
        dict(offset="0"),
        dict(map_limits=[1, 0]),
        dict(map_limits=[1]),
        dict(stats=[]),
        dict(stats=[[0, 0]]),
        dict(stats=[[0, 1], [0, 1]]),
        dict(preset=3),
        dict(preset=meta["preset"] | {"levels_ad": []}),
        dict(preset=meta["preset"] | {"magic": 1}),
        dict(layout="mvtec_loco2"),
        dict(augmentation={"a": 1}),
        dict(random_state="x"),
        dict(false_alarm_rate=7),
        dict(validation="all"),
        dict(versions=3),
        dict(pictures=[1]),
        dict(pictures=["a", "b"]),
        dict(learnt=["a"]),
        dict(learnt=3),
        dict(explain_patches=-1),
        dict(offset=...),
        dict(versions=...),
        dict(preset=meta["preset"] | {"detector": meta["preset"]["detector"] | {"width": 1e9}}),
        dict(preset=meta["preset"] | {"detector": meta["preset"]["detector"] | {"width": 0.2}}),
    ]
    for i, changes in enumerate(cases):
        path = rewritten(tmp_path / "m.grad", tmp_path / f"{i}.grad", **changes)
        with pytest.raises(ValueError, match=f"{i}.grad does not fit its own settings"):
            GRAD.load(path, "cpu")
            pytest.fail(f"{changes} was accepted")


def test_the_file_holds_its_card_and_its_licence_for_any_reader(model, tmp_path):
    model.save(tmp_path / "m.grad")
    with safe_open(str(tmp_path / "m.grad"), framework="np") as f:
        meta = json.loads(f.metadata()["json"])
    assert meta["card"] == model.card() == GRAD.load(tmp_path / "m.grad", "cpu").card()
    for said in (
        "# GRAD",
        "Preprocessing",
        "64 x 64",
        f"{model.offset_:.6g}",
        "9 normal pictures",
        "CC BY-NC-SA",
        f"torch {model.versions_['torch']}",
        '"layout": "mvtec_ad"',
    ):
        assert said in meta["card"], said
    assert "Apache-2.0" in meta["licence"] and meta["licence"] in meta["card"] and meta["versions"] == model.versions_


# ---- test sets with one kind of picture -----------------------------------------------------------------------------


@pytest.mark.parametrize("only", ["good", "logical_anomalies"])
def test_only_normal_or_only_anomalous_test_pictures(trays, tmp_path, only):
    from grad_nb.runs.stages import open_run, result_table

    root = Path(shutil.copytree(trays, tmp_path / "data/trays"))
    for kind in (root / "test").iterdir():
        if kind.name != only:
            shutil.rmtree(kind)
            shutil.rmtree(root / "ground_truth" / kind.name, ignore_errors=True)
    run = open_run(
        tmp_path / "data",
        "trays",
        runs=tmp_path / "runs",
        overrides=" ".join(f"{k}={v}" for k, v in (TINY_FIT | FEW).items()),
        device="cpu",
        progress=False,
    )
    result = do_all(run)
    assert result["image_auroc"] is None and (result["image_f1_max"] is None) == (only == "good")
    assert (result["pixel_auroc"] is None) == (only == "good")
    table = result_table(result)
    assert table.loc["GRAD", "pooled"] != table.loc["GRAD", "pooled"] and read_array(run.folder / "maps.npy").shape[
        0
    ] == len(run.category.test)


def test_a_kill_after_the_pictures_are_drawn_costs_no_training(tmp_path, monkeypatch):
    normals = np.random.default_rng(0).integers(256, size=(16, 16, 16, 3), dtype=np.uint8)
    config = replace(preset("demo").generator, size=16, width=4, batch=2, steps=5, n_samples=4, sample_steps=2)
    work = partial(grad_nb.contrastive.make_contrastive, tmp_path, normals, 3, config, progress=False)
    told = grad_nb.contrastive.told_apart

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(grad_nb.contrastive, "told_apart", killed)
    with time_limit(3600), pytest.raises(KeyboardInterrupt):  # so that a short training has a checkpoint
        run_stage(tmp_path, "generate-03", "key", work)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.npy")}
    monkeypatch.setattr(grad_nb.contrastive, "told_apart", told)
    trained = []
    monkeypatch.setattr(grad_nb.contrastive, "loss_gradients", lambda *_: trained.append(1))
    run_stage(tmp_path, "generate-03", "key", work)
    assert files and not trained and all(path.read_bytes() == data for path, data in files.items())
    assert len(list(tmp_path.glob("*.checkpoint"))) == 2
    grad_nb.contrastive.drop_checkpoints(tmp_path, 3)
    assert not list(tmp_path.glob("*.checkpoint"))
