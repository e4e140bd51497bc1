"""The notebooks' parameters are checked once, by name, before anything takes time."""

import re
from types import SimpleNamespace

import pytest
import torch

from lora_lab.settings import check_settings, number_of_sentences

WRONG = {
    **{"MODEL": ["  ", None], "DATASET": ["", 3], "SEED": [-1, None], "EPOCHS": [0, 1.0], "BATCH_SIZE": [0, None]},
    "RANK": [0, 8.0, "8", True],
    "ALPHA": [0, -1.0, float("nan"), float("inf"), "16", True],
    "DROPOUT": [1.0, -0.1, "0.1", False],
    "BITS": [1, 9, 4.0, None, True],
    "BASE_BITS": [2, 4.0, "8", True],
    "TARGETS": ["query", "", [], [""], [1], None, {"query"}],
    "LEARNING_RATE": [0, "2e-3", None],
    "TRAIN_SENTENCES": [0, 64.0, "some", True],
    "SWEEP_SEEDS": [None, 3, [-1], [0.5]],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in WRONG.items() for value in values], ids=str)
def test_a_wrong_parameter_is_refused_by_name_and_value_with_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}: it must be \S"):
        check_settings({name: value})


@pytest.mark.parametrize("name", ["rank", "RANKS", "LEARNIN_RATE", "FOO"])
def test_a_misspelt_parameter_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} is 4, but no parameter has this name: allowed .*(RANK|LEARN)"):
        check_settings({"RANK": 8, name: 4})


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(query|key)", ["query"], ("query", "output.dense")], ids=str)
def test_what_works_is_taken_and_so_is_what_the_notebook_has_set_since(targets):
    check_settings({"TARGETS": targets, "TRAIN_SENTENCES": None, "BASE_BITS": None, "SWEEP_SEEDS": [], "other": -1})
    check_settings({"RANK": 8, "MACHINE": "2 CPU threads", "CHECKPOINT_EVERY": 50, "In": [], "B": 2, "rank": 64})


@pytest.mark.parametrize(
    ("wanted", "million_parameters", "device", "number"),
    [
        *[(None, 23, "cpu", 6_000), (None, 110, "cpu", 2_000), (None, 110, "cuda", 6_000)],
        *[("all", 110, "cpu", 67_349), (64, 23, "cpu", 64), (100_000, 110, "cpu", 67_349)],
    ],
)
def test_the_number_of_sentences_fits_the_model_and_the_machine(wanted, million_parameters, device, number):
    weight = SimpleNamespace(numel=lambda: million_parameters * 10**6, device=torch.device(device))
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    assert number_of_sentences(wanted, model, 67_349) == number
