"""The kernel of an executed notebook."""

import json
import subprocess
import sys

import nbformat
from nbformat.v4 import new_code_cell, new_notebook


def test_the_kernel_of_a_notebook_is_the_interpreter_that_runs_the_command(tmp_path, monkeypatch):
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    wrong = {"argv": [str(tmp_path / "no-such-python"), "{connection_file}"], "display_name": "x", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(wrong))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    source, executed = tmp_path / "source.ipynb", tmp_path / "executed.ipynb"
    cells = [
        new_code_cell("prefix = ''", metadata={"tags": ["parameters"]}),
        new_code_cell("import sys\nprint(sys.prefix.endswith(prefix))"),
    ]
    language = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=language), source)
    call = [sys.executable, "-m", "grad_nb.runs.notebooks", source, executed, tmp_path / "log"]
    values = json.dumps({"prefix": sys.prefix[1:]})
    done = subprocess.run([*map(str, call), values], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert nbformat.read(executed, 4).cells[-1].outputs[0].text == "True\n"
