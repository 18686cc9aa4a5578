# Two commands on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN    := .venv/bin
ready  := .venv/.installed

# Real text, tokenizer files and reference outputs for the tests that want them.
DSL_TEST_DATA ?= $(wildcard $(abspath ../shared/data))
export DSL_TEST_DATA

.PHONY: setup quickstart gpu-check test test-all test-faults services test-services test-soak lint format clean
setup: $(ready)

# torch is named and pinned first: unpinned, pip would fetch gigabytes of CUDA packages.
$(ready): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# `make quickstart EXISTING=restart` makes everything anew; by default a second run picks up what
# the first has left, and a finished one only shows what it made.
EXISTING ?= resume
quickstart: $(ready)
	$(BIN)/python -m pipelines.examples.quickstart existing=$(EXISTING)

# On a machine with a GPU; pipelines/benchmarks/GPU.md says more. `make gpu-check CHECK='--device cpu
# --small'` tries the command without one.
CHECK ?=
gpu-check: $(ready)
	$(BIN)/python -m pipelines.gpu_check --out runs/gpu-check $(CHECK)

# What each target of tests holds is said in tests/README.md.
test: $(ready)
	$(BIN)/python -m pytest -n auto

test-all: $(ready)
	$(BIN)/python -m pytest -n auto -m ""

# Real processes that are killed, starved and lied to: half an hour on 2 cores.
test-faults: $(ready)
	$(BIN)/python -m pytest tests/faults --timeout 1800

# Real servers, which Debian's packages bring; a test whose program is missing is skipped.
SERVICES := postgresql prometheus chromium
services: $(ready)
	@dpkg --status $(SERVICES) > /dev/null 2>&1 \
	    || { apt-get update -q && apt-get install -q -y --no-install-recommends $(SERVICES); } \
	    || echo "Install $(SERVICES) as root: what needs a missing one is skipped."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[services]'

test-services: services
	$(BIN)/python -m pytest tests/services --timeout 1800

# One run under random faults: 18 min on 2 cores. `make test-soak SOAK=short` has four faults.
SOAK ?= full
test-soak: services
	$(BIN)/python -m pytest tests/soak -k $(SOAK) --timeout 7200

lint: $(ready)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(ready)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build *.egg-info
