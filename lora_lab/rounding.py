"""Round the matrices of a trained adapter: three ways, with nothing trained afterwards."""

import copy
from collections.abc import Callable
from functools import partial

import torch

from lora_utils import LoRABertModel, dequantize, quantize


def absmax(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the common grid: symmetric around a level at zero, the outermost level at the largest value."""
    top = 2 ** (bits - 1) - 1
    step = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / top  # (rows, 1)
    return (rows / step).round() * step


def half_steps(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Round to the grid of `quantize`, which has no level at zero."""
    return dequantize(*quantize(rows, bits))


def round_apart(rounding: Callable, A: torch.Tensor, B: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round A (rank, in) and B (out, rank) by `absmax` or `half_steps`, with one scale per rank."""
    return rounding(A, bits), rounding(B.T, bits).T


def quantize_jointly(A: torch.Tensor, B: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a trained A (rank, in) and B (out, rank) so that their product B A changes little.

    Correlated ranks can compensate for each other's rounding error. Round one rank at a time, and fold its error into
    the remaining ranks by least squares: first in B, then in the A that fits that B best. Both results lie on the
    grid of `quantize`, so rounding them again changes nothing.

    Raises ValueError for values that are not finite.
    Source: Frantar et al. 2022, "GPTQ", which does so for a weight and its inputs. Here each factor plays the inputs
    of the other.
    """
    for name, matrix in (("A", A), ("B", B)):
        bad = matrix[~matrix.isfinite()]
        if len(bad):
            raise ValueError(f"{name} holds {bad[0].item()}, which is not finite: take weights that did not diverge")
    device = A.device
    A = A.detach().float().cpu()  # pinv is not there for every device
    B = B.detach().float().cpu()
    new_B = _round_rows(B.T, A @ A.T, bits).T  # (out, rank)
    gram = new_B.T @ new_B  # (rank, rank)
    fitted = torch.linalg.pinv(gram, hermitian=True) @ new_B.T @ B @ A  # (rank, in)
    used = gram.diagonal()[:, None] > 0  # a rank of B that is zero keeps its A, to be trained from
    new_A = _round_rows(fitted.where(used, A), gram, bits)  # (rank, in)
    return new_A.to(device), new_B.to(device)


def _round_rows(rows, gram, bits):
    """Round rows (rank, n) so that their error E (rank, n) has a small trace(Eᵀ gram E)."""
    rows = rows.clone()
    remaining = gram.diagonal().argsort(descending=True).tolist()
    while remaining:
        i = remaining.pop(0)
        exact = rows[i].clone()  # (n,)
        rows[i] = half_steps(rows[i : i + 1], bits)[0]
        if remaining:
            inverse = torch.linalg.pinv(gram[remaining][:, remaining], hermitian=True)
            rows[remaining] += inverse @ gram[remaining, i : i + 1] * (exact - rows[i])
    return rows


WAYS = {"absmax": partial(round_apart, absmax), "half steps": partial(round_apart, half_steps)}
WAYS["together"] = quantize_jointly


@torch.no_grad()
def round_adapter(model: LoRABertModel, way: str, bits: int) -> tuple[LoRABertModel, float]:
    """Return a copy of a model with A and B rounded in one of WAYS, and the relative error of all updates together."""
    model = copy.deepcopy(model)
    squared_error = 0.0
    squared_size = 0.0
    for layer in model.lora_layers().values():
        exact = layer.delta_weight()
        A, B = layer.low_rank()
        new_A, new_B = WAYS[way](A, B, bits)
        A.copy_(new_A)
        B.copy_(new_B)
        squared_error += (layer.delta_weight() - exact).square().sum().item()
        squared_size += exact.square().sum().item()
    return model, (squared_error / squared_size) ** 0.5
