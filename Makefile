# The project's commands. `make demo` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests run in this many processes; the machine's cores by default.
WORKERS ?= auto

# How long `make soak` runs.
SECONDS ?= 1800

.PHONY: help setup demo test test-faults soak lint types pytest proto bench clean

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

test-faults: $(INSTALLED)  ## every fault that tests/faults/ does to servers, those over a minute too; prints the figures
	$(BIN)/python -m pytest tests/faults tests/end_to_end/test_drain.py tests/server/test_shared_memory_fuzz.py -m 'faults or not faults' -n 0 -s -v

soak: $(INSTALLED)  ## faults of all kinds under load for half an hour (SECONDS=); every answer compared with torch
	$(BIN)/python -m tests.faults.soak $(SECONDS)

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
