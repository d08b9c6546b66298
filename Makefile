PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-all fuzz lint docs clean

demo: $(VENV)/demo
	$(BIN)/flapkit run recipes/demo.yaml --overwrite

test: $(VENV)/dev
	$(BIN)/python -m pytest --numprocesses auto

test-all: $(VENV)/all
	$(BIN)/python -m pytest --numprocesses auto -m "slow or not slow"

# An hour or two of one core; what it finds goes into the test as an @example.
fuzz: $(VENV)/dev
	$(BIN)/python -m pytest tests/fuzz --numprocesses auto --hypothesis-profile=deep

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) dist site

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

# Every extra; llama-cpp-python is compiled, which takes some minutes.
$(VENV)/all: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	touch $@
