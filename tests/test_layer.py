"""Check `LoRALayer` and `QuantizedLoRALayer` on their own: their start, their states, and how they merge and pack."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from lora_lab.rounding import WAYS
from lora_utils import LoRALayer, QuantizedLinear, QuantizedLoRALayer

BASES = [None, 8, 4]
BITS_AND_BASES = list(itertools.product([2, 3, 8], BASES))
DTYPES = [torch.float32, torch.bfloat16]
DERIVED = nn.MultiheadAttention(8, 2).out_proj  # of a class derived from nn.Linear, as bitsandbytes has some


def layer_of(bits=None, base_bits=None, dtype=torch.float32, bias=True, fresh=False, **options):
    """Return a layer as it starts or with a B that is not zero, so that its update shows. Without bits, it is float."""
    torch.manual_seed(0)
    base = nn.Linear(64, 32, bias, dtype=dtype)
    base = QuantizedLinear(base, base_bits) if base_bits else base
    layer = QuantizedLoRALayer(base, 4, bits=bits, **options) if bits else LoRALayer(base, 4, **options)
    if not fresh:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layer


@pytest.mark.parametrize("bits, base_bits", [*((None, base_bits) for base_bits in BASES), *BITS_AND_BASES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


def test_dropout_touches_the_update_only_and_in_training_only():
    layer = layer_of(dropout=0.5)
    x = torch.randn(200, 64)
    without = layer_of()(x)
    assert torch.equal(layer.eval()(x), without)
    assert not torch.allclose(layer.train()(x), without, atol=1e-3)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("bits, packed", [(None, False), (4, False), (4, True)])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_merging_stores_the_sum_in_the_dtype_of_the_base_and_leaves_the_base_as_it_is(bits, packed, dtype, bias):
    layer = layer_of(bits, dtype=dtype, bias=bias)
    if packed:
        layer.pack()
    old_weight = layer.base.weight.clone()
    x = torch.randn(7, 64, dtype=dtype, requires_grad=True)
    adapted = layer(x)
    g = torch.randn_like(adapted)
    layer.merge()
    (gradient,) = torch.autograd.grad(adapted, x, g)  # of the layer as it was
    expected = (old_weight.float() + layer.delta_weight()).to(dtype)
    layer.merge()  # for the second time, which changes nothing
    assert layer.merged and torch.equal(layer.merged_weight, expected) and not layer.merged_weight.requires_grad
    assert torch.equal(layer.base.weight, old_weight)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, expected, layer.base.bias))
    y.backward(g)
    assert all(parameter.grad is None for parameter in layer.parameters())
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for found, unmerged in ((y, adapted), (x.grad, gradient)):
        torch.testing.assert_close(found, unmerged, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    assert not layer.merged and layer.merged_weight is None
    assert torch.equal(layer.base.weight, old_weight) and torch.equal(layer(x), adapted)


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_copies_pickles_and_a_change_of_dtype_work_in_either_state(merged):
    layer = layer_of()
    x = torch.randn(7, 64)
    expected = layer(x).detach()
    state = copy.deepcopy(layer.state_dict())
    other = layer_of(fresh=True)
    for each in (layer, other) if merged else ():
        each.merge()
    assert layer.train().eval().merged == merged
    assert layer.state_dict().keys() == state.keys() == {"lora_A", "lora_B", "base.weight", "base.bias"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    other.load_state_dict(layer.state_dict())
    assert not other.merged and torch.equal(other(x), expected)

    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).double()):
        own_x = x.to(copied.base.weight.dtype)
        torch.testing.assert_close(copied(own_x).float(), expected)
        assert copied.merged == merged
        copied.unmerge()
        assert not copied.merged and layer.merged == merged
        torch.testing.assert_close(copied(own_x).float(), expected)
        assert torch.equal(copied.base.weight.float(), state["base.weight"])
        nn.init.zeros_(copied.lora_B)  # the copy shares nothing with the layer
        assert torch.equal(layer.lora_B, state["lora_B"])


@pytest.mark.parametrize("bits, base_bits", BITS_AND_BASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_copied_loaded_or_unpacked_it_computes_the_same_to_the_last_bit(bits, base_bits, dtype):
    layer = layer_of(bits, base_bits, dtype)
    other = layer_of(bits, base_bits, dtype, fresh=True)
    x = torch.randn(5, 64, dtype=dtype)
    A, B = layer.low_rank()
    assert all(map(torch.equal, (A, B), WAYS["half steps"](layer.lora_A, layer.lora_B, bits)))
    assert all(len(row.unique()) <= 2**bits for row in [*A, *B.T])
    expected = layer(x)
    layer.pack()
    other.pack()
    assert layer.packed and not any("lora_" in name for name, _ in layer.named_parameters())
    packed = copy.deepcopy(layer.packed_tensors())
    sizes = [tensor.nbytes for tensor in packed.values()]
    assert sizes == [math.ceil(4 * 64 * bits / 8), 4 * 4, math.ceil(4 * 32 * bits / 8), 4 * 4]

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


@pytest.mark.parametrize(
    "name, value",
    [("rank", rank) for rank in (0, 1.5, "8", True, None, 33)]
    + [("alpha", alpha) for alpha in (0, math.nan, math.inf, "16", True)]
    + [("dropout", dropout) for dropout in (1.0, -0.1, math.nan, "0.1", True)]
    + [("base", base) for base in (None, nn.Embedding(3, 4), LoRALayer(nn.Linear(8, 8)), DERIVED)],
)
def test_a_wrong_argument_is_refused_by_name_and_value(name, value):
    found = f"a {type(value).__name__}" if name == "base" else repr(value)
    with pytest.raises(ValueError, match=f"^{name} is {found}: "):
        LoRALayer(**{"base": nn.Linear(48, 32), name: value})
