"""Build the site from the notebooks and docs/, without a network: `python docs/build.py`, or `make docs`.

Three steps: lay the pages out in _docs/source, let Sphinx make _docs/html of them (a warning is an error), and make the
slides. What a notebook has stored is shown; nothing is executed.
"""

import json
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from hashlib import sha256
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
DOCS, NOTEBOOKS = ROOT / "docs", ROOT / "nbs"
LIMIT = 15e6  # bytes of the whole site
WORDS_A_MINUTE, LINES_A_MINUTE = 180, 15  # how fast prose and code are read

sys.path.insert(0, str(DOCS))
from api import part_of, write_api  # noqa: E402


def read_notebook(path: Path) -> dict:
    "A notebook as it is stored."
    return json.loads(path.read_text(encoding="utf-8"))


def source_of(cell: dict) -> str:
    "The text of a cell."
    return "".join(cell["source"])


def all_notebooks() -> list[str]:
    "Every notebook but the front page, without its ending, from nbs/."
    found = (path.relative_to(NOTEBOOKS) for path in NOTEBOOKS.rglob("*.ipynb"))
    names = sorted(path.with_suffix("").as_posix() for path in found if ".ipynb_checkpoints" not in path.parts)
    return [name for name in names if name != "index"]


# what a page is made of


def directives(text: str) -> set[str]:
    "nbdev's directives of a cell: the first words of its lines that begin with `#|`."
    return {line[2:].strip().split()[0].rstrip(":") for line in text.splitlines() if re.match(r"#\| *\w", line)}


def is_imports(text: str) -> bool:
    "Whether a cell does nothing but import."
    code = re.sub(r"\([^)]*\)", "()", text)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    begins = ("import ", "from ", "log = ", "_all_ = ", "if TYPE_CHECKING:", "    from ", "    import ")
    return bool(lines) and all(line.startswith(begins) for line in lines)


def as_page(notebook: dict, module: str, depth: int, fold: bool = False) -> dict:
    "A notebook for the site: nbdev's directives left out, imports folded, and with `fold` all code."
    cells = []
    for cell in notebook["cells"]:
        text = source_of(cell)
        flags = directives(text) if cell["cell_type"] == "code" else set()
        if {"default_exp", "hide"} & flags or not text.strip():
            continue
        tags = cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code":
            text = re.sub(r"^#\|.*\n?", "", text, flags=re.MULTILINE).strip("\n")
            text = re.sub(r"^%config .*\n?", "", text, flags=re.MULTILINE)
            if not text.strip():
                continue
            tags = tags + ["hide-input"] * ((fold or is_imports(text)) and "remove-input" not in tags)
        else:
            text = site_links(text)
        cells.append(cell | {"source": text, "metadata": {"tags": tags}})
    minutes = f"*{reading(notebook)['minutes'] or 1} minutes to read.*"
    if module:
        link = f"[`{module}`]({'../' * depth}api/{part_of(module)}.md#{module})"
        minutes = f"*The source of {link}; {reading(notebook)['minutes'] or 1} minutes to read.*"
    cells.insert(1, {"cell_type": "markdown", "id": "about-this-page", "metadata": {}, "source": minutes})
    language = {"name": "python", "pygments_lexer": "python"}
    return notebook | {"cells": cells, "metadata": notebook["metadata"] | {"language_info": language}}


def site_links(text: str) -> str:
    "Links of the repository as links of the site."
    text = re.sub(r"\]\((?:\.\./)+results/README\.md", "](/results.md", text)
    text = re.sub(r"\]\((?:\.\./)*CONTRIBUTING\.md", "](/contributing.md", text)
    text = re.sub(r"\]\((?:\.\./)*CHANGELOG\.md", "](/changelog.md", text)
    text = re.sub(r"\]\((?:\.\./)+docs/(\w+\.md)", r"](/\1", text)
    test = r"\[(\w+)\]\((?:\.\./)+(tests/[\w/]+\.py)\)"  # a page names tests, the site has none
    text = re.sub(test, r"`\1` in `\2`", text)
    return re.sub(r"\]\((?:\.\./)*nbs/", "](/", text)


def module_of(notebook: dict) -> str:
    "The module that a notebook exports, or nothing."
    found = re.search(r"^#\| *default_exp +(\S+)", "\n".join(map(source_of, notebook["cells"])), re.MULTILINE)
    return f"grad_nb.{found[1]}" if found else ""


# laying out


def contents() -> dict[str, list[str]]:
    "The pages below each page, by docs/toc.json; a page that is not there is left out, a * stands for a folder."
    names = all_notebooks()
    pages = {*names, *(path.stem for path in DOCS.glob("*.md")), "contributing", "changelog", "results", "api/index"}
    below = {}
    for page, entries in json.loads((DOCS / "toc.json").read_text()).items():
        below[page] = []
        for entry in entries:
            folder = [name for name in names if entry.endswith("*") and name.startswith(entry[:-1])]
            below[page] += [entry] if entry in pages else folder
    return below


def toctree(page: str, below: dict[str, list[str]]) -> str:
    "The table of contents at the end of a page, or nothing."
    lines = ["```{toctree}", ":hidden:", "", *(f"/{entry}" for entry in below.get(page, [])), "```"]
    return "\n".join(lines) if page in below else ""


def lay_out(source: Path):
    "Write every page of the site into a folder."
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    modules, below = {}, contents()
    for name in ["index", *all_notebooks()]:
        notebook = read_notebook(NOTEBOOKS / f"{name}.ipynb")
        module = module_of(notebook)
        modules[module] = name
        page = as_page(notebook, module, name.count("/"), fold=name.startswith(("findings/", "gallery/", "bench/11_")))
        if name == "index":
            page["cells"] = [cell for cell in page["cells"] if cell["id"] != "about-this-page"]
        if name in below:
            tree = toctree(name, below)
            page["cells"].append({"cell_type": "markdown", "id": "toc", "metadata": {}, "source": tree})
        target = source / f"{name}.ipynb"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(page), encoding="utf-8")
    texts = {f"{path.stem}.md": path for path in DOCS.glob("*.md")}
    texts |= {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
    texts |= {"results.md": ROOT / "results" / "README.md"}
    for name, path in texts.items():
        text = site_links(path.read_text(encoding="utf-8")) + "\n" + toctree(name.removesuffix(".md"), below)
        (source / name).write_text(text, encoding="utf-8")
    shutil.copytree(NOTEBOOKS / "images", source / "images")
    for path in (NOTEBOOKS / "reproduce").glob("*.json"):
        shutil.copy2(path, source / "reproduce")
    write_api(ROOT / "grad_nb", {m: n for m, n in modules.items() if m}, source / "api")
    static = source / "_static"
    shutil.copytree(DOCS / "third_party", static)
    shutil.copy2(DOCS / "site.css", static)
    for name in ("conf.py", "slugs.py"):
        shutil.copy2(DOCS / name, source)


# what a page costs its reader


def reading(notebook: dict) -> dict[str, int]:
    "Words, lines of code, pictures and minutes of a notebook."
    text = " ".join(source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    code = [source_of(cell) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    code = [text for text in code if not {"hide", "default_exp"} & directives(text)]
    lines = sum(bool(line.strip()) for text in code for line in text.splitlines())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    stored = sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs)
    words = len(text.split())
    minutes = round(words / WORDS_A_MINUTE + lines / LINES_A_MINUTE)
    return {"words": words, "lines": lines, "pictures": stored + len(re.findall(r"!\[", text)), "minutes": minutes}


def as_cell(cell: str) -> str:
    """A cell of a table for every width; a dash where there is no figure.

    Figures such as `96.3 ± 1.7` or `- / 98.2` are not torn apart, and names in code only behind a dot, `_` or `/`.
    """
    cell = re.sub(r"(?<=[\d-]) ([±/]) (?=[\d-])", "\u2060\u00a0\\1\u00a0", cell.replace(">NaN<", ">–<"))
    code = r'(?<=<span class="pre">)[^<]+'
    return re.sub(code, lambda name: re.sub(r"(?<=\w)([._/])(?=\w)", r"\1<wbr>", name[0]), cell)


def slim(html: Path):
    "Leave out what no page loads, and store large pictures as WebP."
    shutil.rmtree(html / "_static" / "locales", ignore_errors=True)
    icons = "fontawesome.js"  # the style sheet draws the same icons from a font
    unused = [html / "objects.inv", html / "_static" / "scripts" / icons]
    for path in [*unused, *html.rglob("*.map"), *html.rglob("*webpack-macros.html")]:
        path.unlink(missing_ok=True)
    smaller = {}
    for path in (html / "_images").glob("*.[pj][np]g"):
        if path.stat().st_size > 15_000:
            smaller[path.name] = path.with_suffix(".webp").name
            Image.open(path).convert("RGB").save(path.with_suffix(".webp"), quality=74, method=6)
            path.unlink()
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        text = re.sub(r"_images/([^\"']+\.(?:png|jpg))", lambda m: f"_images/{smaller.get(m[1], m[1])}", text)
        text = re.sub(r'<span class="(?:w|n|nn|o|p)">([^<]*)</span>', r"\1", text)  # they have no colour
        text = re.sub(r"<td.*?</td>", lambda m: as_cell(m[0]), text, flags=re.DOTALL)
        text = re.sub(rf"<script[^>]*{icons}[^>]*></script>", "", text)
        head, start, rest = text.partition("<article")
        article, end, foot = rest.rpartition("</article>")
        head, foot = (re.sub(r"\s*\n\s*", "\n", part) for part in (head, foot))
        page.write_text(head + start + article + end + foot, encoding="utf-8")


def minutes_of(linked: str) -> int:
    "What it takes to read the notebooks that a text links to."
    names = re.findall(r"\.\./nbs/([\w/]+)\.ipynb\)", linked)
    return sum(reading(read_notebook(NOTEBOOKS / f"{name}.ipynb"))["minutes"] for name in names)


def write_minutes():
    "Bring the minutes in the tables of docs/method.md and docs/teachers.md up to date."
    rows = {"method": r"^(\| \[[^|]*\|.*\| )\d+( \|)$", "teachers": r"^(\| \d\. [^|]*\|[^|]*\| )\d+( \|.*)$"}
    for name, row in rows.items():
        page = DOCS / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        found = re.sub(row, lambda line: f"{line[1]}{minutes_of(line[0])}{line[2]}", text, flags=re.MULTILINE)
        page.write_text(found, encoding="utf-8")


def report(html: Path) -> str:
    "Words, pictures and minutes of each notebook, the external links, and the size of the site."
    rows = [f"{'page':28}{'words':>7}{'lines':>7}{'pictures':>10}{'minutes':>9}"]
    for name in ["index", *all_notebooks()]:
        found = reading(read_notebook(NOTEBOOKS / f"{name}.ipynb"))
        rows.append(f"{name:28}{found['words']:>7}{found['lines']:>7}{found['pictures']:>10}{found['minutes']:>9}")
    links = {link for page in html.rglob("*.html") for link in re.findall(r'href="(https?://[^"]+)"', page.read_text())}
    size = sum(path.stat().st_size for path in html.rglob("*") if path.is_file())
    rows += ["", "external links, which no build checks:", *sorted(links), "", f"the site has {size / 1e6:.1f} MB"]
    if size > LIMIT:
        raise SystemExit(f"the site has {size / 1e6:.1f} MB; it may have {LIMIT / 1e6:.0f}")
    return "\n".join(rows)


# slides


def as_slides(notebook: dict) -> dict:
    "A slide for each heading, below it one for each piece of prose and for each picture; long code is left out."
    cells = []
    for cell in as_page(notebook, "", 0)["cells"]:
        if cell["id"] == "about-this-page":
            continue
        text, outputs = source_of(cell), cell.get("outputs", [])
        kind = "slide" if text.startswith(("# ", "## ")) else "subslide"
        tags = []
        if cell["cell_type"] == "code":
            long = len(text.splitlines()) > 16
            if is_imports(text) or (long and not outputs):
                continue
            kind = "subslide" if outputs else "-"
            tags = ["no-source"] if outputs and len(text.splitlines()) > 6 else []
        for part, source in enumerate(apart(text) if cell["cell_type"] == "markdown" else [text]):
            kind = kind if part == 0 else "subslide"
            told = {"source": source, "metadata": {"slideshow": {"slide_type": kind}, "tags": tags}}
            cells.append(cell | told | {"id": f"{cell['id']}-{part}"})
    return notebook | {"cells": cells}


def apart(text: str) -> list[str]:
    "Prose and the pictures in it, each for a slide of its own."
    return re.split(r"\n\n(?=!\[)|(?<=\.png\))\n\n", text)


def write_slides(html: Path, notebook: str = "00_one_sitting"):
    "Slides of a notebook, by nbconvert, with reveal.js and the pictures of the site."
    import nbformat
    from nbconvert import SlidesExporter
    from traitlets.config import Config

    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_input_tags = {"no-source"}
    exporter = SlidesExporter(
        config=config,
        template_name="slides",
        extra_template_basedirs=[str(DOCS)],
        reveal_url_prefix="_static/reveal",
        reveal_theme="white",
    )
    made = nbformat.from_dict(as_slides(read_notebook(NOTEBOOKS / f"{notebook}.ipynb")))
    text, _ = exporter.from_notebook_node(made)
    text = re.sub(r'src="data:image/(\w+);base64,([^"]+)"', lambda m: f'src="{kept_picture(html, *m.groups())}"', text)
    text = re.sub(r'src="images/([\w-]+)\.png"', lambda m: f'src="{drawn_picture(html, m[1])}"', text)
    text = re.sub(r'href="/?([\w/]+)\.(?:ipynb|md)', r'href="\1.html', text)
    (html / "slides.html").write_text(text, encoding="utf-8")


def drawn_picture(html: Path, name: str) -> str:
    "The picture of nbs/images that a page of the site has already."
    smaller = html / "_images" / f"{name}.webp"
    return f"_images/{smaller.name if smaller.is_file() else name + '.png'}"


def kept_picture(html: Path, kind: str, data: str) -> str:
    "The picture that a page of the site has already, or a file of its own."
    content = b64decode(data)
    name = f"{sha256(content).hexdigest()}.{kind.replace('jpeg', 'jpg')}"
    smaller = (html / "_images" / name).with_suffix(".webp")
    if smaller.is_file():
        return f"_images/{smaller.name}"
    if not (html / "_images" / name).is_file():
        (html / "_images" / name).write_bytes(content)
    return f"_images/{name}"


def build(target: Path):
    "Lay out, build, report."
    source, html = target / "source", target / "html"
    lay_out(source)
    shutil.rmtree(html, ignore_errors=True)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-d", target / "doctrees"]
    if subprocess.run([*map(str, command), str(source), str(html)]).returncode:
        raise SystemExit("the site has warnings, which are errors")
    slim(html)
    write_slides(html)
    told = report(html)
    (target / "report.txt").write_text(told + "\n", encoding="utf-8")
    print(told.splitlines()[-1], "in", html)


if __name__ == "__main__":
    if "--write-minutes" in sys.argv:
        sys.exit(write_minutes())
    build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "_docs")
