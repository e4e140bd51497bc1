"""Make the tables of accuracy from the files in benchmarks/results. `report.py` writes them."""

import statistics

import sweep
from accuracy import interval, paired_differences
from scipy.stats import binomtest, ttest_1samp
from tables_of_speed import RESULTS, table

from lora_lab import compare
from lora_lab.rounding import WAYS

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


def sweep_made_on(runs):
    group = compare.select(runs)
    first, machine = group[0], group[0]["machine"]
    model = first["model"].rpartition("/")[2]
    data = f"{first['data']}, one epoch of {first['trained_on']:,} phrases (the heads alone: until converged)"
    where = f"one thread of a CPU with {machine['isa']}, {machine['frozen_dtype']}, torch {machine['torch']}"
    return f"Mean and range of {len(group)} seeds, in %. {model}, {data}; {where} (`benchmarks/sweep.py`)."


def heads(runs):
    """Select the runs in which only the classifier head was trained: {name: runs}."""
    return {name: group for name, group in compare.methods(runs).items() if name.startswith("head")}


def learning_rate(group):
    rate = group[0]["settings"]["learning_rate"]
    return f"{rate:g}" if rate else ""


def accuracy_by_rank():
    runs = sweep_runs()
    ranks = [varied["rank"] for varied in sweep.PARTS["rank"] if varied["rank"]]
    groups = heads(runs) | {f"LoRA, rank {rank}": compare.select(runs, rank=rank) for rank in ranks}
    groups["full fine-tuning"] = compare.full_fine_tuning(runs)
    rows = []
    for name, group in groups.items():
        row = [name, f"{group[0]['trained_parameters']:,}", learning_rate(group)]
        row += [mean_and_range(compare.accuracies(group, where)) for where in ("validation", "held-out")]
        rows.append(row)
    header = ["trained", "parameters", "learning rate", "872 validation sentences", "2,000 held-out phrases"]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs)}"


def accuracy_by_bits():
    ways = dict(zip(WAYS, ("absmax", "half steps", "A and B together"), strict=True))
    runs, rows = sweep_runs(), []
    plain = compare.select(runs)
    for bits in (8, 4, 3, 2):
        after = [mean_and_range([100 * x["rounded"][way][str(bits)]["accuracy"] for x in plain]) for way in ways]
        through = compare.select(runs, method="qlora", bits=bits)
        rows.append([str(bits), mean_and_range(compare.accuracies(through)), *after])
    rows.append(["not quantised", mean_and_range(compare.accuracies(plain)), "", "", ""])
    header = ["bits", "trained through rounding", *(f"rounded after training, {name}" for name in ways.values())]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs)}"


def sizes(group, runs):
    """Print the bytes that a method ships, A, B and head, and the megabytes that its whole model holds."""
    return [f"{group[0]['bytes'] + compare.head_bytes(runs):,}", f"{group[0]['held'] / 1e6:.1f}"]


def accuracy_by_bytes():
    runs = sweep_runs()
    plain, rows = compare.select(runs), []
    for name, group in compare.methods(runs).items():
        tests = [] if name == "LoRA" else compare.compare_seeds(group, plain)
        p = ", ".join(f"{test.p:.2g}" for test in tests)
        rows.append([name, *sizes(group, runs), mean_and_range(compare.accuracies(group)), p])
    header = ["method", "ships, bytes", "holds, MB", "872 validation sentences", "McNemar's p against LoRA, by seed"]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs)}"


def differences_seen(group, plain):
    """Count the seeds in which McNemar's test sees a difference between two settings: (seen, seeds)."""
    tests = compare.compare_seeds(group, plain)
    return sum(test.p < 0.05 for test in tests), len(tests)


def accuracy_in_short():
    runs = sweep_runs()
    plain, rows = compare.select(runs), []
    groups = compare.methods(runs)
    del groups["q-LoRA, 3 bits"]  # as in the README's figure
    for name, group in groups.items():
        seen, seeds = differences_seen(group, plain)
        difference = f"seen in {seen} of {seeds} seeds" if seen else f"none seen in {seeds} seeds"
        trained = f"{group[0]['trained_parameters']:,}"
        accuracy = mean_and_range(compare.accuracies(group))
        rows.append([name, trained, *sizes(group, runs), accuracy, "" if name == "LoRA" else difference])
    header = ["method", "trained parameters", "ships, bytes", "holds, MB", "accuracy, %", "difference from LoRA"]
    return f"{table(header, rows)}\n\n{sweep_made_on(runs)}"


def read_results(name):
    return compare.read_runs(RESULTS.parent / name)


def accuracy_with_all_phrases():
    groups = {}
    for line in read_results("accuracy.jsonl"):
        if line["evaluated_on"] == "validation":
            settings = line["settings"]
            where = "all linear layers" if settings["targets"] == "all-linear" else "query and value"
            name = f"LoRA on {where}, rank {settings['rank']}" if settings["method"] == "lora" else settings["method"]
            groups.setdefault(name, []).append(line)
    rows = []
    for name, group in sorted(groups.items(), key=lambda item: item[1][0]["trained_parameters"]):
        scores = [100 * line["accuracy"] for line in group]
        extent = f"{min(scores):.1f} to {max(scores):.1f}" if len(scores) > 1 else "one run"
        row = [name, f"{group[0]['trained_parameters']:,}", learning_rate(group)]
        rows.append([*row, f"{statistics.fmean(scores):.1f}", extent])
    header = ["trained", "parameters", "learning rate", "accuracy, mean of seeds, %", "range"]
    return f"{table(header, rows)}\n\n{trained_on(group, 'benchmarks/accuracy.py')}"


def trained_on(group, script):
    """Say what runs of accuracy.py were trained on: model, data, phrases, seeds and machine."""
    line, seeds = group[0], len({line["seed"] for line in group})
    machine = line["machine"]
    where = f"{machine['device'].replace('1 CPU threads', '1 CPU thread')}, {machine['isa']}"
    model = f"{line['model']}, {line['data']}, one epoch of {line['trained_on']:,} phrases, {seeds} seeds"
    return f"{model}; made on {where}, frozen weights in {machine['frozen_dtype']} (`{script}`)."


def quantised_runs():
    """Read the runs of five seeds: {(bits of A and B, bits of the base): {evaluated on: accuracies in %}}."""
    found = {}
    for line in read_results("quantised.jsonl"):
        bits = line["settings"].get("bits"), line["settings"].get("base_bits")
        found.setdefault(bits, {}).setdefault(line["evaluated_on"], []).append(100 * line["accuracy"])
    return found


def accuracy_of_five_seeds():
    lines, rows = read_results("quantised.jsonl"), []
    differences = paired_differences(lines)
    found = quantised_runs()
    for bits, base_bits in sorted(found, key=lambda pair: (-(pair[1] or 99), -(pair[0] or 99))):
        row = [f"{bits} bits" if bits else "float32", f"{base_bits} bits" if base_bits else "bfloat16"]
        for where in ("validation", "held-out training phrases"):
            of_seeds = list(differences.get((where, bits, base_bits), {}).values())
            row.append(f"{statistics.fmean(found[bits, base_bits][where]):.2f}")
            row.append("{:+.2f} ({:+.2f} to {:+.2f})".format(*interval(of_seeds)) if of_seeds else "")
        rows.append(row)
    header = ["A and B", "base", "872 validation sentences, %", "difference", "2,000 held-out phrases, %", "difference"]
    return f"{table(header, rows)}\n\n{trained_on(lines, 'benchmarks/accuracy.py')}"


def five_seeds_in_words():
    """Count the intervals of `accuracy_of_five_seeds` that exclude 0, and correct the smallest p for their number."""
    of_seeds = [list(seeds.values()) for seeds in paired_differences(read_results("quantised.jsonl")).values()]
    apart = sum(not low <= 0 <= high for _, low, high in map(interval, of_seeds))
    smallest = min(ttest_1samp(values, 0).pvalue for values in of_seeds)
    corrected = min(1, len(of_seeds) * smallest)
    words = f"Of {len(of_seeds)} intervals, {apart} exclude 0"
    return f"{words}. Corrected for the number of intervals, the smallest p is {corrected:.2f}"


def rounding_after_training():
    lines, rows = read_results("after_training.jsonl"), []
    ways = {"absmax": "absmax", "half steps": "half steps", "together": "A and B together"}
    for bits in (8, 4, 3, 2):
        row = [str(bits)]
        for way in ways:
            group = [line for line in lines if (line["way"], line["bits"]) == (way, bits)]
            error, score = (statistics.fmean(line[key] for line in group) for key in ("error", "accuracy"))
            row.append(f"{error:.3f}, {100 * score:.1f} %")
        through = quantised_runs()[bits, None]["validation"]
        rows.append([*row, f"{statistics.fmean(through):.1f} %"])
    unrounded = {line["seed"]: line["unrounded"] for line in lines}
    words = f"Not rounded: {100 * statistics.fmean(unrounded.values()):.1f} %; {len(unrounded)} seeds"
    return f"{table(['bits', *ways.values(), 'trained through rounding'], rows)}\n\n{words}."


# Numbers in sentences ------------------------------------------------------------------------------


def int8_intervals_with_0():
    found = []
    for runs in int8_runs().values():
        _, low, high = interval([100 * (rounded - exact) for exact, rounded, *_ in runs])
        found.append(low <= 0 <= high)
    return f"{sum(found)} of {len(found)}"


def half_width(accuracy, n=872):
    """Print half of Wilson's 95 % interval in points, for an accuracy in %."""
    low, high = binomtest(round(n * accuracy / 100), n).proportion_ci(method="wilson")
    return f"±{50 * (high - low):.1f}"


def parameters_of_the_6_layers():
    runs = sweep_runs()
    trained = compare.select(runs)[0]["trained_parameters"]
    head = compare.head_bytes(runs) // 4
    total = compare.full_fine_tuning(runs)[0]["trained_parameters"] + trained - head
    return f"{trained:,} of {total:,} for the 6-layer BERT ({100 * trained / total:.2f} %)"


def megabytes_of_states():
    """Print the bytes of gradients and of AdamW's two states, LoRA against full fine-tuning, 12 per parameter."""
    runs = sweep_runs()
    lora, full = compare.select(runs)[0], compare.full_fine_tuning(runs)[0]
    return " MB against ".join(f"{12 * run['trained_parameters'] / 1e6:.{n}f}" for run, n in ((lora, 1), (full, 0)))


def accuracy_of(name):
    return f"{compare.mean_accuracy(compare.methods(sweep_runs())[name]):.1f}"


def megabytes_shipped(name):
    runs = sweep_runs()
    return f"{(compare.methods(runs)[name][0]['bytes'] + compare.head_bytes(runs)) / 1e6:.2f}"


def megabytes_held(name):
    return f"{compare.methods(sweep_runs())[name][0]['held'] / 1e6:.1f}"


def seeds_without_difference(name):
    runs = sweep_runs()
    seen, seeds = differences_seen(compare.methods(runs)[name], compare.select(runs))
    return f"{seeds - seen} of {seeds}"


def held_out_difference():
    """Say how far full fine-tuning is above LoRA on the held-out phrases, with McNemar's p, by seed."""
    runs = sweep_runs()
    full, plain = compare.full_fine_tuning(runs), compare.select(runs)
    scores = zip(*(compare.accuracies(group, "held-out") for group in (full, plain)), strict=True)
    points = ", ".join(f"{one - other:+.1f}" for one, other in scores)
    p = ", ".join(f"{test.p:.2f}" for test in compare.compare_seeds(full, plain, "held-out"))
    return f"{points} points by seed (McNemar's p: {p})"
