"""What is installed and how it is built: parts that import downwards, short cells, no name twice."""

import ast
import importlib
import inspect
import json
import os
import pydoc
import re
import subprocess
import sys
import venv
import zipfile
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import pytest
from fastcore.script import anno_parser
from shared import ROOT

PATHS = {
    ".".join(p.relative_to(ROOT / "grad_nb").with_suffix("").parts): p
    for p in sorted((ROOT / "grad_nb").rglob("*.py"))
    if p.stem[0] != "_" and "reproduce" not in p.parts[:-1]
}
MODULES = sorted(PATHS)
TOOLS = (
    "nbdev",
    "papermill",
    "IPython",
    "ipykernel",
    "jupyter_core",
    "nbconvert",
    "nbformat",
    "diffusers",
    "onnx",
    "onnxruntime",
    "hypothesis",
    "panel",
    "bokeh",
)


def test_every_module_imports_with_the_tools_out_of_reach():
    code = (
        f"import sys\nfor name in {TOOLS!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {MODULES!r}: importlib.import_module('grad_nb.' + name)\nprint('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr


@cache
def tree(module):
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def exported_cells():
    "(notebook, id of the cell, its lines, directives among them) of all code that becomes a module."
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
                source = "".join(cell["source"])
                if cell["cell_type"] == "code" and re.search(r"^#\| *exporti?\b", source, re.MULTILINE):
                    yield path.relative_to(ROOT / "nbs").with_suffix("").as_posix(), cell["id"], source.splitlines()


def test_exported_cells_have_45_lines_at_most():
    found = {f"{notebook} {cell}" for notebook, cell, lines in exported_cells() if len(lines) > 45}
    assert not found, f"cells of more than 45 lines: {sorted(found)}"


def test_the_first_line_of_a_module_has_120_characters_at_most():
    "It is made of the sentence below the notebook's title."
    long = [module for module in MODULES if len(PATHS[module].read_text(encoding="utf-8").splitlines()[0]) > 120]
    assert not long, f"the sentence below the title is too long: {long}"


def test_lines_have_120_characters_at_most():
    found = Counter(notebook for notebook, _, lines in exported_cells() for line in lines if len(line) > 120)
    assert not found, f"lines of more than 120 characters: {dict(found)}"


# --- names ----------------------------------------------------------------------------------------------------------


def names_of(module):
    "Names that a module defines at its top level; a method that is added to a class is the class's."
    for node in tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if not any("patch" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def test_no_two_modules_define_the_same_name():
    where = defaultdict(set)
    for module in MODULES:
        for name in {*names_of(module)} - {"log", "__all__", "_all_"}:
            where[name].add(module)
    twice = {f"{name}: {' '.join(sorted(modules))}" for name, modules in where.items() if len(modules) > 1}
    assert not twice, f"a name that several modules define: {sorted(twice)}"


def bound_in(node):
    "Names that a node of a syntax tree binds."
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        return [node.id]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names if alias.name != "torch.nn.functional"]
    return []


def test_f_is_torch_s_functions_and_nothing_else():
    for module in MODULES:
        for node in ast.walk(tree(module)):
            of_torch = isinstance(node, ast.ImportFrom) and node.module == "torch.nn"
            assert of_torch or "F" not in bound_in(node), f"{module}:{node.lineno} binds F"


def test_modules_are_imported_by_name():
    "No import of everything, and none that neither a reader nor a check of imports can see."
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ImportFrom):
                assert "*" not in {alias.name for alias in node.names}, f"{module}:{node.lineno} imports everything"
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                asked = ast.unparse(node.args[0])
                of_others = re.match(r"f?'(?!grad_nb|\.)\w", asked) or (module, asked) == ("use.export", "name")
                assert of_others, f"{module}:{node.lineno} imports {asked}"


def test_every_import_goes_downwards():
    "The contracts of pyproject.toml; import-linter sees imports inside functions, too."
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Analyzed" in done.stdout, done.stdout + done.stderr


def test_the_contracts_know_every_module():
    "The method's, as its own checks know them, and all that stands behind the door."
    contracts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[[tool.importlinter.contracts]]")
    (door,) = (text for text in contracts if "one door" in text)
    listed = {*re.findall(r'"(grad_nb\.[\w.]+)"', door)}
    source = (ROOT / "tests/method/test_door.py").read_text(encoding="utf-8")
    method = re.search(r'METHOD = \(\n((?:    ".*"\n)+)\)', source)[1].replace('"', " ").split()
    behind = {module for module in MODULES if module.startswith("accel.")} - {"accel.ops"}
    assert listed == {f"grad_nb.{module}" for module in (*method, *behind)}


PUBLIC = (
    "fit predict score_samples decision_function stream explain save load card get_params set_params settings_ preset_"
).split()

BOOM = """
import importlib, os, sys
import grad_nb.core.memory as memory
def keep_memory():
    raise AssertionError("the library changes how its process allocates memory")
memory.keep_memory = keep_memory
before = {name for name in os.environ if name.startswith(("MALLOC_", "OMP_"))}
for name in sys.argv[1:]: importlib.import_module("grad_nb." + name)
import torch
from grad_nb.core.loop import run_steps
assert len(run_steps(lambda i: torch.zeros(1), 3, ["loss"], {}, progress=False)) == 3
assert before == {name for name in os.environ if name.startswith(("MALLOC_", "OMP_"))}
from grad_nb.use.errors import plain_errors
try:
    plain_errors(print)("not printed")
except AssertionError:
    print("ok")
"""


def test_threads_of_a_command_sleep_while_they_wait():
    "What the command sees, and what the processes that it starts see; torch must not be loaded before it is said."
    told = "import os, sys; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    code = f"from grad_nb.use.errors import plain_errors\nplain_errors(exec)({told!r})"
    for chosen, then in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        if chosen:
            environment["OMP_WAIT_POLICY"] = chosen
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == then, done.stderr


def test_only_commands_change_how_a_process_keeps_its_memory_and_waits():
    done = subprocess.run([sys.executable, "-c", BOOM, *MODULES], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


LAZY = """
import sys
import grad_nb
assert "GRAD" in dir(grad_nb) and grad_nb.__version__ and "torch" not in sys.modules and "numpy" not in sys.modules
try:
    grad_nb.no_such_name
except AttributeError as e:
    assert "no_such_name" in str(e)
from grad_nb import GRAD
from grad_nb.grad import GRAD as same
assert GRAD is same is grad_nb.GRAD and "torch" in sys.modules
print("ok")
"""


def test_the_estimator_is_at_the_top_of_the_package_and_loads_torch_only_when_asked_for():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_the_estimator_is_seen_whole():
    from grad_nb import GRAD

    shown = pydoc.render_doc(GRAD, renderer=pydoc.plaintext)
    source = (ROOT / "grad_nb/grad.py").read_text()
    classes = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert "@patch" not in source
    for name in PUBLIC:
        method = inspect.getattr_static(GRAD, name)
        assert inspect.getdoc(method) and name in shown
        assert any(name in vars(base) for base in GRAD.__mro__ if base.__name__ in classes)
    assert GRAD.__doc__ and len(inspect.signature(GRAD).parameters) == 13


def test_public_functions_are_documented():
    for module in MODULES:
        for node in tree(module).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}: {node.name} has no docstring"


COMMANDS = re.findall(
    r"^    (grad_\w+) = ([\w.]+):(\w+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.mark.parametrize("command, module, name", COMMANDS)
def test_every_command_and_each_of_its_options_says_what_it_does(command, module, name):
    parser = anno_parser(getattr(importlib.import_module(module), name), prog=command)
    assert command == name and parser.description and len(parser.description.splitlines()[0]) > 20
    for action in parser._actions:
        assert action.help and len(action.help) > 8, f"{command} does not say what {action.dest} is"
    assert parser.format_help().startswith(f"usage: {command}")


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel).namelist()
    assert {f"grad_nb/reproduce/{n}.ipynb" for n in ("generate", "detect", "table")} <= set(packed)
    assert not [n for n in packed if n.startswith(("tests/", "nbs/")) or n.endswith((".png", ".jpg"))]
    venv.create(tmp_path / "env", with_pip=True)
    binaries = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = binaries / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True, capture_output=True)
    code = (
        f"import importlib, importlib.util\nfor name in {MODULES!r}: importlib.import_module('grad_nb.' + name)\n"
        "tools = ('nbdev', 'papermill', 'IPython', 'ipykernel', 'nbconvert')\n"
        "assert not [n for n in tools if importlib.util.find_spec(n)]"
    )
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    made = subprocess.run(
        [binaries / "grad_data", "trays", str(tmp_path / "data"), "--size", "64", "--quiet"],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    tiny = (
        "generator.width=8 generator.steps=3 generator.batch=2 generator.n_samples=4 generator.sample_steps=2 "
        "detector.width=0.1 detector.steps=3 evaluation.map_size=64"
    )
    good = str(tmp_path / "data/trays/test/good")
    fit = subprocess.run(
        [
            binaries / "grad_fit",
            good,
            "--model",
            str(tmp_path / "m.grad"),
            "--preset",
            "demo",
            "--overrides",
            tiny,
            "--quiet",
        ],
        capture_output=True,
        text=True,
    )
    assert fit.returncode == 0, fit.stderr
    judged = subprocess.run([binaries / "grad_predict", str(tmp_path / "m.grad"), good], capture_output=True, text=True)
    assert judged.returncode == 0 and len(judged.stdout.splitlines()) == 101
    demo = subprocess.run([binaries / "grad_demo", "--runs", str(tmp_path / "runs")], capture_output=True, text=True)
    assert demo.returncode == 2 and "grad_nb[run]" in demo.stderr
