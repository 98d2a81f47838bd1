# Needs make and Python 3.11 or newer; everything else goes into .venv. `make demo PYTHON=python3.12` chooses the Python.
PYTHON ?= python3
VENV ?= .venv
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN_STAMP = $(VENV)/.stamp-$(VERSION)
DEV_STAMP = $(VENV)/.stamp-dev-$(VERSION)
PARITY_STAMP = $(VENV)/.stamp-parity-$(VERSION)
CUDA_STAMP = $(VENV)/.stamp-cuda-$(VERSION)

.PHONY: help demo test parity cuda lint

help:
	@echo "make demo    train, distil, sample and report in runs/demo"
	@echo "make test    the tests; ARGS='-k config' passes arguments to pytest"
	@echo "make parity  the tests against PyTorch's diffusers and transformers, which it installs (1.3 GB)"
	@echo "make cuda    the tests that compile for GPUs that need not be there, with JAX's plugin for CUDA, which it installs"
	@echo "make lint    ruff, pyright and shellcheck"

demo: $(RUN_STAMP)
	$(VENV)/bin/python -m launch.demo --workdir=runs/demo

test: $(DEV_STAMP)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

parity: $(PARITY_STAMP)
	$(VENV)/bin/python -m pytest tests/parity -n auto --dist loadfile $(ARGS)

cuda: $(CUDA_STAMP)
	$(VENV)/bin/python -m pytest tests/test_plan.py -m cuda $(ARGS)

lint: $(DEV_STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/shellcheck --external-sources launch/*.sh

# A stamp is written last. Where an install was broken off, or .venv is another Python's, .venv starts afresh.
define install
@echo "Installing $(1) into $(VENV)"
@touch $(VENV)/.unfinished
@$(PIP_INSTALL) -r $(1)
@rm $(VENV)/.unfinished
@touch $@
endef

$(RUN_STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer: set PYTHON=/path/to/python3.11 after make" >&2; exit 1; }
	@if [ -e $(VENV)/.unfinished ] || [ ! -e $(VENV)/bin/python$(VERSION) ]; then $(PYTHON) -m venv --clear $(VENV); fi
	$(call install,requirements.txt)

$(DEV_STAMP): $(RUN_STAMP) requirements-dev.txt
	$(call install,requirements-dev.txt)

$(PARITY_STAMP): $(DEV_STAMP) requirements-parity.txt
	$(call install,requirements-parity.txt)

$(CUDA_STAMP): $(DEV_STAMP) requirements-cuda.txt
	$(call install,requirements-cuda.txt)
