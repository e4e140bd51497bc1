"""Test the figures that are drawn from the committed runs."""

import io

import pytest
from conftest import ROOT
from PIL import Image

from lora_lab import compare, figures

RUNS = compare.read_runs(ROOT / "benchmarks" / "results" / "sweep.jsonl")


@pytest.fixture
def shown(monkeypatch):
    """Return the list of images that are displayed."""
    images = []
    monkeypatch.setattr(figures, "display", images.append)
    figures.set_style()
    return images


@pytest.mark.parametrize("name", ["ranks", "scaling_and_rate", "targets", "update", "bits", "budgets", "whole"])
def test_a_figure_is_small_and_sharp_and_has_an_alternative_text(name, shown):
    getattr(figures, f"draw_{name}")(RUNS)
    (image,) = shown
    assert len(image.data) < 150_000
    assert Image.open(io.BytesIO(image.data)).width == pytest.approx(2 * image.width, abs=1)
    alt = image._repr_mimebundle_()[1]["image/png"]["alt"]
    assert alt[0].isupper() and alt.endswith(".") and 50 < len(alt) < 300


@pytest.mark.parametrize("kept", figures.HEADS)
def test_a_figure_needs_only_one_kind_of_head(kept, shown):
    runs = []
    for run in RUNS:
        is_head = run["settings"]["method"] in figures.HEADS
        runs.append(run | {"settings": run["settings"] | {"method": kept}} if is_head else run)
    figures.draw_ranks(runs)
    figures.draw_whole(runs)
    assert len(shown) == 2


def test_a_figure_can_be_written_to_a_file(shown, tmp_path):
    figures.draw_whole(RUNS, file=tmp_path / "whole.png", metadata={"Source": "a sweep"})
    with Image.open(tmp_path / "whole.png") as image:
        assert image.text["Source"] == "a sweep" and shown == []
