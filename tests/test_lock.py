"""The lock file is the environment of the published records, and installs all that the reproduction needs."""

import importlib.util
import re
from configparser import ConfigParser

from packaging.requirements import Requirement
from shared import ROOT

from grad_nb.core.files import read_json

LOCK = ROOT / "requirements-lock.txt"


def locked() -> dict[str, str]:
    "Package and version of every line."
    rows = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*", row) for row in rows), (
        "versions alone, no hosts or folders"
    )
    return dict(row.split("==") for row in rows)


def test_it_has_what_the_package_asks_for():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    found = locked()
    for name in ("requirements", "run_requirements", "batch_requirements"):
        for text in config["DEFAULT"][name].split():
            needed = Requirement(text)
            assert needed.name in found and needed.specifier.contains(found[needed.name]), text


def test_it_is_the_environment_of_the_records():
    found = locked()
    records = [read_json(path) for path in (ROOT / "results").rglob("*.json")]
    made = [record["versions"] for record in records if isinstance(record, dict) and "versions" in record]
    names = ("torch", "torchvision", "numpy", "scikit-learn", "pillow")
    alike = [versions for versions in made if all(versions.get(name) == found[name] for name in names)]
    assert len(alike) > 0.9 * len(made) > 0, "make lock, in the environment in which the records are made"


def test_the_file_says_how_it_is_used_and_the_docs_do_too():
    command = "pip install -r requirements-lock.txt && pip install --no-deps -e ."
    assert command in LOCK.read_text(encoding="utf-8")
    assert command in (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")


def test_packages_are_walked_with_their_extras():
    spec = importlib.util.spec_from_file_location("lock", ROOT / "docs" / "lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain, batch = (module.installed("grad_nb", frozenset(extras)) for extras in ((), ("batch",)))
    assert "torch" in plain and "snakemake" not in plain
    assert {"snakemake", "papermill", "nbclient"} <= batch.keys() and plain.items() <= batch.items()
    assert "nbdev" not in batch, "what only its developers need is not needed to reproduce"
