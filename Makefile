# GNU Make 3.81 and later. Settings: see .env.example; PY=python3.13 chooses the Python.
SHELL := /bin/bash
INSTALL := bash tests/harness/install.sh
COUNT_LINES := grep -cvE '^ *(\#|$$)'
COMPILE = UV_CUSTOM_COMPILE_COMMAND='make lock' tests/.venv/bin/uv pip compile --quiet --universal --upgrade \
  --generate-hashes --python-version 3.12
export PY
export LC_ALL := C
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run verify diff test lint lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

run: .env ## Prepare the agent, and start a stand-in for tier 01 unless a tier 01 is running
	@bash tests/harness/start.sh

verify: run ## Run the agent, and check what the servers accept and reject
	@bash verify.sh

diff: ## Show what authentication adds to the same client without it
	@total=$$($(COUNT_LINES) agent.py); \
	  auth=$$(sed -n '/# authplane:begin/,/# authplane:end/p' agent.py | grep -v ' import ' | $(COUNT_LINES)); \
	  sdk=$$(sed -n 's/^dependencies = \["\(authplane-sdk\)\([^"]*\).*/\1 \2/p' pyproject.toml); \
	  echo "Auth-specific code: $$auth lines · Total example: $$total lines · SDK: $$sdk"
	@sed '/# authplane:begin/,/# authplane:end/d' agent.py | diff -U3 - agent.py | tail -n +3

test: ## Run all tests
	@$(INSTALL) .venv agent
	@$(INSTALL) tests/.venv tier01
	@$(INSTALL) tests/.venv test
	@tests/.venv/bin/python -m pytest

lint: ## Check style, types and shell
	@$(INSTALL) tests/.venv tier01
	@$(INSTALL) tests/.venv test
	@$(INSTALL) tests/.venv lint
	@tests/.venv/bin/ruff check
	@tests/.venv/bin/ruff format --check
	@tests/.venv/bin/pyright
	@if [ -e tests/.venv/bin/shellcheck ]; then \
	  tests/.venv/bin/shellcheck -x verify.sh tests/harness/start.sh tests/harness/install.sh .ci/*; fi

lock: ## Pin the newest versions that pyproject.toml allows
	@$(INSTALL) tests/.venv lint
	@$(COMPILE) --output-file tests/requirements/agent.txt pyproject.toml --group platforms
	@$(COMPILE) --output-file tests/requirements/tier01.txt --group tier01 -c tests/requirements/agent.txt
	@$(COMPILE) --output-file tests/requirements/test.txt --group test -c tests/requirements/tier01.txt
	@$(COMPILE) --output-file tests/requirements/lint.txt --group lint -c tests/requirements/tier01.txt -c tests/requirements/test.txt

clean: ## Stop and remove what `make run` started and created
	@python=tests/.venv/bin/python; [ -x $$python ] || python=$${PY:-python3}; \
	  if [ -e .stand-in.log ]; then $$python -I tests/tier01/background.py stop; fi
	@# Compose must read neither .env nor the file that COMPOSE_FILE names
	@image=$$(docker compose --file docker-compose.yml --env-file /dev/null config --images 2>/dev/null); \
	  if docker image inspect "$$image" >/dev/null 2>&1; then docker image rm "$$image"; fi
	@rm -rf .venv tests/.venv .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@if cmp -s .env .env.example; then rm .env; fi

.env:
	@# not cp, which fails if another make creates the file at the same moment
	@umask 077 && cat .env.example >.env
