# Every target makes what it needs: `make demo` and `make test` are all that a fresh clone asks for.

.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(STAMP) ## make .venv and install loramux with its development tools into it

# Keyed on pyproject.toml and the image's lock: the code itself is installed editable. With uv, what the image has is
# what is tested: the lock's versions.
LOCK := deploy/image/requirements.txt
$(STAMP): pyproject.toml $(LOCK)
	@if [ ! -x $(BIN)/python ]; then \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
			echo "setup: loramux needs Python 3.11 or newer and '$(PYTHON)' is not: make setup PYTHON=python3.12" >&2; \
			exit 1; }; \
		echo "setup: making $(VENV) with $$($(PYTHON) --version)"; \
		if command -v uv >/dev/null; then uv venv --quiet --seed --python "$$(command -v $(PYTHON))" $(VENV); \
		else $(PYTHON) -m venv $(VENV) || { \
			echo "setup: '$(PYTHON) -m venv' failed: install its venv module (Debian: apt-get install python3-venv)" >&2; \
			rm -rf $(VENV); exit 1; }; \
		fi; \
	fi
	@echo "setup: installing loramux and its development tools into $(VENV): once some minutes, 6 GB with PyTorch"
	@if command -v uv >/dev/null; then uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint $(LOCK) --editable '.[dev]'; \
	elif $(BIN)/python -m pip install --quiet uv; then $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --constraint $(LOCK) --editable '.[dev]'; \
	else $(BIN)/python -m pip install --quiet --editable '.[dev]'; fi
	@touch $(STAMP)
	@echo "setup: done"

.PHONY: demo
demo: setup ## one prompt to every demo adapter, through a Kafka protocol: no network, no GPU
	@$(BIN)/loramux demo

# On a laptop the tests of a service that is missing are skipped, with the reason; in CI they fail. Each of the two
# processes has servers of its own. Files are not taken by their number of tests: the longest have few.
.PHONY: test
test: setup ## run the tests, on a real Kafka and a real S3 server
	@$(PYTHON) tests/services/install.py || [ "$$CI" != true ]
	@PYTHONPATH=tests $(BIN)/python -m services.kafka_classes
	$(BIN)/python -m pytest -q -n 2 --dist loadfile tests/unit tests/kernels
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore=tests/unit --ignore=tests/kernels

.PHONY: lint
lint: setup ## ruff, ruff format, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: typecheck
typecheck: setup ## mypy alone
	$(BIN)/mypy

.PHONY: lock
lock: ## write the image's lock anew (newer versions: make lock UPGRADE=--upgrade), and its licences
	$(PYTHON) deploy/image/lock.py $(UPGRADE)
	@touch pyproject.toml
	@$(MAKE) setup
	$(BIN)/python deploy/image/licences.py

.PHONY: image
image: ## the steps of deploy/Dockerfile in a temporary folder, without Docker
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && deploy/image/install.sh all "$$folder/venv"

.PHONY: validate-deploy
validate-deploy: setup ## render and check what is in deploy/: Kubernetes, compose, lock, settings, runbook
	@$(PYTHON) tests/services/install.py --only kustomize
	$(BIN)/python -m pytest -q -m "not kafka" tests/deploy

.PHONY: audit
audit: setup ## known vulnerabilities in what the image has; needs a network that reaches an advisory service
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --disable-pip --require-hashes --requirement $(LOCK)

.PHONY: services
services: ## fetch what the tests run: Apache Kafka (Java 17+, Maven), an S3 server and kustomize (Go)
	@$(PYTHON) tests/services/install.py

.PHONY: kafka
kafka: setup ## run Apache Kafka on 127.0.0.1:9092 until Ctrl-C
	@$(PYTHON) tests/services/install.py --only kafka
	@PYTHONPATH=tests $(BIN)/python -m services.kafka

.PHONY: bench
bench: setup ## the worker beside Hugging Face PEFT, through Apache Kafka
	@$(PYTHON) tests/services/install.py --only kafka
	PYTHONPATH=tests $(BIN)/python tests/benchmarks/bench_worker.py

# Two runs with two seeds, one of them on three brokers, and the zombie by itself: about twenty minutes on two cores.
.PHONY: chaos
chaos: setup ## kill, stop, hang and fill a running system, and look whether each request is answered exactly once
	@$(PYTHON) tests/services/install.py
	PYTHONPATH=tests $(BIN)/python -m chaos --seed 1
	PYTHONPATH=tests $(BIN)/python -m chaos --seed 2 --brokers 3
	PYTHONPATH=tests $(BIN)/python -m chaos --seed 3 --zombie 20

.PHONY: clean
clean: ## remove .venv, builds and caches; the fetched servers stay in .services
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
