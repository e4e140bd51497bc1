import itertools
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from lora_utils import LoRABertModel, load_sst2, make_loader

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]
HEADINGS = [
    "Import Libraries",
    "Define LoRA Layer and Model",
    "Initialize Tokenizer and Model",
    "Load and Prepare Dataset",
    "Training Loop",
    "Validation Loop",
]


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return nbformat.read(ROOT / request.param, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_a_notebook_has_its_six_headings_in_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


def test_a_notebook_names_its_kernel(notebook):
    assert notebook.metadata.kernelspec.name == "python3"


def test_a_notebook_was_executed_once_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_a_notebooks_outputs_hold_no_error_warning_widget_or_path_of_a_machine(notebook):
    assert "widgets" not in notebook.metadata
    for cell in code_cells(notebook):
        assert all(output.output_type != "error" for output in cell.outputs)
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        text = json.dumps(cell.outputs)
        assert "Warning" not in text and "widget-view" not in text
        assert not re.search(r"/(root|home|work|tmp|Users)/|[A-Z]:\\\\", text)


def test_a_notebook_was_executed_on_the_real_sst_2(notebook):
    text = json.dumps([cell.outputs for cell in code_cells(notebook)])
    assert "SST-2, 67,349 training and 872 validation sentences" in text


def test_code_cells_are_short_and_have_a_sentence_before_them(notebook):
    sizes = sorted(len([line for line in cell.source.splitlines() if line.strip()]) for cell in code_cells(notebook))
    assert sizes[-1] <= 30 and sizes[len(sizes) // 2] <= 10
    for before, cell in itertools.pairwise(notebook.cells):
        assert cell.cell_type == "markdown" or before.cell_type == "markdown", cell.source


def test_one_cell_is_tagged_parameters_and_holds_literals_only(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) = ", tagged[0].source, re.MULTILINE)
    quantised = any("qLoRABertModel" in cell.source for cell in code_cells(notebook))
    knobs = f"""MODEL DATASET RANK ALPHA DROPOUT {"BITS BASE_BITS" if quantised else ""} TARGETS
        LEARNING_RATE EPOCHS BATCH_SIZE TRAIN_SENTENCES SEED"""
    assert len(tagged) == 1 and names == knobs.split()


def test_every_figure_is_small_and_has_a_caption(notebook):
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output.data["image/png"]) * 3 / 4 < 100_000
                assert following.source.startswith("*Figure ")


def test_a_training_loop_that_is_interrupted_goes_on_where_it_stopped(notebook, bert, tokenizer, capsys):
    """The notebook's own `new_run` and `train`, interrupted in an epoch, against the same run in one go."""
    loader = make_loader(load_sst2("auto")["train"].select(range(40)), tokenizer, batch_size=8, shuffle=True)
    cell = {
        **{"torch": torch, "sys": sys, "tqdm": tqdm, "SimpleNamespace": SimpleNamespace, "train_loader": loader},
        **{"EPOCHS": 2, "device": "cpu", "get_linear_schedule_with_warmup": get_linear_schedule_with_warmup},
    }
    for source in (cell.source for cell in code_cells(notebook)):
        if source.startswith(("def new_run(", "def train(")):
            exec(source, cell)

    def interrupt_at(call):
        def forward(model, arguments):
            interrupt_at.calls += 1
            if interrupt_at.calls == call:
                raise KeyboardInterrupt

        interrupt_at.calls = 0
        return forward

    def a_run():
        torch.manual_seed(0)
        return cell["new_run"](LoRABertModel(str(bert), dtype=torch.float32), 1e-3)

    whole, stopped = a_run(), a_run()
    cell["train"](whole)
    hook = stopped.model.register_forward_pre_hook(interrupt_at(8))
    cell["train"](stopped)
    assert len(stopped.losses) == 7 and "run this cell again" in capsys.readouterr().out
    hook.remove()
    cell["train"](stopped)
    assert len(whole.losses) == 10 and stopped.losses == whole.losses
    cell["train"](stopped)
    assert len(stopped.losses) == 10


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_top_to_bottom_in_a_short_setting(name, tmp_path, monkeypatch):
    monkeypatch.delenv("SST2_DIR", raising=False)
    knobs = {"EPOCHS": 1, "TRAIN_SENTENCES": 160, "RANK": 2, "ALPHA": 4.0, "TARGETS": ["query", "dense"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # papermill's own
        papermill.execute_notebook(
            str(ROOT / name), str(tmp_path / name), {**knobs, "DROPOUT": 0.1}, cwd=str(ROOT), progress_bar=False
        )
    executed = nbformat.read(tmp_path / name, as_version=4)
    text = json.dumps([cell.outputs for cell in code_cells(executed)])
    assert "movie_phrases" in text and "Validation accuracy, LoRA" in text
    assert ("Validation accuracy, q-LoRA" in text) == name.startswith("q")
