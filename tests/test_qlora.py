"""Check `QuantizedLoRALayer`, `qLoRABertModel` and the ledger."""

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
from conftest import ROOT, randomise, train
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import lora_utils
from lora_lab.ledger import memory_ledger
from lora_lab.rounding import WAYS, round_adapter
from lora_utils import LoRABertModel, QuantizedEmbedding, QuantizedLinear, QuantizedLoRALayer, qLoRABertModel

BITS = [2, 3, 8]
BASES = [None, 8, 4]
COMBINATIONS = list(itertools.product(BITS, BASES))
OF_A_MODEL = [{"bits": bits, "base_bits": base_bits} for bits, base_bits in zip(BITS, BASES, strict=True)]


def layer_of(bits, base_bits, dtype, fresh=False):
    """Return a layer whose B is not zero, so that its update shows, or one as it starts. Without bits, it is float."""
    torch.manual_seed(0)
    base = nn.Linear(64, 32, dtype=dtype)
    base = QuantizedLinear(base, base_bits) if base_bits else base
    layer = QuantizedLoRALayer(base, rank=4, bits=bits) if bits else lora_utils.LoRALayer(base, rank=4)
    if not fresh:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def kind_of(options):
    return qLoRABertModel if options else LoRABertModel


def qlora(bert, **options):
    return qLoRABertModel(str(bert), **{"dtype": torch.float32, **options})


@pytest.mark.parametrize("bits, base_bits", [*((None, base_bits) for base_bits in BASES), *COMBINATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fresh_layer_computes_its_base_starts_as_in_peft_and_learns_b_first(bits, base_bits, dtype):
    layer = layer_of(bits, base_bits, dtype, fresh=True)
    x = torch.randn(5, 64, dtype=dtype)
    assert layer.lora_A.shape == (4, 64) and layer.lora_B.shape == (32, 4)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    bound = 1 / math.sqrt(64)  # of Kaiming-uniform with a = sqrt(5)
    assert 0.98 * bound < layer.lora_A.abs().max() <= bound
    y = layer(x)
    assert torch.equal(y, layer.base(x))
    y.square().sum().backward()
    assert layer.lora_A.grad.norm() == 0 and (layer.lora_B.grad.norm(dim=0) > 0).all()
    assert not any(parameter.requires_grad for parameter in layer.base.parameters())
    torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-3).step()
    layer(x).square().sum().backward()
    assert (layer.lora_A.grad.norm(dim=1) > 0).all()
    if bits:
        nn.init.zeros_(layer.lora_B)
        layer.pack()
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("bits, base_bits", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_copied_loaded_or_unpacked_it_computes_the_same_to_the_last_bit(bits, base_bits, dtype):
    layer = layer_of(bits, base_bits, dtype)
    x = torch.randn(5, 64, dtype=dtype)
    A, B = layer.low_rank()
    assert all(map(torch.equal, (A, B), WAYS["half steps"](layer.lora_A, layer.lora_B, bits)))
    assert all(len(row.unique()) <= 2**bits for row in [*A, *B.T])
    expected = layer(x)
    layer.pack()
    assert layer.packed and not any("lora_" in name for name, _ in layer.named_parameters())
    packed = copy.deepcopy(layer.packed_tensors())
    sizes = [tensor.nbytes for tensor in packed.values()]
    assert sizes == [math.ceil(4 * 64 * bits / 8), 4 * 4, math.ceil(4 * 32 * bits / 8), 4 * 4]

    other = QuantizedLoRALayer(copy.deepcopy(layer.base), rank=4, bits=bits)
    other.pack()
    other.load_state_dict(layer.state_dict())
    for same in (layer, copy.deepcopy(layer), other):
        assert torch.equal(same(x), expected)
    cast = copy.deepcopy(layer).half()
    assert cast.A_scales.dtype == torch.float32 and torch.equal(cast.delta_weight(), layer.delta_weight())
    layer.unpack()
    assert not layer.packed and torch.equal(layer(x), expected)
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    layer.pack()
    layer.pack()
    assert all(torch.equal(tensor, packed[name]) for name, tensor in layer.packed_tensors().items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_packing_what_is_not_finite_is_refused_and_changes_nothing(bert, value):
    model = randomise(qlora(bert))
    layers = list(model.lora_layers().values())
    layers[-1].lora_B.data[3, 1] = value
    with pytest.raises(ValueError, match=f"lora_B holds {value}"):
        model.pack()
    assert not any(layer.packed for layer in layers)


@pytest.mark.parametrize("base_bits, allowed", [(8, 0.1), (4, 0.6)])
def test_every_frozen_layer_and_embedding_is_quantised_and_computes_nearly_the_same(bert, batch, base_bits, allowed):
    model = qlora(bert, base_bits=base_bits)
    modules = dict(model.model.named_modules())
    quantized = {n for n, m in modules.items() if isinstance(m, QuantizedLinear) and m.bits == base_bits}
    assert len(quantized) == 2 * 6 + 1 and "bert.pooler.dense" in quantized
    assert sum(isinstance(m, QuantizedEmbedding) for m in modules.values()) == 3
    assert [n for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Embedding))] == ["classifier"]
    del batch["labels"]
    exact = qlora(bert).encode(**batch)
    assert (model.encode(**batch) - exact).norm() < allowed * exact.norm()
    with pytest.raises(ValueError, match="merge_and_unload"):
        modules["bert.encoder.layer.0.attention.self.query"].merge()


@pytest.mark.parametrize("options", [{}, *OF_A_MODEL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_trains_a_b_and_head_alone_and_computes_the_same_packed(bert, batch, options, dtype):
    torch.manual_seed(0)
    model = kind_of(options)(str(bert), dtype=dtype, target_modules="all-linear", **options)
    before = copy.deepcopy(model.state_dict())
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    for name, tensor in model.state_dict().items():
        trained = "lora_" in name or "classifier" in name
        assert torch.equal(tensor, before[name]) != trained, name
        assert tensor.dtype in ((torch.float32,) if trained else (dtype, torch.int8, torch.uint8, torch.float32)), name
    if options:
        expected = model(**batch).logits
        model.pack()
        assert torch.equal(model(**batch).logits, expected)
        assert all("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
        model.unpack()
        assert torch.equal(model(**batch).logits, expected)


def test_under_one_seed_every_kind_starts_from_the_same_a_and_head(bert):
    states = []
    for options in ({}, *OF_A_MODEL):
        torch.manual_seed(3)
        states.append(kind_of(options)(str(bert), **options).state_dict())
    names = [name for name in states[0] if "lora_" in name or "classifier" in name]
    assert len(names) == 10 and all(torch.equal(state[name], states[0][name]) for name in names for state in states)


@pytest.mark.parametrize("options", [{}, *OF_A_MODEL], ids=str)
def test_a_model_follows_a_change_of_dtype_a_copy_a_state_dict_and_autocast(bert, batch, options):
    model, other = (kind_of(options)(str(bert), dtype=torch.float32, **options).eval() for _ in range(2))
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


@pytest.mark.parametrize("options", OF_A_MODEL, ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_loads_packed_with_the_same_logits(bert, batch, tmp_path, options, packed):
    model = randomise(qlora(bert, rank=3, target_modules=["query", "dense"], **options)).eval()
    expected = model(**batch).logits
    if packed:
        model.pack()
    model.save_pretrained(tmp_path)
    assert all(layer.packed == packed for layer in model.lora_layers().values())
    loaded = qLoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(layer.packed for layer in loaded.lora_layers().values()) and not loaded.training
    assert torch.equal(loaded(**batch).logits, expected)
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_quantized.safetensors", "quantized_config.json"}


def test_on_request_it_is_saved_for_peft_too(bert, batch, tmp_path):
    model = randomise(qlora(bert, bits=4)).eval()
    model.save_pretrained(tmp_path, peft=True)
    theirs = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path).eval()
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_in_older_names_loads_the_same_and_another_shape_is_refused(bert, own_bert, batch):
    file = own_bert / "model.safetensors"
    older = {}
    for name, tensor in load_file(file).items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        older[f"bert.{name}"] = tensor
    save_file(older, file)
    assert torch.equal(*(qlora(folder).encode(batch["input_ids"]) for folder in (bert, own_bert)))
    save_file({**older, "bert.pooler.dense.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias of shape \(3,\)"):
        qlora(own_bert)


@pytest.mark.parametrize("way", WAYS)
def test_round_adapter_rounds_a_copy_that_packs_to_the_same_and_returns_the_error_of_all_updates(bert, way):
    model = randomise(LoRABertModel(str(bert), rank=4, dtype=torch.float32))
    before = copy.deepcopy(model.state_dict())
    rounded, error = round_adapter(model, way, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    packed = qlora(bert, rank=4, bits=3)
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


# The ledger


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


STATES = [("merge", OF_A_MODEL[0]), *itertools.product(["pack", "unpack"], OF_A_MODEL)]


@pytest.mark.parametrize("state, options", STATES, ids=str)
def test_the_ledger_counts_what_the_storages_hold(bert, batch, state, options):
    model = qlora(bert, dtype=torch.bfloat16, **options)
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


def test_the_ledger_keeps_nothing_of_a_model_alive(bert, batch):
    model = LoRABertModel(str(bert))
    memory_ledger(model, batch=batch)
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    assert all(reference() is None for reference in references)


def test_the_ledger_names_what_it_counts_and_its_adapter_is_as_large_as_the_file(bert, batch, tmp_path):
    model = qlora(bert, bits=3, base_bits=4)
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
    saved = [
        memory_ledger(qlora(bert, base_bits=bits), batch=batch).total_bytes("saved for backward") for bits in BASES
    ]
    assert max(saved) == saved[0]  # no decoded weight is saved


@pytest.mark.slow
def test_bert_base_is_as_small_as_the_readme_says_and_its_4_bit_base_is_loaded_within_320_mb(tmp_path):
    with torch.device("meta"):
        base = BertForSequenceClassification(BertConfig())
    base = base.to_empty(device="cpu").requires_grad_(False)
    for parameter in base.parameters():
        parameter.uniform_(-0.05, 0.05)
    base.bert.save_pretrained(tmp_path)
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for bits in (8, 4, 2):
        model = qLoRABertModel(str(tmp_path), bits=bits)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 296_450
        model.pack()
        assert f"{memory_ledger(model).total_bytes('A and B', 'scales of A and B'):,} at {bits} bits" in readme
    for base_bits, where in ((None, "in bfloat16"), (8, "at 8 bits"), (4, "at 4 bits")):
        model = qLoRABertModel(str(tmp_path), bits=8, base_bits=base_bits, dtype=torch.bfloat16)
        assert f"{memory_ledger(model).total_bytes() / 1e6:.1f} MB {where}" in readme
    assert memory_ledger(model).total_bytes() <= 58e6

    code = """if True:
        import sys, pathlib, torch, lora_utils
        def status(field):
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
        start = status("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        model = lora_utils.qLoRABertModel(sys.argv[1], bits=8, base_bits=4, dtype=torch.bfloat16)
        print(status("VmHWM") - start)
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    command = [sys.executable, "-c", code, str(tmp_path)]
    peak = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    print(f"peak while loading {peak / 1e6:.0f} MB above the start")
    assert peak <= 320e6
