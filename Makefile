# `make train` and `make test` set up all they need: make, python3 (3.11 or later) and a network are enough.
.DEFAULT_GOAL := help
.PHONY: peers-test study-test help setup train test test-all coverage docs peers fuzz lint type format bench study results golden clean python
.DELETE_ON_ERROR:

PYTHON ?= python3
# The uv on PATH if it works, else one of our own: system Pythons refuse plain pip installs (PEP 668).
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo .uv/bin/uv)
BIN := .venv/bin
export UV_COMPILE_BYTECODE := 1
# A proxy may have its own certificate authority, which only the system's store holds. An older uv knows only the second
# name.
export UV_SYSTEM_CERTS ?= true
export UV_NATIVE_TLS ?= $(UV_SYSTEM_CERTS)
export PATH := $(PATH):$(CURDIR)/.uv/bin

COMMA := ,
SPACE := $(subst ,, )
STUDY := $(sort $(basename $(notdir $(wildcard conf/experiment/study_*.yaml))))
STUDY_WORDS := threads=1 channels_last=true loader.workers=0 launcher.jobs=$(shell nproc 2>/dev/null || echo 1)
# What the groups of the study's Figure 1 and of its warmups have in common
RECIPE := n=32,lr.base=0.4,lr.scaling=linear,model.init=own,optimizer=sgd

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: .venv/synced ## make .venv with the locked packages; every target below does it first

train: .venv/synced ## train k=8 workers of n=32 on the digits; called again, go on or say that it is done
	$(BIN)/largebatch train k=8 n=32 resume=true

FAST := not slow and not slurm and not acceptance

test: .venv/synced ## run the tests of every module
	$(BIN)/pytest -n 2 --dist worksteal -m '$(FAST)'

test-all: .venv/synced ## run the others: processes that are killed, SLURM, a browser, acceptance
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not ($(FAST))' \
		--deselect tests/test_study.py::test_the_quick_study_finds_what_the_whole_one_found

study-test: .venv/synced ## run the quick study, and hold what it finds against the whole one: a quarter of an hour
	$(BIN)/pytest -m acceptance tests/test_study.py

coverage: .venv/synced ## measure how much of the package make test runs, in subprocesses too; all=true: with make test-all
	$(BIN)/pytest -n 2 --dist worksteal --cov --cov-report=term:skip-covered \
		$(if $(filter true,$(all)),-m '' --cov-fail-under=93,-m '$(FAST)' --cov-fail-under=85)

peers-test: .venv/synced
	$(UV) sync --frozen --group bench --python $(PYTHON)
	$(BIN)/pytest tests/offloading/test_diffusers.py tests/test_peers.py

peers: peers-test ## install other software, test with it, and print how fast ours is against it
	$(BIN)/python scripts/peers/decoding.py
	$(BIN)/python scripts/peers/offloading.py device=cpu threads=1 'bench.batches=[8]'
	$(BIN)/python scripts/peers/integers.py threads=1 'bench.batches=[16]'

fuzz: .venv/synced ## feed damaged files to the decoder, under sanitizers, and to the readers of archives, for a minute
	PYTHONPATH=tests $(BIN)/python tests/data/fuzz.py 60

docs: .venv/synced ## build the documentation in docs/_build/html; warnings and broken links are errors
	$(UV) sync --frozen --group docs --python $(PYTHON)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

lint: .venv/synced ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml

type: .venv/synced ## check types
	$(BIN)/mypy

format: .venv/synced ## put the code in style
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: .venv/synced ## measure the speed of a training step and of the loader here
	$(BIN)/largebatch bench

study: .venv/synced ## run the study of results/study, and go on where it stopped; quick=true: ten minutes of it
ifeq ($(quick),true)
	$(BIN)/largebatch train -m experiment=study_64,study_256,study_1k,study_1k_none seed=0,1,2 epochs=16 \
		bn.recompute=false $(STUDY_WORDS) hydra.sweep.dir=runs/study-quick
	$(BIN)/largebatch train -m experiment=study_1k,study_1k_none seed=3,4 epochs=16 \
		bn.recompute=false $(STUDY_WORDS) hydra.sweep.dir=runs/study-quick
	$(BIN)/largebatch table runs=runs/study-quick baseline=k=2 margin=3
else
	$(BIN)/largebatch train -m experiment=$(subst $(SPACE),$(COMMA),$(STUDY)) seed=0,1,2 $(STUDY_WORDS) \
		hydra.sweep.dir=runs/study
	$(BIN)/largebatch train -m experiment=study_64,study_128,study_256,study_512 seed=3,4 $(STUDY_WORDS) \
		hydra.sweep.dir=runs/study
	$(BIN)/largebatch table runs=runs/study baseline=k=2 margin=1
endif

results: .venv/synced ## draw figures and tables again from the committed records
	$(BIN)/largebatch plot curves runs=results/digits out=results/digits/curves.svg
	$(BIN)/largebatch plot curves 'runs=results/digits/k1-*' 'runs=results/digits/k8-n32-gradual-*' \
		'runs=results/digits/k32-n32-gradual-*' out=results/digits/curves-8-32.png
	$(BIN)/largebatch plot scaling runs=results/digits paper=true out=results/digits/scaling.png
	$(BIN)/largebatch plot rates runs=results/digits out=results/digits/rates.svg
	$(BIN)/largebatch table runs=results/digits format=markdown > results/digits/table.md
	$(BIN)/largebatch plot curves runs=results/digits-curves out=results/digits-curves/curves.svg out=results/digits-curves/curves.png
	$(BIN)/python scripts/pitfalls.py results/pitfalls
	$(BIN)/largebatch table runs=results/study/records baseline=k=2 margin=1 format=markdown > results/study/table.md
	$(BIN)/largebatch plot scaling runs=results/study/records baseline=k=2 only=$(RECIPE),warmup=gradual \
		margin=1 paper=true out=results/study/scaling.svg out=results/study/scaling.png
	$(BIN)/largebatch plot curves runs=results/study/records baseline=k=2 only=$(RECIPE),warmup=gradual \
		recomputed=true out=results/study/curves.svg out=results/study/curves.png
	$(BIN)/largebatch plot curves runs=results/study/records baseline=k=2 only=$(RECIPE),k=16,32 \
		out=results/study/warmup.svg out=results/study/warmup.png
	$(BIN)/largebatch plot probe runs=results/probe/digits runs=results/probe/fashion_mnist baseline=none \
		allow_mixed=true out=results/probe/probe.png
	$(BIN)/largebatch plot probe runs=results/probe/warmup baseline=none out=results/probe/warmup.png
	$(BIN)/largebatch probe run=results/probe/digits/k1-n32-none-s0 answer=true runs=results/digits > results/probe/digits.txt
	$(BIN)/largebatch probe run=results/probe/fashion_mnist/k1-n32-none-s0 answer=true \
		runs=results/probe/fashion_mnist-sweep > results/probe/fashion_mnist.txt
	$(BIN)/largebatch plot scaling runs=results/probe/fashion_mnist-sweep margin=1 out=results/probe/fashion_mnist-scaling.png
	$(BIN)/largebatch plot throughput paper=true out=results/predict/run-time.svg out=results/predict/run-time.png

golden: .venv/synced ## write the losses of the golden run anew; the commit must say why they moved
	$(BIN)/python scripts/golden.py

clean: ## remove what was set up and built; runs stay
	rm -rf .venv .uv dist build docs/_build docs/commands docs/results .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/synced: pyproject.toml uv.lock $(filter .uv/bin/uv,$(UV)) | python
	$(UV) sync --frozen --python $(PYTHON)
	@touch $@

.uv/bin/uv: | python
	@rm -rf .uv
	@if $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		$(PYTHON) -m venv .uv && .uv/bin/python -m pip install --quiet uv; \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
		$(PYTHON) -m pip install --quiet --target .uv uv; \
	else \
		echo "$(PYTHON) has neither venv nor pip. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	fi

python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: largebatch needs Python 3.11 or later." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("$(PYTHON) is %d.%d: largebatch needs 3.11 or later. If there is one here: make PYTHON=python3.12 ..." % v[:2])'
