PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo audit tables docs test test-torch lint clean
.NOTPARALLEL:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.bench  ## train on the digits, predict the test loss, draw it
	$(BIN)/python -m benchmarks.digits

audit: $(VENV)/.bench  ## train on digits with wrong labels, make a page that shows which they are
	$(BIN)/python examples/audit.py

tables: $(VENV)/.bench  ## write the numbers of benchmarks/results into the README and the manual
	$(BIN)/python -m benchmarks.tables

# Else Material tells of its successor on every build.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs  ## build the manual in site/, with its notebooks; any warning is an error
	$(BIN)/python docs/notebooks.py
	$(BIN)/mkdocs build --strict --quiet

# One thread per worker: the workers already fill the cores. Each begins with half of the tests in their order, so that
# what the tests of a file share is mostly made once.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev  ## run every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m ""

# As `make test-torch VERSION=2.15.0 TESTS="tests/optim tests/capture"`; without TESTS, all of them.
test-torch: export OMP_NUM_THREADS := 1
test-torch: .venv-torch-$(VERSION)/.dev  ## run TESTS, or every test, beside torch VERSION
	$(<D)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "" $(TESTS)

lint: $(VENV)/.dev  ## check style, types, and tables and numbers of README and manual
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m benchmarks.tables --check

clean:  ## remove the environments and every cache
	rm -rf $(VENV) .venv-torch-* build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted install starts again; both live in the environment they describe.
$(VENV)/.bench: pyproject.toml constraints.txt
	$(call install,-c constraints.txt -e '.[bench]')
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,-c constraints.txt -e '.[bench$(comma)dev$(comma)clients]')
	touch $(VENV)/.bench $(VENV)/.docs $@

$(VENV)/.docs: pyproject.toml constraints.txt
	$(call install,-c constraints.txt -e '.[docs]')
	touch $@

.venv-torch-%/.dev: pyproject.toml
	$(call install,torch==$* -e '.[bench$(comma)dev]')
	touch $@

.venv-torch-/.dev:
	$(error say which torch: make test-torch VERSION=2.15.0)

# A CUDA build of torchvision beside a CPU build of torch does not import, and takes laplace-torch down with it.
define install
$(PYTHON) -m venv $(@D)
$(@D)/bin/python -m pip install $(1)
if $(@D)/bin/python -m pip show -q torchvision 2>/dev/null && ! $(@D)/bin/python -c 'import torchvision' 2>/dev/null; \
	then $(@D)/bin/python -m pip uninstall -y torchvision; fi
endef
comma := ,
