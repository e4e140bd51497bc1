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
from conftest import ROOT, randomise
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lora_lab.ledger import memory_ledger
from lora_lab.rounding import WAYS, quantize_jointly, round_adapter
from lora_utils import (
    LoRABertModel,
    LoRALayer,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLoRALayer,
    dequantize,
    qLoRABertModel,
    quantize,
)

BITS = [2, 3, 8]
BASES = [None, 8, 4]
COMBINATIONS = list(itertools.product(BITS, BASES))
OF_A_MODEL = list(zip(BITS, BASES, strict=True))


def layer_of(bits, base_bits=None, dtype=torch.float32, **options):
    """Return a layer whose B is not zero, so that its update shows."""
    torch.manual_seed(0)
    base = nn.Linear(64, 32, dtype=dtype)
    layer = QuantizedLoRALayer(
        QuantizedLinear(base, base_bits) if base_bits else base, bits=bits, **{"rank": 4, **options}
    )
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def qlora(bert, **options):
    return qLoRABertModel(str(bert), **{"dtype": torch.float32, **options})


# The layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits, base_bits", COMBINATIONS)
def test_a_fresh_layer_computes_what_its_base_computes_and_b_learns_from_the_first_step(bits, base_bits):
    layer = layer_of(bits, base_bits)
    x = torch.randn(5, 64)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert layer.lora_A.grad.norm() == 0 and (layer.lora_B.grad.norm(dim=0) > 0).all()
    torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=1e-3).step()
    layer(x).square().sum().backward()
    assert (layer.lora_A.grad.norm(dim=1) > 0).all()
    nn.init.zeros_(layer.lora_B)
    layer.pack()
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_passes_straight_through_the_rounding(bits):
    layer = layer_of(bits)
    x = torch.randn(5, 64)
    layer(x).square().sum().backward()
    A, B = (matrix.detach().requires_grad_() for matrix in layer.low_rank())
    (layer.base(x) + layer.scaling * x @ A.T @ B.T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, A.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_B.grad, B.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_a_and_b_are_seen_through_one_scale_for_each_rank(bits):
    layer = layer_of(bits)
    A, B = layer.low_rank()
    assert torch.equal(A, dequantize(*quantize(layer.lora_A, bits)))
    assert torch.equal(B, dequantize(*quantize(layer.lora_B.T, bits)).T)
    assert all(len(row.unique()) <= 2**bits for row in [*A, *B.T])
    torch.testing.assert_close(layer.delta_weight(), layer.scaling * B @ A)


@pytest.mark.parametrize("bits, base_bits", COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_it_computes_the_same_to_the_last_bit_from_fewer_bytes(bits, base_bits, dtype):
    layer = layer_of(bits, base_bits, dtype)
    x = torch.randn(5, 64, dtype=dtype)
    expected = layer(x)
    layer.pack()
    assert layer.packed and torch.equal(layer(x), expected)
    assert not any("lora_" in name for name, _ in layer.named_parameters())
    assert layer.A_codes.nbytes == math.ceil(4 * 64 * bits / 8) and layer.A_scales.nbytes == 4 * 4
    assert layer.B_codes.nbytes == math.ceil(4 * 32 * bits / 8) and layer.B_scales.nbytes == 4 * 4
    first = {name: tensor.clone() for name, tensor in layer.packed_tensors().items()}
    layer.unpack()
    assert not layer.packed and torch.equal(layer(x), expected)
    assert layer.lora_A.requires_grad and layer.lora_B.requires_grad
    layer.pack()
    layer.pack()
    assert all(torch.equal(tensor, first[name]) for name, tensor in layer.packed_tensors().items())


def test_a_packed_layer_copies_saves_and_changes_dtype():
    layer = layer_of(3)
    x = torch.randn(5, 64)
    layer.pack()
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    other = layer_of(3)
    other.pack()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    assert copy.deepcopy(layer).half().A_scales.dtype == copy.deepcopy(layer).double().B_scales.dtype == torch.float32
    there_and_back = copy.deepcopy(layer).half().float()
    assert torch.equal(there_and_back.delta_weight(), layer.delta_weight())
    assert "rank=4, alpha=16, merged=False, bits=3, packed=True" in repr(layer)


@pytest.mark.parametrize("packed", [False, True])
def test_it_merges_beside_a_float_base_and_unmerges_to_the_bit(packed):
    layer = layer_of(4)
    x = torch.randn(5, 64)
    if packed:
        layer.pack()
    before = layer(x)
    layer.merge()
    assert torch.equal(layer.merged_weight, layer.base.weight + layer.delta_weight())
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("layer_class", [LoRALayer, QuantizedLoRALayer])
def test_merging_into_a_quantised_base_is_refused(layer_class):
    layer = layer_class(QuantizedLinear(nn.Linear(64, 32), 4))
    with pytest.raises(ValueError, match="merge_and_unload"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_packing_what_is_not_finite_is_refused_and_changes_nothing(bert, value):
    model = randomise(qlora(bert))
    layers = list(model.lora_layers().values())
    with torch.no_grad():
        layers[-1].lora_B[3, 1] = value
    with pytest.raises(ValueError, match=f"lora_B holds {value}"):
        model.pack()
    assert not any(layer.packed for layer in layers)


# The model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_bits", [8, 4])
def test_every_frozen_linear_layer_and_embedding_is_quantised_and_the_head_is_not(bert, base_bits):
    model = qlora(bert, base_bits=base_bits)
    quantized = {n for n, m in model.model.named_modules() if isinstance(m, QuantizedLinear) and m.bits == base_bits}
    assert len(quantized) == 2 * 6 + 1 and "bert.pooler.dense" in quantized
    assert sum(isinstance(m, QuantizedEmbedding) for m in model.modules()) == 3
    assert not any(isinstance(m, nn.Embedding) for m in model.modules())
    assert [n for n, m in model.model.named_modules() if isinstance(m, nn.Linear)] == ["classifier"]
    assert all(layer.base.bits == base_bits for layer in model.lora_layers().values())


@pytest.mark.parametrize("bits, base_bits", OF_A_MODEL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_combination_trains_packs_and_computes_the_same(bert, batch, bits, base_bits, dtype):
    torch.manual_seed(0)
    model = qlora(bert, bits=bits, base_bits=base_bits, dtype=dtype, target_modules="all-linear")
    frozen = {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n and "classifier" not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in frozen.items())
    model.eval()
    expected = model(**batch).logits
    model.pack()
    assert torch.equal(model(**batch).logits, expected)
    assert all("classifier" in name for name, p in model.named_parameters() if p.requires_grad)
    model.unpack()
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("base_bits", BASES)
def test_under_one_seed_it_starts_from_the_a_and_head_of_unquantised_lora(bert, base_bits):
    torch.manual_seed(3)
    plain = LoRABertModel(str(bert)).state_dict()
    torch.manual_seed(3)
    quantized = qLoRABertModel(str(bert), bits=3, base_bits=base_bits).state_dict()
    names = [name for name in plain if "lora_" in name or "classifier" in name]
    assert len(names) == 10 and all(torch.equal(plain[name], quantized[name]) for name in names)


@pytest.mark.parametrize("base_bits", ["plain LoRA", *BASES])
def test_a_model_follows_a_change_of_dtype_a_copy_a_state_dict_and_autocast(bert, batch, base_bits):
    def new():
        plain = base_bits == "plain LoRA"
        return LoRABertModel(str(bert), dtype=torch.float32) if plain else qlora(bert, base_bits=base_bits)

    model = randomise(new()).eval()
    expected = model(**batch).logits
    other = new().eval()
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


def test_a_quantised_base_computes_nearly_what_the_float_base_computes(bert, batch):
    ids = batch["input_ids"]
    mask = batch["attention_mask"]
    exact = qlora(bert).eval().model.bert(ids, attention_mask=mask).pooler_output
    errors = []
    for bits in (8, 4):
        found = qlora(bert, base_bits=bits).eval().model.bert(ids, attention_mask=mask).pooler_output
        errors.append((found - exact).norm() / exact.norm())
    assert errors[0] < 0.1 and errors[0] < errors[1] < 0.6


@pytest.mark.parametrize("bits, base_bits", OF_A_MODEL)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_saved_loads_packed_with_the_same_logits(bert, batch, tmp_path, bits, base_bits, packed):
    model = randomise(qlora(bert, bits=bits, base_bits=base_bits, rank=3, target_modules=["query", "dense"])).eval()
    expected = model(**batch).logits
    if packed:
        model.pack()
    model.save_pretrained(tmp_path / "adapter")
    assert model.lora_layers()["bert.encoder.layer.0.attention.self.query"].packed == packed
    loaded = qLoRABertModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    assert all(layer.packed for layer in loaded.lora_layers().values()) and not loaded.training
    assert torch.equal(loaded(**batch).logits, expected)
    files = sorted(file.name for file in (tmp_path / "adapter").iterdir())
    assert files == ["adapter_quantized.safetensors", "quantized_config.json"]


def test_a_trained_lora_that_is_rounded_jointly_is_saved_as_packed_integers(bert, tmp_path):
    plain = randomise(LoRABertModel(str(bert), dtype=torch.float32))
    quantized = qlora(bert, bits=3)
    with torch.no_grad():
        for layer in plain.lora_layers().values():
            for matrix, rounded in zip(layer.low_rank(), quantize_jointly(*layer.low_rank(), 3), strict=True):
                matrix.copy_(rounded)
    quantized.load_state_dict(plain.state_dict())
    quantized.save_pretrained(tmp_path)
    loaded = qLoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    for name, layer in plain.lora_layers().items():
        torch.testing.assert_close(loaded.lora_layers()[name].delta_weight(), layer.delta_weight())


def test_on_request_it_is_saved_for_peft_too(bert, batch, tmp_path):
    model = randomise(qlora(bert, bits=4)).eval()
    model.save_pretrained(tmp_path, peft=True)
    theirs = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path).eval()
    torch.testing.assert_close(theirs(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits, base_bits", OF_A_MODEL)
def test_merge_and_unload_gives_a_plain_float32_bert_with_the_same_logits(bert, batch, bits, base_bits):
    model = randomise(qlora(bert, bits=bits, base_bits=base_bits, target_modules="all-linear")).eval()
    expected = model(**batch).logits
    for _ in range(2):
        plain = model.merge_and_unload()
        assert type(plain) is BertForSequenceClassification and {p.dtype for p in plain.parameters()} == {torch.float32}
        torch.testing.assert_close(plain(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        model.pack()


@pytest.mark.parametrize(
    "wrong",
    [{"bits": b} for b in (1, 9, 4.5)] + [{"base_bits": b} for b in (3, 16, 4.0, "4", True)],
    ids=str,
)
def test_wrong_bits_are_refused_before_any_weights_are_loaded(tmp_path, wrong):
    ((name, value),) = wrong.items()
    allowed = "2, 3, 4, 5, 6, 7, 8" if name == "bits" else "None, 8, 4"
    with pytest.raises(ValueError, match=f"{name} is .*allowed are {allowed}") as error:
        qLoRABertModel(str(tmp_path), **wrong)
    assert repr(value) in str(error.value)


def test_quantised_weights_are_counted_by_the_numbers_they_stand_for(bert, capsys):
    lines = []
    for base_bits in (None, 8, 4):
        qlora(bert, base_bits=base_bits).print_trainable_parameters()
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1] == lines[2]


def test_a_checkpoint_in_older_names_loads_the_same_and_another_shape_is_refused(bert, batch, tmp_path):
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    older = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": t
        for name, t in load_file(bert / "model.safetensors").items()
    }
    save_file(older, tmp_path / "model.safetensors")
    models = []
    for folder in (bert, tmp_path):
        torch.manual_seed(0)
        models.append(LoRABertModel(str(folder), dtype=torch.float32))
    assert torch.equal(models[0](**batch).logits, models[1](**batch).logits)
    save_file({**older, "bert.pooler.dense.bias": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"bert\.pooler\.dense\.bias of shape \(3,\)"):
        LoRABertModel(str(tmp_path))


# Rounding a whole adapter -------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_round_adapter_rounds_a_copy_and_returns_the_error_of_all_updates(bert, way):
    model = randomise(LoRABertModel(str(bert), rank=4, dtype=torch.float32))
    before = copy.deepcopy(model.state_dict())
    rounded, error = round_adapter(model, way, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    exact = []
    found = []
    for name, layer in model.lora_layers().items():
        new = rounded.lora_layers()[name]
        for matrix, expected in zip(new.low_rank(), WAYS[way](*layer.low_rank(), 3), strict=True):
            assert torch.equal(matrix, expected)
        exact.append(layer.delta_weight().flatten())
        found.append(new.delta_weight().flatten())
    expected = (torch.cat(found) - torch.cat(exact)).norm() / torch.cat(exact).norm()
    assert 0 < error < 1 and error == pytest.approx(expected.item(), rel=1e-5)


# The ledger ---------------------------------------------------------------------------------------


def storages(tensors):
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("bits, base_bits", OF_A_MODEL)
@pytest.mark.parametrize("packed", [False, True])
def test_the_ledger_counts_what_the_storages_hold(bert, batch, bits, base_bits, packed):
    model = qlora(bert, bits=bits, base_bits=base_bits, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    if packed:
        model.pack()
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


def test_the_ledger_counts_merged_weights_too(bert):
    model = LoRABertModel(str(bert), dtype=torch.bfloat16)
    before = memory_ledger(model).total_bytes()
    for layer in model.lora_layers().values():
        layer.merge()
    ledger = memory_ledger(model)
    assert ledger.total_bytes() == storages([*model.parameters(), *model.buffers()]) == before + 4 * 64 * 64 * 2


def test_the_ledger_names_what_it_counts(bert):
    model = qlora(bert, bits=3, base_bits=4)
    model.pack()
    rows = {(row.what, row.stored_as): (row.count, row.num_bytes) for row in memory_ledger(model)}
    numbers = 4 * 8 * (64 + 64)
    assert rows["A and B", "3 bits"] == (numbers, numbers * 3 // 8)
    assert rows["scales of A and B", "float32"] == (4 * 16, 4 * 4 * 16)
    assert rows["head", "float32"] == (130, 520)
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 128) + 64 * 64
    assert rows["frozen weights", "NF4"] == (weights, weights // 2)
    assert rows["embeddings", "NF4"] == ((30522 + 512 + 2) * 64, (30522 + 512 + 2) * 32)
    assert not any(what == "gradients" for what, _ in rows)
    ledger = memory_ledger(model)
    assert "frozen weights" in str(ledger) and f"{ledger.total_bytes():,}" in str(ledger)


def test_the_decoded_weights_of_a_quantised_base_are_not_saved_for_backward(bert, batch):
    plain, quantized = (memory_ledger(qlora(bert, base_bits=bits), batch=batch) for bits in (None, 4))
    assert quantized.total_bytes("saved for backward") <= plain.total_bytes("saved for backward")


@pytest.mark.parametrize("bits", BITS)
def test_the_adapter_rows_are_the_bytes_of_the_file(bert, tmp_path, bits):
    model = qlora(bert, bits=bits, rank=3)
    model.pack()
    model.save_pretrained(tmp_path)
    data = (tmp_path / "adapter_quantized.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    ledger = memory_ledger(model)
    assert len(data) - header == ledger.total_bytes(*ledger.ADAPTER)


@pytest.fixture(scope="module")
def bert_base(tmp_path_factory):
    """Return the folder of a checkpoint of BERT-base's shape, with random weights."""
    folder = tmp_path_factory.mktemp("bert-base")
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    model = model.to_empty(device="cpu").requires_grad_(False)
    for parameter in model.parameters():
        parameter.uniform_(-0.05, 0.05)
    model.bert.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_readme_has_the_sizes_of_bert_base(bert_base):
    readme = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for bits in (8, 4, 2):
        model = qLoRABertModel(str(bert_base), bits=bits)
        model.pack()
        size = memory_ledger(model).total_bytes("A and B", "scales of A and B")
        assert f"{size:,} at {bits} bits" in readme
    for base_bits, where in ((None, "in bfloat16"), (8, "at 8 bits"), (4, "at 4 bits")):
        model = qLoRABertModel(str(bert_base), bits=8, base_bits=base_bits, dtype=torch.bfloat16)
        assert f"{memory_ledger(model).total_bytes() / 1e6:.1f} MB {where}" in readme


@pytest.mark.slow
def test_bert_base_with_a_4_bit_base_is_58_mb_and_is_loaded_within_320_mb(bert_base):
    code = (
        "import sys, pathlib, torch\n"
        "from lora_lab.ledger import memory_ledger\n"
        "from lora_utils import qLoRABertModel\n"
        "def status(field):\n"
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024\n"
        "start = status('VmRSS')\n"
        "pathlib.Path('/proc/self/clear_refs').write_text('5')\n"
        "model = qLoRABertModel(sys.argv[1], bits=8, base_bits=4, dtype=torch.bfloat16)\n"
        "print(status('VmHWM') - start, memory_ledger(model).total_bytes())"
    )
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is read from Linux's /proc")
    run = subprocess.run(
        [sys.executable, "-c", code, str(bert_base)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    peak, resident = map(int, run.stdout.split())
    print(f"peak while loading {peak / 1e6:.0f} MB above the start, resident {resident / 1e6:.1f} MB")
    assert resident <= 58e6 and peak <= 320e6
