"""Faults that other people's bug reports found: what was silently wrong is refused, or right."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, randomise
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler
from transformers import AutoTokenizer

from lora_lab.sources import MOVIE_PHRASES, load_sst2, packaged_checkpoint
from lora_utils import LoRABertModel, evaluate, make_loader, qLoRABertModel


def model_of(bert, kind=LoRABertModel, **options):
    return randomise(kind(str(bert), dtype=torch.float32, **options)).eval()


@pytest.fixture(scope="module")
def phrases():
    return load_sst2(MOVIE_PHRASES, announce=False)["validation"].select(range(23))


# Trained, but not in the adapter's file


@pytest.mark.parametrize("kind", [LoRABertModel, qLoRABertModel])
@pytest.mark.parametrize("name", ["model.bert.pooler", "model.bert.embeddings.word_embeddings", "model"])
def test_what_is_trained_and_not_saved_is_refused_by_name(bert, tmp_path, kind, name):
    model = model_of(bert, kind)
    model.get_submodule(name).requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.bert\..* is trained.*merge_and_unload") as error:
        model.save_pretrained(tmp_path / "adapter")
    assert name == "model" or name in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_with_frozen_parts_is_saved(bert, tmp_path):
    model = model_of(bert)
    for layer in model.lora_layers().values():
        layer.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(model.adapter_state())


# Predictions in the order of the data


def of_sampler(loader, sampler):
    return DataLoader(loader.dataset, batch_size=4, sampler=sampler, collate_fn=loader.collate_fn)


def test_predictions_are_in_the_datas_order_whatever_order_the_loader_draws(bert, tokenizer, phrases):
    model, loader = model_of(bert), make_loader(phrases, tokenizer, batch_size=4)
    with torch.no_grad():  # let about half of the labels be 1, so that their order shows
        logits = model(**tokenizer(list(phrases["sentence"]), padding=True, return_tensors="pt")).logits
        model.model.classifier.bias[0] += (logits[:, 1] - logits[:, 0]).median() + 1e-3
    expected = evaluate(model, loader)
    assert 0 < sum(expected.predictions) < len(phrases)
    for other in (of_sampler(loader, RandomSampler(loader.dataset)), make_loader(phrases, tokenizer, 4, shuffle=True)):
        found = evaluate(model, other)
        assert found.predictions == expected.predictions and found.accuracy == expected.accuracy


def test_a_loader_that_repeats_or_leaves_out_sentences_is_refused(bert, tokenizer, phrases):
    model, loader = model_of(bert), make_loader(phrases, tokenizer, batch_size=4)
    weighted = of_sampler(loader, WeightedRandomSampler([1.0] * len(phrases), len(phrases)))
    with pytest.raises(ValueError, match=r"draws 23 of 23 sentences, not each once: use make_loader"):
        evaluate(model, weighted)
    loader.batch_sampler.set_epoch(0, start=2)
    with pytest.raises(ValueError, match=r"draws 15 of 23 sentences"):
        evaluate(model, loader)
    assert evaluate(model, loader).n == 23


def test_evaluating_draws_no_random_number(bert, tokenizer, phrases):
    model, loader = model_of(bert), make_loader(phrases, tokenizer, batch_size=4)
    state = torch.get_rng_state()
    evaluate(model, loader)
    assert torch.equal(torch.get_rng_state(), state)


# A base that is not finite


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"base_bits": 8}, {"base_bits": 4}], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_base_that_is_not_finite_as_stored_or_as_cast_is_refused_by_name(bert, tmp_path, value, options):
    for file in bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(bert / "model.safetensors")
    name = next(name for name in tensors if name.endswith("key.weight"))
    tensors[name][3, 4] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    kind = qLoRABertModel if "base_bits" in options else LoRABertModel
    options = {"dtype": torch.float32, **options}
    if value == 1e30 and options["dtype"] is torch.float32:
        kind(str(tmp_path), **options)
        return
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.\d\.attention\.self\.key\.weight holds .*not finite"):
        kind(str(tmp_path), **options)


# Lengths


def test_a_sentence_is_cut_at_the_smallest_of_the_limits(phrases):
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    long = phrases.select([0]).map(lambda row: {"sentence": "word " * 2000})
    for limit, longest in ((128, 128), (10**30, 512)):
        tokenizer.model_max_length = limit
        (batch,) = make_loader(long, tokenizer)
        assert batch["input_ids"].shape == (1, longest)


# Labels of another shape or dtype


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0.0, 1.0, 1.0]),
        torch.tensor([[0], [1], [1]]),
        torch.tensor([True, False, True]),
        torch.tensor([0]),
    ],
    ids=str,
)
def test_labels_of_another_shape_or_dtype_are_refused(bert, batch, labels):
    with pytest.raises(ValueError, match=r"labels are .*: they must be whole numbers, one for each"):
        model_of(bert)(**{**batch, "labels": labels})


def test_int32_labels_give_the_same_loss(bert, batch):
    model = model_of(bert)
    assert torch.equal(model(**{**batch, "labels": batch["labels"].int()}).loss, model(**batch).loss)


# Another default dtype


@pytest.mark.slow
def test_the_module_computes_the_same_whatever_the_default_dtype_is():
    code = """if True:
        import torch
        {before}
        import lora_utils
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        x = torch.randn(8, 128, dtype=torch.float32)
        linear = torch.nn.Linear(128, 8, dtype=torch.float32)
        linear.weight.data.copy_(x)
        q, scale = lora_utils.quantize(x, 3)
        decoded = [lora_utils.QuantizedLinear(linear, bits).dequantize() for bits in (4, 8)]
        print(q.sum().item(), scale.dtype, scale.sum().item(), [(d.dtype, d.double().sum().item()) for d in decoded])
    """
    printed = []
    for before in ("", "torch.set_default_dtype(torch.float64)"):
        command = [sys.executable, "-c", code.format(before=before)]
        printed.append(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert printed[0] == printed[1] and "torch.float32" in printed[0] and "float64" not in printed[0]


# Two writers of one folder


def test_two_writers_of_one_folder_leave_a_whole_adapter_and_no_other_file(bert, batch, tmp_path, monkeypatch):
    first, second = model_of(bert, rank=2), model_of(bert, rank=3)
    sync, written = os.fsync, []

    def write_in_between(descriptor):
        sync(descriptor)
        if not written:
            written.append(True)
            second.save_pretrained(tmp_path)

    monkeypatch.setattr(os, "fsync", write_in_between)
    first.save_pretrained(tmp_path)
    loaded = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, first(**batch).logits)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
