"""grad_predict as it is used in a shell: pipes, several folders, heat maps, broken pictures, Ctrl-C, exit statuses."""

import ast
import contextlib
import csv
import importlib
import inspect
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from shared import ROOT

import grad_nb
from grad_nb.core.files import exclusive_lock
from grad_nb.core.tensors import write_tensors
from grad_nb.datasets.readers import IMAGE_SUFFIXES, read_image
from grad_nb.datasets.trays import make_trays
from grad_nb.grad import GRAD, colour_limits
from grad_nb.plots import heat_overlay
from grad_nb.use.daily import _kept_until_done, card_path, grad_fit, grad_predict
from grad_nb.use.errors import options_anywhere, plain_errors
from grad_nb.use.verdicts import expand, map_paths

COMMANDS = re.findall(r"^    grad_\w+ = ([\w.]+):(\w+)$", (ROOT / "settings.ini").read_text("utf-8"), re.MULTILINE)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SLOW = ("torch", "torchvision", "numpy", "pandas", "scipy", "sklearn", "matplotlib", "PIL", "panel", "tqdm")
TINY = (
    "generator.width=8 generator.steps=3 generator.batch=2 generator.n_samples=4 generator.sample_steps=2 "
    "detector.width=0.1 detector.steps=3 evaluation.map_size=64 evaluation.batch=2"
)


def run(*args, command="grad_predict", **kwargs) -> subprocess.CompletedProcess:
    "One command in a process of its own."
    return subprocess.run(start(*args, command=command), capture_output=True, timeout=120, **({"text": True} | kwargs))


def start(*args, command="grad_predict") -> list[str]:
    return [str(Path(sys.executable).parent / command), *map(str, args)]


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&-"])
def test_a_closed_stream_is_no_verdict(model, trays, closed):
    line = " ".join(map(shlex.quote, start(model, next((trays / "test/good").iterdir()), "--device", "cpu")))
    done = subprocess.run(["bash", "-c", f"{line} {closed}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert (len(done.stdout.splitlines()) == 2) == (">&- 2" not in closed)


def called(capsys, *args, **kwargs) -> tuple[int, list[dict], str]:
    "grad_predict in this process: its exit status, its rows and its stderr."
    status = 0
    try:
        grad_predict(*map(str, args), **kwargs)
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, list(csv.DictReader(io.StringIO(out))), err


@pytest.fixture(scope="module")
def trays(tmp_path_factory) -> Path:
    counts = {"train": 12, "validation": 0, "good": 3, "logical": 3, "structural": 2}
    return make_trays(tmp_path_factory.mktemp("data"), seed=3, size=64, progress=False, **counts)


@pytest.fixture(scope="module")
def model(trays, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.grad"
    grad_fit(str(trays / "train/good"), str(path), preset="demo", overrides=TINY, device="cpu", quiet=True)
    return path


@pytest.fixture
def parts(trays, tmp_path) -> Path:
    "A folder with three good pictures, free to be damaged."
    return Path(shutil.copytree(trays / "test/good", tmp_path / "parts"))


def test_a_full_disk_is_said_before_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("grad_nb.runs.check.room_left", lambda folder: 10)
    with pytest.raises(SystemExit):
        grad_fit(str(tmp_path), str(tmp_path / "m.grad"), preset="demo", work_dir=str(tmp_path / "work"))
    said = capsys.readouterr().err
    assert "No space left for this" in said and "--work-dir" in said and not (tmp_path / "work").exists()


def test_several_folders_and_pictures(model, trays, capsys):
    one = trays / "train/good/000.png"
    status, rows, _ = called(capsys, model, trays / "test/good", one, trays / "test/logical_anomalies")
    assert status == 0 and len(rows) == 7 and rows[3]["path"] == str(one)
    want = GRAD.load(model, "cpu").set_params(progress=False)
    scores = np.r_[
        want.score_samples(trays / "test/good"),
        want.score_samples([one]),
        want.score_samples(trays / "test/logical_anomalies"),
    ]
    assert np.allclose([float(r["score"]) for r in rows], scores, atol=2e-6)
    assert [r["anomalous"] == "True" for r in rows] == list(scores > want.offset_)


def test_nothing_to_judge(model, tmp_path, capsys):
    for args, said in (
        ((), "nothing to judge"),
        ((tmp_path,), "holds no pictures"),
        ((tmp_path / "gone.png",), "does not exist"),
    ):
        status, rows, err = called(capsys, model, *args)
        assert status == 2 and not rows and said in err and len(err.splitlines()) == 1


def test_a_folder_without_pictures_says_what_may_have_been_meant(model, parts, tmp_path, capsys):
    (tmp_path / "part/train").mkdir(parents=True)
    shutil.copytree(parts, tmp_path / "part/train/good")
    (tmp_path / "scans").mkdir()
    Image.open(parts / "000.png").save(tmp_path / "scans/0.jfif", format="JPEG")
    (tmp_path / "scans/deeper").mkdir()
    shutil.copy(parts / "000.png", tmp_path / "scans/deeper")
    for name, said in (
        ("part", "did you mean " + str(tmp_path / "part/train/good")),
        ("prat", "beside it lie part, parts, scans"),
        ("scans", "1 .jfif picture beside them (0.jfif), an ending that is not read"),
        ("scans", "1 picture in deeper (000.png)"),
    ):
        for command in (grad_fit, lambda folder: grad_predict(str(model), folder)):
            with pytest.raises(SystemExit) as stop:
                command(str(tmp_path / name))
            err = capsys.readouterr().err
            assert stop.value.code == 2 and len(err.splitlines()) == 1
            assert said in err or (name == "prat" and "does not exist" in err), err


def test_what_is_passed_over_is_told(model, parts, capsys):
    (parts / "deeper").mkdir()
    shutil.copy(parts / "000.png", parts / "deeper/x.png")
    Image.open(parts / "000.png").save(parts / "y.gif")
    status, rows, err = called(capsys, model, parts)
    assert status == 0 and len(rows) == 3
    assert "not used: 1 picture in deeper (x.png); folders below are not searched: give them too\n" in err
    assert "not used: 1 .gif picture" in err
    status, rows, err = called(capsys, model, parts, parts / "deeper")
    assert len(rows) == 4 and "deeper" not in err


def test_an_interrupted_fit_says_how_to_go_on_and_a_finished_one_leaves_no_stages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/grad_fit", "my parts", "--model", "m.grad"])
    model = str(tmp_path / "m.grad")
    with pytest.raises(KeyboardInterrupt), _kept_until_done(None, model) as folder:
        Path(folder).mkdir()
        Path(folder, ".lock").touch()
        Path(folder, ".generate-05.lock").touch()
        raise KeyboardInterrupt
    assert not Path(folder).exists() and capsys.readouterr().err == "", "nothing was done yet, so nothing is kept"
    with pytest.raises(KeyboardInterrupt), _kept_until_done(None, model) as folder:
        Path(folder).mkdir()
        Path(folder, ".lock").touch()
        Path(folder, "generate-05.json").touch()
        raise KeyboardInterrupt
    err = capsys.readouterr().err
    assert f"kept in {model}.work; to go on: grad_fit 'my parts' --model m.grad" in err and Path(folder).is_dir()
    with _kept_until_done(None, model) as folder:
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
    with _kept_until_done(str(tmp_path), model) as folder:
        pass
    assert tmp_path.is_dir() and capsys.readouterr().err == ""


def test_a_folder_with_the_name_of_the_work_folder_is_left_alone(tmp_path, monkeypatch, capsys):
    "The folder of an interrupted fit is removed when the fit is done; one that the user made is not."
    (tmp_path / "m.grad.work").mkdir()
    (tmp_path / "m.grad.work/thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        grad_fit("parts", str(tmp_path / "m.grad"), preset="demo", quiet=True)
    assert "m.grad.work is there and is no folder of an interrupted fit" in capsys.readouterr().err
    assert (tmp_path / "m.grad.work/thesis.tex").read_text() == "years of work"


def texts_of(path: Path) -> list[str]:
    "Every text in a module's code that is no docstring."
    tree = ast.parse(path.read_text("utf-8"))
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    found = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in found if text not in docs]


@pytest.mark.parametrize("path", sorted(Path(grad_nb.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_message_advises_to_delete_anything(path):
    for text in texts_of(path):
        assert not re.search(
            r"\b(delete|remove|erase|rm -r\w*|throw\w* away|wipe|empty) (it|them|that|this|the)\b", text
        ), text


def test_a_broken_picture_stops_or_is_passed_over(model, parts, capsys):
    broken = sorted(parts.glob("*.png"))[1]
    broken.write_bytes(broken.read_bytes()[:100])
    status, rows, err = called(capsys, model, parts)
    assert status == 2 and broken.name in err
    status, rows, err = called(capsys, model, parts, keep_going=True)
    assert status == 3 and len(rows) == 2 and err.count(str(broken)) == 1
    assert broken.name not in "".join(r["path"] for r in rows)
    for p in parts.glob("*.png"):
        p.write_bytes(b"")
    status, rows, err = called(capsys, model, parts, keep_going=True)
    assert status == 3 and rows == [] and err.count("0 bytes") == 3


def test_a_broken_picture_is_told_with_the_option_that_passes_it_over(model, parts, capsys):
    (parts / "broken.png").write_bytes(b"x")
    status, rows, err = called(capsys, model, parts)
    assert status == 2 and "broken.png" in err and "--keep-going" in err
    status, rows, err = called(capsys, model, parts, keep_going=True)
    assert status == 3 and "broken.png" in err and "--keep-going" not in err


def test_an_anomaly_goes_before_a_broken_picture(trays, model, parts, tmp_path, capsys):
    strict = GRAD.load(model, "cpu")
    strict.offset_ = -1e9
    strict.save(tmp_path / "strict.grad")
    assert called(capsys, tmp_path / "strict.grad", parts, fail_on_anomaly=True)[0] == 1
    assert called(capsys, tmp_path / "strict.grad", parts)[0] == 0
    (parts / "000.png").write_bytes(b"")
    assert called(capsys, tmp_path / "strict.grad", parts, fail_on_anomaly=True, keep_going=True)[0] == 1
    lax = GRAD.load(model, "cpu")
    lax.offset_ = 1e9
    lax.save(tmp_path / "lax.grad")
    assert called(capsys, tmp_path / "lax.grad", parts, fail_on_anomaly=True, keep_going=True)[0] == 3


def test_heat_maps_keep_the_proportions_and_the_calibrated_scale(model, tmp_path, capsys):
    wide = np.random.default_rng(0).integers(0, 256, (1300, 650, 3), np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(wide).save(tmp_path / "in/tall.jpg")
    status, rows, _ = called(capsys, model, tmp_path / "in", maps=str(tmp_path / "out"))
    assert status == 0 and rows[0]["map_path"] == str(tmp_path / "out/tall.jpg.png")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["tall.jpg.png"]
    assert Image.open(rows[0]["map_path"]).size == (512, 1024)


def test_a_normal_picture_is_grey_and_an_anomalous_one_is_coloured(model, trays, tmp_path, capsys):
    fitted = GRAD.load(model, "cpu").set_params(progress=False)
    picture = trays / "train/good/000.png"
    level = float(fitted.predict([picture]).maps.max())
    for name, limits in (("calm", (level + 1, level + 2)), ("hot", (level - 1, level))):
        fitted.map_limits_ = limits
        fitted.save(tmp_path / f"{name}.grad")
        called(capsys, tmp_path / f"{name}.grad", picture, maps=str(tmp_path / name))
    calm, hot = (np.asarray(Image.open(tmp_path / name / "000.png")).astype(int) for name in ("calm", "hot"))
    assert np.abs(calm - read_image(picture).mean(-1, keepdims=True)).max() <= 0.5
    assert np.ptp(hot, -1).max() > 50


def test_the_scale_is_that_of_the_normal_pictures(trays):
    maps = np.random.default_rng(1).normal(5, 2, (300, 8, 8))
    low, high = colour_limits(maps, 0.1)
    assert 0.08 <= (maps.max((1, 2)) > low).mean() <= 0.1 and high - low == pytest.approx(low - np.median(maps))
    flat = heat_overlay(np.full((40, 40, 3), (90, 120, 150), np.uint8), np.full((5, 5), low), (low, high))
    assert (flat == 120).all()


def test_maps_never_overwrite_pictures_nor_each_other(model, parts, tmp_path, capsys):
    before = {p: p.read_bytes() for p in parts.iterdir()}
    status, _, err = called(capsys, model, parts, maps=str(parts))
    assert status == 2 and "overwrite" in err and before == {p: p.read_bytes() for p in parts.iterdir()}
    (tmp_path / "link").symlink_to(parts)
    assert called(capsys, model, parts, maps=str(tmp_path / "link"))[0] == 2
    with pytest.raises(ValueError, match="same name"):
        map_paths([Path("a/x.jpg"), Path("b/../a/x.jpg")], "out")
    other = Path(shutil.copytree(parts, tmp_path / "others"))
    status, rows, _ = called(capsys, model, parts, other, maps=str(tmp_path / "out"))
    assert status == 0 and len({r["map_path"] for r in rows}) == 6 and all(Path(r["map_path"]).is_file() for r in rows)


def test_maps_replace_maps_and_nothing_else(model, parts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for _ in range(2):
        assert called(capsys, model, parts, maps=str(out))[0] == 0, "a map of ours is drawn anew"
    other = out / "001.png"
    shutil.copy(parts / "000.png", other)
    before = other.read_bytes()
    monkeypatch.setattr(GRAD, "stream", lambda *_, **__: pytest.fail("judged"))
    for options in ({}, {"watch": str(parts)}):
        status, rows, err = called(capsys, model, *([] if options else [parts]), maps=str(out), **options)
        assert status == 2 and not rows and f"{other} is there and is no heat map" in err
    assert other.read_bytes() == before
    assert "it is a file" in called(capsys, model, parts, maps=str(model))[2]


@given(
    st.sets(
        st.lists(st.sampled_from([".png", ".jpg", ".PNG", ".tif", "a", "."]), min_size=0, max_size=4)
        .map("".join)
        .flatmap(lambda stem: st.sampled_from(IMAGE_SUFFIXES).map(lambda end: f"x{stem}{end}")),
        min_size=2,
        max_size=8,
    )
)
def test_every_picture_has_a_map_of_its_own(names):
    "Also where one picture is called as another one's map would be, and whether they are judged together or alone."
    together = map_paths([Path("a", name) for name in names], "out")
    assert len(set(together.values())) == len(names)
    assert all(path.suffix.lower() == ".png" for path in together.values())
    assert all(map_paths([Path("a", name)], "out")[Path("a", name)] == together[Path("a", name)] for name in names)


def test_odd_names(model, trays, parts, tmp_path):
    for p in parts.iterdir():
        p.unlink()
    names = [
        b"\xc3\xa9t\xc3\xa9 \xe9\x9b\xb6.png",
        b"not utf-8 \xff.png",
        b'comma, "quote".png',
        b"two\nlines.png",
        b"x" * 251 + b".png",
        "ü".encode() * 125 + b".jpg",
    ]
    for i, name in enumerate(names):
        shutil.copy(trays / f"train/good/{i:03}.png", os.fsencode(parts) + b"/" + name)
    done = run(model, parts, "--maps", tmp_path / "maps", text=False, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode(errors="surrogateescape"), newline="")))
    assert {os.fsencode(Path(r["path"]).name) for r in rows} == set(names)
    assert len(list((tmp_path / "maps").iterdir())) == len(names)
    assert {os.fsencode(r["map_path"]) for r in rows} == {os.fsencode(p) for p in (tmp_path / "maps").iterdir()}
    rows = [json.loads(line) for line in run(model, parts, "--format", "jsonl").stdout.splitlines()]
    assert {os.fsencode(Path(r["path"]).name) for r in rows} == set(names)


def test_a_link_that_leads_to_itself_is_passed_over(model, parts, capsys):
    (parts / "loop.png").symlink_to(parts / "loop.png")
    (parts / "inside").symlink_to(parts)
    status, rows, err = called(capsys, model, parts, keep_going=True)
    assert status == 3 and len(rows) == 3 and "loop.png" in err


def test_a_reader_that_stops_early_ends_it_quietly(model, trays):
    first = subprocess.Popen(
        start(model, trays / "train/good", trays / "train/good", "--format", "jsonl"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stdout.readline()
    first.stdout.close()
    assert first.stderr.read() == "" and first.wait(60) == 141


def test_ctrl_c_ends_cleanly(model, trays, tmp_path):
    "After the first rows of a job that would take minutes."
    job = start(model, *[trays / "train/good"] * 2000)
    process = subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.strip() == "grad_predict: stopped" and out[-1:] in ("", "\n")


def test_a_traceback_only_with_debug(tmp_path):
    bad = tmp_path / "bad.grad"
    bad.write_bytes(b"nonsense")
    plain, debug = run(bad, tmp_path), run(bad, tmp_path, "--debug")
    assert plain.returncode == 2 and len(plain.stderr.splitlines()) == 1
    assert debug.returncode == 1 and "Traceback" in debug.stderr and "bad.grad" in debug.stderr


@pytest.mark.parametrize("module, name", COMMANDS)
def test_every_command_has_debug(module, name):
    assert "debug" in inspect.signature(getattr(importlib.import_module(module), name)).parameters


@pytest.mark.parametrize("module, name", COMMANDS)
@pytest.mark.parametrize("option, status", [("--help", 0), ("--no-such-option", 2)])
def test_help_and_a_wrong_option_are_answered_without_torch(module, name, option, status, tmp_path):
    "In a process in which nothing that is slow to import can be imported."
    script = tmp_path / name  # what pip makes of a console script; fastcore reads no arguments under python -c
    script.write_text(
        f"import sys\nfor slow in {SLOW!r}:\n    sys.modules[slow] = None\n"
        f"from {module} import {name}\nif __name__ == '__main__':\n    sys.exit({name}())\n"
    )
    done = subprocess.run([sys.executable, script, option], capture_output=True, text=True, timeout=60)
    assert done.returncode == status and f"usage: {name}" in done.stdout + done.stderr, done.stderr
    assert (len(done.stdout) > 200) == (option == "--help") and "Traceback" not in done.stderr
    if option == "--help":
        said = " ".join(done.stdout.split())
        assert f"Example: {name} " in said or f"Examples: {name}" in said
        assert ("--preset" in said and name != "grad_bench") == ('"demo": minutes' in said and '"paper": hours' in said)


def test_every_module_that_a_text_runs_is_a_command():
    "`python -m` of a module without a command ends with status 0 and has done nothing."
    folders = (ROOT / name for name in ("nbs", "docs", "results", "examples"))
    texts = [p for folder in folders for p in folder.rglob("*") if p.suffix in (".md", ".ipynb", ".sh", ".txt", ".qmd")]
    named: set[str] = set()
    for path in (*texts, *ROOT.glob("*.md"), ROOT / "Makefile"):
        named |= set(re.findall(r"python3? -m (grad_nb[\w.]*\w)", path.read_text("utf-8")))
    assert named
    for name in named:
        text = (ROOT / name.replace(".", "/")).with_suffix(".py").read_text("utf-8")
        assert "__main__" in text or "\n@call_parse\n" in text, name


def test_names_that_are_none_are_refused_without_torch(tmp_path):
    for name, arguments, said in (
        ("grad_fit", ("parts", "--preset", "huge"), "no preset 'huge'"),
        ("grad_demo", ("--preset", "huge"), "no preset 'huge'"),
        ("grad_demo", ("--category", "bottle"), "needs --data"),
        ("grad_data", ("weigh", "parts"), "grad_data check DIR"),
        ("grad_predict", ("m.grad", "parts", "--format", "xml"), "csv or jsonl"),
        ("grad_predict", ("m.grad", "parts", "--watch", "in"), "not both"),
        ("grad_export", ("m.grad", "--format", "int8"), "--normals"),
        ("grad_bench", ("--preset", "huge"), "no preset 'huge'"),
        ("grad_bench", ("--model", "m.grad"), "belong together"),
        ("grad_run", ("--preset", "huge"), "no preset 'huge'"),
        ("grad_reproduce", ("--preset", "huge"), "no preset 'huge'"),
        ("grad_reproduce", (), "needs --data"),
        ("grad_ablate", ("--preset", "huge"), "no preset 'huge'"),
        ("grad_ablate", ("--category", "bottle"), "needs --data"),
    ):
        script = tmp_path / name
        (module,) = [m for m, n in COMMANDS if n == name]
        script.write_text(f"import sys\nsys.modules['torch'] = None\nfrom {module} import {name}\n{name}()\n")
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and said in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    "line",
    [
        "m --keep-going a b",
        "m a --keep-going b",
        "m a b --keep-going",
        "--keep-going m a b",
        "m --keep-going -- a b",
        "m a --keep-going -- b",
    ],
)
def test_options_stand_before_between_or_after_the_pictures(line, monkeypatch):
    def command(model: str, *pictures: str, format: str = "csv", keep_going: bool = False):
        "Judge pictures."
        return model, pictures, format, keep_going

    monkeypatch.setattr("sys.argv", ["grad_predict", *line.split()])
    assert options_anywhere(command)() == ("m", ("a", "b"), "csv", True)
    assert options_anywhere(command)("m", "c", format="x") == ("m", ("c",), "x", False), "called, it reads no line"


@pytest.mark.parametrize("line", ["", "--no-such", "m --format", "m a --keep-going=x"])
def test_a_wrong_line_is_answered_with_the_usage(line, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["grad_predict", *line.split()])
    with pytest.raises(SystemExit) as stop:
        grad_predict()
    assert stop.value.code == 2 and "usage: grad_predict" in capsys.readouterr().err


def test_errors_of_other_kinds_are_one_line_too(capsys):
    for error, said in (
        (MemoryError(), "MemoryError"),
        (OSError(28, "No space left on device", "x"), "x: no space left on device"),
        (RuntimeError("a"), "a"),
    ):

        @plain_errors
        def command(error=error):
            raise error

        with pytest.raises(SystemExit) as stop:
            command()
        assert stop.value.code == 2 and said in capsys.readouterr().err

    @plain_errors
    def mistaken():
        raise KeyError("a defect of the program keeps its traceback")

    with pytest.raises(KeyError):
        mistaken()


def test_a_full_stdout_is_one_line(model, parts):
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run(start(model, parts), stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and "No space left" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_names_from_a_pipe(model, parts, capsys, monkeypatch):
    names = sorted(map(str, parts.glob("*.png")))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(names[:2]) + "\n"))
    status, rows, _ = called(capsys, model, "-", names[2])
    assert status == 0 and [r["path"] for r in rows] == names


def test_names_that_cannot_be_paths(model, parts, capsys):
    for name in ("x" * 5000, "x" * 300 + ".png"):
        status, rows, err = called(capsys, model, name)
        assert status == 2 and len(err.splitlines()) == 1 and name in err
        status, rows, err = called(capsys, model, name, parts, keep_going=True)
        assert status == 3 and len(rows) == 3


def test_fit_says_at_once_where_it_cannot_write(trays, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GRAD, "fit", lambda *_: pytest.fail("it was trained first"))
    (tmp_path / "file").touch()
    (tmp_path / "kept.grad").touch(0o444)
    for target in (tmp_path, tmp_path / "file/m.grad", tmp_path / "kept.grad"):
        with pytest.raises(SystemExit) as stop:
            grad_fit(str(trays / "train/good"), str(target), quiet=True)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and f"{target} cannot be written" in err and len(err.splitlines()) == 1


def test_a_model_that_cannot_be_saved_costs_no_training(trays, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "m.grad"
    with monkeypatch.context() as patch:
        patch.setattr(GRAD, "save", full)
        with pytest.raises(SystemExit):
            grad_fit(str(trays / "train/good"), str(target), "demo", overrides=TINY, device="cpu", quiet=True)
    assert (tmp_path / "m.grad.work").is_dir() and not target.exists()
    monkeypatch.setattr("grad_nb.grad.make_detector", lambda *_: pytest.fail("trained again"))
    grad_fit(str(trays / "train/good"), str(target), "demo", overrides=TINY, device="cpu", quiet=True)
    assert target.exists() and not (tmp_path / "m.grad.work").exists()


def test_options_that_a_watch_cannot_heed_are_refused(model, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    for options, said in (
        ({"keep_going": True}, "are for pictures that are given"),
        ({"fail_on_anomaly": True}, "are for pictures that are given"),
        ({"every": float("nan")}, "--every must be a number of seconds above 0, not nan"),
        ({"every": float("inf")}, "--every must be a number of seconds above 0, not inf"),
        ({"every": 0.0}, "--every must be a number of seconds above 0, not 0.0"),
        ({"journal": str(model)}, "would be overwritten"),
    ):
        with pytest.raises(SystemExit) as stop:
            grad_predict(str(model), watch=str(tmp_path / "in"), **options)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and said in err and not out


def test_options_of_watch_are_refused_without_it(model, parts, tmp_path, capsys):
    for options in ({"journal": str(tmp_path / "j.jsonl")}, {"every": 2.0}):
        status, rows, err = called(capsys, model, parts, **options)
        assert status == 2 and not rows and "belong to --watch" in err


def test_fit_refuses_a_misspelt_category_and_a_card_that_is_none(trays, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(GRAD, "fit", lambda *_: pytest.fail("it was trained first"))
    with pytest.raises(SystemExit):
        grad_fit(str(trays / "train/good"), str(tmp_path / "m.grad"), category="Screw", quiet=True)
    assert "did you mean 'screw'?" in capsys.readouterr().err
    (notes := tmp_path / "m.grad.md").write_text("my notes")
    with pytest.raises(SystemExit):
        grad_fit(str(trays / "train/good"), str(tmp_path / "m.grad"), quiet=True)
    assert f"{notes} is there and is no model card" in capsys.readouterr().err and notes.read_text() == "my notes"


def test_models_whose_names_differ_by_their_end_have_cards_of_their_own():
    assert card_path("a/screw.v1") != card_path("a/screw.v2") and card_path("a/part.grad") == Path("a/part.grad.md")


def test_names_on_stdin_are_lines_and_nothing_else(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one.png\n\n  \na\u2028b.png\r\nlast one.png"))
    assert expand(["-"]) == [Path("one.png"), Path("a\u2028b.png"), Path("last one.png")]


def test_fit_in_the_same_process_is_what_the_options_say(trays, tmp_path, capsys, monkeypatch):

    def stopped(self, X):
        Path(self.work_dir).mkdir()
        Path(self.work_dir, "generate-05.json").touch()
        raise KeyboardInterrupt

    def refused(self, X):
        seen.update(self.get_params(), X=X)
        raise ValueError("two\nlines")

    monkeypatch.setattr(GRAD, "fit", stopped)
    with pytest.raises(SystemExit) as stop:
        grad_fit(str(trays / "train/good"), str(tmp_path / "m.grad"), quiet=True)
    said = capsys.readouterr().err
    assert stop.value.code == 130 and said.endswith("\ngrad_fit: stopped\n")
    assert said.startswith(f"what is done is kept in {tmp_path / 'm.grad.work'}; to go on: ") and said.count("\n") == 2
    shutil.rmtree(tmp_path / "m.grad.work")
    seen = {}
    monkeypatch.setattr(GRAD, "fit", refused)
    options = {"preset": "demo", "category": "bottle", "validation": 0.3, "false_alarm_rate": 0.2, "seed": 4}
    with pytest.raises(SystemExit):
        grad_fit("parts", str(tmp_path / "m.grad"), device="cpu", work_dir="w", quiet=True, **options)
    want = {"X": "parts", "validation": 0.3, "false_alarm_rate": 0.2, "random_state": 4, "work_dir": "w"}
    assert {name: seen[name] for name in want} == want and seen["progress"] is False
    assert seen["augmentation"].vertical_flip and seen["preset"].name == "demo"
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(ValueError):
        grad_fit("parts", str(tmp_path / "m.grad"), debug=True)


@pytest.mark.parametrize(
    "error, said",
    [
        (FileNotFoundError(2, "No such file or directory", "part.grd"), "part.grd does not exist; check the path"),
        (PermissionError(13, "Permission denied", b"a\xffb"), "a\\udcffb: permission denied"),
        (OSError(28, "No space left on device", "x"), "x: no space left on device"),
        (FileNotFoundError("folder of our own words"), "folder of our own words"),
        (OSError(5, "Input/output error"), "[Errno 5] Input/output error"),
    ],
)
def test_errors_of_the_system_are_told_in_words(capsys, error, said):
    @plain_errors
    def command():
        raise error

    with pytest.raises(SystemExit):
        command()
    assert capsys.readouterr().err == f"command: {said}\n"


def test_names_that_others_chose_do_nothing_to_a_terminal(model, trays, parts, tmp_path):
    "Neither what the check, an evaluation or a calibration says, nor what the library logs."
    labelled = Path(shutil.copytree(parts, tmp_path / "labelled/good")).parent
    bad = labelled / "bad\x1b]0;x\x07"
    shutil.copytree(parts, bad)
    next(bad.iterdir()).rename(bad / "\x1b[2J\u202e.png")
    (labelled / "\x1b[31mempty").mkdir()
    (parts / "\x1b[31mdeeper").mkdir()
    shutil.copy(next(parts.glob("*.png")), parts / "\x1b[31mdeeper")
    commands = {
        "grad_evaluate": (model, labelled, "--quiet", "--device", "cpu"),
        "grad_calibrate": (model, labelled, "--quiet", "--device", "cpu", "--output", tmp_path / "new.grad"),
        "grad_data": ("check", labelled, "--quiet"),
        "grad_fit": (parts, "--model", tmp_path / "m.grad", "--preset", "demo", "--quiet", "--white", "-1"),
    }
    for name, arguments in commands.items():
        done = run(*map(str, arguments), command=name)
        said = done.stdout + done.stderr
        assert said and not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said), (name, said)
    assert "\\x1b" in run(model, labelled, "--quiet", command="grad_evaluate").stdout


def test_out_of_memory_is_one_line(model, parts, capsys, monkeypatch):
    import torch

    from grad_nb.inference import levels

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(levels, "score_map", full)
    status, rows, err = called(capsys, model, parts)
    assert status == 2 and not rows and "not even one item at a time fits in memory" in err and "device='cpu'" in err


def test_a_model_of_a_newer_version_and_no_model_at_all(model, parts, tmp_path, capsys):
    with safe_open(str(model), framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}
        about = json.loads(f.metadata()["json"])
    write_tensors(tmp_path / "newer.grad", tensors, about | {"format": 99})
    for path, said in (
        (tmp_path / "newer.grad", "upgrade grad_nb"),
        (tmp_path / "gone.grad", "gone.grad"),
        (tmp_path, ""),
        (parts / "000.png", "not a whole safetensors file"),
    ):
        status, _, err = called(capsys, path, parts)
        assert status == 2 and said in err and len(err.splitlines()) == 1


def test_a_finished_fit_leaves_the_folder_in_which_another_has_begun(tmp_path):
    with contextlib.ExitStack() as other:
        with _kept_until_done(None, str(tmp_path / "m.grad")) as folder:
            other.enter_context(exclusive_lock(Path(folder, ".lock")))
            Path(folder, "generate-05.json").touch()
        assert Path(folder, "generate-05.json").exists()
    with _kept_until_done(None, str(tmp_path / "m.grad")):
        pass
    assert not Path(folder).exists()


def test_an_interrupted_fit_leaves_the_folder_of_another_that_trains(tmp_path):
    with exclusive_lock(tmp_path / "m.grad.work/.lock"):
        with pytest.raises(KeyboardInterrupt), _kept_until_done(None, str(tmp_path / "m.grad")):
            raise KeyboardInterrupt
        assert (tmp_path / "m.grad.work/.lock").exists()
