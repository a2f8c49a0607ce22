"""What is killed, and what must be the same afterwards: a trial each of fit, predict, watch, unpack, export, demo, ...

Each job makes what it needs once, undisturbed: that is what the disturbed ones are compared with.
"""

import contextlib
import csv
import importlib
import json
import os
import random
import shutil
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from harness.damage import damaged, other_data, other_tensors, whole_pictures
from harness.server import Command, litter, to_the_end
from PIL import Image

FIT = (
    "generator.size=64 generator.width=4 generator.steps=20 generator.batch=2 generator.n_samples=4 "
    "generator.sample_steps=2 detector.width=0.1 detector.steps=20 evaluation.map_size=64"
)  # settings of a training of a second or two


@dataclass
class Outcome:
    "What a trial gave."

    counts: dict[str, int] = field(default_factory=dict)  # kills, pictures, models: name → how many
    wrong: list[str] = field(default_factory=list)  # what did not hold


# what starts threads when it is imported: a child that is forked after them can wait for ever for a lock of theirs
WITH_THREADS = ("onnxruntime", "openvino")


class Bench:
    "The folder that the jobs share, with pictures, a data set, and a model made undisturbed."

    def __init__(self, folder: Path):
        "Everything in a folder of its own; needs the package imported."
        self.folder = folder
        self.tmp = folder / "tmp"
        self.tmp.mkdir(parents=True, exist_ok=True)
        os.environ["TMPDIR"] = str(self.tmp)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        self.data = folder / "data"
        if not self.data.is_dir():
            from grad_nb.datasets.trays import make_trays

            sizes = dict(size=64, train=10, validation=4, good=3, logical=3, structural=3)
            make_trays(self.data, seed=7, progress=False, **sizes)
        self.model = folder / "model.grad"
        self.lengths: dict[str, float] = {}
        self.fit_length = self.undisturbed("fit", self.fit(self.model, None))

    def fit(self, model: Path, work: Path | None):
        "grad_fit, to be forked."
        from grad_nb.use.daily import grad_fit

        normal = self.data / "trays/train/good"
        kept = None if work is None else str(work)
        return lambda: grad_fit(str(normal), str(model), "demo", overrides=FIT, device="cpu", work_dir=kept, quiet=True)

    def undisturbed(self, name: str, work, again: bool = True) -> float:
        "Seconds that a command takes, the second time where it does its work `again`; `RuntimeError` if it fails."
        names = self.folder / f"{name}-modules"

        def noting() -> None:
            try:
                work()
            finally:
                names.write_text("\n".join(sys.modules))

        command = Command(noting, self.folder / f"{name}-undisturbed")
        if not command.wait(900) or command.status:
            said = (self.folder / f"{name}-undisturbed.err").read_text(errors="replace")
            raise RuntimeError(f"{name} ended with status {command.status}, undisturbed: {said[-2000:]}")
        self.lengths[name] = time.monotonic() - command.started
        for module in names.read_text().splitlines():  # the next ones need not import them
            if module.split(".")[0] not in WITH_THREADS:
                with contextlib.suppress(Exception):
                    importlib.import_module(module)
        if again:
            second = Command(noting, self.folder / f"{name}-again")
            second.wait(900)
            self.lengths[name] = time.monotonic() - second.started
        return self.lengths[name]

    def fresh(self, name: str) -> Path:
        "An empty folder for a trial."
        folder = self.folder / "trial" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def left(self, *folders: Path) -> list[str]:
        "Litter in some folders and in the one for temporary files."
        theirs = ("torchinductor", ".ses")  # of torch, and of ONNX Runtime's session
        there = [p for p in self.tmp.iterdir() if not p.name.startswith(theirs)]
        return litter(*folders) + [f"{path} was left" for path in there]


def fit(bench: Bench, rng: random.Random) -> Outcome:
    "A training is killed several times; the model is the undisturbed one's, byte for byte."
    folder = bench.fresh("fit")
    kept = rng.random() < 0.8
    work = bench.fit(folder / "m.grad", folder / "work" if kept else None)

    def look() -> list[str]:
        path = folder / "m.grad"
        torn = path.exists() and path.read_bytes() != bench.model.read_bytes()
        return ["a model is there that is not the whole one"] if torn else []

    kills = rng.randint(5, 14) if kept else rng.randint(1, 2)
    met, wrong = to_the_end(work, folder / "fit", rng, bench.fit_length, kills, look)
    same = (folder / "m.grad").exists() and (folder / "m.grad").read_bytes() == bench.model.read_bytes()
    wrong += [] if same else ["the model is another than the undisturbed one's"]
    return Outcome({"kills of fit": met}, wrong + bench.left(folder))


def some_pictures(folder: Path, n: int, side: int = 64) -> list[Path]:
    "Pictures that a model finds ordinary and strange ones."
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    paths = []
    for i in range(n):
        small = rng.integers(0, 256, (5, 5, 3), np.uint8)
        paths.append(folder / f"{i:03}.png")
        Image.fromarray(small).resize((side, side)).save(paths[-1], compress_level=1)
    return paths


def scores_of(bench: Bench, pictures: Path) -> dict[str, tuple[str, str]]:
    "Name → score and verdict, undisturbed."
    from grad_nb.use.daily import grad_predict

    name = f"scores-{len(list(pictures.iterdir()))}"
    table = bench.folder / f"{name}-undisturbed.out"
    if name not in bench.lengths:
        table.unlink(missing_ok=True)
        bench.undisturbed(name, lambda: grad_predict(str(bench.model), str(pictures), device="cpu"))
    rows = csv.DictReader(table.read_text().splitlines())
    return {Path(row["path"]).name: (row["score"], row["anomalous"]) for row in rows}


def predict(bench: Bench, rng: random.Random) -> Outcome:
    "Judging with maps is killed; rows and maps are the undisturbed ones."
    from grad_nb.use.daily import grad_predict

    pictures = bench.folder / "pictures"
    if not pictures.is_dir():
        some_pictures(pictures, 40)
    truth = bench.folder / "maps"

    def work(maps: Path):
        return lambda: grad_predict(str(bench.model), str(pictures), maps=str(maps), device="cpu")

    if "predict" not in bench.lengths:
        bench.undisturbed("predict", work(truth))
    folder = bench.fresh("predict")

    def look() -> list[str]:
        made = [p for p in (folder / "maps").rglob("*.png")] if (folder / "maps").is_dir() else []
        torn = [p.name for p in made if p.read_bytes() != (truth / p.name).read_bytes()]
        return [f"maps are there that are not whole: {torn}"] if torn else []

    out = folder / "predict"
    met, wrong = to_the_end(work(folder / "maps"), out, rng, bench.lengths["predict"], rng.randint(1, 4), look)
    told = Path(f"{out}.out").read_text()
    rows = csv.DictReader(told[told.rindex("path,score") :].splitlines())  # of the last one
    found = {Path(row["path"]).name: row["score"] for row in rows}
    expected = {name: score for name, (score, _) in scores_of(bench, pictures).items()}
    wrong += [] if found == expected else ["scores differ from the undisturbed ones"]
    maps = {p.name: p.read_bytes() for p in (folder / "maps").iterdir()}
    wrong += [] if maps == {p.name: p.read_bytes() for p in truth.iterdir()} else ["maps differ"]
    return Outcome({"kills of predict": met}, wrong + bench.left(folder))


def watch(bench: Bench, rng: random.Random, n: int = 60, kills: int = 0) -> Outcome:
    """Pictures arrive while watchers are killed; each is judged once, told, and has the score that it has alone.

    They arrive between all of the kills: after the last one there is something left to judge.
    """
    from grad_nb.use.daily import grad_predict

    source = bench.folder / f"arriving-{n}"
    if not source.is_dir():
        some_pictures(source, n)
    expected = scores_of(bench, source)
    folder = bench.fresh("watch")
    (folder / "in").mkdir()
    waiting = sorted(source.iterdir())
    journal = folder / "journal.jsonl"
    kills = kills or rng.randint(3, 8)
    met = 0

    def deliver() -> None:
        due = n * (met + 1) // (kills + 1)
        if waiting and n - len(waiting) < due and rng.random() < 0.3:
            path = waiting.pop()
            shutil.copy(path, folder / "in" / f".{path.name}")
            os.replace(folder / "in" / f".{path.name}", folder / "in" / path.name)

    def work() -> None:
        grad_predict(
            str(bench.model), watch=str(folder / "in"), journal=str(journal), every=0.05, format="jsonl", device="cpu"
        )

    wrong: list[str] = []
    out = folder / "watch"
    for _ in range(kills):
        command = Command(work, out)
        if command.wait(0.3 + rng.random() * 4, deliver):
            wrong.append(f"the watcher ended by itself with status {command.status}")
            break
        wrong += command.kill(rng.choice((9, 9, 15, 1)))
        met += 1
    last = Command(work, out)
    end = time.monotonic() + 300
    while not wrong and time.monotonic() < end:
        last.wait(0.2, deliver)
        lines = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if not waiting and lines >= len(expected):
            break
    time.sleep(0.3)
    wrong += last.kill(2)
    return Outcome(
        {"kills of watch": met, "pictures watched": len(expected)},
        wrong + told_and_kept(out, journal, expected, met) + bench.left(folder),
    )


def long_watch(bench: Bench, rng: random.Random) -> Outcome:
    "As `watch`, with 300 pictures in one folder and 30 kills or more."
    return watch(bench, rng, 300, rng.randint(30, 35))


def told_and_kept(out: Path, journal: Path, expected: dict, kills: int) -> list[str]:
    "What is wrong with what watchers told and wrote down."
    kept = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    told = [json.loads(line) for line in Path(f"{out}.out").read_text().splitlines()]
    wrong = []
    if sorted(row["name"] for row in kept) != sorted(expected):
        lost = sorted(set(expected) - {row["name"] for row in kept})
        wrong.append(f"the journal has {len(kept)} lines for {len(expected)} pictures; lost: {lost}")
    if {Path(row["path"]).name for row in told} != {row["name"] for row in kept}:
        wrong.append("what was told is not what was written down")
    if len(told) - len(kept) > kills:
        wrong.append(f"{len(told) - len(kept)} rows were told twice after {kills} kills")
    for row in kept + [{"name": Path(row["path"]).name, **row} for row in told]:
        if (str(row.get("score")), str(row.get("anomalous"))) != expected.get(row["name"]):
            wrong.append(f"{row['name']} has another score than alone: {row}")
    return wrong


def unpack(bench: Bench, rng: random.Random) -> Outcome:
    "Unpacking is killed; the folder is absent or whole."
    from grad_nb.datasets.unpack import unpack as unpack_archive
    from grad_nb.use.errors import plain_errors

    archive = bench.folder / "parts.tar.xz"
    if not archive.exists():
        some_pictures(bench.folder / "parts", 150, 96)
        with tarfile.open(archive, "w:xz", preset=0) as tar:
            tar.add(bench.folder / "parts", "parts")
    whole = {p.name: p.read_bytes() for p in (bench.folder / "parts").iterdir()}
    folder = bench.fresh("unpack")
    target = folder / "out"

    def as_command() -> None:
        if not target.exists():
            unpack_archive(archive, target, True, False)

    def look() -> list[str]:
        if not target.exists():
            return []
        found = {p.name: p.read_bytes() for p in (target / "parts").iterdir()}
        return [] if found == whole else ["the folder is there and not whole"]

    work = plain_errors(as_command)
    if "unpack" not in bench.lengths:
        bench.undisturbed(
            "unpack", plain_errors(lambda: unpack_archive(archive, bench.fresh("whole") / "out", True, False))
        )
    met, wrong = to_the_end(work, folder / "unpack", rng, bench.lengths["unpack"], rng.randint(2, 6), look)
    wrong += look() if target.exists() else ["nothing was unpacked in the end"]
    return Outcome({"kills of unpack": met}, wrong + bench.left(folder))


def export(bench: Bench, rng: random.Random) -> Outcome:
    "Exporting is killed; the file is absent or whole."
    from grad_nb.use.daily import grad_export

    truth = bench.folder / "model.onnx"
    if "export" not in bench.lengths:
        bench.undisturbed("export", lambda: grad_export(str(bench.model), str(truth)))
    folder = bench.fresh("export")
    path = folder / "m.onnx"

    def look() -> list[str]:
        torn = path.exists() and path.read_bytes() != truth.read_bytes()
        return ["an export is there that is not the whole one"] if torn else []

    def work() -> None:
        grad_export(str(bench.model), str(path))

    met, wrong = to_the_end(work, folder / "export", rng, bench.lengths["export"], rng.randint(1, 3), look)
    wrong += look() if path.exists() else ["nothing was exported in the end"]
    return Outcome({"kills of export": met}, wrong + bench.left(folder))


def figures(runs: Path) -> dict[str, dict]:
    "The results in a folder of runs, less what tells when, how long and in how many threads."
    found = {}
    for path in sorted(runs.rglob("result.json")):
        result = {
            k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "made", "device", "git")
        }
        stages = result["stages"].items()
        result["stages"] = {name: {k: v for k, v in stage.items() if k != "device"} for name, stage in stages}
        found[str(path.relative_to(runs))] = result
    return found


def demo(bench: Bench, rng: random.Random) -> Outcome:
    "The notebooks of grad_demo are killed with their parent; the result is the undisturbed one."
    from grad_nb.use.demo import grad_demo

    def work(runs: Path):
        return lambda: grad_demo(str(bench.data), "trays", runs=str(runs), overrides=FIT, device="cpu")

    if "demo" not in bench.lengths:
        bench.undisturbed("demo", work(bench.folder / "demo"), again=False)
    folder = bench.fresh("demo")
    met, wrong = to_the_end(work(folder / "runs"), folder / "demo", rng, bench.lengths["demo"], rng.randint(1, 3))
    same = figures(folder / "runs") == figures(bench.folder / "demo")
    return Outcome({"kills of demo": met}, wrong + ([] if same else ["the result differs"]) + bench.left(folder))


def reproduce(bench: Bench, rng: random.Random) -> Outcome:
    "A batch is killed with its notebooks; the result is the undisturbed one."
    from grad_nb.study.commands import grad_reproduce

    def work(runs: Path):
        settings = dict(dataset="trays", preset="demo", seeds=(0,), overrides=FIT, device="cpu")
        return lambda: grad_reproduce(str(bench.data), runs=str(runs), **settings)

    if "reproduce" not in bench.lengths:
        bench.undisturbed("reproduce", work(bench.folder / "reproduce"), again=False)
    folder = bench.fresh("reproduce")
    length = bench.lengths["reproduce"]
    met, wrong = to_the_end(work(folder / "runs"), folder / "reproduce", rng, length, rng.randint(1, 2))
    same = figures(folder / "runs") == figures(bench.folder / "reproduce")
    return Outcome({"kills of reproduce": met}, wrong + ([] if same else ["the result differs"]) + bench.left(folder))


def met(path: Path, what: str, use: Callable[[Path], list[str]], refusal: type[Exception] = ValueError) -> list[str]:
    "What is wrong with how a damaged file is met: it is refused by its name, or `use` says what is wrong with it."
    try:
        return use(path)
    except refusal as e:
        return [] if str(path) in str(e) else [f"an error of {what} names no file: {e}"]
    except Exception as e:
        return [f"{what} gave {type(e).__name__}: {e}"]


def models(bench: Bench, rng: random.Random, n: int = 100) -> Outcome:
    "Damaged models are refused by name, or are the model."
    from grad_nb.grad import GRAD

    whole = bench.model.read_bytes()
    path = bench.fresh("models") / "m.grad"
    numbers = np.random.default_rng(rng.getrandbits(32))
    wrong = []

    def use(path: Path) -> list[str]:
        GRAD.load(path, "cpu")
        return []

    for _ in range(n):
        path.write_bytes(damaged(whole, numbers))
        wrong += met(path, "a damaged model", use)
    return Outcome({"damaged models": n}, wrong)


def sealed(bench: Bench, rng: random.Random, n: int = 100) -> Outcome:
    "Models with other data or tensors under a right seal are refused by name, or judge with numbers that are some."
    from grad_nb.core.tensors import read_tensors, write_tensors
    from grad_nb.grad import GRAD

    tensors, meta = read_tensors(bench.model)
    path = bench.fresh("sealed") / "m.grad"
    numbers = np.random.default_rng(rng.getrandbits(32))
    seen = numbers.integers(0, 256, (1, 64, 64, 3), np.uint8)
    wrong = []

    def use(path: Path) -> list[str]:
        scores = GRAD.load(path, "cpu").set_params(progress=False).score_samples(seen)
        return [] if np.isfinite(scores).all() else ["a model judges with what is no number"]

    for _ in range(n):
        if numbers.random() < 0.7:
            write_tensors(path, tensors, other_data(meta, numbers))
        else:
            write_tensors(path, other_tensors(tensors, numbers), meta)
        wrong += met(path, "a model that was sealed again", use)
    return Outcome({"models sealed again": n}, wrong)


def pictures(bench: Bench, rng: random.Random, n: int = 2000) -> Outcome:
    "Damaged pictures of every format are refused by name, or read."
    from grad_nb.datasets.readers import DataError, read_image

    path = bench.fresh("damaged") / "p.img"
    numbers = np.random.default_rng(rng.getrandbits(32))
    whole = sorted(whole_pictures().items())
    wrong = []

    def use(path: Path) -> list[str]:
        shape = read_image(path, 40).shape
        return [] if shape == (40, 40, 3) else [f"a damaged picture gave {shape}"]

    for _ in range(n):
        kind, data = rng.choice(whole)
        path.write_bytes(damaged(data, numbers))
        wrong += met(path, f"a damaged {kind}", use, DataError)
    return Outcome({"damaged pictures": n}, wrong)


JOBS = {
    job.__name__: job
    for job in (fit, predict, watch, long_watch, unpack, export, models, sealed, pictures, demo, reproduce)
}
# what follows what: something of everything first, then what is short; the long watch is asked for by name
SHORT = ("fit", "watch", "predict", "unpack", "models", "sealed", "pictures")
ROUND = (*SHORT, "fit", "export", "fit", "watch", "fit", "unpack")
ORDER = (*SHORT, "demo", "reproduce", "export", *ROUND, *ROUND, "demo", *ROUND, *ROUND, "reproduce")
