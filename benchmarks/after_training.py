"""What rounding a trained adapter costs when nothing is trained afterwards: error of B A, and accuracy left.

    python benchmarks/accuracy.py --data folder --both --seeds 0 1 2 3 4 --adapters adapters/lora --out lora.jsonl
    python benchmarks/after_training.py --data folder --adapters adapters/lora

takes the unquantised adapters that the first line saved, one for each seed, rounds A and B in three ways at 8, 4, 3 and
2 bits, and evaluates each on the validation sentences. One JSON line a seed, bit-width and way.
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path

import torch
from accuracy import ROOT, commit, machine
from transformers import AutoTokenizer

sys.path.insert(0, str(ROOT))

import lora_utils


def absmax(rows, bits):
    """The common grid: symmetric around a level at zero, the outermost at the largest value."""
    step = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
    return (rows / step).round() * step


def half_steps(rows, bits):
    return lora_utils.dequantize(*lora_utils.quantize(rows, bits))


WAYS = {
    "absmax": lambda A, B, bits: (absmax(A, bits), absmax(B.T, bits).T),
    "half steps": lambda A, B, bits: (half_steps(A, bits), half_steps(B.T, bits).T),
    "together": lora_utils.quantize_together,
}


@torch.no_grad()
def rounded(model, way, bits):
    """(a copy of the model with A and B rounded, the relative error of all updates together)."""
    model, lost, size = copy.deepcopy(model), 0.0, 0.0
    for layer in model.lora_layers().values():
        exact = layer.delta_weight()
        for matrix, values in zip(layer.low_rank(), WAYS[way](*layer.low_rank(), bits), strict=True):
            matrix.copy_(values)
        lost += (layer.delta_weight() - exact).square().sum().item()
        size += exact.square().sum().item()
    return model, (lost / size) ** 0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", required=True, help="a folder with one adapter a seed")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "after_training.jsonl"))
    args = parser.parse_args()
    validation = lora_utils.load_sst2(args.data)["validation"]
    lines, at_commit = [], commit()
    for folder in sorted(Path(args.adapters).iterdir()):
        model = lora_utils.LoRABertModel.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(lora_utils.find_model(model.model_name, announce=False).folder)
        loader = lora_utils.make_loader(validation, tokenizer, batch_size=64)
        unrounded = lora_utils.evaluate(model, loader).accuracy
        for bits in (8, 4, 3, 2):
            for way in WAYS:
                copied, error = rounded(model, way, bits)
                result = lora_utils.evaluate(copied, loader)
                about_machine = machine(next(model.model.bert.parameters()).dtype)
                numbers = {"error": error, "accuracy": result.accuracy, "unrounded": unrounded, "n": result.n}
                about = {"model": model.model_name, "data": validation.info.dataset_name, "seed": folder.name}
                lines.append(
                    {"way": way, "bits": bits, **numbers, **about, "machine": about_machine, "commit": at_commit}
                )
    Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for bits in (8, 4, 3, 2):
        for way in WAYS:
            group = [line for line in lines if (line["bits"], line["way"]) == (bits, way)]
            errors = [line["error"] for line in group]
            ratios = [
                line["error"] / other["error"]
                for line in group
                for other in lines
                if (other["bits"], other["way"], other["seed"]) == (bits, "absmax", line["seed"])
            ]
            scores = [100 * line["accuracy"] for line in group]
            print(
                f"{bits} bits, {way:10}  error {statistics.fmean(errors):.4f} (at most {max(errors):.4f})"
                f"  of absmax's {statistics.fmean(ratios):.2f} (at most {max(ratios):.2f})"
                f"  accuracy {statistics.fmean(scores):.2f} ({min(scores):.2f} to {max(scores):.2f})"
            )


if __name__ == "__main__":
    main()
