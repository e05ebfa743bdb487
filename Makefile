# Every target alone is enough on a fresh machine with Python 3.11 or later.
#
#   make demo    a first look: environment, weights, the demonstration
#   make test    ruff and the tests
#   make lint    ruff alone
#   make fuzz    random programs, patterns, schemas and model files for FUZZ_SECONDS, 300 by default
#   make bench   the benchmarks, with torch as the reference
#   make bench-text  controlled text against genlm-control and llamppl (an hour)
#   make bench-kernels  the kernels against those of blackjax, cuthbert and particles
#   make bench-diffusion  powers of mixtures by diffusion against loops in torch; log Z by schedule and corrector
#   make bench-mcmc  particle Gibbs and SMC squared against particles, NUTS against NumPyro alone
#   make clean   remove the environment and what tools left behind (not the downloaded weights)
#
# PYTHON=/path/to/python chooses the interpreter; otherwise the first that runs and is new enough.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := test
.PHONY: demo test lint fuzz bench bench-text bench-kernels bench-diffusion bench-mcmc clean weights

PYTHON ?=
FUZZ_SECONDS ?= 300
VENV := .venv
BIN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed-test
INSTALLED_BENCH := $(VENV)/.installed-bench
INSTALLED_PEERS := $(VENV)/.installed-bench-text-peers
INSTALLED_KERNELS := $(VENV)/.installed-bench-kernels

demo: weights
	$(BIN) scripts/demo.py

test: lint weights
	$(BIN) -m pytest -n auto --dist worksteal

fuzz: weights
	$(BIN) -m tests.fuzz --seconds $(FUZZ_SECONDS)

lint: $(INSTALLED)
	$(BIN) -m ruff check .

bench: weights $(INSTALLED_BENCH)
	$(BIN) benchmarks/run.py

bench-text: weights $(INSTALLED_PEERS)
	$(BIN) -m benchmarks.controlled_text

bench-kernels: $(INSTALLED_KERNELS)
	$(BIN) -m benchmarks.kernels
	$(BIN) -m benchmarks.moves

bench-diffusion: $(INSTALLED_BENCH)
	$(BIN) -m benchmarks.diffusion

bench-mcmc: $(INSTALLED_KERNELS)
	$(BIN) -m benchmarks.mcmc

weights: $(INSTALLED)
	@$(BIN) scripts/fetch_smollm2.py
	@$(BIN) scripts/fetch_minilm.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A candidate counts only if it runs: a version manager may leave a python3.12 on the path that does nothing but fail.
$(BIN):
	@for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    echo "using $$candidate ($$("$$candidate" --version))"; \
	    exec "$$candidate" -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python 3.11 or later that runs, with venv. Give one: make PYTHON=/path/to/python" >&2; exit 1

$(INSTALLED): pyproject.toml | $(BIN)
	$(BIN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

# pip takes torch from whatever index it is configured with; PyPI's wheel for Linux brings several gigabytes of CUDA.
$(INSTALLED_BENCH): $(INSTALLED)
	$(BIN) -m pip install --quiet --disable-pip-version-check -e '.[test,bench-text]'
	@touch $@

$(INSTALLED_PEERS): $(INSTALLED_BENCH)
	$(BIN) -m pip install --quiet --disable-pip-version-check -e '.[test,bench-text,bench-text-peers]'
	@touch $@

# particles 0.4 asks for numpy below 2 and runs with numpy 2: the extra names what it needs, and it comes alone.
$(INSTALLED_KERNELS): $(INSTALLED)
	$(BIN) -m pip install --quiet --disable-pip-version-check -e '.[test,bench-kernels,bench-particles]'
	$(BIN) -m pip install --quiet --disable-pip-version-check --no-deps 'particles==0.4'
	@touch $@
