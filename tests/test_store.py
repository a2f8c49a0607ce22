"""Files that are whole or absent, whatever happens; nothing that is read runs code; names of things stay the same."""

import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from grad_nb.accel.ops import mixed_precision
from grad_nb.config import GeneratorConfig, to_dict
from grad_nb.core import devices, files, stages
from grad_nb.core.devices import device_name, pick_device
from grad_nb.core.files import (
    array_sha256,
    atomic_path,
    exclusive_lock,
    file_sha256,
    fingerprint,
    lock,
    read_array,
    read_json,
    write_array,
    write_json,
)
from grad_nb.core.loop import run_steps
from grad_nb.core.provenance import versions
from grad_nb.core.seeds import stage_generator, stage_seed
from grad_nb.core.stages import run_stage, stage_key
from grad_nb.core.tensors import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from grad_nb.runs.stages import detect_key, evaluate_key, generate_key, open_run


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- atomic writes --------------------------------------------------------------------------------------------------


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="power cut"), atomic_path(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("power cut")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_a_keyboard_interrupt_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "write",
    [
        lambda p: write_json(p, {"a": 1}),
        lambda p: write_array(p, np.zeros(3)),
        lambda p: write_tensors(p, {"a": torch.zeros(3)}),
        lambda p: save_checkpoint(p, "key", a=torch.zeros(3)),
    ],
)
@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failing_rename_or_sync_leaves_the_old_file_and_no_part(tmp_path, monkeypatch, write, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="no space left"):
        write(path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_the_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda f: (order.append("fsync"), fsync(f)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("replace"), replace(a, b)))
    write_json(tmp_path / "a.json", 1)
    assert order == ["fsync", "replace"]


def test_while_it_is_written_the_file_is_a_part_in_the_same_folder(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.name.endswith(".part") and not path.exists()
        temporary.write_text("new")
    assert path.read_text() == "new" and names(path.parent) == ["a.txt"]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_a_file_may_be_read_by_whom_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        with atomic_path(tmp_path / "a") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_a_link_stays_one_and_a_pipe_is_not_replaced(tmp_path):
    target, link, pipe = tmp_path / "deep/target", tmp_path / "link", tmp_path / "pipe"
    target.parent.mkdir()
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    write_json(link, 1)
    assert link.is_symlink() and target.read_text() == "1\n" and names(target.parent) == ["target"]
    with pytest.raises(ValueError, match="no regular file"):
        write_json(pipe, 1)
    assert pipe.is_fifo() and names(tmp_path) == ["deep", "link", "pipe"]


def test_two_writers_do_not_share_a_part(tmp_path):
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as two:
        assert one != two


def test_an_error_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(IsADirectoryError) as said:
        write_json(tmp_path, 1)
    assert said.value.filename == str(tmp_path)
    with pytest.raises(PermissionError) as said, atomic_path(tmp_path / "a") as temporary:
        raise PermissionError(13, "Permission denied", str(temporary))
    assert said.value.filename == str(tmp_path / "a") and not list(tmp_path.iterdir())


def test_a_very_long_name_can_be_written(tmp_path):
    write_json(tmp_path / ("x" * 240 + ".json"), 1)


# --- JSON -----------------------------------------------------------------------------------------------------------


def test_what_json_cannot_say_becomes_null(tmp_path):
    data = {
        "a": float("nan"),
        "b": [np.float32("inf"), -np.inf],
        "c": np.float64("nan"),
        "d": (1, np.int64(2)),
        "e": np.bool_(True),
        "f": Path("x/y"),
        3: None,
    }
    write_json(tmp_path / "a.json", data)
    text = (tmp_path / "a.json").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (
        strict
        == {"a": None, "b": [None, None], "c": None, "d": [1, 2], "e": True, "f": "x/y", "3": None}
        == read_json(tmp_path / "a.json")
    )


def test_equal_data_give_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"x": 1, "ä": [0.1]})
    write_json(tmp_path / "b", {"ä": [0.1], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_data_that_is_not_plain_writes_no_file(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"{'a': 1}"])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.json"):
        read_json(path)


@settings(deadline=None, max_examples=50)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_plain_data_survive_the_file(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("json") / "a.json"
    write_json(path, data)
    assert read_json(path) == data


# --- arrays and tensors ---------------------------------------------------------------------------------------------


class Bomb:
    "Unpickling this would run code."

    def __reduce__(self):
        return os.mkdir, (str(Bomb.trace),)


@pytest.fixture
def bomb(tmp_path):
    Bomb.trace = tmp_path / "exploded"
    yield Bomb()
    assert not Bomb.trace.exists(), "code from a file was run"


def test_a_pickle_is_not_read_as_tensors(tmp_path, bomb):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="model.safetensors"):
        read_tensors(path)
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="model.safetensors"):
        read_tensors(path)
    assert load_checkpoint(path, "key") is None


@pytest.mark.parametrize("kind", ["object array", "bare pickle"])
def test_an_array_file_with_a_pickle_in_it_is_refused(tmp_path, bomb, kind):
    path = tmp_path / "pictures.npy"
    if kind == "object array":
        np.save(path, np.array([bomb], object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="pictures.npy"):
        read_array(path)


def test_an_object_array_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        write_array(tmp_path / "a.npy", np.array([object()], object))
    assert names(tmp_path) == []


def test_an_array_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.npy"
    write_array(path, np.arange(1000))
    whole = path.read_bytes()
    for length in (0, 3, 50, 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.npy"):
            read_array(path)


def test_an_archive_of_arrays_is_not_an_array(tmp_path):
    path = tmp_path / "archive.npy"
    with open(path, "wb") as f:
        np.savez(f, a=np.zeros(3))
    with pytest.raises(ValueError, match="archive.npy"):
        read_array(path)


def test_an_array_is_opened_and_not_loaded(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_array(tmp_path / "a.npy", array)
    back = read_array(tmp_path / "a.npy")
    assert isinstance(back, np.memmap) and (back == array).all() and back.dtype == np.uint8 and not back.flags.writeable


def test_a_file_that_is_absent_is_absent_and_not_damaged(tmp_path):
    for read in (read_array, read_tensors, read_json):
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "nothing")
    assert load_checkpoint(tmp_path / "nothing", "key") is None


def test_tensors_and_plain_data_survive_the_file(tmp_path):
    tensors = {
        "a": torch.arange(6).view(2, 3).T,
        "b": torch.tensor(1.5, dtype=torch.bfloat16),
        "c": torch.empty(0, 4),
        "d": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"kind": "ü", "n": [1, None, float("nan")]})
    back, meta = read_tensors(tmp_path / "a.safetensors")
    assert meta == {"kind": "ü", "n": [1, None, None]} and set(back) == set(tensors)
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)


def test_a_tensor_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "cut.safetensors"
    write_tensors(path, {"a": torch.zeros(1000)}, {"x": 1})
    whole = path.read_bytes()
    for length in (0, 7, 8, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut.safetensors"):
            read_tensors(path)
        assert load_checkpoint(path, "key") is None


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_a_nested_state_survives_the_checkpoint(tmp_path):
    state = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "m": torch.arange(4)}},
            "groups": [{"lr": 0.1, "betas": (0.9, 0.99), "on": True, "none": None}],
        },
        "rows": torch.zeros(2, 3),
        "done": 7,
    }
    save_checkpoint(tmp_path / "c", "key", **state)
    back = load_checkpoint(tmp_path / "c", "key")
    assert back["done"] == 7 and torch.equal(back["rows"], state["rows"]) and list(back["optimizer"]["state"]) == [0]
    assert (
        torch.equal(back["optimizer"]["state"][0]["m"], torch.arange(4)) and back["optimizer"]["state"][0]["step"] == 3
    )
    assert back["optimizer"]["groups"] == [{"lr": 0.1, "betas": [0.9, 0.99], "on": True, "none": None}]
    assert load_checkpoint(tmp_path / "c", "other key") is None


def test_numbers_of_a_checkpoint_are_bit_exact(tmp_path):
    numbers = [0.1 + 0.2, 1e-300, 5e-324, -0.0, 2**62 + 1]
    save_checkpoint(tmp_path / "c", "key", numbers=numbers)
    back = load_checkpoint(tmp_path / "c", "key")["numbers"]
    assert [repr(n) for n in back] == [repr(n) for n in numbers]


def test_tensors_that_share_memory_can_be_in_one_checkpoint(tmp_path):
    x = torch.arange(6.0)
    save_checkpoint(tmp_path / "c", "key", a=x, b=x, c=x[2:4])
    assert torch.equal(load_checkpoint(tmp_path / "c", "key")["c"], torch.tensor([2.0, 3.0]))


def test_what_a_checkpoint_cannot_hold_is_refused_before_writing(tmp_path):
    with pytest.raises(TypeError, match="optimizer.hook"):
        save_checkpoint(tmp_path / "c", "key", optimizer={"hook": print})
    assert names(tmp_path) == []


def counting(log, generator):
    "A step that changes a tensor by random numbers."
    weights = torch.nn.Linear(2, 1)
    with torch.no_grad():
        weights.weight.zero_()

    def step(i):
        log.append(i)
        with torch.no_grad():
            weights.weight += torch.randn(1, 2, generator=generator)
        return torch.tensor([float(i), 2.0 * i])

    return weights, step


@pytest.mark.parametrize("stop", [1, 4, 5, 9, 14])
def test_steps_continue_where_the_last_checkpoint_was(tmp_path, stop):
    def run(checkpoint, stop_at=None):
        log, generator = [], torch.Generator().manual_seed(1)
        weights, step = counting(log, generator)

        def stopping(i):
            if i == stop_at:
                raise RuntimeError("killed")
            return step(i)

        history = run_steps(
            stopping,
            15,
            ["a", "b"],
            dict(weights=weights, generator=generator),
            checkpoint,
            "key",
            every=5,
            progress=False,
        )
        return weights.weight.detach().clone(), history, log

    expected, whole, _ = run(None)
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "c", stop)
    got, history, log = run(tmp_path / "c")
    assert (
        torch.equal(got, expected)
        and history.equals(whole)
        and list(history.columns) == ["a", "b"]
        and len(history) == 15
    )
    assert log == list(range(stop // 5 * 5, 15)) and all(n == "c" for n in names(tmp_path))


def test_no_steps_give_an_empty_history():
    assert run_steps(None, 0, ["a", "b"], {}, progress=False).shape == (0, 2)


def test_figures_from_before_and_after_a_stop_make_one_table(tmp_path):
    "Old ones come from the checkpoint, on the CPU; new ones stay where they are made until they are asked for."
    generator, rows = torch.Generator().manual_seed(1), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    save_checkpoint(tmp_path / "c", "key", rows=rows, done=2, generator=generator.get_state())
    found = run_steps(
        lambda i: torch.tensor([float(i)]),
        5,
        ["a"],
        dict(generator=generator),
        tmp_path / "c",
        "key",
        every=2,
        progress=False,
    )
    kept = load_checkpoint(tmp_path / "c", "key")["rows"]
    assert found.a.tolist() == [0, 1, 2, 3, 4] and kept.flatten().tolist() == [0, 1, 2, 3]


# --- locks ----------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from grad_nb.core.files import exclusive_lock
with exclusive_lock(sys.argv[1]):
    print(flush=True)
    time.sleep(600)
"""


def test_a_lock_names_the_folder_and_what_to_do_and_goes_when_its_process_is_killed(tmp_path):
    path = tmp_path / "run" / ".stage.lock"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(path)], stdout=subprocess.PIPE)
    try:
        owner.stdout.readline()
        with pytest.raises(ValueError, match="run is in use by another process; wait .* or use another folder"):
            with exclusive_lock(path):
                pass
        assert lock(path, wait=False) is None
    finally:
        owner.kill()
        owner.communicate()
    with exclusive_lock(path):
        assert lock(path, wait=False) is None
    with lock(path, wait=False) as free:
        assert free


def test_the_lock_of_a_stage_lies_in_the_folder_of_the_run(tmp_path):
    def make():
        with pytest.raises(ValueError, match="in use"), exclusive_lock(tmp_path / ".generate-05.lock"):
            pass
        return {}, []

    run_stage(tmp_path, "generate-05", "key", make)
    with exclusive_lock(tmp_path / ".generate-05.lock"):
        pass


def test_a_stage_that_code_of_another_format_made_is_made_again(data, tmp_path, monkeypatch):
    run = open_run(data, "trays", "demo", 0, tmp_path, TINY, "cpu", progress=False)
    level = run.levels[0].level

    def keys():
        return generate_key(run, run.generator_levels[0]), detect_key(run, level), evaluate_key(run)

    before, changed = keys(), {"generate": [True, True, True], "detect": [False, True, True]}
    for kind, expected in (changed | {"evaluate": [False, False, True]}).items():
        with monkeypatch.context() as patch:
            patch.setattr(stages, "STAGE_FORMATS", stages.STAGE_FORMATS | {kind: 99})
            assert [a != b for a, b in zip(before, keys())] == expected
    with monkeypatch.context() as patch:
        patch.setattr(stages, "versions", lambda: versions() | {"grad_nb": "9.9"})
        assert not set(before) & set(keys())

    made = []

    def make():
        made.append(stage_key("detect", 1))
        return {}, []

    for number in (1, 1, 2, 2):
        monkeypatch.setattr(stages, "STAGE_FORMATS", {"detect": number})
        run_stage(tmp_path, "detect-034", stage_key("detect", 1), make)
    assert len(made) == 2 and made[0] != made[1]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_the_work_is_done_without(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with exclusive_lock(tmp_path / ".lock"):
        (tmp_path / "done").touch()
    assert names(tmp_path) == ["done"]


def test_a_folder_that_may_not_be_written_is_no_folder_in_use(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "may not be written")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.raises(PermissionError), exclusive_lock(tmp_path / ".lock"):
        pytest.fail("it was entered")


# --- names of things ------------------------------------------------------------------------------------------------


def test_fingerprints_are_the_same_in_every_process_and_on_every_machine():
    code = (
        "from grad_nb.core.files import *; from grad_nb.core.seeds import *; from grad_nb.config import *; "
        "import numpy as np; print(fingerprint({'b': 1, 'a': [0.1, None, 'ä']}, 2), stage_seed(3, 'x'), "
        "array_sha256(np.arange(3)), fingerprint(to_dict(GeneratorConfig())))"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True, timeout=120
    ).stdout.split()
    here = [
        fingerprint({"b": 1, "a": [0.1, None, "ä"]}, 2),
        str(stage_seed(3, "x")),
        array_sha256(np.arange(3)),
        fingerprint(to_dict(GeneratorConfig())),
    ]
    assert other == here
    assert here[:2] == ["fcb3172036263ac7", "6845345792451409772"]


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_names():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) and fingerprint(1, 2) != fingerprint(2, 1)
    assert fingerprint((1, 2)) == fingerprint([1, 2]) and fingerprint(np.float64(0.5)) == fingerprint(0.5)
    assert (
        fingerprint("1") != fingerprint(1)
        and fingerprint([1, [2]]) != fingerprint([1, 2])
        and fingerprint(1) != fingerprint(1.0 + 1e-12)
    )
    base = to_dict(GeneratorConfig())

    def other(v):
        if isinstance(v, bool):
            return not v
        return v + ("x" if isinstance(v, str) else 1)

    assert len({fingerprint(base | {k: other(v)}) for k, v in base.items()} | {fingerprint(base)}) == len(base) + 1


def test_an_array_s_hash_knows_shape_type_and_values():
    a = np.arange(6, dtype=np.uint8)
    different = [a, a.reshape(2, 3), a.reshape(3, 2), a.astype(np.int8), a[::-1], a[:5]]
    assert len({array_sha256(x) for x in different}) == len(different)
    assert array_sha256(np.asfortranarray(a.reshape(2, 3))) == array_sha256(a.reshape(2, 3)), (
        "the layout in memory does not count"
    )


def test_a_file_s_hash_is_sha256(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 700_000)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    with open(path, "rb") as f:
        assert files._sha256(f) == file_sha256(path)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**40), st.text(max_size=20), st.integers(0, 2**40), st.text(max_size=20))
def test_every_stage_has_a_seed_of_its_own(seed, stage, other_seed, other):
    a, b = stage_seed(seed, stage), stage_seed(other_seed, other)
    assert 0 <= a < 2**63 and (a == b) == ((seed, stage) == (other_seed, other))


def test_generators_of_different_stages_draw_different_numbers():
    def draw(seed, stage):
        return torch.randn(100, generator=stage_generator(seed, stage))

    drawn = [
        draw(0, "patchdiff-train-5"),
        draw(0, "patchdiff-train-9"),
        draw(1, "patchdiff-train-5"),
        draw(0, "patchdiff-sample-5"),
    ]
    assert torch.equal(draw(0, "patchdiff-train-5"), drawn[0])
    assert all(abs(float(np.corrcoef(a, b)[0, 1])) < 0.5 for i, a in enumerate(drawn) for b in drawn[:i])


# --- devices --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused_with_advice():
    assert pick_device("cpu") == torch.device("cpu") and pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ValueError, match="try 'cpu'"):
        pick_device("cuda:99")
    with pytest.raises(ValueError, match="abacus"):
        pick_device("abacus")


def test_mixed_precision_can_be_switched_off():
    with mixed_precision("cpu", False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_versions_name_what_a_result_depends_on():
    found = versions()
    assert (
        found["torch"] == torch.__version__.split("+")[0]
        and found["python"].startswith("3.")
        and set(found) >= {"python", "numpy", "scikit-learn", "grad_nb"}
    )


@pytest.mark.parametrize("has, words", [(True, "cpu (3 threads, NEON, bf16)"), (False, "cpu (3 threads, NEON)")])
def test_a_device_names_what_decides_its_speed_and_rounding(monkeypatch, has, words):
    monkeypatch.setattr(devices, "bf16_supported", lambda device: has)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NEON")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert device_name("cpu") == words


@pytest.mark.parametrize("name", ["mps", "meta", "xpu"])
def test_a_device_that_nothing_tests_is_refused(name):
    with pytest.raises(ValueError, match=f"device '{name}' (is not supported|cannot be used here).*'cpu'"):
        pick_device(name)


@pytest.mark.parametrize(
    "array",
    [
        np.array(3.5),
        np.zeros((0, 3)),
        np.arange(10)[::2],
        np.random.default_rng(0).random((5, 700, 1000))[:, ::2],
        np.array([True, False]),
    ],
)
def test_the_hash_of_an_array_is_that_of_its_head_and_its_bytes(array):
    whole = f"{array.dtype}{array.shape}".encode() + array.tobytes()
    assert array_sha256(array) == hashlib.sha256(whole).hexdigest()


def test_hashing_an_array_needs_no_second_one():
    array = np.zeros(64 * 2**20, np.uint8).reshape(64, -1)
    tracemalloc.start()
    array_sha256(array)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < array.nbytes / 4


def test_a_folder_is_no_file_of_tensors(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_tensors(tmp_path)
