"""What rounding a trained adapter costs when nothing is trained afterwards: error of B A, and accuracy left.

    python benchmarks/accuracy.py --data folder --both --seeds 0 1 2 3 4 --adapters adapters/lora --out lora.jsonl
    python benchmarks/after_training.py --data folder --adapters adapters/lora

takes the unquantised adapters that the first line saved, one for each seed, rounds A and B in three ways at 8, 4, 3 and
2 bits, and evaluates each on the validation sentences. One JSON line a seed, bit-width and way.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from accuracy import ROOT, commit, load_adapter, machine

sys.path.insert(0, str(ROOT))

import lora_utils
from lora_lab.rounding import WAYS, round_adapter
from lora_lab.sources import load_sst2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", required=True, help="a folder with one adapter a seed")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "after_training.jsonl"))
    args = parser.parse_args()
    validation = load_sst2(args.data)["validation"]
    lines, at_commit = [], commit()
    for folder in sorted(Path(args.adapters).iterdir()):
        model, tokenizer = load_adapter(lora_utils.LoRABertModel, folder)
        loader = lora_utils.make_loader(validation, tokenizer, batch_size=64)
        unrounded = lora_utils.evaluate(model, loader).accuracy
        for bits in (8, 4, 3, 2):
            for way in WAYS:
                copied, error = round_adapter(model, way, bits)
                result = lora_utils.evaluate(copied, loader)
                about_machine = machine(next(model.model.bert.parameters()).dtype)
                numbers = {"error": error, "accuracy": result.accuracy, "unrounded": unrounded, "n": result.n}
                about = {"model": model.model_name, "data": validation.info.dataset_name, "seed": folder.name}
                lines.append(
                    {"way": way, "bits": bits, **numbers, **about, "machine": about_machine, "commit": at_commit}
                )
    Path(args.out).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
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
