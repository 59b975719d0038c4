# Two commands do all the set-up: `make demo` and `make test`. Linux, Python 3.11 or newer as `python3`, pip; no compiler needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# An index to take torch from, e.g. TORCH_INDEX=https://download.pytorch.org/whl/cpu; empty: pip's own.
TORCH_INDEX ?=

# Processes that run tests side by side; each takes about 1.5 GB of memory.
JOBS ?= 2

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.PHONY: demo test test-full test-gpu wheel check clean help

help:
	@echo "make demo       build an engine from the bundled checkpoint and generate with it, live"
	@echo "make test       the default test suite"
	@echo "make test-full  every test, the slow matrices too"
	@echo "make test-gpu   the GPU kernels: on a GPU, or without one by Triton's interpreter"
	@echo "make wheel      dist/: a wheel with the CPU kernels compiled for several instruction sets"
	@echo "make check      format, lint, types, import rules, file length"
	@echo "make clean      remove $(VENV) and caches"

demo: $(VENV)/.ready-demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not full and not gpu"

test-full: $(VENV)/.ready-test $(VENV)/.ready-wheel $(VENV)/.ready-browser $(VENV)/.ready-arm
	$(BIN)/python -m pytest -q -n $(JOBS) -m "not gpu"

test-gpu: $(VENV)/.ready-gpu
	$(BIN)/python -m pytest -q -m gpu tests/gpu

wheel: $(VENV)/.ready-wheel
	$(BIN)/python dev/build_wheel.py dist

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/python dev/check_lengths.py

# What each needs of pyproject.toml; pip leaves alone what is installed already, so a second one only adds.
$(VENV)/.ready-demo: EXTRAS :=
$(VENV)/.ready-test: EXTRAS := [test]
$(VENV)/.ready-gpu: EXTRAS := [test,gpu]
$(VENV)/.ready-wheel: EXTRAS := [wheel]
$(VENV)/.ready-dev: EXTRAS := [dev]
$(VENV)/.ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed; $(PYTHON) is {sys.version.split()[0]}: use make PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing pinned dependencies into $(VENV) (once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".$(EXTRAS)" \
		2> >(grep -v -e "is ignored: it is" -e "is being ignored" >&2 || true)
	@touch $@

# For the tests of the HTML page: Chromium, and axe-core from npm as one file.
$(VENV)/.ready-browser: $(VENV)/.ready-test
	@command -v chromium chromium-browser google-chrome >/dev/null || apt-get install -y chromium
	@command -v npm >/dev/null || apt-get install -y npm
	@mkdir -p $(VENV)/axe-core && cd $(VENV)/axe-core && tar -xzf "$$(npm pack --silent axe-core@4.14.1)" --strip-components=1 package/axe.min.js
	@touch $@

# For the kernels as ARM's code: Debian's cross compiler, and what runs its programs here.
$(VENV)/.ready-arm: $(VENV)/.ready-test
	@command -v aarch64-linux-gnu-g++ >/dev/null || apt-get install -y g++-aarch64-linux-gnu
	@command -v qemu-aarch64 >/dev/null || apt-get install -y qemu-user
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
