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


def layer_of(inputs=48, outputs=32, dtype=torch.float32, **options):
    """Return a layer whose B is not zero, so that its update shows."""
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(inputs, outputs, dtype=dtype), **{"rank": 4, **options})
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


def test_the_update_is_computed_in_the_dtype_of_the_base():
    layer = layer_of(dtype=torch.bfloat16)
    assert layer(torch.randn(5, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    layer(torch.randn(5, 48, dtype=torch.bfloat16)).float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


def test_only_a_and_b_get_gradients():
    layer = layer_of()
    layer(torch.randn(5, 48)).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_in_the_first_step_only_b_has_a_gradient():
    layer = LoRALayer(nn.Linear(48, 32))
    layer(torch.randn(5, 48)).square().sum().backward()
    assert layer.lora_A.grad.norm() == 0 < layer.lora_B.grad.norm()


def test_dropout_touches_the_update_only_and_in_training_only():
    layer = layer_of(dropout=0.5)
    x = torch.randn(200, 48)
    update = layer.train()(x) - layer.base(x)
    kept = layer.eval()(x) - layer.base(x)
    assert not torch.allclose(update, kept, atol=1e-3)
    assert torch.equal(layer(x), layer.eval()(x))
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer.train()(x), layer.base(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_the_base_as_it_is_to_the_bit(dtype):
    layer = layer_of(dtype=dtype)
    x = torch.randn(7, 48, dtype=dtype)
    old_weight = layer.base.weight.clone()
    adapted = layer(x)
    of_the_base = layer.base(x)
    layer.merge()
    assert layer.merged and torch.equal(layer.base.weight, old_weight)
    assert torch.equal(layer.base(x), of_the_base) and not torch.equal(layer(x), of_the_base)
    layer.unmerge()
    assert not layer.merged and layer.merged_weight is None
    assert torch.equal(layer.base.weight, old_weight) and torch.equal(layer(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_merged_weight_is_the_sum_in_float32_in_the_dtype_of_the_base(dtype):
    layer = layer_of(dtype=dtype)
    assert layer.merged_weight is None
    layer.merge()
    expected = (layer.base.weight.float() + layer.delta_weight()).to(dtype)
    assert layer.merged_weight.dtype == dtype and torch.equal(layer.merged_weight, expected)
    assert not layer.merged_weight.requires_grad


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_merged_layer_computes_what_it_computed_before(dtype, tolerance):
    layer = layer_of(dtype=dtype)
    x = torch.randn(7, 48, dtype=dtype)
    before = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), before, rtol=tolerance, atol=tolerance)
    merged_linear = torch.nn.functional.linear(x, layer.merged_weight, layer.base.bias)
    torch.testing.assert_close(layer(x), merged_linear, rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_a_merged_layer_passes_the_gradient_of_its_input_and_gives_a_and_b_none(bias):
    torch.manual_seed(0)
    layer = LoRALayer(nn.Linear(48, 32, bias=bias), rank=4)
    nn.init.normal_(layer.lora_B, std=0.3)
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


def test_a_new_a_or_b_takes_effect_at_the_next_merge():
    layer = layer_of()
    x = torch.randn(7, 48)
    layer.merge()
    once = layer(x)
    nn.init.normal_(layer.lora_B, std=0.3)
    layer.merge()
    assert torch.equal(layer(x), once)  # merging twice changes nothing
    layer.unmerge()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, once, atol=1e-3)


def test_merging_twice_and_unmerging_what_is_not_merged_is_harmless():
    layer = layer_of()
    x = torch.randn(7, 48)
    before = layer(x)
    layer.unmerge()
    assert torch.equal(layer(x), before)
    layer.merge()
    once = layer.merged_weight.clone()
    layer.merge()
    assert torch.equal(layer.merged_weight, once)
    layer.unmerge()
    layer.unmerge()
    assert not layer.merged and torch.equal(layer(x), before)


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_deepcopy_to_and_saving_work_in_either_state(merged):
    layer = layer_of()
    x = torch.randn(7, 48)
    reference = layer(x).detach()
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    if merged:
        layer.merge()
    assert set(layer.state_dict()) == set(state) == {"lora_A", "lora_B", "base.weight", "base.bias"}
    assert all(torch.equal(layer.state_dict()[name], state[name]) for name in state)

    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied is not layer and copied.merged == merged
        assert torch.equal(copied(x), layer(x))
        copied.unmerge()
        assert not copied.merged and layer.merged == merged
        assert torch.equal(copied.base.weight, state["base.weight"])
        torch.testing.assert_close(copied(x), reference)
        nn.init.zeros_(copied.lora_B)  # the copy shares nothing with the layer
        assert torch.equal(layer.lora_B, state["lora_B"])

    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = LoRALayer(nn.Linear(48, 32), rank=4)
    other.load_state_dict(torch.load(file))
    torch.testing.assert_close(other(x), reference)
    layer.load_state_dict(other.state_dict())
    assert not layer.merged
    torch.testing.assert_close(layer(x), reference)

    if merged:
        layer.merge()
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(double(x.double()).float(), reference)
    assert double.merged == merged
    layer.to(torch.float64).unmerge()
    assert torch.equal(layer.base.weight.float(), state["base.weight"])
    torch.testing.assert_close(layer(x.double()).float(), reference)


def test_train_and_eval_leave_a_layer_merged_and_its_weights_as_they_are():
    layer = layer_of()
    state = copy.deepcopy(layer.state_dict())
    layer.merge()
    merged_weight = layer.merged_weight.clone()
    layer.train().eval()
    assert layer.merged and torch.equal(layer.merged_weight, merged_weight)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())


def test_loading_a_state_dict_into_a_merged_layer_gives_the_loaded_update():
    layer = layer_of()
    x = torch.randn(7, 48)
    other = copy.deepcopy(layer)
    nn.init.normal_(other.lora_B, std=0.3)
    layer.merge()
    layer.load_state_dict(other.state_dict())
    assert not layer.merged and torch.equal(layer(x), other(x))


def test_its_repr_tells_rank_alpha_and_whether_it_is_merged():
    layer = layer_of(alpha=6)
    assert "rank=4, alpha=6, merged=False" in repr(layer)
    layer.merge()
    assert "merged=True" in repr(layer)


def test_under_autocast_the_update_is_computed_in_the_autocast_dtype():
    layer = layer_of()
    x = torch.randn(7, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), layer(x.bfloat16()).float())


@pytest.mark.parametrize(
    "wrong",
    [{"rank": r} for r in (0, -1, 1.5, "8", True, None, 33)]
    + [{"alpha": a} for a in (0, -1, math.nan, math.inf, "16", True)]
    + [{"dropout": d} for d in (1.0, -0.1, math.nan, "0.1", True)],
)
def test_a_wrong_argument_is_refused_by_name_and_value(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        LoRALayer(nn.Linear(48, 32), **wrong)
    assert (str(value) if value == 33 else repr(value)) in str(error.value)


class Derived(nn.Linear):
    """Stand for layers such as bitsandbytes', whose weight is not what they multiply by."""


@pytest.mark.parametrize("base", [None, nn.Embedding(3, 4), LoRALayer(nn.Linear(8, 8)), Derived(8, 8)])
def test_only_a_linear_layer_can_be_wrapped_and_only_once(base):
    with pytest.raises(ValueError, match=f"base is a {type(base).__name__}"):
        LoRALayer(base)
