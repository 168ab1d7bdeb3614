# make demo    export the built-in model to every backend, compare with PyTorch, draw with each
# make test    lint, types and tests; what .ci/run runs
# make clients environments of the ecosystem's clients under .clients, and the tests that open bundles in them
# make bench-peers  edgeflow beside its peers on PEERS_MODEL; PEERS_FLAGS as in python -m edgeflow.peers -h
# make clean   remove what the other targets made, but not .venv and .clients
#
# PYTHON=python3.12 picks another interpreter; PIP_FLAGS="--extra-index-url …" points pip at a CPU build of torch.

PYTHON    ?= python3
PIP_FLAGS ?=
JOBS      ?= 2

BIN     := .venv/bin
INSTALL  = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt
# One thread a process: two pytest workers fill two cores, and figures do not depend on the machine's width.
export OMP_NUM_THREADS ?= 1

BACKENDS   := onnx openvino coreml
PRECISIONS := fp32 fp16
MODEL      := emoji
# A contact sheet of eight prompts, all from seed 0.
DRAW       := $(BIN)/edgeflow generate --prompts-file docs/prompts.txt --grid --force
SOURCES    := $(shell find edgeflow exporters runtimes -name '*.py' -o -path '*/models/*' -type f)

CLIENTS     := optimum genai
PEERS       := $(CLIENTS) sdcpp
PEERS_MODEL ?= emoji
PEERS_FLAGS ?= --launches 3 --runs 5

.PHONY: demo test lint types clients bench-peers clean
.DELETE_ON_ERROR:

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgeflow needs Python 3.11 or later; make PYTHON=…")'
	$(PYTHON) -m venv .venv

# One stamp for each set of extras, so that a second make installs nothing. torch is held by the
# constraints in the same command as everything that asks for it.
.venv/installed-export: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[export]'
	@touch $@

.venv/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $@ .venv/installed-export

demo: .venv/installed-export demo/.exported
	@set -e; $(DRAW) $(MODEL) -o demo/torch.png; \
	for backend in $(BACKENDS); do \
	    $(DRAW) demo/bundles/$$backend-pipeline-fp16 -o demo/$$backend.png; \
	done
	$(BIN)/edgeflow parity demo/bundles/*

demo/.exported: $(SOURCES) | .venv/installed-export
	$(BIN)/edgeflow export $(MODEL) $(BACKENDS:%=--to %) $(PRECISIONS:%=--precision %) \
	    --graph pipeline --no-parity --force -o demo/bundles
	@touch $@

test: lint types
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not gpu and not slow and not clients"

# What pip says goes to .clients/NAME.log; a peer that could not be installed is a row that quotes it.
.clients/%/installed: tests/clients/requirements-%.txt
	@rm -rf .clients/$* && mkdir -p .clients && $(PYTHON) -m venv .clients/$*
	.clients/$*/bin/python -m pip install --disable-pip-version-check $(PIP_FLAGS) -r $< > .clients/$*.log 2>&1
	@touch $@

clients: .venv/installed-dev $(CLIENTS:%=.clients/%/installed)
	$(BIN)/python -m pytest -m clients tests/clients

bench-peers: .venv/installed-export
	-@$(MAKE) --keep-going $(PEERS:%=.clients/%/installed)
	$(BIN)/python -m edgeflow.peers $(PEERS_MODEL) $(PEERS_FLAGS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow an editable install's map of folders, so the packages are laid out as one with links.
types: .venv/installed-dev
	@rm -rf build/types && mkdir -p build/types/edgeflow
	@ln -s "$(CURDIR)"/edgeflow/* "$(CURDIR)"/training "$(CURDIR)"/exporters "$(CURDIR)"/runtimes build/types/edgeflow/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

clean:
	rm -rf demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
