"""Every reader against damaged files: what was written comes back, or an error of the known kind names the file.

It takes bounded time and memory. A hundred or so of each in the fast suite, thousands with `pytest -m slow`.
"""

import io
import json
import os
import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.damage import damaged, other_data, other_tensors, whole_pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from shared import pictures
from test_faults import rewritten, small

from grad_nb.core.files import read_array, read_json, write_array
from grad_nb.core.stages import stage_done
from grad_nb.core.tensors import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from grad_nb.datasets.readers import PICTURE_FORMATS, DataError, _read_defects, read_image
from grad_nb.detector import Detector, load_detector, save_detector
from grad_nb.grad import GRAD
from grad_nb.patchdiff import PatchDiff, load_patchdiff, save_patchdiff
from grad_nb.runs.stages import write_json
from grad_nb.use.watch import Journal

TIMES = int(os.environ.get("GRAD_NB_FUZZ", "40"))  # how many times as much the slow ones do
FAST = pytest.param(1, id="some")
SLOW = pytest.param(TIMES, id="thousands", marks=pytest.mark.slow)


class Watch:
    "Time and memory of single readings."

    def __init__(self):
        self.slowest, self.start = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __enter__(self):
        self.began = time.process_time()
        return self

    def __exit__(self, *_):
        self.slowest = max(self.slowest, time.process_time() - self.began)

    def check(self, seconds: float = 10, gigabytes: float = 2.5):
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.start) * 1024
        assert self.slowest < seconds and more < gigabytes * 1e9, f"{self.slowest:.1f} s, {more / 1e9:.1f} GB"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("times", [FAST, SLOW])
def test_pictures(tmp_path, times):
    rng, path, watch, outcomes = np.random.default_rng(times), tmp_path / "fuzz.img", Watch(), {"read": 0, "refused": 0}
    for name, whole in whole_pictures().items():
        path.write_bytes(whole)
        assert read_image(path, 40).shape == (40, 40, 3), name
        for _ in range(10 * times):
            path.write_bytes(damaged(whole, rng))
            with watch:
                try:
                    x = read_image(path, 40)
                except DataError as e:
                    outcomes["refused"] += 1
                    assert str(path) in str(e)
                else:
                    outcomes["read"] += 1
                    assert x.shape == (40, 40, 3) and x.dtype == np.uint8
    assert min(outcomes.values()) >= 10 * times, outcomes
    watch.check()


def test_every_format_that_is_read_is_damaged():
    found = {Image.open(io.BytesIO(data)).format for data in whole_pictures().values()}
    assert found == set(PICTURE_FORMATS)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, GRAD]:
    "A fitted model and its file."
    path, rng = tmp_path_factory.mktemp("model") / "m.grad", np.random.default_rng(0)
    model = (
        small(detector__width=0.03).set_params(explain_patches=2).fit(rng.integers(0, 256, (6, 64, 64, 3), np.uint8))
    )
    model.save(path)
    return path, model


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("times", [FAST, SLOW])
def test_models(saved, tmp_path, times):
    "A damaged model is refused, or it is the model: its checksum lets nothing else pass."
    whole, path, rng, watch, refused = (
        saved[0].read_bytes(),
        tmp_path / "fuzz.grad",
        np.random.default_rng(times),
        Watch(),
        0,
    )
    for _ in range(60 * times):
        path.write_bytes(damaged(whole, rng))
        with watch:
            try:
                found = GRAD.load(path, "cpu")
            except ValueError as e:
                refused += 1
                assert str(path) in str(e)
                continue
        assert (
            equal(found.detectors_[0].state_dict(), saved[1].detectors_[0].state_dict())
            and found.offset_ == saved[1].offset_
        )
    assert refused >= 40 * times
    watch.check()


@pytest.mark.parametrize("times", [FAST, SLOW])
@pytest.mark.parametrize("what", ["data", "tensors"])
def test_models_that_were_sealed_again(saved, tmp_path, what, times):
    "Whatever a model with a right seal holds, `load` refuses it by name, or it judges with numbers that are some."
    tensors, meta = read_tensors(saved[0])
    path, rng, seen, refused = tmp_path / "fuzz.grad", np.random.default_rng(times), pictures(1, 64), 0
    for _ in range(100 * times):
        if what == "data":
            write_tensors(path, tensors, other_data(meta, rng))
        else:
            write_tensors(path, other_tensors(tensors, rng), meta)
        try:
            found = GRAD.load(path, "cpu")
        except ValueError as e:
            refused += 1
            assert str(path) in str(e)
            continue
        scores = found.set_params(progress=False).score_samples(seen)
        assert scores.shape == (1,) and np.isfinite(scores).all()
        assert isinstance(found.card(), str)
    assert refused >= 40 * times


@pytest.mark.parametrize("times", [FAST, SLOW])
@pytest.mark.parametrize(
    "kind", ["detector", "patchdiff", "checkpoint", "array", "json", "record", "defects", "journal"]
)
def test_files_of_a_run(tmp_path, kind, times):
    "The same for every file that a run or a watch leaves behind, and for LOCO's table of defects."
    path, detector, generator = (
        tmp_path / f"fuzz.{'npy' if kind == 'array' else 'json' if kind in ('json', 'record', 'defects') else 'x'}",
        Detector(0.03),
        PatchDiff(3, 2),
    )
    state, rows = (
        {"a": torch.arange(5.0), "deep": [{"n": 3}, None]},
        [dict(defect_name="hole", pixel_value=255, saturation_threshold=30, relative_saturation=False)],
    )
    record = {"fingerprint": "k", "outputs": {}, "seconds": 1.5}

    def journal():
        with Journal(path, "model") as j:
            return j.done

    def add():
        with Journal(path, "model") as j:
            j.add(Path("a.png"), (3, 4), score=1.0)
            j.add(Path("b.png"), (5, 6), error="broken")

    write, read, fits = {
        "detector": (
            lambda: save_detector(path, detector, 64, 34),
            lambda: load_detector(path)[0],
            lambda found: equal(found.state_dict(), detector.state_dict()),
        ),
        "patchdiff": (
            lambda: save_patchdiff(path, generator),
            lambda: load_patchdiff(path),
            lambda found: equal(found.state_dict(), generator.state_dict()),
        ),
        "checkpoint": (
            lambda: save_checkpoint(path, "f", **state),
            lambda: load_checkpoint(path, "f"),
            lambda found: found is None or torch.equal(found["a"], state["a"]) and found["deep"] == state["deep"],
        ),
        "array": (
            lambda: write_array(path, np.arange(24).reshape(4, 6)),
            lambda: read_array(path),
            lambda found: isinstance(found, np.ndarray),
        ),
        "json": (
            lambda: write_json(path, {"a": [1, 2.5, "ü"], "b": None}),
            lambda: read_json(path),
            lambda found: True,
        ),
        "record": (
            lambda: write_json(path, record),
            lambda: stage_done(tmp_path, "fuzz", "k"),
            lambda found: found is None or found["fingerprint"] == "k",
        ),
        "defects": (
            lambda: write_json(path, rows),
            lambda: _read_defects(path),
            lambda found: all(0 < d.pixel_value < 256 and d.saturation_threshold > 0 for d in found),
        ),
        "journal": (add, journal, lambda found: all(len(row) == 3 for row in found)),
    }[kind]
    write()
    assert fits(read()) and read() is not None
    whole, rng, watch, refused = path.read_bytes(), np.random.default_rng(times), Watch(), 0
    for _ in range(40 * times):
        path.write_bytes(damaged(whole, rng))
        with watch:
            try:
                found = read()
            except ValueError as e:
                refused += 1
                assert str(path) in str(e), e
            else:
                assert fits(found)
                refused += found is None
    assert refused >= 10 * times
    watch.check(seconds=5, gigabytes=1)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_claim_of_a_file_is_believed_unseen(saved, tmp_path, data):
    "A file whose checksum is right and whose plain data are not: an error that names it, or a model that can be used."
    path, _ = saved
    meta = json.loads(read_meta(path))
    key = data.draw(st.sampled_from(sorted(meta)))
    value = data.draw(anything)
    if key in ("preset", "augmentation") and data.draw(st.booleans()):  # or deep inside
        value = json.loads(json.dumps(meta[key]))
        inside = (
            value[data.draw(st.sampled_from(["generator", "detector", "evaluation"]))] if key == "preset" else value
        )
        inside[data.draw(st.sampled_from(sorted(inside)))] = data.draw(anything)
    changed = rewritten(path, tmp_path / "changed.grad", **{key: value})
    try:
        model = GRAD.load(changed, "cpu")
    except ValueError as e:
        assert "changed.grad" in str(e)
        return
    assert isinstance(model.card(), str) and np.isfinite(model.offset_)
    model.get_params()


def read_meta(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(path), framework="np") as f:
        return f.metadata()["json"]
