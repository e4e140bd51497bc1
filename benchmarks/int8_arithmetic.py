"""What int8 arithmetic costs in accuracy: the same adapters on an 8-bit base, with activations rounded and without.

    python benchmarks/accuracy.py --data folder --both --method qlora --bits 8 --base-bits 8 --phrases 20000 \\
        --adapters adapters/int8 --out int8.jsonl
    python benchmarks/int8_arithmetic.py --data folder --adapters adapters/int8

What it costs when it is trained through, too, is in benchmarks/results/int8_trained.jsonl: the first of these commands
with `--seeds 0 1 2 3 4`, the CPU held to AVX2 and to AVX512_CORE_VNNI by the variables in contenders.py.

Evaluated on the validation sentences, and on the 2,000 phrases that `--both` holds out. One JSON line an adapter and
set of sentences. The integers are multiplied in float64, whose sums are exact, so any machine will do.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from accuracy import HELD_OUT, ROOT, commit, hold_out, load_adapter, machine

sys.path.insert(0, str(ROOT))

import lora_utils
from lora_lab.sources import load_sst2


def in_float64(x, y):
    """What `torch._int_mm` gives where the CPU has VNNI, on any CPU."""
    return (x.double() @ y.double()).int()


def evaluate(model, loader, rounded):
    """The `Evaluation` with int8 arithmetic, or with the exact product."""
    for module in model.modules():
        if isinstance(module, lora_utils.QuantizedLinear):
            module.int8_arithmetic = rounded
    return lora_utils.evaluate(model, loader)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", required=True, help="a folder with one adapter a seed")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "int8_arithmetic.jsonl"))
    args = parser.parse_args()
    torch._int_mm = in_float64
    data, at_commit = load_sst2(args.data), commit()
    sets = {
        "validation": data["validation"],
        "held-out training phrases": hold_out(data["train"], phrases=HELD_OUT)[1],
    }
    lines = []
    for folder in sorted(Path(args.adapters).iterdir()):
        model, tokenizer = load_adapter(lora_utils.qLoRABertModel, folder, torch.float32)
        for where, split in sets.items():
            loader = lora_utils.make_loader(split, tokenizer, batch_size=64)
            plain, rounded = (evaluate(model, loader, arithmetic) for arithmetic in (False, True))
            others = sum(a != b for a, b in zip(plain.predictions, rounded.predictions, strict=True))
            numbers = {"plain": plain.accuracy, "int8": rounded.accuracy, "other_labels": others, "n": plain.n}
            numbers |= {"plain_loss": round(plain.loss, 5), "int8_loss": round(rounded.loss, 5)}
            about = {"model": model.model_name, "data": data["train"].info.dataset_name, "seed": folder.name}
            about |= {"evaluated_on": where, "machine": machine(torch.float32), "commit": at_commit}
            lines.append(numbers | about)
            print(json.dumps(numbers | {"seed": folder.name, "evaluated_on": where}), flush=True)
    Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
