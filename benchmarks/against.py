"""Time a training step of this module against that of an earlier commit, in alternating order.

    python benchmarks/against.py b0ed9ae [--model packaged]

Both versions train in one process on the same batches. Prints the ratio of sentences per second, this version over the
earlier one: the median of the rounds with its quartiles.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from contenders import ROOT, alternate, arithmetic, batches, checkpoint, ratio, sentences

import lora_utils

LAYERS = {"LoRA": {}, "q-LoRA, 4 bits": {"bits": 4}, "q-LoRA, int8 base": {"bits": 4, "base_bits": 8}}
LAYERS |= {"q-LoRA, NF4 base": {"bits": 4, "base_bits": 4}}


def module_at(commit):
    """Import lora_utils.py as it was at a commit."""
    source = subprocess.run(
        ["git", "show", f"{commit}:lora_utils.py"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lora_utils_before.py")
        file.write_bytes(source)
        spec = importlib.util.spec_from_file_location("lora_utils_before", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules["lora_utils_before"] = module
        spec.loader.exec_module(module)
    return module


def training_step(module, folder, options):
    """Return a function that trains a model of this module on one batch."""
    torch.manual_seed(0)
    kind = module.qLoRABertModel if options else module.LoRABertModel
    model = kind(str(folder), rank=8, **options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(batch):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--model", choices=["bert-base", "packaged"], default="bert-base")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batches", type=int, default=5, help="in each round, from short to long sentences")
    args = parser.parse_args()
    ids, data = sentences("auto")
    given = batches(ids, "like length", args.batches)
    with checkpoint(args.model) as (folder, name):
        print(f"{name}, {data}, {torch.get_num_threads()} threads, {arithmetic()}, {args.rounds} rounds")
        for label, options in LAYERS.items():
            rivals = {"now": (training_step(lora_utils, folder, options), given)}
            rivals["before"] = (training_step(module_at(args.commit), folder, options), given)
            rates = alternate(rivals, args.batches, args.rounds)
            median, low, high = ratio(rates, "now", "before")
            print(f"{label:20} now ÷ {args.commit}: {median:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
