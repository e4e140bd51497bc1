"""Make the tables of accuracy from benchmarks/results/*.jsonl. `report.py` writes them."""

import statistics
from functools import cache

from machine import RESULTS
from scipy.stats import binomtest, ttest_1samp
from sweep import HEAD, LONG_PARTS

from lora_lab import compare
from lora_lab.rounding import WAYS

SETS = {"validation": "872 validation sentences, %", "held-out": "2,000 held-out phrases, %"}


@cache
def runs_of(name):
    """Read the runs of a part of LONG_PARTS, or of the sweep."""
    return compare.read_runs(RESULTS / f"{name.replace(' ', '_')}.jsonl")


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def made_on(group):
    """Say what runs were trained on, and on which machine."""
    first, machine = group[0], group[0]["machine"]
    phrases = f"{first['data']}, one epoch of {first['trained_on']:,} phrases"
    where = f"{machine['device'].replace('1 CPU threads', '1 CPU thread')}, {machine['isa']}, {machine['frozen_dtype']}"
    about = f"{first['model'].rpartition('/')[2]}, {phrases}; {where}, torch {machine['torch']}"
    return f"Mean and range of {len(group)} seeds. {about}."


def mean_and_range(values):
    if len(values) == 1:
        return f"{values[0]:.1f} (one run)"
    return f"{statistics.fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def differences(group, plain, where):
    """Subtract the accuracies of two settings, seed by seed, in points."""
    assert [run["seed"] for run in group] == [run["seed"] for run in plain]
    return [a - b for a, b in zip(compare.accuracies(group, where), compare.accuracies(plain, where), strict=True)]


def trained_and_accuracy(groups, sets):
    """Tabulate {name: runs}: what was trained, with how many parameters and which learning rate, and the accuracy."""
    rows = []
    for name, group in groups.items():
        rate = group[0]["settings"]["learning_rate"]
        scores = [mean_and_range(compare.accuracies(group, where)) for where in sets]
        rows.append([name, f"{group[0]['trained_parameters']:,}", f"{rate:g}" if rate else "", *scores])
    header = ["trained", "parameters", "learning rate", *(SETS[where] for where in sets)]
    return f"{table(header, rows)}\n\n{made_on(group)}"


def by_rank():
    """Select the runs of the sweep by rank, between those of the heads and of full fine-tuning: {name: runs}."""
    runs = runs_of("sweep")
    groups = {name: compare.select(runs, **changed) for name, changed in HEAD.items()}
    groups |= {f"LoRA, rank {rank}": compare.select(runs, rank=rank) for rank in (1, 2, 4, 8, 16, 64)}
    return groups | {"full fine-tuning": compare.full_fine_tuning(runs)}


def of_part(part):
    """Select the runs of each setting of a part of LONG_PARTS: {name: runs}."""
    runs = [run for run in runs_of(part) if "validation" in run["results"]]
    return {name: compare.select(runs, **changed) for name, changed in LONG_PARTS[part].items()}


def rounding(name, **changed):
    """Tabulate accuracy by bits: trained through the rounding, or rounded after training in each of WAYS."""
    runs, rows = runs_of(name), []
    plain = compare.select(runs, **changed)
    for bits in (8, 4, 3, 2):
        through = compare.select(runs, method="qlora", bits=bits, **changed)
        row = [f"{bits}", mean_and_range(compare.accuracies(through))]
        for way in WAYS:
            error = statistics.fmean(run["rounded"][way][str(bits)]["error"] for run in plain)
            after = compare.accuracies(compare.round_after_training(plain, way, bits))
            row.append(f"{mean_and_range(after)}, error {error:.3f}")
        rows.append(row)
    rows.append(["not quantised", mean_and_range(compare.accuracies(plain)), *[""] * len(WAYS)])
    names = ["absmax", "half steps", "A and B together"]
    header = ["bits", "trained through rounding", *(f"rounded after training, {way}" for way in names)]
    return f"{table(header, rows)}\n\n{made_on(plain)}"


def bytes_shipped(group):
    return group[0]["bytes"] + compare.head_bytes(runs_of("sweep"))


def accuracy_in_short():
    rows, plain = [], compare.select(runs_of("sweep"))
    for name, group in compare.methods(runs_of("sweep")).items():
        if name != "q-LoRA, 3 bits":  # as in the README's figure
            difference = "{:+.1f} ({:+.1f} to {:+.1f})".format(*compare.mean_difference(group, plain))
            row = [name, f"{group[0]['trained_parameters']:,}", f"{bytes_shipped(group):,}"]
            row += [f"{group[0]['held'] / 1e6:.1f}", mean_and_range(compare.accuracies(group))]
            rows.append([*row, "" if name == "LoRA" else difference])
    header = ["method", "trained parameters", "ships, bytes", "holds, MB", "accuracy, %", "minus LoRA, points"]
    return f"{table(header, rows)}\n\n{made_on(group)}"


def paired(part):
    """Subtract the first setting of a part from the others, by seed: {name: {where: differences in points}}."""
    (_, plain), *others = of_part(part).items()
    return {name: {where: differences(group, plain, where) for where in SETS} for name, group in others}


def paired_differences(part):
    """Tabulate the accuracy of each setting, and its difference from the first with the 95 % interval."""
    rows, points = [], paired(part)
    for name, group in of_part(part).items():
        row = [name]
        for where in SETS:
            difference = "{:+.2f} ({:+.2f} to {:+.2f})".format(*compare.t_interval(points[name][where])) if rows else ""
            row += [f"{compare.mean_accuracy(group, where):.2f}", difference]
        rows.append(row)
    header = ["", *(text for title in SETS.values() for text in (title, "difference"))]
    return f"{table(header, rows)}\n\n{made_on(group).replace('Mean and range', 'Mean')}"


def intervals_in_words(part):
    """Count the intervals of `paired_differences` that exclude 0, and correct the smallest p for their number."""
    found = [points for by_set in paired(part).values() for points in by_set.values()]
    apart = sum(not low <= 0 <= high for _, low, high in map(compare.t_interval, found))
    corrected = min(1, len(found) * min(ttest_1samp(points, 0).pvalue for points in found))
    words = f"Of {len(found)} intervals, {apart or 'none'} exclude{'' if apart else 's'} 0"
    return f"{words}. Corrected for the number of intervals, the smallest p is {corrected:.2f}"


# Numbers in sentences ------------------------------------------------------------------------------


def half_width(accuracy, n=872):
    """Print half of Wilson's 95 % interval in points, for an accuracy in %."""
    low, high = binomtest(round(n * accuracy / 100), n).proportion_ci(method="wilson")
    return f"±{50 * (high - low):.1f}"


def parameters_of_the_6_layers():
    runs = runs_of("sweep")
    trained, of_all = (compare.methods(runs)[name][0]["trained_parameters"] for name in ("LoRA", "full fine-tuning"))
    total = of_all + trained - compare.head_bytes(runs) // 4
    return f"{trained:,} of {total:,} for the 6-layer BERT ({100 * trained / total:.2f} %)"


def megabytes_of_states():
    """Print the bytes of gradients and of AdamW's two states, LoRA against full fine-tuning, 12 per parameter."""
    lora, full = (compare.methods(runs_of("sweep"))[name][0] for name in ("LoRA", "full fine-tuning"))
    return f"{12 * lora['trained_parameters'] / 1e6:.1f} MB against {12 * full['trained_parameters'] / 1e6:.0f}"


def of_method(name, what):
    """Print the accuracy of a method in %, or the megabytes that it ships or holds."""
    group = compare.methods(runs_of("sweep"))[name]
    if what == "accuracy":
        return f"{compare.mean_accuracy(group):.1f}"
    return f"{bytes_shipped(group) / 1e6:.2f}" if what == "ships" else f"{group[0]['held'] / 1e6:.1f}"


def held_out_difference():
    """Say how far full fine-tuning is above LoRA on the held-out phrases, with the 95 % interval."""
    runs = runs_of("sweep")
    found = compare.mean_difference(compare.full_fine_tuning(runs), compare.select(runs), "held-out")
    return "{:.1f} points (95 % interval {:.1f} to {:.1f})".format(*found)
