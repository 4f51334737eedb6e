# `make quickstart` and `make test` are all the set-up there is; both make the environment when it is not there.
VENV ?= .venv
PYTHON ?= python3
STORAGE ?= storage
JOBS ?= 2
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Set to `required` where tests/interpreter must not be skipped, as in CI.
KERNELS ?= wanted
# On a terminal pip shows what it fetches, with a bar; a log of CI has a line a step. (Within $( ) only stderr is make's.)
PIP = $(BIN)/pip install --disable-pip-version-check -c constraints.txt $$(test -t 2 || echo --quiet)

.PHONY: install kernels quickstart test test-interpreter test-all lint clean

install: $(STAMP)

# torch goes first: DeepSpeed's set-up imports it. DS_BUILD_OPS=0: no compiler is needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	@echo "install 1/3: an environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "install 2/3: torch and its CUDA libraries, about 3 GB to fetch: some minutes"
	@$(PIP) torch setuptools wheel
	@echo "install 3/3: Ray, DeepSpeed, MLflow and the rest: some minutes more"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation -e '.[test,quickstart]'
	@touch $@
	@echo "install: done"

# The kernel packages, for tests/interpreter alone and in a folder of their own (its conftest.py says why). Without CUDA's
# compiler: FORCE_BUILD, so that no wheel is looked for, and SKIP_CUDA_BUILD.
kernels: $(VENV)/kernels/.installed

$(VENV)/kernels/.installed: constraints.txt | install
	@echo "kernels: mamba_ssm and causal_conv1d, their Python and Triton files"
	@rm -rf $(@D)
	@MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE \
		$(PIP) --no-build-isolation --no-deps --target $(@D) mamba-ssm causal-conv1d
	@touch $@

quickstart: install
	$(BIN)/mlmamba run quickstart --storage $(STORAGE)

# Small tests run side by side, each in one thread. Those that start Ray spend half their time waiting for processes to
# start, so two files run at once, the longest first. `make test-all` runs them one by one: some of the slow ones need
# the whole machine.
test: install lint test-interpreter
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m "not slow" tests/unit tests/parity
	$(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 10 -m "not slow" tests/integration

# The CUDA path's kernels in Triton's interpreter, alone in their process.
test-interpreter: install
	@$(MAKE) --no-print-directory kernels || { test "$(KERNELS)" != required && echo \
		"kernels: could not be built here (above), so tests/interpreter is skipped"; }
	MLMAMBA_TEST_KERNELS_REQUIRED=$(filter required,$(KERNELS)) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 \
		$(BIN)/pytest -q tests/interpreter

test-all: install lint test-interpreter
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal tests/unit tests/parity
	$(BIN)/pytest -q tests/integration

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
