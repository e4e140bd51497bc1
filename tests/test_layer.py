"""Check `LoRALayer` on its own: its equation, its gradients, and its merged state."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_utils import LoRALayer


def layer_of(inputs=48, outputs=32, dtype=torch.float32, bias=True, **options):
    """Return a layer whose B is not zero, so that its update shows."""
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(inputs, outputs, bias, dtype=dtype), **{"rank": 4, **options})
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_lora_layer_computes_what_its_base_computes(dtype):
    base = nn.Linear(48, 32, dtype=dtype)
    x = torch.randn(5, 48, dtype=dtype)
    assert torch.equal(LoRALayer(base)(x), base(x))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_layer_computes_its_equation(inputs, outputs, data):
    rank = data.draw(st.integers(1, min(inputs, outputs)))
    use_rslora = data.draw(st.booleans())
    shape = data.draw(st.lists(st.integers(1, 3), max_size=2))
    layer = layer_of(inputs, outputs, rank=rank, alpha=5, use_rslora=use_rslora)
    x = torch.randn(*shape, inputs)
    A, B, W, b = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.base.weight, layer.base.bias))
    scaling = 5 / (math.sqrt(rank) if use_rslora else rank)
    expected = x.double() @ W.T + b + scaling * x.double() @ A.T @ B.T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.delta_weight().double(), scaling * B @ A, rtol=1e-5, atol=1e-5)


def test_a_and_b_have_pefts_shapes_dtype_and_start():
    layer = LoRALayer(nn.Linear(768, 96, dtype=torch.bfloat16), rank=8)
    assert layer.lora_A.shape == (8, 768) and layer.lora_B.shape == (96, 8)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(768)  # of Kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < layer.lora_A.abs().max() <= bound


def test_in_the_first_step_only_b_has_a_gradient():
    layer = LoRALayer(nn.Linear(48, 32))
    layer(torch.randn(5, 48)).square().sum().backward()
    assert layer.lora_A.grad.norm() == 0 < layer.lora_B.grad.norm()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_dropout_touches_the_update_only_and_in_training_only():
    layer = layer_of(dropout=0.5)
    x = torch.randn(200, 48)
    without = layer_of()(x)
    assert torch.equal(layer.eval()(x), without)
    assert not torch.allclose(layer.train()(x), without, atol=1e-3)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float64, 1e-5)], ids=str
)
def test_merging_stores_the_sum_in_the_dtype_of_the_base_and_leaves_the_base_as_it_is_to_the_bit(dtype, tolerance):
    layer = layer_of(dtype=dtype)
    x = torch.randn(7, 48, dtype=dtype)
    old_weight = layer.base.weight.clone()
    adapted = layer(x)
    layer.merge()
    expected = (old_weight.float() + layer.delta_weight()).to(dtype)
    assert layer.merged and torch.equal(layer.merged_weight, expected) and not layer.merged_weight.requires_grad
    assert torch.equal(layer.base.weight, old_weight)
    assert torch.equal(layer(x), nn.functional.linear(x, expected, layer.base.bias))
    torch.testing.assert_close(layer(x), adapted, rtol=tolerance, atol=tolerance)
    layer.unmerge()
    assert not layer.merged and layer.merged_weight is None
    assert torch.equal(layer.base.weight, old_weight) and torch.equal(layer(x), adapted)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_layer_passes_the_gradient_of_its_input_and_gives_a_and_b_none(bias):
    layer = layer_of(bias=bias)
    x = torch.randn(7, 48, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    layer.merge()
    layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-4)
    assert layer.lora_A.grad is None and layer.lora_B.grad is None and layer.base.weight.grad is None


@pytest.mark.parametrize("in_training", [False, True])
def test_a_merge_between_forward_and_backward_does_not_change_the_gradients(in_training):
    layer = layer_of(dropout=0.5).train(in_training)
    x = torch.randn(7, 48, requires_grad=True)

    def gradients(merge):
        torch.manual_seed(1)  # of the dropout
        loss = layer(x).square().sum()
        if merge:
            layer.merge()
        found = torch.autograd.grad(loss, (x, layer.lora_A, layer.lora_B))
        layer.unmerge()
        return found

    for found, expected in zip(gradients(merge=True), gradients(merge=False), strict=True):
        assert expected.norm() > 0 and torch.equal(found, expected)


def test_a_new_b_takes_effect_at_the_next_merge_and_merging_or_unmerging_twice_changes_nothing():
    layer = layer_of()
    x = torch.randn(7, 48)
    layer.unmerge()
    layer.merge()
    once = layer(x)
    nn.init.normal_(layer.lora_B, std=0.3)
    layer.merge()
    assert torch.equal(layer(x), once)
    layer.unmerge()
    layer.unmerge()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, once, atol=1e-3)


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_deepcopy_to_and_saving_work_in_either_state(merged):
    layer = layer_of()
    x = torch.randn(7, 48)
    reference = layer(x).detach()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    if merged:
        layer.merge()
    assert layer.train().eval().merged == merged
    assert set(layer.state_dict()) == set(state) == {"lora_A", "lora_B", "base.weight", "base.bias"}
    assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)

    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.merged == merged and torch.equal(copied(x), layer(x))
        copied.unmerge()
        assert not copied.merged and layer.merged == merged
        torch.testing.assert_close(copied(x), reference)
        nn.init.zeros_(copied.lora_B)  # the copy shares nothing with the layer
        assert torch.equal(layer.lora_B, state["lora_B"])

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LoRALayer(nn.Linear(48, 32), rank=4)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), reference)

    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(x.double()).float(), reference)
    assert double.merged == merged
    double.unmerge()
    assert torch.equal(double.base.weight.float(), state["base.weight"])
    torch.testing.assert_close(double(x.double()).float(), reference)


def test_loading_a_state_dict_into_a_merged_layer_gives_the_loaded_update():
    layer = layer_of()
    x = torch.randn(7, 48)
    other = copy.deepcopy(layer)
    nn.init.normal_(other.lora_B, std=0.3)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged and torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    "wrong",
    [{"rank": r} for r in (0, 1.5, "8", True, None, 33)]
    + [{"alpha": a} for a in (0, math.nan, math.inf, "16", True)]
    + [{"dropout": d} for d in (1.0, -0.1, math.nan, "0.1", True)],
)
def test_a_wrong_argument_is_refused_by_name_and_value(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        LoRALayer(nn.Linear(48, 32), **wrong)
    assert repr(value) in str(error.value)


class Derived(nn.Linear):
    """Stand for layers such as bitsandbytes', whose weight is not what they multiply by."""


@pytest.mark.parametrize("base", [None, nn.Embedding(3, 4), LoRALayer(nn.Linear(8, 8)), Derived(8, 8)])
def test_only_a_linear_layer_can_be_wrapped_and_only_once(base):
    with pytest.raises(ValueError, match=f"base is a {type(base).__name__}"):
        LoRALayer(base)
