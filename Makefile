# Two environments: VENV for development, with torch, and DEMO_VENV as installed by users.
PYTHON ?= python3
VENV ?= .venv
DEMO_VENV ?= .venv-demo
PYTEST_ARGUMENTS ?=
# Number of test processes; the tests of a file run in one process, long files first.
PYTEST_WORKERS ?= 2

SOURCES := pyproject.toml constraints.txt \
	$(shell find sbtk_runtime sbtk_train sbtk_export cli -type f -not -name '*.pyc')
PIP_OPTIONS := --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST = $(VENV)/bin/python -m pytest -q --durations=15 \
	-n $(PYTEST_WORKERS) --no-loadscope-reorder
QUICK := not slow and not browser and not kill and not install
INSTALL_FAILED := { echo "pip could not install sbtk (see its error above); it needs access to a package\
 index" >&2; exit 1; }
TESTS_NOT_INSTALLED := { echo "pip could not install sbtk with the dependencies of its tests (see its\
 error above); it needs access to a package index, and a C++ compiler for hnswlib" >&2; exit 1; }

# Tests start hundreds of processes; without compiled modules each would compile its own.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help demo check lint types layers test test-all test-browser test-firefox screenshots chromium firefox format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(DEMO_VENV)/.installed ## Install the runtime and search photos with five sketches
	@$(DEMO_VENV)/bin/python -m demo

check: lint types layers ## Check lint, formatting, types and the direction of imports

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy

layers: $(VENV)/.installed
	$(VENV)/bin/lint-imports

test: $(VENV)/.installed ## Run the quick tests; PYTEST_ARGUMENTS="-k gallery" selects some
	$(PYTEST) -m "$(QUICK)" $(PYTEST_ARGUMENTS)

# Playwright leaves an event loop in its process, so the tests of the page have one of their own,
# beside the others since they mostly wait.
test-all: $(VENV)/.installed ## Run all tests, including those that train, kill, install and browse
	@failed=0; log=$$(mktemp); \
	$(VENV)/bin/python -m pytest -q --durations=5 -m browser tests/browser $(PYTEST_ARGUMENTS) \
		>"$$log" 2>&1 & browser=$$!; \
	$(PYTEST) -m "not browser" $(PYTEST_ARGUMENTS) || failed=1; \
	wait $$browser || test $$? = 5 || failed=1; \
	cat "$$log"; rm "$$log"; exit $$failed

test-browser: chromium firefox $(VENV)/.installed ## Run the page's tests in Chromium, and some in Firefox, too; apt installs both if missing
	$(VENV)/bin/python -m pytest -q --durations=15 -m browser tests/browser $(PYTEST_ARGUMENTS)

test-firefox: firefox $(VENV)/.installed ## Run all of the page's tests in Firefox
	SBTK_BROWSERS=firefox $(VENV)/bin/python -m pytest -q --durations=15 -m browser tests/browser $(PYTEST_ARGUMENTS)

screenshots: chromium $(VENV)/.installed ## Redraw the images in docs/images from the demo's photos
	SBTK_SCREENSHOTS=docs/images $(VENV)/bin/python -m pytest -q -s tests/browser/test_screenshots.py

# SBTK_CHROMIUM names another Chromium-based browser than Debian's `chromium`.
chromium:
	@command -v "$${SBTK_CHROMIUM:-chromium}" >/dev/null \
		|| { test -z "$$SBTK_CHROMIUM" && $(call install,chromium); } \
		|| { echo "Chromium is not installed: on Debian, run 'apt install chromium' as root;\
 elsewhere, set SBTK_CHROMIUM to the path of Chromium or Chrome" >&2; exit 1; }

format: $(VENV)/.installed ## Format the code and fix what the linter can fix
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# SBTK_FIREFOX names another Firefox than Debian's `firefox-esr`.
firefox:
	@command -v "$${SBTK_FIREFOX:-firefox-esr}" >/dev/null \
		|| { test -z "$$SBTK_FIREFOX" && $(call install,firefox-esr); } \
		|| echo "Firefox is not installed: its tests are skipped" >&2

clean: ## Remove environments, caches and the files of the demo
	rm -rf .venv .venv-demo .demo build dist .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A regular installation, so every change of the package requires a new one.
$(DEMO_VENV)/.installed: $(SOURCES)
	@$(call new_environment,$(DEMO_VENV))
	@echo "Installing sbtk[cpu,serve] into $(DEMO_VENV), without torch ..."
	@rm -rf build
	@$(DEMO_VENV)/bin/python -m pip install $(PIP_OPTIONS) ".[cpu,serve]" || $(INSTALL_FAILED)
	@$(DEMO_VENV)/bin/python -m pip install $(PIP_OPTIONS) hnswlib >/dev/null 2>&1 \
		|| echo "hnswlib cannot be built here: the demo searches without it"
	@touch $@

# An editable installation, so only a change of dependencies requires a new one. onnxruntime-gpu is
# installed to a separate folder, for the tests that need it, or it would overwrite onnxruntime; at
# the same time, since pip uses one core.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call new_environment,$(VENV))
	@echo "Installing sbtk with the dependencies of its tests into $(VENV) (5 GB) ..."
	@{ $(VENV)/bin/python -m pip install $(PIP_OPTIONS) --no-deps --upgrade \
		--target $(VENV)/onnxruntime-gpu onnxruntime-gpu \
		|| echo "onnxruntime-gpu is not available for this machine: its tests are skipped" >&2; } & \
	$(VENV)/bin/python -m pip install $(PIP_OPTIONS) --editable \
		".[train,export,cpu,hnsw,openvino,tensorrt-rtx,plot,photos,postgres,milvus,serve,show,dev]" || $(TESTS_NOT_INSTALLED); \
	wait
	@touch $@

define install
test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	&& apt-get -qq update \
	&& DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends $(1) \
		fonts-dejavu-core >/dev/null
endef

define new_environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	|| { echo "sbtk needs Python 3.11 or newer; set it, as in: make PYTHON=python3.12" >&2; \
	exit 1; }; \
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef
