# make demo   install, run the whole pipeline on the real 135M student, ask it three questions
# make test   install, run the tests          make check   formatter, linter, types
# make dev    open the Dagster UI (of another profile: make dev PROFILE=local)    make install only the environment

PYTHON ?= python3
PROFILE ?= quick
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test check dev install sandbox clean

demo: install sandbox
	@$(BIN)/cogumi demo --profile quick

test: install sandbox
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --durations=10

check: install
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

dev: install
	@$(BIN)/cogumi dev --profile $(PROFILE)

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	@command -v c++ >/dev/null || command -v g++ >/dev/null || { echo "A C++ compiler is needed for llama-cpp-python: apt-get install g++ (or your system's equivalent)"; exit 1; }
	@echo "[1/4] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade "pip>=24"
	@echo "[2/4] torch"
	@$(BIN)/python -m pip install -q --progress-bar on -c constraints.txt torch
	@echo "[3/4] llama-cpp-python: compiled once, about 7 minutes on two cores (pip then keeps the wheel)"
	@bash scripts/with-clock $(BIN)/python -m pip install -q -c constraints.txt llama-cpp-python
	@echo "[4/4] everything else"
	@bash scripts/with-clock $(BIN)/python -m pip install -q -c constraints.txt -e '.[all,test,check]'
	@touch $(STAMP)

# Model-written code runs only inside bubblewrap; without it those checks say "not run".
sandbox:
	@bash scripts/install-bubblewrap

clean:
	rm -rf $(VENV) .cogumi .dagster_home
