# make demo    see attention move to a region of a photograph (writes demo.png)
# make test    all tests, against the newest transformers 5 and against 4.57
# make bench   the benchmarks of bench/, side by side in one run; appends rows to bench/results/
# make lint    ruff and mypy
# Each sets up what it needs, in virtual environments of its own; python3 with venv is all that must be there.

PYTHON ?= python3
VENV ?= .venv
VENV4 ?= .venv-transformers4
PIP_FLAGS ?= --quiet --disable-pip-version-check
DEMO_FLAGS ?=
TEST_FLAGS ?=

demo_ready := $(VENV)/.demo-ready
test_ready := $(VENV)/.test-ready
dev_ready := $(VENV)/.dev-ready
test4_ready := $(VENV4)/.test-ready

.PHONY: demo test test-slow bench lint clean

demo: $(demo_ready)
	$(VENV)/bin/python -m finegrain_ops demo $(DEMO_FLAGS)

# The Triton kernels run in the interpreter, which must be chosen before they are imported: a process of their own.
test: $(test_ready) $(test4_ready)
	$(VENV)/bin/python -m pytest $(TEST_FLAGS)
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m triton $(TEST_FLAGS)
	$(VENV4)/bin/python -m pytest tests/integrations $(TEST_FLAGS)

test-slow: $(test_ready)
	FINEGRAIN_TEST_ALL=1 $(VENV)/bin/python -m pytest -m slow $(TEST_FLAGS)
	FINEGRAIN_TEST_ALL=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -m "slow and triton" $(TEST_FLAGS)

bench: $(test_ready)
	$(VENV)/bin/python -m pytest bench --benchmark-only $(TEST_FLAGS)

lint: $(dev_ready)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/bin/python $(VENV4)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: the pinned packages need Python 3.11 or later, \
	this is " + sys.version.split()[0] + "; choose one with make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(dir $(@D))

$(demo_ready): pyproject.toml constraints/common.txt constraints/transformers5.txt | $(VENV)/bin/python
	@echo "Installing what the demo needs into $(VENV) ..."
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints/transformers5.txt --editable ".[demo]"
	touch $@

$(test_ready): pyproject.toml constraints/common.txt constraints/transformers5.txt | $(VENV)/bin/python
	@echo "Installing what the tests need into $(VENV) ..."
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints/transformers5.txt --editable ".[test]"
	touch $@

$(dev_ready): pyproject.toml constraints/common.txt constraints/transformers5.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints/transformers5.txt --editable ".[dev]"
	touch $@

$(test4_ready): pyproject.toml constraints/common.txt constraints/transformers4.txt | $(VENV4)/bin/python
	@echo "Installing what the tests need, with transformers 4.57, into $(VENV4) ..."
	$(VENV4)/bin/python -m pip install $(PIP_FLAGS) --constraint constraints/transformers4.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV4) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.png
