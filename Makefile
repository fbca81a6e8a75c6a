# `make demo` and `make test` need Python 3.10-3.12; a C++ compiler makes the codec fast.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

CODEC = sparse_compress/codec/src
FUZZ_SECONDS ?= 20
FUZZ_FLAGS = -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
TRACED = $(patsubst %,build/fuzz/%.o,unzip encode_tile decode_table decode_tile)

.PHONY: demo test lint format bench accuracy fuzz clean

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
	$(BIN)/python benchmarks/unzip.py
	$(BIN)/python benchmarks/rate.py models/stdlib-qwen3-6m --calib models/text/calibration.txt --heldout models/text/heldout.txt

# Every scheme with every algorithm; hours. What benchmarks/accuracy.json has is kept.
accuracy: $(INSTALLED)
	$(BIN)/python benchmarks/accuracy.py models/stdlib-qwen3-6m --calib models/text/calibration.txt --heldout models/text/heldout.txt --windows 32 --json benchmarks/accuracy.json

# The decoder under sanitizers, guided by coverage. FUZZ_KEEP=--keep adds what it finds to the corpus.
fuzz: build/fuzz/fuzz_unzip
	$< tests/sparse_compress/fuzz_corpus --seconds $(FUZZ_SECONDS) $(FUZZ_KEEP)

build/fuzz/%.o: $(CODEC)/%.cpp $(wildcard $(CODEC)/*.h)
	mkdir -p $(@D)
	$(CXX) $(FUZZ_FLAGS) -fsanitize-coverage=trace-pc -c $< -o $@

build/fuzz/fuzz_unzip: $(CODEC)/fuzz_unzip.cpp $(TRACED)
	$(CXX) $(FUZZ_FLAGS) $^ -o $@ -pthread

$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard sparse_compress/codec/src/* ms_quant/kernels/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[mindspore,test]'
	touch $@

clean:
	rm -rf $(VENV) build demo-output
