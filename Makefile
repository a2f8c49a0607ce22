# The two commands of the README: `make demo` and `make test`. Both make .venv first if it is not there.
PYTHON ?= python3
SEED ?= 0
PRESET ?= demo
RUNS ?= runs
DEVICE ?= auto
DATA ?=
CATEGORY ?=
SET ?=
BIN := .venv/bin

.PHONY: demo test gpu install export collect clean

install: .venv/installed

.venv/installed: settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install  ## the whole method on one category: make demo SEED=1, make demo DATA=folder CATEGORY=bottle
	$(BIN)/grad_demo --data "$(DATA)" --category "$(CATEGORY)" --preset "$(PRESET)" --seed $(SEED) --runs "$(RUNS)" --device "$(DEVICE)" --overrides "$(SET)"

test: install  ## notebooks clean and in sync, notebook tests, pytest
	$(BIN)/python tests/check_sync.py
	$(BIN)/nbdev_test --n-workers 2
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

gpu: install  ## on a machine with a CUDA device: its tests, then how fast it is, into gpu.json
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/grad_bench --device cuda --quick --protocol --json-file gpu.json
	$(BIN)/grad_bench --device cuda --preset paper --json-file gpu-steps.json

export: install  ## after editing a notebook: clean the notebooks, write grad_nb/ and README.md
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python tests/check_sync.py --write-readme

collect:  ## the records of finished runs and ablations, without pictures, into results/
	mkdir -p results/runs
	cd "$(RUNS)" && find . -mindepth 5 -name result.json -exec cp --parents {} "$(CURDIR)/results/runs/" \;
	for set in ablation sensitivity regularizers regularizers-more generators generators-more batch batch-more table4-more; do if [ -d $$set ]; then $(BIN)/grad_ablate --folder $$set --collect results/$$set || exit 1; fi; done

clean:
	rm -rf .venv build dist *.egg-info
