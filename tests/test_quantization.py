"""Check integers with scales, packed bytes, and frozen weights as bitsandbytes stores them."""

import math
import re
from functools import partial

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lab.rounding import WAYS, quantize_jointly
from lora_utils import QuantizedEmbedding, QuantizedLinear, QuantizedLoRALayer, dequantize, pack, quantize, unpack

HUGE = torch.cat([torch.full((7, 64), 3.4e38), torch.ones(1, 64)])
NF4 = bnb.get_4bit_type("nf4", "cpu")
BITS = st.integers(2, 8)
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, -1.0, 1e-45, -1e-40, 1e-38, 1e-30, 3.4e38, -3.4e38, 65504.0]),
    st.floats(-3.3999999521443642e38, 3.3999999521443642e38, width=32),
    st.floats(-4, 4, width=32),
)


@st.composite
def matrices(draw):
    """Draw a matrix of any size and dtype, contiguous or not: random, or of odd numbers, zeros and constants."""
    rows, columns = draw(st.tuples(st.integers(1, 5), st.integers(1, 40)))
    if draw(st.booleans()):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
        x = x * draw(st.sampled_from([1e-30, 1e-3, 1.0, 1e30])) * torch.logspace(-2, 2, rows)[:, None]
    else:
        x = torch.tensor(draw(st.lists(NUMBERS, min_size=rows, max_size=rows)))[:, None].repeat(1, columns)
        for _ in range(draw(st.integers(0, 6))):
            x[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = draw(NUMBERS)
    x = x.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))
    x = x.where(x.isfinite(), 0)
    return x.T.contiguous().T if draw(st.booleans()) else x


@settings(deadline=None, max_examples=300)
@given(matrices(), BITS)
def test_rounding_is_no_worse_than_a_grid_up_to_the_largest_value_and_rounding_again_changes_nothing(x, bits):
    q, scale = quantize(x, bits)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(x), 1)
    top = 2 ** (bits - 1)
    assert q.min().item() >= -top and q.max().item() < top
    decoded = dequantize(q, scale)
    assert all(map(torch.equal, quantize(decoded, bits), (q, scale)))
    x = x.double()
    assert decoded.isfinite().all() and (scale >= 0).all()
    step = x.abs().amax(1, keepdim=True) / (top - 0.5)
    unclipped = ((x / step.where(step > 0, 1)).floor() + 0.5).clamp(-top, top) * step
    bound = (unclipped - x).norm(dim=1)
    assert ((decoded - x).norm(dim=1) <= bound + 1e-4 * x.norm(dim=1) + 1e-40).all()


@pytest.mark.parametrize("rank, width", [(1, 1), (64, 768), (3, 5000)])
def test_a_row_is_rounded_the_same_among_others_and_from_a_transposed_matrix(rank, width):
    torch.manual_seed(rank)
    A = torch.randn(rank, width)
    B = torch.randn(width, rank)
    for bits in (2, 5, 8):
        both = quantize(torch.cat([A, B.T]), bits)
        for rows, apart in ((slice(rank), A), (slice(rank, None), B.T), (slice(rank, None), B.T.contiguous())):
            assert all(map(torch.equal, (tensor[rows] for tensor in both), quantize(apart, bits)))


@pytest.mark.parametrize("bits, most", [(8, 0.012), (4, 0.12), (3, 0.22), (2, 0.4)])
def test_zeros_and_constants_are_kept_and_the_error_on_normal_numbers_falls_with_the_bits(bits, most):
    x = torch.tensor([[0.0] * 7, [3.0] * 7, [-1e-30] * 7])
    torch.testing.assert_close(dequantize(*quantize(x, bits)), x, rtol=2**-15, atol=0)
    x = torch.randn(8, 768, generator=torch.Generator().manual_seed(0))
    assert (dequantize(*quantize(x, bits)) - x).norm() < most * x.norm()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), BITS, st.integers(0, 999))
def test_packing_takes_no_gaps_and_gives_the_same_integers_back(shape, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, generator=generator)
    q = q.transpose(0, -1)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(q.numel() * bits / 8)
    assert torch.equal(unpack(packed, bits, q.shape), q)
    numbers = torch.tensor([1, 0, 2**bits, 1])
    assert unpack(pack(numbers, bits), bits, (4,)).tolist() == [1, 0, 0, 1]  # what is too large stays alone


@pytest.mark.parametrize("degenerate", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_a_and_b_are_rounded_with_one_scale_for_each_rank_and_jointly_the_product_keeps_more(bits, degenerate):
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(8) + 0.7 * torch.randn(8, 8, generator=generator)  # so that ranks are correlated, as training does
    A = mix @ torch.randn(8, 96, generator=generator)
    B = torch.randn(64, 8, generator=generator) @ mix
    if degenerate:
        A[1] = A[0]
        B[:, 2] = 0
    jointly, apart, common = (WAYS[way](A, B, bits) for way in ("together", "half steps", "absmax"))
    assert torch.equal(apart[0], dequantize(*quantize(A, bits)))
    assert torch.equal(apart[1], dequantize(*quantize(B.T, bits)).T)
    errors = [(new_B @ new_A - B @ A).norm() for new_A, new_B in (jointly, apart)]
    assert errors[0] < 0.8 * errors[1]
    for rows in (jointly[0], jointly[1].T):
        assert torch.equal(dequantize(*quantize(rows, bits)), rows)
    top = 2 ** (bits - 1) - 1
    for rows, rounded in ((A, common[0]), (B.T, common[1].T)):
        step = rows.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / top
        expected = (rows.double() / step).round().clamp(-top, top) * step
        torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=1e-6)
    same_A, zero_B = quantize_jointly(A, torch.zeros_like(B), bits)
    assert not zero_B.any() and torch.equal(same_A, apart[0])


def linear(inputs, outputs, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.05)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 3), (128, 65), (384, 384), (768, 96), (3072, 48)], ids=str)
def test_bytes_and_values_are_those_of_bitsandbytes(shape, dtype):
    layer = linear(*shape, dtype)
    weight = layer.weight.data
    weight.view(-1)[:64] = torch.cat([(NF4[:-1] + NF4[1:]) / 2, torch.ones(49)])  # as near to one code as to the next
    int8 = QuantizedLinear(layer, 8)
    codes, absmax, _ = bnb.int8_vectorwise_quant(weight)
    assert torch.equal(int8.codes, codes) and torch.equal(int8.absmax[:, 0], absmax)
    assert torch.equal(int8.dequantize(), bnb.int8_vectorwise_dequant(codes, absmax))

    nf4 = QuantizedLinear(layer, 4)
    codes, theirs = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(nf4.codes, codes.flatten())
    assert torch.equal(nf4.offset[0], theirs.offset) and torch.equal(nf4.absmax, theirs.state2.absmax)
    assert (nf4.scale_codes.int() - theirs.absmax.int()).abs().max() <= 1
    stored = sum(tensor.nbytes for name, tensor in nf4.state_dict().items() if name != "bias")
    assert stored == sum(part.nbytes for part in (codes, theirs.absmax, theirs.state2.absmax, theirs.offset))
    theirs.dtype = torch.float32
    expected = bnb.dequantize_4bit(codes, theirs).view(weight.shape)
    one_code = bnb.create_dynamic_map().diff().max() * theirs.state2.absmax.max()
    assert (nf4.dequantize() - expected).abs().max() <= one_code
    nf4.scale_codes.copy_(theirs.absmax)
    assert torch.equal(nf4.dequantize(), expected)

    for ours in (int8, nf4):  # in bfloat16 three numbers are rounded
        exact = ours.dequantize()
        assert ((ours.dequantize(torch.bfloat16) - exact).abs() <= ((1 + 2**-8) ** 3 - 1) * exact.abs()).all()
        assert torch.equal(ours.dequantize(torch.float64), exact.double())


@pytest.mark.parametrize("shape", [(1, 1), (65, 7), (63, 1), (1200, 312), (2049, 513)], ids=str)
def test_nf4_is_right_at_widths_that_are_not_whole_blocks(shape):
    weight = linear(*shape).weight.detach()
    ours = QuantizedLinear(linear(*shape), 4)
    assert len(ours.codes) == math.ceil(weight.numel() / 2)
    flat = torch.cat([weight.flatten(), torch.zeros(-weight.numel() % 64)]).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    expected = (NF4[(flat / scale)[..., None].sub(NF4).abs().argmin(-1)] * scale).flatten()[: weight.numel()]
    torch.testing.assert_close(ours.dequantize().flatten(), expected, rtol=0.02, atol=0.02 * weight.abs().max().item())
    assert (ours.dequantize() - weight).norm() < 0.11 * weight.norm()


@settings(deadline=None, max_examples=150)
@given(matrices(), st.sampled_from([4, 8]))
@example(HUGE, 4)
@example(HUGE, 8)
def test_any_finite_weight_is_quantised_within_a_step_of_its_scale(x, bits):
    layer = nn.Linear(x.shape[1], x.shape[0], bias=False)
    layer.weight = nn.Parameter(x)
    decoded = QuantizedLinear(layer, bits).dequantize().double()
    x = x.double()
    assert decoded.isfinite().all()
    if bits == 8:
        assert ((decoded - x).abs() <= x.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4) + 1e-37).all()
    else:  # half the widest gap of NF4, and what the scale lost by its own 8 bits
        assert ((decoded - x).abs() <= 0.2 * x.abs().max() + 1e-37).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 384, 312])
def test_an_embedding_gives_the_rows_that_it_decodes_to(bits, width):
    torch.manual_seed(0)
    embedding = nn.Embedding(50, width)
    ours = QuantizedEmbedding(embedding, bits, torch.float32)
    ids = torch.tensor([[3, 49, 0], [3, 3, 7]])
    assert torch.equal(ours(ids), ours.dequantize()[ids])
    assert ours.bits == (bits if width % 64 == 0 else 8)
    assert (ours(ids) - embedding(ids)).norm() < 0.12 * embedding(ids).norm()
    assert QuantizedEmbedding(embedding, bits, torch.bfloat16)(ids).dtype == torch.bfloat16
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            ours(torch.tensor([[wrong]]))


def refusals():
    """Yield what is refused, each as a call and the start of its message."""
    x = torch.ones(2, 3)
    yield lambda: unpack(torch.zeros(5, dtype=torch.uint8), 4, (12,)), "packed has 5 bytes: (12,) of 4 bits"
    for bits in (1, 9, 4.0, "8", None, True):
        yield partial(quantize, x, bits), f"bits is {bits!r}: allowed are 2, 3, 4, 5, 6, 7, 8"
        yield partial(QuantizedLoRALayer, nn.Linear(8, 8), bits=bits), f"bits is {bits!r}: allowed are 2, 3"
        yield partial(QuantizedLinear, nn.Linear(8, 8), bits), f"bits is {bits!r}: allowed are 4, 8"
    for value in (math.nan, math.inf, -math.inf):
        bad = torch.tensor([[0.5, 1.0, value], [1.0, 2.0, 3.0]])
        layer = linear(3, 2)
        layer.weight.data = bad
        yield partial(quantize, bad, 4), f"the matrix to quantise holds {value}, which is not finite"
        yield partial(quantize_jointly, bad, torch.ones(5, 2), 4), f"A holds {value}, which is not finite"
        for bits in (4, 8):
            yield partial(QuantizedLinear, layer, bits), f"the weight holds {abs(value)}, which is not finite"


@pytest.mark.parametrize("refuse, message", list(refusals()))
def test_bits_that_are_not_possible_and_what_is_not_finite_or_too_long_are_refused_by_name(refuse, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        refuse()
