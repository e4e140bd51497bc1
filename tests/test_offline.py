import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from conftest import BITSANDBYTES_SAYS

import lora_utils
from lora_utils import DEFAULT_MODEL, OFFLINE_MODEL, find_model, hub_answers

ROOT = Path(__file__).resolve().parents[1]


class SilentHub:
    """A hub whose answer takes longer than anyone waits."""

    asked = 0

    def head(self, url, timeout):
        type(self).asked += 1
        time.sleep(30)


@pytest.fixture
def forget():
    """Forget, before and after a test, whether the hub answered and where the package lies."""
    for function in (hub_answers, lora_utils.offline_model):
        function.cache_clear()
    yield
    for function in (hub_answers, lora_utils.offline_model):
        function.cache_clear()


def test_a_hub_that_does_not_answer_is_asked_once_and_for_a_short_time(monkeypatch, forget):
    monkeypatch.setattr(huggingface_hub, "get_session", SilentHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    start = time.perf_counter()
    assert [hub_answers(1), hub_answers(1), hub_answers(1)] == [False] * 3
    assert time.perf_counter() - start < 3 and SilentHub.asked == 1
    assert huggingface_hub.is_offline_mode() and datasets.config.HF_HUB_OFFLINE


def test_a_hub_that_answers_leaves_the_libraries_online(monkeypatch, forget):
    monkeypatch.setattr(SilentHub, "head", lambda *args, **options: SimpleNamespace(status_code=200))
    monkeypatch.setattr(huggingface_hub, "get_session", SilentHub)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert hub_answers() and not huggingface_hub.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def test_auto_falls_back_to_the_packaged_model_and_says_so_in_one_line(capsys):
    checkpoint = find_model("auto")
    out = capsys.readouterr().out
    assert checkpoint.name == OFFLINE_MODEL and (checkpoint.folder / "model.safetensors").is_file()
    assert out.count("\n") == 1 and "instead of" in out and DEFAULT_MODEL in out and "cannot be reached" in out


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """A function that puts files into a hub cache, laid out as the hub's own library lays it out, as BERT-base."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def put(*names):
        repository = tmp_path / f"models--{DEFAULT_MODEL.replace('/', '--')}"
        snapshot = repository / "snapshots" / ("0" * 40)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        snapshot.mkdir(parents=True)
        for name in names:
            (snapshot / name).symlink_to(lora_utils.offline_model() / name)
        return snapshot

    return put


def test_auto_takes_bert_base_from_the_local_cache(cached, capsys):
    snapshot = cached("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
    assert find_model("auto")[:2] == (DEFAULT_MODEL, snapshot)
    assert DEFAULT_MODEL in capsys.readouterr().out
    assert lora_utils.LoRABertModel("auto").model_name == DEFAULT_MODEL


@pytest.mark.parametrize("names", [["config.json", "vocab.txt"], ["config.json", "model.safetensors"]], ids=str)
def test_a_model_that_is_cached_in_part_does_not_count_as_cached(cached, names):
    cached(*names)
    assert find_model("auto").name == OFFLINE_MODEL


def test_weights_with_another_hash_are_refused(monkeypatch, forget):
    monkeypatch.setattr(lora_utils, "OFFLINE_SHA256", "0" * 64)
    with pytest.raises(OSError, match="SHA-256"):
        find_model("auto")


def test_without_hub_and_package_the_error_says_what_to_install(monkeypatch, forget):
    monkeypatch.setattr(lora_utils, "OFFLINE_PACKAGE", "no-such-package")
    with pytest.raises(OSError, match=r"pip install .* data/offline-model\.txt"):
        find_model("auto")


@pytest.mark.slow
def test_on_a_machine_without_a_hub_the_fallbacks_take_less_than_ten_seconds_and_make_no_noise(tmp_path):
    """In a process of its own, with an address that leads nowhere for a hub."""
    code = """if True:
        import time, lora_utils
        start = time.perf_counter()
        lora_utils.LoRABertModel("auto")
        lora_utils.load_sst2("auto")
        print(time.perf_counter() - start)
    """
    environment = {"HF_ENDPOINT": "http://192.0.2.1", "PATH": "", "HF_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = run.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("Model: ") and lines[1].startswith("Data: "), run
    noise = [line for line in run.stderr.splitlines() if not line.startswith(BITSANDBYTES_SAYS)]
    assert float(lines[2]) < 10 and not noise
