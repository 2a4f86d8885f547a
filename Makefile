# Every target sets up .venv by itself; nothing else is needed on a fresh machine but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint format equivalence clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed -e '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## plan Llama-3-8B for 64 H100; train a small GPT-2 on 4 processes, against one
	$(BIN)/python -m benchmarks.demo

test: $(STAMP)  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

equivalence: $(STAMP)  ## train every model of the zoo every way; writes docs/equivalence.md
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.equivalence

clean:
	rm -rf $(VENV) build dist *.egg-info out
