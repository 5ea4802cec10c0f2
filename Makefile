# GNU Make 3.81 and later. Settings: see .env.example; PY=python3.13 chooses the Python, UV= does without uv.
SHELL := /bin/bash
UV := $(shell command -v uv 2>/dev/null)
LOCK = UV_CUSTOM_COMPILE_COMMAND='make lock' tests/.venv/bin/uv pip compile --quiet --universal --upgrade \
  --generate-hashes --python-version 3.12 --output-file tests/requirements/
export MAKE PY UV
.DEFAULT_GOAL := help
.PHONY: help run verify diff test lint logs lock clean

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

run: .env ## Prepare the agent; start a tier 01 unless one is running
	@tests/harness/tier01.sh start

verify: run ## Run the agent; check what is accepted and what is rejected
	@./verify.sh

diff: ## Show what authentication adds to the same client without it
	@awk '/# authplane:/ { auth = /begin/ } /^ *(#|$$)/ { next } { total++; lines += auth } \
	  END { printf "Auth-specific code: %d lines · Total example: %d lines", lines, total }' agent.py
	@sed -n 's/^dependencies = \["authplane-sdk\([^"]*\).*/ · SDK: authplane-sdk \1/p' pyproject.toml
	@diff -U0 tests/examples/plain_agent.py agent.py | tail -n +3

test: .venv/ready tests/.venv/test ## Run all tests
	@tests/.venv/bin/pytest

lint: .venv/ready tests/.venv/lint ## Check style, types, shell, Dockerfiles and the workflow
	@tests/.venv/bin/ruff check
	@tests/.venv/bin/ruff format --check
	@tests/.venv/bin/pyright
	@tests/.venv/bin/hadolint Dockerfile tests/tier01/Dockerfile
	@PATH=tests/.venv/bin:$$PATH shellcheck -x verify.sh tests/harness/*.sh .ci/run
	@tests/.venv/bin/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/ci.yml
	@out=$$(tests/.venv/bin/zizmor --offline --quiet --strict-collection .github) || { echo "$$out"; exit 1; }

logs: ## Show the logs of what `make run` has started
	@tests/harness/tier01.sh logs

lock: tests/.venv/test ## Pin the newest versions that pyproject.toml allows
	@$(LOCK)agent.txt pyproject.toml --group platforms
	@$(LOCK)tier01.txt --group tier01 -c tests/requirements/agent.txt
	@$(LOCK)test.txt --group test -c tests/requirements/tier01.txt
	@$(LOCK)lint.txt --group lint -c tests/requirements/tier01.txt -c tests/requirements/test.txt

clean: ## Stop and remove what `make run` has started and made
	@tests/harness/tier01.sh clean
	@rm -rf .venv tests/.venv .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@if cmp -s .env .env.example; then rm .env; fi

.env:
	@umask 077 && cp .env.example .env

.venv/ready: tests/requirements/agent.txt
	@tests/harness/install.sh $@ $<
tests/.venv/%: tests/requirements/%.txt
	@tests/harness/install.sh $@ $<
tests/.venv/test: tests/.venv/tier01
tests/.venv/lint: tests/.venv/test
