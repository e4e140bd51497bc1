"""Check that every fast path computes its formula, against float64: outputs and gradients, by relative error."""

import copy
import os
import pickle
import statistics
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from conftest import ROOT, randomise
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig

import lora_utils
from lora_lab.ledger import memory_ledger
from lora_lab.sources import MOVIE_PHRASES, load_sst2, packaged_checkpoint
from lora_utils import LoRABertModel, LoRALayer, QuantizedLinear, QuantizedLoRALayer, qLoRABertModel

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BASES = [None, 8, 4]

CPU = torch.cpu.get_capabilities()
CAP = os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
VNNI = (CPU.get("avx_vnni") or CPU.get("avx512_vnni")) and ("VNNI" in CAP or "BF16" in CAP)
X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_vnni = pytest.mark.skipif(not (X86 and VNNI), reason="oneDNN's sums are exact on CPUs with VNNI")
needs_x86 = pytest.mark.skipif(not X86, reason="PyTorch multiplies integers on x86 CPUs with AVX2")


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def frozen(base_bits, dtype=torch.float32, bias=True, inputs=384, outputs=48, kernel=None):
    """Return a frozen layer, which may multiply integers, and its exact weight and bias in float64."""
    torch.manual_seed(0)
    base = nn.Linear(inputs, outputs, bias, dtype=dtype).requires_grad_(False)
    b = base.bias.double() if bias else 0
    if base_bits is None:
        return base, base.weight.double(), b
    base = QuantizedLinear(base, base_bits)
    base.int8_arithmetic = kernel or base.int8_arithmetic
    return base, base.dequantize().double(), b


@pytest.mark.parametrize("shape, inputs, outputs, rank", [((), 1, 1, 1), ((7,), 128, 48, 4), ((2, 5), 33, 40, 33)])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("base_bits", BASES)
@pytest.mark.parametrize("bits", [None, 2, 3, 8])
def test_a_layer_and_its_gradients_are_those_of_the_formula(bits, base_bits, dtype, shape, inputs, outputs, rank):
    base, W, b = frozen(base_bits, dtype, bias=len(shape) < 2, inputs=inputs, outputs=outputs)
    options = {"rank": rank, "alpha": 6, "use_rslora": rank == 33}
    layer = LoRALayer(base, **options) if bits is None else QuantizedLoRALayer(base, bits=bits, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(*shape, inputs, dtype=dtype, requires_grad=True)
    x64, A, B = (t.detach().double().requires_grad_() for t in (x, *layer.low_rank()))
    scaling = 6 / (rank**0.5 if rank == 33 else rank)
    assert relative_error(layer.delta_weight(), scaling * B @ A) < 1e-5
    for module, expected in ((base, x64 @ W.T + b), (layer, x64 @ W.T + b + scaling * x64 @ A.T @ B.T)):
        x.grad = x64.grad = None
        y = module(x)
        g = torch.randn_like(y)
        y.backward(g)
        expected.backward(g.double())
        assert y.dtype == dtype and y.shape == expected.shape
        pairs = [(y, expected), (x.grad, x64.grad)]
        pairs += [(layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad)] if module is layer else []
        for found, exact in pairs:
            assert relative_error(found, exact) < ALLOWED[dtype]
        assert module(x.new_zeros(2, 0, inputs)).shape == (2, 0, outputs)
    assert not base(x.detach()).requires_grad


@pytest.fixture(params=[pytest.param("onednn", marks=needs_vnni), pytest.param("fbgemm", marks=needs_x86)])
def kernel(request):
    return request.param


def rounded(x, kernel):
    """Round the rows of x to -126 .. 126, or to even numbers there, in float64."""
    step = x.double().abs().amax(-1, keepdim=True) / (126 if kernel == "onednn" else 63)
    return torch.where(step > 0, (x.double() / step).round() * step, 0)


# A tie may fall the other way, and bfloat16 has 8 binary digits.
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_an_integer_product_and_its_gradient_are_those_of_the_rounded_numbers(kernel, adapted, bias, dtype, allowed):
    base, W, b = frozen(8, dtype, bias, kernel=kernel)
    layer = LoRALayer(base, rank=4) if adapted else base
    x = torch.randn(2, 9, 384, dtype=dtype)
    x[0, 0] = 0
    x[1, 1] *= 1e30
    x[1, 2] *= 1e-30
    y = layer(x.requires_grad_())
    assert y.dtype == dtype and base.codes is None
    for found, used, exact in zip(y.flatten(0, 1), rounded(x, kernel).flatten(0, 1), x.flatten(0, 1), strict=True):
        if used.any() or bias:
            assert relative_error(found, used @ W.T + b) < allowed
        if used.any() and not bias:
            assert 1e-3 < relative_error(found, exact.double() @ W.T + b) < 5e-2  # it does round
    g = torch.randn_like(y)
    y.backward(g)
    assert 1e-3 < relative_error(x.grad, g.double() @ W) < 3e-2
    assert relative_error(x.grad, rounded(g, kernel) @ W) < 2e-2  # the columns of W are rounded as well


def test_on_real_weights_and_activations_the_gradient_of_x_is_within_3_percent(tokenizer, kernel):
    torch.manual_seed(0)
    model = LoRABertModel(str(packaged_checkpoint()), dtype=torch.float32, target_modules="all-linear")
    gradients = {}

    def remember(layer, _, y):
        y.register_hook(lambda g: gradients.update({layer: g.flatten(0, -2)}))

    for layer in model.lora_layers().values():
        layer.register_forward_hook(remember)
    (batch,) = lora_utils.make_loader(load_sst2(MOVIE_PHRASES, announce=False)["train"].select(range(32)), tokenizer)
    model(**batch).loss.backward()
    errors = []
    for layer, g in gradients.items():
        base = QuantizedLinear(layer.base, 8)
        exact = g.double() @ base.dequantize().double()
        base.int8_arithmetic = kernel
        x = torch.zeros(len(g), base.in_features, requires_grad=True)
        base(x).backward(g)
        errors.append(relative_error(x.grad, exact))
    assert len(errors) == 37 and statistics.median(errors) <= 0.03 and max(errors) <= 0.15


def test_integer_products_do_not_overflow_where_everything_is_as_large_as_can_be(kernel):
    base, *_ = frozen(8, bias=False, inputs=3072, kernel=kernel)
    base.codes.fill_(127)
    base.absmax.fill_(0.1)
    weight = base.dequantize().double()
    for sign in (1, -1):
        x = torch.full((33, 3072), 5.0 * sign, requires_grad=True)
        y = base(x)
        assert relative_error(y, x.double() @ weight.T) < 1e-5
        (grad_x,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
        assert relative_error(grad_x, torch.full_like(y, 3.0).double() @ weight) < 1e-5
        x = x.detach()
        x[:, ::2] *= -1
        assert base(x).abs().max() < 1e-5 * y.abs().max()


@needs_x86
def test_seven_bits_do_not_overflow_16_bits_on_a_cpu_with_avx2_only():
    held = {"ATEN_CPU_CAPABILITY": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    test = f"{__file__}::test_integer_products_do_not_overflow_where_everything_is_as_large_as_can_be[fbgemm]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | held, capture_output=True, text=True)
    assert "1 passed" in ran.stdout, ran.stdout


def test_codes_that_came_back_in_inference_mode_can_be_loaded_into(kernel):
    base, W, _ = frozen(8, kernel=kernel)
    with torch.inference_mode():
        base(torch.randn(3, 384))
        base.dequantize()
    base.load_state_dict(frozen(8)[0].state_dict())
    assert torch.equal(base.dequantize().double(), W)


@pytest.mark.parametrize("train", [True, False])
def test_a_packed_layer_that_is_moved_copied_stored_or_decoded_computes_what_it_did(kernel, train):
    base, W, _ = frozen(8, kernel=kernel)
    codes = base.codes.clone()
    x = torch.randn(5, 384, requires_grad=train)

    def use(layer):
        y = layer(x)
        if train:
            y.sum().backward()
        return y.detach()

    def loaded(layer):
        used.load_state_dict(layer.state_dict())
        return used

    used, *_ = frozen(8, kernel=kernel)
    used.codes.zero_()
    use(used)
    expected = use(base)
    changes = [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), loaded]
    for change in [*changes, lambda layer: layer.to("cpu"), lambda layer: layer.double().float()]:
        other = change(base)
        assert torch.equal(use(other), expected)
        assert torch.equal(other.state_dict()["codes"], codes) and torch.equal(other.dequantize().double(), W)
        assert torch.equal(use(base), expected)
    base.int8_arithmetic = None
    assert relative_error(use(base), x.double() @ W.T + base.bias.double()) < 1e-5


def test_a_model_is_saved_merged_and_averaged_as_before_and_holds_few_more_bytes(bert, batch, tmp_path, kernel):
    model = randomise(qLoRABertModel(str(bert), base_bits=8, dtype=torch.float32))
    exact = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    size = memory_ledger(model).total_bytes()
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.int8_arithmetic = kernel
    with torch.inference_mode():
        model(**batch)
    assert size < memory_ledger(model).total_bytes() < 1.05 * size
    average = torch.optim.swa_utils.AveragedModel(model)
    loss = model(**batch).loss
    loss.backward()
    kept = [dict(layer.packed_integers) for layer in layers]
    with torch.inference_mode():
        model(**batch)
    model(**batch).loss.backward()
    assert kept == [layer.packed_integers for layer in layers]  # nothing is packed twice
    packed = sum(row.num_bytes for row in memory_ledger(model) if row.what == "frozen weights, for backward")
    shapes = [layer.shape for layer in layers if "backward" in layer.packed_integers]
    assert packed == sum(outputs * inputs + 8 * inputs for outputs, inputs in shapes) > 0
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.allclose(average(**batch).loss, loss, atol=1e-5)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / folder / model.FILES[1]) for folder in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(**batch).loss, loss)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.merge_and_unload().state_dict().items())


def test_several_threads_can_call_one_layer(kernel, request):
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-6)
    start = threading.Barrier(6)

    def call(layer):
        start.wait()
        return layer(torch.randn(4, 64))

    with ThreadPoolExecutor(6) as pool:
        for _ in range(50):
            outputs = pool.map(call, [frozen(8, inputs=64, kernel=kernel)[0]] * 6)
            assert all(y.isfinite().all() for y in outputs)


def test_a_second_derivative_is_near_the_exact_one_without_an_update_and_refused_with_one(kernel):
    base, W, _ = frozen(8, bias=False, kernel=kernel)
    x = torch.randn(4, 384, requires_grad=True)
    (g,) = torch.autograd.grad(base(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.pow(2).sum(), x)
    assert relative_error(second, 4 * g.double() @ W.T @ W) < 3e-2  # the rounding of the first products is in it
    (g,) = torch.autograd.grad(LoRALayer(base, rank=4)(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_gradient_through_a_weight_that_was_changed_meanwhile_is_refused():
    layer = LoRALayer(nn.Linear(16, 16), rank=4)
    loss = layer(torch.randn(3, 16, requires_grad=True)).sum()
    layer.base.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_integer_products_are_for_float32_and_bfloat16_only_and_float16_does_not_overflow(kernel, dtype):
    base, *_ = frozen(8, dtype, inputs=1024)
    base.codes.fill_(127)  # sums of integers reach 7.8 million, and float16 ends at 65,504
    x = torch.full((3, 1024), 60.0, dtype=dtype)
    plain = base(x)
    assert plain.isfinite().all()
    base.int8_arithmetic = kernel
    assert torch.equal(base(x), plain)
    base(x.float())
    assert torch.equal(base(x), plain)
    assert base(torch.zeros(0, 1024)).shape == (0, 48)


@pytest.mark.parametrize("of_the_machine", [None, "onednn", "fbgemm", "int8"])
def test_a_layer_multiplies_integers_as_the_machine_does_and_for_8_bits_only(monkeypatch, of_the_machine):
    native = lora_utils.detect_compute_format()
    monkeypatch.setattr(lora_utils, "detect_compute_format", lambda: native._replace(int8=of_the_machine))
    base, *_ = frozen(8)
    assert base.int8_arithmetic == of_the_machine and frozen(4)[0].int8_arithmetic is None
    if of_the_machine == "int8":
        with pytest.raises(ValueError, match=r"int8_arithmetic is 'int8': allowed are \"onednn\".*\"fbgemm\", None"):
            base(torch.randn(3, 384))


@pytest.mark.parametrize("base_bits", BASES)
@pytest.mark.parametrize("backward_too", [True, False])
def test_gradients_come_through_autocast(base_bits, backward_too):
    layer = LoRALayer(frozen(base_bits, inputs=128)[0], rank=4)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(7, 128, requires_grad=True)
    exact = torch.autograd.grad(layer(x).sum(), (x, layer.lora_A, layer.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert layer.base(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=backward_too):
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    for found, expected in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), exact, strict=True):
        assert found.dtype == torch.float32 and relative_error(found, expected) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64  # which autocast does not change


@pytest.mark.parametrize("blocks, padded", [(2, True), (2, False), (1, True)])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("base_bits", BASES)
def test_the_first_row_alone_gives_the_logits_and_gradients_of_all(own_bert, batch, base_bits, dtype, blocks, padded):
    BertConfig.from_pretrained(own_bert, num_hidden_layers=blocks).save_pretrained(own_bert)
    model = randomise(qLoRABertModel(str(own_bert), rank=4, base_bits=base_bits, dtype=dtype))
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    labels = batch.pop("labels")
    loss = model(**batch, labels=labels).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    plain = nn.functional.cross_entropy(model.model(**batch).logits.float(), labels)  # every row, by transformers
    plain.backward()
    assert abs(loss - plain) < ALLOWED[dtype] * plain
    allowed = 1e-4 if dtype == torch.float32 else 0.2
    assert all(relative_error(found, model.get_parameter(name).grad) < allowed for name, found in fast.items())
    one_token = {name: tensor[:, :1] for name, tensor in batch.items()}
    assert relative_error(model(**one_token).logits, model.model(**one_token).logits) < allowed


def test_no_row_weight_or_gradient_is_computed_that_is_not_needed(bert, batch):
    model = randomise(qLoRABertModel(str(bert), rank=4, base_bits=4, dtype=torch.float32))
    shapes = {}
    for name, module in model.model.bert.encoder.layer[-1].named_modules():
        module.register_forward_hook(lambda _, args, y, name=name: shapes.update({name: tuple(y.shape)}))
    decoded = Counter()  # each weight for the product, and again for the gradient of its input
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            exact = layer.dequantize
            layer.dequantize = lambda dtype, name=name, exact=exact: decoded.update([name]) or exact(dtype)
    model(**batch).loss.backward()
    assert shapes["attention.self.key"] == shapes["attention.self.value"] == (3, 9, 64)
    assert shapes["attention.self.query"] == shapes["attention.output"] == shapes["output"] == (3, 1, 64)
    assert shapes["intermediate"] == (3, 1, 128)
    lowest = "model.bert.encoder.layer.0.attention.self."
    assert decoded == {name: 1 if name.startswith(lowest) else 2 for name in decoded} and len(decoded) == 2 * 6 + 1
