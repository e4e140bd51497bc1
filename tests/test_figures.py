"""Test the figures that are drawn from the committed runs."""

import io

import pytest
from conftest import ROOT
from PIL import Image

from lora_lab import compare, figures

RUNS = compare.read_runs(ROOT / "benchmarks" / "results" / "sweep.jsonl")


@pytest.mark.parametrize("name", ["ranks", "scaling_and_rate", "targets", "update", "bits", "budgets", "whole"])
def test_a_figure_is_small_and_sharp_and_has_an_alternative_text(name, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", shown.append)
    figures.set_style()
    getattr(figures, f"draw_{name}")(RUNS)
    (image,) = shown
    assert len(image.data) < 150_000
    assert Image.open(io.BytesIO(image.data)).width == pytest.approx(2 * image.width, abs=1)
    alt = image._repr_mimebundle_()[1]["image/png"]["alt"]
    assert alt[0].isupper() and alt.endswith(".") and 50 < len(alt) < 300


def test_settings_with_which_nothing_was_learned_are_drawn_too(monkeypatch):
    monkeypatch.setattr(figures, "display", lambda image: None)
    runs = [run | {"results": {**run["results"], "validation": nothing_learned(run)}} for run in RUNS]
    figures.draw_scaling_and_rate(runs)


def nothing_learned(run):
    validation = run["results"]["validation"]
    return validation | {"labels": "0" * len(validation["labels"])}
