"""What is installed: the library runs without the tools that its notebooks are made with."""
import ast
import importlib
import json
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from fastcore.script import anno_parser

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(p.stem for p in (ROOT / "grad_nb").glob("*.py") if p.stem[0] != "_")
TOOLS = ("nbdev", "papermill", "IPython", "ipykernel", "jupyter_core", "nbconvert", "nbformat", "diffusers", "onnx", "onnxruntime", "hypothesis", "panel", "bokeh")


def test_every_module_imports_with_the_tools_out_of_reach():
    code = (f"import sys\nfor name in {TOOLS!r}: sys.modules[name] = None\n"
            f"import importlib\nfor name in {MODULES!r}: importlib.import_module('grad_nb.' + name)\nprint('ok')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


def test_a_module_imports_only_from_rooms_above_it():
    order = [json.loads(p.read_text()) for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    names = []
    for notebook in order:
        source = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
        name = next((s.split()[-1] for s in source if s.startswith("#| default_exp")), None)
        if name is None: continue  # it tells and exports nothing
        for cell in source:
            if not cell.startswith("#| export"): continue
            imports = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.ImportFrom) and node.col_offset == 0]
            used = {node.module.split(".")[1] for node in imports if node.module.startswith("grad_nb.")}
            assert used <= set(names), f"{name} imports {used - set(names)}"
            assert "import *" not in cell
        names.append(name)
    assert set(names) == set(MODULES)


def test_exported_cells_are_short():
    for path in (ROOT / "nbs").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "code" and source.startswith("#| export"):
                assert source.count("\n") <= 36, f"{path.name}: the cell that begins with {source.splitlines()[1]!r} has {source.count(chr(10))} lines"


def test_public_functions_are_documented():
    for path in (ROOT / "grad_nb").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.col_offset == 0:
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


COMMANDS = re.findall(r"^    (grad_\w+) = ([\w.]+):(\w+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command, module, name", COMMANDS)
def test_every_command_and_each_of_its_options_says_what_it_does(command, module, name):
    parser = anno_parser(getattr(importlib.import_module(module), name), prog=command)
    assert command == name and parser.description and len(parser.description.splitlines()[0]) > 20
    for action in parser._actions: assert action.help and len(action.help) > 8, f"{command} does not say what {action.dest} is"
    assert parser.format_help().startswith(f"usage: {command}")


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert {f"grad_nb/reproduce/{n}.ipynb" for n in ("generate", "detect", "table")} <= set(packed)
    assert not [n for n in packed if n.startswith(("tests/", "nbs/")) or n.endswith((".png", ".jpg"))]
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True, capture_output=True)
    code = (f"import importlib, importlib.util\nfor name in {MODULES!r}: importlib.import_module('grad_nb.' + name)\n"
            f"assert not [n for n in ('nbdev', 'papermill', 'IPython', 'ipykernel', 'nbconvert') if importlib.util.find_spec(n)]")
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    made = subprocess.run([binaries / "grad_data", "trays", str(tmp_path / "data"), "--size", "64", "--quiet"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    tiny = ("generator.width=8 generator.steps=3 generator.batch=2 generator.n_samples=4 generator.sample_steps=2 "
            "detector.width=0.1 detector.steps=3 evaluation.map_size=64")
    good = str(tmp_path / "data/trays/test/good")
    fit = subprocess.run([binaries / "grad_fit", good, "--model", str(tmp_path / "m.grad"), "--preset", "demo", "--overrides", tiny, "--quiet"],
                         capture_output=True, text=True)
    assert fit.returncode == 0, fit.stderr
    judged = subprocess.run([binaries / "grad_predict", str(tmp_path / "m.grad"), good], capture_output=True, text=True)
    assert judged.returncode == 0 and len(judged.stdout.splitlines()) == 101
    demo = subprocess.run([binaries / "grad_demo", "--runs", str(tmp_path / "runs")], capture_output=True, text=True)
    assert demo.returncode == 2 and "grad_nb[run]" in demo.stderr
