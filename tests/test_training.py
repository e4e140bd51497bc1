"""Check what training reaches, with the packaged BERT. These tests are slow."""

import statistics
from argparse import Namespace

import accuracy
import pytest
import torch
from conftest import THREADS

from lora_lab.baseline import FEATURES, head_alone
from lora_lab.rounding import WAYS, round_adapter
from lora_lab.sources import MOVIE_PHRASES, load_sst2
from lora_utils import evaluate, make_loader

SETTINGS = {
    "model": "auto",
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.0,
    "backbone_dropout": 0.0,
    "targets": ["query", "value"],
}


@pytest.fixture(autouse=True)
def all_threads():
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
def test_on_movie_phrases_lora_reaches_80_percent_and_beats_the_head_alone_by_5_points(tokenizer):
    data = load_sst2(str(MOVIE_PHRASES))
    validation = make_loader(data["validation"], tokenizer, batch_size=64)

    scores = []
    for seed in range(3):
        model = accuracy.build_model(Namespace(method="lora", **SETTINGS), seed)
        loader = make_loader(data["train"], tokenizer, shuffle=True, seed=seed)
        head = {features: head_alone(model, loader, validation, features).accuracy for features in FEATURES}
        accuracy.train(model, loader, epochs=3, learning_rate=1e-3, warmup=0.06)
        scores.append(evaluate(model, validation).accuracy)
    lora = statistics.fmean(scores)
    print(f"LoRA {lora:.1%}, head alone {head}")
    assert lora >= 0.80 and lora >= max(head.values()) + 0.05


@pytest.mark.slow
def test_rounded_after_training_the_update_keeps_what_the_lesson_claims(tokenizer):
    """Compare the relative error of B A with that of the common absmax grid, which has as many scales."""
    data = load_sst2(str(MOVIE_PHRASES))
    model = accuracy.build_model(Namespace(method="lora", **SETTINGS), seed=0)
    loader = make_loader(data["train"], tokenizer, shuffle=True, seed=0)
    accuracy.train(model, loader, epochs=2, learning_rate=1e-3, warmup=0.06)
    error = {(way, bits): round_adapter(model, way, bits)[1] for way in WAYS for bits in (8, 4, 3, 2)}
    print({key: round(value, 4) for key, value in error.items()})
    assert error["half steps", 8] <= 0.012 and error["together", 8] <= 0.012
    for bits, share in ((4, 0.85), (3, 0.65), (2, 0.45)):
        assert error["together", bits] <= share * error["absmax", bits]
