# Everything a person types. Details are in scripts/ and playbooks/.
SHELL := /bin/bash
.DEFAULT_GOAL := help
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: help lab pipeline status test test-full drill check-fast lint unit bench-cpu kernels audit dashboards docs down clean

help: ## Show every target
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

lab: ## From nothing to a completion: nodes, platform, images, a trained model, served (TRAIN=again trains anew)
	@scripts/bootstrap control
	@scripts/lab

pipeline: ## In the lab, as SLURM jobs: pretrain, extend, SFT, DPO, evaluate, judge, promote; then serve
	@scripts/bootstrap control
	@scripts/pipeline

status: ## Show the lab on one screen: nodes, queue, served model, alerts, addresses
	@scripts/bootstrap control
	@scripts/status

test: ## Run the quick suite: lint, unit, one lab, the main paths and the attacks end to end
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite quick

test-full: ## Run everything else: molecule, drills, long waits, vLLM, kernels for all targets; writes a dated report
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite full

drill: ## Break the lab and verify that it recovers: nodes, services, files, clocks, power; writes docs/drills.md
	@scripts/bootstrap test
	@scripts/bootstrap workload
	@scripts/suite drill

check-fast: lint unit ## Lint and unit tests: the inner loop

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

kernels: ## Compile every GPU kernel for every target (no GPU needed) and report what each takes
	@scripts/bootstrap workload
	@.venv-workload/bin/ictx kernels build

audit: ## Compare the locked packages with known vulnerabilities, offline
	@scripts/audit

dashboards: ## Write the dashboards' JSON, and draw every panel with the lab's data into docs/images/dashboards
	@scripts/bootstrap test
	@.venv/bin/python scripts/dashboards write
	@.venv/bin/python scripts/dashboards preview

docs: ## Build the documentation site into build/site: static files, broken links are errors
	@scripts/bootstrap test
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict --clean

down: ## Remove the lab and everything it started; caches stay
	@scripts/bootstrap control
	@scripts/down

clean: ## Remove the virtual environment and what tools leave in the checkout; caches and the lab stay
	rm -rf .venv .ansible .pytest_cache .mypy_cache .ruff_cache dist build workload/dist workload/build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
