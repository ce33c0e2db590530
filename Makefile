# The project's commands. `make demo` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests run in this many processes; the machine's cores by default.
WORKERS ?= auto

.PHONY: help setup demo test lint types pytest proto bench clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED)  ## create .venv and install everything into it

# torch comes first and pinned: a range would resolve to the CUDA build on a machine that has no use for it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lossgrad needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -E '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)  ## start a server, evaluate real predictions through it, compare with torch, stop it
	$(BIN)/python -m examples.demo

test: lint types pytest  ## set-up, lint, types, all tests

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

pytest: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS)

proto: $(INSTALLED)  ## write the generated code anew
	$(BIN)/python proto/generate.py

clean:  ## remove what the other commands made
	rm -rf $(VENV) .venv-proto build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
