# Everything below sets itself up: a .venv in the checkout, pinned dependencies, an MPI from PyPI where there is none.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2
TESTERS ?= 2
# Two ranks must start on any machine: as root in a container, and with fewer cores than ranks.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
export PRTE_MCA_rmaps_default_mapping_policy := :oversubscribe
export PRTE_MCA_hwloc_default_binding_policy := none
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo test lint types test-variants test-machines test-slurm test-kills test-interruptions test-threads test-compile case3 bench-inference bench-metrics bench-transport bench-quality clean

help:
	@echo "make demo    the main job on a phantom, 3 to 8 minutes on two idle cores once set up; ends with results/demo/report.html"
	@echo "make test    the tests"
	@echo "make case3   the main job on the real fuel-cell anode (HPCRES_DATA), small network"
	@echo "make bench-inference   how fast painting is on this machine, an hour"
	@echo "make bench-metrics     how fast counting is on one core, 15 minutes"
	@echo "make bench-transport   how fast transport is solved, beside TauFactor (HPCRES_DATA), ten minutes"
	@echo "make bench-quality     the quality bars, three seeds each, six hours"
	@echo "make lint types test-variants test-machines test-slurm test-kills test-interruptions test-threads test-compile clean"

install: .venv/installed

# PyPI's torch for Linux brings gigabytes of CUDA. Unless pip is set to a mirror of your own, uv picks PyTorch's
# build for this machine: the CPU one, or the one for its GPU driver.
.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
	  rm -rf .venv; \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv \
	    && $(PYTHON) -m venv .venv; } || { \
	  echo "make: $(PYTHON) cannot make a virtual environment; run: apt-get install python3-venv" >&2; exit 1; }
	@if $(BIN)/pip config list | grep -qE "index-url|find-links"; then \
	  $(BIN)/pip install --progress-bar off -q -c constraints.txt torch; \
	else \
	  $(BIN)/pip install --progress-bar off -q uv \
	  && $(BIN)/uv pip install -q --python $(BIN)/python --torch-backend auto -c constraints.txt torch; \
	fi
	@$(BIN)/pip install --progress-bar off -q -c constraints.txt -e .
	@$(BIN)/python -c "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI" 2>/dev/null && command -v mpirun >/dev/null \
	|| $(BIN)/pip install --progress-bar off -q -c constraints.txt -e ".[mpi]"
	@touch $@

.venv/tested: .venv/installed
	@$(BIN)/pip install --progress-bar off -q -c constraints.txt -e ".[test]"
	@touch $@

demo: install
	hpcres phantom configs/demo.yaml --overwrite
	hpcres train configs/demo.yaml --overwrite
	mpirun -n $(RANKS) hpcres infer configs/demo.yaml --tiles 2x2x2 --overwrite
	hpcres metrics configs/demo.yaml
	hpcres tortuosity configs/demo.yaml --phase pore --phase active --direction z --crop 0:160,0:160,0:160 --overwrite
	hpcres report configs/demo.yaml
	python bench/demo.py configs/demo.yaml
	@echo "open results/demo/report.html"

case3: install
	hpcres train configs/case3-sofc-small.yaml --overwrite
	mpirun -n $(RANKS) hpcres infer configs/case3-sofc-small.yaml --overwrite
	hpcres metrics configs/case3-sofc-small.yaml
	hpcres tortuosity configs/case3-sofc-small.yaml --overwrite
	hpcres report configs/case3-sofc-small.yaml

test: .venv/tested
	pytest tests -m "not slow and not variant and not slurm and not machines" -n $(TESTERS) --dist worksteal

# Further cases of tests that `make test` has, one to two minutes.
test-variants: .venv/tested
	pytest tests -m variant -n $(TESTERS)

# All stages on a CPU held to AVX2, and from a read-only installation.
test-machines: .venv/tested
	pytest tests -m machines

# Sixty jobs killed at random moments and resumed, ten minutes.
test-kills: .venv/tested
	pytest tests/test_kills.py -s

# Signals at 50 random moments of every stage, an hour on two idle cores; prints the table of docs/interruption.md.
# INTERRUPTIONS=5 sends fewer.
test-interruptions: .venv/tested
	pytest tests/test_signals.py -m slow -s

# Training while another process has one of two cores; needs an otherwise idle machine.
test-threads: .venv/tested
	pytest tests/test_threads.py -m slow

# training.compile with one and with two processes, a minute; needs a C++ compiler.
test-compile: .venv/tested
	pytest tests/test_compile.py

# Needs a running Slurm (SLURM_CONF) whose nodes see this folder, and HPCRES_DATA.
test-slurm: .venv/tested
	pytest tests -m slurm

# An hour on two idle cores; the tables go into docs/inference.md.
bench-inference: .venv/tested
	python bench/inference.py
	python bench/inference.py --sizes 512 1024 1920
	python bench/inference.py --forms

# The table goes into docs/metrics.md.
bench-metrics: .venv/tested
	python bench/metrics.py
	python bench/metrics.py --sizes 512 --phases 8
	python bench/metrics.py --sizes 1920 --taufactor 0

# Ten minutes on two idle cores and 16 GiB; needs HPCRES_DATA.
bench-transport: .venv/tested
	python bench/transport.py
	python bench/transport.py --grow 128 256 512

# Hours on two idle cores; sofc and separator need HPCRES_DATA. The tables go into docs/training.md.
bench-quality: .venv/tested
	python bench/quality.py sofc --minutes 3 --seeds 0 1 2
	python bench/quality.py sofc --recipe configs/long.yaml --minutes 30 --seeds 0 1 2 --set training.reach_faces=true --set training.crop_voxels=0
	python bench/quality.py phantom --recipe configs/long.yaml --scale 2 4 --minutes 15 --seeds 0 1 2 --set training.pattern_pixels=6
	python bench/quality.py phantom --recipe configs/long-white.yaml --scale 8 --minutes 15 --seeds 0 1 2
	python bench/quality.py separator --recipe configs/long-white.yaml --minutes 20 --seeds 0 1 2 --set training.lattice_weight=40 --set training.pattern_weight=960 --set training.voxel_weight=40

lint: .venv/tested
	ruff check .
	ruff format --check .

types: .venv/tested
	mypy

clean:
	rm -rf .venv results
