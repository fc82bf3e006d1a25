# Two environments: VENV for work on sbtk (torch included), DEMO_VENV as a user would install it.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
PYTEST_ARGUMENTS ?=
# Tests run in as many processes, a file in one of them, long files first.
PYTEST_WORKERS ?= 2

SOURCES := pyproject.toml constraints.txt \
	$(shell find sbtk_runtime sbtk_train sbtk_export cli -type f -not -name '*.pyc')
PIP_OPTIONS := --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST = $(VENV)/bin/python -m pytest -q --durations=15 \
	-n $(PYTEST_WORKERS) --no-loadscope-reorder
QUICK := not slow and not browser and not kill and not install
INSTALL_FAILED := { echo "pip could not install sbtk (its reason stands above). It needs a package index\
 that it can reach" >&2; exit 1; }
TESTS_NOT_INSTALLED := { echo "pip could not install sbtk with all that its tests need (its reason\
 stands above): a package index that it can reach, and for hnswlib a C++ compiler" >&2; exit 1; }

.DEFAULT_GOAL := help
.PHONY: help demo check lint types layers test test-all test-browser screenshots chromium format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/.installed ## Install the runtime alone and find photographs from five sketches
	@$(DEMO_VENV)/bin/python -m demo

check: lint types layers ## Lint, check formatting, types and the direction of imports

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

layers: $(VENV)/.installed
	$(VENV)/bin/lint-imports

test: $(VENV)/.installed ## Run the quick tests; PYTEST_ARGUMENTS="-k gallery" picks some
	$(PYTEST) -m "$(QUICK)" $(PYTEST_ARGUMENTS)

# Playwright leaves an event loop in its process, so the tests of the page have one of their own,
# beside the others since they mostly wait.
test-all: $(VENV)/.installed ## Run all tests, those that train, kill, install and browse too
	@failed=0; log=$$(mktemp); \
	$(VENV)/bin/python -m pytest -q --durations=5 -m browser tests/browser $(PYTEST_ARGUMENTS) \
		>"$$log" 2>&1 & browser=$$!; \
	$(PYTEST) -m "not browser" $(PYTEST_ARGUMENTS) || failed=1; \
	wait $$browser || test $$? = 5 || failed=1; \
	cat "$$log"; rm "$$log"; exit $$failed

test-browser: chromium $(VENV)/.installed ## Run the page's tests in Chromium, which apt installs if missing
	$(VENV)/bin/python -m pytest -q --durations=15 -m browser tests/browser $(PYTEST_ARGUMENTS)

screenshots: chromium $(VENV)/.installed ## Draw the pictures in docs/images anew, from the demo's photos
	SBTK_SCREENSHOTS=docs/images $(VENV)/bin/python -m pytest -q -s tests/browser/test_screenshots.py

# SBTK_CHROMIUM names another browser of that family than Debian's `chromium`.
chromium:
	@command -v "$${SBTK_CHROMIUM:-chromium}" >/dev/null || { $(call install,chromium); } \
		|| { echo "There is no Chromium: 'apt install chromium' installs it, as root, on Debian;\
 elsewhere set SBTK_CHROMIUM to the path of a Chromium or Chrome" >&2; exit 1; }

format: $(VENV)/.installed ## Format the code and mend what the linter can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## Remove environments, caches and everything the demo made
	rm -rf .venv .venv-demo .demo build dist .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The package itself is copied, as for a user, so any change of it means another install.
$(DEMO_VENV)/.installed: $(SOURCES)
	@$(call new_environment,$(DEMO_VENV))
	@echo "Installing sbtk[cpu] into $(DEMO_VENV), without torch ..."
	@rm -rf build
	@$(DEMO_VENV)/bin/python -m pip install $(PIP_OPTIONS) ".[cpu]" || $(INSTALL_FAILED)
	@$(DEMO_VENV)/bin/python -m pip install $(PIP_OPTIONS) hnswlib >/dev/null 2>&1 \
		|| echo "Without hnswlib, which cannot be built here: the demo searches exactly"
	@touch $@

# Editable, so only a change of what is required means another install. onnxruntime-gpu lies beside
# the environment, for the tests that ask for it: inside, it would overwrite onnxruntime's files.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call new_environment,$(VENV))
	@echo "Installing sbtk with everything that its tests need into $(VENV) (some 5 GB) ..."
	@$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --editable \
		".[train,export,cpu,hnsw,openvino,tensorrt-rtx,plot,photos,serve,show,dev]" || $(TESTS_NOT_INSTALLED)
	@$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps --upgrade \
		--target $(VENV)/onnxruntime-gpu onnxruntime-gpu \
		|| echo "There is no onnxruntime-gpu for this machine: its tests will be skipped" >&2
	@touch $@

define install
test -z "$$SBTK_CHROMIUM" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	&& apt-get -qq update \
	&& DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $(1) \
		fonts-dejavu-core >/dev/null
endef

define new_environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "sbtk needs Python 3.11 or newer; name one, as in: make PYTHON=python3.12" >&2; \
	exit 1; }; \
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
