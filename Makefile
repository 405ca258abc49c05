# make quickstart     installs into .venv, then trains a small mixture-of-experts policy with DAPO on two CPU processes
# make quickstart-vl  the same with a policy that sees, on pictures
# make test           every check that needs no accelerator
# make acceptance     every check that waits for a device: one table of values and bars
# make unit           the unit tests alone
# make install        the environment alone
# make lint           formatter, linter, type checker
# make clean          removes .venv, outputs and caches

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
SEED ?= 0
# Asked for torch's CPU build only when the configured package index has none; name a mirror here.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export TORCH_CPU_INDEX

RUN := .venv/bin/python -m
NO_DEVICE := -m "not gpu and not npu"
export OMP_NUM_THREADS := 1
# Many images set this; every process would then compile again all that it imports, for 12 s of a core.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help quickstart quickstart-vl install test acceptance unit lint clean dev

help:
	@sed -n 's/^# make //p' Makefile

quickstart:
	@$(PYTHON) -m launch.quickstart --seed $(SEED)

quickstart-vl:
	@$(PYTHON) -m launch.quickstart --recipe quickstart_vl --seed $(SEED)

install:
	@$(PYTHON) -m launch.install

dev:
	@$(PYTHON) -m launch.install --dev

lint: dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

# Two files at a time: what a file starts, its tests share. Ranks and engines wait for one another half of the time.
TWO_FILES := --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test: lint unit
	$(RUN) pytest $(NO_DEVICE) $(TWO_FILES) tests/e2e tests/distributed

# In the environment that is active, since .venv is for CPUs: make acceptance ARGS="--devices 4 --only run"
acceptance:
	@python -m tools.acceptance $(ARGS)

unit: dev
	$(RUN) pytest $(NO_DEVICE) $(TWO_FILES) tests/unit tests/npu

clean:
	rm -rf .venv outputs build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
