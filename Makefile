# Each target sets up what it needs: on a fresh machine with Python 3.11 or newer, `make ablation` is enough.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

# Threads that wait must sleep: spinning ones make a two-thread loop many times slower when a core is shared.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: help ablation smoke test test-fast lint ui clean

help:
	@echo "make ablation   run sweeps/ablation.yaml and write results/ablation/report.md (continues where it was stopped)"
	@echo "make smoke      the same path in about a minute"
	@echo "make ui         look at the results in MLflow, on this machine only"
	@echo "make test       run all tests, a quarter of an hour on two cores"
	@echo "make test-fast  those that start no Ray, server or browser and kill nothing: a few minutes, for while you work"
	@echo "make lint       check the style      make clean  remove caches, keep results"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (once; torch is large)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

ablation smoke: $(STAMP)
	$(PY) -m harness.run sweeps/$@.yaml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not processes and not slow"

lint: $(STAMP)
	$(PY) -m ruff check .

ui: $(STAMP)
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m harness.tracking --ui

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find harness methods tests -name __pycache__ -type d -prune -exec rm -rf {} +
