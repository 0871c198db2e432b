# Verbs: demo, test, simulate, lint, sanitize, bench, goodput, clean. Each prepares the virtual environment first; that
# is slow only once.

PYTHON ?= python3
# On a machine that should not fetch the CUDA build:  make TORCH_INDEX=https://download.pytorch.org/whl/cpu ...
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTEST_FLAGS ?= -n 2 --dist loadgroup
SIMULATE_FLAGS ?= --count 10000 --processes 2

VENV := .venv
SANITIZED := .venv-sanitized
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := $(wildcard CMakeLists.txt csrc/*)
FORMATTED := $(wildcard csrc/*.cpp csrc/*.hpp csrc/*.c csrc/*.h)

.PHONY: demo test simulate lint sanitize bench goodput clean install
.DELETE_ON_ERROR:

demo: install
	$(BIN)/python docs/examples/demo.py $(DEMO_FLAGS)

# Most tests start processes, hundreds in all: what they import is compiled once, also where the environment says not to.
test: export PYTHONDONTWRITEBYTECODE =
test: install
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

# Jobs on several nodes with everything that can go wrong: three minutes on two cores.
simulate: install
	$(BIN)/python -m tests.simulate $(SIMULATE_FLAGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict ckptd
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

# The tests of the extension against a build with AddressSanitizer and UndefinedBehaviorSanitizer, in an environment of
# its own. The interpreter is not built with them, so their runtime has to be there before it; it never frees everything.
sanitize: $(SANITIZED)/installed
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	$(SANITIZED)/bin/python -m pytest --noconftest -p no:cacheprovider tests/native

$(SANITIZED)/installed: pyproject.toml $(NATIVE)
	$(PYTHON) -m venv $(SANITIZED)
	$(SANITIZED)/bin/python -m pip --disable-pip-version-check --quiet install 'scikit-build-core>=0.10' 'nanobind>=2.4' \
		cmake ninja numpy psutil pyeclib pytest hypothesis
	$(SANITIZED)/bin/python -m pip --disable-pip-version-check --quiet install --no-build-isolation --no-deps \
		-C cmake.define.CKPTD_SANITIZE=address,undefined --editable .
	@touch $@

# Throughput with and without each way of saving; peers get environments of their own under bench-results.
bench: install
	$(BIN)/python -m benchmarks $(BENCH_FLAGS)

# The same training under one schedule of SIGKILLs.
goodput: install
	$(BIN)/python -m benchmarks.goodput $(GOODPUT_FLAGS)

install: $(VENV)/installed

# Torch before all else and by itself, so that nothing later picks another build of it.
$(VENV)/torch-installed:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("ckptd needs Python 3.11 or newer, found %s; set PYTHON=..." % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@touch $@

# No build isolation: an isolated build would resolve and fetch its own tools on every change of csrc/.
$(VENV)/installed: $(VENV)/torch-installed pyproject.toml $(NATIVE)
	$(PIP) install 'scikit-build-core>=0.10' 'nanobind>=2.4' cmake ninja
	$(PIP) install --no-build-isolation --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(SANITIZED) build dist bench-results demo-run .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
