PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo tables test lint clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.bench  ## train on the digits, predict the test loss, draw it
	$(BIN)/python -m benchmarks.digits

tables: $(VENV)/.bench  ## write the numbers of benchmarks/results into the READMEs
	$(BIN)/python -m benchmarks.tables

# One thread per worker: the workers already fill the cores.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev  ## run every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS) -m ""

lint: $(VENV)/.dev  ## check style, types and the tables of the READMEs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m benchmarks.tables --check

clean:  ## remove the environment and every cache
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted install starts again; both live in the environment they describe.
$(VENV)/.bench: pyproject.toml constraints.txt
	$(call install,.[bench])
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,.[bench$(comma)dev])
	touch $(VENV)/.bench $@

# A CUDA build of torchvision beside a CPU build of torch does not import, and takes laplace-torch down with it.
define install
$(PYTHON) -m venv $(VENV)
$(BIN)/python -m pip install -c constraints.txt -e '$(1)'
if $(BIN)/python -m pip show -q torchvision 2>/dev/null && ! $(BIN)/python -c 'import torchvision' 2>/dev/null; \
	then $(BIN)/python -m pip uninstall -y torchvision; fi
endef
comma := ,
