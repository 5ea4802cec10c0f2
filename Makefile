# GNU Make 3.81 and later. Settings: see .env.example; PY=python3.13 chooses the Python, UV= installs with pip, not uv.
SHELL := /bin/bash
UV := $(shell command -v uv 2>/dev/null)
COUNT := grep -cvE '^ *(\#|$$)'
PIN = UV_CUSTOM_COMPILE_COMMAND='make lock' tests/.venv/bin/uv pip compile --quiet --universal --upgrade \
  --generate-hashes --python-version 3.12 --output-file tests/requirements/
export PY UV
.DEFAULT_GOAL := help
.PHONY: help run verify diff test lint logs lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

run: .env ## Prepare the agent; start a tier 01 unless one is running
	@tests/harness/tier01.sh start

verify: run ## Run the agent; check what is accepted and what is rejected
	@./verify.sh

diff: ## Show what authentication adds to the same client without it
	@total=$$($(COUNT) agent.py); \
	  auth=$$(sed -n '/# authplane:begin/,/# authplane:end/p' agent.py | $(COUNT)); \
	  sdk=$$(sed -n 's/^dependencies = \["\(authplane-sdk\)\([^"]*\).*/\1 \2/p' pyproject.toml); \
	  echo "Auth-specific code: $$auth lines · Total example: $$total lines · SDK: $$sdk"
	@diff -U0 tests/examples/plain_agent.py agent.py | tail -n +3

test: ## Run all tests
	@tests/harness/install.sh .venv agent
	@tests/harness/install.sh tests/.venv tier01
	@tests/harness/install.sh tests/.venv test
	@tests/.venv/bin/python -m pytest

lint: ## Check style, types and shell
	@for name in tier01 test lint; do tests/harness/install.sh tests/.venv $$name || exit; done
	@tests/.venv/bin/ruff check
	@tests/.venv/bin/ruff format --check
	@tests/.venv/bin/pyright
	@PATH=tests/.venv/bin:$$PATH shellcheck -x verify.sh tests/harness/install.sh tests/harness/tier01.sh .ci/*

logs: ## Show the logs of what `make run` has started
	@tests/harness/tier01.sh logs

lock: ## Pin the newest versions that pyproject.toml allows
	@tests/harness/install.sh tests/.venv test
	@$(PIN)agent.txt pyproject.toml --group platforms
	@$(PIN)tier01.txt --group tier01 -c tests/requirements/agent.txt
	@$(PIN)test.txt --group test -c tests/requirements/tier01.txt
	@$(PIN)lint.txt --group lint -c tests/requirements/tier01.txt -c tests/requirements/test.txt

clean: ## Stop and remove what `make run` has started and made
	@tests/harness/tier01.sh clean
	@rm -rf .venv tests/.venv .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@if cmp -s .env .env.example; then rm .env; fi

.env:
	@umask 077 && cp .env.example .env
