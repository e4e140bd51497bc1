"""Provide a small BERT with random weights and data of a few sentences, so that no test needs a network."""

import os
import tempfile

# Set before transformers is imported: use no hub, and no local cache that already holds models.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tests-")
os.environ.pop("SST2_DIR", None)

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import lora_utils
from lora_lab.sources import packaged_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# bitsandbytes, which only the tests install, prints this when it is imported on a CPU with AVX512_BF16.
BITSANDBYTES_SAYS = "Failed to load CPU gemm_4bit_forward"
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # most models here are tiny, so a second thread gains nothing


def pytest_collection_modifyitems(config, items):
    """Leave out the tests marked "online" unless -m asks for them."""
    if "online" not in config.option.markexpr:
        items[:] = [item for item in items if "online" not in item.keywords]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Turn int8 arithmetic off on every machine. The tests of int8 arithmetic turn it on."""
    native = lora_utils.detect_compute_format()
    monkeypatch.setattr(lora_utils, "detect_compute_format", lambda: native._replace(int8=None))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """Return the folder of a BERT of 2 layers and width 64.

    Its weights are so large that every path shows in the logits.
    """
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.bert.save_pretrained(folder)
    return folder


@pytest.fixture
def own_bert(bert, tmp_path):
    """Return the folder of a copy of that BERT, for a test to change."""
    return shutil.copytree(bert, tmp_path / "own-bert")


@pytest.fixture(scope="session")
def tokenizer():
    """Return the tokenizer of the packaged BERT."""
    return AutoTokenizer.from_pretrained(packaged_checkpoint())


@pytest.fixture
def batch():
    """Return three padded sentences of different lengths, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


@pytest.fixture
def data_folder(tmp_path):
    """Return a function that writes a data folder: the rows of each split, as JSON lines."""

    def write(name="reviews", **splits):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


@contextlib.contextmanager
def full_disk(room):
    """Let no file grow beyond so many bytes for a while."""
    resource = pytest.importorskip("resource")  # not on Windows
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def randomise(model, seed=0):
    """Give A, B and the head random values, so that the update shows in the logits."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.5)
    return model


@pytest.fixture
def few_phrases(tmp_path):
    """Return a data folder of so few movie phrases that a notebook runs in a minute."""
    folder = tmp_path / "few_phrases"
    folder.mkdir()
    for split, size in (("train", 170), ("validation", 48)):
        lines = (ROOT / "data" / "movie_phrases" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:size]), encoding="utf-8")
    return folder


def refused(message, call, *arguments, **options):
    """Check that this call raises a ValueError with this message."""
    with pytest.raises(ValueError, match=message):
        call(*arguments, **options)


def before_next_fsync(monkeypatch, act):
    """Let another function run just before the next file is flushed to the disk."""
    fsync = os.fsync

    def act_and_flush(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        act()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", act_and_flush)
