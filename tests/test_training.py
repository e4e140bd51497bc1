"""What training reaches, with the packaged BERT; slow."""

import statistics
from argparse import Namespace

import accuracy
import after_training
import pytest
import torch
from conftest import THREADS

import lora_utils


@pytest.fixture(autouse=True)
def all_threads():
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
def test_on_movie_phrases_lora_reaches_80_percent_and_beats_the_head_alone_by_5_points(tokenizer):
    data = lora_utils.load_sst2(str(lora_utils.MOVIE_PHRASES))
    validation = lora_utils.make_loader(data["validation"], tokenizer, batch_size=64)

    def mean_accuracy(method, learning_rate):
        scores = []
        for seed in range(3):
            settings = {
                "rank": 8,
                "alpha": 16.0,
                "dropout": 0.0,
                "backbone_dropout": 0.0,
                "targets": ["query", "value"],
            }
            model = accuracy.build_model(Namespace(model="auto", method=method, **settings), seed)
            loader = lora_utils.make_loader(data["train"], tokenizer, shuffle=True, seed=seed)
            accuracy.train(model, loader, epochs=3, learning_rate=learning_rate, warmup=0.06)
            scores.append(lora_utils.evaluate(model, validation).accuracy)
        return statistics.fmean(scores)

    lora, head_only = mean_accuracy("lora", 1e-3), mean_accuracy("head", 3e-2)
    print(f"LoRA {lora:.1%}, head only {head_only:.1%}")
    assert lora >= 0.80 and lora >= head_only + 0.05


@pytest.mark.slow
def test_rounded_after_training_the_update_keeps_what_the_lesson_claims(tokenizer):
    """Relative error of B A, against the common absmax grid with as many scales."""
    data = lora_utils.load_sst2(str(lora_utils.MOVIE_PHRASES))
    settings = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "backbone_dropout": 0.0, "targets": ["query", "value"]}
    model = accuracy.build_model(Namespace(model="auto", method="lora", **settings), seed=0)
    loader = lora_utils.make_loader(data["train"], tokenizer, shuffle=True, seed=0)
    accuracy.train(model, loader, epochs=2, learning_rate=1e-3, warmup=0.06)
    error = {
        (way, bits): after_training.rounded(model, way, bits)[1] for way in after_training.WAYS for bits in (8, 4, 3, 2)
    }
    print({key: round(value, 4) for key, value in error.items()})
    assert error["half steps", 8] <= 0.012 and error["together", 8] <= 0.012
    for bits, share in ((4, 0.85), (3, 0.65), (2, 0.45)):
        assert error["together", bits] <= share * error["absmax", bits]
