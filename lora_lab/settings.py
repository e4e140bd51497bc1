"""Check the notebooks' parameters once, in the cell after them, before anything takes time."""

import difflib
import math
import re


def check_settings(settings: dict) -> None:
    """Refuse parameters of a notebook that cannot work.

    Args:
        settings: {name: value}, such as a notebook's `globals()`.

    Raises ValueError for the first wrong value or misspelt name, and says what is allowed. A notebook sets MACHINE
    after this check. Before that, any other constant, and any name close to a parameter's, counts as misspelt.
    """
    for name, value in settings.items():
        if name in RULES or "MACHINE" in settings or not isinstance(value, CONSTANTS):
            continue
        wanted = difflib.get_close_matches(name.upper(), RULES, 1, cutoff=0.8)
        if wanted or re.fullmatch("[A-Z][A-Z0-9_]+", name):
            allowed = f"allowed is {wanted[0]}" if wanted else f"allowed are {', '.join(RULES)}"
            raise ValueError(f"{name} is {value!r}, but no parameter has this name: {allowed}")
    for name, (is_right, allowed) in RULES.items():
        if name in settings and not is_right(settings[name]):
            raise ValueError(f"{name} is {settings[name]!r}: it must be {allowed}")


def number_of_sentences(wanted: int | str | None, model, total: int) -> int:
    """Return how many of `total` training sentences to train on: `wanted`, or what fits into a sitting for None."""
    if wanted is None:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        slow = parameters > LARGE and next(model.parameters()).device.type == "cpu"
        wanted = FEW if slow else MANY
    return total if wanted == "all" else min(wanted, total)


def _is_whole(value, least):
    return type(value) is int and value >= least


def _is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value):
    return isinstance(value, str) and value.strip() != ""


def _is_targets(value):
    if isinstance(value, str):
        is_pattern = any(letter in value for letter in ".*+?[](){}|\\^$")
        return value == "all-linear" or is_pattern
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(_is_text, value))


def _is_seeds(value):
    return isinstance(value, (list, tuple)) and all(_is_whole(seed, 0) for seed in value)


MANY, FEW = 6_000, 2_000  # sentences to train on if nobody says how many
LARGE = 50_000_000  # parameters: BERT-base has 110 million, the packaged BERT 23
CONSTANTS = (int, float, str, list, tuple, type(None))  # what a parameter can be
# {parameter: (whether a value is right, what is allowed)}
RULES = {
    "MODEL": (_is_text, 'the id of a BERT on the hub, a folder, or "auto"'),
    "DATASET": (_is_text, 'a folder, "sst2", or "auto"'),
    "RANK": (lambda value: _is_whole(value, 1), "a whole number of 1 or more, such as 8"),
    "ALPHA": (lambda value: _is_number(value) and value > 0, "a number above 0, such as 16.0"),
    "DROPOUT": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 up to, but below, 1"),
    "BITS": (lambda value: _is_whole(value, 2) and value <= 8, "a whole number from 2 to 8"),
    "BASE_BITS": (lambda value: value is None or (_is_whole(value, 1) and value in (4, 8)), "4, 8 or None"),
    "TARGETS": (_is_targets, 'a list such as ["query"], a regular expression, or "all-linear"'),
    "LEARNING_RATE": (lambda value: _is_number(value) and value > 0, "a number above 0, such as 2e-3"),
    "EPOCHS": (lambda value: _is_whole(value, 1), "a whole number of 1 or more"),
    "BATCH_SIZE": (lambda value: _is_whole(value, 1), "a whole number of 1 or more"),
    "TRAIN_SENTENCES": (
        lambda value: value is None or value == "all" or _is_whole(value, 1),
        'a whole number of 1 or more, "all", or None for a number that fits the model',
    ),
    "SEED": (lambda value: _is_whole(value, 0), "a whole number of 0 or more"),
    "SWEEP_SEEDS": (_is_seeds, "a list of whole numbers of 0 or more, such as [0, 1, 2], or []"),
}
