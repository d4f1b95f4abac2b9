# PYTHON=path      the Python 3.11 to 3.14 to build .venv from (default: the first on the PATH)
# DETECTRON2=      pypi: sal-detectron2, a third-party republication of Detectron2 (April 2024), without compiled operators
#                  source: the official Detectron2, built here (needs git and a C++ compiler)
#                  installed: the one in PYTHON
#                  (default: installed if PYTHON has a working one, else pypi)
PYTHON ?=
DETECTRON2 ?=
export PYTHON DETECTRON2

VENV_PYTHON := .venv/bin/python

# On a machine without a network, use the packages of make gpu-pack; see tools/gpu_pack.py.
GPU_PYTHON = $(if $(wildcard $(VENV_PYTHON)),$(VENV_PYTHON),$(or $(PYTHON),python3))
GPU_ENV = PYTHONPATH="$(CURDIR):$(CURDIR)/output/gpu-pack/site:$$PYTHONPATH"

# A process takes about 2 GiB; the tests of one file run in the same one.
PROCESSES := --numprocesses logical --maxprocesses 4 --dist loadscope

.PHONY: help setup demo test test-unit test-slow docs lint format licenses sbom lock clean gpu-check gpu-pack gpu-evidence

help:
	@echo "make setup      the environment, in .venv (PYTHON=path, DETECTRON2=pypi|source|installed)"
	@echo "make demo       end-to-end distillation on a small synthetic dataset"
	@echo "make test       lint and the fast tests"
	@echo "make test-unit  the unit tests: losses, methods, detectors, configs"
	@echo "make test-slow  the slow tests"
	@echo "make gpu-check  check a GPU's results and speed, in output/gpu-check (8 minutes)"
	@echo "make gpu-pack   packages and, with ARGS=\"--add PATH\", data for a GPU machine without a network"
	@echo "make gpu-evidence  the long comparison on a GPU, nine minutes at a time (ARGS: benchmarks/gpu_evidence.py --help)"
	@echo "make docs       the documentation site, in output/site"
	@echo "make lint       style and types; make format fixes the style"
	@echo "make licenses   docs/licenses.md: the licenses of the packages in .venv"
	@echo "make sbom       output/sbom.json: the packages in .venv as CycloneDX"
	@echo "make lock       regenerate requirements/lock*.txt: hashes for the versions in requirements/"
	@echo "make clean      remove caches and build files (keeps .venv and output/)"

setup:
	@bash tools/setup_env.sh

demo: setup
	$(VENV_PYTHON) -m kd_d2 demo

# The tests expect the default folder of Detectron2's datasets, without files.
test test-unit test-slow: export DETECTRON2_DATASETS = datasets
test test-unit test-slow: export PYTHONUTF8 = 1
test test-unit: export OMP_NUM_THREADS = 1

test: lint
	$(VENV_PYTHON) -m pytest $(PROCESSES)

test-unit: setup
	$(VENV_PYTHON) -m pytest $(PROCESSES) -m "unit and not slow"

test-slow: setup
	$(VENV_PYTHON) -m pytest -m slow

gpu-check:
	$(GPU_ENV) $(GPU_PYTHON) benchmarks/gpu_check.py $(ARGS)

gpu-evidence:
	$(GPU_ENV) $(GPU_PYTHON) benchmarks/gpu_evidence.py $(ARGS)

gpu-pack: setup
	$(VENV_PYTHON) tools/gpu_pack.py $(ARGS)

docs: setup
	$(VENV_PYTHON) -m pip install -q -e .[docs] --no-build-isolation
	PYTHONPATH=. $(VENV_PYTHON) -m mkdocs build

lint: setup
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m pyrefly check

format: setup
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

licenses sbom lock: setup
	@bash tools/supply.sh $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
