# make run          install what running needs, and run the quickstart
# make test         install the rest, and run all checks and tests
# make check        run lint, types and the tests that need no Ray
# make bench        run the long measurements (ONLY="ingest packed" selects some)
# make soak         run trainings with injected faults and many workers: an hour
# make schema       write the JSON Schemas that editors read
# make resolve      check constraints.txt against the package index
# make constraints  resolve constraints.txt anew (UPGRADE=1 takes the newest versions)
# make clean        remove the environment and ./runs
SHELL := /bin/bash
SUITS := -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null
# the first of these that slimray supports
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
    $$python $(SUITS) && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(VENV)/.run
DEV := $(VENV)/.dev
INSTALL := $(BIN)/pip install --disable-pip-version-check --constraint constraints.txt
# shared libraries that open3d loads, and the Debian packages that contain them
SYSTEM := libGL.so.1:libgl1 libEGL.so.1:libegl1 libX11.so.6:libx11-6 libgomp.so.1:libgomp1 libusb-1.0.so.0:libusb-1.0-0

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: run test check bench soak schema resolve constraints system browser clean

run: $(RUN)
	$(BIN)/slimray run jobs/quickstart.yaml

check: $(DEV) browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@echo "Checking types while the tests run"
	@$(BIN)/pyright > $(VENV)/pyright.log 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile -m 'not ray and not benchmark'; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/pyright.log; (( tests == 0 && types == 0 ))

test: check
	$(BIN)/pytest -q -m 'ray and not benchmark'

bench: $(DEV)
	$(BIN)/python -m tests.benchmarks $(ONLY)

soak: $(DEV)
	$(BIN)/python -m tests.benchmarks chaos control_plane
	$(BIN)/pytest -q -m benchmark

schema: $(DEV)
	$(BIN)/slimray schema > jobs/schema.json
	$(BIN)/slimray schema --card > datasets/card.schema.json

resolve: | $(BIN)/uv
	$(BIN)/python .ci/constraints.py

constraints: | $(BIN)/uv
	$(BIN)/python .ci/constraints.py --write $(if $(UPGRADE),--upgrade)

$(RUN): pyproject.toml constraints.txt | system $(BIN)/python
	@echo "Installing slimray and its dependencies into $(VENV). This takes some minutes, mostly for torch (0.2 GB for CPUs, 3 GB with CUDA)."
	$(INSTALL) --editable '.[train]'
	@touch $@

$(DEV): $(RUN)
	@echo "Installing the dependencies of the tests, the dashboard and the edge runtimes into $(VENV)"
	$(INSTALL) --editable '.[dev]'
	@touch $@

$(BIN)/uv: | $(BIN)/python
	$(INSTALL) --quiet uv

$(BIN)/python:
	@[[ -n "$(PYTHON)" ]] && $(PYTHON) $(SUITS) || { echo "slimray needs Python 3.11, 3.12 or 3.13: install one of them, or name the interpreter with make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Install missing system packages as root on Debian; elsewhere name the packages to install.
system:
	@known=$$(/sbin/ldconfig -p 2>/dev/null); missing=(); \
	for pair in $(SYSTEM); do [[ "$$known" == *"$${pair%%:*}"* ]] || missing+=("$${pair##*:}"); done; \
	if [[ $$(uname -s) != Linux || $${#missing[@]} -eq 0 ]]; then exit 0; fi; \
	if [[ $$(id -u) -eq 0 ]] && command -v apt-get > /dev/null; then \
	    echo "Installing the system packages $${missing[*]} (open3d loads them)"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$${missing[@]}" > /dev/null; \
	else echo "please install the system packages $${missing[*]} (needed by open3d), then run make again"; exit 1; fi

# Likewise for a browser, which the dashboard's tests need.
browser:
	@for name in chromium chromium-browser google-chrome; do if command -v $$name > /dev/null; then exit 0; fi; done; \
	if [[ $$(uname -s) != Linux ]]; then exit 0; fi; \
	if [[ $$(id -u) -eq 0 ]] && command -v apt-get > /dev/null; then \
	    echo "Installing the system package chromium (the dashboard's tests use it)"; \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium > /dev/null; \
	else echo "please install the system package chromium (needed by tests/report/test_dashboard.py), then run make again"; exit 1; fi

clean:
	rm -rf $(VENV) runs
