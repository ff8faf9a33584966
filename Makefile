# Everything runs in .venv, which the first target that needs it sets up; see `make help`.
SHELL := /bin/bash
.DEFAULT_GOAL := help

BIN := .venv/bin
PROTOS := $(wildcard protos/splitsam/v1/*.proto)
TYPED := common encoder_service decoder_service kernels client gateway v1
TOOLS := inference-sdk label-studio osam
PACKAGES := $(addprefix splitsam.,$(TYPED))
# The first of these that is Python 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help setup demo up test test-long test-tools test-page test-memory fuzz lint check-deploy sbom format wheel evaluate clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: .venv/.installed .venv/.generated .typing ## Make the virtual environment and the generated code

demo: setup ## Photo to masks through both services; writes out/demo.png
	$(BIN)/splitsam demo

up: setup ## Redis and both services, left running until Ctrl-C
	$(BIN)/splitsam up

test: setup ## Unit and end-to-end tests, on the CPU
	$(BIN)/pytest -m "not long and not tools and not page"

test-long: setup ## Tests that take minutes: whole models, the wheel alone, a switch of models under load
	$(BIN)/pytest -m long

test-tools: setup $(TOOLS:%=.tools/%/.installed) ## The gateway against Label Studio, inference-sdk and osam, in environments of their own
	$(BIN)/pytest -m tools tests/e2e/tools

test-page: setup .venv/.page ## The labeling page in a headless Chromium, which has to be installed already
	$(BIN)/pytest -m page tests/e2e/web

test-memory: setup ## Memory over 100,000 clicks on 5,000 images and over 2,000 encodes; two hours or more on 2 cores
	$(BIN)/pytest tests/e2e/test_click_memory.py --memory-clicks 100000 --memory-images 5000
	$(BIN)/pytest tests/e2e/test_encode_memory.py --memory-encodes 2000

fuzz: setup .venv/.fuzz ## A million odd inputs for the parsers and 10,000 odd requests for the services: some twenty minutes
	$(BIN)/python -m bench.fuzz

evaluate: setup ## Recompute the published figures of the shipped vit_t
	$(BIN)/python -m training.evaluate --checkpoint common/assets/vit_t.safetensors

lint: setup ## Lint, format check, types, protobuf lint and compatibility
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(addprefix -p ,$(PACKAGES))
	cd protos && ../$(BIN)/buf lint
	BUF=$(BIN)/buf protos/check_compatibility

check-deploy: setup ## Manifests against schemas, policies and the code; the Dockerfile's lint
	$(BIN)/hadolint --failure-threshold style deploy/docker/Dockerfile
	$(BIN)/pytest tests/deploy

sbom: setup ## Bill of materials of .venv, as CycloneDX, into out/
	mkdir -p out
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file out/sbom.cdx.json $(BIN)/python

format: setup ## Format and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup ## Build the wheel into dist/
	$(BIN)/python -m build --wheel

clean: ## Remove what these targets made
	rm -rf .venv .tools .typing build dist out splitsam.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f protos/splitsam/v1/*_pb2.py protos/splitsam/v1/*_pb2.pyi protos/splitsam/v1/*_pb2_grpc.py

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

.tools/%/.installed: tests/e2e/tools/%.txt
	$(PYTHON) -m venv .tools/$*
	.tools/$*/bin/pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@

# The model of examples/osam runs inside osam's process, and calls our client there.
.tools/osam/.installed: tests/e2e/tools/osam.txt
	$(PYTHON) -m venv .tools/osam
	.tools/osam/bin/pip install --quiet --disable-pip-version-check --requirement $<
	.tools/osam/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

.venv/.page: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,page]'
	@touch $@

# Where there is no wheel of atheris nothing is installed, and inputs come from the seed alone.
.venv/.fuzz: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,fuzz]'
	@touch $@

.venv/.generated: .venv/.installed $(PROTOS) protos/generate.py
	$(BIN)/python protos/generate.py
	@touch $@

# mypy does not follow editable installs: a tree of links gives it the installed names.
.typing: Makefile
	rm -rf .typing && mkdir -p .typing/splitsam
	for package in $(filter-out v1,$(TYPED)); do ln -s ../../$$package .typing/splitsam/$$package; done
	ln -s ../../protos/splitsam/v1 .typing/splitsam/v1
	@touch .typing
