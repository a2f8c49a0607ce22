"""The page to look at a run: what it shows, what it refuses, and (slow) a real browser that clicks through it."""

import base64
import csv
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shared import TINY, do_all

from grad_nb.core.files import read_json
from grad_nb.datasets.readers import DataError
from grad_nb.datasets.trays import make_trays
from grad_nb.grad import GRAD, colour_limits
from grad_nb.runs.stages import detect_stage, evaluate_stage, generate_stage, open_run
from grad_nb.study.figures import localised
from grad_nb.use.gallery import (
    MAX_UPLOAD,
    ORDERS,
    choose,
    data_of_run,
    histogram_figure,
    judge_upload,
    model_of_run,
    open_gallery,
    picture_figure,
    sheet_figure,
    tally,
    told,
    verdict_line,
)
from grad_nb.use.page import (
    browse_tab,
    grey_map_words,
    grey_words,
    judged_views,
    make_page,
    or_text,
    plain_text,
    png,
    verdict_view,
)
from grad_nb.use.show import free_port, grad_show, open_for_show
from grad_nb.verdicts import Calibration, calibration_of_quantile, percent


def finished(data, runs):
    "A run of trays with several detectors' worth of nothing learnt, with a notebook that says where its data are."
    run = open_run(data, "trays", "demo", 0, runs, TINY, "cpu", progress=False)
    for n in run.generator_levels:
        generate_stage(run, n)
    for row in run.levels:
        detect_stage(run, row.level)
    evaluate_stage(run)
    (run.folder / "notebooks").mkdir()
    (run.folder / "notebooks/table.ipynb").write_text(
        json.dumps({"metadata": {"papermill": {"parameters": {"data": str(data)}}}})
    )
    return run


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return finished(data, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def gallery(run):
    return open_gallery(run.folder, device="cpu")


def as_bytes(picture, format="PNG", **options) -> bytes:
    with io.BytesIO() as buffer:
        picture.save(buffer, format, **options)
        return buffer.getvalue()


def test_a_picture_that_is_dropped_in_has_the_score_of_the_run(gallery):
    for i in range(0, len(gallery.samples), 5):
        found = judge_upload(gallery.model, "x", gallery.samples[i].path.read_bytes())
        assert found.score == pytest.approx(gallery.scores[i], abs=1e-4)
        assert np.allclose(
            found.heat_map, np.asarray(gallery.maps[i], np.float32), atol=2e-3 * np.abs(found.heat_map).max() + 1e-3
        )


def test_threshold_and_scale_come_from_held_out_pictures_alone(run, gallery):
    held = [np.load(run.folder / f"scores/held-{row.level:03d}.npy") for row in run.levels]
    scores, maps = gallery.model._fused(held)
    assert gallery.model.offset_ == pytest.approx(np.quantile(scores, 0.95))
    assert gallery.model.map_limits_ == colour_limits(maps, 0.05)
    known = calibration_of_quantile(len(scores), 0.05)
    bound = percent(known.bound, up=True)
    rates = f"{percent(known.expected)} false alarms expected, at most {bound} with 90 % confidence"
    assert any(f"of {len(scores)} held-out normal pictures; {rates}" in note for note in gallery.notes)


def test_without_held_out_pictures_the_page_says_so(run):
    result = read_json(run.folder / "result.json")
    folder = run.folder.parent / "bare"
    shutil.copytree(run.folder, folder)
    for row in run.levels:
        np.save(folder / f"scores/held-{row.level:03d}.npy", np.empty((0, 1, 1), np.float32))
    shutil.rmtree(folder / "contrastive")
    model, source = model_of_run(folder, run.category, result, "cpu")
    shutil.rmtree(folder)
    assert "training pictures" in source and "may score higher" in source and np.isfinite(model.offset_)
    assert model.explain(run.category.test[0].path).levels[0].normal is None, "no patches kept, so none are shown"


def test_a_run_whose_kinds_of_defects_begin_like_formulas_is_shown(tmp_path):
    "In scores.csv no name is a formula, and the page and the figures find their pictures all the same."
    counts = {"train": 8, "validation": 4, "good": 3, "logical": 2, "structural": 2}
    root = make_trays(tmp_path / "drawn", seed=7, size=64, progress=False, **counts)
    part = root.rename(tmp_path / "part")
    shutil.rmtree(part / "ground_truth")
    (part / "test/structural_anomalies").rename(part / "test/=1+1")
    (part / "test/logical_anomalies").rename(part / "test/NA")
    (part / "test/good/000.png").rename(part / "test/good/=\x1b\n.png")
    run = open_run(tmp_path, "part", "demo", 0, tmp_path / "runs", TINY, "cpu", progress=False)
    do_all(run)
    rows = list(csv.DictReader(io.StringIO((run.folder / "scores.csv").read_text(), newline="")))
    assert [row["type"] for row in rows] == ["'=1+1"] * 2 + ["NA"] * 2 + ["good"] * 3
    assert all(math.isfinite(float(row["score"])) for row in rows)
    shown = open_gallery(run.folder, tmp_path, "cpu")
    assert sorted(shown.names) == sorted(row["path"] for row in rows) and len(localised(run).pictures) == 5


def test_order_kind_and_wrong_verdicts(gallery):
    everything, types = choose(gallery), np.array([s.type for s in gallery.samples])
    assert sorted(everything) == list(range(20)) and (np.diff(gallery.scores[everything]) <= 0).all()
    assert (np.diff(gallery.scores[choose(gallery, order="lowest score first")]) >= 0).all()
    assert list(choose(gallery, order="by name")) == list(range(20))
    for kind in set(types):
        assert (types[choose(gallery, kind)] == kind).all() and len(choose(gallery, kind)) == (types == kind).sum()
    for threshold in (-1e9, float(np.median(gallery.scores)), 1e9):
        wrong = {i for i in range(20) if (gallery.scores[i] > threshold) != (types[i] != "good")}
        assert set(choose(gallery, threshold=threshold)) == wrong
        assert {
            i for i in range(20) if verdict_line(gallery, i, threshold).endswith(("missed", "false alarm"))
        } == wrong
    with pytest.raises(ValueError, match="by name"):
        choose(gallery, order="as you like")
    assert len(choose(gallery, "no such type")) == 0 and ORDERS[0] == "highest score first"


def test_counts_at_the_ends(gallery):
    assert "14 of 14 anomalous pictures are found, 6 of 6 normal ones" in tally(gallery, -1e9)
    assert " 0 of 14 anomalous pictures are found, 0 of 6 normal ones" in tally(gallery, 1e9)
    assert "0 of 14" in tally(gallery, float(gallery.scores.max())), "a score at the threshold is normal, as in predict"


def test_figures_show_what_they_say(gallery):
    worst = next(i for i in choose(gallery) if gallery.samples[i].label)
    figure = picture_figure(gallery, worst)
    picture, heat, bar, truth = figure.axes
    assert [ax.get_title() for ax in (picture, heat, truth)] == ["picture", "map, on the model's scale", "true defect"]
    assert (picture.images[0].get_array() == np.asarray(Image.open(gallery.samples[worst].path).convert("RGB"))).all()
    assert bar.get_ylim() == pytest.approx(gallery.model.map_limits_)
    shown, mask = (
        np.asarray(truth.images[0].get_array()).astype(int),
        np.asarray(Image.open(gallery.samples[worst].masks[0])) > 0,
    )
    coloured = shown[..., 2] != shown[..., 0]
    assert (coloured | ~mask).all() and coloured.any() and not coloured.all()
    normal = next(i for i in range(20) if not gallery.samples[i].label)
    assert picture_figure(gallery, normal).axes[3].get_title() == "normal: no defect"
    figure = histogram_figure(gallery, 0.5, worst)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "threshold 0.500" in labels and "this picture" in labels and "good" in labels
    assert png(figure)[:8] == b"\x89PNG\r\n\x1a\n" and png(None) is None and sheet_figure(gallery, []) is None
    assert png(sheet_figure(gallery, choose(gallery)))


def test_a_type_that_looks_like_a_formula_is_shown_as_text(gallery):
    samples = tuple(replace(s, type=r"$\no$" if s.label else "good") for s in gallery.samples)
    figure = histogram_figure(replace(gallery, samples=samples), 0.5)
    assert r"\$\no\$" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()] and png(figure)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("half.png", as_bytes(Image.effect_noise((90, 90), 50))[:400], "half.png cannot be decoded"),
        ("empty.png", b"", "empty.png is empty"),
        ("a/b/../../etc/passwd", b"root:x:0:0:root", "passwd is not a PNG"),
        ("C:\\parts\\x.png", b"nonsense", "x.png is not a PNG"),
        ("tiny.png", as_bytes(Image.new("L", (20, 20))), "tiny.png has 20x20 pixels"),
        ("deep.tif", as_bytes(Image.new("F", (64, 64)), "TIFF"), "deep.tif"),
        ("", b"x", "the file is not"),
        ("new\nline\x1b[31m" + "n" * 300, b"x", "newline"),
        ("svg.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a PNG"),
        ("ps.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
    ],
    ids=("half", "empty", "path", "windows", "tiny", "float", "nameless", "control", "svg", "postscript"),
)
def test_what_is_dropped_in_is_not_trusted(gallery, name, content, said):
    with pytest.raises(DataError) as error:
        judge_upload(gallery.model, name, content)
    text = str(error.value)
    assert said in text and "/tmp" not in text and "\n" not in text and "\x1b" not in text and len(text) < 400


def test_a_bomb_and_a_file_that_is_too_large(gallery):
    bomb = bytearray(as_bytes(Image.new("1", (64, 64))))
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    with pytest.raises(DataError, match="b.png has 60000x60000 pixels .* GRAD_NB_MAX_PIXELS"):
        judge_upload(gallery.model, "b.png", bytes(bomb))
    with pytest.raises(DataError, match="at most 64 MB"):
        judge_upload(gallery.model, "b.png", bytes(MAX_UPLOAD + 1))


def test_nothing_of_an_upload_stays(gallery, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found = judge_upload(gallery.model, "x.jpg", as_bytes(Image.open(gallery.samples[0].path).convert("RGB"), "JPEG"))
    with pytest.raises(DataError):
        judge_upload(gallery.model, "x.jpg", b"x")
    assert list(tmp_path.iterdir()) == [] and told(found).startswith(("normal: score", "anomalous: score"))


def test_stages_of_another_run_than_the_result_are_refused(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run")
    other = read_json(run.folder / "detect-034.json") | {"fingerprint": "of other settings"}
    (tmp_path / "run/detect-034.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="detect-034 in .* is of another run"):
        open_gallery(tmp_path / "run", device="cpu")


def test_a_run_that_is_none_or_does_not_fit(run, data, tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(run.folder))):
        open_gallery(run.folder.parents[2], device="cpu")
    with pytest.raises(FileNotFoundError, match="grad_demo"):
        open_gallery(tmp_path, device="cpu")
    with pytest.raises(FileNotFoundError, match="gone"):
        open_gallery(tmp_path / "gone", device="cpu")
    with pytest.raises(ValueError, match="--data"):
        data_of_run(tmp_path)
    shutil.copytree(data, tmp_path / "other")
    victim = sorted((tmp_path / "other/trays/test/good").iterdir())[0]
    shutil.copy(sorted((tmp_path / "other/trays/test/good").iterdir())[1], victim)
    with pytest.raises(ValueError, match="has changed since"):
        open_gallery(run.folder, tmp_path / "other", "cpu")
    victim.unlink()
    with pytest.raises(ValueError, match="is not what this run was made with"):
        open_gallery(run.folder, tmp_path / "other", "cpu")
    with pytest.raises(DataError):
        open_gallery(run.folder, tmp_path / "nowhere", "cpu")


def test_ports():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port}.*--port"):
            free_port("127.0.0.1", port)
    assert 1024 < free_port("127.0.0.1", 0) < 65536
    for host, port in (("203.0.113.7", 0), ("127.0.0.1", 70000)):
        with pytest.raises(ValueError, match="cannot listen"):
            free_port(host, port)


def test_without_panel_it_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        grad_show(str(run.folder))
    assert stop.value.code == 2 and "pip install 'grad_nb[show]'" in capsys.readouterr().err


class Server:
    "grad_show as a user starts it."

    def __init__(self, folder, *arguments):
        script = (
            folder / "grad_show.py"
        )  # what pip makes of a console script; fastcore reads no arguments under python -c
        script.write_text(
            "from grad_nb.use.show import grad_show\nif __name__ == '__main__': raise SystemExit(grad_show())\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, script, *map(str, arguments), "--port", "0", "--device", "cpu"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.address = self.process.stdout.readline().split(" ")[0]
        self.base = self.address.partition("/?token=")[0]
        if not self.address:
            pytest.fail(f"grad_show ended with status {self.process.wait()}: {self.process.stderr.read()}")
        until = time.time() + 120
        while time.time() < until:
            try:
                urllib.request.urlopen(self.address, timeout=60).read()
                return
            except OSError:
                time.sleep(0.3)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.process.stderr.close()


def chromium() -> str:
    "The browser's program; the test is skipped where there is none."
    found = (
        os.environ.get("GRAD_NB_CHROMIUM")
        or shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not found:
        pytest.skip("no chromium here; set GRAD_NB_CHROMIUM to its program to run this test")
    return found


@pytest.mark.slow
def test_the_page_in_a_browser(run, gallery, tmp_path):
    "Clicks through the page; no request leaves this machine, and files that are no pictures do no harm."
    pytest.importorskip("panel")
    playwright = pytest.importorskip("playwright.sync_api")
    keep = Path(os.environ.get("GRAD_NB_SCREENSHOTS") or tmp_path)
    good, bad = next(s for s in gallery.samples if not s.label), tmp_path / "<img src=x onerror=alert(1)>.png"
    bad.write_bytes(b"nonsense")
    with Server(tmp_path, run.folder) as server, playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page, asked, alerts = browser.new_page(viewport={"width": 1400, "height": 1250}), [], []
        page.set_default_timeout(120_000)
        page.on("request", lambda r: asked.append(r.url))
        page.on("dialog", lambda d: (alerts.append(d.message), d.dismiss()))
        page.goto(server.address)
        page.get_by_text(gallery.title).wait_for()
        first = int(choose(gallery)[0])
        page.get_by_text(verdict_line(gallery, first, gallery.model.offset_)).wait_for()
        page.screenshot(path=keep / "page.png", full_page=True)
        page.get_by_label("type").select_option("good")
        best = int(choose(gallery, "good")[0])
        page.get_by_text(verdict_line(gallery, best, gallery.model.offset_)).wait_for()
        page.get_by_label("order").select_option("lowest score first")
        least = int(choose(gallery, "good", "lowest score first")[0])
        page.get_by_role("listbox").locator("option:first-child", has_text=gallery.names[least]).wait_for(
            state="attached"
        )  # the new order is there
        page.get_by_role("listbox").select_option(index=0)
        page.get_by_text(verdict_line(gallery, least, gallery.model.offset_)).wait_for()
        page.get_by_role("button", name="explain this picture").click()
        page.locator("img").nth(2).wait_for()
        page.wait_for_timeout(1500)
        page.screenshot(path=keep / "explained.png", full_page=True)
        dropped(page, {good.path.name: good.path.read_bytes()})  # the second tab comes to the front by itself
        score = gallery.scores[gallery.samples.index(good)]
        page.get_by_text(re.compile(rf"(normal|anomalous): score {score:.3f}")).wait_for()
        page.wait_for_timeout(1500)
        page.screenshot(path=keep / "dropped.png", full_page=True)
        page.locator("input[type=file]").set_input_files(bad)
        page.get_by_text("is not a PNG").wait_for()
        page.screenshot(path=keep / "refused.png", full_page=True)
        own = (server.base, server.base.replace("http", "ws"), "data:", "blob:")
        assert not alerts and all(url.startswith(own) for url in asked), asked
        large = tmp_path / "large.png"
        large.write_bytes(os.urandom(200 * 2**20))
        page.locator("input[type=file]").set_input_files(large)
        page.get_by_text("large.png has 200 MB; a file may have at most 64 MB").wait_for()
        page.screenshot(path=keep / "large.png", full_page=True)
        page.reload()
        page.get_by_text(gallery.title).wait_for()
        stranger = browser.new_context().new_page()
        stranger.goto(server.base)
        assert "open the address that grad_show printed" in stranger.inner_text("body")
        browser.close()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 130 and "Traceback" not in server.process.stderr.read()


def dropped(page, files: dict[str, bytes]) -> None:
    "Drop files on the page, beside the field for files."
    encoded = [[name, base64.b64encode(content).decode()] for name, content in files.items()]
    transfer = page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer()
            for (const [name, text] of files) {
                const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0))
                transfer.items.add(new File([bytes], name, {type: 'image/png'}))
            }
            return transfer
        }""",
        encoded,
    )
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})


@pytest.mark.slow
def test_several_pictures_dropped_anywhere_have_a_verdict_each(gallery, tmp_path):
    pytest.importorskip("panel")
    playwright = pytest.importorskip("playwright.sync_api")
    model = gallery.model
    model.n_pictures_ = (4, 4)
    threshold = float(np.median(gallery.scores))
    model.save(tmp_path / "part.grad")
    strict = GRAD.load(tmp_path / "part.grad", "cpu")
    strict.offset_, strict.map_limits_ = threshold, (float(gallery.scores.max()) + 1, float(gallery.scores.max()) + 2)
    strict.save(tmp_path / "part.grad")
    high, low = (gallery.samples[int(choose(gallery)[i])].path.read_bytes() for i in (0, -1))
    with Server(tmp_path, tmp_path / "part.grad") as server, playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.goto(server.address)
        page.get_by_text(f"part.grad, threshold {threshold:.3f}").wait_for()
        page.locator("input[type=file]").wait_for()
        page.wait_for_timeout(1500)
        dropped(page, {"high.png": high, "low.png": low, "bad.png": b"nonsense"})
        page.get_by_text("bad.png is not a PNG").wait_for()
        assert page.get_by_text("ANOMALOUS", exact=True).count() == 1 == page.get_by_text("NORMAL", exact=True).count()
        assert page.get_by_text("high.png", exact=True).count() == 1 == page.get_by_text("low.png", exact=True).count()
        page.get_by_text("The map is grey although the score is above the threshold").wait_for()
        browser.close()


def test_a_grey_map_of_an_anomalous_picture_has_words(gallery):
    found = gallery.model.explain(gallery.samples[0].path)
    peak = float(found.heat_map.max())
    anomalous = replace(found, threshold=found.score - 1)
    assert "where colour begins" in grey_map_words(replace(anomalous, limits=(peak + 1, peak + 2)))
    assert grey_map_words(replace(anomalous, limits=(peak - 1, peak + 2))) == ""
    assert grey_map_words(replace(found, threshold=found.score + 1, limits=(peak + 1, peak + 2))) == ""
    assert grey_words(True, 0.2, 0.3).endswith("Smoothed, it stays below 0.300, where colour begins.")


def test_a_grey_map_of_a_test_picture_has_words_too(gallery):
    pn = pytest.importorskip("panel")
    first = int(choose(gallery)[0])
    begins = gallery.model.map_limits_
    for limits, wanted in (((1e6, 2e6), True), ((-1e6, 1e6), False)):
        gallery.model.map_limits_ = limits
        try:
            shown = browse_tab(gallery).select(pn.pane.HTML)
        finally:
            gallery.model.map_limits_ = begins
        words = [pane.object for pane in shown if "The map is grey although" in pane.object]
        assert gallery.scores[first] > gallery.model.offset_ and bool(words) == wanted


def test_verdicts_are_a_word_in_a_colour_under_the_name_of_the_file(gallery):
    pn = pytest.importorskip("panel")
    found = gallery.model.explain(gallery.samples[0].path)
    for threshold, word, colour in ((found.score - 1, "ANOMALOUS", "#b00020"), (found.score + 1, "NORMAL", "#1b6e34")):
        title, large, *_ = verdict_view("<b>.png", replace(found, threshold=threshold))
        assert "&lt;b&gt;.png" in title.object and word in large.object and large.styles["color"] == colour
    content = gallery.samples[0].path.read_bytes()
    views = judged_views(gallery.model, [content, b"x"] * 11, [f"{i}.png" for i in range(22)])
    assert len(views) == 21 and "1.png is not a PNG" in views[1].object and "first 20 of 22" in views[20].object
    assert isinstance(judged_views(gallery.model, None, None), pn.pane.HTML)


@pytest.mark.slow
def test_only_this_machine_and_only_this_page(run, tmp_path):
    "It listens on the loopback address alone, and its channel refuses pages from elsewhere."
    pytest.importorskip("panel")
    with Server(tmp_path, run.folder) as server:
        host, port = server.base.removeprefix("http://").split(":")
        assert host == "127.0.0.1"
        listening = (
            [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
            if sys.platform == "linux"
            else []
        )
        assert [a for a in listening if a.endswith(f":{int(port):04X}")] in ([f"0100007F:{int(port):04X}"], [])

        handshake = (
            "GET /ws?token={token} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Protocol: bokeh, x\r\nOrigin: {origin}\r\n\r\n"
        )

        token = server.address.partition("token=")[2]

        def knock(origin, name=f"{host}:{port}", token=token):
            with socket.create_connection((host, int(port)), 30) as s:
                s.sendall(handshake.format(origin=origin, host=name, token=token).encode())
                return s.recv(200).split(b"\r\n")[0]

        assert b"101" in knock(server.base) and b"403" in knock("http://elsewhere.example")
        assert b"403" in knock(server.base, token="") and b"403" in knock(server.base, token=token[:-1])
        evil = "elsewhere.example"
        assert b"403" in knock(f"http://{evil}", name=evil), "a name that was lent to our address"
        for path in ("", "metadata", "autoload.js?bokeh-autoload-element=1"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"{server.base}/{path}", timeout=60)
        with urllib.request.urlopen(server.address, timeout=60) as answer:
            assert "HttpOnly" in answer.headers["Set-Cookie"] and "SameSite=Strict" in answer.headers["Set-Cookie"]
            assert answer.headers["Content-Security-Policy"] == "frame-ancestors 'none'"
        with socket.create_connection((host, int(port)), 60) as s:  # whoever passes by the page's own refusal
            s.sendall(handshake.format(origin=server.base, host=f"{host}:{port}", token=token).encode())
            assert b"101" in s.recv(4096)
            s.sendall(b"\x81\xff" + (200 * 2**20).to_bytes(8, "big") + bytes(4))
            while s.recv(4096):
                pass  # it is closed before the 200 MB come
        with socket.create_connection((host, int(port)), 30) as s:
            s.sendall(f"POST / HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 200000000\r\n\r\n".encode())
            assert s.recv(100)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413"), "refused before it is sent"


def test_names_and_messages_are_never_html(gallery):
    "A picture may be called anything; so may what is said of it."
    pytest.importorskip("panel")

    def fails():
        raise DataError("<img src=x onerror=alert(1)>.png is not a picture & never was")

    for made in (plain_text("<img src=x onerror=alert(1)>"), or_text(lambda: "<img src=x>"), or_text(fails)):
        assert "<img" not in made.object and "&lt;img" in made.object
    assert (
        type(or_text(lambda: histogram_figure(gallery, 0.0))).__name__ == "PNG"
        and "<b>" not in or_text(lambda: None).object
    )


def test_a_model_alone_can_be_shown(gallery, tmp_path):
    pytest.importorskip("panel")
    gallery.model.save(tmp_path / "part.grad")
    model = open_for_show(tmp_path / "part.grad", device="cpu")
    assert isinstance(model, GRAD) and model.offset_ == gallery.model.offset_
    assert len(make_page(model)) == 3 == len(make_page(gallery))
    model.calibration_ = Calibration(9, 1, 0.05)
    said = make_page(model)[1].object
    assert "10 % false alarms expected, at most 23 % with 90 % confidence" in said and "too few for 5 %" in said
