# `make` lists the targets. PYTHON=python3.12 chooses the interpreter of .venv; pip's own PIP_* variables are respected.
SHELL := bash
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
LOG := $(VENV)/install.log

.PHONY: help demo test gpu-test slurm-test debian-test soak lint wheel clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1	\2/p' $(MAKEFILE_LIST)

demo: $(READY)  ## train, score and compare three small backbones on real digits (10 minutes on 2 cores)
	$(VENV)/bin/lamabench sweep run demo

# Tests start two hundred processes of Python. They read the bytecode that the first one wrote, even where the
# environment forbids to write any.
test slurm-test: export PYTHONDONTWRITEBYTECODE =

# One worker more than cores, because some tests wait for processes.
test: WORKERS = $(shell n=$$(nproc); echo $$((n < 4 ? n + 1 : 4)))
test: $(READY)  ## run the tests (but those that need a GPU, SLURM or programs of Debian)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n $(WORKERS) --dist worksteal

# A thread each: what they compile and compute on the CPU would otherwise fight for the cores.
gpu-test: $(READY)  ## run the tests that need a GPU (NVIDIA's, of compute capability 8.0 or newer)
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=2 $(VENV)/bin/pytest -m gpu -n auto --maxprocesses 14 --dist worksteal

slurm-test: $(READY)  ## run the tests that need SLURM, on a node of their own (5 to 12 minutes; root, Debian or Ubuntu)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m "slurm and not soak" tests/slurm

debian-test: $(READY)  ## run the tests that need programs of Debian: LaTeX, a browser (root installs their packages)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m debian tests/reports

soak: $(READY)  ## run 200 short runs on such a node while some are killed, and the long cases of other tests (half an hour)
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -m soak tests

lint: $(READY)  ## check style, format and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/basedpyright

wheel: $(READY)  ## build dist/lamabench-*.whl
	rm -rf build
	$(VENV)/bin/python -m build --wheel

clean:  ## remove .venv and everything built; runs/ and out/ stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The last step writes the stamp. An environment without it was cut short (pip cannot tell a half-unpacked package from
# a whole one) and is made anew. .venv/namespace shows type checkers what setuptools' import hook shows to Python.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { echo \
	  "lamabench needs Python 3.10 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -n 1). Name another: make PYTHON=python3.12 …" >&2; exit 1; }
	@if [ -e $@ ]; then rm $@; else echo "Making $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); fi
	@echo "Installing into $(VENV); the large downloads are listed, everything is in $(LOG)"
	@set -o pipefail; $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -e '.[dev]' -c constraints.txt 2>&1 | tee $(LOG) \
	  | sed -nuE -e 's/^ *(Downloading|Using cached) ([^ ]+) \(([0-9]{2,}\.[0-9] [MG]B)\).*/  \2 \3/p' \
	    -e 's/^Installing collected packages: .*/  unpacking (a minute or two)/p' \
	  || { tail -n 20 $(LOG) >&2; echo "Installation failed; the whole log is $(LOG)" >&2; exit 1; }
	@$(VENV)/bin/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >>$(LOG) 2>&1 || true  # as pip would, on all cores
	@mkdir -p $(VENV)/namespace && ln -sfn ../.. $(VENV)/namespace/lamabench
	@touch $@
