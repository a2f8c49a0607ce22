"""Check that the notebooks are clean and that grad_nb/ and README.md are what the notebooks say.

What a notebook has stored names no folder of the machine that ran it.

Works on a copy, so that nothing of yours is changed; with --write-readme it writes README.md instead.
"""

import filecmp
import getpass
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


def readme(root: Path) -> str:
    "README.md, made from nbs/index.ipynb: hidden cells and directives left out, links made to fit."
    command = [
        BIN / "jupyter",
        "nbconvert",
        "--to",
        "markdown",
        "--stdout",
        "--TagRemovePreprocessor.enabled=True",
        "--TagRemovePreprocessor.remove_cell_tags=hide",
        "--TagRemovePreprocessor.remove_input_tags=remove-input",
        root / "nbs" / "index.ipynb",
    ]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"^#\| .*\n+", "", text, flags=re.MULTILINE)
    text = re.sub(r"(\]\(|src=\")(images/|(?:\w+/)?[0-9]\w*\.ipynb|reproduce/)", r"\1nbs/\2", text)
    text = text.replace("](../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def differing(a: Path, b: Path, pattern: str) -> list[str]:
    "Names of files that differ between two folders, or that only one of them has."
    names = sorted(
        {str(p.relative_to(x)) for x in (a, b) for p in x.rglob(pattern) if ".ipynb_checkpoints" not in p.parts}
    )
    return [
        n for n in names if not ((a / n).is_file() and (b / n).is_file() and filecmp.cmp(a / n, b / n, shallow=False))
    ]


FOLDERS = "tmp home root Users private var mnt media opt usr srv work workspace data content kaggle".split()
PLACE = re.compile(rf"(?<![\w.:/<])/(?:{'|'.join(FOLDERS)})/[^\s\"'<>]+|\b[A-Z]:\\\\?Users\b[^\s\"']*")


def machine_names() -> list[str]:
    "The names of this machine and of its user, if they are names and not words that anybody may write."
    names = {socket.gethostname(), getpass.getuser()}
    return [name for name in names if len(name) > 5 and name not in ("runner", "jovyan", "localhost")]


def places(path: Path) -> list[str]:
    "What the stored outputs of a notebook say of the machine that ran it."
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            data = {kind: text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")}
            text = json.dumps([output.get("text"), output.get("traceback"), data], ensure_ascii=False)
            found += PLACE.findall(text) + [name for name in machine_names() if name in text]
    return found


def main() -> int:
    if "--write-readme" in sys.argv:
        (ROOT / "README.md").write_text(readme(ROOT), encoding="utf-8")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "grad_nb_copy"
        copy.mkdir()
        for name in ("pyproject.toml", "settings.ini", "setup.py", "README.md"):
            shutil.copy2(ROOT / name, copy)
        for name in ("nbs", "grad_nb"):
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            )
        for command in ("nbdev-clean", "nbdev-export"):
            subprocess.run([BIN / command], cwd=copy, check=True, stdout=subprocess.DEVNULL)
        wrong = [f"nbs/{n} is not clean" for n in differing(ROOT / "nbs", copy / "nbs", "*.ipynb")]
        wrong += [
            f"grad_nb/{n} is not what the notebooks export"
            for n in differing(ROOT / "grad_nb", copy / "grad_nb", "*.py")
        ]
        for path in sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts):
            wrong += [f"{path.relative_to(ROOT)} has stored {place}" for place in places(path)]
        if readme(ROOT) != (ROOT / "README.md").read_text(encoding="utf-8"):
            wrong.append("README.md is not what nbs/index.ipynb says")
    for line in wrong:
        print(line)
    print("run `make export`" if wrong else "notebooks are clean; grad_nb/ and README.md are in sync")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
