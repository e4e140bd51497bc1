"""Check both notebooks as they are written, and execute them in several ways."""

import ast
import asyncio
import builtins
import copy
import itertools
import json
import os
import queue
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import check_lesson
import nbformat
import papermill
import pytest
import run_notebook
import zmq.asyncio
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.session import Session
from nbclient import NotebookClient
from publish import publish

from lora_lab.sources import MOVIE_PHRASES, PACKAGED_MODEL, load_sst2

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


@pytest.fixture(autouse=True)
def look_for_messages_every_second():
    """Let whatever executes a notebook below receive its messages as `run_notebook` does."""
    run_notebook.look_for_messages_every_second()


def read(name):
    return nbformat.read(ROOT / name, as_version=4)


@pytest.fixture(params=NOTEBOOKS)
def notebook(request):
    return read(request.param)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def first_line(cell):
    return cell.source.partition("\n")[0]


def lines_of(cell):
    return [line for line in cell.source.splitlines() if line.strip()]


def is_tagged(cell, tag):
    return tag in cell.metadata.get("tags", [])


def is_markdown(cell, start):
    return cell.cell_type == "markdown" and cell.source.startswith(start)


def core_of(notebook):
    """Return the cells before "# Going further"."""
    cells = notebook.cells
    border = next(number for number, cell in enumerate(cells) if first_line(cell) == "# Going further")
    return cells[:border]


def is_for_colab(cell):
    return "google.colab" in cell.source


# As they are written -------------------------------------------------------------------------------


def test_a_notebook_has_its_six_headings_in_order(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS


def test_the_six_headings_come_before_going_further(notebook):
    titles = [first_line(cell) for cell in notebook.cells if is_markdown(cell, "# ")]
    assert len(titles) == 2 and titles[1] == "# Going further" and is_markdown(notebook.cells[0], titles[0])
    headings = [first_line(cell).removeprefix("## ") for cell in core_of(notebook) if is_markdown(cell, "## ")]
    assert headings == HEADINGS  # each at the start of its cell


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


def test_code_cells_are_short(notebook):
    sizes = sorted(len(lines_of(cell)) for cell in code_cells(notebook))
    assert sizes[-1] <= 30 and sizes[len(sizes) // 2] <= 10
    for cell in core_of(notebook):
        if cell.cell_type == "code" and not is_for_colab(cell):
            assert len(lines_of(cell)) <= 20, cell.source


def test_at_most_three_code_cells_stand_in_a_row(notebook):
    for kind, group in itertools.groupby(notebook.cells, lambda cell: cell.cell_type):
        sources = [cell.source for cell in group]
        assert kind == "markdown" or len(sources) <= 3, sources


def test_no_cell_is_folded_away_and_a_cell_that_only_draws_is_one_call(notebook):
    for cell in code_cells(notebook):
        assert not cell.metadata.get("jupyter", {}).get("source_hidden"), cell.source
        if is_tagged(cell, "extra"):
            (statement,) = ast.parse(cell.source).body
            assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call), cell.source


def test_the_drawing_is_done_elsewhere(notebook):
    for cell in code_cells(notebook):
        assert not re.search(r"\bplt\b|matplotlib", cell.source), cell.source
        functions = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.FunctionDef)]
        assert not any(function.name.startswith("draw") for function in functions), cell.source


def test_one_cell_is_tagged_parameters_and_holds_literals_only(notebook):
    (tagged,) = [cell for cell in code_cells(notebook) if is_tagged(cell, "parameters")]
    names = re.findall(r"^(\w+) = ", tagged.source, re.MULTILINE)
    quantised = any("qLoRABertModel" in cell.source for cell in code_cells(notebook))
    expected = f"""MODEL DATASET RANK ALPHA DROPOUT {"BITS BASE_BITS" if quantised else ""} TARGETS
        LEARNING_RATE EPOCHS BATCH_SIZE TRAIN_SENTENCES SEED SWEEP_SEEDS"""
    assert names == expected.split() and "CHECKPOINT_EVERY" not in tagged.source
    for statement in ast.parse(tagged.source).body:
        ast.literal_eval(statement.value)


def test_the_training_loop_is_one_short_cell_the_same_in_both_notebooks():
    loops = []
    for name in NOTEBOOKS:
        loops += [cell for cell in core_of(read(name)) if cell.cell_type == "code" and "def train(" in cell.source]
    first, second = loops
    assert first.source == second.source and len(lines_of(first)) <= 20
    assert len(ast.parse(first.source).body) == 1
    for word in ("ccelerat", "SimpleNamespace", "crc32", "zlib", "hash", "checkpoint", "print"):
        assert word not in first.source


def test_both_notebooks_find_the_project_and_the_device_in_the_same_way():
    for text in ("google.colab", "= detect_compute_format()"):
        first, second = [cell.source for name in NOTEBOOKS for cell in code_cells(read(name)) if text in cell.source]
        assert first == second


class Names(ast.NodeVisitor):
    """Collect the names that a cell reads, and those that it binds at its top level by anything but an import."""

    def __init__(self, source):
        self.read, self.bound = set(), set()
        self.visit(ast.parse(source))

    def visit_Name(self, node):
        names = self.read if isinstance(node.ctx, ast.Load) else self.bound
        names.add(node.id)

    def visit_AugAssign(self, node):
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self.read.add(node.target.id)

    def visit_inner_scope(self, node):
        """Collect what a function, a class or a comprehension reads and does not bind itself."""
        if hasattr(node, "name"):
            self.bound.add(node.name)
        read, own = set(), set()
        for inner in ast.walk(node):
            if isinstance(inner, ast.arg):
                own.add(inner.arg)
            elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
                read.add(inner.id)
            elif isinstance(inner, ast.Name):
                own.add(inner.id)
        self.read |= read - own

    visit_FunctionDef = visit_ClassDef = visit_Lambda = visit_inner_scope
    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_inner_scope


def rebindings(sources):
    """Return (name, source) of each cell that binds a name which a cell before it reads."""
    found, read_before = [], set()
    for source in sources:
        names = Names(source)
        found += [(name, source) for name in sorted(names.bound & read_before)]
        read_before |= names.read
    return found


def test_no_cell_rebinds_a_name_that_an_earlier_cell_reads(notebook):
    assert rebindings([cell.source for cell in code_cells(notebook)]) == []


@pytest.mark.parametrize(
    "last", ["x = 2", "x += 1", "for x in y: pass", "with y as x: pass", "def x(): pass", "if y:\n    a, [x] = y"]
)
@pytest.mark.parametrize("reads", ["print(x)", "[x for y in z]", "def f(y): return x", "f = lambda y: x", "x += 1"])
def test_a_name_that_is_read_and_then_rebound_is_found(reads, last):
    assert [name for name, _ in rebindings(["x = 1", reads, last])] == ["x"]


def test_a_name_inside_a_function_or_a_comprehension_is_another_one():
    assert rebindings(["def f(x): return x", "[x for x in y]", "x = 1", "print(x)", "def g(y):\n    x = y"]) == []


def test_no_cell_rebinds_a_builtin(notebook):
    for cell in code_cells(notebook):
        assert not Names(cell.source).bound & set(dir(builtins)), cell.source


def test_every_figure_is_small_and_has_a_caption_and_alternative_text(notebook):
    assert check_lesson.check_figures("the notebook", notebook.cells) == []


def test_figures_are_numbered_as_they_appear(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    captions = [int(number) for number in re.findall(r"^\*Figure (\d+)\.", text, re.MULTILINE)]
    assert captions == list(range(1, len(captions) + 1))
    assert {int(number) for number in re.findall(r"\bFigure (\d+)", text)} == set(captions)


# On Colab ------------------------------------------------------------------------------------------


def colab_cell(notebook):
    return next(cell.source for cell in code_cells(notebook) if is_for_colab(cell))


@pytest.fixture
def pip_prints_what_it_installs(tmp_path, monkeypatch):
    """Put a `pip` first on the path that writes the requirements it is given into installed.txt."""
    (tmp_path / "bin").mkdir()
    pip = tmp_path / "bin" / "pip"
    pip.write_text("#!/bin/sh\n[ \"$*\" = 'install -q -r /dev/stdin' ] && cat > installed.txt\n")
    pip.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)


def test_on_colab_all_but_torch_is_installed_and_elsewhere_nothing(
    notebook, tmp_path, monkeypatch, pip_prints_what_it_installs
):
    cell = colab_cell(notebook)
    assert len(cell.strip().replace("\n\n", "\n").splitlines()) <= 6
    exec(cell, {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=r"start the kernel in the folder of lora_utils\.py .*--cwd"):
        exec(cell, {})
    (tmp_path / "lora_utils.py").touch()
    (tmp_path / "requirements.txt").write_text("torch==2.13.0\npeft==0.21.2\n")
    exec(cell, {})
    assert not Path("installed.txt").exists()
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    exec(cell, {})
    assert Path("installed.txt").read_text() == "peft==0.21.2\n"


def test_a_published_notebook_fetches_the_project_on_colab(
    notebook, tmp_path, monkeypatch, pip_prints_what_it_installs
):
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    published = tmp_path / "published"
    published.mkdir()
    (published / "lora_utils.py").touch()
    (published / "requirements.txt").write_text("torch==1.0.0\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(published)]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        subprocess.run([*git, *command], check=True)
    for name in (*NOTEBOOKS, "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    publish("https://github.com/one/first", tmp_path)
    name = NOTEBOOKS[0] if notebook.cells[0].source == read(NOTEBOOKS[0]).cells[0].source else NOTEBOOKS[1]
    cell = colab_cell(nbformat.read(tmp_path / name, as_version=4))
    cell = cell.replace("https://github.com/one/first", f"file://{published}")
    (tmp_path / "content").mkdir()
    monkeypatch.chdir(tmp_path / "content")
    for _ in ("at first", "after the session was restarted"):
        exec(cell, {})
        assert Path("lora_utils.py").is_file()


def test_publishing_writes_the_address_into_each_notebook_and_one_badge_per_notebook(tmp_path):
    for name in (*NOTEBOOKS, "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for address in ("https://github.com/one/first", "https://github.com/two/second.x"):
        publish(address, tmp_path)
    for name in NOTEBOOKS:
        before, after = (nbformat.read(folder / name, as_version=4) for folder in (ROOT, tmp_path))
        page = f"https://colab.research.google.com/github/two/second.x/blob/main/{name}"
        assert after.cells[0].source.count("badge.svg") == 1 and f"({page})" in after.cells[0].source
        changed = [b.source for a, b in zip(before.cells, after.cells, strict=True) if a.source != b.source]
        assert len(changed) == 2 and changed[1].count("https://") == 1
        assert "--depth=1 https://github.com/two/second.x" in changed[1]
    readme = (tmp_path / "README.md").read_text()
    assert readme.count("badge.svg") == 2 and readme.count("second.x/blob") == 2 and "first" not in readme[:600]
    with pytest.raises(ValueError, match=r"like https://github\.com/owner/name"):
        publish("owner/name", tmp_path)


# Executed ------------------------------------------------------------------------------------------

EVERY_PARAMETER = {
    **{"MODEL": PACKAGED_MODEL, "DATASET": "a folder", "RANK": 2, "ALPHA": 4.0, "DROPOUT": 0.1},
    **{"TARGETS": ["query", "dense"], "LEARNING_RATE": 5e-4, "EPOCHS": 2, "BATCH_SIZE": 16, "TRAIN_SENTENCES": 160},
    **{"SEED": 1, "SWEEP_SEEDS": [1]},
}
QUANTISED_PARAMETERS = {"BITS": 3, "BASE_BITS": 8}


@pytest.fixture
def parameters(data_folder, monkeypatch):
    """Return a function that gives every parameter of a notebook another value, for a run of a minute on few data."""
    monkeypatch.delenv("SST2_DIR", raising=False)
    phrases = {}
    for split, size in (("train", 170), ("validation", 48)):
        phrases[split] = list(load_sst2(MOVIE_PHRASES)[split].select(range(size)))
    values = EVERY_PARAMETER | {"DATASET": str(data_folder("some_phrases", **phrases))}
    return lambda notebook: values | (QUANTISED_PARAMETERS if "qLoRABertModel" in str(notebook) else {})


def shortened(name, parameters):
    """Return a notebook that runs in a minute, without the cells that start other processes for long."""
    notebook = read(name)
    notebook.cells = [cell for cell in notebook.cells if "torch.distributed.run" not in cell.source]
    for cell in code_cells(notebook):
        if is_tagged(cell, "parameters"):
            values = parameters(notebook) | {"SWEEP_SEEDS": []}  # draw the committed runs
            cell.source += "".join(f"\n{parameter} = {value!r}" for parameter, value in values.items())
    return notebook


def execute(notebook):
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(ROOT)}}).execute()


@pytest.mark.parametrize("seconds", [None, 60])
def test_a_message_whose_coming_goes_unnoticed_is_received(seconds):
    async def receive():
        with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as kernel, context.socket(zmq.PAIR) as client:
            kernel.bind("inproc://kernel")
            client.connect("inproc://kernel")
            session = Session()
            message = asyncio.create_task(AsyncZMQSocketChannel(client, session).get_msg(seconds))
            await asyncio.sleep(0.1)
            asyncio.get_running_loop().remove_reader(client.FD)  # what would wake it
            session.send(kernel, "status")
            return await asyncio.wait_for(message, 10)

    patched = AsyncZMQSocketChannel.get_msg
    run_notebook.look_for_messages_every_second()
    assert AsyncZMQSocketChannel.get_msg is patched  # once is enough
    assert asyncio.run(receive())["msg_type"] == "status"


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_papermill_runs_a_notebook_with_every_parameter_changed(name, tmp_path, parameters):
    source = read(name)
    before = next(cell.source for cell in code_cells(source) if is_tagged(cell, "parameters"))
    values = {}
    exec(before, values)
    assert all(values[parameter] != value for parameter, value in parameters(source).items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # papermill's own
        papermill.execute_notebook(
            str(ROOT / name), str(tmp_path / name), parameters(source), cwd=str(ROOT), progress_bar=False
        )
    executed = nbformat.read(tmp_path / name, as_version=4)
    text = json.dumps([cell.outputs for cell in code_cells(executed)])
    assert "some_phrases" in text and "Validation accuracy, LoRA" in text
    assert ("Validation accuracy, q-LoRA" in text) == name.startswith("q")


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_cell_can_be_interrupted_and_run_again_and_again(name, parameters):
    """Run each cell up to a statement in its middle, then whole, then whole once more, in one kernel."""
    notebook = shortened(name, parameters)
    cells = []
    for cell in code_cells(notebook):
        statements = ast.parse(cell.source).body
        lines = cell.source.splitlines()[: statements[len(statements) // 2].lineno - 1]
        interrupted = nbformat.v4.new_code_cell("\n".join([*lines, "raise KeyboardInterrupt"]))
        interrupted.metadata["tags"] = ["raises-exception"]
        cells += [interrupted, cell, copy.deepcopy(cell)]
    notebook.cells = [*cells, nbformat.v4.new_code_cell(NOTHING_IS_STACKED)]
    execute(notebook)
    assert re.fullmatch(r"models, none of them stacked: [1-9]\d*\n", notebook.cells[-1].outputs[-1].text)


def test_a_message_that_does_not_come_is_waited_for_as_long_as_is_asked():
    async def receive(seconds):
        with zmq.asyncio.Context() as context, context.socket(zmq.PAIR) as client:
            client.bind("inproc://nobody")
            await AsyncZMQSocketChannel(client, Session()).get_msg(seconds)

    for seconds in (0, 0.2, 1.3):
        start = time.monotonic()
        with pytest.raises(queue.Empty):
            asyncio.run(receive(seconds))
        assert seconds <= time.monotonic() - start < seconds + 1


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
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_section_can_be_run_again_after_the_whole_notebook(name, parameters):
    notebook = shortened(name, parameters)
    sections = {}
    for cell in core_of(notebook):
        if is_markdown(cell, "## "):
            heading = first_line(cell).removeprefix("## ")
            sections[heading] = []
        elif cell.cell_type == "code":
            sections[heading].append(copy.deepcopy(cell))
    assert list(sections) == HEADINGS
    again = [cell for heading in reversed(HEADINGS) for cell in sections[heading]]
    notebook.cells = [*code_cells(notebook), *again]
    execute(notebook)
    assert all(cell.execution_count for cell in again)
