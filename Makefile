# The front door. Everything below makes .venv and installs on first use.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# each test runs in one thread, so many of them side by side
WORKERS ?= 2
TEST    := $(BIN)/pytest --numprocesses=$(WORKERS) --dist=worksteal --durations=5

.PHONY: demo test test-slow lint format docs sweep clean

demo: $(STAMP)
	$(BIN)/convsurgeon demo

test: $(STAMP)
	$(TEST) -m "not slow"

test-slow: $(STAMP)
	$(TEST) -m slow

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

sweep: $(STAMP)
	$(BIN)/python docs/benchmarks/sweep

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("convsurgeon needs Python 3.11 or newer; use make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site *.egg-info
