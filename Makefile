# The first of these that is here; figures in this project were measured with 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3.10 || command -v python3)
WORLD ?= pinned
FAST ?=
REAL ?=
JOBS ?= auto
INSTALL ?=
SEEDS ?= 17 18 19 20 21
DATA ?=
STAGE ?= a

ifeq ($(WORLD),pinned)
VENV := .venv
LOCK := requirements.lock
else ifeq ($(WORLD),current)
VENV := .venv-current
LOCK := requirements-current.txt
# llm-foundry's metadata asks for torch 2.7.
OVERRIDES := torch==2.14.1 torchvision==0.29.2
else
$(error WORLD=$(WORLD) is unknown; pinned (requirements.lock) or current (requirements-current.txt))
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# uv, which is faster, if it is there. Both check every file against the lock's hashes.
PIP := $(if $(shell command -v uv 2>/dev/null),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet)

export HINT = If a package could not be built: sentencepiece (Python 3.13) and zstd (Python 3.12 and 3.13 on aarch64) have no wheel and need cmake and a C++ compiler. Install these, or take Python 3.11: docs/how-to/install.md

export TOKENIZERS_PARALLELISM = false
# One process per core, or JOBS, each on one thread: tests/conftest.py sets OMP_NUM_THREADS.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help install same-python quickstart experiment-real test test-all test-slow test-gpu coverage browser check docs package bench lock matrix audit clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "  make %-16s %s\n", $$1, $$2}'

install: same-python $(STAMP) ## make .venv from requirements.lock, checking hashes; PYTHON=... picks a Python from 3.10 to 3.13; WORLD=current: torch 2.14

# An environment keeps its Python, so another one that is asked for must not be passed over.
same-python:
ifneq ($(origin PYTHON),file)
	@[ ! -x $(BIN)/python ] || [ "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" ] || { \
		echo "$(VENV) has $$($(BIN)/python -V), not $$($(PYTHON) -V): rm -r $(VENV), or leave out PYTHON" >&2; exit 1; }
endif

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit("Python 3.10 to 3.13 is needed, not " + sys.version.split()[0] + "; make install PYTHON=/path/to/python3.11")'
	[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes -r $(LOCK) || { echo "$$HINT" >&2; exit 1; }
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

quickstart: install ## a base model, four methods compared, a report; FAST=1: one learning rate, one seed; REAL=1: SmolLM2-135M itself, two methods
	$(BIN)/python -m experiments.quickstart $(if $(REAL),--real,--seeds $(SEEDS) $(if $(FAST),--fast))

experiment-real: install ## SmolLM2-135M-Instruct (Q4_1 weights) on GSM8K, hours on a CPU: DATA=FOLDER with the benchmarks, or DATA=hub; STAGE=a
	$(BIN)/python experiments/smollm2-135m-gsm8k/run.py "$(DATA)" --stage $(STAGE)

test: install browser ## the tests to run before a commit: no GPU, no network, under ten minutes on two cores; JOBS=2: on two processes, not one per core
	$(PYTEST)

test-all: install browser ## also complete processes, all methods, every bad input: before a merge
	$(PYTEST) -m "not gpu and not slow"

test-slow: install ## soaks, fuzzing, dozens of kills, large models: an hour or more
	$(PYTEST) --dist loadgroup -m "slow and not gpu"

test-gpu: install ## what only a CUDA device can show, one test after another
	$(BIN)/python -m pytest -m gpu

coverage: install browser ## the lines that `make test-all` runs, without those of subprocesses
	$(PYTEST) -m "not gpu and not slow" --cov=foundry_ext --cov-report=term:skip-covered

browser: ## headless Chromium for the tests of pages, which are skipped without it
	@for name in chromium chromium-browser google-chrome; do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian's chromium for the tests of pages"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	fi || true; \
	command -v chromium >/dev/null || echo "no Chromium: the tests that open a page will be skipped"

check: install docs ## ruff, pyright and the documentation's links, in the pinned world
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

docs: install ## the documentation as a site in build/site/, built without the network; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# An isolated build would download setuptools; the locked one is of the versions that pyproject.toml asks for.
package: install ## dist/: the source archive and the wheel, built without the network and checked
	rm -rf dist
	@$(BIN)/python -m build --no-isolation > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	$(BIN)/twine check --strict dist/*

bench: install ## the CPU rows of benchmarks/RESULTS.md: some minutes on two idle cores
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/step_time.py
	$(BIN)/python benchmarks/data.py collation

lock: install ## resolve pyproject.toml into requirements.lock, for all Pythons and platforms, moving as little as it can; WORLD=current: requirements-current.txt
	printf '%s\n' $(OVERRIDES) > $(VENV)/overrides.txt
	sed '/^#/!d' $(LOCK) > $(VENV)/header.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate --no-header \
		--extra dev --extra docs --overrides $(VENV)/overrides.txt --output-file $(LOCK) pyproject.toml
	cat $(VENV)/header.txt $(LOCK) > $(VENV)/lock.txt && mv $(VENV)/lock.txt $(LOCK)

matrix: install ## what of the lock each Python and platform can install; INSTALL=1: also installs and tests each Python that is here, needs 15 GB
	$(BIN)/python .ci/matrix.py $(if $(INSTALL),--install --jobs $(JOBS))

audit: ## known vulnerabilities in the packages of requirements.lock; needs the network for pip-audit and its database
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet pip-audit==2.10.1
	.venv-audit/bin/pip-audit --strict --requirement requirements.lock --disable-pip --require-hashes

clean: ## remove caches and builds; keeps .venv and outputs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
