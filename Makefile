# One environment in .venv, from nothing but Python 3.11, make and a C++ compiler.
PYTHON ?= python3.11
TORCH ?= torch==2.13.0
OUT ?= .benchmarks/gpu
BIN := .venv/bin
SOURCES := $(wildcard $(addprefix csrc/,cpu/*.cpp cpu/*.h cuda/*.cu cuda/*.h include/neuroflow/*.h include/neuroflow/*.cuh))
# CUDA for tests without a GPU.
SHIM := $(wildcard tests/cuda_on_host/*.* tests/cuda_on_host/cuda/*)
# Releases of transformers between which towers were rebuilt, the newest last; `make compat COMPAT=5.5.0` tests one.
COMPAT ?= 4.57.6 5.5.0 5.17.0 5.23.0
STRUCTURAL := families tubelets architectures streams graphs precision rewrites reference_vectors policies vit_tiny baselines adapters llm

KERNELS := $(addprefix tests/test_,triton.py cuda.py cuda_on_host.py timm.py attend_rows.py)

.PHONY: demo test test-kernels test-others test-slow gpu compat $(COMPAT:%=compat-%) lint format bench clean

.venv/installed: pyproject.toml setup.py $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade setuptools wheel
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[video,bench,test]'
	touch $@

# timm for its tests, out of the way of everything else: it needs torchvision, which changes what transformers does.
.venv/timm: | .venv/installed
	$(BIN)/pip install --quiet --no-deps --target $@ timm torchvision==0.28.0

demo: .venv/installed
	$(BIN)/neuroflow demo --out-dir demo

# Compiling and emulating kernels takes one core for as long as everything else takes the other.
test: .venv/installed .venv/timm lint
	$(MAKE) --jobs=2 --output-sync=target test-kernels test-others

test-kernels:
	$(BIN)/python -m pytest -m 'not slow' $(KERNELS)

test-others:
	$(BIN)/python -m pytest -m 'not slow' $(KERNELS:%=--ignore=%)

test-slow: .venv/installed .venv/timm
	$(BIN)/python -m pytest

.venv/compat/%/installed: | .venv/installed
	$(BIN)/pip install --quiet --upgrade --target $(@D) transformers==$*
	touch $@

compat: $(COMPAT:%=compat-%)

$(COMPAT:%=compat-%): compat-%: .venv/compat/%/installed
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -c \
	  'import transformers as t; print("transformers", t.__version__); assert t.__version__ == "$*"'
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -m pytest -rs $(STRUCTURAL:%=tests/test_%.py)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(SHIM)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(SHIM)

bench: .venv/installed
	$(BIN)/python -m bench.run --out .benchmarks/run.json
	$(BIN)/python -m bench.plot .benchmarks/run.json
	$(BIN)/python -m bench.compare bench/results/run-cpu.json .benchmarks/run.json

# On a machine with a GPU, in the Python that has its torch: `make gpu PYTHON=python3`.
gpu:
	PYTHONPATH="$(CURDIR):$(CURDIR)/python:$$PYTHONPATH" $(PYTHON) -m bench.gpu --out $(OUT)

clean:
	rm -rf .venv build dist demo *.egg-info neuroflow_kernels/*.so
