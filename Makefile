# Two commands are enough: `make train` and `make test`. Both set up what they need in .venv first.

# The first Python on the path that torch has wheels for, with a pip that knows --python; where that is a virtual
# environment without pip, such as .venv itself, the one it was made from. `make train PYTHON=/path/to/python3.12` to choose.
SUITS := import pip, sys; v = tuple(map(int, pip.__version__.split(".")[:2])); \
	sys.exit(not ((3, 11) <= sys.version_info < (3, 14) and v >= (22, 3)))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	for q in $$p $$($$p -c 'import sys; print(sys._base_executable)' 2>/dev/null); do \
	$$q -c '$(SUITS)' 2>/dev/null && echo $$q && break 2; done; done)
BIN := .venv/bin

# OpenMP's threads that wait awake keep the cores from the other process's: asleep, the tests took 24 minutes on two cores
# of a Zen 4, instead of 39 (14 since).
TWO_AT_A_TIME := OMP_WAIT_POLICY=passive

.PHONY: train test faults check gpu-report setup dev loaders postgres clean
.NOTPARALLEL: # one pip at a time in .venv

# The data are looked for, or downloaded, before the five minutes begin.
train: setup
	@$(BIN)/fastcifar data info >/dev/null || true
	$(BIN)/fastcifar train --budget 5min --fallback-dataset shapes10

test: dev
	@$(MAKE) --no-print-directory --keep-going loaders || echo "make test: going on; the tests of a loader that is not installed are skipped."
	@$(MAKE) --no-print-directory postgres || echo "make test: going on; the test of a sweep on PostgreSQL is skipped."
	$(TWO_AT_A_TIME) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 2 --dist loadfile -m "not clock and not faults"
	$(BIN)/python -m pytest -m clock --reruns 2 # a neighbour on the machine can slow a run as much as a fault does

# Would the kernels' verification find a fault? Four minutes of two cores of a Zen 4.
faults: dev
	$(BIN)/python -m pytest -m faults

check: dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright --pythonpath $(BIN)/python

# All that is worth measuring on a GPU; the same again goes on with what did not fit. GPU_REPORT="--peers DIR" adds flags.
gpu-report: setup .venv/gpu
	$(BIN)/python bench/gpu.py $(GPU_REPORT)

# What reads the driver's energy counter; without it energy is "not measured".
.venv/gpu: .venv/ready
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[gpu]' && touch $@ || echo "make gpu-report: going on without it."

setup: .venv/ready

# The extras for parquet files, sweeps and trackers, and what tests need.
dev: .venv/dev

.venv/dev: .venv/ready
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[dev]'
	touch $@

# `--without-pip` and an outside pip: works where Debian's python3-venv is missing, and the same everywhere else.
.venv/ready: pyproject.toml
	@test "$$(uname)" = Linux || { echo "fastcifar runs on Linux: its kernels need triton, which is for Linux alone."; exit 1; }
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with pip 22.3 or newer found. Install one, or: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable .
	@echo "One step of training, which compiles the loops for this CPU (20 s), so that no budget has to pay for it:"
	-$(BIN)/fastcifar train --dataset shapes10 --steps 1 --device cpu --out "$$(mktemp -d)/run"
	touch $@

# What `--loader dali` and `--loader ffcv` need on top; nothing else does.
loaders: .venv/dali .venv/ffcv

.venv/dali: .venv/ready
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[dali]'
	$(BIN)/python -c 'import nvidia.dali.fn'
	touch $@

# FFCV comes as source only. If the headers that it includes are missing, root gets them here, others are told how to.
FFCV_PACKAGES := g++ pkg-config python3-dev libopencv-dev libturbojpeg0-dev
.venv/ffcv: .venv/ready
	@include=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	{ printf '#include <%s>\n' Python.h opencv2/opencv.hpp turbojpeg.h | \
		g++ -x c++ -fsyntax-only -I "$$include" $$(pkg-config --cflags opencv4 libturbojpeg) -; } 2>/dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "apt-get install $(FFCV_PACKAGES)" && \
		apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends $(FFCV_PACKAGES) >/dev/null; } || \
	{ echo "--loader ffcv, and nothing else, needs packages that are not installed. Debian, Ubuntu:"; \
		echo "    sudo apt-get install $(FFCV_PACKAGES)"; \
		echo "Fedora: sudo dnf install gcc-c++ python3-devel 'pkgconfig(opencv4)' 'pkgconfig(libturbojpeg)'"; exit 1; }
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --editable '.[ffcv]'
	$(BIN)/python -c 'import ffcv'
	touch $@

# The programs of the server that one test of `fastcifar sweep` starts for itself; nothing else needs them.
postgres:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || \
	{ test "$$(id -u)" = 0 && command -v apt-get >/dev/null && echo "apt-get install postgresql" && \
		apt-get -qq update && \
		DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends postgresql >/dev/null; } || \
	{ echo "One test needs PostgreSQL's server. Debian, Ubuntu: sudo apt-get install postgresql"; exit 1; }

clean:
	rm -rf .venv
