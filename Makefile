# Needs Python 3.11 or later with pip, and make; every target does its own set-up in .venv.
#   make demo       64 models on real data, a table and two plots
#   make test       the tests, at most 10 minutes       make test-long   the long ones, at most 45
#   make lint       ruff, mypy, import-linter           make bench       speed against the alternatives
#   make opinfo     PyTorch's own samples, all of them, through the bridge to JAX
#   make setup      only the set-up                     make clean       remove it and what tools left
# Options follow in ARGS: make demo ARGS="--help"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a core and one thread a process: the tests run many small tensors.
WORKERS ?= auto
ARGS ?=
PYTEST := env OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=$(WORKERS) --maxprocesses=8
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt

# $(call stage,name,command): runs the command, prints how long it took, keeps its exit status.
stage = @start=$$(date +%s); $(2); status=$$?; echo "== $(1): $$(( $$(date +%s) - start )) s"; exit $$status

.PHONY: help setup demo test test-long lint bench opinfo clean

help:
	@sed -n '1,7s/^# *//p' Makefile

setup: $(BIN)/.installed-dev

demo: $(BIN)/.installed-demo
	$(call stage,demo,$(BIN)/modelbatch demo $(ARGS))

test: $(BIN)/.installed-dev
	$(call stage,test,$(PYTEST) -m "not long" $(ARGS))

test-long: $(BIN)/.installed-dev
	$(call stage,test-long,$(PYTEST) -m long --timeout=1200 $(ARGS))

lint: $(BIN)/.installed-dev
	$(call stage,ruff check,$(BIN)/ruff check)
	$(call stage,ruff format,$(BIN)/ruff format --check)
	$(call stage,mypy,$(BIN)/mypy)
	$(call stage,import rules,$(BIN)/lint-imports)

bench: $(BIN)/.installed-dev
	$(call stage,bench,$(BIN)/python -m benchmarks $(ARGS))

opinfo: $(BIN)/.installed-dev
	$(call stage,opinfo,$(BIN)/python -m tests.opinfo $(ARGS))

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .xla_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=...")'
	@# Where venv cannot put pip into the environment (Debian without python3-venv), the outer pip does it.
	@$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
		&& $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

# The build backend comes first and is used as installed, so that constraints.txt pins it as well.
$(BIN)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), about a minute plus downloads"
	$(call stage,setup ($*),$(PIP_INSTALL) hatchling && $(PIP_INSTALL) --no-build-isolation --editable ".[$*]" \
		&& touch $@)
