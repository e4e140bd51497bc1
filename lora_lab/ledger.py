"""Count every byte that a model holds, by what it is for."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import nn

from lora_utils import QuantizedEmbedding, QuantizedLinear, QuantizedLoRALayer


class LedgerRow(NamedTuple):
    """Hold one kind of thing: what it is, how it is stored, how many numbers, in how many bytes."""

    what: str
    stored_as: str
    count: int
    num_bytes: int


class Ledger(list):
    """Hold the rows of `memory_ledger`, and print as a table."""

    ADAPTER = ("A and B", "scales of A and B", "head")  # what `save_pretrained` writes

    def total_bytes(self, *what: str) -> int:
        """Sum the bytes of the rows with these names, or of all rows if no name is given."""
        return sum(row.num_bytes for row in self if not what or row.what in what)

    def __str__(self) -> str:
        lines = [("what", "stored as", "numbers", "bytes")]
        lines += [(row.what, row.stored_as, f"{row.count:,}", f"{row.num_bytes:,}") for row in self]
        lines += [("all", "", "", f"{self.total_bytes():,}")]
        return "\n".join(f"{what:24}{stored_as:10}{count:>14}{size:>16}" for what, stored_as, count, size in lines)


def memory_ledger(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, batch=None) -> Ledger:
    """Count every byte that a model holds, by what it is for.

    Args:
        model: a `LoRABertModel` or `qLoRABertModel`. Its gradients are counted if it has any.
        optimizer: counted with its states, if given.
        batch: what the model is called with. If given, a forward pass is made, and what autograd saves of it for the
            backward pass is counted too, except parameters and buffers, which are counted anyway.

    Returns a `Ledger` of rows (what, stored_as, count, num_bytes). Each storage is counted once, as a whole.
    Not counted: what a step allocates and frees again, and PyTorch itself.
    """
    counter = _StorageCounter()
    _count_weights(counter, model)
    for parameter in model.parameters():
        counter.add("gradients", parameter.grad)
    if optimizer:
        for state in optimizer.state.values():
            for tensor in state.values():
                counter.add("optimizer states", tensor)
        for group in optimizer.param_groups:
            for parameter in group["params"]:  # those of A and B that were packed since
                counter.add("kept by the optimizer", parameter)
                counter.add("kept by the optimizer", parameter.grad)
    if batch is not None:
        for tensor in _saved_for_backward(model, batch):
            counter.add("saved for backward", tensor)
    return Ledger(LedgerRow(*kind, *count) for kind, count in counter.rows.items())


class _StorageCounter:
    """Add up storages by kind, each once."""

    def __init__(self):
        self.rows = {}  # {(what, stored as): (count, bytes)}
        self.seen = {}  # {address: a tensor, held so that no other tensor can come to lie there}

    def add(self, what, tensor, stored_as=None, count=None):
        if not torch.is_tensor(tensor):
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.seen:
            return
        self.seen[storage.data_ptr()] = tensor
        count = count or storage.nbytes() // tensor.itemsize
        self.add_bytes(what, stored_as or str(tensor.dtype).removeprefix("torch."), count, storage.nbytes())

    def add_bytes(self, what, stored_as, count, num_bytes):
        old_count, old_size = self.rows.get((what, stored_as), (0, 0))
        self.rows[what, stored_as] = (old_count + count, old_size + num_bytes)


def _count_weights(counter, model):
    for module in model.modules():
        if isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
            what = "embeddings" if isinstance(module, QuantizedEmbedding) else "frozen weights"
            counter.add(what, module.codes, "NF4" if module.bits == 4 else "int8", math.prod(module.shape))
            for direction, packed in getattr(module, "packed_integers", {}).items():
                what = "frozen weights" if direction == "forward" else "frozen weights, for backward"
                counter.add_bytes(what, "int8", math.prod(module.shape), packed.num_bytes)  # these have no storage
            for name, tensor in module.named_buffers():
                stored_as, size = ("8 bits", 1) if name == "scale_codes" else ("float32", 4)
                counter.add("scales and code tables", tensor, stored_as, tensor.nbytes // size)
        elif isinstance(module, QuantizedLoRALayer) and module.packed:
            for codes, scales, width in (
                (module.A_codes, module.A_scales, module.base.in_features),
                (module.B_codes, module.B_scales, module.base.out_features),
            ):
                counter.add("A and B", codes, f"{module.bits} bits", module.rank * width)
                counter.add("scales of A and B", scales)
        elif isinstance(module, nn.Embedding):
            counter.add("embeddings", module.weight)
    inner = getattr(model, "model", model)  # the outer model would unpack integers for the list of its buffers
    for name, tensor in itertools.chain(model.named_parameters(), inner.named_buffers()):
        if name.endswith("_ids"):
            counter.add("position ids", tensor)
        elif ".lora_" in name:
            counter.add("A and B", tensor)
        elif ".classifier." in name:
            counter.add("head", tensor)
        else:
            counter.add("frozen weights", tensor)


def _saved_for_backward(model, batch):
    saved = []

    def remember(tensor):
        saved.append(tensor.detach())  # the graph would keep its own results alive for ever, were they saved in it

    device = next(model.parameters()).device
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(remember, lambda nothing: nothing):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    return saved
