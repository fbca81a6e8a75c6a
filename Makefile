# `make demo` and `make test` need Python 3.10-3.12; a C++ compiler makes the codec fast.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

.PHONY: demo test lint format bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	$(BIN)/python -m pytest -q

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h')

format: $(INSTALLED)
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(shell git ls-files '*.cpp' '*.h')

bench: $(INSTALLED)
	$(BIN)/python benchmarks/memory.py

$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard sparse_compress/codec/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[mindspore,test]'
	touch $@

clean:
	rm -rf $(VENV) build demo-output
