"""Check the way from the hub to the cache against a stand-in for the hub, while all is well and with each fault."""

import functools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import nbformat
import pytest
import run_notebook
from conftest import BITSANDBYTES_SAYS, ROOT
from local_hub import DATA, MODEL, LocalHub, write_bert, write_sst2

from lora_lab import sources
from lora_lab.sources import DEFAULT_MODEL, PACKAGED_MODEL, find_model, hub_is_reachable, load_sst2
from lora_utils import LoRABertModel

NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]
constants = huggingface_hub.constants


@pytest.fixture(scope="module")
def tiny_hub(tmp_path_factory):
    """Serve a BERT of 2 layers and the movie phrases under the names of BERT-base and SST-2."""
    folder = tmp_path_factory.mktemp("hub")
    write_bert(folder, tiny=True)
    write_sst2(folder)
    with LocalHub(folder) as hub:
        yield hub


@pytest.fixture
def hub(tiny_hub, tmp_path, monkeypatch):
    """Point the libraries in this process at the stand-in and an empty cache, and shorten the time limits."""
    monkeypatch.setattr(constants, "ENDPOINT", tiny_hub.address)
    template = tiny_hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_is_reachable.__wrapped__, "__defaults__", (0.3,))
    monkeypatch.setattr(sources, "ask_once", functools.partial(sources.ask_once, 0.3))
    hub_is_reachable.cache_clear()
    tiny_hub.requests.clear()
    yield tiny_hub
    tiny_hub.misbehave(None)
    hub_is_reachable.cache_clear()


def contents(hub, name="model.safetensors"):
    return (hub.folder / "models" / MODEL / name).read_bytes()


def downloads(hub, name=""):
    """Return the names of the files whose bytes were asked for."""
    return [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line and name in line]


# All is well ---------------------------------------------------------------------------------------


def test_auto_downloads_bert_base_and_sst2_once_with_a_bar_and_needs_no_network_afterwards(hub, capsys, monkeypatch):
    checkpoint, data = find_model("auto"), load_sst2("auto")
    assert checkpoint.name == DEFAULT_MODEL == MODEL
    assert (checkpoint.folder / "model.safetensors").read_bytes() == contents(hub)
    assert data["train"].info.dataset_name == "SST-2" and list(data) == ["train", "validation"]
    assert data["train"].column_names == ["sentence", "label"] and len(data["train"]) == 1952
    printed = capsys.readouterr()
    model_line, data_line = printed.out.splitlines()
    assert model_line == f"Model: {DEFAULT_MODEL} (from the Hugging Face hub or its local cache)"
    assert data_line.startswith("Data: SST-2, 1,952 training and 706 validation sentences (nyu-mll/glue, from the")
    assert "model.safetensors: 100%" in printed.err and "config.json" not in printed.err
    names = ["tokenizer_config.json", "config.json", "vocab.txt", "tokenizer.json", "model.safetensors"]
    parquet = [f"sst2/{split}-00000-of-00001.parquet" for split in ("validation", "train")]
    assert [line.partition("/main/")[2] for line in downloads(hub)] == [*names, *parquet]

    hub.requests.clear()
    hub_is_reachable.cache_clear()
    assert find_model("auto") == checkpoint and load_sst2("auto")["train"][:] == data["train"][:]
    assert not hub.requests and capsys.readouterr().err == ""
    model = LoRABertModel(checkpoint.name, folder=checkpoint.folder)
    assert model.model.config.hidden_size == 64 and not hub.requests


def test_the_settings_of_the_library_stay(hub):
    session = huggingface_hub.get_session()
    before = session.event_hooks, dict(vars(constants))
    find_model("auto")
    hub.misbehave(500)
    load_sst2("auto")
    assert (session.event_hooks, vars(constants)) == before


# Faults --------------------------------------------------------------------------------------------

ANSWERS = {
    **{401: "answers 401 Unauthorized", 404: "answers 404 Not Found"},
    **{429: "answers 429 Too Many Requests", 500: "answers 500 Internal Server Error"},
}


@pytest.mark.parametrize("where", ["", "api/", "0001.parquet model.safetensors"])
@pytest.mark.parametrize("fault", ["silent", *ANSWERS])
def test_a_hub_that_fails_is_replaced_at_once_and_named_data_are_refused(hub, capsys, fault, where):
    """Fail everywhere, where repositories are described, and at the largest files."""
    for search, path, name in (
        (find_model, where.partition(" ")[2] or where, PACKAGED_MODEL),
        (load_sst2, where.partition(" ")[0], "movie_phrases"),
    ):
        hub.misbehave(fault, path)
        start = time.perf_counter()
        search("auto")
        assert time.perf_counter() - start < 3
        (line,) = capsys.readouterr().out.splitlines()
        reason = ANSWERS.get(fault) or ("cannot be reached" if where == "" else "(does not answer|fails .*timed out)")
        assert name in line and re.search(f"instead of .*: the hub {reason}", line), line
        assert "Error" not in line.replace("Internal Server Error", "") or "fails (ReadTimeout: " in line
    for search, name in ((find_model, DEFAULT_MODEL), (load_sst2, "sst2")):
        hub.misbehave(fault)
        with pytest.raises(ValueError, match=rf"no (model|data) .{name}.: .*the hub .*allowed are"):
            search(name)
    hub.misbehave(None)
    hub_is_reachable.cache_clear()
    assert find_model("auto").name == DEFAULT_MODEL and load_sst2("auto")["train"].info.dataset_name == "SST-2"


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_that_was_cut_is_resumed_where_it_ended(hub, fault):
    hub.misbehave(fault, "model.safetensors", times=1)
    folder = find_model("auto").folder
    assert (folder / "model.safetensors").read_bytes() == contents(hub)
    half = len(contents(hub)) // 2
    first, rest = downloads(hub, "model.safetensors")
    start = re.fullmatch(rf"{first} bytes=(\d+)-", rest)[1]
    assert half - 2**18 < int(start) <= half


@pytest.mark.parametrize("fault", ["cut", "stall", "wrong"])
@pytest.mark.parametrize(
    "search, name, instead",
    [(find_model, "model.safetensors", PACKAGED_MODEL), (load_sst2, "0001.parquet", "movie_phrases")],
)
def test_a_file_that_does_not_arrive_whole_is_never_used(hub, capsys, fault, search, name, instead):
    hub.misbehave(fault, name)
    start = time.perf_counter()
    search("auto")
    assert time.perf_counter() - start < 6
    (line,) = capsys.readouterr().out.splitlines()
    reason = "arrives damaged: its hash is not the one" if fault == "wrong" else "the hub does not answer"
    assert instead in line and reason in line
    cached = [file.name for file in Path(constants.HF_HUB_CACHE).rglob("*") if file.is_file()]
    assert not [file for file in cached if name in file or file.endswith("incomplete")]
    hub.misbehave(None)
    search("auto")
    assert instead not in capsys.readouterr().out


def test_a_file_that_is_damaged_in_the_cache_is_downloaded_again_and_no_other(hub, capsys):
    folder = find_model("auto").folder
    (folder / "model.safetensors").resolve().write_bytes(contents(hub)[:-1] + b"!")
    hub.requests.clear()
    assert find_model("auto").folder == folder
    assert (folder / "model.safetensors").read_bytes() == contents(hub) and len(downloads(hub)) == 1
    (folder / "model.safetensors").resolve().write_bytes(b"")
    hub.misbehave(500)
    assert find_model("auto").name == PACKAGED_MODEL
    assert "the hub answers 500" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_named(hub, capsys):
    Path(constants.HF_HUB_CACHE).write_text("a file where the folder should be", encoding="utf-8")
    find_model("auto")
    load_sst2("auto")
    lines = capsys.readouterr().out.splitlines()
    for line, instead in zip(lines, (PACKAGED_MODEL, "movie_phrases"), strict=True):
        assert instead in line and "the local cache cannot be used (" in line and constants.HF_HUB_CACHE in line
    with pytest.raises(ValueError, match="the local cache cannot be used"):
        find_model(DEFAULT_MODEL)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json or vocab.txt"])
def test_a_repository_without_a_file_that_is_needed_is_refused_by_name(hub, missing, tmp_path):
    other = tmp_path / "hub" / "models" / "some" / "bert"
    other.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        if name not in missing:
            (other / name).write_bytes(contents(hub, name))
    before, hub.folder = hub.folder, tmp_path / "hub"
    try:
        with pytest.raises(ValueError, match=f"no model 'some/bert': no such folder, and it has no {missing}"):
            find_model("some/bert")
    finally:
        hub.folder = before
    assert not downloads(hub)


def test_a_cell_that_prints_nothing_is_reported_to_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_notebook.Narrator, "SILENCE", 0.2)
    cells = [nbformat.v4.new_code_cell("import time; print('half a line', end=''); time.sleep(1)")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "silent.ipynb")
    run_notebook.execute(tmp_path / "silent.ipynb", tmp_path / "executed.ipynb")
    lines = capsys.readouterr().out.splitlines()
    assert "half a line" in lines and lines.count("[cell 1 has been running for 1 s]") >= 1, lines


# In processes of their own -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, where",
    [("silent", ""), ("silent", "api/"), ("silent", "resolve/"), ("stall", "model.safetensors"), (429, ""), (500, "")],
    ids=str,
)
def test_with_the_real_time_limits_a_stranger_waits_less_than_ten_seconds(tiny_hub, tmp_path, fault, where):
    code = """if True:
        import time
        from lora_lab.sources import find_model, load_sst2
        for search in (find_model, load_sst2):
            start = time.perf_counter()
            search("auto")
            print(time.perf_counter() - start)
    """
    tiny_hub.misbehave(fault, where)
    environment = {**os.environ, "HF_ENDPOINT": tiny_hub.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    tiny_hub.misbehave(None)
    model, seconds, data, more = run.stdout.splitlines()
    assert PACKAGED_MODEL in model and float(seconds) < 10 and float(more) < 10
    assert ("movie_phrases" in data) == (where != "model.safetensors")
    noise = [line for line in run.stderr.splitlines() if not line.startswith((BITSANDBYTES_SAYS, "Error while downl"))]
    assert "Traceback" not in run.stderr and (fault == "stall" or not noise), run.stderr


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that executes a notebook on a hub, with 64 sentences, and returns what it printed."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("SST2_DIR", raising=False)
    run_notebook.look_for_messages_every_second()

    def execute(name, address, core):
        monkeypatch.setenv("HF_ENDPOINT", address)
        notebook = nbformat.read(ROOT / name, as_version=4)
        for cell in notebook.cells:
            cell.source = cell.source.replace('"adapters/', f'"{tmp_path.as_posix()}/adapters/')  # others run beside us
            if "parameters" in cell.metadata.get("tags", []):
                cell.source += "\nTRAIN_SENTENCES = 64"
        nbformat.write(notebook, tmp_path / name)
        run_notebook.execute(tmp_path / name, tmp_path / "executed.ipynb", core=core)
        return "\n".join(run_notebook.printed_lines(nbformat.read(tmp_path / "executed.ipynb", as_version=4)))

    return execute


def check_two_runs(run, hub, name, core):
    hub.requests.clear()
    printed = run(name, hub.address, core)
    assert f"Model: {DEFAULT_MODEL} (from the Hugging Face hub" in printed and "Data: SST-2, " in printed
    assert "model.safetensors: 100%" in printed
    assert "Validation accuracy" in printed
    assert len(downloads(hub, MODEL + "/resolve/main/model.safetensors")) == 1
    assert len(downloads(hub, DATA + "/resolve/main/sst2/train")) == 1
    again = run(name, "http://127.0.0.1:9", core)  # where nobody listens
    assert f"Model: {DEFAULT_MODEL} (" in again and "Data: SST-2, " in again and "Validation accuracy" in again


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_core_runs_on_what_the_hub_has_and_then_without_a_network(name, run, tiny_hub):
    check_two_runs(run, tiny_hub, name, core=True)


@pytest.mark.online
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_whole_notebook_runs_on_bert_base_from_the_hub_and_then_without_a_network(name, run, tmp_path):
    write_sst2(tmp_path / "hub")
    repository = write_bert(tmp_path / "hub")
    assert (repository / "model.safetensors").stat().st_size == 440_449_768  # as the real one
    with LocalHub(tmp_path / "hub") as hub:
        check_two_runs(run, hub, name, core=False)
