# Every target sets up what it needs in .venv: a machine with Python 3.11 to 3.13 and make is enough.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
PARITY_VENV := .venv-parity
# One process a core: the tests are too small to keep a second core busy by themselves.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow torture parity bench lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY) ## make .venv and install easyrl with its development tools

$(READY): pyproject.toml
	@python=; for name in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 python); do \
		if $$name -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
		then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo "easyrl needs Python 3.11, 3.12 or 3.13 that can make environments (Debian: apt install python3-venv):" \
		"make PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "Setting up $(VENV) with $$python, once: this takes a few minutes."; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $$python -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(READY) ## train the bundled tiny model with PPO, in minutes on two CPU cores
	$(BIN)/python -m easyrl.train_ppo --mesh_dim=1,-1,1

# Compiled programs are kept, which halves the work of every run but the first.
test test-slow torture parity: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/build/jax_cache
test test-slow torture parity: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
test test-slow torture parity: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES := -1

test: $(READY) ## run the tests, except slow and hardware ones
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

test-slow: $(READY) ## run the slow tests
	$(BIN)/python -m pytest -m 'slow and not hardware' $(ARGS)

torture: $(READY) ## kill runs of every trainer at random moments and compare what they leave (ARGS=--runs=5)
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.torture $(ARGS)

# TRL has an environment of its own, so that its versions and ours are free of each other.
$(PARITY_VENV)/ready: $(READY)
	@echo "Setting up $(PARITY_VENV), once: PyTorch and TRL take a few minutes."
	$(PARITY_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet trl==1.16.0 torch==2.13.0 transformers==5.23.0 datasets accelerate
	@touch $@

parity: $(READY) $(PARITY_VENV)/ready ## train with TRL and with easyrl and compare (ARGS=--record: into docs/parity.md)
	rm -rf build/parity
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.parity.inputs build/parity
	$(PARITY_VENV)/bin/python -m tests.parity.trl_side build/parity
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.parity.easyrl_side build/parity
	$(BIN)/python -m tests.parity.compare build/parity $(ARGS)

bench: $(READY) ## time easyrl on the workloads of docs/benchmarks.md, in about ten minutes (ARGS: more flags)
	@mkdir -p build/bench
	$(BIN)/python -m easyrl.bench decode --json=build/bench/decode.json $(ARGS)
	$(BIN)/python -m easyrl.bench ppo --workload=w1 --json=build/bench/w1.json $(ARGS)
	$(BIN)/python -m easyrl.bench dpo --workload=w2 --json=build/bench/w2.json $(ARGS)
	$(BIN)/python -m easyrl.bench dpo --workload=w3 --repeats=32 --json=build/bench/w3.json $(ARGS)
	$(BIN)/python -m easyrl.bench ppo --workload=w4 --json=build/bench/w4.json $(ARGS)

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environments and everything built
	rm -rf $(VENV) $(PARITY_VENV) build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info
