# The two commands of the README: `make serve` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
CONFIG ?=
# What an installation is made of: when it changes, so does what has been compiled of it.
INSTALLED := pyproject.toml constraints.txt $(wildcard kernels/native/*)
# pip does not say what was not compiled.
SAY_WHETHER_COMPILED = @ls kernels/mell_kernels/_native_*.so >/dev/null 2>&1 \
  || echo "No kernels were compiled for this CPU (is g++ there?): kernels/README.md says what that means."
# A package index that is slow for a while is waited for.
export PIP_DEFAULT_TIMEOUT ?= 60
export PIP_RETRIES ?= 10

.PHONY: serve test lint types check clean

serve: $(VENV)/.served
	$(BIN)/mell-ray serve $(CONFIG)

test: $(VENV)/.tested
	$(BIN)/python -m pytest
	@echo
	@echo "All passed. Next: 'make serve' serves the built-in model at http://127.0.0.1:8000/v1."

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tested
	$(BIN)/mypy

check: lint types test

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mell-ray needs Python 3.11 or newer; $(PYTHON) is" `$(PYTHON) --version`; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.served: $(INSTALLED) | $(VENV)/bin/python
	@echo "Installing mell-ray into $(VENV); the first time takes minutes."
	$(PIP) -e .
	$(SAY_WHETHER_COMPILED)
	@touch $@

$(VENV)/.tested: $(INSTALLED) | $(VENV)/bin/python
	@echo "Installing mell-ray and its test tools into $(VENV); the first time takes minutes."
	$(PIP) -e '.[test]'
	$(SAY_WHETHER_COMPILED)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/mell_kernels/*.so
