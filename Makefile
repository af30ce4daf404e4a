# Two commands: `make demo` and `make test`. Each sets up its own .venv the first time and never again,
# unless pyproject.toml changes. Needs Python >= 3.11, a C compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-host test-emulated clean

demo: $(VENV)/.demo
	$(BIN)/optforge demo --kernels build --out demo.png

# The tests of the CUDA target, which run on an emulation, go on beside the others.
test: $(VENV)/.dev
	$(BIN)/ruff check generator tests benchmarks
	$(BIN)/ruff format --check generator tests benchmarks
	$(BIN)/mypy
	$(BIN)/optforge generate --all --target c --target cuda --check
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-emulated test-host

test-host:
	$(BIN)/pytest -q $(PYTEST_ARGS)

test-emulated:
	$(BIN)/python tests/emulated.py

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'optforge needs Python >= 3.11; name one with: make PYTHON=/path/to/python3.11'; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo.png demo-training.png
