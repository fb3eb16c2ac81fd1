# One command each. `make` prints this help.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
  command -v $$p >/dev/null 2>&1 && $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
FOLDERS := runtime agents tools sandboxes graders

.DEFAULT_GOAL := help
.PHONY: help engine images demo test check soak bench format pins clean

help: ## Print what each target does
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

engine: ## See to it that there is a Docker engine: the running one, or as root on Debian and Ubuntu their own
	.ci/engine

images: $(VENV)/core.stamp engine ## Make the sandboxes' images, where they are not as their recipes want them
	$(BIN)/ridethrough sandbox build python
	$(BIN)/ridethrough sandbox build desktop

demo: $(VENV)/core.stamp ## Set up and run the built-in example: a brownout, a crash, a resume
	@.ci/engine || echo "The demo goes on without a Docker engine."
	$(BIN)/ridethrough demo

test: $(VENV)/dev.stamp images ## Set up and pass the tests
	$(BIN)/pytest $(ARGS)

check: $(VENV)/dev.stamp ## Lint, check types strictly (mypy and pyright), check who imports whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests examples
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

soak: $(VENV)/dev.stamp images ## Kill runs anywhere, hundreds of times (half an hour; RIDETHROUGH_SEED=n repeats one)
	$(BIN)/pytest -m soak -s $(ARGS)

bench: $(VENV)/dev.stamp $(VENV)/peers.stamp images ## Measure beside the peers and print the table
	$(BIN)/python benchmarks/run.py $(ARGS)

format: $(VENV)/dev.stamp ## Format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pins: $(VENV)/dev.stamp ## Compile the pinned, hashed requirements anew
	cd requirements && for set in core dev; do ../$(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --output-file $$set.txt $$set.in; done
	cd benchmarks && ../$(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-annotate \
	  --no-emit-index-url --no-emit-find-links --no-emit-trusted-host --no-header --output-file requirements-peers.txt requirements-peers.in

clean: ## Remove what the other targets made
	rm -rf $(VENV) benchmarks/.venv .ridethrough-demo .mypy_cache .ruff_cache .pytest_cache

# --- set-up ---------------------------------------------------------------------------------------------------------

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer with venv was found. Install one (Debian: python3 python3-venv), or say make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/core.stamp: requirements/core.txt pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes -r requirements/core.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/dev.stamp: requirements/dev.txt pyproject.toml | $(BIN)/python
	$(PIP) install --require-hashes -r requirements/dev.txt
	$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@ $(VENV)/core.stamp

$(VENV)/peers.stamp: benchmarks/requirements-peers.txt | $(BIN)/python
	$(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip --disable-pip-version-check --quiet install --require-hashes -r benchmarks/requirements-peers.txt
	@touch $@
