# `make train` and `make test` each build the environment if need be; nothing else has to be installed first
# but Python 3.12 (see .python-version).

VENV := .venv
PYTHON := $(VENV)/bin/python
CONFIG ?= nsa_video
ARGS ?=
WANTED := $(shell cat .python-version)
WORKERS ?= auto

.DEFAULT_GOAL := help
.PHONY: help env train test test-slow test-tpu-aot test-gpu-aot parity lint format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env: $(VENV)/.complete ## build the environment (.venv) from requirements.txt

# The stamp is written last: a build that was interrupted starts afresh.
$(VENV)/.complete: requirements.txt .python-version
	@python$(WANTED) -c '' 2>/dev/null || { \
	  echo "Python $(WANTED) not found: install it (e.g. 'uv python install $(WANTED)', 'pyenv install $(WANTED)' or" \
	       "'apt-get install python$(WANTED)-venv') so that 'python$(WANTED)' runs." >&2; exit 1; }
	rm -rf $(VENV)
	python$(WANTED) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	@touch $@

train: env ## train CONFIG (default nsa_video) on the embedded clips; ARGS="--workdir=runs/short --set train.steps=100"
	$(PYTHON) -m experiments.train --config=$(CONFIG) $(ARGS)

test: env ## the CPU test suite
	$(PYTHON) -m pytest -n $(WORKERS) -m "not slow and not tpu_aot and not gpu_aot" $(ARGS)

test-slow: env ## minutes-long cases
	$(PYTHON) -m pytest -m slow $(ARGS)

.venv-tpu/.complete: requirements-tpu.txt requirements.txt .python-version
	rm -rf $(@D)
	python$(WANTED) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-tpu.txt
	@touch $@

test-tpu-aot: .venv-tpu/.complete ## every TPU kernel compiled for v5e, v5p and v6e; needs no TPU
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest -n $(WORKERS) -m tpu_aot tests/tpu $(ARGS)

.venv-gpu-aot/.complete: requirements-gpu-aot.txt requirements.txt .python-version
	rm -rf $(@D)
	python$(WANTED) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements-gpu-aot.txt
	@touch $@

test-gpu-aot: .venv-gpu-aot/.complete ## the train step compiled for two H100; needs no GPU
	.venv-gpu-aot/bin/python -m pytest -m gpu_aot tests/training $(ARGS)

# transformers needs torch, whose CPU build for the library's Python may be missing: environments of their own.
.venv-parity-%/.complete: tests/parity/requirements-%.txt
	@python3.11 -c '' 2>/dev/null || { echo "Python 3.11 not found: make parity runs transformers with it" >&2; exit 1; }
	rm -rf $(@D)
	python3.11 -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

parity: env .venv-parity-4.49.0/.complete .venv-parity-5.23.0/.complete ## compare with transformers, both ways, afresh
	$(PYTHON) tests/parity/live.py .venv-parity-4.49.0/bin/python .venv-parity-5.23.0/bin/python

lint: env ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: env ## ruff, in place
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the environment and caches (runs/ and datasets/ stay)
	rm -rf $(VENV) .venv-tpu .venv-gpu-aot .venv-parity-* .pytest_cache .ruff_cache .hypothesis
