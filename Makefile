# Two commands do everything on a machine with Python 3.11 or newer: make test, make demo.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: test quick thorough demo gpu study format docs coverage dist clean

test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

# What changes most often, in about a minute.
quick: $(INSTALLED)
	$(BIN)/pytest -n 2 -m "not slow and not exhaustive" -q

# Everything, the exhaustive tests too: half an hour.
thorough: $(INSTALLED)
	$(BIN)/pytest -n 2 -m ""

demo: $(INSTALLED)
	$(BIN)/python -m analysis.quickstart

# What needs a GPU: tests, and the overhead with steps captured as CUDA graphs.
gpu: $(INSTALLED)
	$(BIN)/pytest -m gpu
	$(BIN)/python -m analysis.benchmarks.overhead --device cuda --output analysis/results/overhead-cuda
	$(BIN)/python -m analysis.benchmarks.ensemble_speed --device cuda --output analysis/results/ensemble_speed-cuda

# All of the study that is not done yet, then its tables and figures: hours on a GPU, days on two cores.
# make study STUDY="--device cuda --jobs 4 --data-dir data"
study: $(INSTALLED)
	$(BIN)/python -m analysis.study --grid table1 $(STUDY)
	$(BIN)/python -m analysis.study --grid table2 $(STUDY)
	$(BIN)/python -m analysis.study --grid caffe $(STUDY)
	$(BIN)/python -m analysis.study --grid baselines $(STUDY)
	$(BIN)/python -m analysis.study --grid curves $(STUDY)
	$(BIN)/python -m analysis.study --grid precision $(STUDY)
	$(BIN)/python -m analysis.tables
	$(BIN)/python -m analysis.figures

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference of the library and of the paper's networks, from their docstrings: build/docs/index.html.
docs: $(INSTALLED)
	$(BIN)/python tests/reference.py build/docs

# Lines and branches of the library that the tests reach.
coverage: $(INSTALLED)
	$(BIN)/pytest -n 2 --cov=pyro_bmrs --cov-report=term-missing:skip-covered --cov-report=html:build/coverage

# dist/: a wheel of pyro_bmrs alone, and a source archive of everything.
dist: $(INSTALLED)
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into $(VENV), once: one to five minutes"
	@date +%s > $(VENV).started
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@echo "installed in $$(($$(date +%s) - $$(cat $(VENV).started))) s"
	@rm -f $(VENV).started
	touch $@
