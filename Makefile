# Everything runs from .venv, which is created on first use. Stamp files in it record what is installed, so a second
# run installs nothing; the targets can be called in any order from a fresh clone.

# torch is installed first and by itself: choose another build with, for example,
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
TORCH ?= torch==2.13.0
# The first of these that is there and new enough; override with `make PYTHON=/path/to/python3.x ...`.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1 && { echo $$p; break; }; done)
# Benchmark peers that ask for a torchvision they do not need: see the `bench` extra in setup.cfg.
PEERS := laplace-torch==0.3 curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 nngeometry==0.4
# Models that ask for it, too: see the `models` extra.
MODELS := timm segmentation-models-pytorch

# Test processes; each uses one thread. `worksteal` gives each a half of the tests in order, so that what the tests of
# one subject share is computed once, and lets both end together.
WORKERS ?= 2

# What is compiled of the tests is kept: without it each process compiles all of them anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
# pip may replace anything but torch: the constraint pins the build that is installed.
INSTALL := $(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt
CODE := setup.cfg pyproject.toml

.DELETE_ON_ERROR:
.PHONY: help demo test lint format pytest nightly mutate test-matrix dist bench models bridges site clean distclean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | awk -F': +' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: $(VENV)/.installed-experiments ## Fit, tune and predict on a small problem, with pictures (OUT=folder)
	$(BIN)/python -m laplace_kf demo $(if $(OUT),--out $(OUT))

# Side by side, as the linters keep one processor busy for most of a minute.
test: $(VENV)/.installed-test ## Linters, types, import ranks and all tests
	$(MAKE) --no-print-directory --jobs=2 lint pytest

lint: $(VENV)/.installed-test ## Linters, types and import ranks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.installed-test ## Let ruff mend and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pytest: $(VENV)/.installed-test ## All tests (ARGS="-k name" to choose); real data from $LAPLACE_KF_DATA
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

nightly: $(VENV)/.installed-test ## The tests that take long (processes killed a hundred times), then all with every combination
	$(BIN)/python -m pytest -m nightly $(ARGS)
	$(BIN)/python -m pytest --triples -n $(WORKERS) --dist worksteal $(ARGS)

mutate: $(VENV)/.installed-test ## One-line mutants against the tests next to them (ARGS="--minutes 25", then "--table")
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutation $(ARGS)

test-matrix: ## A quick part of the tests under the oldest and newest Python and torch (ARGS="3.10" to choose)
	$(PYTHON) tests/packaging/matrix.py $(ARGS)

# Apart from .venv: the wheel goes into a new environment that has torch alone, and is run from an empty folder.
dist: ## Build sdist and wheel, install the wheel next to torch alone, run the example and the demo
	$(PYTHON) tests/packaging/dist.py $(TORCH)

bench: $(VENV)/.installed-bench ## Side-by-side benchmarks against peers
	$(BIN)/python -m benchmarks $(ARGS)

models: $(VENV)/.installed-models ## docs/models.md: third-party models, fitted and checked (ARGS="vision --no-costs" to choose)
	$(BIN)/python -m benchmarks.models $(if $(ARGS),$(ARGS),--out docs/models.md)

bridges: $(VENV)/.installed-bridges ## Tests of the bridges against the newest releases of the other libraries
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/bridges tests/continual/test_lightning.py -m "" $(ARGS)

site: $(VENV)/.installed-docs ## The documentation as build/site/index.html; warnings are errors
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet --builder html --doctree-dir build/doctrees docs build/site
	@echo "build/site/index.html"

clean: ## Remove caches and build products, keep .venv and results
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and .venvs too
	rm -rf $(VENV) .venvs

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'No Python >= 3.10 found; name one: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo '$(PYTHON) does not run or is older than 3.10; name another: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# `pip install` leaves a torch that fits alone. The pin carries the local version (+cpu, +cu130) too.
$(VENV)/constraints.txt: | $(BIN)/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $@

$(VENV)/.installed-experiments: $(VENV)/constraints.txt $(CODE)
	$(INSTALL) --editable '.[experiments]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/constraints.txt $(CODE) Makefile
	$(INSTALL) --editable '.[experiments,test]'
	$(INSTALL) --no-deps timm
	@touch $@ $(VENV)/.installed-experiments

$(VENV)/.installed-bench: $(VENV)/constraints.txt $(CODE) Makefile
	$(INSTALL) --editable '.[experiments,bench]'
	$(INSTALL) --no-deps $(PEERS)
	@touch $@ $(VENV)/.installed-experiments

$(VENV)/.installed-models: $(VENV)/constraints.txt $(CODE) Makefile
	$(INSTALL) --editable '.[experiments,models]'
	$(INSTALL) --no-deps $(MODELS)
	@touch $@ $(VENV)/.installed-experiments

$(VENV)/.installed-bridges: $(VENV)/constraints.txt $(CODE) Makefile
	$(INSTALL) --upgrade --editable '.[experiments,test,bridges]'
	@touch $@ $(VENV)/.installed-experiments

$(VENV)/.installed-docs: $(VENV)/constraints.txt $(CODE) Makefile
	$(INSTALL) --editable '.[experiments,docs]'
	@touch $@ $(VENV)/.installed-experiments
