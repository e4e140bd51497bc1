"""Check `find_model` and `load_sst2` without a hub: they fall back quickly, quietly and without side effects."""

import inspect
import socket
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
from transformers import AutoTokenizer

from lora_lab import sources
from lora_lab.sources import DEFAULT_MODEL, PACKAGED_MODEL, find_model, hub_is_reachable, load_sst2, packaged_checkpoint
from lora_utils import LoRABertModel


def stay_silent(timeout):
    time.sleep(30)


def refuse(timeout):
    raise OSError("connection refused")


@pytest.fixture
def forget():
    """Forget, before and after a test, whether the hub answered and where the package lies."""
    hub_is_reachable.cache_clear()
    packaged_checkpoint.cache_clear()
    yield
    hub_is_reachable.cache_clear()
    packaged_checkpoint.cache_clear()


@pytest.fixture
def online(monkeypatch, forget):
    """Return a function that gives the libraries a hub which answers in one way, and a list of the connections.

    No connection is made: the list holds "asked" for each question to the hub, and else the host.
    """

    def go_online(answer, offline=False):
        connections = []

        def head(url, timeout):
            connections.append("asked")
            return answer(timeout)

        def no_address(host, *args, **options):
            connections.append(host)
            raise OSError(f"no address for {host}")

        monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=head))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(socket, "getaddrinfo", no_address)
        return connections

    return go_online


@pytest.mark.parametrize("answer", [stay_silent, refuse], ids=lambda answer: answer.__name__)
def test_with_an_unreachable_hub_auto_asks_once_and_for_a_short_time(online, monkeypatch, capsys, answer):
    connections = online(answer)
    assert inspect.signature(hub_is_reachable).parameters["seconds"].default <= 5
    monkeypatch.setattr(hub_is_reachable.__wrapped__, "__defaults__", (0.5,))
    start = time.perf_counter()
    checkpoint = find_model("auto")
    assert checkpoint.name == PACKAGED_MODEL
    assert load_sst2("auto")["train"].info.dataset_name == "movie_phrases"
    LoRABertModel(checkpoint.name, folder=checkpoint.folder)
    AutoTokenizer.from_pretrained(checkpoint.folder)
    assert time.perf_counter() - start < 5 and connections == ["asked"]
    assert not huggingface_hub.is_offline_mode()
    assert capsys.readouterr().out.count("cannot be reached") == 2


def test_a_folder_needs_no_hub_and_when_the_libraries_are_offline_it_is_not_asked(online, data_folder, bert):
    rows = [{"sentence": "a film", "label": 1}]
    connections = online(refuse)
    assert load_sst2(str(data_folder(train=rows, validation=rows)))["train"]["sentence"] == ["a film"]
    assert find_model(str(bert))[:2] == (str(bert), bert)
    assert not connections
    connections = online(lambda timeout: SimpleNamespace(status_code=200), offline=True)
    assert not hub_is_reachable() and not connections


def test_auto_falls_back_to_the_packaged_model_and_says_so_in_one_line_if_asked_to(capsys):
    checkpoint = find_model("auto")
    assert checkpoint.name == PACKAGED_MODEL and checkpoint.folder == packaged_checkpoint()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "instead of" in out and DEFAULT_MODEL in out and "cannot be reached" in out
    assert find_model(PACKAGED_MODEL)[:2] == checkpoint[:2]
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and PACKAGED_MODEL in out and "instead of" not in out
    find_model("auto", announce=False)
    load_sst2("auto", announce=False)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_named_is_never_replaced(tmp_path):
    for name in (DEFAULT_MODEL, "nobody/no-such-model", str(tmp_path / "nothing"), ""):
        with pytest.raises(ValueError, match=f"no model {name!r}.*cannot be reached.*allowed are"):
            find_model(name)


def test_auto_takes_bert_base_from_the_local_cache_once_it_is_whole(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{DEFAULT_MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert find_model("auto").name == PACKAGED_MODEL
        (snapshot / name).symlink_to(packaged_checkpoint() / name)
    assert find_model("auto")[:2] == (DEFAULT_MODEL, snapshot)
    model = LoRABertModel(DEFAULT_MODEL)  # the hub's library finds it in the cache too
    assert model.fingerprint == LoRABertModel(DEFAULT_MODEL, folder=snapshot).fingerprint


def test_a_package_with_other_weights_is_refused_and_without_any_the_error_says_what_to_install(monkeypatch, forget):
    monkeypatch.setattr(sources, "PACKAGED_SHA256", "0" * 64)
    with pytest.raises(OSError, match="SHA-256"):
        find_model("auto")
    monkeypatch.setattr(sources, "PACKAGE", "no-such-package")
    with pytest.raises(OSError, match=r"pip install .* data/offline-model\.txt"):
        find_model("auto")
