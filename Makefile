# Two commands: `make demo` and `make test`; for the loop of a contributor `make quick`, for the site `make docs`. Each
# sets up its own .venv the first time and never again, unless pyproject.toml changes. Needs Python >= 3.11, a C compiler
# and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What the processes of a run compile, each finds here.
STORE = store=$$(mktemp -d) && trap 'rm -rf "$$store"' EXIT INT TERM && OPTFORGE_TEST_STORE="$$store"

.PHONY: demo docs check quick quick-language quick-bits test test-language test-bits test-emitted test-cuda clean

demo: $(VENV)/.demo
	$(BIN)/optforge demo --kernels build --out demo.png

# The site, in docs/_build/html. A warning is an error.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo 'docs/_build/html/index.html'

check: $(VENV)/.dev
	$(BIN)/ruff check generator tests benchmarks docs
	$(BIN)/ruff format --check generator tests benchmarks docs/conf.py docs/_figures
	$(BIN)/mypy
	$(BIN)/optforge generate --all --target c --target cuda --check

# The language, and the bits of float32.
quick: $(VENV)/.dev
	@$(STORE) $(MAKE) --no-print-directory --jobs 3 --output-sync=target check quick-language quick-bits

quick-language:
	$(BIN)/pytest -q tests/cli/test_rooms.py tests/language/test_language.py tests/language/test_meanings.py \
	    tests/language/test_names.py tests/language/test_hints.py $(PYTEST_ARGS)

quick-bits:
	$(BIN)/pytest -q tests/bits/test_bits.py tests/train/test_optimizer.py -k "not float64" $(PYTEST_ARGS)

test: $(VENV)/.dev
	@echo "The tests take seven to ten minutes on two cores; make quick takes one."
	@$(STORE) $(MAKE) --no-print-directory --jobs 5 --output-sync=target check test-language test-bits \
	    test-emitted test-cuda

# Many tests wait for compilers and processes, so that the parts go on beside each other.
test-language:
	$(BIN)/pytest -q tests/language tests/cli tests/profile tests/train tests/doors $(PYTEST_ARGS)

test-bits:
	$(BIN)/pytest -q tests/bits $(PYTEST_ARGS)

test-emitted:
	$(BIN)/pytest -q tests/emitted tests/runtime $(PYTEST_ARGS)

test-cuda:
	$(BIN)/pytest -q tests/cuda tests/engines $(PYTEST_ARGS)
	test -z "$$OPTFORGE_TEST_FULL" || $(BIN)/python tests/emulated.py

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

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) docs/_build demo.png demo-training.png
