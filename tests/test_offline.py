"""Check `find_model` and `load_sst2` without a hub: they fall back quickly, quietly and without side effects."""

import inspect
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from conftest import BITSANDBYTES_SAYS, ROOT
from transformers import AutoTokenizer

from lora_lab import sources
from lora_lab.sources import (
    DEFAULT_MODEL,
    PACKAGED_MODEL,
    Checkpoint,
    find_model,
    hub_is_reachable,
    load_sst2,
    packaged_checkpoint,
)
from lora_utils import LoRABertModel


class FakeHub:
    """Stand for the hub's HTTP session: count the questions, and answer in one way."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = 0

    def head(self, url, timeout):
        self.asked += 1
        return self.answer(timeout)


def stay_silent(timeout):
    time.sleep(30)


def refuse(timeout):
    raise OSError("connection refused")


def succeed(timeout):
    return SimpleNamespace(status_code=200)


@pytest.fixture
def forget():
    """Forget, before and after a test, whether the hub answered and where the package lies."""
    for function in (hub_is_reachable, packaged_checkpoint):
        function.cache_clear()
    yield
    for function in (hub_is_reachable, packaged_checkpoint):
        function.cache_clear()


@pytest.fixture
def online(monkeypatch, forget):
    """Return a function that sets the libraries online and gives them a hub that answers in one way.

    No other connection is possible. `connections` of the hub lists the hosts that something tried to reach.
    """

    def go_online(answer):
        hub = FakeHub(answer)
        hub.connections = []

        def no_address(host, *args, **options):
            hub.connections.append(host)
            raise OSError(f"no address for {host}")

        monkeypatch.setattr(huggingface_hub, "get_session", lambda: hub)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(socket, "getaddrinfo", no_address)
        return hub

    return go_online


def test_a_hub_that_does_not_answer_is_asked_once_and_for_a_short_time(online):
    hub = online(stay_silent)
    start = time.perf_counter()
    assert [hub_is_reachable(1), hub_is_reachable(1), hub_is_reachable(1)] == [False] * 3
    assert time.perf_counter() - start < 3 and hub.asked == 1
    assert not huggingface_hub.is_offline_mode()


def test_without_an_argument_it_waits_five_seconds_at_most():
    assert inspect.signature(hub_is_reachable).parameters["seconds"].default <= 5


@pytest.mark.parametrize("answer", [stay_silent, refuse], ids=lambda answer: answer.__name__)
def test_with_an_unreachable_hub_auto_asks_once_and_for_a_short_time(online, monkeypatch, capsys, answer):
    hub = online(answer)
    brief = hub_is_reachable.__wrapped__
    monkeypatch.setattr(brief, "__defaults__", (0.5,))
    start = time.perf_counter()
    checkpoint = find_model("auto")
    assert checkpoint.name == PACKAGED_MODEL
    assert load_sst2("auto")["train"].info.dataset_name == "movie_phrases"
    LoRABertModel(checkpoint.name, folder=checkpoint.folder)
    AutoTokenizer.from_pretrained(checkpoint.folder)
    assert time.perf_counter() - start < 5
    assert hub.asked == 1 and not hub.connections
    assert capsys.readouterr().out.count("cannot be reached") == 2


def test_a_data_folder_is_read_without_the_hub_or_any_connection(online, data_folder):
    rows = [{"sentence": "a film", "label": 1}]
    hub = online(refuse)
    assert load_sst2(str(data_folder(train=rows, validation=rows)))["train"]["sentence"] == ["a film"]
    assert hub.asked == 0 and not hub.connections


def test_when_the_libraries_are_offline_the_hub_is_not_asked(online, monkeypatch):
    hub = online(succeed)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert not hub_is_reachable() and hub.asked == 0


def test_auto_falls_back_to_the_packaged_model_and_says_so_in_one_line(capsys):
    checkpoint = find_model("auto")
    out = capsys.readouterr().out
    assert isinstance(checkpoint, Checkpoint) and checkpoint._fields == ("name", "folder", "origin")
    assert checkpoint.name == PACKAGED_MODEL and checkpoint.folder == packaged_checkpoint()
    assert (checkpoint.folder / "model.safetensors").is_file()
    assert out.count("\n") == 1 and "instead of" in out and DEFAULT_MODEL in out and "cannot be reached" in out


def test_the_packaged_model_and_a_folder_are_found_by_name_and_announced_on_request(bert, capsys):
    assert find_model(PACKAGED_MODEL)[:2] == (PACKAGED_MODEL, packaged_checkpoint())
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and PACKAGED_MODEL in out and "instead of" not in out
    assert find_model(str(bert), announce=False)[:2] == (str(bert), bert)
    load_sst2("auto", announce=False)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_named_is_never_replaced(tmp_path):
    for name in (DEFAULT_MODEL, "nobody/no-such-model", str(tmp_path / "nothing")):
        with pytest.raises(ValueError, match="allowed are") as error:
            find_model(name)
        assert name in str(error.value) and "cannot be reached" in str(error.value)


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Return a function that puts files into a hub cache as BERT-base, in the layout of the hub's own library."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def put(*names):
        repository = tmp_path / f"models--{DEFAULT_MODEL.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot.mkdir(parents=True)
        for name in names:
            (snapshot / name).symlink_to(packaged_checkpoint() / name)
        return snapshot

    return put


WHOLE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def test_auto_takes_bert_base_from_the_local_cache(cached, capsys):
    snapshot = cached(*WHOLE)
    checkpoint = find_model("auto")
    assert checkpoint[:2] == (DEFAULT_MODEL, snapshot)
    assert DEFAULT_MODEL in capsys.readouterr().out
    model = LoRABertModel(checkpoint.name, folder=checkpoint.folder)
    assert model.model_name == DEFAULT_MODEL
    assert LoRABertModel(DEFAULT_MODEL).fingerprint == model.fingerprint  # the hub's library finds it in the cache too


def test_a_model_in_the_local_cache_is_found_without_asking_the_hub(cached, online):
    snapshot = cached(*WHOLE)
    hub = online(refuse)
    assert find_model("auto")[:2] == (DEFAULT_MODEL, snapshot)
    assert hub.asked == 0 and not hub.connections


@pytest.mark.parametrize("names", [["config.json", "vocab.txt"], ["config.json", "model.safetensors"]], ids=str)
def test_a_model_that_is_cached_in_part_does_not_count_as_cached(cached, names):
    cached(*names)
    assert find_model("auto").name == PACKAGED_MODEL


def test_weights_with_another_hash_are_refused(monkeypatch, forget):
    monkeypatch.setattr(sources, "PACKAGED_SHA256", "0" * 64)
    with pytest.raises(OSError, match="SHA-256"):
        find_model("auto")


def test_without_hub_and_package_the_error_says_what_to_install(monkeypatch, forget):
    monkeypatch.setattr(sources, "PACKAGE", "no-such-package")
    with pytest.raises(OSError, match=r"pip install .* data/offline-model\.txt"):
        find_model("auto")


@pytest.mark.slow
def test_on_a_machine_without_a_hub_the_fallbacks_take_less_than_ten_seconds_and_make_no_noise(tmp_path):
    """Run in another process, with an address that leads nowhere for a hub."""
    code = """if True:
        import time
        from lora_lab.sources import find_model, load_sst2
        from lora_utils import LoRABertModel
        start = time.perf_counter()
        checkpoint = find_model("auto")
        LoRABertModel(checkpoint.name, folder=checkpoint.folder)
        load_sst2("auto")
        print(time.perf_counter() - start)
    """
    environment = {"HF_ENDPOINT": "http://192.0.2.1", "PATH": "", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Model: ") and lines[1].startswith("Data: "), run
    noise = [line for line in run.stderr.splitlines() if not line.startswith(BITSANDBYTES_SAYS)]
    assert float(lines[2]) < 10 and not noise
