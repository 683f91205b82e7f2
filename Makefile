# make train    train the digits example on two Ray workers        make test     run the tests
# make lint     ruff and mypy                                      make bench    run the benchmarks
# make clean    remove .venv and everything that was built
#
# make test-emulated  the front door's tests with workers on the emulated GPU
# make test-gpu       tests on the GPU of this machine             make sanitize   memory errors of kernels there
# make bench-gpu      measures there and writes docs/benchmarks/gpu.md
#
# The first of them sets up .venv. Another interpreter: make train PYTHON=python3.12. Tests run in two processes;
# make test JOBS=4 runs them in four.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
ROOMS := autograd scheduler cluster runtime
# One BLAS thread per process: workers share the cores, and results repeat.
export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1

# What targets for GPUs run with: .venv, with CuPy for CUDA 13 (or CUDA=12), or a Python that has everything,
# as in make test-gpu WITH=python3.
CUDA ?= 13
WITH ?=
GPU_PYTHON := $(or $(WITH),$(BIN)/python)
GPU_SETUP := $(if $(WITH),,.venv/gpu)
# What sanitize runs: memcheck, racecheck, initcheck or synccheck, on these tests.
TOOL ?= memcheck
SANITIZED ?= $(addprefix tests/cuda/test_,row_kernels.py optim_kernels.py random_kernels.py embedding_kernels.py \
  pool_kernels.py attention_kernels.py recurrent_kernels.py dnn_batch_norm.py fusion.py)

.PHONY: train test lint bench setup clean test-emulated test-gpu sanitize bench-gpu
.DEFAULT_GOAL := setup

train: setup
	$(BIN)/python examples/train_digits.py --workers 2

test: .venv/emulation
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

# Tests of the front door as they are, with workers of their process on a device: see tests/emulated_workers.py.
test-emulated: .venv/emulation
	PYTHONPATH=tests $(BIN)/python -m pytest -p emulated_workers -n $(JOBS) --dist worksteal -m "not ray" \
	  tests/front tests/acceptance

test-gpu: $(GPU_SETUP)
	$(GPU_PYTHON) -m pytest -n $(JOBS) --dist worksteal -m gpu tests
	PYTHONPATH=tests $(GPU_PYTHON) -m pytest -p emulated_workers --workers-on gpu -n $(JOBS) --dist worksteal \
	  -m "not ray and not gpu" tests/front tests/acceptance

# Graphs are left out: they need the memory pools that hide where arrays end.
sanitize: $(GPU_SETUP)
	MESHTAPE_EXACT_MEMORY=1 compute-sanitizer --tool $(TOOL) --error-exitcode 1 \
	  $(GPU_PYTHON) -m pytest -m gpu -k "not captur and not graph and not replay" $(SANITIZED)

# mypy does not see through an editable install, so it gets the packages as a tree of links.
lint: .venv/lint
	$(BIN)/ruff check .
	rm -rf .venv/tree && mkdir -p .venv/tree/meshtape
	ln -s $(CURDIR)/meshtape/* $(addprefix $(CURDIR)/,$(ROOMS)) .venv/tree/meshtape/
	cd .venv/tree && ../../$(BIN)/mypy --follow-imports=silent --config-file ../../pyproject.toml $(addprefix -p meshtape.,$(ROOMS))

# Figures go to build/benchmarks, the page and plots made of them to docs/benchmarks. torch's compiler keeps
# what it built.
bench: export TORCHINDUCTOR_CACHE_DIR = $(CURDIR)/build/inductor
bench: .venv/bench
	for name in machine all_reduce arrays record controller; do \
	  $(BIN)/python benchmarks/$$name.py --json build/benchmarks/$$name.json || exit 1; done
	$(BIN)/python benchmarks/train_step.py --contenders torch,fused,compile,ddp,jax1,jax2,mesh1,mesh2 \
	  --weak --probe --json build/benchmarks/train_step.json
	$(BIN)/python benchmarks/report.py

bench-gpu: $(GPU_SETUP) $(if $(WITH),,.venv/torch)
	$(GPU_PYTHON) benchmarks/gpu.py --json build/benchmarks/gpu.json --page docs/benchmarks/gpu.md

setup: .venv/installed

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "There is no '$(PYTHON)' here: install Python 3.11 or newer, or name it, as in make train PYTHON=python3.12"; \
	  exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "meshtape needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1); use make train PYTHON=python3.12"; \
	  exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet -e ".[examples,test]"
	touch $@

.venv/emulation: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[emulation]" \
	  || echo "No CuPy or NVRTC for this machine: tests of device code on the emulated GPU are left out."
	touch $@

.venv/gpu: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[cuda$(CUDA),cudnn$(CUDA),nvmath$(CUDA)]"
	touch $@

.venv/torch: .venv/installed
	$(BIN)/python -m pip install --quiet "torch>=2.4"
	touch $@

.venv/lint: .venv/installed
	$(BIN)/python -m pip install --quiet -e ".[lint]"
	touch $@

.venv/bench: .venv/installed
	$(BIN)/python -m pip install --quiet "torch==2.13.0+cpu" || echo "No CPU wheel of PyTorch here: taking PyPI's."
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	touch $@

clean:
	rm -rf .venv build dist out *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
