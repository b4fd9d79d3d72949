# `make demo` and `make test` need Python 3.11 or newer and g++ 11 or newer; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint clean
demo: .venv/installed
	$(BIN)/sparsebert demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf .venv build sparsebert-demo *.egg-info sparsebert/*.so

# torch first and by its exact version, so that nothing else can choose another one.
.venv/installed: pyproject.toml constraints.txt setup.py $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found %d.%d; set PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo,dev]'
	@touch $@
