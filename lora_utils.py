"""LoRA and q-LoRA for BERT, in one file to read from top to bottom.

1. LoRA                      `LoRALayer`: a frozen linear layer with a trained low-rank update
2. q-LoRA                    `QuantizedLoRALayer`: the update's two matrices as integers of a few bits
3. A frozen base in few bits `QuantizedLinear`: the large frozen weight in 8 or 4 bits
4. BERT                      `LoRABertModel`, `qLoRABertModel`: a classifier made of these layers
5. Batches and accuracy      sentences of similar length in a batch; accuracy with its interval
6. Files                     an adapter as PEFT writes it, and as packed integers (skip at first reading)
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import os
import re
import threading
import uuid
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import AutoConfig, BertForSequenceClassification, DataCollatorWithPadding
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = [
    *("LoRALayer", "quantize", "dequantize", "pack", "unpack", "FakeQuantize", "QuantizedLoRALayer"),
    *("QuantizedLinear", "QuantizedEmbedding", "detect_compute_format", "match_targets"),
    *("LoRABertModel", "qLoRABertModel", "LengthGroupedBatches", "make_loader"),
    *("wilson_interval", "Evaluation", "evaluate"),
]

# 1. LoRA -------------------------------------------------------------------------------------------


class LoRALayer(nn.Module):
    """Add a trained low-rank update to a frozen linear layer.

        y = base(x) + scaling · dropout(x) Aᵀ Bᵀ        scaling = alpha / rank

    A is `lora_A` (rank, in), Kaiming-uniform. B is `lora_B` (out, rank), zeros, so the layer starts as its base.
    Both are float32 parameters. The update is computed in the dtype of the base.

    Args:
        base: the linear layer to adapt, float or quantised. It is frozen and kept, not copied.
        rank: the number of rows of A, from 1 to the smaller side of the base.
        alpha: the factor alpha / rank multiplies the update.
        dropout: the probability that training zeroes an input of the update. The base sees every input.
        use_rslora: scale by alpha / sqrt(rank) instead, which keeps large ranks learning.

    Shapes: x (..., in) to y (..., out).
    Raises ValueError for a base that is not a linear layer, and for a rank, alpha or dropout out of range.
    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1;
    use_rslora: Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA".
    """

    def __init__(
        self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, use_rslora: bool = False
    ):
        _check_lora_arguments(base, rank, alpha, dropout)
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = float(alpha)
        self.scaling = self.alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = nn.Dropout(dropout)

        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

        self.register_buffer("merged_weight", None, persistent=False)  # W + update, while merged
        self.register_load_state_dict_pre_hook(_unmerge_before_loading)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return the A (rank, in) and B (out, rank) that `forward`, `delta_weight` and `merge` use."""
        return self.lora_A, self.lora_B

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.merged_weight, self.base.bias)
        x = _cast_for_autocast(x)
        A, B = (matrix.to(x.dtype) for matrix in self.low_rank())
        # Dropout is for the update only. A base that accelerate offloads loads its weights when it is called.
        if (self.dropout.training and self.dropout.p) or hasattr(self.base, "_hf_hook"):
            y = self.base(x)  # (..., out)
            h = F.linear(self.dropout(x), A)  # (..., rank)
            return y + self.scaling * F.linear(h, B)
        rows = x.reshape(-1, x.shape[-1])  # (n, in)
        y = _LoRAFunction.apply(rows, A, B, self.base, self.scaling)  # (n, out)
        return y.view(*x.shape[:-1], self.base.out_features)  # (..., out)

    def delta_weight(self) -> Tensor:
        """Return the update of the base's weight: scaling · B A, (out, in), in float32."""
        A, B = self.low_rank()
        return self.scaling * (B.float() @ A.float())

    @property
    def merged(self) -> bool:
        return self.merged_weight is not None

    @torch.no_grad()
    def merge(self) -> None:
        """Compute W + update once, so that the layer costs what its base costs. The base keeps its own weight.

        The sum is computed in float32 and stored in the base's dtype. In bfloat16 this rounding loses a small update.
        A merged layer's A and B get no gradient.
        Raises ValueError for a quantised base: quantising the sum again would lose most of a small update.
        """
        if isinstance(self.base, QuantizedLinear):
            raise ValueError("the base is quantised and cannot be merged: use the model's merge_and_unload()")
        if not self.merged:
            weight = self.base.weight
            self.merged_weight = (weight.float() + self.delta_weight()).to(weight.dtype)  # (out, in)

    def unmerge(self) -> None:
        """Drop the merged weight. The base's own weight was never changed."""
        self.merged_weight = None

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}, merged={self.merged}"


def _unmerge_before_loading(layer, *args):
    layer.unmerge()


def _check_lora_arguments(base, rank, alpha, dropout):
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


def _cast_for_autocast(x):
    """Cast x to the autocast dtype if autocast is on. Leave float64 alone, as autocast does."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


class _LoRAFunction(torch.autograd.Function):
    """Compute y = x Wᵀ + b + scaling · x Aᵀ Bᵀ with a frozen W, in one step of autograd.

    Separate products would fill several more tensors as large as y and x. Here each product is added in place.
    With h = x Aᵀ and the gradient g of y, the gradients are

        B: scaling · gᵀ h        A: scaling · (g B)ᵀ x        x: g W + scaling · (g B) A

    Shapes: x (n, in), A (rank, in), B (out, rank), h (n, rank), y and g (n, out), all in one dtype.
    """

    @staticmethod
    def forward(ctx, x, A, B, base, scaling):
        h = x @ A.T  # (n, rank)
        if isinstance(base, QuantizedLinear):
            W = None  # backward decodes it again, so that no decoded weight is kept
            y = base._forward_frozen(x)  # (n, out)
        else:
            W = base.weight  # autograd refuses a backward pass if somebody changed it meanwhile
            bias = None if base.bias is None else base.bias.to(x.dtype)
            y = F.linear(x, W.to(x.dtype), bias)  # (n, out)
        ctx.save_for_backward(x, A, B, h, W)
        ctx.base = base
        ctx.scaling = scaling
        return y.addmm_(h, B.T, alpha=scaling)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, A, B, h, W = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            grad_h = ctx.scaling * (g @ B)  # (n, rank)
            grad_B = ctx.scaling * (h.T @ g).T  # (out, rank): gᵀ h in the faster order
            grad_A = grad_h.T @ x  # (rank, in)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = ctx.base._input_gradient(g) if W is None else g @ W.to(g.dtype)  # (n, in)
                grad_x.addmm_(grad_h, A)
        return grad_x, grad_A, grad_B, None, None


# 2. q-LoRA -----------------------------------------------------------------------------------------


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix to integers of a few bits, with one scale per row.

        x ≈ scale · (q + ½)        q in -2^(bits-1) .. 2^(bits-1) - 1

    Args:
        x: (rows, n). Give A as it is and B transposed: each rank then has its own scale.
        bits: 2 to 8.

    Returns q, int8 (rows, n), and scale, float32 (rows, 1). A row of zeros gets the scale 0 and decodes to zeros.
    Raises ValueError for other bits, and for values that are not finite.

    The half step makes the grid symmetric, so that none of the 2^bits integers is wasted. Up to 6 bits, we try ten
    clipping thresholds and keep the one with the smallest squared error. Then we refit the scale by least squares.
    The scale has 16 significant bits, so that scale · (q + ½) is exact and rounding twice changes nothing.
    Source: Gersho and Gray 1992, "Vector Quantization and Signal Compression", chapter 5 (the mid-rise quantiser);
    Sung, Shin and Hwang 2015, "Resiliency of Deep Neural Networks under Quantization" (the step of least squares).
    """
    _check_bits("bits", bits, range(2, 9))
    _check_finite("the matrix to quantise", x)
    levels, scale = _round_to_grid(x, bits)
    q = (levels - 0.5).where(scale > 0, 0).to(torch.int8)  # (rows, n)
    return q, scale


def _check_bits(name, bits, allowed):
    """Refuse a bit-width that is not in `allowed`, which may hold None."""
    if bits not in allowed or isinstance(bits, (bool, float)):
        raise ValueError(f"{name} is {bits!r}: allowed are {', '.join(map(str, allowed))}")


def _check_finite(what, tensor):
    """Refuse a tensor with a NaN or an infinity: one of them spoils every number that shares its scale."""
    bad = tensor[~tensor.isfinite()]
    if len(bad):
        raise ValueError(f"{what} holds {bad[0].item()}, which is not finite: take weights that did not diverge")


def _round_to_grid(x, bits):
    """Return the levels q + ½ that `quantize` rounds to, float32 (rows, n), and the scale, float32 (rows, 1)."""
    top = 2 ** (bits - 1) - 0.5  # the outermost level
    x = x.detach().float().contiguous()  # contiguous, because the order of a sum changes its last bit
    largest = x.abs().amax(-1, keepdim=True)  # (rows, 1)
    unit = x / largest.where(largest > 0, 1)  # (rows, n), from -1 to 1

    # Try to clip at 1.0, 0.9, ..., 0.1 of the largest value. With 7 or 8 bits only the first is tried.
    trials = 10 if bits < 7 else 1
    thresholds = torch.arange(10, 10 - trials, -1, device=x.device)
    steps = thresholds.view(-1, 1, 1).float() / (10 * top)  # (trials, 1, 1), from one level to the next
    trial = (unit / steps).floor_().add_(0.5).clamp_(-top, top)  # (trials, rows, n), levels q + ½
    error = (trial * steps).sub_(unit).square_().sum(-1)  # (trials, rows)
    best = error.argmin(0)  # (rows,)
    levels = trial[best, torch.arange(len(x), device=x.device)]  # (rows, n)

    step = (unit * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)  # (rows, 1), least squares
    largest_scale = (1 - 2**-15) * torch.finfo(torch.float32).max / top  # a larger one would decode to infinity
    scale = (largest * step).clamp(max=largest_scale)
    # Round the scale to 16 significant bits: add half a unit, then clear the last 8 bits.
    rounded = scale.view(torch.int32).add(0x80).bitwise_and(~0xFF)
    return levels, rounded.view(torch.float32)


def dequantize(q: Tensor, scale: Tensor) -> Tensor:
    """Decode the integers of `quantize`: scale · (q + ½), float32."""
    return scale * (q.float() + 0.5)


def pack(q: Tensor, bits: int) -> Tensor:
    """Pack n signed integers of `bits` bits into ceil(n · bits / 8) bytes, uint8, the first in the highest bits."""
    numbers = q.flatten().long() + 2 ** (bits - 1) & 2**bits - 1  # (n,), from 0 on
    numbers = F.pad(numbers, (0, -len(numbers) % 8)).view(-1, 8)  # (words, 8)
    words = (numbers << torch.arange(7, -1, -1, device=q.device) * bits).sum(-1, keepdim=True)  # (words, 1)
    packed = words >> torch.arange(bits - 1, -1, -1, device=q.device) * 8 & 255  # (words, bits), each a byte
    return packed.flatten()[: math.ceil(q.numel() * bits / 8)].to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: Iterable[int]) -> Tensor:
    """Return the integers that `pack` packed, int8, in their shape. Raise ValueError for another number of bytes."""
    if len(packed) != math.ceil(math.prod(shape) * bits / 8):
        raise ValueError(f"packed has {len(packed)} bytes: {tuple(shape)} of {bits} bits must have another number")
    packed = F.pad(packed, (0, -len(packed) % bits)).view(-1, bits).long()  # (words, bits), each a byte
    words = (packed << torch.arange(bits - 1, -1, -1, device=packed.device) * 8).sum(-1, keepdim=True)  # (words, 1)
    numbers = words >> torch.arange(7, -1, -1, device=packed.device) * bits & 2**bits - 1  # (words, 8)
    q = numbers.flatten()[: math.prod(shape)] - 2 ** (bits - 1)  # (n,)
    return q.to(torch.int8).view(shape)


@functools.cache
@torch.inference_mode(False)
def _levels_of_bytes(bits, device):
    """Return the levels q + ½ in each byte of packed integers, where they are whole: float32 (256, 8 / bits)."""
    return unpack(torch.arange(256, dtype=torch.uint8, device=device), bits, (256, 8 // bits)).float() + 0.5


def _decode_packed(packed, scales, bits, width):
    """Decode packed integers with one scale per row: float32 (rows, width)."""
    shape = (len(scales), width)
    if 8 % bits:  # a number can lie in two bytes
        return dequantize(unpack(packed, bits, shape), scales[:, None])
    levels = _levels_of_bytes(bits, packed.device).index_select(0, packed.int())  # (bytes, 8 / bits)
    return scales[:, None] * levels.flatten()[: math.prod(shape)].view(shape)


class FakeQuantize(torch.autograd.Function):
    """Round a matrix as `quantize` does and pass the gradient straight through the rounding.

        forward: x -> scale · (q + ½)        backward: g -> g

    The rounding is a staircase with slope zero, so nothing would learn through its own gradient.
    Source: Bengio, Léonard and Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """

    @staticmethod
    def forward(ctx, x, bits):
        levels, scale = _round_to_grid(x, bits)
        return scale * levels

    @staticmethod
    def backward(ctx, g):
        return g, None


class _Float32Scales(nn.Module):
    """Keep the buffers that SCALES names in float32 when `.to(dtype)` changes the rest of the model."""

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers.get(name) for name in self.SCALES}
        super()._apply(fn, recurse)
        for name, scales in before.items():
            if scales is not None and self._buffers[name].dtype != scales.dtype:
                self._buffers[name] = scales.to(self._buffers[name].device)
        return self


class QuantizedLoRALayer(_Float32Scales, LoRALayer):
    """Round the A and B of a `LoRALayer` to integers of a few bits with one scale per rank: q-LoRA.

        y = base(x) + scaling · dropout(x) Âᵀ B̂ᵀ        Â, B̂: A and B as `quantize` rounds them

    In training, A and B are float32 parameters, and the forward pass uses their rounded values.
    `pack` drops them and keeps packed integers and scales. `unpack` makes them float32 and trainable again.
    `bits` is 2 to 8 for each number of A and B. The other arguments and errors are those of `LoRALayer`.
    """

    PACKED = ("A_codes", "A_scales", "B_codes", "B_scales")
    SCALES = ("A_scales", "B_scales")

    def __init__(
        self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, use_rslora: bool = False,
        bits: int = 8,
    ):  # fmt: skip
        _check_bits("bits", bits, range(2, 9))
        super().__init__(base, rank, alpha, dropout, use_rslora)
        self.bits = bits
        for name in self.PACKED:
            self.register_buffer(name, None)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Return the rounded A (rank, in) and B (out, rank). In training, gradients pass straight through."""
        if self.packed:
            A = _decode_packed(self.A_codes, self.A_scales, self.bits, self.base.in_features)  # (rank, in)
            B = _decode_packed(self.B_codes, self.B_scales, self.bits, self.base.out_features)  # (rank, out)
            return A, B.T
        if self.base.in_features == self.base.out_features:  # one call takes less time than two
            both = FakeQuantize.apply(torch.cat([self.lora_A, self.lora_B.T]), self.bits)  # (2 · rank, in)
            A, B = both.split(self.rank)
        else:
            A = FakeQuantize.apply(self.lora_A, self.bits)
            B = FakeQuantize.apply(self.lora_B.T, self.bits)
        return A, B.T

    @property
    def packed(self) -> bool:
        return self.lora_A is None

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return what `pack` keeps: integers and float32 scales. Raise ValueError for values that are not finite."""
        if self.packed:
            return {name: getattr(self, name) for name in self.PACKED}
        tensors = {}
        for letter, rows in (("A", self.lora_A), ("B", self.lora_B.T)):
            _check_finite(f"lora_{letter}", rows)
            q, scales = quantize(rows, self.bits)
            tensors[f"{letter}_codes"] = pack(q, self.bits)  # (ceil(rank · width · bits / 8),)
            tensors[f"{letter}_scales"] = scales.flatten()  # (rank,)
        return tensors

    def pack(self) -> None:
        """Keep only integers and scales: ceil(n · bits / 8) bytes per matrix and 4 per rank. They get no gradient."""
        for name, tensor in self.packed_tensors().items():
            setattr(self, name, tensor)
        self.lora_A = None
        self.lora_B = None

    def unpack(self) -> None:
        """Make A and B float32 parameters again, with the values that the integers stand for."""
        if self.packed:
            A, B = self.low_rank()
            for name in self.PACKED:
                setattr(self, name, None)
            self.lora_A = nn.Parameter(A)
            self.lora_B = nn.Parameter(B.contiguous())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, packed={self.packed}"


# 3. A frozen base in few bits ----------------------------------------------------------------------

# NF4, a 4-bit code whose levels are quantiles of a normal distribution. Source: bitsandbytes, functional.py.
_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
_NF4 += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
_NF4 += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
_NF4 = torch.tensor(_NF4, dtype=torch.float32)
# The two values that each byte of two codes stands for, (256,): two float32 seen as one int64.
_NF4_BYTE_TABLE = torch.cartesian_prod(_NF4, _NF4).view(torch.int64).flatten()
# The 8-bit code of NF4's own scales: 0, 1, and fractions of seven sizes. Source: Dettmers 2015, "8-Bit Approximations
# for Parallelism in Deep Learning", as in bitsandbytes, functional.py, create_dynamic_map.
_EDGES = [torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32) for i in range(7)]
_FRACTIONS = torch.cat([10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2 for i, edges in enumerate(_EDGES)])
_DYNAMIC_8BIT_CODE = torch.cat([_FRACTIONS, -_FRACTIONS, _FRACTIONS.new_tensor([0.0, 1.0])]).sort().values


class _QuantizedWeight(_Float32Scales):
    """Store a frozen matrix as packed codes with the scales to decode them.

    bits 8: int8, one scale per row: W ≈ q · absmax / 127.
    bits 4: NF4 in blocks of 64 along the rows, one scale per block: W ≈ code · absmax. Each scale is itself an 8-bit
    code in a block of 256, around the mean of all scales ("double quantisation"): 4.127 bits per weight, not 4.5.
    Source: Dettmers et al. 2022, "LLM.int8()" (vector-wise quantisation). Dettmers et al. 2023, "QLoRA", section 3.
    Codes and float32 values equal those of bitsandbytes. The codes of NF4's scales differ by at most one.
    """

    BLOCK_SIZE = 64
    SCALE_BLOCK_SIZE = 256
    CHUNK_SIZE = 2**20  # weights quantised at a time, so that a large weight never has a whole float copy
    SCALES = ("absmax", "offset", "dynamic_code")

    def __init__(self, weight, bits):
        _check_bits("bits", bits, (4, 8))
        super().__init__()
        self.bits = bits
        self.shape = tuple(weight.shape)
        buffers = self._to_nf4(weight.detach()) if bits == 4 else self._to_int8(weight.detach())
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor, persistent=name not in ("byte_table", "dynamic_code"))

    def _to_int8(self, weight):
        largest = torch.maximum(weight.amax(1, keepdim=True), -weight.amin(1, keepdim=True))  # (out, 1), without a copy
        absmax = largest.abs().float()  # 0 of a row of zeros, and not -0
        _check_finite("the weight", absmax)
        inverse = (127.0 / absmax.where(absmax > 0, 1)).clamp(max=torch.finfo(torch.float32).max)  # (out, 1)
        codes = torch.empty_like(weight, dtype=torch.int8)  # (out, in)
        rows = max(1, self.CHUNK_SIZE // weight.shape[1])
        for chunk, factor, place in zip(weight.split(rows), inverse.split(rows), codes.split(rows), strict=True):
            place.copy_((chunk.float() * factor).round())
        return {"codes": codes, "absmax": absmax}

    def _to_nf4(self, weight):
        weight = weight.reshape(-1)  # (out · in,)
        codes = torch.empty(math.ceil(len(weight) / 2), dtype=torch.uint8, device=weight.device)  # two to a byte
        nf4 = _NF4.to(weight.device)
        scales = []
        for chunk, place in zip(weight.split(self.CHUNK_SIZE), codes.split(self.CHUNK_SIZE // 2), strict=True):
            code, absmax = self._code_in_blocks(chunk.float(), self.BLOCK_SIZE, nf4)
            code = code.view(-1, 2)[: len(place)]  # (bytes, 2)
            place.copy_(code[:, 0] << 4 | code[:, 1])
            scales.append(absmax)
        scales = torch.cat(scales)  # (blocks,)
        _check_finite("the weight", scales)

        offset = scales.mean()
        if offset.isinf():  # the sum of huge scales
            offset = scales.double().mean().float()
        dynamic_code = _DYNAMIC_8BIT_CODE.to(weight.device)
        scale_codes, absmax = self._code_in_blocks(scales - offset, self.SCALE_BLOCK_SIZE, dynamic_code)
        return {
            "codes": codes,
            "scale_codes": scale_codes[: len(scales)].clone(),
            "absmax": absmax,
            "offset": offset.view(1),
            "byte_table": _NF4_BYTE_TABLE.to(weight.device),
            "dynamic_code": dynamic_code,
        }

    @staticmethod
    def _code_in_blocks(values, size, code):
        """Return the codes of `values`, padded to whole blocks, and the largest absolute value of each block."""
        blocks = F.pad(values, (0, -len(values) % size)).view(-1, size)  # (blocks, size)
        absmax = blocks.abs().amax(1, keepdim=True)  # (blocks, 1)
        scaled = (blocks * (1 / absmax.clamp(min=1e-38))).clamp(-1, 1)  # (blocks, size)
        midpoints = (code[:-1] + code[1:]) / 2
        nearest = torch.bucketize(scaled, midpoints, out_int32=True)  # of two equally near, the lower
        return nearest.to(torch.uint8).flatten(), absmax.flatten()

    def _nf4_scales(self, blocks=None):
        """Decode the scales of the NF4 blocks at these indices, or of all blocks: float32 (blocks,)."""
        scale_codes = self.scale_codes
        if blocks is None:
            absmax = self.absmax.repeat_interleave(self.SCALE_BLOCK_SIZE)[: len(scale_codes)]
        else:
            absmax = self.absmax[blocks // self.SCALE_BLOCK_SIZE]
            scale_codes = scale_codes[blocks]
        scales = self.dynamic_code.index_select(0, scale_codes.int()).mul_(absmax)
        return scales.add_(self.offset).clamp_(max=torch.finfo(torch.float32).max)

    def _decode_nf4(self, codes, scales, dtype):
        """Decode bytes with the scales of their blocks into a flat tensor: exact in float32, rounded in 16 bits."""
        value, pair = (dtype, torch.int32) if dtype.itemsize == 2 else (torch.float32, torch.int64)
        table = self.byte_table.view(torch.float32).to(value).view(pair)  # (256,), two values in each
        values = table.index_select(0, codes.flatten().int()).view(value)  # (2 · bytes,)
        if len(values) % self.BLOCK_SIZE:
            values = F.pad(values, (0, -len(values) % self.BLOCK_SIZE))
        values.view(-1, self.BLOCK_SIZE).mul_(scales.to(values.dtype)[:, None])
        return values.to(dtype)

    def _decode_int8(self, codes, absmax, dtype):
        if dtype.itemsize == 2:
            return codes.to(dtype) * (absmax / 127).to(dtype)
        # The same bits as codes · absmax · (1 / 127), which can overflow.
        return (codes * (absmax / 128) * (128 / 127)).to(dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Decode the matrix (out, in). It is exact in float32. In a 16-bit dtype, code and scale are rounded first."""
        _unpack_integers(self)
        if self.bits == 8:
            return self._decode_int8(self.codes, self.absmax, dtype)
        values = self._decode_nf4(self.codes, self._nf4_scales(), dtype)
        return values[: math.prod(self.shape)].view(self.shape)

    def extra_repr(self) -> str:
        return f"{self.shape}, {'NF4' if self.bits == 4 else 'int8'}"


class _PackedIntegers:
    """Hold an int8 matrix Q (out, in) in the layout of an integer kernel, and multiply rows by it.

        x ≈ t · X,  t = max |x| / 126 for each row       y = t · (X Qᵀ) · scale,  scale = absmax / 127

    "onednn" rounds x / t to 8 bits. Without VNNI, its sums of two products overflow 16 bits.
    "fbgemm" rounds x / t to even numbers (7 bits), so that no sum overflows. It is for CPUs without VNNI.
    """

    def __init__(self, codes, absmax, kernel):
        if kernel not in ("onednn", "fbgemm"):
            raise ValueError(f'int8_arithmetic is {kernel!r}: allowed are "onednn" (on CPUs with VNNI), "fbgemm", None')
        self.kernel = kernel
        self.scale = absmax.flatten() / 127  # (out,)
        self.zeros = torch.zeros(len(codes), dtype=torch.int32)
        self.num_bytes = codes.nbytes + self.scale.nbytes + self.zeros.nbytes
        if kernel == "onednn":
            self.matrix = torch.ops.onednn.qlinear_prepack(codes, None)
        else:
            with warnings.catch_warnings(action="ignore"):  # quantised tensors are deprecated, but FBGEMM needs one
                quantized = torch._make_per_channel_quantized_tensor(codes, self.scale.double(), self.zeros.long(), 0)
            self.matrix = torch.ops.quantized.linear_prepack(quantized, None)

    @torch.compiler.disable  # torch.compile knows these only in graphs it makes itself
    def multiply(self, x):
        """Return X Qᵀ · scale (n, out), in the dtype of x (n, in), and t (n, 1)."""
        largest = torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())  # (n, 1)
        t = largest.div_(126).clamp_(min=torch.finfo(x.dtype).tiny)
        x = x / t  # (n, in), from -126 to 126
        if self.kernel == "onednn":  # it is fast with unsigned integers only, so 128 is their zero
            X = x.round_().to(torch.int8).view(torch.uint8).add_(128)
            return self._multiply_integers(X, 128, self.scale, x.dtype), t
        fbgemm = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return fbgemm(x.float(), 2.0, 64, self.matrix).to(x.dtype), t  # rounds x / 2 to -63 .. 63 on the way

    def _multiply_integers(self, X, zero, scale, dtype):
        zeros, no_more = self.zeros, (None, 1.0, 0, dtype, "none", [], "")
        return torch.ops.onednn.qlinear_pointwise.default(X, 1.0, zero, self.matrix, scale, zeros, *no_more)

    def codes(self):
        """Return Q, int8 (out, in). oneDNN cannot unpack Q, so we multiply the identity by it."""
        if self.kernel == "fbgemm":
            return torch.ops.quantized.linear_unpack(self.matrix)[0].int_repr()
        identity = torch.eye(self.matrix.shape[0], dtype=torch.uint8)
        columns = self._multiply_integers(identity, 0, torch.ones_like(self.scale), torch.float32)  # (in, out)
        return columns.T.to(torch.int8, memory_format=torch.contiguous_format)


_PACKING = threading.RLock()  # several threads may call one model


class QuantizedLinear(_QuantizedWeight):
    """Compute a frozen linear layer from a weight in 8 or 4 bits. Use it wherever a frozen `nn.Linear` stands.

        4 bits: y = x Ŵᵀ + b. Ŵ is decoded for the product, dropped, and decoded again in the backward pass.
        8 bits: y = s · (x Qᵀ) + b. The integers Q are exact in the dtype of x. s holds the scale of each of W's rows.
            With `int8_arithmetic`, x ≈ t · X is rounded too, with one scale t per row: y = s · t · (X Qᵀ) + b.
            The backward pass rounds g ≈ t · G and Ŵ ≈ Q' · s' by column: x gets the gradient t · (G Q') · s'.

    `bits` is 8 (int8 by row) or 4 (NF4). The bias b of `linear` is kept and frozen.
    `int8_arithmetic` is the kernel that multiplies the integers, "onednn" or "fbgemm", or None for the exact product.
    `detect_compute_format` sets it. With 8 bits you can change it. It works on a CPU in float32 and bfloat16. The first
    product moves Q from `codes` to the kernel. The first backward pass adds Q'. `dequantize`, `state_dict`, `to`, a
    copy or an exact product moves Q back and drops Q'.
    Shapes: x (..., in) to y (..., out), in the dtype of x.
    Raises ValueError for other bits, and for a weight with values that are not finite.
    Source: SwitchBack, in Wortsman et al. 2023, "Stable and low-precision training for large-scale vision-language
    models". Its third product, the gradient of W, does not exist here, because W is frozen.
    """

    def __init__(self, linear: nn.Linear, bits: int):
        super().__init__(linear.weight, bits)
        self.out_features, self.in_features = self.shape
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.int8_arithmetic = detect_compute_format().int8 if bits == 8 else None
        self.packed_integers = {}  # {"forward": Q, "backward": Q'} in a kernel's layout
        self.register_state_dict_pre_hook(_unpack_integers)
        self.register_load_state_dict_pre_hook(_unpack_integers)

    def forward(self, x: Tensor) -> Tensor:
        x = _cast_for_autocast(x)
        rows = x.reshape(-1, self.in_features)  # (n, in)
        # Predictions do without a step of autograd, which costs time where x has few rows.
        y = _FrozenLinearFunction.apply(rows, self) if torch.is_grad_enabled() else self._forward_frozen(rows)
        return y.view(*x.shape[:-1], self.out_features)  # (..., out)

    def _forward_frozen(self, x):
        """Compute y (n, out) for x (n, in), outside autograd."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if packed := self._pack_for(x):
            y, scale = packed["forward"].multiply(x)  # (n, out), (n, 1)
        elif self.bits == 4 or x.dtype == torch.float16:  # in float16 sums of integers overflow
            return F.linear(x, self.dequantize(x.dtype), bias)
        else:
            y = x @ self.codes.to(x.dtype).T  # (n, out)
            scale = (self.absmax / 127).to(x.dtype).T  # (1, out)
        return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)

    def _input_gradient(self, g):
        """Compute the gradient of x (n, in), given that of y (n, out)."""
        if packed := self._pack_for(g):
            with torch.inference_mode(False), _PACKING:
                if "backward" not in packed:
                    weight = packed["forward"].codes() * (self.absmax / 127)  # Ŵ (out, in)
                    columns = self._to_int8(weight.T.contiguous())
                    packed["backward"] = _PackedIntegers(**columns, kernel=packed["forward"].kernel)
            grad_x, t = packed["backward"].multiply(g)  # (n, in), (n, 1)
            return grad_x.mul_(t)
        if self.bits == 4 or g.dtype == torch.float16:
            return g @ self.dequantize(g.dtype)
        scale = (self.absmax / 127).to(g.dtype).T  # (1, out)
        return (g * scale) @ self.codes.to(g.dtype)

    def _pack_for(self, x):
        """Return the integers packed for products with x. Where none are possible, restore `codes` and return {}."""
        possible = self.bits == 8 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
        differentiable = torch.is_grad_enabled() and x.requires_grad  # only in a double backward pass
        kernel = self.int8_arithmetic if possible and not differentiable else None
        packed = self.packed_integers
        if kernel == (packed["forward"].kernel if packed else None):  # nearly always, so it takes no lock
            return packed
        with torch.inference_mode(False), _PACKING:  # what is packed while predicting is used in training too
            if self.packed_integers and self.packed_integers["forward"].kernel != kernel:
                _unpack_integers(self)
            if kernel and not self.packed_integers:
                self.packed_integers = {"forward": _PackedIntegers(self.codes, self.absmax, kernel)}
                self.codes = None
            return self.packed_integers

    def _apply(self, fn, recurse=True):
        _unpack_integers(self)
        return super()._apply(fn, recurse)

    def __getstate__(self):
        _unpack_integers(self)
        return super().__getstate__()


def _unpack_integers(layer, *args):
    """Restore the buffer `codes` of a `QuantizedLinear`, and drop what was packed. Leave other modules alone."""
    with torch.inference_mode(False), _PACKING:
        if getattr(layer, "packed_integers", None):
            layer.codes = layer.packed_integers["forward"].codes()
            layer.packed_integers = {}


class _FrozenLinearFunction(torch.autograd.Function):
    """Compute y = x Wᵀ + b with a frozen, quantised W, and save nothing decoded for the backward pass."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return layer._forward_frozen(x)

    @staticmethod
    def backward(ctx, g):
        with torch.autocast(g.device.type, enabled=False):
            return ctx.layer._input_gradient(g) if ctx.needs_input_grad[0] else None, None


class QuantizedEmbedding(_QuantizedWeight):
    """Look up rows of a frozen embedding in 8 or 4 bits. Only the rows that are looked up are decoded.

    NF4 needs a width that is a multiple of 64. Other widths are stored as int8.
    Rows are returned in `dtype`, which `model.to(dtype)` changes.
    Shapes: ids (...) to rows (..., width). Raises ValueError as `QuantizedLinear` does.
    """

    def __init__(self, embedding: nn.Embedding, bits: int, dtype: torch.dtype):
        super().__init__(embedding.weight, bits if embedding.embedding_dim % self.BLOCK_SIZE == 0 else 8)
        self.register_buffer("dtype_like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = ids.flatten()  # (n,)
        width = self.shape[1]
        dtype = self.dtype_like.dtype
        if self.bits == 8:
            values = self._decode_int8(self.codes.index_select(0, rows), self.absmax.index_select(0, rows), dtype)
        else:
            blocks_per_row = width // self.BLOCK_SIZE
            blocks = rows[:, None] * blocks_per_row + torch.arange(blocks_per_row, device=rows.device)  # (n, blocks)
            codes = self.codes.view(self.shape[0], -1).index_select(0, rows)  # (n, width / 2)
            values = self._decode_nf4(codes, self._nf4_scales(blocks.flatten()), dtype)
        return values.view(*ids.shape, width)


# 4. BERT -------------------------------------------------------------------------------------------

# The features that oneDNN may use when ONEDNN_MAX_CPU_ISA caps the CPU at an older instruction set.
_ISA_FEATURES = {"SSE41": (), "AVX": (), "AVX2": (), "AVX2_VNNI": ("avx_vnni",), "AVX2_VNNI_2": ("avx_vnni",)}
_ISA_FEATURES |= {"AVX512_CORE": (), "AVX512_CORE_VNNI": ("avx512_vnni",)}
_ISA_FEATURES |= {"AVX512_CORE_BF16": ("avx512_vnni", "avx512_bf16")}


class _ComputeFormat(NamedTuple):
    dtype: torch.dtype
    attention: str
    int8: str | None


def detect_compute_format() -> _ComputeFormat:
    """Return what this machine computes in fastest: (dtype, attention, int8).

    dtype: of the frozen weights. It is bfloat16 if the machine multiplies in bfloat16. It is float16 on older GPUs with
        tensor cores, such as the T4. It is float32 in all other cases.
    attention: as transformers names it. It is "eager" on a CPU, where fused attention has a slow bfloat16 backward.
    int8: the kernel that multiplies 8-bit integers in `QuantizedLinear`. It is "onednn" on CPUs with VNNI and "fbgemm"
        on others with AVX2. It is None on GPUs, on ARM and with AMX, where the product is exact.
    """
    if torch.cuda.is_available():
        half = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        has_tensor_cores = torch.cuda.get_device_capability() >= (7, 0)
        return _ComputeFormat(half if has_tensor_cores else torch.float32, "sdpa", int8=None)
    features = {name for name, value in torch.cpu.get_capabilities().items() if value is True}
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    features &= set(_ISA_FEATURES.get(cap, features))
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # ATEN_CPU_CAPABILITY can cap PyTorch itself
    bf16 = wide and bool(features & {"avx512_bf16", "amx_bf16"})
    int8 = "fbgemm" if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else None
    if features & {"avx_vnni", "avx512_vnni"}:
        int8 = None if "amx_bf16" in features else "onednn"
    return _ComputeFormat(torch.bfloat16 if bf16 else torch.float32, "eager", int8)


def match_targets(names: Iterable[str], target_modules: str | Iterable[str]) -> list[str]:
    """Return the names of the linear layers that `target_modules` selects, in the model's order, by PEFT's rules.

    `target_modules` is a list of names, each matched at the end of a layer's path ("query", "output.dense"). Or it is
    a string: "all-linear" for every layer, else a regular expression that matches the whole path.
    Raises ValueError for an empty list, a bad regular expression, and a name that matches no layer.
    """
    names = list(names)
    if target_modules == "all-linear":
        return names
    last_parts = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
    allowed = f'allowed are a list with ends of {last_parts} or of longer paths, a regular expression, or "all-linear"'
    wrong = f"target_modules is {target_modules!r}"
    if isinstance(target_modules, str):
        try:
            matches = {target_modules: [name for name in names if re.fullmatch(target_modules, name)]}
        except re.error as error:
            raise ValueError(f"{wrong}, no regular expression ({error}): {allowed}") from None
    elif isinstance(target_modules, (list, tuple, set)) and target_modules:
        matches = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in target_modules}
    else:
        raise ValueError(f"{wrong}: {allowed}")
    unmatched = [repr(target) for target, found in matches.items() if not found]
    if unmatched:
        raise ValueError(f"{wrong}, and no linear layer here is {', '.join(unmatched)}: {allowed}")
    return [name for name in names if any(name in found for found in matches.values())]


def _checkpoint_folder(model_name, folder):
    """Return the folder to load a base from: `folder`, a folder named by `model_name`, or the hub's snapshot."""
    if folder is not None or Path(model_name).is_dir():
        return Path(folder or model_name)
    try:
        wanted = ["*.json", "*.txt", "model.safetensors"]
        return Path(huggingface_hub.snapshot_download(model_name, allow_patterns=wanted))
    except Exception as error:  # of many kinds
        reason = str(error).strip().partition("\n")[0]
        allowed = "allowed are a folder and the id of a BERT on the hub. An adapter's config names its base in "
        allowed += "base_model_name_or_path: give from_pretrained another by model_name= or folder="
        raise ValueError(f"no model {model_name!r}: no such folder, and the hub says: {reason}; {allowed}") from None


def _load_frozen(model, model_name, file, dtype, base_bits):
    """Load a checkpoint into a frozen BERT on the meta device. Return whether it has a head. If not, draw a new one."""
    keys = {}  # {name in BertForSequenceClassification: name in the file}
    with _open_safetensors(file) as opened:
        for key in opened.keys():  # noqa: SIM118
            name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            keys[name if name.startswith(("bert.", "classifier.")) else f"bert.{name}"] = key
    missing = [name for name, _ in model.named_parameters() if name not in keys and not name.startswith("classifier.")]
    if missing:
        lacking = f"{model_name} lacks {len(missing)} of a BERT's weights, such as {missing[0]}"
        raise ValueError(f"{lacking}: {_CONVERT}, with new weights for these")
    positions = torch.arange(model.config.max_position_embeddings)[None]  # buffers that no file holds
    model.bert.embeddings.position_ids = positions
    model.bert.embeddings.token_type_ids = torch.zeros_like(positions)
    # Each tensor is quantised or cast before the next is read, so that the checkpoint is never in memory as a whole.
    for path in [path for path, _ in model.named_modules()]:  # a list of modules would keep all weights
        module = model.get_submodule(path)
        quantized = base_bits and path != "classifier" and isinstance(module, (nn.Linear, nn.Embedding))
        for kind, empty in list(module.named_parameters(recurse=False)):
            name = f"{path}.{kind}"
            if name in keys:
                with _open_safetensors(file) as opened:  # once per tensor, so that no tensor stays mapped
                    tensor = opened.get_tensor(keys[name])
                if not (quantized and kind == "weight"):
                    tensor = tensor.to(dtype, copy=True)
            else:  # a new head
                tensor = torch.zeros(empty.shape, dtype=dtype)
                if kind == "weight":
                    tensor.normal_(std=model.config.initializer_range)
            if tensor.shape != empty.shape:
                raise ValueError(f"{model_name} has {name} of shape {tuple(tensor.shape)}, not {tuple(empty.shape)}")
            _check_finite(f"{model_name}: {name}", tensor)
            setattr(module, kind, nn.Parameter(tensor, requires_grad=False))
        if quantized and isinstance(module, nn.Linear):
            model.set_submodule(path, QuantizedLinear(module, base_bits))
        elif quantized:
            model.set_submodule(path, QuantizedEmbedding(module, base_bits, dtype))
    return "classifier.weight" in keys


def _last_block_cls(block, hidden, mask):
    """Compute only the first row ([CLS]) of a block's output, (batch, 1, width). The pooler reads no other."""
    attention = block.attention.self
    heads = (attention.num_attention_heads, -1)
    cls = hidden[:, :1].contiguous()  # (batch, 1, width), contiguous so that no product below copies it
    query = attention.query(cls).unflatten(-1, heads).transpose(1, 2)  # (batch, heads, 1, head width)
    key = attention.key(hidden).unflatten(-1, heads).transpose(1, 2)  # (batch, heads, tokens, head width)
    value = attention.value(hidden).unflatten(-1, heads).transpose(1, 2)  # (batch, heads, tokens, head width)
    scores = query @ key.transpose(-1, -2) * attention.scaling  # (batch, heads, 1, tokens)
    if mask is not None:
        scores = scores + mask
    context = attention.dropout(scores.softmax(-1)) @ value  # (batch, heads, 1, head width)
    context = context.transpose(1, 2).flatten(2)  # (batch, 1, width)
    return block.feed_forward_chunk(block.attention.output(context, cls))


def _cast_to_head(head, inputs):
    """Cast the head's input to the head's dtype: float32, even when the rest is in 16 bits."""
    return inputs[0].to(head.weight.dtype)


class LoRABertModel(nn.Module):
    """Classify sentences with a BERT in which only low-rank updates and the classifier head are trained.

    The linear layers that `target_modules` names become `LoRALayer`s. All other weights are frozen except the head's,
    which is trained in float32. The backbone's dropout is off, because it costs time and we saw no gain from it.

    Args:
        model_name: a hub id or a folder. Saved adapters name their base by it.
        folder: where to load the base from. `model_name` is then only recorded.
        rank, alpha, dropout, use_rslora: of every `LoRALayer`.
        target_modules: as in PEFT (see `match_targets`). "all-linear" includes the pooler's layer.
        num_labels: the number of classes.
        dtype: of the frozen weights. None takes the one that `detect_compute_format` returns.

    `forward` takes no `inputs_embeds`, `position_ids`, `output_*` or `return_dict`. It skips hooks on `model.bert`,
    the encoder, the last block, its attention and the layers' bases. `self.model(...)` skips only the bases'.

    Attributes: `model` is the `BertForSequenceClassification` with the layers in it. `options` holds the settings that
    are saved with an adapter. `fingerprint` is the SHA-256 of the base's model.safetensors, as the hub shows it.
    Raises ValueError for a wrong argument, target or model before any weights are loaded, and for a checkpoint that
    lacks a tensor or has one of another shape.
    Source: Hu et al. 2021, sections 4.2 (which weights to adapt) and 5. Names and file format are PEFT's.
    """

    FILES = ("adapter_config.json", "adapter_model.safetensors")  # PEFT's names
    LAYER = LoRALayer

    def __init__(
        self, model_name: str, *, folder: str | Path | None = None, rank: int = 8, alpha: float = 16.0,
        dropout: float = 0.0, target_modules: str | Iterable[str] = ("query", "value"), num_labels: int = 2,
        dtype: torch.dtype | None = None, use_rslora: bool = False,
    ):  # fmt: skip
        super().__init__()
        options = {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
        options |= {"target_modules": target_modules, "num_labels": num_labels}
        self._build(model_name, folder, dtype, options)

    def _build(self, model_name, folder, dtype, options):
        if not isinstance(options["num_labels"], int) or options["num_labels"] < 2:
            raise ValueError(f"num_labels is {options['num_labels']!r}: it must be a whole number of 2 or more")
        if dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ValueError(f"dtype is {dtype!r}: allowed are None and torch's floating-point types")
        if isinstance(options["target_modules"], (tuple, set)):
            options["target_modules"] = sorted(options["target_modules"], key=str)  # a list, as JSON has it
        self.model_name = str(model_name)
        folder = _checkpoint_folder(self.model_name, folder)
        config = AutoConfig.from_pretrained(_require_file(folder, "config.json", "a BERT checkpoint").parent)
        if config.model_type != "bert" or config.is_decoder:
            found = f"{'a decoder' if config.model_type == 'bert' else 'a checkpoint'} of type {config.model_type!r}"
            raise ValueError(f"{model_name} is {found}: allowed are encoders of type 'bert'")
        config.dtype = torch.float32
        names = config.id2label
        config.num_labels = options["num_labels"]
        self.checkpoint_config = copy.deepcopy(config)

        native = detect_compute_format()
        config._attn_implementation = native.attention
        config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": None})
        with torch.device("meta"):  # shapes only: a wrong target or rank is refused before any weights are loaded
            self.model = BertForSequenceClassification(config)
        self._new_layers(options)  # only to check the options

        file = _require_file(folder, "model.safetensors", f"a BERT checkpoint; {_CONVERT}")
        with open(file, "rb") as opened:
            self.fingerprint = hashlib.file_digest(opened, "sha256").hexdigest()
        self._source = (file, dtype or native.dtype, options.get("base_bits"))
        has_head = _load_frozen(self.model, self.model_name, *self._source)
        has_names = has_head and names != {label: f"LABEL_{label}" for label in names}
        self.label_names = names if has_names else {0: "NEGATIVE", 1: "POSITIVE"}  # as in SST-2
        head = self.model.classifier.float().requires_grad_(True)
        self._set_adapter(self._new_layers(options), head, options)

    def lora_layers(self) -> dict[str, LoRALayer]:
        """Return {name: layer} of every `LoRALayer`, in the model's order."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoRALayer)}

    def _new_layers(self, options):
        """Build {name: layer} for every targeted linear layer. The model does not change."""
        linear = {}
        for name, module in self.model.named_modules():
            if isinstance(module, (nn.Linear, QuantizedLinear)) and name != "classifier":
                linear[name.removesuffix(".base")] = module  # an adapted layer's base
        targets = match_targets(linear, options["target_modules"])
        of_the_model = {"target_modules", "num_labels", "base_bits"}
        of_a_layer = {name: value for name, value in options.items() if name not in of_the_model}
        return {name: self.LAYER(linear[name], **of_a_layer).train(self.training) for name in targets}

    def _set_adapter(self, layers, head, options):
        """Replace all adapted layers, the head and the options by these."""
        bases = {name: layer.base for name, layer in self.lora_layers().items()}
        for name, layer in (bases | layers).items():
            self.model.set_submodule(name, layer)
        self.model.classifier = head
        head.register_forward_pre_hook(_cast_to_head)
        self.options = options
        for config in (self.model.config, self.checkpoint_config):
            config.num_labels = options["num_labels"]
            if len(self.label_names) == config.num_labels:
                config.id2label = dict(self.label_names)
                config.label2id = {name: label for label, name in self.label_names.items()}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:  # fmt: skip
        """Return logits (batch, num_labels) in float32 and, given labels (batch,), the mean cross-entropy in nats.

        The other arguments have the shape (batch, tokens). The attention mask is 0 where a token is padding.
        Raises ValueError for labels of another shape or dtype or outside 0..num_labels-1, and as `encode` does.
        """
        pooled = self.encode(input_ids, attention_mask, token_type_ids)  # (batch, width)
        logits = self.model.classifier(pooled).float()  # (batch, num_labels)
        loss = None
        if labels is not None:
            if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != logits.shape[:1]:
                found = f"{str(labels.dtype).removeprefix('torch.')} {tuple(labels.shape)}"
                raise ValueError(f"labels are {found}: they must be whole numbers, one for each sentence")
            if ((labels < 0) | (labels >= logits.shape[-1])).any():
                raise ValueError(f"labels are {labels.unique().tolist()}: allowed are 0 to {logits.shape[-1] - 1}")
            loss = F.cross_entropy(logits, labels.long())
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return the pooler's output, which the head reads: (batch, width).

        Raises ValueError for more tokens than the BERT has positions, and for an id that it does not know.
        """
        bert = self.model.bert
        if input_ids.shape[1] > self.config.max_position_embeddings:
            limit = f"{self.config.max_position_embeddings} tokens: set tokenizer.model_max_length to it"
            raise ValueError(f"a sentence has {input_ids.shape[1]} tokens, and this BERT takes at most {limit}")
        if ((input_ids < 0) | (input_ids >= self.config.vocab_size)).any():  # a GPU waits once for this answer
            allowed = f"allowed are 0 to {self.config.vocab_size - 1}: use the tokenizer of {self.model_name}"
            raise ValueError(f"input_ids are {input_ids.min()} to {input_ids.max()}, {allowed}")
        hidden = bert.embeddings(input_ids, token_type_ids)  # (batch, tokens, width)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            padding = attention_mask[:, None, None] == 0  # (batch, 1, 1, tokens)
            mask = hidden.new_zeros(padding.shape).masked_fill_(padding, torch.finfo(hidden.dtype).min)
        *blocks, last = bert.encoder.layer
        for block in blocks:
            hidden = block(hidden, mask)
        return bert.pooler(_last_block_cls(last, hidden, mask))

    def __getattr__(self, name):
        # `transformers.Trainer` asks for these. The BERT inside answers.
        if name in ("config", "device", "dtype", "gradient_checkpointing_enable", "activation_checkpointing_enable"):
            return getattr(self.model, name)
        return super().__getattr__(name)

    def named_buffers(self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True):
        """Yield (name, buffer) as PyTorch does, of all integers too: two models then have the same buffers."""
        self.apply(_unpack_integers)
        return super().named_buffers(prefix, recurse, remove_duplicate)

    def print_trainable_parameters(self) -> None:
        """Print the number of trained and of all parameters. A quantised weight counts by its elements."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        quantized = sum(math.prod(m.shape) for m in self.modules() if isinstance(m, _QuantizedWeight))
        total = quantized + sum(p.numel() for p in self.parameters())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    @torch.no_grad()
    def merge_and_unload(self) -> BertForSequenceClassification:
        """Return a plain float32 BERT that computes what this model computes. This model stays as it is.

        Each update is added to its stored weight in float32. A base stored in bfloat16 keeps its rounding: load with
        dtype=torch.float32 to merge into the checkpoint's own weights. The checkpoint's dropout is restored.
        A quantised base is decoded. Quantising again loses most of a small update (see the q-LoRA notebook).
        """
        weights = {}
        for name, tensor in self.model.state_dict().items():
            if name.endswith((".weight", ".bias")):
                weights[name.replace(".base.", ".")] = tensor.float()
        for name, module in self.model.named_modules():
            if isinstance(module, _QuantizedWeight):
                weights[f"{name.removesuffix('.base')}.weight"] = module.dequantize()
        for name, layer in self.lora_layers().items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.delta_weight()  # (out, in)
        plain = BertForSequenceClassification(copy.deepcopy(self.checkpoint_config))
        plain.load_state_dict(weights)
        return plain.to(self.model.device).eval()

    # Saving and loading (skip at first reading)

    def adapter_state(self) -> dict[str, Tensor]:
        """Return {PEFT's name: tensor} of everything that is trained: each A and B, and the head."""
        return LoRABertModel._state(self.lora_layers(), self.model.classifier)  # PEFT's names in the subclass too

    @staticmethod
    def _state(layers, head):
        """Return the tensors themselves of these layers and this head, under their names in the file."""
        state = {}
        for name, layer in layers.items():
            A, B = layer.low_rank()
            state[f"base_model.model.{name}.lora_A.weight"] = A  # (rank, in)
            state[f"base_model.model.{name}.lora_B.weight"] = B  # (out, rank)
        return state | dict(head.named_parameters("base_model.model.classifier"))

    def _refuse_unsaved(self):
        """Raise ValueError for a tensor outside the adapter's file that is trained or differs from the checkpoint."""
        found = {}
        saved = r"\.lora_[AB]$|\.[AB]_(codes|scales)$|\.merged_weight$|^classifier\.(weight|bias)$"
        each = {"remove_duplicate": False}  # a tensor that layers share on a CPU is copied for each on a GPU
        for name, tensor in itertools.chain(self.named_parameters(**each), self.named_buffers(**each)):
            name = name.removeprefix("model.")
            if not re.search(saved, name):
                found[name.replace(".base.", ".")] = tensor
        if self._source[0].is_file():
            with torch.device("meta"):
                stored = BertForSequenceClassification(self.checkpoint_config)
            stored.classifier = nn.Identity()
            _load_frozen(stored, self.model_name, *self._source)
            expected = dict(itertools.chain(stored.named_parameters(**each), stored.named_buffers(**each)))
        else:
            warnings.warn(f"{self._source[0]} is gone: whether a frozen weight was changed is unknown", stacklevel=3)
            expected = found
        keep = "an adapter's file does not hold it: keep all weights by merge_and_unload()"
        for name in expected | found:
            tensor, original = found.get(name), expected.get(name)
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"model.{name} is trained, and {keep}, or freeze it")
            if tensor is None or original is None or not torch.equal(tensor.cpu(), original.to(tensor.dtype)):
                raise ValueError(f"model.{name} differs from {self._source[0]}, and {keep}")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write adapter and head as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

        `PeftModel.from_pretrained(bert, folder)` reads them. So does `from_pretrained` below, which also checks the
        fingerprint of the base. Raises ValueError, before anything is written, for a value that is not finite, and for
        a tensor outside the file that is trained or changed.
        """
        self._refuse_unsaved()
        config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": self.model_name}
        config |= {theirs: self.options[ours] for theirs, ours in _PEFT_NAMES.items()}
        _write_adapter(folder, LoRABertModel.FILES, config, self.adapter_state(), self.fingerprint)

    @classmethod
    def from_pretrained(
        cls, adapter_folder: str | Path, dtype: torch.dtype | None = None, model_name: str | None = None,
        folder: str | Path | None = None,
    ):  # fmt: skip
        """Load the model whose adapter `save_pretrained`, or PEFT, wrote into a folder, ready to evaluate.

        `model_name` is the base, if it is not what the adapter's config calls it. `dtype` and `folder` are those of
        the class. Raises ValueError as the class and as `load_adapter` do.
        """
        config, tensors, record = _read_adapter(adapter_folder, cls.FILES)
        model_name = model_name or config.get("base_model_name_or_path")
        if not model_name:
            raise ValueError(f"{adapter_folder} names no base model: give its hub id or its folder as model_name")
        options = cls._options_of(adapter_folder, config, tensors, record)
        model = cls(model_name, folder=folder, dtype=dtype, **options)
        model.load_adapter(adapter_folder)
        return model.eval()

    def load_adapter(self, folder: str | Path) -> None:
        """Replace adapter and head by those in `folder`, whatever rank and targets they have. The base stays.

        A, B and head become new parameters: give them to a new optimizer. PEFT does not record the base, so a warning
        says that it could not be verified. Raises ValueError for an adapter that is incomplete, damaged, of another
        kind, or trained on another base. The model then stays as it was.
        """
        config, tensors, record = _read_adapter(folder, self.FILES)
        options = self._options_of(folder, config, tensors, record)
        theirs, ours = options.get("base_bits"), self.options.get("base_bits")
        if theirs != ours:
            raise ValueError(f"{folder} has base_bits={theirs}, and this model {ours}: load it by from_pretrained")
        layers = self._new_layers(options)  # beside the model, which has not changed if something below fails
        for layer in layers.values():
            if isinstance(layer, QuantizedLoRALayer):
                layer.pack()  # a packed file is loaded packed
        head = nn.Linear(self.config.hidden_size, options["num_labels"], device=self.device).train(self.training)
        _verify_base(folder, config, record, self)
        _copy_exactly(self._state(layers, head), tensors, folder, widen=record is None)
        self._set_adapter(layers, head, options)

    @classmethod
    def _options_of(cls, folder, config, tensors, record):
        """Return the constructor's options for an adapter of PEFT's. Refuse features that we do not have."""
        for field, value in config.items():
            accepted = _PEFT_ACCEPTED.get(field, (None, False, "", [], {}))
            if field not in _PEFT_NAMES and field not in _PEFT_IGNORED and value not in accepted:
                allowed = " or ".join(map(repr, accepted)) if field in _PEFT_ACCEPTED else "to leave it out"
                raise ValueError(f"{folder}: {cls.__name__} has no {field}={value!r}; allowed is {allowed}")
        missing = [name for name in ("r", "lora_alpha", "target_modules") if name not in config]
        if missing:
            raise ValueError(f"{folder}: the config lacks {', '.join(missing)}, which save_pretrained writes")
        options = {"dropout": 0.0, "use_rslora": False}  # PEFT's defaults for absent fields
        options |= {ours: config[theirs] for theirs, ours in _PEFT_NAMES.items() if theirs in config}
        bias = tensors.get("base_model.model.classifier.bias")
        return options | {"num_labels": 2 if bias is None else bias.numel()}


class qLoRABertModel(LoRABertModel):
    """Classify sentences as `LoRABertModel` does, with A and B, and optionally the frozen weights, in a few bits.

    Args:
        bits: of each number of A and B, 2 to 8.
        base_bits: None leaves the frozen weights as they are. 8 (int8 by row) or 4 (NF4, double quantised) quantises
            every frozen linear layer except the head, and the embeddings.

    The other arguments are those of `LoRABertModel`. Raises ValueError as it does, and for other bits.
    Source: for the quantised base, Dettmers et al. 2023, "QLoRA", section 3. For the rest see `QuantizedLoRALayer`.
    """

    FILES = ("quantized_config.json", "adapter_quantized.safetensors")  # names that PEFT does not read
    LAYER = QuantizedLoRALayer

    def __init__(
        self, model_name: str, *, folder: str | Path | None = None, rank: int = 8, alpha: float = 16.0,
        dropout: float = 0.0, target_modules: str | Iterable[str] = ("query", "value"), num_labels: int = 2,
        dtype: torch.dtype | None = None, use_rslora: bool = False, bits: int = 8, base_bits: int | None = None,
    ):  # fmt: skip
        _check_bits("bits", bits, range(2, 9))
        _check_bits("base_bits", base_bits, (None, 8, 4))
        nn.Module.__init__(self)  # not LoRABertModel's, which would build float layers
        options = {"rank": rank, "alpha": alpha, "dropout": dropout, "use_rslora": use_rslora}
        options |= {"target_modules": target_modules, "num_labels": num_labels, "bits": bits, "base_bits": base_bits}
        self._build(model_name, folder, dtype, options)

    def pack(self) -> None:
        """Keep only the integers and scales of every A and B (see `QuantizedLoRALayer.pack`)."""
        layers = self.lora_layers().values()
        for layer in layers:
            layer.packed_tensors()  # refuses what is not finite before any layer is changed
        for layer in layers:
            layer.pack()

    def unpack(self) -> None:
        """Make every A and B trainable again. They are new parameters: give them to a new optimizer."""
        for layer in self.lora_layers().values():
            layer.unpack()

    def save_pretrained(self, folder: str | Path, peft: bool = False) -> None:
        """Write integers, scales and head: `quantized_config.json` and `adapter_quantized.safetensors`.

        With `peft`, also write PEFT's two files, with A and B decoded. The model stays as it is.
        """
        self._refuse_unsaved()
        config = {"base_model_name_or_path": self.model_name, **self.options}
        tensors = self._state(self.lora_layers(), self.model.classifier)
        _write_adapter(folder, self.FILES, config, tensors, self.fingerprint)
        if peft:
            super().save_pretrained(folder)

    @staticmethod
    def _state(layers, head):
        state = {}
        for name, layer in layers.items():
            for part, tensor in layer.packed_tensors().items():
                state[f"{name}.{part}"] = tensor
        return state | dict(head.named_parameters("classifier"))

    @classmethod
    def _options_of(cls, folder, config, tensors, record):
        if record is None:
            raise ValueError(f"{folder} has tensors with no record: save_pretrained writes one with them")
        known = {"rank", "alpha", "dropout", "use_rslora", "target_modules", "num_labels", "bits", "base_bits"}
        options = {name: value for name, value in config.items() if name != "base_model_name_or_path"}
        odd = ", ".join(sorted(known ^ set(options)))
        if odd:
            raise ValueError(f"{folder}: {odd} is missing or unknown; the config must hold {', '.join(sorted(known))}")
        return options


# 5. Batches and accuracy ---------------------------------------------------------------------------


class LengthGroupedBatches(Sampler):
    """Yield batches of indices of sentences of similar length, so that little padding is needed.

    With `shuffle`: shuffle all sentences, sort them by length inside windows of 50 batches, cut them into batches, and
    shuffle the batches. Without: sort by length once. The order depends only on the arguments and the epoch.
    """

    WINDOW = 50

    def __init__(self, lengths: Iterable[int], batch_size: int, shuffle: bool, seed: int = 0):
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of this epoch. The next pass begins at batch number `start`, later passes at 0."""
        self.epoch = epoch
        self.start = start

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.batch_size)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        windows = [torch.arange(len(self.lengths))]
        if self.shuffle:
            windows = torch.randperm(len(self.lengths), generator=generator).split(self.WINDOW * self.batch_size)
        order = torch.cat([window[self.lengths[window].argsort(stable=True)] for window in windows])  # (n,)
        batches = order.split(self.batch_size)
        turns = torch.randperm(len(batches), generator=generator) if self.shuffle else torch.arange(len(batches))
        turns = turns[self.start :].tolist()
        self.start = 0
        for turn in turns:
            yield batches[turn].tolist()


def make_loader(split, tokenizer, batch_size: int = 32, shuffle: bool = False, seed: int = 0) -> DataLoader:
    """Make a `DataLoader` of tokenised sentences in batches of similar length, each padded to its longest.

    `split` has the columns "sentence" and "label". With `shuffle`, `loader.batch_sampler.set_epoch(epoch)` gives each
    epoch its own order. Raises ValueError for a split without a sentence, and for a batch size below 1.
    """
    columns = getattr(split, "column_names", None)
    if not hasattr(split, "__len__") or not {"sentence", "label"} <= set(columns or ()):
        found = f"a {type(split).__name__} with the columns {columns}"
        raise ValueError(f"split is {found}: it must be a datasets.Dataset with sentence and label")
    if not len(split):
        raise ValueError("the list of sentences is empty: at least one is needed")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}: it must be a whole number of 1 or more")
    longest = min(512, tokenizer.model_max_length)  # BERT has 512 positions
    encoded = tokenizer(list(split["sentence"]), truncation=True, max_length=longest)
    encoded["labels"] = split["label"]
    rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
    batches = LengthGroupedBatches([len(row["input_ids"]) for row in rows], batch_size, shuffle, seed)
    generator = torch.Generator()  # its own, so that a resumed run draws the same numbers from PyTorch's
    return DataLoader(rows, batch_sampler=batches, collate_fn=DataCollatorWithPadding(tokenizer), generator=generator)


def wilson_interval(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's interval of the share right / n, two numbers from 0 to 1. The default z gives 95 %.

        (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)        p = right / n

    Raises ValueError for n below 1, and for `right` outside 0 to n.
    Source: Wilson 1927. Brown, Cai and DasGupta 2001.
    """
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"{right} right of {n}: n must be 1 or more, and right from 0 to n")
    p = right / n
    z2 = z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n))
    low = (p + z2 / 2 - half) / (1 + z2)
    high = (p + z2 / 2 + half) / (1 + z2)
    return max(0.0, min(low, p)), min(1.0, max(high, p))  # p stays inside, despite rounding


class Evaluation(NamedTuple):
    """Hold what `evaluate` measured: accuracy and its 95 % interval from 0 to 1, n sentences, mean loss in nats."""

    accuracy: float
    low: float
    high: float
    n: int
    loss: float
    predictions: list[int]  # the label given to each sentence, in the order of the data

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} (95 % interval {self.low:.1%} to {self.high:.1%}, n = {self.n:,})"


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader) -> Evaluation:
    """Measure a model's accuracy on all sentences of a loader, each counted once. Predictions are in the data's order.

    Raises ValueError for a loader that leaves sentences out or repeats them, and for one without labels.
    """
    order = list(loader.batch_sampler or [])  # drawn once: a random sampler would give the loader another order
    if sorted(itertools.chain.from_iterable(order)) != list(range(len(loader.dataset))):
        drawn = sum(map(len, order))
        raise ValueError(f"the loader draws {drawn} of {len(loader.dataset)} sentences, not each once: use make_loader")
    batches = DataLoader(loader.dataset, batch_sampler=order, collate_fn=loader.collate_fn, generator=loader.generator)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    labelled = []  # (index, predicted label) of each sentence
    right = 0
    loss = 0.0
    for index, batch in zip(order, batches, strict=True):
        if "labels" not in batch:
            raise ValueError(f"a batch holds {', '.join(batch)}, but no labels to compare with: use make_loader")
        output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
        predicted = output.logits.argmax(-1).cpu()  # (batch,)
        right += (predicted == batch["labels"]).sum().item()
        loss += output.loss.item() * len(index)
        labelled += zip(index, predicted.tolist(), strict=True)
    model.train(was_training)
    n = len(labelled)
    predictions = [label for _, label in sorted(labelled)]
    return Evaluation(right / n, *wilson_interval(right, n), n, loss / n, predictions)


# 6. Files: an adapter as PEFT writes it, and as packed integers (skip at first reading) --------------

# PEFT's field names for our options, then other fields with the values that we accept, then fields that do not affect
# the computation. We refuse any other field that has a value.
_PEFT_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
_PEFT_NAMES |= {"use_rslora": "use_rslora", "target_modules": "target_modules"}
_PEFT_ACCEPTED = {
    "peft_type": ("LORA",),
    "task_type": ("SEQ_CLS", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others change the base
    "modules_to_save": (None, ["classifier", "score"], ["classifier"]),
    "revision": (None, "main"),
}
_PEFT_IGNORED = {"base_model_name_or_path", "auto_mapping", "inference_mode", "peft_version"}
_PEFT_IGNORED |= {"megatron_core", "qalora_group_size"}
_CONVERT = "transformers writes it by BertForSequenceClassification.from_pretrained(old).save_pretrained(new)"


def _write_adapter(folder, names, config, tensors, fingerprint):
    """Write a config and its tensors, each complete or not at all. Their metadata has config and fingerprint."""
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            _check_finite(f"{folder}: {name}", tensor)
            tensors[name] = tensor.float()
    metadata = {"format": "pt", "lora_utils": json.dumps({"config": config, "base_sha256": fingerprint})}
    contents = ((json.dumps(config, indent=2) + "\n").encode(), safetensors.torch.save(tensors, metadata))
    folder.mkdir(parents=True, exist_ok=True)
    parts = [folder / f"{name}.{uuid.uuid4().hex}.part" for name in names]  # no other writer has these names
    try:
        for part, content in zip(parts, contents, strict=True):
            with open(part, "wb") as opened:
                opened.write(content)
                opened.flush()
                os.fsync(opened.fileno())
        for part, name in zip(parts, names, strict=True):
            part.replace(folder / name)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)  # still there only after a failure, such as a full disk
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)  # the new names
        os.close(descriptor)


@contextlib.contextmanager
def _open_safetensors(file):
    """Open a safetensors file. Name it in the error if it is damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}): save, copy or download it again") from None


def _require_file(folder, name, kind):
    """Return the path of a file in a folder. Refuse a folder without it, and say what the folder must be."""
    folder = Path(folder)
    if not (folder / name).is_file():
        there = ", ".join(sorted(file.name for file in folder.glob("*"))) or "nothing"
        raise ValueError(f"no {name} in {folder}, which holds {there}: it must be {kind}")
    return folder / name


def _read_adapter(folder, names):
    """Read an adapter's (config, tensors, record). Refuse files that are missing, damaged, or not written together."""
    file, weights = (_require_file(folder, name, "a folder that save_pretrained wrote") for name in names)
    with _open_safetensors(weights) as opened:
        metadata = (opened.metadata() or {}).get("lora_utils", "null")
        # Copied, or the file would stay mapped and could not be replaced on Windows.
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    try:
        config = dict(json.loads(file.read_text(encoding="utf-8")))
        record = json.loads(metadata)  # what `_write_adapter` put there, or None if PEFT wrote the tensors
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder}: config or record is no JSON object ({error}): save or copy it again") from None
    if record is not None:
        if "config" not in record:
            raise ValueError(f"{weights} has the record of something else than an adapter: save the adapter again")
        base = "base_model_name_or_path"  # may differ: a base can move
        difference = _first_difference(config | {base: None}, record["config"] | {base: None})
        if difference:
            raise ValueError(f"{file} and {names[1]} do not belong together: {difference}; put both back as saved")
    return config, tensors, record


def _first_difference(found, expected):
    """Say in words how two dicts differ first, as "name=value, but other is expected". Return "" if they are equal."""
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            here, wanted = (repr(values[name]) if name in values else "nothing" for values in (found, expected))
            return f"{name}={here}, but {wanted} is expected"
    return ""


def _verify_base(folder, config, record, model):
    """Refuse an adapter of another base. Warn if its files do not tell its base."""
    base = (record or {}).get("base_sha256")
    if base is None:
        who, what = ("PEFT", "base and scaling") if record is None else ("an older version", "base")
        names = f"it names {config.get('base_model_name_or_path')}, and this model is {model.model_name}"
        warnings.warn(f"{folder}: {who} wrote this adapter, so its {what} could not be verified: {names}", stacklevel=4)
    elif base != model.fingerprint:
        theirs = f"{folder} was trained on a base with the SHA-256 {base}"
        raise ValueError(f"{theirs}, and {model.model_name} has {model.fingerprint}: load it into a model of its base")


@torch.no_grad()
def _copy_exactly(slots, tensors, folder, widen):
    """Copy tensors into new slots of the same names, shapes and dtypes. With `widen`, 16 bits may stand for float32."""

    def describe(tensor):
        half = tensor.dtype in (torch.float16, torch.bfloat16)  # as PEFT stores a model in 16 bits
        dtype = torch.float32 if widen and half else tensor.dtype
        return f"{str(dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

    found = {name: describe(tensor) for name, tensor in tensors.items()}
    difference = _first_difference(found, {name: describe(tensor) for name, tensor in slots.items()})
    if difference:
        raise ValueError(f"{folder}: {difference} by the config: take the file that was saved with it")
    for name, tensor in tensors.items():
        _check_finite(f"{folder}: {name}", tensor)
        slots[name].copy_(tensor)
