# `make help` lists the targets. Everything is installed into $(VENV); a torch that is already there stays.
VENV ?= .venv
# Handed to pip as it is when $(VENV) has no torch: a version, a wheel file, or a version and pip's options.
TORCH ?= torch==2.13.0
# More words for the command: `make run ARGS="steps=20"`, `make test ARGS="tests/moe -x"`.
ARGS ?=
# How many tests run at the same time.
JOBS ?= logical
PYTHON ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# DeepSpeed's own kernels are compiled when first used, or not at all.
export DS_BUILD_OPS ?= 0
export TORCH ARGS

.PHONY: help run test checks lint format test-matrix clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | awk -F ':.*## ' '{ printf "  make %-12s %s\n", $$1, $$2 }'
	@echo '  variables:        VENV=$(VENV) TORCH="$(TORCH)" PYTHON=<a Python >= 3.10> ARGS="..." JOBS=$(JOBS)'

run: $(VENV)/.installed-hf  ## install what is missing and train the quickstart on two ranks
	$(BIN)/moeweave-train experiment=quickstart $(ARGS)

test: $(VENV)/.installed-all $(VENV)/.torch-npu $(VENV)/.hydra-next  ## install what is missing and run the tests (the slow ones: ARGS="-m slow")
	$(BIN)/pytest -n $(JOBS) --maxprocesses 8 $(ARGS)

checks: lint test  ## what CI runs: lint, then the tests

lint: $(VENV)/.installed-all  ## ruff, mypy and the import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-all  ## sort imports and format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test-matrix: $(VENV)/.installed-all  ## the tests on other releases of torch and transformers; ONLY=<row> for one
	$(BIN)/python tests/matrix.py $(ONLY)

clean:  ## remove the environments, the caches and the builds
	rm -rf $(VENV) .venv-matrix build dist moeweave.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python3.14); do \
	  if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then \
	    echo "$$($$python --version) makes $(VENV)"; exec $$python -m venv $(VENV); \
	  fi; \
	done; \
	echo "No Python >= 3.10 with venv and ensurepip among: $(or $(PYTHON),python3 and python3.10 to python3.14)." >&2; \
	echo "Install one (on Debian also python3-venv), or name one: make PYTHON=/path/to/python3 ..." >&2; exit 1

$(VENV)/.torch: | $(BIN)/python
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' || \
	  { echo "installing $$TORCH"; $(INSTALL) $$TORCH; }
	@touch $@

$(VENV)/.installed-hf: setup.py $(VENV)/.torch
	@if [ -e $(VENV)/.installed-all ]; then extras=all; else extras=hf; fi; \
	  echo "installing moeweave[$$extras]"; $(INSTALL) --editable ".[$$extras]"
	@touch $@

$(VENV)/.installed-all: setup.py $(VENV)/.torch
	@echo "installing moeweave[all]"; $(INSTALL) --editable ".[all]"
	@touch $(VENV)/.installed-hf $@

# The release for the torch that is there, unpacked where no program finds it: its operators are run on meta tensors.
$(VENV)/.torch-npu: $(VENV)/.torch
	@release=$$($(BIN)/python -c 'import importlib.metadata as m; print(".".join(m.version("torch").split(".")[:2]))'); \
	  $(INSTALL) --no-deps --no-compile --target $(VENV)/torch-npu "torch-npu==$$release.*" || \
	  echo "no torch-npu for torch $$release: the tests of its operators' shapes are skipped"
	@touch $@

# The next Hydra, where only the test finds it that composes every config with it.
$(VENV)/.hydra-next: $(VENV)/.torch
	@$(INSTALL) --no-deps --target $(VENV)/hydra-next hydra-core==1.4.0rc3 omegaconf==2.4.1rc1 || \
	  echo "no hydra-core 1.4.0rc3: the test of the configs with it is skipped"
	@touch $@
