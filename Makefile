# Every target works as the first command on a fresh machine with Python 3.10 or newer, a C++ compiler and a
# package index: what it needs is installed into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py
CXX_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help build demo test bench lint format clean

help:
	@echo "make demo    verify, bench, train on real text and swap into another model (6 minutes on 2 cores)"
	@echo "make test    the test suite"
	@echo "make build   .venv with the package installed in place; repeat after changing C++"
	@echo "make bench   microbenchmarks of every usable backend and torch's own, as a table and JSON"
	@echo "make lint    ruff, mypy and clang-format;  make format applies what they can fix"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed (make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

# What the build itself needs comes first: the package is then built against this very torch.
$(VENV)/.tools: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch setuptools wheel packaging cmake ninja pybind11 numpy
	@touch $@

$(VENV)/.built: $(VENV)/.tools $(NATIVE)
	PERCEIVER_KERNELS_BUILD=require PERCEIVER_KERNELS_EMULATED_SET=1 \
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/perceiver-kernels demo --output demo-output

test: build
	$(BIN)/python -m pytest

bench: build
	$(BIN)/perceiver-kernels bench --json bench.json

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf $(VENV) build demo-output bench.json
