# Needs make and Python 3.11 or newer; everything else goes into .venv. `make demo PYTHON=python3.12` chooses the Python.
PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN_STAMP = $(VENV)/.stamp-$(VERSION)
DEV_STAMP = $(VENV)/.stamp-dev-$(VERSION)
PARITY_STAMP = $(VENV)/.stamp-parity-$(VERSION)

.PHONY: help demo test parity lint

help:
	@echo "make demo    train, distil, sample and report in runs/demo"
	@echo "make test    the tests; ARGS='-k config' passes arguments to pytest"
	@echo "make parity  the tests against PyTorch's diffusers and transformers, which it installs (1.3 GB)"
	@echo "make lint    ruff, pyright and shellcheck"

demo: $(RUN_STAMP)
	$(VENV)/bin/python -m launch.demo --workdir=runs/demo

test: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

parity: $(PARITY_STAMP)
	$(VENV)/bin/python -m pytest tests/parity -n auto --dist loadfile $(ARGS)

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/shellcheck --external-sources launch/*.sh

# A stamp is written last. Where an install was broken off, or .venv is another Python's, .venv starts afresh.
$(RUN_STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer: set PYTHON=/path/to/python3.11 after make" >&2; exit 1; }
	@echo "Installing requirements.txt into $(VENV)"
	@if [ -e $(VENV)/.unfinished ] || [ ! -e $(VENV)/bin/python$(VERSION) ]; then $(PYTHON) -m venv --clear $(VENV); fi
	@touch $(VENV)/.unfinished
	@$(PIP_INSTALL) -r requirements.txt
	@rm $(VENV)/.unfinished
	@touch $@

$(DEV_STAMP): $(RUN_STAMP) requirements-dev.txt
	@echo "Installing requirements-dev.txt into $(VENV)"
	@touch $(VENV)/.unfinished
	@$(PIP_INSTALL) -r requirements-dev.txt
	@rm $(VENV)/.unfinished
	@touch $@

$(PARITY_STAMP): $(DEV_STAMP) requirements-parity.txt
	@echo "Installing requirements-parity.txt into $(VENV)"
	@touch $(VENV)/.unfinished
	@$(PIP_INSTALL) -r requirements-parity.txt
	@rm $(VENV)/.unfinished
	@touch $@
