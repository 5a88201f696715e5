SHELL := /bin/sh
ARGS ?=
KILLS ?= 21
SEED ?= 1

# What needs no engine that only some machines have.
ANYWHERE := not docker and not kubernetes and not gpu
# What needs nothing started beside it.
FAST := not server and not worker and not sandbox and not s3 and not postgres and not chain and not clients and $(ANYWHERE) and not slow

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-chain up test test-docker test-kubernetes lint check format bench chaos clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install everything needed into .bootstrap/ and .venv/; the other targets do it by themselves
	@scripts/bootstrap

demo: setup ## Start the service, run a real two-stage job through it, show what comes out
	@exec .venv/bin/c2d demo $(ARGS)

demo-chain: setup ## The same through the Provider's dialect, ordered and paid for on a local chain
	@exec .venv/bin/c2d demo-chain $(ARGS)

up: setup ## Start the service and keep it running until Ctrl-C
	@exec .venv/bin/c2d up $(ARGS)

test: setup ## Run every test but those that need Docker or Kubernetes, two files at a time; more options in ARGS
	@exec .venv/bin/pytest -n 2 --dist loadfile -m "$(ANYWHERE)" $(ARGS)

test-docker: setup ## Run the tests that need Docker, on an engine and a registry of their own; as root
	@scripts/install-docker
	@exec .venv/bin/pytest -m docker $(ARGS)

test-kubernetes: setup ## Run the tests that need Kubernetes, on a cluster of their own; as root. Builds it at first
	@status=0; scripts/install-kubernetes || status=$$?; \
	if [ $$status = 75 ]; then echo "SKIPPED: every test that needs Kubernetes; see above" >&2; exit 0; fi; \
	[ $$status = 0 ] || exit $$status; \
	exec .venv/bin/pytest -m kubernetes $(ARGS)

lint: setup ## Format, lint, types, layers
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports

check: lint ## The same, and the tests that start nothing
	.venv/bin/pytest -m "$(FAST)" $(ARGS)

format: setup ## Format the code and sort the imports
	.venv/bin/ruff check --select I --fix
	.venv/bin/ruff format

bench: setup ## Run the benchmarks, or one of them: ARGS=inputs, ARGS=fetch, ARGS=jobs
	@exec .venv/bin/python -m bench $(ARGS)

chaos: setup ## Kill one part of the service after another and see what becomes of the jobs; KILLS, SEED, more in ARGS
	@exec .venv/bin/python -m chaos --kills $(KILLS) --seed $(SEED) $(ARGS)

clean: ## Remove what setup and tests have made; what the service keeps in .c2d/ stays
	rm -rf .bootstrap .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist \
		chain/node_modules clients/node_modules clients/.venv
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
