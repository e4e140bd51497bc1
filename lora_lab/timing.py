"""Say how long a notebook will take, before it takes that long."""

import itertools
import time

import torch

STEPS = 6  # batches that are timed
FIXED = (40, 20)  # seconds of core and rest for imports, loading and drawing, whatever is trained


def print_estimate(model, train_loader, validation_loader, core, rest) -> float:
    """Time a few batches, print how long the notebook will take on this machine, and return the minutes of all of it.

    Args:
        model: a `LoRABertModel`. It does not change, and neither does the random state.
        train_loader, validation_loader: from `make_loader`.
        core, rest: what each part of the notebook does: (sentences trained on, evaluations of all validation
            sentences).
    """
    trained = _seconds_per_token(model, train_loader, training=True)
    evaluated = _seconds_per_token(model, validation_loader, training=False)
    lengths = train_loader.batch_sampler.lengths.float()
    one_sentence = trained * lengths.mean().item()
    one_evaluation = evaluated * validation_loader.batch_sampler.lengths.sum().item()
    minutes = []
    for fixed, (sentences, times) in zip(FIXED, (core, rest), strict=True):
        minutes.append((fixed + sentences * one_sentence + times * one_evaluation) / 60)
    print(
        f"On this machine: {1 / one_sentence:.0f} sentences a second in training, {one_evaluation:.0f} s an evaluation"
    )
    print(f'About {_rounded(minutes[0])} for the core, and {_rounded(minutes[1])} more for "Going further"')
    return sum(minutes)


def _rounded(minutes):
    return f"{minutes:.0f} minutes" if minutes >= 1.5 else "1 minute" if minutes >= 0.75 else f"{60 * minutes:.0f} s"


def _seconds_per_token(model, loader, training):
    """Return the seconds that a token takes, padding included: forward and back in training, else forward only."""
    device = next(model.parameters()).device
    was_training = model.training
    batches = list(itertools.islice(loader, STEPS + 1))
    timed = batches[1:] or batches
    # A GPU is slow at first with each new shape of batch. A CPU is slow only at its first step.
    warm_up = batches if device.type == "cuda" else batches[:1]
    with torch.random.fork_rng(), torch.set_grad_enabled(training):
        model.train(training)
        for batch in warm_up:
            _step(model, batch.to(device), training)
        start = time.perf_counter()
        for batch in timed:
            _step(model, batch.to(device), training)
        seconds = time.perf_counter() - start
    model.train(was_training)
    model.zero_grad()
    return seconds / sum(batch["input_ids"].numel() for batch in timed)


def _step(model, batch, training):
    loss = model(**batch).loss
    if training:
        loss.backward()
    loss.item()  # waits for a GPU
