# One virtual environment, made on first use: `make demo`, `make test`. PYTHON=python3.12 make demo takes another interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait by spinning take the processor from those that work when a machine is shared.
export OMP_WAIT_POLICY ?= passive
SOURCES := pyproject.toml setup.py constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test lint format embedded bench bench-smoke clean
.DELETE_ON_ERROR:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/spectral-fast demo --out_dir demo-output --overwrite

test: $(VENV)/installed-test
	$(BIN)/pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*

format: $(VENV)/installed-test
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(BIN)/clang-format -i csrc/*

embedded: $(VENV)/installed
	$(BIN)/python -m spectral_fast.embedded.make --out_dir embedded-output

# Tables against peers and floors, results/<machine>.csv; bench-smoke runs the same code on tiny sizes.
bench: $(VENV)/installed-test
	$(BIN)/python -m benchmarks

bench-smoke: $(VENV)/installed-test
	$(BIN)/python -m benchmarks --quick --cores 2

clean:
	rm -rf build dist *.egg-info demo-output embedded-output $(VENV)
