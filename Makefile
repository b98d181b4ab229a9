# Every verb here is what CI runs. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := -c constraints.txt -c constraints-cuda.txt
PIP := $(BIN)/pip install --quiet --disable-pip-version-check $(PINS) --build-constraint constraints.txt
STAMP := pyproject.toml constraints.txt constraints-cuda.txt proto/python/pyproject.toml scripts/install_llama.py

.DEFAULT_GOAL := help
.PHONY: help install demo demo-refine test check fmt manifests images images-test proto bench gpu-test contracts up down clean

help: ## lists the verbs
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PINS) --upgrade pip

$(VENV)/stack.stamp: $(STAMP) | $(BIN)/python
	$(BIN)/python scripts/install_llama.py
	$(PIP) -e proto/python -e '.[stack]'
	@touch $@

$(VENV)/trainer.stamp: $(VENV)/stack.stamp
	$(PIP) -e proto/python -e '.[stack,trainer]'
	@touch $@

# The stack in one go with the rest: two passes would build and resolve the same twice.
$(VENV)/dev.stamp: $(STAMP) | $(BIN)/python
	$(BIN)/python scripts/install_llama.py
	$(PIP) torch -e proto/python -e '.[dev]'
	@touch $(VENV)/stack.stamp $@

.venv-proto/proto.stamp: scripts/proto-constraints.txt
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install --quiet --disable-pip-version-check -r scripts/proto-constraints.txt
	@touch $@

install: $(VENV)/dev.stamp ## everything for development into .venv

demo: $(VENV)/stack.stamp ## imports, quantizes, serves and scores the shipped model (no torch)
	@$(BIN)/python -m scripts.demo

demo-refine: $(VENV)/trainer.stamp ## fine-tunes the shipped model and compares it with its start (installs torch)
	@$(BIN)/python -m scripts.demo_refine

# Hundreds of processes are started: compiled once, whatever the environment says of bytecode.
test: $(VENV)/dev.stamp .venv-proto/proto.stamp ## the whole test suite, on the real local stack
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/dev.stamp .venv-proto/proto.stamp ## format, lint, types, import layers, contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code
	$(BIN)/buf breaking --against contracts/interface/smelt.binpb
	PATH=$(CURDIR)/.venv-proto/bin:$$PATH .venv-proto/bin/python scripts/proto.py --check

manifests: $(VENV)/dev.stamp ## renders and judges everything below deploy/ (needs kubectl)
	$(BIN)/python -m scripts.alerts --check
	$(BIN)/python -m scripts.dashboards --check
	$(BIN)/python -m scripts.manifests

images: $(VENV)/stack.stamp ## container images without a daemon, judged (needs root, buildah and debootstrap)
	$(BIN)/python -m scripts.images build

images-test: $(VENV)/stack.stamp ## runs the whole platform from them (needs podman, runc and qemu-user)
	$(BIN)/python -m scripts.images test

fmt: $(VENV)/dev.stamp ## formats Python and proto files
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/buf format --write

proto: .venv-proto/proto.stamp $(VENV)/dev.stamp ## regenerates the stubs, the registries and the tables of settings
	PATH=$(CURDIR)/.venv-proto/bin:$$PATH .venv-proto/bin/python scripts/proto.py
	$(BIN)/python -m scripts.reasons
	$(BIN)/python -m scripts.openapi
	$(BIN)/python -m scripts.settings_table

contracts: $(VENV)/dev.stamp ## which requirement is decided by which test, which figure has no measurement
	$(BIN)/python -m contracts.coverage
	$(BIN)/python -m contracts.figures

bench: $(VENV)/dev.stamp ## ratios against peers and floors, one run a benchmark
	$(BIN)/python -m benchmarks

gpu-test: $(VENV)/dev.stamp ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

up: $(VENV)/stack.stamp ## starts the platform on this machine
	$(BIN)/smelt up

down: ## stops it
	$(BIN)/smelt down

clean: ## removes the virtual environments and the local platform's state
	rm -rf $(VENV) .venv-proto .smelt
