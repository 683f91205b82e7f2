# make train    train the digits example on two Ray workers        make test     run the tests
# make lint     ruff and mypy                                      make bench    run the benchmarks
# make clean    remove .venv and everything that was built
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

.PHONY: train test lint bench setup clean
.DEFAULT_GOAL := setup

train: setup
	$(BIN)/python examples/train_digits.py --workers 2

test: .venv/emulation
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal tests

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
