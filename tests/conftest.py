"""A small BERT with random weights, and data of a few sentences: no test needs a network."""

import os
import tempfile

# before transformers is imported: no hub, and no local cache that somebody's own work has filled
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tests-")
os.environ.pop("SST2_DIR", None)

import json
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

import lora_utils

ROOT = Path(__file__).resolve().parents[1]
# What bitsandbytes, which only the tests install, says on CPUs with AVX512_BF16 as soon as anything imports it.
BITSANDBYTES_SAYS = "Failed to load CPU gemm_4bit_forward"
THREADS = torch.get_num_threads()
torch.set_num_threads(1)  # most models here are tiny: a second thread gains nothing, and waits on a crowded machine


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """No int8 arithmetic, whatever the machine has: the tests that are about it ask for it."""
    native = lora_utils.native_arithmetic()
    monkeypatch.setattr(lora_utils, "native_arithmetic", lambda: native._replace(int8=False))


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """The folder of a BERT of 2 layers, width 64, with weights large enough for every path to show in the logits."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    model = BertForSequenceClassification(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    model.bert.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(lora_utils.offline_model())


@pytest.fixture
def batch():
    """Three sentences of unlike length, padded, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 30000, (3, 9), generator=generator)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}


@pytest.fixture
def data_folder(tmp_path):
    """A function that writes a data folder: rows by split, as JSON lines."""

    def write(name="reviews", **splits):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write


def randomise(model, seed=0):
    """Give A, B and the head random values, so that an update is there to be seen."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.5)
    return model


def loop_of(notebook, **names):
    """What a notebook's cells define for training, `new_run` and `train`, to be run with a test's data and knobs."""
    cells = [cell.source for cell in nbformat.read(ROOT / notebook, as_version=4).cells if cell.cell_type == "code"]
    space = {
        **{"torch": torch, "sys": sys, "zlib": zlib, "Path": Path, "tqdm": tqdm, "SimpleNamespace": SimpleNamespace},
        **{"get_linear_schedule_with_warmup": get_linear_schedule_with_warmup, "my_rows": lora_utils.my_rows},
        **{"load_run": lora_utils.load_run, "save_run": lora_utils.save_run, "DATA": "phrases", "SEED": 0},
        **{"EPOCHS": 2, "CHECKPOINT_EVERY": 3, "BATCH_SIZE": 8, "device": torch.device("cpu"), **names},
    }
    for source in cells:
        if source.startswith(("def new_run(", "def training_step(", "def train(")):
            exec(source, space)
    return SimpleNamespace(**space)
