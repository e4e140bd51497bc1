"""Train only a classifier head, to its end, on the frozen BERT's features: the baseline for LoRA."""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from lora_utils import Evaluation, LoRABertModel, wilson_interval

FEATURES = ("pooled", "mean of tokens")


@torch.inference_mode()
def frozen_features(model: LoRABertModel, loader: DataLoader, features: str = "pooled"):
    """Encode every sentence once. Return the features (n, width) and the labels (n,), in the data's order.

    Args:
        model: a fresh model, in which B is 0, so that A and B change nothing.
        loader: from `make_loader`.
        features: "pooled" is the pooler's output of [CLS], which the model's head reads.
            "mean of tokens" is the mean of the last block's output over all tokens that are not padding.

    Raises ValueError for other features, for a model with a B that is not 0, and for a loader that leaves
    sentences out or repeats them.
    """
    if features not in FEATURES:
        raise ValueError(f"features is {features!r}: allowed are {' and '.join(map(repr, FEATURES))}")
    for name, layer in model.lora_layers().items():
        if layer.low_rank()[1].any():
            raise ValueError(f"B of {name} is not 0, so it changes the BERT: give a fresh model")
    was_training = model.training
    model.eval()
    order = []
    encoded = []
    for index in loader.batch_sampler or []:
        batch = loader.collate_fn([loader.dataset[i] for i in index])
        inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
        if features == "pooled":
            found = model.encode(**inputs).float()  # (batch, width)
        else:
            tokens = model.model.bert(**inputs).last_hidden_state.float()  # (batch, tokens, width)
            mask = inputs["attention_mask"].unsqueeze(-1)  # (batch, tokens, 1)
            found = (tokens * mask).sum(1) / mask.sum(1)  # (batch, width)
        order += index
        encoded.append(found.cpu())
    model.train(was_training)
    if sorted(order) != list(range(len(loader.dataset))):
        raise ValueError(f"the loader draws {len(order)} of {len(loader.dataset)} sentences: use make_loader")
    rows = torch.cat(encoded)[torch.tensor(order).argsort()]  # (n, width), in the order of the data
    labels = torch.tensor([row["labels"] for row in loader.dataset])  # (n,)
    return rows.double().numpy(), labels.numpy()


def train_head(model: LoRABertModel, loader: DataLoader, features: str = "pooled") -> Pipeline:
    """Train a logistic regression on the frozen features until it has converged. See `frozen_features`.

    Each feature is first brought to mean 0 and variance 1 over the training data, because held-out training
    phrases prefer it. The result is still linear in the features, as the model's own head is.
    """
    head = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000))
    return head.fit(*frozen_features(model, loader, features))


def evaluate_head(
    model: LoRABertModel, loader: DataLoader, head: Pipeline, features: str = "pooled"
) -> Evaluation:  # fmt: skip
    """Measure the accuracy of a head from `train_head`, as `evaluate` measures a model's."""
    rows, labels = frozen_features(model, loader, features)
    predicted = head.predict(rows)
    n = len(labels)
    right = int((predicted == labels).sum())
    loss = log_loss(labels, head.predict_proba(rows), labels=head.classes_)
    return Evaluation(right / n, *wilson_interval(right, n), n, float(loss), predicted.tolist())


def head_alone(
    model: LoRABertModel, train_loader: DataLoader, validation_loader: DataLoader, features: str = "pooled"
) -> Evaluation:
    """Train only a head on the frozen BERT's features, and evaluate it. See `frozen_features`.

    The sentences are encoded once, because frozen features do not change. The model itself does not change.
    """
    head = train_head(model, train_loader, features)
    return evaluate_head(model, validation_loader, head, features)
