"""Choose training runs from a results file and compare them.

A run is a dictionary, one line of `benchmarks/results/sweep.jsonl`. It holds the settings, the seed, the
machine and the results. The results say for every sentence which label it was given, and whether that label is right.
Each setting has one run per seed.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy.stats import binomtest, t

# The settings of the sweep that are not varied. `benchmarks/sweep.py` trains with them.
DEFAULT = {
    "method": "lora",
    "rank": 8,
    "scaling": 2.0,
    "targets": ["query", "value"],
    "learning_rate": 2e-3,
    "bits": None,
    "base_bits": None,
}

# What the head alone reads, as in `baseline.FEATURES`, and the name of the method in the sweep.
HEAD_METHODS = {"pooled": "head", "mean of tokens": "head on mean of tokens"}
HEAD_ALONE = {"rank": 0, "scaling": None, "learning_rate": None}  # there is no A, no B and no step size


class McNemarResult(NamedTuple):
    """Hold the result of McNemar's test between two models.

    first_only: the number of sentences that the first model has right and the second has wrong.
    second_only: the number of sentences that the second model has right and the first has wrong.
    p: the probability of a split at least as uneven as this one, if both models were equally good.
    """

    first_only: int
    second_only: int
    p: float

    def __str__(self):
        verdict = "no difference can be seen at this size"
        if self.p < 0.05:
            verdict = "a difference"
        return f"right in one only: {self.first_only} and {self.second_only}; p = {self.p:.2g}, {verdict}"


def mcnemar(first: Sequence[int], second: Sequence[int], labels: Sequence[int]) -> McNemarResult:
    """Test with McNemar's exact test whether two models differ in accuracy on the same sentences.

    Only the sentences that one model has right and the other has wrong can tell the models apart.
    If both models were equally good, either of them would have such a sentence right with probability ½.
    p is the two-sided p-value of this binomial distribution. It is 1 where there is no such sentence.

    Args:
        first, second: the label that each model gave to every sentence, as in `Evaluation.predictions`.
        labels: the true labels, in the same order.

    Raises ValueError for lists of unequal length.
    Source: McNemar 1947. Dietterich 1998, "Approximate Statistical Tests", section 3.1.
    """
    if not len(first) == len(second) == len(labels):
        lengths = f"{len(first)} and {len(second)} predictions for {len(labels)} labels"
        raise ValueError(f"{lengths}: give one prediction of each model per label")
    first_right = [given == label for given, label in zip(first, labels, strict=True)]
    second_right = [given == label for given, label in zip(second, labels, strict=True)]
    return _test_right_answers(first_right, second_right)


def _test_right_answers(first_right, second_right):
    """Return the `McNemarResult` of two lists that say for each sentence whether the answer is right."""
    first_only = 0
    second_only = 0
    for first_is_right, second_is_right in zip(first_right, second_right, strict=True):
        if first_is_right and not second_is_right:
            first_only += 1
        if second_is_right and not first_is_right:
            second_only += 1
    n = first_only + second_only
    if n == 0:
        return McNemarResult(first_only, second_only, 1.0)
    p = float(binomtest(first_only, n).pvalue)
    return McNemarResult(first_only, second_only, p)


def read_runs(file: str | Path) -> list[dict]:
    """Read the runs of a results file, one JSON object per line."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def select(runs: list[dict], **changed) -> list[dict]:
    """Select the runs that have the default settings, except for the changed ones: one run per seed.

    `select(runs)` gives the default itself, `select(runs, rank=4)` the runs at rank 4.
    """
    wanted = DEFAULT | changed
    return [run for run in runs if run["settings"] == wanted]


def head_only(runs: list[dict], features: str = "pooled") -> list[dict]:
    """Select the runs in which only the classifier head was trained, on "pooled" or on "mean of tokens"."""
    return select(runs, method=HEAD_METHODS[features], **HEAD_ALONE)


def full_fine_tuning(runs: list[dict]) -> list[dict]:
    """Select the runs of full fine-tuning at the learning rate that was best on the held-out phrases.

    Several learning rates were tried. The validation sentences have no part in the choice.
    """
    rates = {run["settings"]["learning_rate"] for run in runs if run["settings"]["method"] == "full"}
    candidates = []
    for rate in sorted(rates):
        candidates.append(select(runs, method="full", rank=None, scaling=None, learning_rate=rate))
    return max(candidates, key=lambda group: mean_accuracy(group, "held-out"))


def methods(runs: list[dict]) -> dict[str, list[dict]]:
    """Select the runs of every method of both lessons: {name: runs}, at the default rank."""
    groups = {
        "head alone, pooled output": head_only(runs),
        "head alone, mean of tokens": head_only(runs, "mean of tokens"),
        "LoRA": select(runs),
    }
    for bits in (8, 4, 3, 2):
        groups[f"q-LoRA, {bits} bits"] = select(runs, method="qlora", bits=bits)
    groups["q-LoRA, 4 bits, int8 base"] = select(runs, method="qlora", bits=4, base_bits=8)
    groups["q-LoRA, 4 bits, NF4 base"] = select(runs, method="qlora", bits=4, base_bits=4)
    groups["full fine-tuning"] = full_fine_tuning(runs)
    return groups


def head_bytes(runs: list[dict]) -> int:
    """Return the bytes of the classifier head in float32. A run's "bytes" do not include them."""
    return 4 * head_only(runs)[0]["trained_parameters"]


def round_to_float16(runs: list[dict]) -> list[dict]:
    """Return LoRA runs as they are after their trained A and B are rounded to float16.

    The rounded adapters were evaluated on the validation sentences only, so there are no other results.
    A and B take half the bytes. Only the default at rank 1 and at rank 4 was rounded to float16.
    """
    rounded = []
    for run in runs:
        results = {"validation": run["float16"]}
        rounded.append(run | {"results": results, "bytes": run["bytes"] // 2})
    return rounded


def round_after_training(runs: list[dict], way: str, bits: int) -> list[dict]:
    """Return LoRA runs as they are after their trained A and B are rounded to a few bits.

    The rounded adapters were evaluated on the validation sentences only, so there are no other results.

    Args:
        runs: runs with the default settings. No others were rounded.
        way: how A and B were rounded: "absmax", "half steps" or "together".
        bits: 8, 4, 3 or 2.
    """
    rounded = []
    for run in runs:
        results = {"validation": run["rounded"][way][str(bits)]}
        rounded.append(run | {"results": results})
    return rounded


def accuracies(runs: list[dict], where: str = "validation") -> list[float]:
    """Return the accuracy of each run in %, on "validation" or "held-out"."""
    return [100 * run["results"][where]["accuracy"] for run in runs]


def mean_accuracy(runs: list[dict], where: str = "validation") -> float:
    """Return the mean accuracy of the runs in %, on "validation" or "held-out"."""
    return statistics.fmean(accuracies(runs, where))


def right_answers(run: dict, where: str = "validation") -> list[bool]:
    """Return for every sentence whether the run's label is right."""
    return [character == "1" for character in run["results"][where]["right"]]


def compare_seeds(first: list[dict], second: list[dict], where: str = "validation") -> list[McNemarResult]:
    """Test with McNemar's test, for each seed, whether the runs of two settings differ.

    Args:
        first, second: the runs of two settings, with the same seeds in the same order.
        where: the sentences to compare on, "validation" or "held-out".

    Raises ValueError where the seeds are not the same.
    """
    first_seeds = [run["seed"] for run in first]
    second_seeds = [run["seed"] for run in second]
    if first_seeds != second_seeds:
        raise ValueError(f"the seeds are {first_seeds} and {second_seeds}: compare runs of the same seeds")
    tests = []
    for one, other in zip(first, second, strict=True):
        tests.append(_test_right_answers(right_answers(one, where), right_answers(other, where)))
    return tests


def mean_difference(first: list[dict], second: list[dict], where: str = "validation") -> tuple[float, float, float]:
    """Return the mean over seeds of first minus second, in points of accuracy, and its 95 % interval.

    Args:
        first, second: the runs of two settings, with the same seeds in the same order.
        where: the sentences to compare on, "validation" or "held-out".
    """
    pairs = zip(accuracies(first, where), accuracies(second, where), strict=True)
    return t_interval([one - other for one, other in pairs])


def difference_in_words(first: list[dict], second: list[dict], where: str = "validation") -> str:
    """Say `mean_difference` in words: "+1.0 points (95 % interval +0.3 to +1.7)"."""
    return "{:+.1f} points (95 % interval {:+.1f} to {:+.1f})".format(*mean_difference(first, second, where))


def t_interval(values: list[float]) -> tuple[float, float, float]:
    """Return the mean of a few values and its 95 % interval, by Student's t.

    For differences between seeds, the interval covers the seeds, and not the choice of sentences.
    """
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, -math.inf, math.inf
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return mean, mean - half, mean + half


def describe(runs: list[dict]) -> str:
    """Say in one line what the runs were trained on: model, data, phrases, seeds and machine."""
    first = runs[0]
    model = first["model"].rpartition("/")[2]
    device = first["machine"]["device"].replace("1 CPU threads", "CPU")
    number = len({run["seed"] for run in runs})
    seeds = "1 seed" if number == 1 else f"{number} seeds"
    instructions = first["machine"]["isa"]
    return f"{model}, {first['data']}, {first['trained_on']:,} phrases, {seeds}; {device}, {instructions}"
