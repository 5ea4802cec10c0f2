# GNU Make 3.81 and later. Settings: see .env.example; PY=python3.13 chooses the Python, UV= does without uv.
SHELL := /bin/bash
export MAKE PY UV
.DEFAULT_GOAL := help
.PHONY: help run verify diff test lint status logs clean
UV := $(shell command -v uv 2>/dev/null)

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

run: .env ## Prepare the agent; start a tier 01 unless one answers
	@tests/tier01/tier01.sh start

verify: run ## Run the agent; prove that all others are turned away
	@./verify.sh

diff: ## Show what auth adds to a client that has none
	@awk '/# authplane:/ { auth = /begin/ } /^ *(#|$$)/ { next } { total++ } auth && !/^ *(from|import) / { lines++ } \
	  END { printf "Auth-specific code: %d lines · Total example: %d lines", lines, total }' agent.py
	@sed -n 's/^dependencies = \["authplane-sdk\([^"]*\).*/ · SDK: authplane-sdk \1/p' pyproject.toml
	@diff -U1 --label tests/plain_agent.py --label agent.py tests/plain_agent.py agent.py; [ $$? = 1 ]

test: .venv/ready tests/.venv/test ## Run all tests
	@tests/.venv/bin/pytest

lint: .venv/ready tests/.venv/test ## Check style, types, shell and Dockerfile
	@tests/.venv/bin/ruff check
	@tests/.venv/bin/ruff format --check
	@tests/.venv/bin/pyright
	@tests/.venv/bin/hadolint Dockerfile tests/tier01/Dockerfile
	@tests/.venv/bin/shellcheck -x verify.sh tests/tier01/tier01.sh .ci/run

status: ## Say what runs
	@tests/tier01/tier01.sh status

logs: ## Show the logs of what `make run` started
	@tests/tier01/tier01.sh logs

clean: ## Stop and remove what `make run` started and made
	@tests/tier01/tier01.sh clean
	@rm -rf .venv tests/.venv .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +
	@if cmp -s .env .env.example; then rm .env; fi

.env:
	@umask 077 && cp .env.example .env

# $(call install,DIRECTORY,GROUP): a virtual environment with a group of packages of pyproject.toml.
define install
@set -ef; for python in $(or $(PY),python3.13 python3.12 python3) ''; do \
	  if [ -z "$$python" ]; then echo 'make: no Python 3.12 or newer: install one, or name it: make PY=…' >&2; exit 1; fi; \
	  ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || break; \
	done; \
	packages=$$($$python -c 'import sys, tomllib; t = tomllib.load(open("pyproject.toml", "rb")); \
	  print(*(t["dependency-groups"] | {"agent": t["project"]["dependencies"]})[sys.argv[1]])' $(2)); \
	[ -e $(1)/ready ] || [ -e $(1)/tier01 ] || rm -rf $(1); \
	if [ -n "$(UV)" ]; then \
	  $(UV) venv --quiet --allow-existing --python $$python $(1); \
	  $(UV) pip install --quiet --python $(1)/bin/python $$packages; \
	else \
	  $$python -m venv $(1); \
	  $(1)/bin/pip install --quiet --disable-pip-version-check --upgrade pip; \
	  $(1)/bin/pip install --quiet --no-compile $$packages; \
	fi
@touch $@
endef

.venv/ready: pyproject.toml
	$(call install,.venv,agent)
tests/.venv/tier01: pyproject.toml
	$(call install,tests/.venv,tier01)
tests/.venv/test: tests/.venv/tier01
	$(call install,tests/.venv,test)
