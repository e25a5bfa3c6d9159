# make demo, make test: each sets up all that it needs in $(VENV), and a second call reuses it.
#   TORCH=torch==2.12.0 make test   with another torch
#   PYTHON=python3.12 make test     with another Python

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
TORCH_STAMP := $(VENV)/.installed-$(shell echo '$(TORCH)' | tr -c 'A-Za-z0-9.\n' _)
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)

.PHONY: demo test lint format benchmarks clean

demo: $(VENV)/.built
	$(BIN)/python -m hyperopt_ext.demo $(ARGS)

test: $(VENV)/.built
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(VENV)/.built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# A few minutes, on a machine that does nothing else.
benchmarks: $(VENV)/.built
	$(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/height_scaling.py
	$(BIN)/python benchmarks/compile.py
	$(BIN)/python -m pytest benchmarks -o addopts= --benchmark-only

clean:
	rm -rf $(VENV) build *.egg-info hyperopt_ext/*.so

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hyperopt_ext needs Python 3.11 or newer; type: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: what follows is compiled against it and must not replace it.
$(TORCH_STAMP): | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja pybind11
	rm -rf build $(VENV)/.installed-* && touch $@

$(VENV)/.built: $(TORCH_STAMP) $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo,test,dev]'
	touch $@
