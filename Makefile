# PYTHON=path      the Python 3.11 or 3.12 to build .venv from (default: the first on the PATH)
# DETECTRON2=      pypi: sal-detectron2, a third party's republication of Detectron2 (April 2024), without compiled operators
#                  source: the official Detectron2, built here (needs git and a C++ compiler)
#                  installed: the one that PYTHON has
#                  (default: installed if PYTHON has one that works, else pypi)
PYTHON ?=
DETECTRON2 ?=
export PYTHON DETECTRON2

VENV_PYTHON := .venv/bin/python

.PHONY: help setup demo test test-unit test-slow docs lint format licenses sbom lock clean

help:
	@echo "make setup      the environment, in .venv (PYTHON=path, DETECTRON2=pypi|source|installed)"
	@echo "make demo       distillation from end to end on a small synthetic set"
	@echo "make test       lint and the fast tests"
	@echo "make test-unit  the unit tests: losses, methods, detectors, configs"
	@echo "make test-slow  the slow tests"
	@echo "make docs       the documentation site, in output/site"
	@echo "make lint       style and types; make format fixes the style where it can"
	@echo "make licenses   docs/licenses.md: the licences of the packages in .venv"
	@echo "make sbom       output/sbom.json: the packages in .venv as CycloneDX"
	@echo "make lock       requirements/lock*.txt anew: hashes for the versions in requirements/"
	@echo "make clean      removes caches and build leftovers (.venv and output/ stay)"

setup:
	@bash tools/setup_env.sh

demo: setup
	$(VENV_PYTHON) -m kd_d2 demo

test: lint
	$(VENV_PYTHON) -m pytest

test-unit: setup
	$(VENV_PYTHON) -m pytest -m "unit and not slow"

test-slow: setup
	$(VENV_PYTHON) -m pytest -m slow

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
