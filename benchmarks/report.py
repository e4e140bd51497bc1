"""Write the tables of accuracy, speed and memory into README.md and the notebooks, from benchmarks/results.

    python benchmarks/report.py             write them
    python benchmarks/report.py --check     write nothing; name what would change, and end with 1 if anything would

A table stands between `<!-- name -->` and `<!-- /name -->`. `TABLES` below has the names. The README's figure,
whole.png, is drawn from the sweep.
"""

import argparse
import hashlib
import json
import statistics
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import sweep
from accuracy import interval
from PIL import Image

from lora_lab import compare, figures
from lora_lab.rounding import WAYS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "speed"
FILES = ["README.md", "LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]

# The kinds of machine that results are filed under, and how a reader knows them.
MACHINES = {
    "cuda": "a GPU (H100), bfloat16",
    "amx_bf16": "AMX, bfloat16",
    "avx512_bf16": "AVX512_BF16, bfloat16",
    "avx512_core_bf16": "AVX512_CORE_BF16, bfloat16",
    "avx512_core_vnni": "AVX512_CORE_VNNI, float32",
    "avx2_vnni": "AVX2_VNNI, float32",
    "avx2": "AVX2, float32",
}
MODELS = {"bert-base": "BERT-base's shape", "packaged": "the 6-layer BERT"}


def results(part, models=MODELS):
    """{(model, machine): result} of those that there are: machines that are known first, in their order."""
    found = {}
    for model in models:
        names = [file.stem.removeprefix(f"{part}-{model}-") for file in RESULTS.glob(f"{part}-{model}-*.json")]
        for machine in sorted(names, key=[*MACHINES, *sorted(names)].index):
            found[model, machine] = json.loads((RESULTS / f"{part}-{model}-{machine}.json").read_text(encoding="utf-8"))
    return found


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value):
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values):
    median, low, high = values
    return f"{number(median)} ({number(low)} to {number(high)})"


def made_on(found):
    """One sentence: machine class, versions, data, rounds."""
    words = "{device} ({cpu}), torch {torch}, transformers {transformers}, peft {peft}, bitsandbytes {bitsandbytes}"
    said = dict.fromkeys(words.format(**result["machine"]) + f"; {result['data']}" for result in found.values())
    rounds = sorted({str(result["rounds"]) for result in found.values() if "rounds" in result})
    return "Made on " + "; and on ".join(said) + (f"; {' or '.join(rounds)} rounds." if rounds else ".")


def missing(found):
    measured = {machine for _, machine in found}
    names = [name.partition(",")[0] for key, name in MACHINES.items() if key not in measured | {"avx512_core_bf16"}]
    if not names:
        return ""
    return f" Not in this table: {', '.join(names)}. `make bench` measures what it runs on."


def columns(found):
    """Name model and machine of each result, and say where a CPU was held to an older instruction set."""
    held = " (a CPU held to it)"
    return [
        f"{MODELS[model]}, {MACHINES.get(machine, machine)}{held if result.get('held_to') else ''}"
        for (model, machine), result in found.items()
    ]


def shown(name):
    """Name the bits of A and B. A name without bits means 8."""
    return name if "bits" in name else name.replace("q-LoRA", "q-LoRA, 8 bits")


def ratios(part):
    """A row a ratio, a column a machine: medians with quartiles."""
    found = results(part)
    cells = {}
    for key, result in found.items():
        for entry in result["ratios"]:
            cells.setdefault(f"{shown(entry['over'])} ÷ {shown(entry['under'])}", {})[key] = spread(entry["ratio"])
    rows = [[name, *(cells[name].get(key, "") for key in found)] for name in cells]
    header = ["ratio of sentences a second, median (quartiles)", *columns(found)]
    return f"{table(header, rows)}\n\n{made_on(found)}{missing(found)}"


def ablation():
    """A row a technique: what it gives on top of the row before, and all together so far."""
    found = results("ablation")
    names = list(dict.fromkeys(name for result in found.values() for name in result["sentences_a_second"]))
    rows = []
    for name in names:
        row = [name]
        for result in found.values():
            rates = result["sentences_a_second"]
            first = next(iter(rates))
            gain = {entry["over"]: spread(entry["ratio"]) for entry in result["ratios"][:-1]}.get(name, "")
            so_far = name in rates and statistics.median(a / b for a, b in zip(rates[name], rates[first], strict=True))
            row += [gain, number(so_far) if name in rates else ""]
        rows.append(row)
    header = ["one thing more a row"]
    for column in columns(found):
        header += [f"{column}: gain", "so far"]
    return f"{table(header, rows)}\n\n{made_on(found)}{missing(found)}"


def where_q_lora_is_faster():
    """q-LoRA beside LoRA by machine, for a training step and for predictions: faster, slower, or neither."""
    parts = {"training": "training step", "inference-batches-of-32": "prediction, batches of 32"}
    parts |= {"inference-one-sentence": "prediction, one sentence"}
    found = {part: results(part) for part in parts}
    machines = {key: result for of_part in found.values() for key, result in of_part.items()}
    rows = []
    for name in ("q-LoRA", "q-LoRA, NF4 base"):
        for part, title in parts.items():
            cells = []
            for key in machines:
                rates = found[part].get(key, {}).get("sentences_a_second", {})
                ours = rates.get(name) or rates.get(f"{name}, packed", [])
                of_rounds = [a / b for a, b in zip(ours, rates.get("LoRA", []), strict=True)]
                if of_rounds:
                    low, median, high = statistics.quantiles(of_rounds, n=4, method="inclusive")
                    cells.append(f"{spread((median, low, high))}, {verdict(low, high)}")
                else:
                    cells.append("")
            rows.append([shown(name), title, *cells])
    header = ["÷ LoRA", "of what", *columns(machines)]
    return f"{table(header, rows)}\n\n{made_on(found['training'])}{missing(found['training'])}"


def integer_products():
    """Tabulate q-LoRA on an int8 base over LoRA, one row per model and machine."""
    parts = {"training": "training step", "inference-batches-of-32": "predictions, batches of 32"}
    parts |= {"inference-one-sentence": "predictions, one sentence"}
    eight, four, ao = "q-LoRA, int8 base", "q-LoRA, 4 bits, int8 base", "torch.ao, dynamic int8"
    found = {part: results(f"integers-{part}") for part in parts}
    rows = []
    for key, label in zip(found["training"], columns(found["training"]), strict=True):
        row = [label]
        for part in parts:
            entries = found[part][key]["ratios"] if key in found[part] else []
            of_part = {(entry["over"], entry["under"]): spread(entry["ratio"]) for entry in entries}
            row += [of_part.get((eight, "LoRA"), ""), of_part.get((four, "LoRA"), "")]
            if part != "training":
                row.append(of_part.get((eight, ao), ""))
        rows.append(row)
    header = ["int8 base ÷ LoRA, A and B in 8 or 4 bits", *(f"{parts['training']}, {bits}" for bits in (8, 4))]
    for title in list(parts.values())[1:]:
        header += [f"{title}, 8", f"{title}, 4", "8 ÷ `torch.ao`"]
    return f"{table(header, rows)}\n\n{ranges_without_amx(found)}\n\n{made_on(found['training'])}"


def ranges_without_amx(found):
    """Say between which ratios q-LoRA on an int8 base lies, in {part: {(model, machine): result}}."""
    over_lora, over_ao = {}, []
    for part, results_of_part in found.items():
        for (_, machine), result in results_of_part.items():
            for entry in result["ratios"]:
                ratio = entry["ratio"][0]
                if entry["under"] == "LoRA" and "int8 base" in entry["over"] and "amx" not in machine:
                    over_lora.setdefault(part, []).append(ratio)
                if entry["under"].startswith("torch.ao"):
                    over_ao.append(ratio)
    training, batches, one = (f"{number(min(values))} to {number(max(values))}" for values in over_lora.values())
    faster = sum(ratio < 1 for ratio in over_ao)
    return (
        f"Without AMX: {training} in training, {batches} in batches, {one} for one sentence. "
        f"`torch.ao`, which cannot train, predicts faster in {faster} of {len(over_ao)} cases."
    )


def integer_products_on_a_gpu():
    """Tabulate the speed of both integer products over bfloat16's, one row per size."""
    result = json.loads((RESULTS / "int8-gpu.json").read_text(encoding="utf-8"))
    ways = ["int8, products only", "int8, fused", "int8"]
    rows = []
    for size in result["found"]:
        if size["launched"] == "as a graph":
            speeds = [spread(size["times as fast as bfloat16"][way]) for way in ways]
            rows.append([f"{size['out']} x {size['in']}, {size['rows']:,} rows", *speeds])
    header = ["weight", "products only", "with rounding, compiled", "with rounding"]
    words = "Made on {device}, torch {torch}; {rounds} rounds, as CUDA graphs (`benchmarks/int8_gpu.py`)."
    return f"{table(header, rows)}\n\n{words.format(**result['machine'], rounds=result['rounds'])}"


def verdict(low, high):
    return "**faster**" if low > 1 else "**slower**" if high < 1 else "no difference seen"


def memory():
    found = results("memory")
    if not found:
        return "Not measured yet."
    names = list(next(iter(found.values()))["bytes"])
    rows = []
    for name in names:
        row = [shown(name)]
        for result in found.values():
            if name not in result["bytes"]:
                row += ["", "", ""]
                continue
            of_name, peft = result["bytes"][name], result["bytes"]["PEFT"]["peak"]
            ledger = f"{of_name['ledger'] / 1e6:.0f}" if "ledger" in of_name else ""
            row += [f"{of_name['peak'] / 1e6:.0f}", f"{of_name['peak'] / peft:.2f}", ledger]
        rows.append(row)
    header = ["megabytes above the libraries"]
    for column in columns(found):
        header += [f"{column}: peak", "of PEFT's", "ledger"]
    return f"{table(header, rows)}\n\n{made_on(found)}"


def growth():
    alt = "Seconds a step and peak memory against rank, tokens in a sentence and layers: LoRA and PEFT"
    lines = []
    for (model, machine), result in results("growth").items():
        figure = f"![{alt}](benchmarks/results/speed/growth-{model}-{machine}.png)"
        times = f"A step at rank 64 takes {spread(result['rank 64 over rank 1'])} times as long as one at rank 1"
        rounds = len(result["growth"]["rank"]["LoRA"]["64"]["seconds"])
        about = f"{MODELS[model]}, 32 sentences of 16 tokens, {result['machine']['device']}"
        lines.append(f"{figure}\n\n{times} ({about}, {MACHINES.get(machine, machine)}, {rounds} rounds).")
    return "\n\n".join(lines) or "Not measured yet."


BITS_OF_KERNEL = {"onednn": "8 bits, oneDNN", "fbgemm": "7 bits, FBGEMM"}


def int8_runs():
    """{(kernel, evaluated on): [(accuracy of exact products, of integer products, other labels, sentences)]}."""
    by_seed = {}
    for line in compare.read_runs(RESULTS.parent / "int8_trained.jsonl"):
        by_seed.setdefault((line["evaluated_on"], line["seed"]), {})[line["int8_arithmetic"]] = line
    found = {}
    for kernel in BITS_OF_KERNEL:
        for (where, _), runs in sorted(by_seed.items()):
            exact, rounded = runs[None], runs[kernel]
            others = sum(a != b for a, b in zip(exact["predictions"], rounded["predictions"], strict=True))
            found.setdefault((kernel, where), []).append((exact["accuracy"], rounded["accuracy"], others, exact["n"]))
    return found


def int8_accuracy():
    rows = []
    for (kernel, where), runs in int8_runs().items():
        exact, rounded, others, sentences = zip(*runs)
        mean, low, high = interval([100 * (b - a) for a, b in zip(exact, rounded)])
        cells = [f"{100 * statistics.fmean(exact):.2f}", f"{100 * statistics.fmean(rounded):.2f}"]
        cells += [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", f"{sum(others):,} of {sum(sentences):,}"]
        rows.append([BITS_OF_KERNEL[kernel], f"{sentences[0]:,} {where}", str(len(runs)), *cells])
    header = ["activations and gradients", "evaluated on", "seeds", "exact products, %", "integer products, %"]
    header += ["difference, points (95 % interval)", "other label"]
    line = compare.read_runs(RESULTS.parent / "int8_trained.jsonl")[0]
    about = f"{line['model']}, {line['data']}, one epoch of {line['trained_on']:,} phrases, A and B in 8 bits"
    return f"{table(header, rows)}\n\n{about}, float32, torch {line['machine']['torch']} (`benchmarks/accuracy.py`)."


def sweep_runs():
    return compare.read_runs(RESULTS.parent / "sweep.jsonl")


def mean_and_range(values):
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


HEAD_TO_ITS_END = " (the head alone: until it has converged)"


def sweep_made_on(runs, head=""):
    """Say what made a table of the sweep. `head` says how the head alone was trained, where it has rows."""
    group = compare.select(runs)
    first, machine = group[0], group[0]["machine"]
    words = f"{first['model']}, {first['data']}, one epoch of {first['trained_on']:,} phrases{head}, {len(group)} seeds"
    where = f"one thread a run of a CPU with {machine['isa']}, {machine['frozen_dtype']}, torch {machine['torch']}"
    return f"Mean and range of the seeds, in %; {words}; made on {where} (`benchmarks/sweep.py`)."


def learning_rate_of(group):
    rate = group[0]["settings"]["learning_rate"]
    return "" if rate is None else f"{rate:g}"


def accuracy_by_rank():
    runs = sweep_runs()
    ranks = [varied["rank"] for varied in sweep.PARTS["rank"] if varied["rank"]]
    groups = {name: group for name, group in compare.methods(runs).items() if name.startswith("head alone")}
    groups |= {f"LoRA, rank {rank}": compare.select(runs, rank=rank) for rank in ranks}
    groups["full fine-tuning"] = compare.full_fine_tuning(runs)
    rows = [
        [
            *(name, f"{group[0]['trained_parameters']:,}", learning_rate_of(group)),
            *(mean_and_range(compare.accuracies(group, where)) for where in ("validation", "held-out")),
        ]
        for name, group in groups.items()
    ]
    header = ["trained", "parameters", "learning rate", "872 validation sentences", "2,000 held-out phrases"]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs, HEAD_TO_ITS_END)}"


def accuracy_by_bits():
    ways = dict(zip(WAYS, ("to the largest", "half steps", "A and B together"), strict=True))
    runs, rows = sweep_runs(), []
    plain = compare.select(runs)
    for bits in (8, 4, 3, 2):
        after = [mean_and_range([100 * x["rounded"][way][str(bits)]["accuracy"] for x in plain]) for way in ways]
        through = compare.select(runs, method="qlora", bits=bits)
        rows.append([str(bits), mean_and_range(compare.accuracies(through)), *after])
    rows.append(["not quantised", mean_and_range(compare.accuracies(plain)), "", "", ""])
    header = ["bits", "trained through", *(f"afterwards, {name}" for name in ways.values())]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs)}"


def accuracy_by_bytes():
    runs = sweep_runs()
    plain, head, rows = compare.select(runs), compare.head_bytes(runs), []
    for name, group in compare.methods(runs).items():
        tests = compare.compare_seeds(group, plain) if name != "LoRA" else []
        p = ", ".join(f"{test.p:.2g}" for test in tests)
        sizes = f"{group[0]['bytes'] + head:,}", f"{group[0]['held'] / 1e6:.1f}"
        rows.append([name, *sizes, mean_and_range(compare.accuracies(group)), p])
    header = ["method", "ships, bytes", "holds, MB", "872 validation sentences", "McNemar's p against LoRA, by seed"]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs, HEAD_TO_ITS_END)}"


TABLES = {
    "accuracy by rank": accuracy_by_rank,
    "accuracy by bits": accuracy_by_bits,
    "accuracy by bytes": accuracy_by_bytes,
    "training speed": lambda: ratios("training"),
    "prediction speed, one sentence": lambda: ratios("inference-one-sentence"),
    "prediction speed, batches of 32": lambda: ratios("inference-batches-of-32"),
    "where the speed comes from": ablation,
    "where q-LoRA is faster": where_q_lora_is_faster,
    "integer products": integer_products,
    "integer products on a GPU": integer_products_on_a_gpu,
    "memory of a training run": memory,
    "growth with rank": growth,
    "accuracy of int8 arithmetic": int8_accuracy,
}


def filled(text):
    """The text with every table between its marks made anew."""
    for name, make in TABLES.items():
        mark, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if mark in text:
            if end not in text:
                raise ValueError(f"{mark} is there, and no {end} after it")
            before, _, rest = text.partition(mark)
            text = f"{before}{mark}\n{make()}\n{end}{rest.partition(end)[2]}"
    return text


FIGURE = RESULTS.parent / "whole.png"


def sweep_digest():
    return hashlib.sha256((RESULTS.parent / "sweep.jsonl").read_bytes()).hexdigest()


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
    runs = compare.read_runs(RESULTS.parent / "sweep.jsonl")
    figures.draw_whole(runs, file=FIGURE, metadata={"Source": sweep_digest()})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = []
    for file in map(ROOT.joinpath, FILES):
        if file.suffix == ".md":
            old = file.read_text(encoding="utf-8")
            new = filled(old)
            changed = new != old
        else:
            new = nbformat.read(file, as_version=4)
            cells = [cell for cell in new.cells if cell.cell_type == "markdown"]
            changed = any(filled(cell.source) != cell.source for cell in cells)
            for cell in cells:
                cell.source = filled(cell.source)
        if changed:
            stale.append(file.name)
            if not args.check:
                file.write_text(new, encoding="utf-8") if file.suffix == ".md" else nbformat.write(new, file)
    if figure_is_stale():
        stale.append(FIGURE.name)
        if not args.check:
            draw_figure()
    for name in stale:
        print(f"{name}: {'not what the results say' if args.check else 'written'}")
    return args.check and bool(stale)


if __name__ == "__main__":
    sys.exit(main())
