# Two commands are enough: `make train` and `make test`. Both set up what they need in .venv first.

# The first Python on the path that torch has wheels for; `make train PYTHON=/path/to/python3.12` to choose.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin

.PHONY: train test check setup clean

train: setup
	$(BIN)/fastcifar train --budget 5min --fallback-dataset shapes10

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

setup: .venv/ready

# `--without-pip` and an outside pip: works where Debian's python3-venv is missing, and the same everywhere else.
.venv/ready: pyproject.toml
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 found. Install one, or: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv
