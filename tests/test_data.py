"""Check the data: where it comes from, its batches, what is measured on it, and the phrases of this project."""

import itertools
from collections import Counter

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from lora_lab.compare import mcnemar
from lora_lab.sources import MOVIE_PHRASES, load_sst2
from lora_utils import LengthGroupedBatches, make_loader, wilson_interval

ROWS = [{"sentence": f"sentence {'very ' * i}long", "label": i % 2, "idx": i} for i in range(7)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=400), st.integers(1, 9), st.booleans(), st.integers(0, 9))
def test_an_epoch_holds_every_sentence_once(lengths, batch_size, shuffle, number):
    epoch, seed = divmod(number, 3)
    batches = LengthGroupedBatches(lengths, batch_size, shuffle, seed)
    batches.set_epoch(epoch)
    order = list(batches)
    assert sorted(i for batch in order for i in batch) == list(range(len(lengths)))
    assert len(order) == len(batches) and all(0 < len(batch) <= batch_size for batch in order)
    batches.set_epoch(epoch, start=1)
    assert list(batches) == order[1:]


def batch_order(lengths, seed=0, epoch=0):
    batches = LengthGroupedBatches(lengths, 16, shuffle=True, seed=seed)
    batches.set_epoch(epoch)
    return list(batches)


def test_batches_reproduce_under_a_seed_and_change_with_seed_and_epoch():
    lengths = torch.randint(3, 50, (500,)).tolist()
    assert batch_order(lengths) == batch_order(lengths)
    assert len({str(batch_order(lengths, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_batches_hold_sentences_of_similar_length_and_short_and_long_ones_are_mixed():
    lengths = torch.randint(3, 50, (3200,))
    longest = torch.tensor([int(lengths[batch].max()) for batch in batch_order(lengths)]).float()
    at_random = sum(int(batch.max()) * len(batch) for batch in lengths.split(16))
    assert 16 * longest.sum() < 1.1 * lengths.sum() < 0.8 * at_random
    first, second = longest.split(len(longest) // 2)
    assert abs(first.mean() - second.mean()) < 8


def test_a_loader_pads_to_the_longest_of_the_batch_and_loses_no_sentence(tokenizer):
    split = datasets.Dataset.from_list(ROWS)
    for shuffle in (False, True):
        seen = Counter()
        for batch in make_loader(split, tokenizer, batch_size=3, shuffle=shuffle):
            assert batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                seen[tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)] += 1
        assert seen == Counter(row["sentence"] for row in ROWS)


def test_an_empty_list_of_sentences_and_a_batch_size_of_zero_are_refused(tokenizer):
    split = datasets.Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="list of sentences is empty"):
        make_loader(split.select([]), tokenizer)
    for size in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"batch_size is {size}"):
            make_loader(split, tokenizer, batch_size=size)


def test_the_interval_is_wilsons_never_leaves_its_share_outside_and_needs_a_share():
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
    table = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for right, n, low, high in table:
        assert wilson_interval(right, n) == pytest.approx((low, high), abs=5e-5)
        assert wilson_interval(n - right, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)
    for right, n in itertools.product((0, 1), range(1, 200)):
        low, high = wilson_interval(right * n, n)
        assert 0 <= low <= right <= high <= 1
    for right, n in ((0, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match=f"{right} right of {n}"):
            wilson_interval(right, n)


def test_mcnemars_test_is_the_binomial_test_on_the_sentences_that_only_one_has_right():
    labels, wrong = [0, 1] * 50, [1, 0] * 50
    for first_only, second_only in ((0, 0), (1, 0), (5, 5), (3, 14), (20, 6)):
        n = first_only + second_only
        first = wrong[:second_only] + labels[second_only:-1] + wrong[-1:]
        second = labels[:second_only] + wrong[second_only:n] + labels[n:-1] + wrong[-1:]  # the last: both wrong
        expected = binomtest(first_only, n).pvalue if n else 1.0
        compared = mcnemar(first, second, labels)
        assert compared.p == pytest.approx(expected)
        assert (compared.first_only, compared.second_only) == (first_only, second_only)
        assert ("no difference can be seen" in str(compared)) == (expected >= 0.05)
    with pytest.raises(ValueError, match="2 and 3 predictions for 3 labels"):
        mcnemar([0, 1], [0, 1, 1], [0, 1, 1])


@pytest.mark.slow
def test_a_bag_of_words_and_pairs_does_not_solve_movie_phrases():
    train, validation = load_sst2(MOVIE_PHRASES, announce=False).values()
    vectors = CountVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(max_iter=2000)
    model.fit(vectors.fit_transform(train["sentence"]), train["label"])
    assert model.score(vectors.transform(validation["sentence"]), validation["label"]) <= 0.65
