# `make` alone lists the targets.  Any Python from 3.10 on will do: make PYTHON=python3.12 setup
# Arguments are passed on: make train ARGS="--preset tiny", make test ARGS="-k resumed"

PYTHON ?= python3
ARGS =
CUDA ?= 12
BIN := .venv/bin
RUFF := ruff==0.17.5

# A .venv that was left half-made, or whose interpreter is gone, is made anew.
$(if $(wildcard .venv),$(shell .venv/bin/python -m pip --version > /dev/null 2>&1 || \
	.venv/bin/python -m ensurepip > /dev/null 2>&1 || rm -rf .venv))

.DEFAULT_GOAL := help
.PHONY: help setup train test notebooks experiments figures bench accuracy gpu card lint class-kit clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/setup.stamp  ## create .venv and install requirements.txt

train: .venv/setup.stamp  ## train on the bundled MNIST; ARGS="--preset tiny" takes ten seconds
	$(BIN)/python train.py $(ARGS)

test: .venv/setup.stamp  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

notebooks: .venv/setup.stamp  ## execute every notebook and check it
	$(BIN)/python -m pytest tests/test_notebooks.py $(ARGS)

experiments: .venv/setup.stamp  ## run every experiment behind RESULTS.md (some hours)
	$(BIN)/python experiments/propagation.py
	$(BIN)/python experiments/mnist.py
	$(BIN)/python experiments/mnist.py --short
	$(BIN)/python experiments/comparison.py
	$(BIN)/python experiments/recall.py
	$(BIN)/python experiments/canvas.py
	$(BIN)/python experiments/depth.py
	$(BIN)/python experiments/relatives.py
	$(BIN)/python experiments/length.py
	$(BIN)/python experiments/length.py --long
	$(BIN)/python experiments/ablation.py
	$(BIN)/python experiments/depth.py --long
	$(BIN)/python experiments/comparison.py --fashion

figures: .venv/setup.stamp  ## draw every figure of RESULTS.md from the committed results
	for name in mnist propagation comparison recall canvas depth relatives length ablation; do $(BIN)/python experiments/$$name.py --draw || exit 1; done
	$(BIN)/python experiments/comparison.py --fashion --draw
	for name in accuracy speed; do $(BIN)/python benchmarks/$$name.py --draw || exit 1; done

bench: .venv/bench.stamp .venv/mpi.stamp  ## measure speed and memory beside PyTorch, each part of fast/, and a step on two ranks
	$(BIN)/python benchmarks/speed.py $(ARGS)
	$(BIN)/python benchmarks/parts.py
	$(BIN)/python benchmarks/ranks.py

accuracy: .venv/setup.stamp  ## measure rounding errors against a float64 reference
	$(BIN)/python benchmarks/accuracy.py $(ARGS)

gpu: card .venv/cuda$(CUDA).stamp  ## on an NVIDIA card: test, compare with the CPU, measure; CUDA=13 for CuPy for CUDA 13
	$(BIN)/python -W ignore benchmarks/gpu.py --check
	$(BIN)/python -m pytest -k "cupy or parity" $(ARGS)
	$(BIN)/python -W ignore benchmarks/gpu.py

card:
	@nvidia-smi > /dev/null || { echo 'make gpu: nvidia-smi finds no NVIDIA card or driver'; exit 2; }

lint: .venv/lint.stamp  ## check style and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

class-kit: .venv/setup.stamp  ## pack class-kit/: this commit and its wheels, for a room without network
	rm -rf class-kit
	$(BIN)/python -m pip download --only-binary :all: -d class-kit/wheels -r requirements.txt $(ARGS)
	git archive --prefix=osa/ -o class-kit/repository.zip HEAD
	printf '%s\n' "$$INSTALL" > class-kit/INSTALL.txt
	$(BIN)/python -c 'import platform, sys; print("The wheels are for Python %d.%d on" % sys.version_info[:2], platform.system(), platform.machine() + ".")' >> class-kit/INSTALL.txt
	git log -1 --format='The repository is commit %h of %cs.' >> class-kit/INSTALL.txt
	du -sh class-kit

define INSTALL
Orthogonal Self-Attention from scratch, for a room without network.  In this folder:

    python3 -m zipfile -e repository.zip .
    cd osa
    python3 -m venv .venv
    .venv/bin/python -m pip install --no-index --find-links ../wheels -r requirements.txt
    .venv/bin/python train.py --preset tiny       # ten seconds; MNIST is included
    .venv/bin/python -m jupyter lab notebooks     # then open exercises/00_tour.ipynb

On Windows write .venv\Scripts for .venv/bin, and python for python3.  CuPy is not included.

endef
export INSTALL

clean:  ## remove caches; .venv and runs/ stay
	rm -rf .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is newer than what it was installed from, so nothing is installed twice.

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("this is Python %d.%d; 3.10 or newer is needed: make PYTHON=python3.12 setup" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv

.venv/setup.stamp: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/bench.stamp: requirements-bench.txt .venv/setup.stamp
	$(BIN)/python -m pip install -r requirements-bench.txt
	touch $@

.venv/cuda$(CUDA).stamp: requirements-cuda$(CUDA).txt .venv/bench.stamp
	$(BIN)/python -m pip install -r requirements-cuda$(CUDA).txt
	touch $@

.venv/mpi.stamp: requirements-mpi.txt .venv/setup.stamp
	$(BIN)/python -m pip install -r requirements-mpi.txt
	touch $@

.venv/lint.stamp: Makefile | .venv/bin/python
	$(BIN)/python -m pip install $(RUFF)
	touch $@
