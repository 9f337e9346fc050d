# Everything a fresh machine with Python 3.11 and make needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install dev demo test test-slow lint bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e ".[dev]"
	@touch $@

install: $(VENV)/.installed ## set up the virtual environment
dev: $(VENV)/.dev ## set up with test and lint tools

demo: install ## train one agent on three real tasks for a few minutes, evaluate it, show the result
	$(BIN)/python scripts/demo.py

test: dev ## the default tests (under 12 minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile -q

test-slow: dev ## learning tests and other long checks
	$(BIN)/python -m pytest -m slow -q

lint: dev ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: dev ## the speed tables
	$(BIN)/python benchmarks/vector.py
	$(BIN)/python benchmarks/metaworld_steps.py
	$(BIN)/python benchmarks/minigrid_step.py
	$(BIN)/python benchmarks/train_speed.py

clean: ## remove the virtual environment
	rm -rf $(VENV)
