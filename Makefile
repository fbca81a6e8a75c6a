# `make demo` and `make test` need Python 3.10-3.12; a C++ compiler makes the codec fast.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed

CODEC = sparse_compress/codec/src
FUZZ_SECONDS ?= 20
FUZZ_FLAGS = -std=c++17 -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all
TRACED = $(patsubst %,build/fuzz/%.o,unzip encode_tile decode_table decode_tile)

KERNELS = ms_quant/kernels/src
KERNEL_SOURCES = $(addprefix $(KERNELS)/,check_kernels.cpp check_sparse_attention.cpp \
	check_watched.cpp attention_blocks.cpp hadamard.cpp kernels.cpp pages.cpp pool.cpp \
	sparse_attention.cpp watched_linear.cpp)
KERNEL_FLAGS = -std=c++17 -ffp-contract=off -Wno-uninitialized -Wno-maybe-uninitialized -pthread
# The unrolled ones take minutes to build with checks of every shift and sum.
ISA_FLAGS = $(KERNEL_FLAGS) -g -O1 -fsanitize=address -fno-omit-frame-pointer
ARM = aarch64-linux-gnu

# tests/kernels goes through all instruction sets in each run; these take the best there is.
WITHOUT_KERNELS = $(addprefix tests/,models algorithms test_search_windows.py test_blocks.py \
	test_observers.py test_requantize.py test_evaluation.py test_kv_cache.py test_decoder.py)
ISA_TESTS = $(WITHOUT_KERNELS) $(addprefix tests/,kernels/test_matrix.py \
	$(addprefix cells/test_,decoder.py native.py quant_linear.py \
	quant_linear_schemes.py))
test-isa-none: ISA_TESTS = $(WITHOUT_KERNELS)
# Other libraries as on such a machine, as far as they let themselves be told.
ifeq ($(shell uname -m),x86_64)
AVX512 = AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR
test-isa-avx2 test-isa-avx_vnni: MASKED = OPENBLAS_CORETYPE=Haswell ONEDNN_MAX_CPU_ISA=AVX2 \
	NPY_DISABLE_CPU_FEATURES="$(AVX512)"
test-isa-none test-isa-scalar: MASKED = OPENBLAS_CORETYPE=Prescott ONEDNN_MAX_CPU_ISA=SSE41 \
	NPY_DISABLE_CPU_FEATURES="SSSE3 SSE41 POPCNT SSE42 AVX F16C FMA3 AVX2 $(AVX512)"
endif

VLLM = build/vllm
VLLM_VERSIONS ?= 0.11.0 0.31.0
# Its wheel is for one Python; without it the tests of it are skipped.
BESIDE_0.11.0 = $(if $(filter 3.11,$(shell $(PYTHON) -c \
	'import sys; print(*sys.version_info[:2], sep=".")')),vllm_mindspore==0.5.1)
MINDONE = build/mindone
BROWSER = build/browser
ROOT_APT = $(if $(filter 0,$(shell id -u)),,sudo -n )apt-get
HARNESS = build/harness
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test test-isa test-vllm test-mindone test-browser test-harness test-aarch64 \
	lint format docs bench accuracy accuracy-smollm2 fuzz fuzz-decoder fuzz-kernels clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

# As many workers as the machine bears (tests/conftest.py); `-n 0` runs them in one process.
test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# What depends on the kernels' instruction set, with each that is slower than this machine's best, and
# with NumPy alone; two of them at a time.
test-isa: $(INSTALLED)
	OPENBLAS_NUM_THREADS=1 $(MAKE) -j2 -Otarget $$($(BIN)/python -c 'from ms_quant.kernels import ISAS, best_isa, has_isa; \
		slower = [name for name in ISAS if has_isa(name) and name != best_isa()]; \
		print(*(f"test-isa-{name}" for name in ["none", *slower]))')

test-isa-%: $(INSTALLED)
	$(MASKED) MS_QUANT_ISA=$* $(BIN)/python -m pytest -q $(ISA_TESTS)

# The plugin in vLLM itself: each version in an environment of its own without what only a GPU
# needs, over one torch and $(VENV).
test-vllm: $(foreach version,$(VLLM_VERSIONS),$(VLLM)/$(version)/installed)
	set -e; for version in $(VLLM_VERSIONS); do \
		echo "vLLM $$version"; timeout 150 $(VLLM)/$$version/bin/python -m pytest -q tests/vllm; \
	done

$(VLLM)/common/installed: $(INSTALLED) tests/vllm/requirements.txt
	$(call environment,$(VENV))
	$(PIP) --python $(@D)/bin/python install -q --no-compile -r tests/vllm/requirements.txt
	touch $@

$(VLLM)/%/installed: $(VLLM)/common/installed tests/vllm/requirements-%.txt
	$(call environment,$(VENV) $(VLLM)/common)
	$(PIP) --python $(@D)/bin/python install -q --no-compile --no-deps vllm==$* $(BESIDE_$*)
	$(PIP) --python $(@D)/bin/python install -q --no-compile -r tests/vllm/requirements-$*.txt 'numpy<2'
	touch $@

# Attention in the diffusion networks of mindone, in an environment of its own over $(VENV).
test-mindone: $(MINDONE)/installed
	timeout 540 $(MINDONE)/bin/python -m pytest -q tests/mindone

$(MINDONE)/installed: $(INSTALLED) tests/mindone/requirements.txt
	$(call environment,$(VENV))
	$(PIP) --python $(@D)/bin/python install -q --no-compile -r tests/mindone/requirements.txt
	touch $@

# Reports in Debian's chromium, which is installed where that may be done; else they are skipped.
test-browser: $(BROWSER)/installed
	command -v chromium > /dev/null || { $(ROOT_APT) update -qq && $(ROOT_APT) install -y -qq chromium; } \
		> build/chromium.log 2>&1 || true
	if command -v chromium > /dev/null; then \
		timeout 300 $(BROWSER)/bin/python -m pytest -q tests/browser; \
	else echo "no chromium, and none could be installed (build/chromium.log): the pages are not opened"; fi

$(BROWSER)/installed: $(INSTALLED) tests/browser/requirements.txt
	$(call environment,$(VENV))
	$(PIP) --python $(@D)/bin/python install -q --no-compile -r tests/browser/requirements.txt
	touch $@

# Clients of `ms-quant serve` - openai, lm_eval and curl - in an environment of their own over $(VENV).
test-harness: $(HARNESS)/installed
	timeout 240 $(HARNESS)/bin/python -m pytest -q tests/harness

$(HARNESS)/installed: $(INSTALLED) tests/harness/requirements.txt
	$(call environment,$(VENV))
	$(PIP) --python $(@D)/bin/python install -q --no-compile -r tests/harness/requirements.txt
	touch $@

# An environment that sees the packages of others.
define environment
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c 'import site, sys, pathlib; \
		found = [str(next(pathlib.Path(p).resolve().glob("lib/*/site-packages"))) for p in sys.argv[2:]]; \
		place = next(pathlib.Path(sys.argv[1]).glob("lib/*/site-packages")); \
		(place / "others.pth").write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in found))' \
		$(@D) $(1)
endef

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell git ls-files '*.cpp' '*.h')

format: $(INSTALLED)
	$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(shell git ls-files '*.cpp' '*.h')

# The documentation site, in build/site. A warning or a link that leads nowhere fails it.
docs: $(INSTALLED)
	rm -rf build/site
	$(BIN)/python -m sphinx -q -W --keep-going -E -d build/doctrees -b html docs build/site
	@echo "open build/site/index.html"

bench: $(INSTALLED)
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/unzip.py
	$(BIN)/python benchmarks/linear.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/quantization_speed.py
	$(BIN)/python benchmarks/rate.py models/stdlib-qwen3-6m --calib models/text/calibration.txt --heldout models/text/heldout.txt

# Every scheme with every algorithm; hours. What benchmarks/accuracy.json has is kept.
accuracy: $(INSTALLED)
	$(BIN)/python benchmarks/accuracy.py models/stdlib-qwen3-6m --calib models/text/calibration.txt --heldout models/text/heldout.txt --windows 32 --json benchmarks/accuracy.json

# The same of SmolLM2-135M-Instruct, which nobody here trained; a night. `ACCURACY_ROWS='--only "W8A8 *"'`
# measures those rows alone.
accuracy-smollm2: build/smollm2
	$(BIN)/python benchmarks/accuracy.py $< --calib models/prose/calibration.txt --heldout models/prose/heldout.txt --samples 16 --windows 24 --no-twin --json build/accuracy_smollm2.json --table build/accuracy_smollm2.md $(ACCURACY_ROWS)

build/smollm2: | $(INSTALLED)
	mkdir -p build
	$(BIN)/python tools/make_smollm2.py $@

# The decoder under sanitizers, guided by coverage, and the kernels on random linears.
# FUZZ_KEEP=--keep adds what it finds to the corpus.
fuzz: fuzz-decoder fuzz-kernels

fuzz-decoder: build/fuzz/fuzz_unzip
	$< tests/sparse_compress/fuzz_corpus --seconds $(FUZZ_SECONDS) $(FUZZ_KEEP)

fuzz-kernels: build/fuzz/check_kernels
	$< $(FUZZ_SECONDS) $(shell date +%s)

# The kernels for aarch64 under an emulator; needs g++-aarch64-linux-gnu and qemu-user.
test-aarch64: build/aarch64/check_kernels
	qemu-aarch64 -cpu max $< $(FUZZ_SECONDS)

build/aarch64/check_kernels: $(KERNEL_SOURCES) $(wildcard $(KERNELS)/*)
	mkdir -p $(@D)
	$(ARM)-g++ $(KERNEL_FLAGS) -O3 -march=armv8.2-a+dotprod+i8mm -c $(KERNELS)/neon_i8mm.cpp \
		-o $(@D)/neon_i8mm.o
	$(ARM)-g++ $(KERNEL_FLAGS) -O3 -static -march=armv8.2-a+dotprod -DMSQ_WITH_NEON_DOT \
		-DMSQ_WITH_NEON_I8MM $(KERNEL_SOURCES) $(KERNELS)/scalar.cpp $(KERNELS)/neon_dot.cpp \
		$(@D)/neon_i8mm.o -o $@

# Of the instruction sets those that the compiler builds for everywhere on this kind of processor.
CHECKED = scalar
ifeq ($(shell uname -m),x86_64)
CHECKED += avx2 avx512_vnni amx amx_product
CHECKED_FLAGS = -DMSQ_WITH_AVX2 -DMSQ_WITH_AVX512_VNNI -DMSQ_WITH_AMX -DMSQ_WITH_AMX_PRODUCT
AVX512_FLAGS = -mavx512f -mavx512bw -mavx512dq -mavx512vl
endif
CHECKED_OBJECTS = $(patsubst %,build/fuzz/kernels/%.o,$(CHECKED) $(basename $(notdir $(KERNEL_SOURCES))))
build/fuzz/kernels/avx2.o: ISA = -mavx2 -mfma
build/fuzz/kernels/avx512_vnni.o: ISA = $(AVX512_FLAGS) -mavx512vnni
build/fuzz/kernels/amx.o: ISA = $(AVX512_FLAGS) -mavx512vnni -mamx-tile -mamx-int8 -mamx-bf16
build/fuzz/kernels/amx_product.o: ISA = $(AVX512_FLAGS) -mavx512bf16 -mamx-tile -mamx-bf16

$(patsubst %,build/fuzz/kernels/%.o,$(CHECKED)): build/fuzz/kernels/%.o: $(KERNELS)/%.cpp $(wildcard $(KERNELS)/*)
	mkdir -p $(@D)
	$(CXX) $(ISA_FLAGS) $(ISA) -c $< -o $@

build/fuzz/kernels/%.o: $(KERNELS)/%.cpp $(wildcard $(KERNELS)/*)
	mkdir -p $(@D)
	$(CXX) $(FUZZ_FLAGS) $(KERNEL_FLAGS) $(CHECKED_FLAGS) -c $< -o $@

build/fuzz/check_kernels: $(CHECKED_OBJECTS)
	$(CXX) $(FUZZ_FLAGS) $(KERNEL_FLAGS) $^ -o $@

build/fuzz/%.o: $(CODEC)/%.cpp $(wildcard $(CODEC)/*.h)
	mkdir -p $(@D)
	$(CXX) $(FUZZ_FLAGS) -fsanitize-coverage=trace-pc -c $< -o $@

build/fuzz/fuzz_unzip: $(CODEC)/fuzz_unzip.cpp $(TRACED)
	$(CXX) $(FUZZ_FLAGS) $^ -o $@ -pthread

$(INSTALLED): pyproject.toml CMakeLists.txt $(wildcard sparse_compress/codec/src/* ms_quant/kernels/src/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[mindspore,test,docs]'
	touch $@

clean:
	rm -rf $(VENV) build demo-output
