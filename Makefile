# `make` or `make help` lists the targets; everything runs in .venv, which `make install` creates.
.DEFAULT_GOAL := help
.PHONY: help install train test test-slow lint format golden bench reliability data docs figures ci clean

BIN := .venv/bin

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(BIN)/icl  ## Make .venv and install icl with its test extras

$(BIN)/icl: setup.py
	python3 -m venv .venv
	$(BIN)/pip install -e '.[dev]'
	touch $(BIN)/icl

train: install  ## Train the quickstart preset (about two minutes)
	$(BIN)/icl train

test: install  ## Run the default tests (four to six minutes on two cores)
	$(BIN)/pytest

test-slow: install  ## Run the slow tests too
	$(BIN)/pytest -m 'slow or not slow'

lint: install  ## Check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## Format the code, and fix what the linter can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

golden: install  ## Record the golden losses again (say why in the commit message)
	$(BIN)/python tests/golden/record.py

bench: install  ## Compare the speed with other programs (about three minutes; see benchmarks/)
	$(BIN)/python -m benchmarks

reliability: install  ## Try damaged files, servers that refuse requests, and bad inputs (docs/reliability.md)
	$(BIN)/python -m tests.reliability.fuzz --mutations 3000
	$(BIN)/python -m tests.reliability.refusals
	$(BIN)/python -m tests.reliability.bad_inputs

SIZE ?= small
data: install  ## Compute the shipped data again, or continue after an interruption (SIZE=full: the published sizes)
	$(BIN)/python -m tools.data $(SIZE)
	$(BIN)/python -m tools.data.docs

docs: install  ## Build the documentation as a site in build/site, offline
	$(BIN)/mkdocs build

figures: install  ## Draw every figure from the shipped data
	$(BIN)/python notebooks/execute.py

ci:  ## Run the whole CI in a fresh copy (about twenty minutes)
	.ci/run

clean:  ## Remove caches and build files
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -exec rm -rf {} +
