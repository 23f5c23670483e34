# Thin targets over pip and uv; `make help` lists them. An environment is built once: its stamp files are older
# than the constraints or pyproject.toml only when something has to be installed again.

# The interpreter of stacks A and C.
PYTHON ?= python3.11
# What `make quickstart` trains: the built-in example, or your own Axolotl YAML.
CONFIG ?= $(BUILTIN_CONFIG)
BUILTIN_CONFIG := example_configs/quickstart.yaml
# More arguments for pytest: make test PYTEST_ARGS='-k settings'
PYTEST_ARGS ?=
# Processes that run tests side by side; each may hold a training run of its own (about 3 GB of memory).
WORKERS ?= 2

VENV ?= .venv
VENV_B ?= .venv-b
VENV_C ?= .venv-c
# uv inspects a pyenv shim but not the interpreters behind it, so an installed 3.12 is named to it.
PYTHON_B ?= $(lastword 3.12 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.12*/bin/python))
UV ?= $(or $(shell uv --version >/dev/null 2>&1 && command -v uv),$(VENV)/bin/uv)

# -qq hides pip's progress and its harmless warnings about absent local folders, but no error.
PIP_A := $(VENV)/bin/python -m pip install -qq -c constraints/stack-a.txt
PIP_C := $(VENV_C)/bin/python -m pip install -qq -c constraints/stack-c.txt
# Compiled on installing, as pip does: where PYTHONDONTWRITEBYTECODE is set, every start would compile it all again.
UV_B := $(UV) pip install -q --compile-bytecode --python $(VENV_B)/bin/python -c constraints/stack-b.txt

# `axolotl train` starts the `accelerate` that PATH finds, so an environment's commands need its bin folder there.
in_venv = PATH="$(abspath $(1))/bin:$$PATH"
# Without internet Axolotl's usage reports can keep a finished run from exiting.
untracked := AXOLOTL_DO_NOT_TRACK=1 DO_NOT_TRACK=1
# Neither a test nor making the example's inputs needs the network, and neither should report usage.
offline := $(untracked) HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=disabled
run_tests = mkdir -p build && $(call in_venv,$(1)) $(offline) UV="$(abspath $(UV))" python -m pytest -n $(WORKERS) --dist worksteal
# On the further stacks: real training runs, and whatever depends on the installed versions.
on_every_stack := -m 'integration or stack'

export TOKENIZERS_PARALLELISM := false
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help quickstart test stack-b stack-c test-b test-c lint build bench clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

quickstart: $(VENV)/.pack ## Set up, make a tiny model and data, train, report; or train yours: CONFIG=your.yaml
ifeq ($(CONFIG),$(BUILTIN_CONFIG))
	@$(call in_venv,$(VENV)) $(offline) python example_configs/make_tiny_inputs.py build/quickstart
endif
	@$(call in_venv,$(VENV)) $(untracked) axolotl train $(CONFIG)

test: $(VENV)/.dev ## Set up stack A (Axolotl 0.19, Python 3.11) and run every test on it.
	@$(call run_tests,$(VENV)) $(PYTEST_ARGS)

test-b: stack-b ## Run the integration tests on stack B.
	@$(call run_tests,$(VENV_B)) $(on_every_stack) $(PYTEST_ARGS)

test-c: stack-c ## Run the integration tests on stack C.
	@$(call run_tests,$(VENV_C)) $(on_every_stack) $(PYTEST_ARGS)

stack-b: $(VENV_B)/.dev ## Set up stack B (Axolotl 0.21, Python 3.12) with uv.
stack-c: $(VENV_C)/.dev ## Set up stack C (TRL alone, newest) with pip.

lint: $(VENV)/.dev ## Check style (ruff) and types (mypy).
	@status=0; for check in 'ruff check .' 'ruff format --check .' mypy; do \
	  $(VENV)/bin/$$check || status=1; done; exit $$status

build: $(VENV)/.dev ## Build wheel and sdist into dist/ and check them.
	@rm -rf dist && $(VENV)/bin/python -m build --no-isolation
	@$(VENV)/bin/twine check --strict dist/*

bench: $(VENV)/.dev ## Run every benchmark.
	@set -e; for f in benchmarks/*.py; do [ -e "$$f" ] || continue; echo "$$f"; $(call in_venv,$(VENV)) python "$$f"; done

clean: ## Remove the environments and everything built.
	rm -rf $(VENV) $(VENV_B) $(VENV_C) build dist .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.stack: constraints/stack-a.txt
	@echo "Installing stack A into $(VENV) (about 5 minutes the first time) …"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_A) torch axolotl
	@touch $@

$(VENV)/.pack: $(VENV)/.stack pyproject.toml
	@echo "Installing axolotl-dpo-ext into $(VENV) …"
	@$(PIP_A) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.pack
	@echo "Installing the development tools into $(VENV) …"
	@$(PIP_A) -e '.[dev]'
	@touch $@

$(VENV)/bin/uv:
	@echo "Installing uv into $(VENV) …"
	@$(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install -qq uv

$(VENV_B)/.dev: constraints/stack-b.txt pyproject.toml | $(UV)
	@echo "Installing stack B into $(VENV_B) (about 3 minutes and 7 GB the first time) …"
	@$(UV) venv -q --allow-existing --python $(PYTHON_B) $(VENV_B)
	@$(UV_B) axolotl -e '.[dev]'
	@touch $@

$(VENV_C)/.dev: constraints/stack-c.txt pyproject.toml
	@echo "Installing stack C into $(VENV_C) (about 2 minutes the first time) …"
	@$(PYTHON) -m venv $(VENV_C)
	@$(PIP_C) torch trl peft
	@$(PIP_C) -e '.[dev]'
	@touch $@
