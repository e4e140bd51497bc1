"""The notebooks' parameters are checked once, by name, before anything takes time."""

import re
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import ROOT

from lora_lab.settings import RULES, check_settings, number_of_sentences

NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]

WRONG = [
    *({"MODEL": value} for value in ("", "  ", None, 3)),
    *({"DATASET": value} for value in ("", None)),
    *({"RANK": value} for value in (0, -1, 8.0, "8", True, None)),
    *({"ALPHA": value} for value in (0, -1.0, float("nan"), float("inf"), "16", True)),
    *({"DROPOUT": value} for value in (1.0, -0.1, float("nan"), "0.1", False)),
    *({"BITS": value} for value in (1, 9, 4.0, "4", None, True)),
    *({"BASE_BITS": value} for value in (2, 4.0, "8", True)),
    *({"TARGETS": value} for value in ("query", "", [], [""], [1], None, {"query"})),
    *({"LEARNING_RATE": value} for value in (0, -1e-3, "2e-3", None, float("nan"))),
    *({"EPOCHS": value} for value in (0, 0.5, 1.0, -1, None, "1")),
    *({"BATCH_SIZE": value} for value in (0, 32.0, None, True)),
    *({"TRAIN_SENTENCES": value} for value in (0, 64.0, "some", -5, True)),
    *({"SEED": value} for value in (-1, None, 1.0, "0")),
    *({"SWEEP_SEEDS": value} for value in (None, 3, [-1], [0.5], "0")),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_parameter_is_refused_by_name_and_value_with_what_is_allowed(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} is {re.escape(repr(value))}: it must be \S"):
        check_settings(wrong)


def test_a_bare_name_as_target_is_told_to_be_a_list():
    with pytest.raises(ValueError, match=r"TARGETS is 'query': .*\[\"query\"\]"):
        check_settings({"TARGETS": "query"})


@pytest.mark.parametrize("name", ["rank", "RANKS", "LEARNIN_RATE", "TRAIN_SENTENCE", "LR", "FOO"])
def test_a_misspelt_parameter_is_refused_by_name(name):
    with pytest.raises(
        ValueError, match=rf"^{name} is 4, but no parameter has this name: allowed (is|are) .*(RANK|LEARN|TRAIN)"
    ):
        check_settings({"RANK": 8, name: 4})


def test_running_the_cell_again_takes_what_the_notebook_has_set_since():
    check_settings(
        {"RANK": 8, "MACHINE": "2 CPU threads", "CHECKPOINT_EVERY": 50, "loader": 3, "In": [], "B": 2, "rank": 64}
    )


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(query|key)", ["query"], ("query", "output.dense")], ids=str)
def test_targets_that_the_models_take_are_taken(targets):
    check_settings({"TARGETS": targets, "TRAIN_SENTENCES": None, "BASE_BITS": None, "SWEEP_SEEDS": [], "other": -1})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_checks_every_parameter_right_after_the_cell_that_holds_them(name):
    code = [cell for cell in nbformat.read(ROOT / name, as_version=4).cells if cell.cell_type == "code"]
    number = next(i for i, cell in enumerate(code) if "parameters" in cell.metadata.get("tags", []))
    assert set(re.findall(r"^(\w+) = ", code[number].source, re.MULTILINE)) <= set(RULES)
    assert code[number + 1].source.startswith("check_settings(globals())")


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
