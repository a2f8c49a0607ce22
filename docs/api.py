"""The API reference: a page for each part, read from the text of its modules, with parameters as tables."""

import ast
import copy
import inspect
from pathlib import Path

from grad_nb.core.docstrings import Definition, Parameter, comments, parameters_of, returned


def code(text: str) -> str:
    "A piece of code in a cell of a table."
    return f"`{text}`".replace("|", "\\|") if text else ""


def table(rows: list[Parameter]) -> list[str]:
    "Rows of parameters as a table, or nothing."
    if not rows:
        return []
    lines = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, meaning in rows:
        lines.append(f"| `{name}` | {code(kind)} | {code(default)} | {clean(meaning)} |")
    return [*lines, ""]


def clean(text: str) -> str:
    "A comment as text of a table: no column may begin in it, no emphasis by chance."
    parts = text.replace("|", "\\|").split("`")
    for place in range(0, len(parts), 2):
        parts[place] = parts[place].replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("$", "\\$")
        parts[place] = parts[place].replace("[", "\\[")
    return "`".join(parts)


def docstring(node: ast.AST) -> list[str]:
    "What a definition says of itself."
    text = inspect.cleandoc(ast.get_docstring(node) or "")
    return [clean(text).replace("\\|", "|"), ""] if text else []


def signature(arguments: ast.arguments) -> str:
    "The names of parameters as they are given: where a star stands, too; without annotations and defaults."
    plain = copy.deepcopy(arguments)
    for argument in ast.walk(plain):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    plain.defaults = []
    plain.kw_defaults = [None] * len(plain.kwonlyargs)
    for ordered in (plain.posonlyargs, plain.args):
        ordered[:] = [argument for argument in ordered if argument.arg not in ("self", "cls")]
    return ast.unparse(plain)


def of_function(function: Definition, told: dict[int, str], name: str, level: int) -> list[str]:
    "A function or a method: signature, docstring, table, what it gives."
    shown = signature(function.args)
    lines = ["#" * level + f" {name}", "", f"```python\n{name}({shown})\n```", "", *docstring(function)]
    lines += table(list(parameters_of(function, told)))
    if given := returned(function, told):
        lines += [f"**Returns** `{given.kind}`" + (f": {clean(given.meaning)}" if given.meaning else ""), ""]
    return lines


def fields(node: ast.ClassDef, told: dict[int, str]) -> list[Parameter]:
    "The fields of a dataclass or a named tuple."
    found = [item for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)]
    return [
        Parameter(
            item.target.id,
            ast.unparse(item.annotation),
            ast.unparse(item.value) if item.value else "",
            told.get(item.end_lineno or 0, ""),
        )
        for item in found
    ]


def of_class(node: ast.ClassDef, told: dict[int, str]) -> list[str]:
    "A class: docstring, fields, and its public methods."
    methods = [item for item in node.body if isinstance(item, Definition)]
    lines = [f"### {node.name}", "", *docstring(node), *table(fields(node, told))]
    for method in methods:
        if method.name == "__init__":
            lines += [f"```python\n{node.name}(...)\n```", "", *docstring(method)]
            lines += table(list(parameters_of(method, told)))
    for method in methods:
        if not method.name.startswith("_"):
            lines += of_function(method, told, f"{node.name}.{method.name}", 4)
    return lines


def of_module(path: Path, module: str, notebook: str) -> list[str]:
    "What a module holds."
    text = path.read_text(encoding="utf-8")
    tree, told = ast.parse(text), comments(text)
    lines = [
        f"## {module}",
        "",
        ast.get_docstring(tree) or "",
        "",
        f"Its source is the notebook [{notebook}](../{notebook}.ipynb).",
        "",
    ]
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            lines += of_function(node, told, node.name, 3)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            lines += of_class(node, told)
    return lines


def part_of(module: str) -> str:
    "The page of the reference that a module stands on: its folder, or the method."
    names = module.split(".")
    return names[1] if len(names) > 2 else "method"


def write_api(package: Path, notebooks: dict[str, str], folder: Path):
    "A page for each part with the modules that notebooks export, and one that lists them."
    folder.mkdir(parents=True, exist_ok=True)
    pages: dict[str, list[str]] = {}
    lines = ["# API reference", "", "Every module with its public functions and classes.", ""]
    lines += ["| module | what it holds |", "|---|---|"]
    for module, notebook in notebooks.items():
        path, part = package.parent / (module.replace(".", "/") + ".py"), part_of(module)
        text = of_module(path, module, notebook)
        pages.setdefault(part, [f"# API: {part}", ""]).extend(text)
        summary = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
        lines.append(f"| [`{module}`]({part}.md#{module}) | {summary[0] if summary else ''} |")
    for part, text in pages.items():
        (folder / f"{part}.md").write_text("\n".join(text), encoding="utf-8")
    lines += ["", "```{toctree}", ":hidden:", "", *pages, "```"]
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
