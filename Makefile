# `make demo`, `make lab`, `make docs`, `make test`: each makes .venv first if it is not there.
PYTHON ?= python3
SEED ?= 0
PRESET ?= demo
RUNS ?= runs
DEVICE ?= auto
DATA ?=
CATEGORY ?=
SET ?=
BIN := .venv/bin
GPU_TESTS = $(shell grep -rl "mark.gpu" tests)

.PHONY: demo test test-notebooks test-python lab docs gpu install export collect fixture lock gallery clean

install: .venv/installed

.venv/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install  ## the whole method on one category: make demo SEED=1, make demo DATA=folder CATEGORY=bottle
	$(BIN)/grad_demo --data "$(DATA)" --category "$(CATEGORY)" --preset "$(PRESET)" --seed $(SEED) --runs "$(RUNS)" --device "$(DEVICE)" --overrides "$(SET)"

test: install  ## notebooks clean and in sync, lines, imports, types, notebook tests, pytest
	$(BIN)/python tests/check_sync.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy grad_nb
	OMP_WAIT_POLICY=PASSIVE $(MAKE) --jobs 2 test-notebooks test-python

test-notebooks: install  ## one at a time, since the tests run beside them
	$(BIN)/nbdev_test --n-workers 1

test-python: install
	$(BIN)/python -m pytest -q

lab: install  ## the whole method in one notebook, in JupyterLab; threads that wait for work sleep
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(BIN)/jupyter lab nbs/00_one_sitting.ipynb

docs: install  ## the site, into _docs/html, without a network; a warning is an error
	$(BIN)/python docs/build.py

gpu: $(if $(filter .venv/bin,$(BIN)),install)  ## on a machine with a CUDA device: its tests and its speed, into results/gpu; BIN=folder takes the Python there and installs nothing
	$(BIN)/python -m pytest -q -m gpu $(GPU_TESTS)
	mkdir -p results/gpu
	$(BIN)/python -m grad_nb.bench.command --device cuda --quick --protocol --json-file results/gpu/gpu.json
	$(BIN)/python -m grad_nb.bench.command --device cuda --preset paper --json-file results/gpu/gpu-steps.json

export: install  ## after editing a notebook: clean the notebooks, write grad_nb/, README.md and the minutes in docs/
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python tests/check_sync.py --write-readme
	$(BIN)/python docs/build.py --write-minutes

collect:  ## the records of finished runs and ablations, without pictures, into results/: the sets of results/sets.json
	$(BIN)/python -m grad_nb.study.results --runs "$(RUNS)"

fixture: install  ## the small trained run whose pictures the notebooks show, into nbs/fixture
	$(BIN)/python -m grad_nb.study.fixture

gallery:  ## the executed tables and figures of a finished batch, into nbs/gallery: make gallery RUNS=runs PRESET=demo
	$(BIN)/python -m grad_nb.study.gallery --runs "$(RUNS)" --preset "$(PRESET)"

lock:  ## the exact environment in which the records are made, into requirements-lock.txt
	$(BIN)/python docs/lock.py

clean:
	rm -rf .venv build dist _docs *.egg-info
