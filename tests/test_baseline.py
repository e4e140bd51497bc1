"""The head alone, trained to its end: features, logistic regression and order are those made by hand."""

import warnings

import datasets
import numpy as np
import pytest
import torch
from conftest import randomise
from sklearn.linear_model import LogisticRegression

from lora_lab.baseline import FEATURES, frozen_features, head_alone
from lora_utils import LoRABertModel, make_loader, qLoRABertModel

SENTENCES = ["good", "a bad film", "very good , and longer than the others", "bad bad", "not a good film at all"]


def split(n, seed):
    """Make n sentences of different lengths, in no order of length."""
    drawn = np.random.default_rng(seed).integers(0, len(SENTENCES), (n, 3))
    sentences = [" ".join(SENTENCES[i] for i in row[: 1 + row[0] % 3]) for row in drawn]
    labels = [int("good" in sentence[:20]) for sentence in sentences]
    return datasets.Dataset.from_dict({"sentence": sentences, "label": labels})


@torch.no_grad()
def by_hand(model, data, tokenizer, features):
    """Encode the sentences one by one, so that nothing is padded."""
    rows = []
    for sentence in data["sentence"]:
        output = model.model.bert(**tokenizer(sentence, return_tensors="pt"))
        row = output.pooler_output if features == "pooled" else output.last_hidden_state.mean(1)
        rows.append(row[0].double().numpy())
    return np.array(rows), np.array(data["label"])


@pytest.mark.parametrize("features", FEATURES)
def test_the_head_alone_is_scikit_learns_on_features_made_by_hand(bert, tokenizer, features):
    model = LoRABertModel(bert, dtype=torch.float32).train()
    train, test = split(60, 1), split(40, 2)
    loaders = make_loader(train, tokenizer, 8, shuffle=True, seed=3), make_loader(test, tokenizer, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also scikit-learn's, that it has not converged
        result = head_alone(model, *loaders, features)
    assert model.training

    rows, labels = by_hand(model, train, tokenizer, features)
    found, its_labels = frozen_features(model, loaders[0], features)
    np.testing.assert_allclose(found, rows, atol=1e-5)
    assert its_labels.tolist() == labels.tolist()

    mean, deviation = rows.mean(0), rows.std(0)
    head = LogisticRegression(max_iter=10_000).fit((rows - mean) / deviation, labels)
    rows, labels = by_hand(model, test, tokenizer, features)
    rows = (rows - mean) / deviation
    p = head.predict_proba(rows)[np.arange(len(labels)), labels]
    assert result.predictions == head.predict(rows).tolist() and 0 < sum(result.predictions) < len(test)
    assert result.accuracy == (head.predict(rows) == labels).mean() and result.n == len(test)
    assert result.low < result.accuracy <= result.high
    assert result.loss == pytest.approx(-np.log(p).mean(), abs=1e-4)


@pytest.mark.parametrize("model_class", [LoRABertModel, qLoRABertModel])
def test_other_features_a_loader_that_drops_sentences_and_a_trained_model_are_refused(bert, tokenizer, model_class):
    model = model_class(bert)
    loader = make_loader(split(8, 0), tokenizer)
    head_alone(model, loader, loader)  # A is not 0, B is
    with pytest.raises(ValueError, match=r"'cls': allowed are 'pooled' and 'mean of tokens'"):
        head_alone(model, loader, loader, "cls")
    some = torch.utils.data.DataLoader(loader.dataset, batch_size=3, drop_last=True, collate_fn=loader.collate_fn)
    with pytest.raises(ValueError, match="draws 6 of 8 sentences: use make_loader"):
        head_alone(model, some, loader)
    randomise(model)
    with pytest.raises(ValueError, match=r"B of bert\.encoder\.layer\.0\.attention\.self\.query is not 0"):
        head_alone(model, loader, loader)
