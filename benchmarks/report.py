"""Write the tables and numbers of README.md, benchmarks/README.md and the notebooks, from benchmarks/results.

    python benchmarks/report.py             write them
    python benchmarks/report.py --check     write nothing, name what would change, and end with 1 if anything would

A table or a number stands between `<!-- name -->` and `<!-- /name -->`, in any of these files. `TABLES` and `NUMBERS`
below hold the names. A name that stands in no file is an error. The README's figure, whole.png, is drawn from the
sweep.
"""

import argparse
import functools
import hashlib
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import tables_of_accuracy as accuracy
import tables_of_speed as speed
from PIL import Image

from lora_lab import compare, figures

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = ["README.md", "benchmarks/README.md", "LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]

TABLES = {
    "accuracy in short": accuracy.accuracy_in_short,
    "accuracy by bytes": accuracy.accuracy_by_bytes,
    "accuracy by rank": accuracy.accuracy_by_rank,
    "accuracy by bits": accuracy.accuracy_by_bits,
    "accuracy with all phrases": accuracy.accuracy_with_all_phrases,
    "accuracy of five seeds": accuracy.accuracy_of_five_seeds,
    "rounding after training": accuracy.rounding_after_training,
    "accuracy of int8 arithmetic": accuracy.int8_accuracy,
    "speed and memory in short": speed.speed_and_memory_in_short,
    "speed in short": speed.speed_in_short,
    "training speed": lambda: speed.ratios("training"),
    "where the speed comes from": speed.ablation,
    "prediction speed, batches of 32": lambda: speed.ratios("inference-batches-of-32"),
    "prediction speed, one sentence": lambda: speed.ratios("inference-one-sentence"),
    "integer products": speed.integer_products,
    "integer products beside torch.ao": speed.integer_products_beside_torch_ao,
    "integer products on a GPU": speed.integer_products_on_a_gpu,
    "where q-LoRA is faster": speed.where_q_lora_is_faster,
    "memory in short": speed.memory_in_short,
    "memory of a training run": speed.memory,
    "memory by ledger": speed.memory_by_ledger,
    "bytes of BERT-base": speed.bytes_of_bert_base,
    "growth with rank": speed.growth,
}
INT8, NF4, AMX, GPU = speed.INT8_BASE, "q-LoRA, NF4 base", ["AMX"], ["GPU (H100)"]
BATCHES, ONE = "inference-batches-of-32", "inference-one-sentence"
NUMBERS = {
    "BERT-base's parameters": speed.parameters_of_bert_base,
    "6-layer parameters": accuracy.parameters_of_the_6_layers,
    "bytes of states": accuracy.megabytes_of_states,
    "LoRA's accuracy": lambda: accuracy.accuracy_of("LoRA"),
    "4 bits' accuracy": lambda: accuracy.accuracy_of("q-LoRA, 4 bits"),
    "2 bits' accuracy": lambda: accuracy.accuracy_of("q-LoRA, 2 bits"),
    "NF4's accuracy": lambda: accuracy.accuracy_of("q-LoRA, 4 bits, NF4 base"),
    "full fine-tuning's accuracy": lambda: accuracy.accuracy_of("full fine-tuning"),
    "full fine-tuning beside LoRA": lambda: accuracy.seeds_without_difference("full fine-tuning"),
    "full fine-tuning on held-out phrases": accuracy.held_out_difference,
    "LoRA ships": lambda: accuracy.megabytes_shipped("LoRA"),
    "4 bits ship": lambda: accuracy.megabytes_shipped("q-LoRA, 4 bits"),
    "full fine-tuning ships": lambda: accuracy.megabytes_shipped("full fine-tuning"),
    "LoRA holds": lambda: accuracy.megabytes_held("LoRA"),
    "int8 base holds": lambda: accuracy.megabytes_held("q-LoRA, 4 bits, int8 base"),
    "NF4 base holds": lambda: accuracy.megabytes_held("q-LoRA, 4 bits, NF4 base"),
    "doubt near 82 %": lambda: accuracy.half_width(82),
    "doubt near 87 %": lambda: accuracy.half_width(87),
    "five seeds in words": accuracy.five_seeds_in_words,
    "int8 intervals with 0": accuracy.int8_intervals_with_0,
    "faster than PEFT, CPUs": lambda: speed.span("training", "LoRA", "PEFT"),
    "faster than PEFT, GPU": lambda: speed.span("training", "LoRA", "PEFT", GPU),
    "faster than tuned PEFT, CPUs": lambda: speed.span("training", "LoRA", "PEFT, tuned"),
    "faster than tuned PEFT, GPU": lambda: speed.span("training", "LoRA", "PEFT, tuned", GPU),
    "faster than full fine-tuning, CPUs": lambda: speed.span("training", "LoRA", speed.FULL),
    "faster than full fine-tuning, GPU": lambda: speed.span("training", "LoRA", speed.FULL, GPU),
    "int8 base, training": lambda: speed.span("training", INT8),
    "int8 base, training, AMX": lambda: speed.span("training", INT8, classes=AMX),
    "int8 base, training, GPU": lambda: speed.span("training", INT8, classes=GPU),
    "int8 base, batches": lambda: speed.span(BATCHES, INT8),
    "int8 base, one sentence": lambda: speed.span(ONE, INT8),
    "A and B in 8 bits, training": lambda: speed.span("training", "q-LoRA"),
    "NF4 base, training": lambda: speed.span("training", NF4),
    "NF4 base, training, GPU": lambda: speed.span("training", NF4, classes=GPU),
    "NF4 base beside PEFT, CPUs": lambda: speed.span("training", NF4, "PEFT, NF4 base"),
    "NF4 base beside PEFT, GPU": lambda: speed.span("training", NF4, "PEFT, NF4 base", GPU),
    "torch.ao is faster": speed.torch_ao_is_faster,
    "LoRA's memory beside full fine-tuning": lambda: speed.share_of_peak("LoRA", speed.FULL, "amx_bf16"),
    "LoRA's memory beside PEFT": lambda: speed.share_of_peak("LoRA", "PEFT", "cuda"),
}


# Writing -------------------------------------------------------------------------------------------


@functools.cache
def made(name):
    """Make a table or a number. A run of this script makes each of them once."""
    return (TABLES | NUMBERS)[name]()


def names_in(text):
    return re.findall(r"<!-- /(.*?) -->", text)


def filled(text):
    """Return the text with every table and number between its marks made from the results.

    Raises ValueError for a name that is not known, and for a mark without the other of its pair.
    """
    for name in dict.fromkeys(names_in(text)):
        if name not in TABLES | NUMBERS:
            raise ValueError(f"no table and no number has the name {name!r}: see TABLES and NUMBERS in report.py")
    for name in TABLES | NUMBERS:
        mark, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pairs = re.findall(f"{re.escape(mark)}.*?{re.escape(end)}", text, re.DOTALL)
        if not len(pairs) == text.count(mark) == text.count(end):
            raise ValueError(f"each {mark} needs one {end} after it")
        line = "\n" if name in TABLES else ""
        for pair in pairs:
            text = text.replace(pair, f"{mark}{line}{made(name)}{line}{end}")
    return text


FIGURE = RESULTS / "whole.png"


def sweep_digest():
    return hashlib.sha256((RESULTS / "sweep.jsonl").read_bytes()).hexdigest()


def figure_is_stale():
    """Say whether whole.png is missing, or was drawn from another sweep than the committed one."""
    if not FIGURE.is_file():
        return True
    with Image.open(FIGURE) as image:
        return image.text.get("Source") != sweep_digest()


def draw_figure():
    """Draw every method of the sweep, and note in the file which sweep it was drawn from."""
    plt.switch_backend("agg")
    figures.set_style()
    runs = compare.read_runs(RESULTS / "sweep.jsonl")
    figures.draw_whole(runs, file=FIGURE, metadata={"Source": sweep_digest()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale, placed = [], set()
    for file in map(ROOT.joinpath, FILES):
        if file.suffix == ".md":
            old = file.read_text(encoding="utf-8")
            new = filled(old)
            changed = new != old
            placed.update(names_in(old))
        else:
            new = nbformat.read(file, as_version=4)
            cells = [cell for cell in new.cells if cell.cell_type == "markdown"]
            changed = any(filled(cell.source) != cell.source for cell in cells)
            for cell in cells:
                placed.update(names_in(cell.source))
                cell.source = filled(cell.source)
        if changed:
            stale.append(str(file.relative_to(ROOT)))
            if not args.check:
                file.write_text(new, encoding="utf-8") if file.suffix == ".md" else nbformat.write(new, file)
    if figure_is_stale():
        stale.append(FIGURE.name)
        if not args.check:
            draw_figure()
    for name in stale:
        print(f"{name}: {'not what the results say' if args.check else 'written'}")
    homeless = [name for name in TABLES | NUMBERS if name not in placed]
    for name in homeless:
        print(f"{name}: has no place. Write <!-- {name} --><!-- /{name} --> into one of {', '.join(FILES)}")
    return bool(homeless) or (args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
