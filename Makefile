# Every target makes what it needs: a virtual environment in .venv and, in it, tested versions of the packages.
# Stamp files make a second call instant; a changed pyproject.toml or constraints.txt installs again.

PYTHON ?= python3
VENV ?= .venv
SLUG ?= entropy-mechanism
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
VERL_VENV ?= .venv-verl
VERL_PIP := $(VERL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-verl.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-verl check format bench reproduce docs pages clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.rl ## Watch a small language model lose its entropy, and a remedy keep it; opens no network
	$(BIN)/uncollapse demo

test: export OMP_NUM_THREADS = 1
test: export MKL_NUM_THREADS = 1
test: export TOKENIZERS_PARALLELISM = false
test: $(VENV)/.dev ## Run the tests (WORKERS=2 at a time), all but the slow ones
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: export OMP_NUM_THREADS = 1
test-all: $(VENV)/.dev ## Run every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS)

test-verl: export OMP_NUM_THREADS = 1
test-verl: $(VERL_VENV)/.verl ## Run the tests of the verl integration in an environment of their own (SLOW=1: with a real Ray too)
	$(VERL_VENV)/bin/python -m pytest -n $(WORKERS) $(if $(SLOW),,-m "not slow") tests/integrations/verl

check: $(VENV)/.dev ## Lint, format, types, import contracts, freshness of the generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/generate.py --check

format: $(VENV)/.dev ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.rl ## Measure against named peers and write benchmarks/results.json
	$(BIN)/python -m benchmarks

reproduce: $(VENV)/.science ## Measure the claims of one paper and write results/SLUG.json (SLUG=entropy-mechanism)
	$(BIN)/uncollapse reproduce $(SLUG)

pages: $(VENV)/.dev ## Write the generated pages of the docs and the tables of the README
	$(BIN)/python docs/generate.py

docs: $(VENV)/.docs ## Build the documentation into site/
	$(BIN)/python docs/generate.py --check
	$(BIN)/zensical build --clean --strict

clean: ## Remove the virtual environment, caches and built files (runs/ and results/ stay)
	rm -rf $(VENV) $(VERL_VENV) site build dist .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests docs benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "uncollapse needs Python 3.10 or newer and '$(PYTHON)' is not; name one: make PYTHON=python3.11 ..." >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "no virtual environment could be made in $(VENV); on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@touch $@

# torch alone first: an open range could otherwise pull several GB of GPU libraries where a CPU build is offered.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	@touch $@

$(VENV)/.rl: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e '.[rl]'
	@touch $@

$(VENV)/.science: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e '.[rl,science]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e '.[rl,dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml constraints.txt
	$(PIP) -e '.[rl,docs]'
	@touch $@

$(VERL_VENV)/.verl: pyproject.toml constraints-verl.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
	  echo "verl is tested with Python 3.11 and 3.12 and '$(PYTHON)' is neither; name one: make PYTHON=python3.11 test-verl" >&2; exit 2; }
	@test -x $(VERL_VENV)/bin/python || $(PYTHON) -m venv $(VERL_VENV)
	$(VERL_PIP) torch==$$(sed -n 's/^torch==//p' constraints-verl.txt)
	$(VERL_PIP) -e '.[verl]' beartype hypothesis pytest pytest-xdist
	@touch $@
