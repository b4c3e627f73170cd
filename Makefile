# Every target makes .venv when it is missing or older than the project's requirements, and reuses it otherwise.
# In an environment of your own (conda, a container): make test PY=python
PY ?= .venv/bin/python
PYTHON ?= python3
PORT ?= 8888
export MPLBACKEND ?= agg
ifeq ($(origin LLAMA2_DATA),undefined)
ifneq ($(wildcard ../shared/data),)
export LLAMA2_DATA := $(abspath ../shared/data)
endif
endif

SIDE_BY_SIDE = --numprocesses auto --maxprocesses 8 --dist loadfile  # a file to a core; a notebook's cells stay in order

.DEFAULT_GOAL := help
.PHONY: help env tour test test-gpu faults export notebooks chapters stale ledger bench lab clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

env: $(if $(filter .venv/bin/python,$(PY)),.venv/installed)  ## make .venv and install what the project needs

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch .venv/installed

tour: env  ## from raw text to a small Llama 2 that writes, in minutes (chapter 00)
	$(PY) chapters/00_tour.py

test: env  ## freshness, lint, tests, and every notebook at the smoke scale
	$(PY) chapters/export.py --check
	$(PY) chapters/notebooks.py check
	$(PY) -m ruff check --no-cache chapters llama2lib tests
	LLAMA2_SCALE=smoke OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE) tests
	LLAMA2_SCALE=smoke OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE) --nbval-lax --nbval-current-env chapters

test-gpu: env  ## tests that need CUDA; they skip without
	$(PY) -m pytest tests/gpu

faults: env  ## kill training runs at 100 random moments (make test: 12)
	LLAMA2_SCALE=smoke FAULTS=50 $(PY) -m pytest -s tests/test_faults.py

export: env  ## write llama2lib/ from the chapters
	$(PY) chapters/export.py

notebooks: export  ## execute the notebooks that are stale
	$(PY) chapters/notebooks.py build

chapters: export  ## execute every notebook at the laptop scale
	$(PY) chapters/notebooks.py build 0 1

stale: env  ## list the notebooks that are older than their code
	@$(PY) chapters/notebooks.py stale

ledger: env  ## judge the claims and write figures/ledger.json (SEEDS=3,4,5 for other seeds, COMPARE=1 to report flips only)
	$(if $(SEEDS),export LLAMA2_SEEDS=$(SEEDS);) since=$$(date -u +%Y-%m-%dT%H:%M:%S) && \
	for chapter in $(sort $(wildcard chapters/[0-9]*.py)); do $(PY) $$chapter || exit 1; done && \
	$(PY) -m llama2lib.ledger $(if $(COMPARE),--compare,--since $$since)

bench: env  ## timings as ratios to transformers, TRL (installed first), lm-eval, SentencePiece, a bare loop; one table
	$(PY) -m pip install --quiet -c constraints.txt -e '.[bench]'
	$(PY) tests/benchmarks/run.py
	$(PY) tests/benchmarks/data.py
	$(PY) tests/benchmarks/pretraining.py
	$(PY) tests/benchmarks/sft.py
	$(PY) tests/benchmarks/reward.py
	$(PY) tests/benchmarks/ppo.py
	$(PY) tests/benchmarks/consolidated.py
	$(PY) tests/benchmarks/evaluate.py
	$(PY) tests/benchmarks/contamination.py
	$(PY) tests/benchmarks/table.py

lab: env  ## open the chapters in Jupyter
	$(PY) -m jupyterlab chapters --port $(PORT)

clean:  ## remove caches and trained mini models; .venv stays
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
