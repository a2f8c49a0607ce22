"""The site lists every notebook, README says what the records say, and the exercises have solutions that run."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys

import pytest
from shared import ROOT

from grad_nb.use.daily import grad_fit

DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "nbs"
PAGES = [*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]


def builder():
    "docs/build.py as a module."
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells_of(path, kind):
    "The texts of a notebook's cells of a kind."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def outside_code(text):
    "A page without its blocks and pieces of code."
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


# the site


def test_the_contents_list_every_notebook_and_every_page_once():
    build = builder()
    listed = [page for pages in build.contents().values() for page in pages]
    texts = {path.stem for path in DOCS.glob("*.md")} | {"contributing", "changelog", "results", "api/index"}
    assert sorted(listed) == sorted({*build.all_notebooks(), *texts})


def headings(path):
    "The anchors of a notebook's headings, as Jupyter makes them."
    found = re.findall(r"^#+ (.+)$", "\n".join(cells_of(path, "markdown")), re.MULTILINE)
    return {heading.strip().replace(" ", "-") for heading in found}


def pages():
    "Every page and every notebook, and its text."
    for path in PAGES:
        yield path, path.read_text(encoding="utf-8")
    for path in NOTEBOOKS.rglob("*.ipynb"):
        if ".ipynb_checkpoints" not in path.parts:
            yield path, "\n\n".join(cells_of(path, "markdown"))


def test_links_lead_somewhere():
    for path, text in pages():
        plain = re.sub(r"\$[^$]*\$", "", outside_code(text))
        for link, anchor in re.findall(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]*))?\)", plain):
            target = path.parent / link if link else path
            if not link.startswith("http"):
                assert target.exists(), f"{path.name} links to {link}"
                known = headings(target) if anchor and target.suffix == ".ipynb" else {anchor}
                assert anchor in known, f"{path.name} links to {link}#{anchor}"


def test_the_minutes_of_the_method_are_those_of_its_notebooks():
    build = builder()
    rows = re.findall(r"\.\./nbs/(\d\d_\w+)\.ipynb\).*\| (\d+) \|$", (DOCS / "method.md").read_text(), re.MULTILINE)
    assert len(rows) == 19
    for name, minutes in rows:
        counted = build.reading(build.read_notebook(NOTEBOOKS / f"{name}.ipynb"))["minutes"]
        assert abs(counted - int(minutes)) <= max(5, counted / 2), f"{name} takes {counted} minutes: make export"


def test_the_minutes_of_the_sessions_are_those_of_their_notebooks():
    build = builder()
    rows = re.findall(r"^\| \d\. [^|]*\|([^|]*)\| (\d+) \|", (DOCS / "teachers.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for linked, minutes in rows:
        counted = build.minutes_of(linked)
        assert counted > 0 and abs(counted - int(minutes)) <= 5, f"{linked} takes {counted} minutes: make export"


def test_the_reference_tells_what_the_comments_of_parameters_say():
    sys.path.insert(0, str(DOCS))
    import api

    text = "\n".join(api.of_module(ROOT / "grad_nb" / "coords.py", "grad_nb.coords", "02_coords"))
    assert "| `height` | `int` |  | rows of the picture, pixels |" in text
    assert "**Returns** `Tensor`" in text


def test_help_says_what_the_comments_of_parameters_say():
    import inspect

    from grad_nb import GRAD

    signature = inspect.signature(GRAD).parameters
    told = inspect.getdoc(GRAD).partition("Parameters\n----------\n")[2]
    assert re.findall(r"^(\w+) : ", told, re.MULTILINE) == list(signature)
    assert "random_state : int, default 0\n    seed; " in told
    for name in ("fit", "predict", "stream", "calibrate", "evaluate", "explain", "save", "load"):
        text = inspect.getdoc(getattr(GRAD, name))
        assert text.count("Parameters\n----------\n") == 1, name
        named = set(inspect.signature(getattr(GRAD, name)).parameters) - {"self"}
        assert set(re.findall(r"^(\w+) : .*\n    \S", text, re.MULTILINE)) >= named, name
    assert inspect.getdoc(GRAD.load).endswith("Returns\n-------\nGRAD\n    fitted")


def test_help_says_what_the_fields_of_a_result_are():
    import inspect

    from grad_nb.grad import Explained, Prediction
    from grad_nb.verdicts import Calibration, Evaluation

    for cls, field in ((Prediction, "labels"), (Evaluation, "figures"), (Calibration, "rate"), (Explained, "heat_map")):
        told = inspect.getdoc(cls).partition("Attributes\n----------\n")[2]
        assert re.findall(r"^(\w+) : .*\n    \S", told, re.MULTILINE) == list(cls.__dataclass_fields__), cls
        assert f"\n{field} : " in f"\n{told}"
    assert "rate : float\n    false-alarm rate that was wanted, 0..1" in inspect.getdoc(Calibration)


def test_a_slide_has_prose_or_a_picture():
    slides = builder().as_slides(json.loads((NOTEBOOKS / "00_one_sitting.ipynb").read_text(encoding="utf-8")))["cells"]
    assert len({cell["id"] for cell in slides}) == len(slides) > 40
    texts = ["".join(cell["source"]) for cell in slides if cell["cell_type"] == "markdown"]
    assert [text for text in texts if "![" in text] == [text for text in texts if re.fullmatch(r"!\[.*\]\(.*\)", text)]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx_book_theme")
    command = [sys.executable, DOCS / "build.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    html = tmp_path / "html"
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'(?:src|link href)="https?://', text), f"{page} loads something from elsewhere"
        for link in re.findall(r'<(?:img|script|link)[^>]* (?:src|href)="([^"#?]+)', text):
            assert (page.parent / link).exists() or link.startswith("data:"), f"{page} shows {link}, which is not there"


def test_the_pictures_of_the_diagram_are_found_in_one_sitting():
    sys.path.insert(0, str(DOCS))
    import diagram

    counts = {"sit044": [10, 10, 10], "sit047": [10] * 6, "sit071": [8, 8]}  # kinds of pictures, patches, maps
    for cell, pictures in counts.items():
        assert [len(row) for row in diagram.rows_of(diagram.stored(cell))] == pictures


def test_no_two_pages_have_the_same_title():
    titles = {}
    for path, text in pages():
        title = re.search(r"^# (.+)$", outside_code(text), re.MULTILINE)
        if title and path not in (ROOT / "README.md", NOTEBOOKS / "index.ipynb"):
            other = titles.setdefault(title[1].lower(), path)
            assert other == path, f"{path.name} and {other.name} are both called {title[1]}"


def test_no_table_shows_markdown():
    for path in NOTEBOOKS.rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            for output in cell.get("outputs", ()):
                table = "".join(output.get("data", {}).get("text/html", ()))
                assert not re.search(r"<t[dh]>[^<]*(`|\*\*)", table), f"{path.name}: Markdown in a table of HTML"


def test_what_a_notebook_of_the_method_prints_or_draws_is_stored():
    for path in NOTEBOOKS.glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            speaks = re.search(r"^(    )?print\(|^(plt\.)?show\(", text, re.MULTILINE)
            if cell["cell_type"] == "code" and speaks and "#| export" not in text:
                assert cell["outputs"], f"{path.name}: the page lacks what {text.splitlines()[0]!r} and so on says"


@pytest.mark.parametrize("figures", ["96.3 ± 1.7", "- / 98.2", "99.1 / -"])
def test_figures_of_a_cell_stay_on_one_line(figures):
    shown = builder().as_cell(f"<td>{figures}</td>")
    assert " " not in shown and shown.count("\u2060\u00a0") == 1  # a line may end after a hyphen that a space follows


def test_a_name_in_a_table_breaks_where_a_word_ends():
    shown = builder().as_cell('<td><code><span class="pre">generator.batch_size</span></code></td>')
    assert '<span class="pre">generator.<wbr>batch_<wbr>size</span>' in shown


def test_imports_are_folded_also_those_for_types():
    build = builder()
    assert build.is_imports("import numpy as np\n\nif TYPE_CHECKING:\n    from matplotlib.figure import Figure")
    assert not build.is_imports("import numpy as np\n\nx = np.zeros(3)")


def test_no_page_says_a_thing_twice():
    for path, text in pages():
        lines = [line.strip() for line in text.splitlines() if len(line.split()) > 8 and re.search(r"\w", line)]
        twice = {line for line in lines if lines.count(line) > 1}
        assert not twice, f"{path.name} says it twice: {min(twice)[:80]}"


# README


def test_readme_is_short():
    words = (ROOT / "README.md").read_text(encoding="utf-8").replace("|", " ").split()
    assert len(words) <= 800


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "use.md"], ids=lambda page: page.name)
def test_the_shell_trains_what_python_trains(page):
    "The first `GRAD(...)` of a page and its first `grad_fit` are the same preset."
    text = page.read_text(encoding="utf-8")
    (python,) = re.findall(r'GRAD\("(\w+)"[^)]*\)\.fit\(', text)
    command = re.search(r"grad_fit .*", text)[0]
    given = re.search(r"--preset (\w+)", command)
    assert python == (given[1] if given else inspect.signature(grad_fit).parameters["preset"].default)


def told_and_stored(path):
    "What the last line of each cell that has a table says now, and what is stored; as Markdown or as HTML."
    names = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            *lines, last = "".join(cell["source"]).splitlines()
            stored = [output.get("data", {}) for output in cell["outputs"]]
            tables = [(kind, "".join(data[kind])) for data in stored for kind in TOLD if kind in data]
            exec("\n".join(lines if tables else [*lines, last]), names)
            for kind, table in tables:
                yield TOLD[kind](eval(last, names)), table


TOLD = {"text/markdown": lambda shown: shown.data, "text/html": lambda table: table._repr_html_()}


@pytest.mark.parametrize(
    ("notebook", "tables"), [("index", 3), ("findings/08_tables", 5), ("findings/09_any_part", 25)]
)
def test_the_tables_of_a_page_are_what_the_records_say(monkeypatch, notebook, tables):
    path = NOTEBOOKS / f"{notebook}.ipynb"
    monkeypatch.chdir(path.parent)
    found = list(told_and_stored(path))
    assert len(found) == tables and all(told == stored for told, stored in found), f"run {notebook} again"


NO_FIGURES = (  # what has a decimal point and is no measurement: formulas, links, licences, versions
    r"\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|Apache-2.0|CC BY-NC-SA \S+|\d+\.\d+\.\d+",
    r"(?:Python|PyTorch|Triton|anomalib) \d+\.\d+",
)
SPEED = r"(?:ms|µs|[MGT]?(?:MACs?|FLOPs?)|[GT]B/s|FPS)\b"  # units of what is measured, whatever the number


def measured_figures(text):
    "Numbers in a page's prose that look like measurements: with a decimal point, or with a unit of speed."
    prose = outside_code(text)
    for pattern in NO_FIGURES:
        prose = re.sub(pattern, "", prose, flags=re.DOTALL)
    return re.findall(rf".{{0,40}}(?:\d\.\d|\d[ \u00a0-]?{SPEED}).*", prose)


def test_no_page_types_a_measured_figure():
    "In prose a number with a decimal point is a setting, in `code` or in a formula; what was measured is printed."
    for path, text in pages():
        found = [] if path == ROOT / "README.md" else measured_figures(text)  # its tables come from index.ipynb
        assert not found, f"{path.name} types a figure: {found[0][:80]}"


@pytest.mark.parametrize(
    "text", ["It reached 0.98.", "A step takes 54 ms.", "twice the 155 GFLOP/s", "17.9 against 21.8"]
)
def test_a_typed_figure_is_found(text):
    assert measured_figures(text)


@pytest.mark.parametrize(
    "text", ["`0.98`", "$\\sigma_g = 0.02$", "PyTorch 2.11", "version 0.2.0", "34 pixels, 20 minutes"]
)
def test_a_setting_is_no_figure(text):
    assert not measured_figures(text)


# teaching


@pytest.mark.slow
def test_the_solutions_of_the_exercises_run():
    names = {}
    text = (DOCS / "teachers.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert text.count("<details") == text.count("</details>") >= 22


# language


def test_numbers_have_a_digit_before_the_point():
    for path, text in pages():
        found = re.search(r"(?<![\w.\\/*)])\.\d.*", outside_code(text))
        assert not found, f"{path.name}: {found[0][:60]}"
