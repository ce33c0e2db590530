# The project's commands. `make demo` and `make test` need nothing but Python 3.11+, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# The tests run in this many processes; the machine's cores by default.
WORKERS ?= auto

# How long `make soak` runs.
SECONDS ?= 1800

.PHONY: help setup demo test test-faults soak lint types pytest proto lock bench clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(INSTALLED)  ## create .venv and install everything into it

# Everything but torch is installed from the lock: those versions, and no file whose hash is not in it. torch comes as the
# version alone, in the flavour that pip finds where it is configured to look; requirements/lock.py says why.
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
$(INSTALLED): pyproject.toml constraints.txt requirements/dev.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lossgrad needs Python 3.11 or newer; set PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --require-hashes --no-deps --requirement requirements/dev.txt
	$(PIP) install --constraint constraints.txt "$$(grep -E '^torch==' constraints.txt)"
	$(PIP) install --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	touch $@

lock:  ## write requirements/*.txt anew from pyproject.toml and constraints.txt
	$(PYTHON) requirements/lock.py

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
	$(BIN)/python -m pytest -n $(WORKERS) --ignore=tests/faults
	$(BIN)/python -m pytest -n 0 tests/faults  # alone: these hold servers under load to bounds

proto: $(INSTALLED)  ## write the generated code anew
	$(BIN)/python proto/generate.py

clean:  ## remove what the other commands made
	rm -rf $(VENV) .venv-proto .venv-lock .node build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
