import ast
import asyncio
import copy
import importlib.metadata
import itertools
import json
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
import run_notebook  # whatever executes a notebook below receives its messages in its way
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session
from nbclient import NotebookClient
from publish import publish

from lora_utils import MOVIE_PHRASES, OFFLINE_MODEL, load_sst2

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


def test_code_that_only_draws_is_folded_away(notebook):
    for cell in code_cells(notebook):
        if "extra" in cell.metadata.get("tags", []) and len(cell.source.splitlines()) > 3:
            assert cell.metadata.get("jupyter", {}).get("source_hidden"), cell.source


def test_one_cell_is_tagged_parameters_and_holds_literals_only(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) = ", tagged[0].source, re.MULTILINE)
    quantised = any("qLoRABertModel" in cell.source for cell in code_cells(notebook))
    knobs = f"""MODEL DATASET RANK ALPHA DROPOUT {"BITS BASE_BITS" if quantised else ""} TARGETS
        LEARNING_RATE EPOCHS BATCH_SIZE TRAIN_SENTENCES SEED CHECKPOINT_EVERY SWEEP_SEEDS"""
    assert len(tagged) == 1 and names == knobs.split()


def test_every_figure_is_small_and_has_a_caption(notebook):
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output.data["image/png"]) * 3 / 4 < 100_000
                assert following.source.startswith("*Figure ")


def test_every_link_of_a_notebook_leads_somewhere(notebook):
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = {heading.replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        else:
            assert target.startswith("https://") or (ROOT / target.partition("#")[0]).is_file(), target


def first_cell(notebook):
    return next(cell.source for cell in code_cells(notebook) if "google.colab" in cell.source)


def test_on_colab_what_is_missing_is_fetched_and_installed_and_elsewhere_nothing(notebook, tmp_path, monkeypatch):
    cell = re.sub('REPOSITORY = ".*"', 'REPOSITORY = ""', first_cell(notebook))
    ran = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: ran.append(command))
    monkeypatch.chdir(tmp_path)
    exec(cell, {})
    assert ran == []

    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    with pytest.raises(FileNotFoundError, match="upload lora_utils"):
        exec(cell, {})
    (tmp_path / "lora_utils.py").touch()
    here = importlib.metadata.version("accelerate")
    lines = f"accelerate=={here}  # here\ntorch==1.0.0  # older\nno-such-package==3.1.0\ntransformers==99.0.0\n"
    (tmp_path / "requirements.txt").write_text("# what is needed\n" + lines)
    exec(cell, {})
    assert [command[5:] for command in ran] == [["no-such-package==3.1.0", "transformers==99.0.0"]]


def test_the_notebook_fetches_the_project_where_it_is_told_its_address(notebook, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", "published"]
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "lora_utils.py").touch()
    (tmp_path / "published" / "requirements.txt").write_text("torch==1.0.0\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    cell = re.sub('REPOSITORY = ".*"', f'REPOSITORY = "file://{tmp_path}/published"', first_cell(notebook))
    for _ in ("at first", "after the session was restarted"):
        monkeypatch.chdir(tmp_path)
        exec(cell, {})
        assert (Path.cwd() / "lora_utils.py").is_file() and Path.cwd().name == "lesson"


EVERY_KNOB = {
    **{"MODEL": OFFLINE_MODEL, "DATASET": "a folder", "RANK": 2, "ALPHA": 4.0, "DROPOUT": 0.1},
    **{"TARGETS": ["query", "dense"], "LEARNING_RATE": 5e-4, "EPOCHS": 2, "BATCH_SIZE": 16, "TRAIN_SENTENCES": 160},
    **{"SEED": 1, "CHECKPOINT_EVERY": 3, "SWEEP_SEEDS": [1]},
}
QUANTISED_KNOBS = {"BITS": 3, "BASE_BITS": 8}


@pytest.fixture
def knobs(data_folder, monkeypatch):
    """A function that gives every knob of a notebook another value, for a run of a minute: the data are few, too."""
    monkeypatch.delenv("SST2_DIR", raising=False)
    phrases = {
        split: rows.select(range(size)) for (split, rows), size in zip(load_sst2(MOVIE_PHRASES).items(), (170, 48))
    }
    folder = data_folder("some_phrases", **{split: list(rows) for split, rows in phrases.items()})
    knobs = EVERY_KNOB | {"DATASET": str(folder)}
    return lambda notebook: knobs | (QUANTISED_KNOBS if "qLoRABertModel" in str(notebook) else {})


def test_a_message_whose_coming_goes_unnoticed_is_received():
    async def receive():
        with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as kernel, context.socket(zmq.PAIR) as client:
            kernel.bind("inproc://kernel")
            client.connect("inproc://kernel")
            session = Session()
            message = asyncio.create_task(AsyncZMQSocketChannel(client, session).get_msg())
            await asyncio.sleep(0.1)
            asyncio.get_running_loop().remove_reader(client.FD)  # what would wake it
            session.send(kernel, "status")
            return await asyncio.wait_for(message, 10)

    assert AsyncZMQSocketChannel.get_msg is run_notebook.get_msg
    assert asyncio.run(receive())["msg_type"] == "status"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_runs_a_notebook_with_every_knob_changed(name, tmp_path, knobs):
    source = nbformat.read(ROOT / name, as_version=4)
    before = next(cell.source for cell in code_cells(source) if "parameters" in cell.metadata.get("tags", []))
    values = {}
    exec(before, values)
    assert all(values[knob] != value for knob, value in knobs(source).items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # papermill's own
        papermill.execute_notebook(
            str(ROOT / name), str(tmp_path / name), knobs(source), cwd=str(ROOT), progress_bar=False
        )
    executed = nbformat.read(tmp_path / name, as_version=4)
    text = json.dumps([cell.outputs for cell in code_cells(executed)])
    assert "some_phrases" in text and "Validation accuracy, LoRA" in text
    assert ("Validation accuracy, q-LoRA" in text) == name.startswith("q")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_can_be_interrupted_and_run_again_and_again(name, knobs):
    """Each cell up to a statement in its middle, then whole, then whole once more, in one kernel."""
    notebook = nbformat.read(ROOT / name, as_version=4)
    cells = []
    for cell in code_cells(notebook):
        if cell.source.startswith(("script = ", "def as_script", "def in_processes")):
            continue  # they run the whole notebook in other processes
        if "parameters" in cell.metadata.get("tags", []):
            values = knobs(notebook) | {"SWEEP_SEEDS": []}  # the sweep runs in other processes
            cell.source += "".join(f"\n{knob} = {value!r}" for knob, value in values.items())
        statements = ast.parse(cell.source).body
        lines = cell.source.splitlines()[: statements[len(statements) // 2].lineno - 1]
        interrupted = nbformat.v4.new_code_cell("\n".join([*lines, "raise KeyboardInterrupt"]))
        interrupted.metadata["tags"] = ["raises-exception"]
        cells += [interrupted, cell, copy.deepcopy(cell)]
    notebook.cells = [*cells, nbformat.v4.new_code_cell(NOTHING_IS_STACKED)]
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert notebook.cells[-1].outputs[-1].text.startswith("models, none of them stacked:")


NOTHING_IS_STACKED = """
runs = [run for run in globals().values() if isinstance(run, SimpleNamespace) and hasattr(run, "prepared")]
for run in runs:
    assert len(run.losses) == len(run.rates) == run.steps
    assert not any(isinstance(layer.base, LoRALayer) for layer in run.model.lora_layers().values())
assert len(accelerator._models) <= 1 and len(list(Path("checkpoints").glob("*"))) == 0
print("models, none of them stacked:", len(runs))
"""


def test_publishing_writes_the_address_into_each_notebook_and_one_badge_a_notebook(tmp_path):
    for name in (*NOTEBOOKS, "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for address in ("https://github.com/one/first", "https://github.com/two/second.x"):
        publish(address, tmp_path)
    for name in NOTEBOOKS:
        before, after = (nbformat.read(folder / name, as_version=4) for folder in (ROOT, tmp_path))
        page = f"https://colab.research.google.com/github/two/second.x/blob/main/{name}"
        assert after.cells[0].source.count("badge.svg") == 1 and f"({page})" in after.cells[0].source
        changed = [b.source for a, b in zip(before.cells, after.cells, strict=True) if a.source != b.source]
        assert len(changed) == 2 and 'REPOSITORY = "https://github.com/two/second.x"  # ' in changed[1]
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("badge.svg") == 2 and readme.count("second.x/blob") == 2 and "first" not in readme[:600]
    with pytest.raises(ValueError, match=r"like https://github\.com/owner/name"):
        publish("owner/name", tmp_path)
