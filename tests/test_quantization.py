"""Check integers with scales, packed bytes, and frozen weights as bitsandbytes stores them."""

import copy
import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_lab.rounding import WAYS, quantize_jointly
from lora_utils import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedLoRALayer,
    dequantize,
    pack,
    quantize,
    unpack,
)

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
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(1, 40))
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
def test_integers_are_in_range_and_no_worse_than_a_grid_up_to_the_largest_value(x, bits):
    q, scale = quantize(x, bits)
    assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(x), 1)
    assert q.min().item() >= -(2 ** (bits - 1)) and q.max().item() < 2 ** (bits - 1)
    decoded = dequantize(q, scale)
    x = x.double()
    assert decoded.isfinite().all() and (scale >= 0).all()
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 0.5)
    unclipped = ((x / step.where(step > 0, 1)).floor() + 0.5).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1)) * step
    error = (decoded - x).norm(dim=1)
    bound = (unclipped - x).norm(dim=1)
    assert (error <= bound + 1e-4 * x.norm(dim=1) + 1e-40).all()


@settings(deadline=None, max_examples=300)
@given(matrices(), BITS)
def test_rounding_what_was_rounded_changes_nothing(x, bits):
    q, scale = quantize(x, bits)
    again, same_scale = quantize(dequantize(q, scale), bits)
    assert torch.equal(q, again) and torch.equal(scale, same_scale)


@pytest.mark.parametrize("width", [1, 768, 5000])
@pytest.mark.parametrize("rank", [1, 64])
def test_a_row_is_rounded_the_same_among_others_and_from_a_transposed_matrix(rank, width):
    torch.manual_seed(rank)
    A = torch.randn(rank, width)
    B = torch.randn(width, rank)
    for bits in (2, 5, 8):
        both = quantize(torch.cat([A, B.T]), bits)
        apart = (quantize(A, bits), quantize(B.T, bits), quantize(B.T.contiguous(), bits))
        for part, expected in enumerate(apart):
            rows = slice(0, rank) if part == 0 else slice(rank, None)
            assert all(torch.equal(tensor[rows], same) for tensor, same in zip(both, expected, strict=True))


@pytest.mark.parametrize("bits", range(2, 9))
def test_zeros_decode_to_zeros_and_a_constant_to_itself(bits):
    x = torch.tensor([[0.0] * 7, [3.0] * 7, [-1e-30] * 7])
    torch.testing.assert_close(dequantize(*quantize(x, bits)), x, rtol=2**-15, atol=0)


@pytest.mark.parametrize("bits, most", [(8, 0.012), (4, 0.12), (3, 0.22), (2, 0.4)])
def test_the_error_on_normal_numbers_falls_with_the_bits(bits, most):
    x = torch.randn(8, 768, generator=torch.Generator().manual_seed(0))
    assert (dequantize(*quantize(x, bits)) - x).norm() < most * x.norm()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), BITS, st.integers(0, 999))
def test_packing_takes_no_gaps_and_gives_the_same_integers_back(shape, bits, seed):
    low = -(2 ** (bits - 1))
    high = 2 ** (bits - 1)
    q = torch.randint(low, high, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    q = q.transpose(0, -1)
    packed = pack(q, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(q.numel() * bits / 8)
    assert torch.equal(unpack(packed, bits, q.shape), q)


# Rounding A and B jointly --------------------------------------------------------------------------


def trained_pair(rank=8):
    """Return an A and a B as training makes them: with correlated ranks."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(rank) + 0.7 * torch.randn(rank, rank, generator=generator)
    A = torch.randn(rank, 96, generator=generator)
    B = torch.randn(64, rank, generator=generator)
    return mix @ A, B @ mix


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounded_jointly_the_product_keeps_more_than_rounded_apart(bits):
    A, B = trained_pair()

    def error(new_A, new_B):
        return ((new_B @ new_A - B @ A).norm() / (B @ A).norm()).item()

    jointly = quantize_jointly(A, B, bits)
    apart = dequantize(*quantize(A, bits)), dequantize(*quantize(B.T, bits)).T
    assert error(*jointly) < 0.8 * error(*apart)
    for rows in (jointly[0], jointly[1].T):
        assert torch.equal(dequantize(*quantize(rows, bits)), rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_other_ways_round_a_and_b_apart_with_one_scale_for_each_rank(bits):
    A, B = trained_pair()
    new_A, new_B = WAYS["half steps"](A, B, bits)
    assert torch.equal(new_A, dequantize(*quantize(A, bits))) and torch.equal(new_B, dequantize(*quantize(B.T, bits)).T)
    common_A, common_B = WAYS["absmax"](A, B, bits)
    for rows, rounded in ((A, common_A), (B.T, common_B.T)):
        top = 2 ** (bits - 1) - 1
        step = rows.double().abs().amax(1, keepdim=True) / top
        expected = (rows.double() / step).round().clamp(-top, top) * step
        torch.testing.assert_close(rounded.double(), expected, rtol=1e-5, atol=1e-6)
        assert all(len(row.unique()) <= 2 * top + 1 for row in rounded)


def test_rounding_jointly_handles_ranks_that_are_zero_or_equal():
    A, B = trained_pair()
    same_A, zero_B = quantize_jointly(A, torch.zeros_like(B), 4)
    assert not zero_B.any() and torch.equal(same_A, dequantize(*quantize(A, 4)))
    A[1] = A[0]
    B[:, 2] = 0
    new_A, new_B = quantize_jointly(A, B, 8)
    assert (new_B @ new_A - B @ A).norm() < 0.01 * (B @ A).norm()


# Frozen weights -----------------------------------------------------------------------------------


def linear(inputs, outputs, dtype=torch.float32, bias=True, std=0.05):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs, dtype=dtype, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    return layer


SHAPES = [(64, 3), (128, 65), (384, 384), (768, 96), (3072, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_bytes_and_values_are_those_of_bitsandbytes(shape, dtype):
    layer = linear(*shape, dtype=dtype)
    ours = QuantizedLinear(layer, 4)
    codes, theirs = bnb.quantize_4bit(layer.weight.data, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(ours.codes, codes.flatten())
    assert ours.offset.dtype == ours.absmax.dtype == torch.float32
    assert torch.equal(ours.offset[0], theirs.offset) and torch.equal(ours.absmax, theirs.state2.absmax)
    assert (ours.scale_codes.int() - theirs.absmax.int()).abs().max() <= 1

    theirs.dtype = torch.float32
    expected = bnb.dequantize_4bit(codes, theirs).view(layer.weight.shape)
    one_code = bnb.create_dynamic_map().diff().max() * theirs.state2.absmax.max()
    assert (ours.dequantize() - expected).abs().max() <= one_code
    ours.scale_codes.copy_(theirs.absmax)
    assert torch.equal(ours.dequantize(), expected)


def test_the_nearest_code_of_a_tie_is_the_lower():
    middles = (NF4[:-1] + NF4[1:]) / 2
    layer = nn.Linear(64, 1, bias=False)
    layer.weight.data = torch.cat([middles, torch.ones(49)])[None]  # the largest is 1, so the middles are not scaled
    decoded = QuantizedLinear(layer, 4).dequantize()[0]
    torch.testing.assert_close(decoded[:15] / decoded[-1], NF4[:15])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1200, 312), (7, 5)], ids=str)
def test_int8_bytes_and_values_are_those_of_bitsandbytes(shape, dtype):
    layer = linear(*shape, dtype=dtype)
    ours = QuantizedLinear(layer, 8)
    codes, absmax, _ = bnb.int8_vectorwise_quant(layer.weight.data)
    assert torch.equal(ours.codes, codes) and torch.equal(ours.absmax[:, 0], absmax)
    assert torch.equal(ours.dequantize(), bnb.int8_vectorwise_dequant(codes, absmax))


@pytest.mark.parametrize("shape", [(1200, 312), (1, 1), (3, 5), (65, 7), (63, 1), (2049, 513)], ids=str)
def test_nf4_is_right_at_widths_that_are_not_whole_blocks(shape):
    weight = linear(*shape).weight.detach()
    ours = QuantizedLinear(linear(*shape), 4)
    assert len(ours.codes) == math.ceil(weight.numel() / 2)
    flat = torch.cat([weight.flatten(), torch.zeros(-weight.numel() % 64)]).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    expected = (NF4[(flat / scale)[..., None].sub(NF4).abs().argmin(-1)] * scale).flatten()[: weight.numel()]
    torch.testing.assert_close(ours.dequantize().flatten(), expected, rtol=0.02, atol=0.02 * weight.abs().max().item())
    assert (ours.dequantize() - weight).norm() < 0.11 * weight.norm()


def test_nf4_takes_4_127_bits_a_weight_with_all_scales():
    ours = QuantizedLinear(linear(768, 768), 4)
    size = sum(tensor.nbytes for tensor in ours.state_dict().values()) - ours.bias.nbytes
    assert 8 * size / 768**2 == pytest.approx(4.127, abs=0.001)


@pytest.mark.parametrize("bits", [4, 8])
def test_decoding_in_bf16_differs_by_three_roundings_at_most(bits):
    ours = QuantizedLinear(linear(384, 200), bits)
    exact = ours.dequantize()
    fast = ours.dequantize(torch.bfloat16).float()
    assert ((fast - exact).abs() <= ((1 + 2**-8) ** 3 - 1) * exact.abs()).all()
    assert torch.equal(ours.dequantize(torch.float64), exact.double())


@settings(deadline=None, max_examples=150)
@given(matrices(), st.sampled_from([4, 8]))
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
def test_a_change_of_dtype_a_copy_and_a_state_dict_do_not_change_the_bytes(bits):
    ours = QuantizedLinear(linear(128, 48), bits)
    exact = ours.dequantize()
    for other in (copy.deepcopy(ours).bfloat16(), copy.deepcopy(ours).double(), copy.deepcopy(ours).half().float()):
        assert torch.equal(other.dequantize(), exact) and other.absmax.dtype == torch.float32
    other = QuantizedLinear(nn.Linear(128, 48), bits)
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.dequantize(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(3, 128)).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 384, 312, 5])
def test_an_embedding_gives_the_rows_that_it_decodes_to(bits, width):
    torch.manual_seed(0)
    embedding = nn.Embedding(50, width)
    ours = QuantizedEmbedding(embedding, bits, torch.float32)
    ids = torch.tensor([[3, 49, 0], [3, 3, 7]])
    assert torch.equal(ours(ids), ours.dequantize()[ids])
    assert ours.bits == (bits if width % 64 == 0 else 8)
    assert (ours(ids) - embedding(ids)).norm() < 0.12 * embedding(ids).norm()
    assert QuantizedEmbedding(embedding, bits, torch.bfloat16)(ids).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [1, 9, 4.0, "8", None, True])
@pytest.mark.parametrize(
    "use, allowed",
    [
        (lambda bits: quantize(torch.ones(2, 3), bits), "2, 3, 4, 5, 6, 7, 8"),
        (lambda bits: QuantizedLoRALayer(nn.Linear(8, 8), bits=bits), "2, 3, 4, 5, 6, 7, 8"),
        (lambda bits: QuantizedLinear(nn.Linear(8, 8), bits), "4, 8"),
    ],
    ids=["integers", "an adapter", "a frozen weight"],
)
def test_bits_that_are_not_possible_are_refused(use, allowed, bits):
    with pytest.raises(ValueError, match=f"^bits is {bits!r}: allowed are {allowed}$"):
        use(bits)


def layer_with(matrix):
    layer = nn.Linear(matrix.shape[1], len(matrix))
    layer.weight = nn.Parameter(matrix)
    return layer


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "use, name",
    [
        (lambda matrix: quantize(matrix, 4), "the matrix to quantise"),
        (lambda matrix: quantize_jointly(matrix, torch.ones(5, 2), 4), "A"),
        (lambda matrix: QuantizedLinear(layer_with(matrix), 8), "the weight"),
        (lambda matrix: QuantizedLinear(layer_with(matrix), 4), "the weight"),
    ],
    ids=["integers", "jointly", "int8", "NF4"],
)
def test_a_matrix_that_is_not_finite_is_refused_by_name(use, name, value):
    with pytest.raises(ValueError, match=rf"^{name} holds -?{abs(value)}, which is not finite"):
        use(torch.tensor([[0.5, 1.0, value], [1.0, 2.0, 3.0]]))


def test_ids_out_of_range_are_refused_as_by_any_embedding():
    ours = QuantizedEmbedding(nn.Embedding(50, 64), 4, torch.float32)
    for wrong in (-1, 50):
        with pytest.raises(IndexError):
            ours(torch.tensor([[wrong]]))


def test_the_largest_floats_do_not_decode_to_infinity():
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data[:7] = 3.4e38
    layer.weight.data[7] = 0
    for bits in (4, 8):
        assert QuantizedLinear(layer, bits).dequantize().isfinite().all()


def test_packed_bytes_of_another_length_are_refused_and_a_number_that_is_too_large_stays_alone():
    with pytest.raises(ValueError, match=r"packed has 5 bytes: \(12,\) of 4 bits"):
        unpack(torch.zeros(5, dtype=torch.uint8), 4, (12,))
    assert unpack(pack(torch.tensor([1, 2, 8, 3]), 4), 4, (4,)).tolist() == [1, 2, -8, 3]
