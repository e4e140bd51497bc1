"""Check what training reaches, with the packaged BERT. These tests are slow."""

import pytest
import sweep
import torch
from conftest import THREADS

from lora_lab.baseline import FEATURES, head_alone
from lora_lab.compare import DEFAULT
from lora_lab.rounding import WAYS, round_adapter
from lora_lab.sources import MOVIE_PHRASES, load_sst2, packaged_checkpoint
from lora_utils import evaluate, make_loader


@pytest.fixture(scope="module")
def trained(tokenizer):
    """Return a model trained on movie phrases, its accuracy, and that of the head alone on each kind of features."""
    torch.set_num_threads(THREADS)
    data = load_sst2(str(MOVIE_PHRASES))
    loader = make_loader(data["train"], tokenizer, shuffle=True)
    validation = make_loader(data["validation"], tokenizer, batch_size=64)
    model = sweep.build_model(DEFAULT, packaged_checkpoint(), seed=0)
    heads = [head_alone(model, loader, validation, features).accuracy for features in FEATURES]
    sweep.train(model, loader, learning_rate=1e-3, epochs=3)
    yield model, evaluate(model, validation).accuracy, heads
    torch.set_num_threads(1)


@pytest.mark.slow
def test_on_movie_phrases_lora_reaches_80_percent_and_beats_the_head_alone_by_5_points(trained):
    _, accuracy, heads = trained
    assert accuracy >= 0.80 and accuracy >= max(heads) + 0.05, heads


@pytest.mark.slow
def test_rounded_after_training_the_update_keeps_what_the_lesson_claims(trained):
    """Compare the relative error of B A with that of the common absmax grid, which has as many scales."""
    error = {(way, bits): round_adapter(trained[0], way, bits)[1] for way in WAYS for bits in (8, 4, 3, 2)}
    assert error["half steps", 8] <= 0.012 and error["together", 8] <= 0.012
    for bits, share in ((4, 0.85), (3, 0.65), (2, 0.45)):
        assert error["together", bits] <= share * error["absmax", bits], error
