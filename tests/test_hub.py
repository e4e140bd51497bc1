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


def test_auto_downloads_bert_base_and_sst2_once_with_a_bar_and_needs_no_network_afterwards(hub, capsys):
    session = huggingface_hub.get_session()
    before = session.event_hooks, dict(vars(constants))
    checkpoint, data = find_model("auto"), load_sst2("auto")
    assert (session.event_hooks, vars(constants)) == before  # the settings of the library stay
    assert checkpoint.name == DEFAULT_MODEL == MODEL
    assert (checkpoint.folder / "model.safetensors").read_bytes() == contents(hub)
    assert data["train"].info.dataset_name == "SST-2" and list(data) == ["train", "validation"]
    assert data["train"].column_names == ["sentence", "label"] and len(data["train"]) == 1952
    printed = capsys.readouterr()
    model_line, data_line = printed.out.splitlines()
    assert model_line == f"Model: {DEFAULT_MODEL} (from the Hugging Face hub or its local cache)"
    assert data_line.startswith("Data: SST-2, 1,952 training and 706 validation sentences (nyu-mll/glue, from the")
    assert "model.safetensors: 100%" in printed.err and "config.json" not in printed.err
    names = [line.partition("/main/")[2] for line in downloads(hub)]  # the largest comes last
    assert names[:5] == ["tokenizer_config.json", "config.json", "vocab.txt", "tokenizer.json", "model.safetensors"]
    assert names[5:] == [f"sst2/{split}-00000-of-00001.parquet" for split in ("validation", "train")]

    hub.requests.clear()
    hub_is_reachable.cache_clear()
    assert find_model("auto") == checkpoint and load_sst2("auto")["train"][:] == data["train"][:]
    assert not hub.requests and capsys.readouterr().err == ""
    model = LoRABertModel(checkpoint.name, folder=checkpoint.folder)
    assert model.model.config.hidden_size == 64 and not hub.requests


ANSWERS = {404: "answers 404 Not Found", 500: "answers 500 Internal Server Error"}


@pytest.mark.parametrize("where", [("", ""), ("api/", "api/"), ("model.safetensors", "0001.parquet")], ids=str)
@pytest.mark.parametrize("fault", ["silent", *ANSWERS])
def test_a_hub_that_fails_is_replaced_at_once_and_named_data_are_refused(hub, capsys, fault, where):
    """Fail everywhere, where repositories are described, and at the largest files."""
    reason = ANSWERS.get(fault, "(cannot be reached|does not answer|fails .*timed out)")
    for search, path, instead, named in zip(
        (find_model, load_sst2), where, (PACKAGED_MODEL, "movie_phrases"), (DEFAULT_MODEL, "sst2"), strict=True
    ):
        hub.misbehave(fault, path)
        start = time.perf_counter()
        search("auto")
        assert time.perf_counter() - start < 3
        (line,) = capsys.readouterr().out.splitlines()
        assert instead in line and re.search(f"instead of .*: the hub {reason}", line), line
        hub.misbehave(fault)
        with pytest.raises(ValueError, match=rf"no (model|data) .{named}.: .*the hub .*allowed are"):
            search(named)
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
@pytest.mark.parametrize("search", [find_model, load_sst2])
def test_a_file_that_does_not_arrive_whole_is_never_used(hub, capsys, fault, search):
    wanted = {find_model: ("model.safetensors", PACKAGED_MODEL), load_sst2: ("0001.parquet", "movie_phrases")}
    name, instead = wanted[search]
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


def test_a_file_that_is_damaged_in_the_cache_is_downloaded_again_and_no_other(hub):
    folder = find_model("auto").folder
    (folder / "model.safetensors").resolve().write_bytes(contents(hub)[:-1] + b"!")
    hub.requests.clear()
    assert find_model("auto").folder == folder
    assert (folder / "model.safetensors").read_bytes() == contents(hub) and len(downloads(hub)) == 1


def test_a_cache_that_cannot_be_written_is_named(hub, capsys):
    Path(constants.HF_HUB_CACHE).write_text("a file where the folder should be", encoding="utf-8")
    for search, instead in (find_model, PACKAGED_MODEL), (load_sst2, "movie_phrases"):
        search("auto")
        line = capsys.readouterr().out
        assert instead in line and "the local cache cannot be used (" in line and constants.HF_HUB_CACHE in line
    with pytest.raises(ValueError, match="the local cache cannot be used"):
        find_model(DEFAULT_MODEL)


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json or vocab.txt"])
def test_a_repository_without_a_file_that_is_needed_is_refused_by_name(hub, missing, tmp_path, monkeypatch):
    other = tmp_path / "hub" / "models" / "some" / "bert"
    other.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        if name not in missing:
            (other / name).write_bytes(contents(hub, name))
    monkeypatch.setattr(hub, "folder", tmp_path / "hub")
    with pytest.raises(ValueError, match=f"no model 'some/bert': no such folder, and it has no {missing}"):
        find_model("some/bert")
    assert not downloads(hub)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, where", [("nowhere", ""), ("silent", ""), ("silent", "api/"), ("stall", "model.safetensors"), (500, "")]
)
def test_with_the_real_time_limits_a_stranger_waits_less_than_ten_seconds(tiny_hub, tmp_path, fault, where):
    code = """if True:
        import time
        from lora_lab.sources import find_model, load_sst2
        from lora_utils import LoRABertModel
        for search in (find_model, load_sst2):
            start = time.perf_counter()
            found = search("auto")
            print(time.perf_counter() - start)
            if search is find_model:
                LoRABertModel(found.name, folder=found.folder)
    """
    tiny_hub.misbehave(fault, where)
    address = "http://192.0.2.1" if fault == "nowhere" else tiny_hub.address
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    tiny_hub.misbehave(None)
    model, seconds, data, more = run.stdout.splitlines()
    assert PACKAGED_MODEL in model and float(seconds) < 10 and float(more) < 10
    assert ("movie_phrases" in data) == (fault != "stall")
    noise = [line for line in run.stderr.splitlines() if not line.startswith((BITSANDBYTES_SAYS, "Error while downl"))]
    assert "Traceback" not in run.stderr and (fault == "stall" or not noise), run.stderr


ON_BERT_BASE = [pytest.mark.online, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("name", ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"])
@pytest.mark.parametrize("core", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=ON_BERT_BASE)])
def test_a_notebook_runs_on_what_the_hub_has_and_then_without_a_network(name, core, tmp_path, monkeypatch):
    write_sst2(tmp_path)
    write_bert(tmp_path, tiny=core)
    for variable, value in {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "SST2_DIR": ""}.items():
        monkeypatch.setenv(variable, value)
    run_notebook.look_for_messages_every_second()
    notebook = nbformat.read(ROOT / name, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"adapters/', f'"{tmp_path.as_posix()}/adapters/')  # others run beside us
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\nTRAIN_SENTENCES = 64"
    nbformat.write(notebook, tmp_path / name)
    with LocalHub(tmp_path) as hub:
        for address in (hub.address, "http://127.0.0.1:9"):  # where nobody listens
            monkeypatch.setenv("HF_ENDPOINT", address)
            run_notebook.execute(tmp_path / name, tmp_path / "executed.ipynb", core=core)
            lines = run_notebook.printed_lines(nbformat.read(tmp_path / "executed.ipynb", as_version=4))
            for start in (f"Model: {DEFAULT_MODEL} (from the Hugging Face hub", "Data: SST-2, ", "Validation accuracy"):
                assert any(line.startswith(start) for line in lines), (start, lines)
            assert any("model.safetensors: 100%" in line for line in lines) == (address == hub.address)
        for file in (MODEL + "/resolve/main/model.safetensors", DATA + "/resolve/main/sst2/train"):
            assert len(downloads(hub, file)) == 1
