# The two commands of the README, and what developers need; `make help` lists them.

PYTHON ?= python3
VENV := .venv
PEERS := benchmarks/peers/.venv
BIN := $(VENV)/bin
HERE := PATH="$$(pwd -P)/$(BIN):$$PATH"
UV = $$(command -v uv || echo $(BIN)/uv)
# a worker takes whole files, whose fixtures it keeps, in the order of tests/conftest.py
BALANCED = --dist loadfile --no-loadscope-reorder

export DO_NOT_TRACK = true
export DVC_NO_ANALYTICS = 1
# a works network that looks into TLS has its certificate in the system's store; uv looks only into its own by default
export UV_SYSTEM_CERTS ?= true

ifneq ($(findstring :,$(CURDIR)),)
$(error the path of this checkout has a colon, which ends a folder in PATH: rename $(CURDIR))
endif

# The environment's scripts name their Python by its full path. A link to another checkout's environment is left alone.
ifeq ($(shell test ! -e $(BIN)/panda-ad || test -L $(VENV) || grep -qsF "$$(pwd -P)/$(BIN)/" $(BIN)/panda-ad || echo moved),moved)
$(VENV)/.ready: build-anew
endif
.PHONY: build-anew
build-anew:
	@echo "this checkout has been moved: its environment is built anew"
	@rm -rf $(VENV)

.PHONY: help run test test-fast coverage chaos fuzz peers ui lint format lock
run: $(VENV)/.ready       ## everything: environment, data, pipeline, registration, promotion; then says where to look
	@$(HERE) panda-ad run

test: $(VENV)/.ready-dev lint   ## everything the tests need, and all tests
	@$(HERE) pytest -n 3 $(BALANCED) --durations=25

test-fast: $(VENV)/.ready-dev   ## the tests that start no server, run no whole pipeline and take no seconds
	@$(HERE) pytest -n 2 $(BALANCED) -m "not slow" tests/unit

coverage: $(VENV)/.ready-dev    ## lines that the tests in tests/unit reach
	@$(HERE) pytest -n 2 $(BALANCED) --cov=panda_ad --cov-report=term-missing:skip-covered tests/unit

chaos: $(VENV)/.ready-dev       ## 200 kills at random moments, compared with undisturbed runs (an hour)
	@$(HERE) python benchmarks/chaos.py --kills 200

fuzz: $(VENV)/.ready-dev        ## 10,000 random inputs for each thing that comes from outside
	@PANDA_FUZZ=$${PANDA_FUZZ:-10000} $(HERE) pytest -n 2 --timeout=0 tests/unit/test_fuzz*.py

peers: $(PEERS)/.ready    ## beside anomalib's PatchCore, in an environment of its own (several GB), on the sample's categories
	@$(HERE) dvc checkout --quiet data.dvc 2>/dev/null || $(HERE) dvc pull --quiet data.dvc
	@OMP_NUM_THREADS=1 MALLOC_MMAP_THRESHOLD_=4194304 $(PEERS)/bin/python -W ignore benchmarks/peers/compare.py data/*

ui: $(VENV)/.ready        ## MLflow, Prefect and the inspector's page on loopback, with the deployments
	@$(HERE) panda-ad ui

lint: $(VENV)/.ready-dev  ## ruff (rules and format), mypy, import contracts
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

format: $(VENV)/.ready-dev      ## let ruff format and correct what it can
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

help:                     ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# bytecode is compiled at installation: otherwise the first import of each library costs seconds in every stage
$(VENV)/.ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "panda-ad needs Python 3.11 or newer; set PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || test -x $(BIN)/uv || $(BIN)/pip install --quiet --disable-pip-version-check uv
	@echo "installing the locked environment into $(VENV) (several GB, once)"
	@$(UV) pip install $$(test -t 2 || echo --quiet) --python "$$(pwd -P)/$(BIN)/python" --compile-bytecode --require-hashes -r requirements.lock
	@$(UV) pip install --quiet --python "$$(pwd -P)/$(BIN)/python" --no-deps -e .
	@touch $@

$(PEERS)/.ready: benchmarks/peers/requirements.lock $(VENV)/.ready
	@test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	@$(UV) pip install --quiet --python $(PEERS)/bin/python --require-hashes -r benchmarks/peers/requirements.lock
	@touch $@

# browser tests drive Debian's Chromium; without it they say why they are skipped
$(VENV)/.ready-dev: $(VENV)/.ready
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null; } \
	    || echo "no chromium: the browser tests will be skipped"
	@touch $@

lock:                     ## resolve the dependencies of pyproject.toml anew
	@$(UV) pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	    --extra dev pyproject.toml -o requirements.lock
	@$(UV) pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	    benchmarks/peers/requirements.in -o benchmarks/peers/requirements.lock
