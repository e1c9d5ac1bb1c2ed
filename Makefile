# make run    sets up everything and trains the quickstart        make test   sets up everything and passes the tests
# make check  lint, types, tests without Ray (under 2 minutes)    make bench  the long measurements
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: run test check bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slimray needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

run: $(READY)
	$(BIN)/slimray run jobs/quickstart.yaml

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pytest -q -m 'not ray and not benchmark'

test: check
	$(BIN)/pytest -q -m 'ray and not benchmark'

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) runs
