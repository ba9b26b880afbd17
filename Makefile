# The verbs of this repository. Each sets up what it needs in .venv and nothing outside it, but for the Debian packages
# of the real registry and clients that `test` and `interop` speak to (.ci/packages).
#
#   make serve          run Breakwater with built-in defaults; ARGS="--config FILE" and so on are passed on
#   make test           everything that is checked: packages, lint, types, every test (10 minutes on 2 cores at most)
#   make check          lint and types
#   make quick          the inner loop: unit, contract and a short property run (60 s at most)
#   make interop        real clients and a real registry only
#   make soak           the long forms: ten thousand connections and aborts, bodies over 4 GiB
#   make bench          beside nginx and other registries: a table of ratios; ARGS="--quick --rounds 1" for a look
#   make wheelhouse     everything that installing Breakwater takes, as wheels, for a machine without a network
#   make clean          forget .venv and what tools left behind

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help serve test check quick interop soak bench clean packages wheelhouse

VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled once and not at each start, a quarter of a second, whatever the environment says.
unexport PYTHONDONTWRITEBYTECODE
# PYTHON=… chooses an interpreter; else the first of these that is new enough.
PYTHON ?=
ARGS ?=
#: How many tests of tests/interop/ must have passed for a whole run to count. Raise it with the tests.
INTEROP_FLOOR := 385

# Tests of one file under tests/interop/ share daemons and stay on one worker; all others go wherever there is room.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup

help:
	@sed -n 's/^#   //p' Makefile

serve: $(VENV)/.serve
	@exec $(BIN)/breakwater serve $(ARGS)

test: packages check
	@$(PYTEST) --interop-floor=$(INTEROP_FLOOR) $(ARGS)

check: $(VENV)/.dev
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy

quick: $(VENV)/.dev
	@HYPOTHESIS_PROFILE=quick $(PYTEST) -q tests/unit tests/contract tests/property $(ARGS)

interop: packages $(VENV)/.dev
	@$(PYTEST) tests/interop --interop-floor=$(INTEROP_FLOOR) $(ARGS)

# Not in parallel: each of them wants the machine to itself.
soak: packages $(VENV)/.dev
	@$(BIN)/python -m pytest -m soak --timeout=1800 $(ARGS)

# The packages and the picture's library are wanted, not needed: the bench says what is missing.
bench: $(VENV)/.bench
	@bash .ci/packages bench || echo "Going on with what is here." >&2
	@PATH="$$PATH:/usr/sbin:/sbin" $(BIN)/python -m bench $(ARGS)

WHEELHOUSE ?= wheelhouse
wheelhouse: $(BIN)/python
	@$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --wheel-dir $(WHEELHOUSE) ".[zstd]"
	@echo "On the other side: python3 -m pip install --no-index --find-links $(notdir $(WHEELHOUSE)) 'breakwater[zstd]'"

packages:
	@bash .ci/packages

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build

# -- the virtual environment -------------------------------------------------------------------------------------------
# Installed editable, so that a new revision of the tree runs without another install; pyproject.toml changing is what
# asks for one. A stamp is written last, so that an interrupted install is done again.

$(VENV)/.serve: pyproject.toml $(BIN)/python
	@echo "Installing Breakwater into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.pip
	@echo "Installing Breakwater and what its tests need into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group dev
	@touch $@ $(VENV)/.serve

$(VENV)/.bench: pyproject.toml $(VENV)/.pip
	@echo "Installing Breakwater and what its bench needs into $(VENV) …"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e . --group bench
	@touch $@ $(VENV)/.serve

# Dependency groups need pip 25.1; Python 3.11 brings an older one.
$(VENV)/.pip: $(BIN)/python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break || python=; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Breakwater needs Python 3.11 or newer. Install it, or say where it is: make serve PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi; \
	if ! "$$python" -m venv $(VENV); then \
	    rm -rf $(VENV); \
	    echo "$$python cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; \
	    exit 1; \
	fi
