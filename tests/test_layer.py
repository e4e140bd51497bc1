"""Check `LoRALayer` on its own: its equation, its gradients, and its merged state."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lora_utils import LoRALayer, QuantizedLoRALayer


def layer_of(inputs=48, outputs=32, dtype=torch.float32, bias=True, layer_class=LoRALayer, **options):
    """Return a layer whose B is not zero, so that its update shows."""
    torch.manual_seed(0)
    layer = layer_class(nn.Linear(inputs, outputs, bias, dtype=dtype), **{"rank": 4, **options})
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def test_dropout_touches_the_update_only_and_in_training_only():
    layer = layer_of(dropout=0.5)
    x = torch.randn(200, 48)
    without = layer_of()(x)
    assert torch.equal(layer.eval()(x), without)
    assert not torch.allclose(layer.train()(x), without, atol=1e-3)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))


ROUNDED = {"layer_class": QuantizedLoRALayer, "bits": 4}
KINDS = [{"dtype": torch.float32}, {"dtype": torch.bfloat16}, {"dtype": torch.float64}, ROUNDED]


@pytest.mark.parametrize("packed, options", [*((False, kind) for kind in KINDS), (True, ROUNDED)])
@pytest.mark.parametrize("bias", [True, False])
def test_merging_stores_the_sum_in_the_dtype_of_the_base_and_leaves_the_base_as_it_is(options, packed, bias):
    layer = layer_of(bias=bias, **options)
    if packed:
        layer.pack()
    old_weight = layer.base.weight.clone()
    x = torch.randn(7, 48, dtype=old_weight.dtype, requires_grad=True)
    adapted = layer(x)
    g = torch.randn_like(adapted)
    layer.merge()
    (gradient,) = torch.autograd.grad(adapted, x, g)  # of the layer as it was
    expected = (old_weight.float() + layer.delta_weight()).to(old_weight.dtype)
    assert layer.merged and torch.equal(layer.merged_weight, expected) and not layer.merged_weight.requires_grad
    y = layer(x)
    assert torch.equal(layer.base.weight, old_weight)
    assert torch.equal(y, nn.functional.linear(x, expected, layer.base.bias))
    y.backward(g)
    assert all(parameter.grad is None for parameter in layer.parameters())
    tolerance = 5e-2 if old_weight.dtype == torch.bfloat16 else 1e-5
    for found, unmerged in ((y, adapted), (x.grad, gradient)):
        torch.testing.assert_close(found, unmerged, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    assert not layer.merged and layer.merged_weight is None
    assert torch.equal(layer.base.weight, old_weight) and torch.equal(layer(x), adapted)


def test_a_new_b_takes_effect_at_the_next_merge_and_a_loaded_state_at_once():
    layer = layer_of()
    x = torch.randn(7, 48)
    state = copy.deepcopy(layer.state_dict())
    before = layer(x)
    layer.merge()
    merged = layer(x)
    nn.init.zeros_(layer.lora_B)
    layer.merge()
    assert torch.equal(layer(x), merged)
    layer.unmerge()
    layer.unmerge()
    layer.merge()
    assert torch.equal(layer(x), layer.base(x))
    layer.load_state_dict(state)
    assert not layer.merged and torch.equal(layer(x), before)


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_copies_pickles_and_a_change_of_dtype_work_in_either_state(merged):
    layer = layer_of()
    x = torch.randn(7, 48)
    expected = layer(x).detach()
    state = copy.deepcopy(layer.state_dict())
    if merged:
        layer.merge()
    assert layer.train().eval().merged == merged
    assert layer.state_dict().keys() == state.keys() == {"lora_A", "lora_B", "base.weight", "base.bias"}
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    other = LoRALayer(nn.Linear(48, 32), rank=4)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), expected)

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


class Derived(nn.Linear):
    """Stand for layers such as bitsandbytes', whose weight is not what they multiply by."""


@pytest.mark.parametrize(
    "name, value",
    [("rank", rank) for rank in (0, 1.5, "8", True, None, 33)]
    + [("alpha", alpha) for alpha in (0, math.nan, math.inf, "16", True)]
    + [("dropout", dropout) for dropout in (1.0, -0.1, math.nan, "0.1", True)]
    + [("base", base) for base in (None, nn.Embedding(3, 4), LoRALayer(nn.Linear(8, 8)), Derived(8, 8))],
)
def test_a_wrong_argument_is_refused_by_name_and_value(name, value):
    found = f"a {type(value).__name__}" if name == "base" else repr(value)
    with pytest.raises(ValueError, match=f"^{name} is {found}: "):
        LoRALayer(**{"base": nn.Linear(48, 32), name: value})
