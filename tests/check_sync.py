"""Check that the notebooks are clean and that grad_nb/ and README.md are what the notebooks say.

Works on a copy, so that nothing of yours is changed; with --write-readme it writes README.md instead.
"""

import filecmp
import re
import shutil
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
        if readme(ROOT) != (ROOT / "README.md").read_text(encoding="utf-8"):
            wrong.append("README.md is not what nbs/index.ipynb says")
    for line in wrong:
        print(line)
    print("run `make export`" if wrong else "notebooks are clean; grad_nb/ and README.md are in sync")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
