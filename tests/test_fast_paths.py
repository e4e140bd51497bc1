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

import pytest
import torch
from conftest import ROOT, randomise
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertModel

from lora_lab.ledger import memory_ledger
from lora_lab.sources import MOVIE_PHRASES, load_sst2, packaged_checkpoint
from lora_utils import (
    LoRABertModel,
    LoRALayer,
    QuantizedLinear,
    QuantizedLoRALayer,
    detect_compute_format,
    make_loader,
    qLoRABertModel,
)

ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
BASES = [None, 8, 4]


def relative_error(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def frozen(base_bits, dtype, bias=True, inputs=128, outputs=48):
    """Return a frozen layer and its exact weight and bias in float64."""
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, bias, dtype=dtype).requires_grad_(False)
    base = linear if base_bits is None else QuantizedLinear(linear, base_bits)
    weight = linear.weight if base_bits is None else base.dequantize()
    return base, weight.double(), linear.bias.double() if bias else torch.zeros(outputs).double()


@pytest.mark.parametrize("shape", [(), (7,), (2, 5)], ids=str)
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("base_bits", BASES)
@pytest.mark.parametrize("layer_class", [LoRALayer, QuantizedLoRALayer])
def test_an_adapted_layer_and_its_gradients_are_those_of_the_formula(layer_class, base_bits, dtype, shape):
    base, W, b = frozen(base_bits, dtype)
    layer = layer_class(base, rank=4, alpha=6)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(*shape, 128, dtype=dtype, requires_grad=True)
    y = layer(x)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()

    x64, A, B = (t.detach().double().requires_grad_() for t in (x, *layer.low_rank()))
    expected = x64 @ W.T + b + 6 / 4 * x64 @ A.T @ B.T
    (expected * weights.double()).sum().backward()
    assert y.dtype == dtype and y.shape == expected.shape
    pairs = ((y, expected), (x.grad, x64.grad), (layer.lora_A.grad, A.grad), (layer.lora_B.grad, B.grad))
    for found, exact in pairs:
        assert relative_error(found, exact) < ALLOWED[dtype]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_layer_computes_and_differentiates_with_its_decoded_weight(bits, dtype, bias):
    layer, W, b = frozen(bits, dtype, bias)
    x = torch.randn(2, 3, 128, dtype=dtype, requires_grad=True)
    y = layer(x)
    weights = torch.randn(2, 3, 48, dtype=dtype)
    (y * weights).sum().backward()
    assert y.dtype == dtype
    assert relative_error(y, x.double() @ W.T + b) < ALLOWED[dtype]
    assert relative_error(x.grad, weights.double() @ W) < ALLOWED[dtype]
    assert layer(x.detach()).requires_grad is False


def test_in_float16_an_8_bit_weight_does_not_overflow():
    layer, *_ = frozen(8, torch.float16, inputs=1024)
    x = torch.full((3, 1024), 60.0, dtype=torch.float16)
    layer.codes.fill_(127)  # sums of integers reach 7.8 million, and float16 ends at 65,504
    assert layer(x).isfinite().all()


# Products of integers

CPU = torch.cpu.get_capabilities()
CAP = os.environ.get("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
VNNI = (CPU.get("avx_vnni") or CPU.get("avx512_vnni")) and ("VNNI" in CAP or "BF16" in CAP)
X86 = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
needs_vnni = pytest.mark.skipif(not (X86 and VNNI), reason="oneDNN's sums are exact on CPUs with VNNI")
needs_x86 = pytest.mark.skipif(not X86, reason="PyTorch multiplies integers on x86 CPUs with AVX2")
KERNELS = [pytest.param("onednn", marks=needs_vnni), pytest.param("fbgemm", marks=needs_x86)]


def with_integers(kernel, dtype=torch.float32, bias=True, inputs=384, outputs=48):
    """Return a layer that multiplies integers, and its exact weight and bias in float64."""
    base, W, b = frozen(8, dtype, bias, inputs, outputs)
    base.int8_arithmetic = kernel
    return base, W, b


def multiply_integers(model, kernel):
    """Let a model multiply integers, and return the layers that do."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.int8_arithmetic = kernel
    return layers


def rounded(x, kernel):
    """Round the rows of x to -126 .. 126, or to even numbers there, in float64."""
    step = x.double().abs().amax(-1, keepdim=True) / (126 if kernel == "onednn" else 63)
    return torch.where(step > 0, (x.double() / step).round() * step, 0)


# A tie may fall the other way, and bfloat16 has 8 binary digits.
@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_integer_product_is_that_of_the_rounded_numbers(kernel, adapted, bias, dtype, allowed):
    base, W, b = with_integers(kernel, dtype, bias)
    layer = LoRALayer(base, rank=4) if adapted else base
    x = torch.randn(2, 9, 384, dtype=dtype)
    x[0, 0] = 0
    x[1, 1] *= 1e30
    x[1, 2] *= 1e-30
    y = layer(x)
    assert y.dtype == dtype and base.codes is None
    for found, used, exact in zip(y.flatten(0, 1), rounded(x, kernel).flatten(0, 1), x.flatten(0, 1), strict=True):
        if used.any() or bias:
            assert relative_error(found, used @ W.T + b) < allowed
        if used.any() and not bias:
            assert 1e-3 < relative_error(found, exact.double() @ W.T + b) < 5e-2  # it does round


@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_an_integer_product_is_near_the_exact_one(kernel, dtype):
    base, W, _ = with_integers(kernel, dtype, outputs=256)
    x = torch.randn(40, 384, dtype=dtype, requires_grad=True)
    y = base(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert 1e-3 < relative_error(x.grad, g.double() @ W) < 3e-2
    assert relative_error(x.grad, rounded(g, kernel) @ W) < 2e-2  # the columns of W are rounded as well


@pytest.mark.parametrize("kernel", KERNELS)
def test_on_real_weights_and_activations_the_gradient_of_x_is_within_3_percent(tokenizer, kernel):
    torch.manual_seed(0)
    model = LoRABertModel(str(packaged_checkpoint()), dtype=torch.float32, target_modules="all-linear")
    gradients = {}
    for name, layer in model.lora_layers().items():

        def remember(module, args, output, name=name):
            output.register_hook(lambda g: gradients.__setitem__(name, g.flatten(0, -2)))

        layer.register_forward_hook(remember)
    (batch,) = make_loader(load_sst2(MOVIE_PHRASES, announce=False)["train"].select(range(32)), tokenizer)
    model(**batch).loss.backward()
    errors = []
    for name, g in gradients.items():
        layer = QuantizedLinear(model.lora_layers()[name].base, 8)
        exact = g.double() @ layer.dequantize().double()
        layer.int8_arithmetic = kernel
        x = torch.zeros(len(g), layer.in_features, requires_grad=True)
        layer(x).backward(g)
        errors.append(relative_error(x.grad, exact))
    print(f"{kernel}: median {statistics.median(errors):.4f}, worst {max(errors):.4f} of {len(errors)} layers")
    assert len(errors) == 37 and statistics.median(errors) <= 0.03 and max(errors) <= 0.15


@pytest.mark.parametrize("kernel", KERNELS)
def test_integer_products_do_not_overflow_where_everything_is_as_large_as_can_be(kernel):
    base, *_ = with_integers(kernel, bias=False, inputs=3072)
    base.codes.fill_(127)
    base.absmax.fill_(0.1)
    weight = base.dequantize().double()
    for sign in (1, -1):
        x = torch.full((2, 3072), 5.0 * sign, requires_grad=True)
        y = base(x)
        assert relative_error(y, x.double() @ weight.T) < 1e-5
        (grad_x,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
        assert relative_error(grad_x, torch.full_like(y, 3.0).double() @ weight) < 1e-5
        x = x.detach()
        x[:, ::2] *= -1
        assert base(x).abs().max() < 1e-5 * y.abs().max()


@needs_x86
def test_seven_bits_do_not_overflow_16_bits_on_a_cpu_with_avx2_only():
    code = """if True:
        import torch, lora_utils
        layer = lora_utils.QuantizedLinear(torch.nn.Linear(3072, 64, bias=False), 8)
        layer.codes.fill_(127)
        layer.absmax.fill_(0.1)
        weight = layer.dequantize()
        layer.int8_arithmetic = "fbgemm"
        x = torch.full((33, 3072), 5.0, requires_grad=True)
        y = layer(x)
        y.backward(torch.ones_like(y))
        for found, exact in ((y, x @ weight.T), (x.grad, torch.ones_like(y) @ weight)):
            print(((found - exact).norm() / exact.norm()).item() < 1e-5)
    """
    held = {"ATEN_CPU_CAPABILITY": "avx2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | held, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "True"] and ran.stderr == ""


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_was_packed_while_predicting_is_used_in_training_and_packed_once(kernel):
    base, W, _ = with_integers(kernel)
    with torch.inference_mode():
        base(torch.randn(3, 384))
    forward = base.packed_integers["forward"]
    for _ in range(2):
        base.eval()(torch.randn(3, 384))
        x = torch.randn(3, 384, requires_grad=True)
        base.train()(x).sum().backward()
        assert relative_error(x.grad, torch.ones(3, 48).double() @ W) < 3e-2
        assert base.packed_integers["forward"] is forward
        backward = base.packed_integers.setdefault("seen", base.packed_integers["backward"])
        assert base.packed_integers["backward"] is backward


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_packed_layer_that_is_moved_copied_stored_or_decoded_computes_what_it_did(kernel, train, tmp_path):
    base, W, _ = with_integers(kernel)
    codes = base.codes.clone()
    x = torch.randn(5, 384, requires_grad=train)

    def use(layer):
        y = layer(x)
        if train:
            y.sum().backward()
        return y.detach()

    expected = use(base)
    torch.save(base, tmp_path / "layer.pt")
    use(base)
    others = [
        copy.deepcopy(base),
        pickle.loads(pickle.dumps(base)),
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ]
    use(base)
    fresh = with_integers(kernel)[0]
    fresh.load_state_dict(base.state_dict())
    used = with_integers(kernel)[0]
    used.codes.zero_()
    use(used)
    used.load_state_dict(base.state_dict())
    for other in [*others, fresh, used, base, base.to("cpu"), base.double().float()]:
        assert torch.equal(use(other), expected)
        assert torch.equal(other.state_dict()["codes"], codes) and torch.equal(other.dequantize().double(), W)
    base.int8_arithmetic = None
    assert relative_error(use(base), x.double() @ W.T + base.bias.double()) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_that_multiplies_integers_is_saved_merged_and_averaged_as_before(bert, batch, tmp_path, kernel):
    model = randomise(qLoRABertModel(str(bert), base_bits=8, dtype=torch.float32))
    exact = {name: tensor.clone() for name, tensor in model.merge_and_unload().state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    multiply_integers(model, kernel)
    average = torch.optim.swa_utils.AveragedModel(model)
    loss = model(**batch).loss
    loss.backward()
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.allclose(average(**batch).loss, loss, atol=1e-5)
    model.save_pretrained(tmp_path / "after")
    before, after = (load_file(tmp_path / folder / model.FILES[1]) for folder in ("before", "after"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(model(**batch).loss, loss)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.merge_and_unload().state_dict().items())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_model_that_never_trained_holds_hardly_more_bytes_for_integer_products(bert, batch, kernel):
    model = qLoRABertModel(str(bert), base_bits=8, dtype=torch.float32)
    before = memory_ledger(model).total_bytes()
    linear = multiply_integers(model, kernel)
    with torch.inference_mode():
        model(**batch)
    assert before < memory_ledger(model).total_bytes() < 1.05 * before
    model(**batch).loss.backward()
    model.zero_grad()
    packed = sum(row.num_bytes for row in memory_ledger(model) if row.what == "frozen weights, for backward")
    shapes = [module.shape for module in linear if "backward" in module.packed_integers]
    assert packed == sum(out * width + 8 * width for out, width in shapes) > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_several_threads_can_call_one_layer(kernel):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            layer = with_integers(kernel, inputs=64)[0]
            start = threading.Barrier(6)

            def call(layer=layer, start=start):
                start.wait()
                return layer(torch.randn(4, 64))

            with ThreadPoolExecutor(6) as pool:
                calls = [pool.submit(call) for _ in range(6)]
            assert all(call.result().isfinite().all() for call in calls)
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_double_backward_pass_is_near_that_of_the_exact_product(kernel):
    base, W, _ = with_integers(kernel, bias=False)
    x = torch.randn(4, 384, requires_grad=True)
    (g,) = torch.autograd.grad(base(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(g.pow(2).sum(), x)
    hessian = 2 * W.T @ W
    assert relative_error(second, 2 * g.double() @ hessian) < 3e-2  # the rounding of the first products is in it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_integer_products_are_for_float32_and_bfloat16_only(kernel, dtype):
    base, *_ = with_integers(None, dtype)
    x = torch.randn(5, 384, dtype=dtype)
    plain = base(x)
    base.int8_arithmetic = kernel
    assert torch.equal(base(x), plain)
    base(x.float())
    assert torch.equal(base(x), plain)
    assert base(torch.zeros(0, 384)).shape == (0, 48)


@pytest.mark.parametrize("kernel", ["int8", True])
def test_another_kernel_is_refused_with_what_is_allowed(kernel):
    base, *_ = with_integers(kernel)
    with pytest.raises(ValueError, match=rf'int8_arithmetic is {kernel!r}: allowed are "onednn".*"fbgemm", None'):
        base(torch.randn(3, 384))


@pytest.mark.parametrize("kernel", [None, "onednn", "fbgemm"])
def test_a_layer_multiplies_integers_where_the_machine_does_and_for_8_bits_only(monkeypatch, kernel):
    native = detect_compute_format()
    monkeypatch.setattr("lora_utils.detect_compute_format", lambda: native._replace(int8=kernel))
    assert frozen(8, torch.float32)[0].int8_arithmetic == kernel
    assert frozen(4, torch.float32)[0].int8_arithmetic is None


def test_an_empty_batch_gives_an_empty_output():
    for base_bits in BASES:
        layer = LoRALayer(frozen(base_bits, torch.float32)[0], rank=4)
        assert layer(torch.zeros(0, 128)).shape == (0, 48) and layer.base(torch.zeros(2, 0, 128)).shape == (2, 0, 48)


@pytest.mark.parametrize("base_bits", BASES)
@pytest.mark.parametrize("backward_too", [True, False])
def test_gradients_come_through_autocast(base_bits, backward_too):
    layer = LoRALayer(frozen(base_bits, torch.float32)[0], rank=4)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(7, 128, requires_grad=True)
    exact = torch.autograd.grad(layer(x).sum(), (x, layer.lora_A, layer.lora_B))
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        loss = y.sum()
        if backward_too:
            loss.backward()
    if not backward_too:
        loss.backward()
    assert y.dtype == torch.bfloat16
    for found, expected in zip((x.grad, layer.lora_A.grad, layer.lora_B.grad), exact, strict=True):
        assert found.dtype == torch.float32 and relative_error(found, expected) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.double()(x.double()).dtype == torch.float64  # which autocast does not change


def test_what_the_gradient_written_out_cannot_do_is_refused():
    layer = LoRALayer(nn.Linear(16, 16), rank=4)
    x = torch.randn(3, 16, requires_grad=True)
    (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    loss = layer(x).sum()
    with torch.no_grad():
        layer.base.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def model_of(folder, base_bits, dtype):
    if base_bits is None:
        return LoRABertModel(str(folder), rank=4, dtype=dtype)
    return qLoRABertModel(str(folder), rank=4, base_bits=base_bits, dtype=dtype)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dtype", ALLOWED, ids=str)
@pytest.mark.parametrize("base_bits", BASES)
def test_the_first_row_without_the_others_gives_the_logits_and_gradients_of_all_rows(
    bert, batch, base_bits, dtype, padded
):
    model = randomise(model_of(bert, base_bits, dtype))
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    labels = batch.pop("labels")
    loss = model(**batch, labels=labels).loss
    loss.backward()
    fast = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    pooled = model.model.bert(**batch).pooler_output  # every row, by transformers
    plain = nn.functional.cross_entropy(model.model.classifier(pooled.float()), labels)
    plain.backward()
    assert abs(loss - plain) < ALLOWED[dtype] * plain
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert relative_error(fast[name], p.grad) < (1e-4 if dtype == torch.float32 else 0.2), name


def test_a_model_of_one_block_and_one_token_computes_the_same(bert, batch, tmp_path):
    config = BertConfig.from_pretrained(bert, num_hidden_layers=1)
    BertModel(config).save_pretrained(tmp_path)
    model = randomise(LoRABertModel(str(tmp_path), rank=4, dtype=torch.float32)).eval()
    for tokens in (1, 9):
        ids = batch["input_ids"][:, :tokens]
        mask = batch["attention_mask"][:, :tokens]
        plain = model.model(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, plain, rtol=1e-5, atol=1e-5)


def test_the_last_block_computes_no_row_that_is_not_read(bert, batch):
    model = LoRABertModel(str(bert), rank=4, dtype=torch.float32)
    last = model.model.bert.encoder.layer[-1]
    shapes = {}
    for name, module in last.named_modules():
        module.register_forward_hook(lambda _, args, y, name=name: shapes.update({name: tuple(y.shape)}))
    model(**batch)
    assert shapes["attention.self.key"] == shapes["attention.self.value"] == (3, 9, 64)
    assert shapes["attention.self.query"] == shapes["attention.output"] == shapes["output"] == (3, 1, 64)
    assert shapes["intermediate"] == (3, 1, 128)


def test_nothing_below_the_lowest_adapted_layer_gets_a_gradient(bert, batch):
    """Count how often each weight is decoded: for the product, and again for the gradient of its input."""
    model = randomise(qLoRABertModel(str(bert), rank=4, base_bits=4, dtype=torch.float32))
    decoded = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            exact = layer.dequantize
            layer.dequantize = lambda dtype, name=name, exact=exact: decoded.update([name]) or exact(dtype)
    model(**batch).loss.backward()
    lowest = "model.bert.encoder.layer.0.attention.self."
    assert decoded == {name: 1 if name.startswith(lowest) else 2 for name in decoded} and len(decoded) == 2 * 6 + 1
