# On a machine with Python 3.11+ and pip: `make demo` distils on embedded data, `make test` runs every check.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.PHONY: setup demo test lint docs clean

setup: $(STAMP)

# torch first and by its exact version: other versions bring gigabytes of CUDA packages (constraints.txt).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Limbeck needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

DEMO_OUT ?= runs/demo
demo: setup
	$(BIN)/limbeck bench switch-kd --seeds 1 --out $(DEMO_OUT)
	@echo
	@echo "Where do the student's errors come from? (limbeck probe $(DEMO_OUT)/switch-kd/seed-0)"
	$(BIN)/limbeck probe $(DEMO_OUT)/switch-kd/seed-0

test: setup lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) runs site build dist
