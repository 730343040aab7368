# The commands for users. The implementation is in scripts/ and playbooks/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help lab pipeline status test test-full drill check-fast lint unit bench-cpu kernels audit dashboards docs down clean

help: ## Show every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: ## Create the lab and serve a model: nodes, platform, images, training, serving (TRAIN=again retrains)
	@scripts/bootstrap control
	@scripts/lab

pipeline: ## In the lab, as SLURM jobs: pretrain, extend, SFT, DPO, evaluate, judge, promote; then serve
	@scripts/bootstrap control
	@scripts/pipeline

status: ## Show the lab on one screen: nodes, queue, served model, alerts, addresses
	@scripts/bootstrap control
	@scripts/status

test: ## Run the quick suite: lint, unit tests, one lab, end-to-end tests of the main paths and the attacks
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite quick

test-full: ## Run all other tests: molecule, drills, slow tests, vLLM, kernels for all targets; writes a dated report
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite full

drill: ## Inject faults into the lab and verify recovery: nodes, services, files, clocks, power; writes docs/drills.md
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite drill

check-fast: lint unit ## Run lint and the unit tests

lint: ## Run every linter
	@scripts/bootstrap test
	@scripts/lint

unit: ## Run the unit tests of the platform and of the workload
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite quick --only unit

bench-cpu: ## Run every benchmark that needs no GPU
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@for file in workload/benchmarks/*.py; do .venv-workload/bin/python "$$file" || exit; done

kernels: ## Compile every GPU kernel for every target (no GPU needed) and report each one's resources
	@scripts/bootstrap workload
	@.venv-workload/bin/ictx kernels build

audit: ## Check the locked packages for known vulnerabilities, offline
	@scripts/audit

dashboards: ## Write the dashboards' JSON and render every panel with the lab's data to docs/images/dashboards
	@scripts/bootstrap test
	@.venv/bin/python scripts/dashboards write
	@.venv/bin/python scripts/dashboards preview

docs: ## Build the documentation site in build/site (static files); fails on broken links
	@scripts/bootstrap test
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict --clean

down: ## Remove the lab and everything it started; keeps caches
	@scripts/bootstrap control
	@scripts/down

clean: ## Remove the virtual environment and build outputs from the checkout; keeps caches and the lab
	rm -rf .venv .ansible .pytest_cache .mypy_cache .ruff_cache dist build workload/dist workload/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
