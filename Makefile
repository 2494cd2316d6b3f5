# The front door: setup, demo, test, lint, check, bench, docs, paper. Each target brings its own environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
RUN ?= runs/quickstart
# one thread a worker: two workers on two cores are faster than one with two threads
TEST_WORKERS ?= 2

.PHONY: setup demo test lint check bench docs paper clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "preln needs Python 3.11 or newer: make PYTHON=python3.12 setup" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/preln run experiments/quickstart.yaml --out $(RUN)
	$(BIN)/preln report $(RUN) --out $(RUN)/report

test: setup
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/basedpyright --level error

# registry, written proofs and tests agree, and every claim is decided
check: setup
	$(BIN)/preln verify --check

bench: setup
	$(BIN)/python benchmarks/sigma.py
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/jacobians.py

# the reference of the public names, from their docstrings, and the pages' own examples, links and commands
docs: setup
	$(BIN)/python docs/build_api.py build/api
	$(BIN)/python -m pytest tests/docs

TEX = --no-install-recommends texlive-latex-recommended texlive-fonts-recommended lmodern latexmk
# numbers, tables and figures from committed results, the checks of the text, the PDF, the checks of its log
paper: setup
	@command -v latexmk >/dev/null || \
	  { echo "latexmk is missing: on Debian, apt-get install $(TEX)" >&2; exit 2; }
	@$(BIN)/python -m preln.report.paper generate paper
	@$(BIN)/python -m preln.report.paper check paper/main.tex
	@cd paper && max_print_line=1000 latexmk -gg -pdf -interaction=nonstopmode -halt-on-error -silent main.tex >main.build \
	  || { grep -A3 '^!' main.log >&2; exit 1; }
	@$(BIN)/python -m preln.report.paper log paper/main.log
	@echo paper/main.pdf

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache
