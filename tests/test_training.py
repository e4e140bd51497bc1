"""What training reaches, with the packaged BERT; slow."""

import statistics
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import lora_utils

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import accuracy


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
