"""Build grad_nb: metadata from settings.ini, notebooks of the reproduction packed into the wheel."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
TEMPLATES = ROOT / "nbs" / "reproduce"


class BuildWithTemplates(build_py):
    "Copy nbs/reproduce into the package as it is built: a wheel carries templates, Snakefile and the paper's figures."

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "grad_nb" / "reproduce"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(TEMPLATES, target, ignore=shutil.ignore_patterns(".*", "__pycache__"), dirs_exist_ok=True)


config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

extras = {
    name: cfg[f"{name}_requirements"].split()
    for name in ("run", "batch", "export", "show", "compare", "openvino", "docs", "dev")
}
extras["batch"] += extras["run"]
extras["dev"] += extras["batch"] + extras["export"] + extras["docs"]
extras["compare"] += extras["export"] + extras["openvino"]  # each method in every runtime

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["grad_nb", "grad_nb.*"]),
    cmdclass={"build_py": BuildWithTemplates},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": [s for s in cfg["console_scripts"].splitlines() if s.strip()]},
    zip_safe=False,
)
