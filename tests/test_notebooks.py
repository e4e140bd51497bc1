"""Check both notebooks as they are written, and execute them in several ways."""

import ast
import builtins
import copy
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import run_notebook
from conftest import ROOT
from nbclient import NotebookClient
from publish import publish

from lora_lab.settings import RULES
from lora_lab.sources import PACKAGED_MODEL

NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]
HEADINGS = ["Import Libraries", "Define LoRA Layer and Model", "Initialize Tokenizer and Model"]
HEADINGS += ["Load and Prepare Dataset", "Training Loop", "Validation Loop"]


run_notebook.look_for_messages_every_second()  # whatever executes a notebook below


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return read(request.param)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_cell(notebook):
    (tagged,) = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    return tagged


def sections_of(notebook):
    """Return {heading: code cells} of the second level of headings, in the cells before "# Going further"."""
    found, section = {}, []
    for cell in notebook.cells:
        first_line = cell.source.partition("\n")[0]
        if first_line == "# Going further":
            break
        if first_line.startswith("## "):
            section = found[first_line.removeprefix("## ")] = []
        elif cell.cell_type == "code":
            section.append(cell)
    return found


def test_a_notebook_has_its_six_headings_in_order_and_numbers_its_figures(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == list(sections_of(notebook)) == HEADINGS
    assert re.findall(r"^# (.+)$", text, re.MULTILINE)[1:] == ["Going further"]
    figures = re.findall(r"^\*Figure (\d+)\.", text, re.MULTILINE)
    assert figures == [str(number + 1) for number in range(len(figures))]
    assert set(re.findall(r"\bFigure (\d+)", text)) == set(figures)


def test_a_notebook_was_executed_once_from_top_to_bottom_on_sst_2_without_a_warning_or_path(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata.kernelspec.name == "python3" and "widgets" not in notebook.metadata
    assert all(o.output_type != "error" and o.get("name") != "stderr" for cell in cells for o in cell.outputs)
    text = json.dumps([cell.outputs for cell in cells])
    assert "SST-2, 67,349 training and 872 validation sentences" in text
    assert not re.search(r"Warning|widget-view|/(root|home|work|tmp|Users)/|[A-Z]:\\\\", text)


def test_one_cell_holds_the_parameters_as_literals_and_the_next_one_checks_them(notebook):
    cells, tagged = code_cells(notebook), parameters_cell(notebook)
    values = {statement.targets[0].id: statement.value for statement in ast.parse(tagged.source).body}
    quantised = set() if "qLoRABertModel" in str(notebook) else {"BITS", "BASE_BITS"}
    assert values.keys() == RULES.keys() - quantised
    for value in values.values():
        ast.literal_eval(value)
    assert cells[cells.index(tagged) + 1].source.startswith("check_settings(globals())")


@pytest.mark.parametrize("text", ["google.colab", "= detect_compute_format()", "def train("])
def test_both_notebooks_find_the_project_and_the_device_and_train_in_the_same_way(text):
    first, second = [cell.source for name in NOTEBOOKS for cell in code_cells(read(name)) if text in cell.source]
    assert first == second


SCOPES = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names_in(node):
    """Return the names that code reads, and those that it binds by anything but an import."""
    read, bound = set(), set()
    if isinstance(node, ast.Name):
        (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
    elif isinstance(node, ast.arg):
        bound.add(node.arg)
    elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        read.add(node.target.id)
    for child in ast.iter_child_nodes(node):
        of_child = names_in(child)
        read |= of_child[0]
        bound |= of_child[1]
    if isinstance(node, SCOPES):  # only its own name is bound outside
        read, bound = read - bound, {node.name} if hasattr(node, "name") else set()
    return read, bound


def rebindings(sources):
    """Return (name, source) of each cell that binds a builtin, or a name which a cell before it reads."""
    found, taken = [], set(dir(builtins))
    for source in sources:
        read, bound = names_in(ast.parse(source))
        found += [(name, source) for name in sorted(bound & taken)]
        taken |= read
    return found


def test_no_cell_rebinds_a_builtin_or_a_name_that_an_earlier_cell_reads(notebook):
    assert rebindings([cell.source for cell in code_cells(notebook)]) == []


@pytest.fixture
def on_colab(tmp_path, monkeypatch):
    """Return a function that pretends to be on Colab, with a `pip` that writes what it installs into installed.txt."""
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\n[ \"$*\" = 'install -q -r /dev/stdin' ] && cat > installed.txt\n")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return lambda: monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())


def colab_cell(notebook):
    return next(cell.source for cell in code_cells(notebook) if "google.colab" in cell.source)


def test_on_colab_all_but_torch_is_installed_and_elsewhere_nothing(notebook, tmp_path, monkeypatch, on_colab):
    cell = colab_cell(notebook)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"start the kernel in the folder of lora_utils\.py .*--cwd"):
        exec(cell, {})
    (tmp_path / "lora_utils.py").touch()
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\npeft==0.21.2\n")
    exec(cell, {})
    assert not Path("installed.txt").exists()
    on_colab()
    exec(cell, {})
    assert Path("installed.txt").read_text() == "peft==0.21.2\n"


def test_a_published_notebook_has_a_badge_and_fetches_the_project_on_colab(tmp_path, monkeypatch, on_colab):
    project = tmp_path / "project"
    project.mkdir()
    (project / "lora_utils.py").touch()
    (project / "requirements.txt").write_text("torch==1.0.0\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(project)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    for name in (*NOTEBOOKS, "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for address in ("https://github.com/one/first", "https://github.com/two/second.x"):
        publish(address, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("badge.svg") == 2 and readme.count("second.x/blob") == 2 and "first" not in readme[:600]
    on_colab()
    for name in NOTEBOOKS:
        published = nbformat.read(tmp_path / name, as_version=4)
        page = f"https://colab.research.google.com/github/two/second.x/blob/main/{name}"
        assert published.cells[0].source.count("badge.svg") == 1 and f"({page})" in published.cells[0].source
        cell = colab_cell(published)
        assert cell.count("https://") == cell.count(address) == 1
        (tmp_path / f"content of {name}").mkdir()
        monkeypatch.chdir(tmp_path / f"content of {name}")
        for _ in ("at first", "after a restart"):
            exec(cell.replace(address, f"file://{project}"), {})
            assert Path("lora_utils.py").is_file()
    with pytest.raises(ValueError, match=r"like https://github\.com/owner/name"):
        publish("owner/name", tmp_path)


@pytest.fixture
def values(few_phrases, monkeypatch):
    """Return {parameter: another value than the notebook's}, for a run of a minute on few data."""
    monkeypatch.delenv("SST2_DIR", raising=False)
    return {
        **{"MODEL": PACKAGED_MODEL, "DATASET": str(few_phrases), "RANK": 2, "ALPHA": 4.0, "DROPOUT": 0.1},
        **{"TARGETS": ["query", "dense"], "LEARNING_RATE": 5e-4, "EPOCHS": 2, "BATCH_SIZE": 16, "TRAIN_SENTENCES": 160},
        **{"SEED": 1, "SWEEP_SEEDS": [1], "BITS": 3, "BASE_BITS": 8},
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_runs_a_notebook_with_every_parameter_changed(name, tmp_path, values):
    before = {}
    exec(parameters_cell(read(name)).source, before)
    changed = {parameter: value for parameter, value in values.items() if parameter in before}
    assert all(before[parameter] != value for parameter, value in changed.items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # papermill's own
        executed = papermill.execute_notebook(ROOT / name, tmp_path / name, changed, cwd=ROOT, progress_bar=False)
    text = json.dumps([cell.outputs for cell in code_cells(executed)])
    assert "few_phrases" in text and "Validation accuracy, LoRA" in text
    assert ("Validation accuracy, q-LoRA" in text) == name.startswith("q")


NOTHING_IS_STACKED = """
import lora_utils

values = list(globals().values())
models = [value for value in values if isinstance(value, lora_utils.LoRABertModel)]
for each in models:
    assert not any(isinstance(layer.base, lora_utils.LoRALayer) for layer in each.lora_layers().values())
losses = [value for key, value in globals().items() if key.endswith("_losses") and isinstance(value, list)]
assert losses and all(len(each) == EPOCHS * len(train_loader) for each in losses)
for each in values:
    if hasattr(each, "prepared"):  # a run of lora_lab.training
        assert len(each.losses) == len(each.rates) <= each.steps
assert not any(Path("checkpoints").glob("*")), "a run that ended has left its checkpoint"
print("models, none of them stacked:", len(models))
"""


@pytest.mark.slow
def test_every_cell_can_be_interrupted_and_run_again_and_every_section_after_all(notebook, values, own_bert, tokenizer):
    """Run each cell up to a statement in its middle, then whole, and whole again. Then run the sections backwards."""
    tokenizer.save_pretrained(own_bert)
    values |= {"MODEL": str(own_bert), "TRAIN_SENTENCES": 64, "SWEEP_SEEDS": []}  # draw the committed runs
    parameters_cell(notebook).source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    cells = []
    for cell in code_cells(notebook):
        statements = ast.parse(cell.source).body
        lines = cell.source.splitlines()[: statements[len(statements) // 2].lineno - 1]
        interrupted = nbformat.v4.new_code_cell("\n".join([*lines, "raise KeyboardInterrupt"]))
        interrupted.metadata["tags"] = ["raises-exception"]
        cells += [interrupted, cell, copy.deepcopy(cell)]
    for section in reversed(sections_of(notebook).values()):
        cells += map(copy.deepcopy, section)
    notebook.cells = [*cells, nbformat.v4.new_code_cell(NOTHING_IS_STACKED)]
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert re.fullmatch(r"models, none of them stacked: [1-9]\d*\n", notebook.cells[-1].outputs[-1].text)
