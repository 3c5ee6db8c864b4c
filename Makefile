# `make help` lists what there is. Every target sets up first, which costs a second when nothing has changed.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
# More threads than cores make the small models of the tests and the quickstart slower, not faster.
export OMP_NUM_THREADS ?= 1
# Watching stays at home: neither Ray nor vLLM nor Hugging Face is told of a run.
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

ARGS ?=
# Each has a Ray cluster of its own: more than two need more than 24 GiB.
WORKERS ?= 2
FAMILY ?= decoder
RUN_DIR ?= runs/quickstart$(if $(filter-out decoder,$(FAMILY)),-$(FAMILY))

.PHONY: help setup quickstart test check check-chart deploy-tools format docs site bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo
	@echo '  make quickstart FAMILY=encoder-decoder     the other family; RUN_DIR=... another place'
	@echo '  ARGS="..." is passed on, e.g. make quickstart ARGS="--steps 5", make test ARGS="-k stream"'

setup:  ## .venv with everything that requirements/cpu.lock names
	@bash scripts/setup.sh

quickstart: setup  ## data -> small policy -> fine-tuning -> RL -> evaluation, on this machine
	$(BIN)/attune quickstart --family $(FAMILY) --run-dir $(RUN_DIR) $(ARGS)

test: setup deploy-tools  ## the test suite, a process a core
	@bash scripts/system_packages.sh chromium
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup check-chart site  ## style, types, who may import whom, the chart, and the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

check-chart: setup deploy-tools  ## the image's build file and the Helm chart, without an engine or a cluster
	$(BIN)/python scripts/check_chart.py

deploy-tools: setup
	@$(BIN)/python scripts/deploy_tools.py

format: setup  ## write the style that `make check` asks for
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## the pages and dashboards that are written from the code
	$(BIN)/python scripts/configuration_reference.py
	$(BIN)/python scripts/openapi.py
	$(BIN)/python scripts/http_api.py
	$(BIN)/python scripts/metrics_reference.py
	$(BIN)/python scripts/grafana.py

site: setup  ## the documentation as a site in build/site; a link that leads nowhere is an error
	$(BIN)/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet docs build/site

bench: setup  ## every benchmark, quick; the whole of one: python -m benchmarks.NAME
	@names=$$(find benchmarks -maxdepth 1 -name '[a-z]*.py' ! -name common.py ! -name http_load.py -printf '%f\n' | sed 's/\.py$$//' | sort); \
	for name in $$names; do $(BIN)/python -m benchmarks.$$name --quick $(ARGS); done

clean:  ## caches of the tools (not .venv, not runs/)
	rm -rf .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
