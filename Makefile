# Everything starts here. A fresh clone needs only Python 3.11-3.13 and make.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PRESET ?= digits

.DEFAULT_GOAL := help
.PHONY: help install run up down status check test slow soak bench screenshots constraints sbom clean

help: ## Show this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed ## Make the environment in .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11, 3.12 or 3.13 is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable . --group dev --constraint constraints.txt
	touch $@

run: install ## From a fresh machine to a registered model, with links (PRESET=digits)
	$(BIN)/unbroken up
	$(BIN)/unbroken run $(PRESET)

up: install ## Start the local stack
	$(BIN)/unbroken up

down: install ## Stop the local stack; the data stays
	$(BIN)/unbroken down

status: install ## Which services run
	$(BIN)/unbroken status

check: install ## Lint, types, dependency direction, bandit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml training tasks flows infra

PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check ## All checks, and the quicker tests that this machine can run
	$(PYTEST)

slow: install ## The tests that take long: nodes of Slurm that die, dvc, killed flows, the stack killed, quarantine, ...
	$(PYTEST) -m slow

soak: install ## The full counts; writes evidence under docs/evidence
	$(BIN)/python -m pytest -m soak

bench: install ## Data, training, checkpoints, recovery, serving and the chain beside other libraries (their environments in .bench)
	$(BIN)/python -m benchmarks.data
	$(BIN)/python -m benchmarks.data.scale
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.training.tables
	$(BIN)/python -m benchmarks.training.staleness
	$(BIN)/python -m benchmarks.training.checkpoints
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.recovery.kills
	$(BIN)/python -m benchmarks.recovery.pages
	$(BIN)/python -m benchmarks.recovery.goodput
	$(BIN)/python -m benchmarks.servers failover
	$(BIN)/python -m benchmarks.servers transport
	$(BIN)/python -m benchmarks.servers peers
	$(BIN)/python -m benchmarks.servers deaths
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.parallel memory
	$(BIN)/python -m benchmarks.parallel rate
	$(BIN)/python -m benchmarks.parallel bubble
	$(BIN)/python -m benchmarks.serving
	$(BIN)/unbroken up && $(BIN)/python -m benchmarks.orchestration && $(BIN)/python -m benchmarks.monitoring

screenshots: install ## Take the README's screenshots with a headless Chromium
	$(BIN)/python docs/images/take.py

constraints: install ## Resolve constraints.txt for Python 3.11-3.13 (edit a line of it first, to move that version)
	$(BIN)/python -m pip install --quiet uv
	for version in 3.11 3.12 3.13; do \
		$(BIN)/uv pip compile -q pyproject.toml --group dev --python-version $$version --constraint constraints.txt \
			--no-header --no-annotate; \
	done | sort -u > constraints.new
	(grep '^#' constraints.txt; cat constraints.new) > constraints.both && mv constraints.both constraints.txt && rm constraints.new

sbom: install ## What the environment is made of, as CycloneDX, in sbom.json
	$(BIN)/python -m infra.sbom > sbom.json

clean: ## Remove the environment (the stack's data stays in .unbroken)
	rm -rf $(VENV)
