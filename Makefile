# Everything a newcomer runs. Each target sets up what it needs in $(VENV); Python >= 3.10 and a C++ compiler suffice.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*)
CXX_FILES := $(wildcard csrc/*.cpp csrc/*/*) $(wildcard tests/emulation/*.h tests/core/*)

.PHONY: demo demo-quick test lint format bench bench-peers wheel clean

demo: $(VENV)/.demo ## fine-tune Gemma-3-270M in bf16, int8 and int4 and compare
	$(BIN)/python -m qkernels demo

demo-quick: $(VENV)/.demo
	$(BIN)/python -m qkernels demo --quick

test: $(VENV)/.test ## run the whole test suite
	$(BIN)/python -m pytest

lint: $(VENV)/.lint ## check style without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.test ## time the linear layers against torch and the limits of this machine
	$(BIN)/python -m qkernels bench linear

bench-peers: $(VENV)/.test ## the same with other libraries, which are installed into $(VENV)
	$(BIN)/pip install -q "$(TORCH)" -r benchmarks/peers.txt
	$(BIN)/python -m qkernels bench linear --peers

wheel: $(VENV)/.venv
	$(BIN)/pip wheel -q --no-build-isolation --no-deps -w dist .

# torch first and on its own: a bare requirement on torch would pull a build with gigabytes of CUDA libraries.
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)" "setuptools>=77" wheel ninja pybind11 numpy
	touch $@

$(VENV)/.demo: $(VENV)/.venv $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.venv $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.venv
	$(BIN)/pip install -q ruff==0.17.6 clang-format==23.1.5
	touch $@

clean:
	rm -rf build dist *.egg-info qkernels/*.so
