# The five commands that people type. Each sets up .venv on its first call, or takes the active environment.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: setup test lint docs quickstart
ENVIRONMENT := source recipes/setup.sh && setup_environment dev

setup:
	$(ENVIRONMENT)

test:
	bash tests/run.sh

lint:
	$(ENVIRONMENT)
	ruff check .
	ruff format --check .
	mypy
	git ls-files '*.sh' .ci/run | xargs -n 1 shellcheck --exclude=SC1091
	codespell

docs:
	$(ENVIRONMENT)
	mkdocs build --strict

quickstart:
	bash recipes/quickstart.sh
