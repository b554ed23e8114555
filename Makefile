# make demo          ask a small trained model about a picture: plainly, with CoF, with DualFocus (writes demo.png)
# make test          all tests, against the newest transformers 5 and against 4.57, and make aot
# make aot           compile every shipped kernel configuration for sm_80 and sm_90, without a GPU: no spills, and no
#                    worse than bench/results/machine-code.json (AOT_FLAGS=--accept writes it, --show prints it); the
#                    same for the CUDA C++ kernels from sm_70 on, with CUDA_AOT_FLAGS and cuda-machine-code.json
# make ptx           execute the compiled kernels on a CPU, and count: docs/compiled_kernels.md
# make eval          what the methods do to the answers of the small model, on held-out pictures, in about 25 minutes;
#                    tables and plots in bench/results/quality/
# make train         the small model from nothing, in half an hour to an hour on two cores; killed, the same command goes on
# make bench         the benchmarks of bench/, side by side in one run
# make bench-report  the tables and plots of the stored rows, in the README and docs/benchmarks/
# make lint          ruff, mypy and clang-format
# Each sets up what it needs, in virtual environments of its own; python3 with venv is all that must be there.
#
# make gpu           on a machine with an NVIDIA GPU and PyTorch: compiles the CUDA kernels, runs the tests there, then
#                    the quick benchmarks, whose rows are appended to bench/results/; in under 9 minutes, with PYTHON as
#                    it is, nothing is installed

PYTHON ?= python3
VENV ?= .venv
VENV4 ?= .venv-transformers4
LMMS_EVAL ?= .venv-lmms-eval
PIP_FLAGS ?= --quiet --disable-pip-version-check
DEMO_FLAGS ?=
EVAL_FLAGS ?= --readme README.md
TRAIN_FLAGS ?= --output finegrain_ops/tiny_llava/weights
TEST_FLAGS ?=
WORKERS ?= --numprocesses 2 --dist worksteal
AOT_FLAGS ?=
CUDA_AOT_FLAGS ?=
GPU_FLAGS ?=

demo_ready := $(VENV)/.demo-ready
test_ready := $(VENV)/.test-ready
dev_ready := $(VENV)/.dev-ready
test4_ready := $(VENV4)/.test-ready
lmms_eval_ready := $(LMMS_EVAL)/.ready

.PHONY: demo eval train test test-slow aot ptx bench bench-report gpu lint clean

demo: $(demo_ready)
	$(VENV)/bin/python -m finegrain_ops demo $(DEMO_FLAGS)

eval: $(demo_ready)
	$(VENV)/bin/python -m bench.quality $(EVAL_FLAGS)

train: $(demo_ready)
	$(VENV)/bin/python -m finegrain_ops.tiny_llava.training $(TRAIN_FLAGS)

# The Triton kernels run in the interpreter, which must be chosen before they are imported: a process of their own.
# lmms-eval has an environment of its own, so that the other tests run without it, as users do.
test: $(test_ready) $(test4_ready) $(lmms_eval_ready)
	$(VENV)/bin/python -m pytest $(WORKERS) $(TEST_FLAGS)
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest $(WORKERS) -m triton $(TEST_FLAGS)
	$(VENV4)/bin/python -m pytest $(WORKERS) tests/integrations tests/methods tests/tiny_llava tests/training $(TEST_FLAGS)
	$(LMMS_EVAL)/bin/python -m pytest tests/integrations/test_lmms_eval.py $(TEST_FLAGS)
	$(VENV)/bin/python -m bench.aot $(AOT_FLAGS)
	$(VENV)/bin/python -m bench.cuda_aot $(CUDA_AOT_FLAGS)

test-slow: $(test_ready)
	FINEGRAIN_TEST_ALL=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest $(WORKERS) -m "slow and triton" $(TEST_FLAGS)
	FINEGRAIN_PTX=80 $(VENV)/bin/python -m pytest $(WORKERS) tests/triton_kernels -m triton $(TEST_FLAGS)
	FINEGRAIN_PTX=90 $(VENV)/bin/python -m pytest $(WORKERS) tests/triton_kernels -m triton $(TEST_FLAGS)
	$(VENV)/bin/python -m bench.aot --all $(AOT_FLAGS)
	$(VENV)/bin/python -m bench.cuda_aot --all $(CUDA_AOT_FLAGS)

aot: $(test_ready)
	$(VENV)/bin/python -m bench.aot $(AOT_FLAGS)
	$(VENV)/bin/python -m bench.cuda_aot $(CUDA_AOT_FLAGS)

ptx: $(test_ready)
	PYTHONPATH=tests $(VENV)/bin/python -m ptx.table

bench: $(test_ready)
	$(VENV)/bin/python -m pytest bench --benchmark-only $(TEST_FLAGS)

bench-report: $(test_ready)
	$(VENV)/bin/python -m bench.report --readme README.md --plots docs/benchmarks

gpu:
	$(PYTHON) -m bench.gpu $(GPU_FLAGS)

lint: $(dev_ready)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*.cuh tests/cuda_on_cpu/*.h tests/cuda_on_cpu/*.cpp

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

# Its environment sees the packages of $(VENV), but not the other way round.
$(lmms_eval_ready): constraints/lmms_eval.txt $(test_ready)
	@echo "Installing lmms-eval into $(LMMS_EVAL) ..."
	$(VENV)/bin/python -m venv --clear $(LMMS_EVAL)
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(LMMS_EVAL)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of-the-tests.pth"
	$(LMMS_EVAL)/bin/python -m pip install $(PIP_FLAGS) --no-deps --requirement constraints/lmms_eval.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV4) $(LMMS_EVAL) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis demo.png demo-photograph.png
