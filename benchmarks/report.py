"""Write the tables and numbers of README.md, benchmarks/README.md and the notebooks, from benchmarks/results.

    python benchmarks/report.py             write them
    python benchmarks/report.py --check     write nothing, name what would change, and end with 1 if anything would

A table or a number stands between `<!-- name -->` and `<!-- /name -->`, in any of these files. `TABLES` and `NUMBERS`
hold the names. A name that stands in no file is an error, and so is one of `claims` that the results do not bear
out. The README's figure, whole.png, is drawn from the sweep.
"""

import argparse
import functools
import hashlib
import itertools
import re
import sys
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import sweep
import tables_of_accuracy as accuracy
import tables_of_speed as speed
from machine import RESULTS, ROOT
from PIL import Image

from lora_lab import compare, figures
from lora_lab.rounding import WAYS

FILES = ["README.md", "benchmarks/README.md", "LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]

TABLES = {
    "accuracy in short": accuracy.accuracy_in_short,
    "accuracy by rank": lambda: accuracy.trained_and_accuracy(accuracy.by_rank(), accuracy.SETS),
    "accuracy by bits": partial(accuracy.rounding, "sweep"),
    "accuracy with all phrases": lambda: accuracy.trained_and_accuracy(accuracy.of_part("all phrases"), ["validation"]),
    "accuracy of five seeds": partial(accuracy.paired_differences, "five seeds"),
    "rounding after training": partial(accuracy.rounding, "five seeds", **sweep.LONG),
    "accuracy of integer products": partial(accuracy.paired_differences, "integer products"),
    "speed and memory in short": speed.speed_and_memory_in_short,
    "speed in short": speed.speed_in_short,
    "training speed": partial(speed.ratios, "training"),
    "where the speed comes from": speed.ablation,
    "prediction speed, batches of 32": partial(speed.ratios, "inference-batches-of-32"),
    "prediction speed, one sentence": partial(speed.ratios, "inference-one-sentence"),
    "integer products": speed.integer_products,
    "memory of a training run": speed.memory,
    "bytes of BERT-base": speed.bytes_of_bert_base,
    "growth with rank": speed.growth_with_rank,
}
INT8, NF4, AMX, GPU = speed.INT8_BASE, "q-LoRA, NF4 base", ["AMX"], ["GPU (Hopper)"]
BATCHES, ONE = "inference-batches-of-32", "inference-one-sentence"
NUMBERS = {
    "BERT-base's parameters": speed.parameters_of_bert_base,
    "6-layer parameters": accuracy.parameters_of_the_6_layers,
    "bytes of states": accuracy.megabytes_of_states,
    "LoRA's accuracy": partial(accuracy.of_method, "LoRA", "accuracy"),
    "4 bits' accuracy": partial(accuracy.of_method, "q-LoRA, 4 bits", "accuracy"),
    "2 bits' accuracy": partial(accuracy.of_method, "q-LoRA, 2 bits", "accuracy"),
    "NF4's accuracy": partial(accuracy.of_method, "q-LoRA, 4 bits, NF4 base", "accuracy"),
    "full fine-tuning's accuracy": partial(accuracy.of_method, "full fine-tuning", "accuracy"),
    "full fine-tuning on held-out phrases": accuracy.held_out_difference,
    "LoRA ships": partial(accuracy.of_method, "LoRA", "ships"),
    "4 bits ship": partial(accuracy.of_method, "q-LoRA, 4 bits", "ships"),
    "full fine-tuning ships": partial(accuracy.of_method, "full fine-tuning", "ships"),
    "LoRA holds": partial(accuracy.of_method, "LoRA", "holds"),
    "int8 base holds": partial(accuracy.of_method, "q-LoRA, 4 bits, int8 base", "holds"),
    "NF4 base holds": partial(accuracy.of_method, "q-LoRA, 4 bits, NF4 base", "holds"),
    "doubt near 82 %": partial(accuracy.half_width, 82),
    "doubt near 87 %": partial(accuracy.half_width, 87),
    "five seeds in words": partial(accuracy.intervals_in_words, "five seeds"),
    "integer products in words": partial(accuracy.intervals_in_words, "integer products"),
    "faster than PEFT, CPUs": partial(speed.span, "training", "LoRA", "PEFT"),
    "faster than PEFT, GPU": partial(speed.span, "training", "LoRA", "PEFT", GPU),
    "faster than tuned PEFT, CPUs": partial(speed.span, "training", "LoRA", "PEFT, tuned"),
    "faster than tuned PEFT, GPU": partial(speed.span, "training", "LoRA", "PEFT, tuned", GPU),
    "faster than full fine-tuning, CPUs": partial(speed.span, "training", "LoRA", speed.FULL),
    "faster than full fine-tuning, GPU": partial(speed.span, "training", "LoRA", speed.FULL, GPU),
    "int8 base, training": partial(speed.span, "training", INT8),
    "int8 base, training, AMX": partial(speed.span, "training", INT8, classes=AMX),
    "int8 base, training, GPU": partial(speed.span, "training", INT8, classes=GPU),
    "int8 base, batches": partial(speed.span, BATCHES, INT8),
    "int8 base, one sentence": partial(speed.span, ONE, INT8),
    "A and B in 8 bits, training": partial(speed.span, "training", "q-LoRA"),
    "NF4 base, training": partial(speed.span, "training", NF4),
    "NF4 base, training, GPU": partial(speed.span, "training", NF4, classes=GPU),
    "NF4 base beside PEFT, CPUs": partial(speed.span, "training", NF4, "PEFT, NF4 base"),
    "NF4 base beside PEFT, GPU": partial(speed.span, "training", NF4, "PEFT, NF4 base", GPU),
    "torch.ao is faster": speed.torch_ao_is_faster,
    "LoRA's memory beside full fine-tuning": partial(speed.share_of_peak, "LoRA", speed.FULL, "amx_bf16"),
    "LoRA's memory beside PEFT": partial(speed.share_of_peak, "LoRA", "PEFT", "cuda"),
}


# What the texts say in words -----------------------------------------------------------------------


def is_faster(over, under, parts, classes):
    """Say for each part, model and class of machine that was measured whether `over` is faster than `under`."""
    cells = [speed.relative(*key, over, under) for key in itertools.product(parts, speed.MODELS, classes)]
    return [cell[0][0] > 1 for cell in cells if cell]


def claims():
    """Return {what the texts say in words: whether the results bear it out}."""
    runs, mean = accuracy.runs_of("sweep"), compare.mean_accuracy
    groups, five_seeds = compare.methods(runs), accuracy.of_part("five seeds")["LoRA, not quantised"]
    heads = compare.compare_seeds(groups["LoRA"], groups["head alone, mean of tokens"])
    rates = [mean(compare.select(runs, learning_rate=rate), "held-out") for rate in (2e-3, 5e-4, 8e-3)]
    settings = [str(run["settings"]) for run in runs]
    wanted = [str(compare.DEFAULT | changed) for part in sweep.PARTS.values() for changed in part]
    ranks = [mean(compare.select(runs, rank=rank)) for rank in (4, 8, 16, 64)]
    quantised = [mean(group) for name, group in groups.items() if name.startswith("q-LoRA")]
    large = [mean(group) for group in accuracy.of_part("all phrases").values()]
    errors = [{way: run["rounded"][way][bits]["error"] for way in WAYS} for run in five_seeds for bits in "432"]
    integers = [points["held-out"] for points in accuracy.paired("integer products").values()]
    lines = [run for name in ("sweep", *sweep.LONG_PARTS) for run in accuracy.runs_of(name)]
    found = [result for run in lines for result in run["results"].values()]
    at_rank_64 = [speed.ratio(x, "LoRA, rank 64", "LoRA, rank 1")[0] for x in speed.results("rank").values()]
    cpus, fast = ["AVX2", "AVX512_VNNI", "AVX512_BF16"], ["training", BATCHES]
    return {
        "a line has the label of every sentence": all(len(x["labels"]) == len(x["right"]) == x["n"] for x in found),
        "its accuracy is that of its labels": all(x["right"].count("1") / x["n"] == x["accuracy"] for x in found),
        "the sweep has three seeds per setting": all(settings.count(each) == 3 for each in {*settings, *wanted}),
        "LoRA beats the head alone": all(test.p < 0.05 and test.first_only > test.second_only for test in heads),
        "LoRA's learning rate is the best on held-out phrases": rates[0] == max(rates),
        "LoRA has no clear gain above rank 4": max(ranks) - min(ranks) < 1,
        "q-LoRA lies at LoRA's accuracy": all(abs(each - mean(groups["LoRA"])) < 1 for each in quantised),
        "all linear layers reach more than query and value": large == sorted(large),
        "A and B rounded together have the smallest error": all(min(x, key=x.get) == "together" for x in errors),
        "integer products lose at most half a point": all(sum(points) / len(points) > -0.5 for points in integers),
        "LoRA is faster than PEFT": all(is_faster("LoRA", "PEFT, tuned", ["training"], [*cpus, *GPU])),
        "an int8 base is faster without AMX": all(is_faster(INT8, "LoRA", fast, [*cpus, "AVX2_VNNI"])),
        "an int8 base is slower with AMX and on a GPU": not any(is_faster(INT8, "LoRA", speed.PARTS, AMX + GPU)),
        "a step hardly grows with the rank": min(at_rank_64) > 1 / 1.15,
    }


# Writing -------------------------------------------------------------------------------------------


def names_in(text):
    return re.findall(r"<!-- /(.*?) -->", text)


@functools.cache
def made(name):
    """Make a table or a number. A run of this script makes each of them once."""
    return (TABLES | NUMBERS)[name]()


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


def draw_figure(file, check):
    """Draw every method of the sweep, unless that was done from the same sweep. Return whether the file is stale."""
    digest = hashlib.sha256((RESULTS / "sweep.jsonl").read_bytes()).hexdigest()
    if file.is_file():
        with Image.open(file) as image:
            if image.text.get("Source") == digest:
                return False
    if not check:
        plt.switch_backend("agg")
        figures.set_style()
        figures.draw_whole(accuracy.runs_of("sweep"), file=file, metadata={"Source": digest})
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale, placed = [], set()
    for file in map(ROOT.joinpath, FILES):
        is_notebook = file.suffix == ".ipynb"
        text = file.read_text(encoding="utf-8")
        notebook = nbformat.reads(text, as_version=4) if is_notebook else None
        cells = notebook.cells if is_notebook else [SimpleNamespace(cell_type="markdown", source=text)]
        cells = [cell for cell in cells if cell.cell_type == "markdown" and filled(cell.source) != cell.source]
        placed.update(names_in(text))
        for cell in cells:
            cell.source = filled(cell.source)
        if cells:
            stale.append(str(file.relative_to(ROOT)))
            if not args.check:
                nbformat.write(notebook, file) if is_notebook else file.write_text(cells[0].source, encoding="utf-8")
    if draw_figure(RESULTS / "whole.png", args.check):
        stale.append("whole.png")
    for name in stale:
        print(f"{name}: {'not what the results say' if args.check else 'written'}")
    missing = [f"{name}: has no place in {', '.join(FILES)}" for name in TABLES | NUMBERS if name not in placed]
    missing += [f"the results do not bear out: {claim}" for claim, holds in claims().items() if not holds]
    print("\n".join(missing))
    return bool(missing) or (args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
