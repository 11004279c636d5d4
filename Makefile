# `make` alone lists the targets.  Any Python from 3.10 on will do: make PYTHON=python3.12 setup
# Arguments are passed on: make train ARGS="--preset tiny", make test ARGS="-k resumed"

PYTHON ?= python3
ARGS =
BIN := .venv/bin
RUFF := ruff==0.17.5

.DEFAULT_GOAL := help
.PHONY: help setup train test notebooks experiments bench accuracy lint clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: .venv/setup.stamp  ## create .venv and install requirements.txt

train: .venv/setup.stamp  ## train on the bundled MNIST; ARGS="--preset tiny" takes ten seconds
	$(BIN)/python train.py $(ARGS)

test: .venv/setup.stamp  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

notebooks: .venv/setup.stamp  ## execute every notebook and check it
	$(BIN)/python -m pytest tests/test_notebooks.py $(ARGS)

experiments: .venv/setup.stamp  ## train five seeds of the default preset (fifteen minutes)
	$(BIN)/python experiments/mnist.py --seeds 5 $(ARGS)

bench: .venv/bench.stamp  ## measure speed and memory against dense NumPy and PyTorch
	$(BIN)/python benchmarks/speed.py $(ARGS)

accuracy: .venv/bench.stamp  ## measure rounding errors against a float64 reference
	$(BIN)/python benchmarks/accuracy.py $(ARGS)

lint: .venv/lint.stamp  ## check style and format with ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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

.venv/lint.stamp: Makefile | .venv/bin/python
	$(BIN)/python -m pip install $(RUFF)
	touch $@
