# Everything from a stock Python (3.11 or newer): make train, make test, make lint.
PYTHON ?= $(firstword $(foreach p,python3 python3.11 python3.12 python3.13,$(shell \
	$(p) -c 'import sys; sys.exit(not (3,11) <= sys.version_info < (3,14))' 2>/dev/null && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CONFIG ?= configs/zh_en.py:laptop
WORKDIR ?= runs/laptop

AOT := .venv-aot
AOT_STAMP := $(AOT)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
TOUR := $(or $(JAXFORMER_WORKDIR),runs/steve)

.PHONY: venv train test test-long aot bench docs lint format clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; install one, or name it: make PYTHON=/path/to/python3"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# Arrays in huge pages (glibc 2.35 or newer) make a step on the CPU about 8 % faster.
train: $(STAMP)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python train.py --config=$(CONFIG) --workdir=$(WORKDIR)

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadgroup -m "not long" $(TESTS)

# Clusters, schedulers and kills on this machine, and the pages of the tour: one test at a time.
test-long: $(DOCS_STAMP) $(TOUR)/report.html
	JAXFORMER_WORKDIR=$(abspath $(TOUR)) $(BIN)/pytest -m long $(TESTS)

# The kernels compiled for TPUs and an H100 that are not here; SHORT=1: some of it, in a minute.
aot: $(AOT_STAMP)
	$(AOT)/bin/pytest -n 2 -rs $(if $(SHORT),-m "not long") tests/aot

# Attention beside other libraries: on TPUs by the compiler's estimates, on this CPU by the clock.
# What is known already is not compiled again; it takes hours from scratch, and may be stopped.
bench: $(AOT_STAMP)
	$(AOT)/bin/pip install --quiet --disable-pip-version-check --editable '.[aot,bench]'
	$(AOT)/bin/python -m benchmarks.attention
	$(AOT)/bin/python benchmarks/attention_cpu.py

$(AOT_STAMP): pyproject.toml
	$(PYTHON) -m venv $(AOT)
	$(AOT)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev,aot]'
	@touch $@

# The guided tour, on the model in runs/steve (trained first, 3 minutes) or in JAXFORMER_WORKDIR.
docs: $(DOCS_STAMP) $(TOUR)/report.html
	JAXFORMER_WORKDIR=$(abspath $(TOUR)) $(BIN)/sphinx-build -W --keep-going -q docs docs/_build/html
	@echo "The tour is at file://$(abspath docs/_build/html/index.html)"

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,docs]'
	@touch $@

runs/steve/report.html: | $(STAMP)
	GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python train.py --config=configs/steve.py --workdir=runs/steve

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(AOT) build docs/_build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
