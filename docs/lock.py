"""The exact environment as a file that pip reads: `make lock`, or `python docs/lock.py`.

It names everything that the reproduction needs (the package, its extra `batch` and all that these need) with the
version that is installed here. Versions alone: no hosts, no folders, and nothing of a build for one machine.
"""

import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements-lock.txt"


def installed(name: str, extras: frozenset[str] = frozenset(), seen: dict | None = None) -> dict[str, str]:
    "A package and all that it needs here, with the versions that are installed."
    seen = {} if seen is None else seen
    key = re.sub(r"[-_.]+", "-", name).lower()
    version, before = seen.get(key, ("", frozenset()))
    if version and extras <= before:
        return {}
    try:
        found = distribution(name)
    except PackageNotFoundError:  # one that only another system needs
        return {}
    seen[key] = (found.version.partition("+")[0], before | extras)
    for text in found.requires or []:
        needed = Requirement(text)
        for extra in ("", *extras):
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                installed(needed.name, frozenset(needed.extras), seen)
    return {key: version for key, (version, _) in seen.items()}


def lines() -> list[str]:
    "The lines of the file."
    found = installed("grad_nb", frozenset({"batch"}))
    for name in ("grad-nb", "setuptools"):  # itself, and what pip brings
        found.pop(name, None)
    head = [
        f"# The environment of the published records, Python {platform.python_version()}: made by `make lock`.",
        "# pip install -r requirements-lock.txt && pip install --no-deps -e .",
    ]
    return head + [f"{name}=={found[name]}" for name in sorted(found)]


if __name__ == "__main__":
    LOCK.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    sys.exit(print(f"{LOCK.name}: {len(lines()) - 2} packages"))
