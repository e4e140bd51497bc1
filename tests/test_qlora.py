"""Check both models in every combination of bits, rounding a whole adapter, and the ledger."""

import copy
import gc
import itertools
import math
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import ROOT, randomise
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel

from lora_lab.ledger import memory_ledger
from lora_lab.rounding import WAYS, round_adapter
from lora_utils import LoRABertModel, QuantizedEmbedding, QuantizedLinear, detect_compute_format, qLoRABertModel

QUANTISED = [{"bits": 2, "base_bits": None}, {"bits": 3, "base_bits": 8}, {"bits": 8, "base_bits": 4}]
KINDS = [{}, *QUANTISED]
STATES = [("merge", QUANTISED[0]), *itertools.product(["pack", "unpack"], QUANTISED)]


def model_of(bert, dtype=torch.float32, **options):
    """Return a model of LoRA, or of q-LoRA where the options tell bits."""
    model_class = qLoRABertModel if options.keys() & {"bits", "base_bits"} else LoRABertModel
    return model_class(str(bert), dtype=dtype, **options)


@pytest.mark.parametrize("base_bits, allowed, value", [(8, 0.1, math.nan), (4, 0.6, math.inf)])
def test_a_quantised_base_is_nearly_the_same_and_neither_merges_nor_packs_a_nan(bert, batch, base_bits, allowed, value):
    model = model_of(bert, base_bits=base_bits)
    modules = dict(model.model.named_modules())
    quantized = {n for n, m in modules.items() if isinstance(m, QuantizedLinear) and m.bits == base_bits}
    assert len(quantized) == 2 * 6 + 1 and "bert.pooler.dense" in quantized
    assert sum(isinstance(m, QuantizedEmbedding) for m in modules.values()) == 3
    assert [n for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Embedding))] == ["classifier"]
    del batch["labels"]
    exact = model_of(bert).encode(**batch)
    assert (model.encode(**batch) - exact).norm() < allowed * exact.norm()
    *layers, last = model.lora_layers().values()
    with pytest.raises(ValueError, match="merge_and_unload"):
        last.merge()
    last.lora_B.data[3, 1] = value
    with pytest.raises(ValueError, match=f"lora_B holds {value}"):
        model.pack()
    assert not any(layer.packed for layer in layers)


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_trains_a_b_and_head_alone_and_computes_the_same_packed_and_merged(bert, batch, options, dtype):
    torch.manual_seed(0)
    model = model_of(bert, dtype, target_modules="all-linear", **options)
    layers = model.lora_layers()
    assert model.dtype == dtype and len(layers) == 2 * 6 + 1 and "bert.pooler.dense" in layers
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        trained = "lora_" in name or "classifier" in name
        assert torch.equal(tensor, before[name]) != trained, name
        assert tensor.dtype == torch.float32 or not trained, name
    expected = model.train()(**batch).logits
    in_float32 = copy.deepcopy(model).float()(**batch).logits  # in training too, as the backbone's dropout is off
    plain = [model.merge_and_unload()]
    assert torch.equal(model(**batch).logits, expected)
    for layer in layers.values():
        layer.pack() if options else layer.merge()
    plain.append(model.merge_and_unload())
    if options:
        assert torch.equal(model(**batch).logits, expected)
        assert all("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    for layer in layers.values():
        layer.unpack() if options else layer.unmerge()
    assert torch.equal(model(**batch).logits, expected)
    for bert in plain:
        assert type(bert) is BertForSequenceClassification and {p.dtype for p in bert.parameters()} == {torch.float32}
        assert bert.config.hidden_dropout_prob == bert.config.attention_probs_dropout_prob == 0.1
        torch.testing.assert_close(bert(**batch).logits, in_float32, atol=1e-5, rtol=1e-5)


def test_under_one_seed_every_kind_has_the_same_a_and_head_and_number_of_parameters(bert, capsys):
    plain = BertForSequenceClassification(BertConfig.from_pretrained(bert))
    total = sum(p.numel() for p in plain.parameters()) + 4 * 8 * (64 + 64)
    states = []
    for options in KINDS:
        torch.manual_seed(3)
        model = model_of(bert, dtype=None, **options)
        assert model.dtype == detect_compute_format().dtype
        states.append(model.state_dict())
        model.print_trainable_parameters()
        expected = f"trainable params: 4,226 || all params: {total:,} || trainable%: {100 * 4226 / total:.4f}"
        assert capsys.readouterr().out.strip() == expected
    names = [name for name in states[0] if "lora_" in name or "classifier" in name]
    assert len(names) == 10 and all(torch.equal(state[name], states[0][name]) for name in names for state in states)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_model_follows_a_change_of_dtype_a_copy_a_state_dict_and_autocast(bert, batch, options):
    model, other = (model_of(bert, **options).eval() for _ in range(2))
    randomise(model)
    expected = model(**batch).logits
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
    torch.testing.assert_close(copy.deepcopy(model).double()(**batch).logits, expected, atol=1e-5, rtol=1e-5)
    in_bf16 = copy.deepcopy(model).bfloat16()
    torch.testing.assert_close(in_bf16(**batch).logits, expected, atol=0.2, rtol=0.2)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).logits, expected, atol=0.2, rtol=0.2)
    for module, back in zip(model.modules(), in_bf16.float().modules(), strict=True):
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            assert torch.equal(module.dequantize(), back.dequantize())


@pytest.mark.parametrize("options", QUANTISED, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_loads_packed_with_the_same_logits(bert, batch, tmp_path, options, packed):
    model = randomise(model_of(bert, rank=3, dropout=0.5, target_modules=["query", "dense"], **options)).eval()
    expected = model(**batch).logits
    if packed:
        model.pack()
    model.save_pretrained(tmp_path)
    assert all(layer.packed == packed for layer in model.lora_layers().values())
    loaded = qLoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(layer.packed for layer in loaded.lora_layers().values()) and not loaded.training
    assert torch.equal(loaded(**batch).logits, expected)
    assert not torch.equal(loaded.train()(**batch).logits, expected)  # by dropout
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_quantized.safetensors", "quantized_config.json"}
    if options["base_bits"] is None:
        model.save_pretrained(tmp_path, peft=True)
        theirs = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path).eval()
        torch.testing.assert_close(theirs(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_in_older_names_loads_the_same_and_another_shape_is_refused(bert, own_bert, batch):
    file = own_bert / "model.safetensors"
    older = {}
    for name, tensor in load_file(file).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        older[f"bert.{name}"] = tensor
    save_file(older, file)
    assert torch.equal(*(model_of(folder).encode(batch["input_ids"]) for folder in (bert, own_bert)))
    save_file({**older, "bert.pooler.dense.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias of shape \(3,\)"):
        model_of(own_bert)


@pytest.mark.parametrize("way", WAYS)
def test_round_adapter_rounds_a_copy_that_packs_to_the_same_and_returns_the_error_of_all_updates(bert, way):
    model = randomise(model_of(bert, rank=4))
    before = copy.deepcopy(model.state_dict())
    rounded, error = round_adapter(model, way, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    packed = model_of(bert, rank=4, bits=3)
    packed.load_state_dict(rounded.state_dict())
    packed.pack()
    updates = []
    for exact, new, small in zip(*(each.lora_layers().values() for each in (model, rounded, packed)), strict=True):
        assert all(map(torch.equal, new.low_rank(), WAYS[way](*exact.low_rank(), 3)))
        if way != "absmax":  # whose grid is not that of `pack`
            torch.testing.assert_close(small.delta_weight(), new.delta_weight())
        updates.append(torch.stack([exact.delta_weight(), new.delta_weight()]))
    exact, found = torch.stack(updates, dim=1)
    assert 0 < error < 1 and error == pytest.approx(((found - exact).norm() / exact.norm()).item(), rel=1e-5)


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("state, options", STATES, ids=str)
def test_the_ledger_counts_what_the_storages_hold(bert, batch, state, options):
    model = model_of(bert, torch.bfloat16, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for layer in model.lora_layers().values():
        getattr(layer, state)()
    model(**batch).loss.backward()
    optimizer.step()
    held = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [t for state in optimizer.state.values() for t in state.values()]
    held += [t for group in optimizer.param_groups for p in group["params"] for t in (p, p.grad) if t is not None]
    assert memory_ledger(model, optimizer).total_bytes() == storages(held)

    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = model(**batch)
    ledger = memory_ledger(model, optimizer, batch)
    assert ledger.total_bytes() == storages([*held, *saved]) > storages(held) and output.loss > 0
    assert ledger.total_bytes("saved for backward") == storages([*held, *saved]) - storages(held)


def test_the_ledger_names_what_it_counts_and_its_adapter_is_as_large_as_the_file(bert, batch, tmp_path):
    model = model_of(bert, bits=3, base_bits=4)
    model.pack()
    model.save_pretrained(tmp_path)
    ledger = memory_ledger(model)
    rows = {(row.what, row.stored_as): (row.count, row.num_bytes) for row in ledger}
    numbers = 4 * 8 * (64 + 64)
    assert rows["A and B", "3 bits"] == (numbers, numbers * 3 // 8)
    assert rows["scales of A and B", "float32"] == (4 * 16, 4 * 4 * 16)
    assert rows["head", "float32"] == (130, 520)
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64
    assert rows["frozen weights", "NF4"] == (weights, weights // 2)
    assert rows["embeddings", "NF4"] == ((30522 + 512 + 2) * 64, (30522 + 512 + 2) * 32)
    assert ("gradients", "float32") not in rows and f"{ledger.total_bytes():,}" in str(ledger)
    data = (tmp_path / "adapter_quantized.safetensors").read_bytes()
    assert ledger.total_bytes(*ledger.ADAPTER) == len(data) - 8 - int.from_bytes(data[:8], "little")
    saved = []
    references = []
    for base_bits in (None, 4):
        other = model_of(bert, base_bits=base_bits)
        saved.append(memory_ledger(other, batch=batch).total_bytes("saved for backward"))
        references += map(weakref.ref, other.parameters())
    del other
    gc.collect()
    assert saved[1] <= saved[0]  # no decoded weight is saved
    assert all(reference() is None for reference in references)  # the ledger keeps nothing alive


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_bert_base_is_as_small_as_the_readme_says_and_its_4_bit_base_is_loaded_within_320_mb(tmp_path):
    BertModel(BertConfig()).save_pretrained(tmp_path)
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for bits, base_bits, where in ((8, None, "in bfloat16"), (4, 8, "at 8 bits"), (2, 4, "at 4 bits")):
        model = qLoRABertModel(str(tmp_path), bits=bits, base_bits=base_bits, dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 296_450
        size = memory_ledger(model).total_bytes()
        assert f"{size / 1e6:.1f} MB {where}" in readme
        model.pack()
        assert f"{memory_ledger(model).total_bytes('A and B', 'scales of A and B'):,} at {bits} bits" in readme
    assert size <= 58e6

    code = """if True:
        import sys, pathlib, torch, lora_utils
        def status(field):
            return int(pathlib.Path("/proc/self/status").read_text().partition(field)[2].split()[0]) * 1024
        start = status("VmRSS:")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        model = lora_utils.qLoRABertModel(sys.argv[1], bits=8, base_bits=4, dtype=torch.bfloat16)
        print(status("VmHWM:") - start)
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    peak = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert peak <= 320e6
