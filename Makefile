# make run    sets up everything and trains the quickstart        make test    sets up everything and passes the tests
# make check  lint, types, tests without Ray (three minutes)      make bench   the long measurements (ONLY="ingest packed")
# make soak   random misfortune, many workers: an hour            make schema  the JSON Schemas that editors read
# make clean  away with the environment and ./runs
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# libraries that open3d opens, and the Debian packages that hold them
SYSTEM := libGL.so.1:libgl1 libEGL.so.1:libegl1 libX11.so.6:libx11-6 libgomp.so.1:libgomp1 libusb-1.0.so.0:libusb-1.0-0

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: run test check bench soak schema system browser clean

run: $(READY)
	$(BIN)/slimray run jobs/quickstart.yaml

check: $(READY) browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m 'not ray and not benchmark'

test: check
	$(BIN)/pytest -q -m 'ray and not benchmark'

bench: $(READY)
	$(BIN)/python -m tests.benchmarks $(ONLY)

soak: $(READY)
	$(BIN)/python -m tests.benchmarks chaos control_plane
	$(BIN)/pytest -q -m benchmark

schema: $(READY)
	$(BIN)/slimray schema > jobs/schema.json
	$(BIN)/slimray schema --card > datasets/card.schema.json

$(READY): pyproject.toml constraints.txt | system
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slimray needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Installs what is missing where that is allowed and possible, else says what to install.
system:
	@known=$$(/sbin/ldconfig -p 2>/dev/null); missing=(); \
	for pair in $(SYSTEM); do [[ "$$known" == *"$${pair%%:*}"* ]] || missing+=("$${pair##*:}"); done; \
	if [[ $$(uname -s) != Linux || $${#missing[@]} -eq 0 ]]; then exit 0; fi; \
	if [[ $$(id -u) -eq 0 ]] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y "$${missing[@]}" > /dev/null; \
	else echo "please install the system packages $${missing[*]} (needed by open3d), then run make again"; exit 1; fi

# The same for a browser, which the tests of the dashboard need.
browser:
	@for name in chromium chromium-browser google-chrome; do if command -v $$name > /dev/null; then exit 0; fi; done; \
	if [[ $$(uname -s) != Linux ]]; then exit 0; fi; \
	if [[ $$(id -u) -eq 0 ]] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y chromium > /dev/null; \
	else echo "please install the system package chromium (needed by tests/test_dashboard.py), then run make again"; exit 1; fi

clean:
	rm -rf $(VENV) runs
