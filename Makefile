# A fresh machine needs Python 3.11 or newer and make; everything else is set up in .venv by the first target.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Two workers of one thread each: what two cores can do, and no more than they can do at once.
PYTEST_WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install run test serve bench lint audit contract

help:
	@echo "make run      plan, fine-tune and profile a real model, end to end"
	@echo "make test     the whole test suite"
	@echo "make serve    keep the service running"
	@echo "make bench    the benchmarks"
	@echo "make lint     formatting, lint, types, import layers"
	@echo "make audit    known vulnerabilities of what constraints.txt pins"
	@echo "make contract thousands of requests made up from the API's description"
	@echo "make install  only set up $(VENV)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV) (the first time takes a few minutes)"
	@$(PIP) install --constraint constraints.txt --editable '.[demo,test,dev]'
	@touch $@

run: $(STAMP)
	@$(BIN)/python -m chunkplan.service.demo.run

test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

serve: $(STAMP)
	@$(BIN)/chunkplan serve

bench: $(STAMP)
	@$(PIP) install --constraint constraints.txt --editable '.[bench]'
	@$(BIN)/python -m benchmarks

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

# Strict: what could not be looked up fails, so that silence means that every package was.
audit: $(STAMP)
	@test -x $(VENV)/audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip --disable-pip-version-check --quiet install pip-audit==2.10.1; }
	@$(VENV)/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

contract: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.contract
