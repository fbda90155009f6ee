# make serve PORT=8000 ARGS="--model … --max-model-len 131072"    make test    make lint    make bench
# Needs python3 >= 3.11 and, for the C++ core, g++; cmake and ninja come from pip when the machine has none.

PYTHON ?= python3
PORT ?= 8000
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CORE := $(wildcard CMakeLists.txt retrieval/csrc/*.cpp retrieval/csrc/*.h retrieval/csrc/*.hpp)
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt

.PHONY: serve test test-slow lint format bench clean

serve: $(STAMP)
	$(BIN)/retrieval-server serve --port $(PORT) $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -q -m "not slow" $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One question per file; each prints its own baseline and ends with one JSON line. `make bench BENCH=decode ARGS=…`
# runs one; load and throughput need a running server, fairness takes minutes, and capture only records what index can
# read.
BENCH ?= prefill decode index
bench: $(STAMP)
	@set -e; for name in $(BENCH); do echo "== $$name"; $(BIN)/python scripts/bench/$$name.py $(ARGS); done

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("python >= 3.11 is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# Reinstalled only when the packaging or the C++ sources change; Python files are used in place.
$(STAMP): pyproject.toml constraints.txt $(CORE) | $(BIN)/python
	@if [ -f CMakeLists.txt ] && $(PIP_INSTALL) -e '.[dev]'; then :; else \
	  echo "The C++ core was not built (see above): going on without it; faiss and hnswlib serve instead." >&2; \
	  $(PIP_INSTALL) -e '.[dev]' -C wheel.cmake=false; \
	fi
	@touch $@

clean:
	rm -rf build dist *.egg-info $(STAMP)
