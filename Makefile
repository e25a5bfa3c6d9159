# make demo, make test: each sets up all that it needs in $(VENV), and a second call reuses it.
#   TORCH=torch==2.12.0 make test   with another torch
#   PYTHON=python3.12 make test     with another Python
#   JOBS=8 make test                with so many processes; one core each is best

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
JOBS ?= 2
OUT ?= benchmarks/results

BIN := $(VENV)/bin
TORCH_STAMP := $(VENV)/.installed-$(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.\n' _)
SOURCES := setup.py pyproject.toml hyperopt_ext/_build.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/* examples/*/*/*.h python_tests/*.cpp python_tests/*.h)

.PHONY: demo test lint format benchmarks gpu gpu-build gpu-test gpu-benchmark gpu-sanitizers clean

demo: $(VENV)/.built
	$(BIN)/python -m hyperopt_ext.demo $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Twenty minutes, on a machine that does nothing else.
benchmarks: $(VENV)/.built
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/height_scaling.py
	$(BIN)/python benchmarks/recorder.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only

# On a GPU machine, with the Python that has its torch, and no network: build, tests of the kernels, benchmark, sanitizers.
# `make -k gpu` goes on with the others where one fails.
gpu: gpu-test gpu-benchmark gpu-sanitizers

gpu-build:
	FORCE_CUDA=1 $(PYTHON) setup.py build_ext --inplace

gpu-test: gpu-build
	PYTHONPATH=. $(PYTHON) -m pytest -m cuda python_tests/test_device.py python_tests/test_compile.py $(ARGS)

gpu-benchmark: gpu-build
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py --out $(OUT)

# Without torch's cache of memory, in which a wrong access would not show; calls that torch makes to see whether they fail
# are no errors. racecheck knows shared memory alone.
gpu-sanitizers: gpu-build
	failed=; for tool in "memcheck --report-api-errors no" racecheck synccheck; do \
	  PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) benchmarks/gpu_step.py || failed=1; \
	done; test -z "$$failed"

clean:
	rm -rf $(VENV) build *.egg-info hyperopt_ext/*.so

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hyperopt_ext needs Python 3.11 or newer; type: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: what follows is compiled against it and must not replace it.
$(TORCH_STAMP): | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja
	rm -rf build $(VENV)/.installed-* && touch $@

$(VENV)/.built: $(TORCH_STAMP) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo,test,dev]'
	touch $@
