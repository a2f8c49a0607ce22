"""The method says what is computed and not how: its modules' syntax trees know nothing of devices and backends."""

import ast
import inspect
from functools import cache

import pytest
from shared import ROOT

from grad_nb.accel import ops
from grad_nb.diffusion import denoise, sample
from grad_nb.regularizers import gradient_penalty

# From below; a module may import those that stand before it.
METHOD = (
    "beyond coords diffusion patchdiff contrastive patches level_1 detector reweighting regularizers training "
    "metrics evaluation explain"
).split()
BELOW = ("core", "config", "datasets", "accel.ops")  # what else the method may import of ours
WORDS = (
    "is_cuda",
    "device.type",
    "autocast",
    "channels_last",
    "as_strided",
    "gpu_layers",
    "Replayed",
    "import_module",
    "halving",
    "OutOfMemoryError",
)
ASKED = {  # what only somebody would ask who wants to know where a tensor is, of which type it is and how it lies
    "device",
    "dtype",
    "layout",
    "is_cuda",
    "is_cpu",
    "is_mps",
    "is_meta",
    "is_contiguous",
    "is_pinned",
    "pin_memory",
    "stride",
    "storage",
    "untyped_storage",
    "storage_offset",
    "element_size",
    "data_ptr",
    "memory_format",
    "cuda",
    "cpu_offload",
}
OF_TORCH = {
    "cuda",
    "compile",
    "autocast",
    "amp",
    "jit",
    "mps",
    "xpu",
    "accelerator",
    "backends",
    "compiler",
    "channels_last",
    "contiguous_format",
    "preserve_format",
    "OutOfMemoryError",
    "is_autocast_enabled",
    "get_autocast_dtype",
    "set_num_threads",
    "get_num_threads",
    "as_strided",
    "_C",
}
CATCHES_MEMORY = {"BaseException", "Exception", "RuntimeError", "MemoryError", "OutOfMemoryError"}


@cache
def source(module):
    return (ROOT / "grad_nb" / f"{module}.py").read_text(encoding="utf-8")


@cache
def nodes(module):
    return [*ast.walk(ast.parse(source(module)))]


def imports_of(module):
    "(line, full name) of everything of ours that a module imports, wherever it does."
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "grad_nb")
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module.split(".")[0] == "grad_nb"):
            assert node.level < 2, "the method stands at the top level"
            base = ".".join(filter(None, ("grad_nb" if node.level else "", node.module)))
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def test_every_module_of_the_method_is_checked():
    there = {path.stem for path in (ROOT / "grad_nb").glob("*.py") if path.stem[0] != "_"}
    assert there == {*METHOD, "config", "grad", "plots", "verdicts", "student"}


@pytest.mark.parametrize("module", METHOD)
def test_the_method_imports_downwards_and_through_the_door(module):
    allowed = [*BELOW, *METHOD[: METHOD.index(module)]]
    for line, name in imports_of(module):
        assert any(f"{name}.".startswith(f"grad_nb.{part}.") for part in allowed), f"{module}:{line} imports {name}"


def owner_of(node):
    "The last name of what an attribute is asked of: `learner.generator` → generator."
    return getattr(node, "id", getattr(node, "attr", None))


@pytest.mark.parametrize("module", METHOD)
def test_the_method_asks_no_tensor_where_it_is_or_how_it_lies(module):
    trusted = {"generator", "learner", "self"}  # these know where the work is done
    for node in nodes(module):
        if isinstance(node, ast.Attribute) and node.attr in ASKED:
            of_an_array = module == "metrics" and node.attr == "dtype"
            of_torch = (
                isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("device", "dtype")
            )
            asked = ast.unparse(node)
            assert owner_of(node.value) in trusted or of_an_array or of_torch, f"{module}:{node.lineno} asks {asked}"
        if isinstance(node, ast.Call):
            told = {keyword.arg for keyword in node.keywords} & {"memory_format"}
            named = {argument.value for argument in node.args if isinstance(argument, ast.Constant)} & {*ASKED}
            by_name = owner_of(node.func) in ("getattr", "attrgetter", "hasattr")
            typed = isinstance(node.func, ast.Attribute) and node.func.attr == "type"  # a sample has one, too
            assert not (told or typed or by_name and named), f"{module}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("module", METHOD)
def test_the_method_uses_nothing_of_a_device(module):
    for node in nodes(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            assert node.attr not in OF_TORCH, f"{module}:{node.lineno} uses torch.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            used = {*node.module.split("."), *(alias.name for alias in node.names)} & OF_TORCH
            assert not used, f"{module}:{node.lineno} imports {used} of torch"
        elif isinstance(node, ast.Import):
            used = {part for alias in node.names for part in alias.name.split(".")} & (OF_TORCH - {"compile"})
            assert not used, f"{module}:{node.lineno} imports {used}"


@pytest.mark.parametrize("module", METHOD)
def test_the_method_catches_no_memory_error(module):
    for node in nodes(module):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            caught = {owner_of(kind) if kind else "BaseException" for kind in kinds}
            assert not caught & CATCHES_MEMORY, f"{module}:{node.lineno} catches {caught}"


@pytest.mark.parametrize("module", METHOD)
def test_the_words_of_the_machine_do_not_occur(module):
    assert not [word for word in WORDS if word in source(module)]


def lines_of(function):
    "The lines of a function's body, without its docstring."
    definition = ast.parse(inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(function)))).body[0]
    body = definition.body[bool(ast.get_docstring(definition)) :]
    return body[-1].end_lineno - body[0].lineno + 1


@pytest.mark.parametrize("function", [gradient_penalty, denoise, sample], ids=lambda f: f.__name__)
def test_equation_6_and_algorithm_2_have_six_lines_at_most(function):
    assert lines_of(function) <= 6


def test_a_definition_behind_the_door_has_five_lines_at_most():
    references = [value.reference for value in vars(ops).values() if hasattr(value, "reference")]
    assert len(references) >= 10
    assert not {f.__name__: lines_of(f) for f in references if lines_of(f) > 5}


def test_the_checks_see_what_they_are_for(monkeypatch):
    wrong = """
from .accel import fast
from torch.cuda import empty_cache
def f(x):
    try:
        return x.device, getattr(x, "is_cuda"), x.to(memory_format=1), torch.compile(x)
    except (ValueError, MemoryError):
        pass
"""
    monkeypatch.setitem(globals(), "source", lambda module: wrong)
    monkeypatch.setitem(globals(), "nodes", lambda module: [*ast.walk(ast.parse(wrong))])
    checks = (
        test_the_method_imports_downwards_and_through_the_door,
        test_the_method_asks_no_tensor_where_it_is_or_how_it_lies,
        test_the_method_uses_nothing_of_a_device,
        test_the_method_catches_no_memory_error,
        test_the_words_of_the_machine_do_not_occur,
    )
    for check in checks:
        with pytest.raises(AssertionError):
            check("training")
