"""PEFT as an oracle: the same base, the same A, B and head, the same batch, float32."""

import pytest
import torch
from conftest import randomise
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import BertForSequenceClassification

from lora_utils import LoRABertModel, offline_model

TARGETS = [["query", "value"], ["query", "dense"], "all-linear"]


def pair(folder, rank, targets):
    """(ours, PEFT's) with the same random A, B and head."""
    ours = LoRABertModel(str(folder), rank=rank, alpha=12, target_modules=targets, dtype=torch.float32)
    randomise(ours, seed=rank).eval()
    base = BertForSequenceClassification.from_pretrained(folder)
    config = LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=12, target_modules=targets, lora_dropout=0.0)
    theirs = get_peft_model(base, config).eval()
    loaded = set_peft_model_state_dict(theirs, ours.adapter_state())
    assert not loaded.unexpected_keys
    return ours, theirs


def their_parameter(theirs, name):
    """PEFT's live parameter for a name in its file format."""
    name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
    return theirs.get_parameter(name.replace(".classifier.", ".classifier.modules_to_save.default."))


@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 64])
def test_logits_and_gradients_equal_pefts(bert, batch, rank, targets):
    ours, theirs = pair(bert, rank, targets)
    our_output, their_output = ours(**batch), theirs(**batch)
    torch.testing.assert_close(our_output.logits, their_output.logits, atol=1e-5, rtol=1e-5)
    our_output.loss.backward()
    their_output.loss.backward()
    state = ours.adapter_state()
    assert len(state) == 2 * len(ours.lora_layers()) + 2
    assert sum(p.requires_grad for p in theirs.parameters()) == len(state)
    for name, parameter in state.items():
        expected = their_parameter(theirs, name).grad
        assert expected.norm() > 0
        assert (parameter.grad - expected).norm() < 1e-4 * expected.norm(), name


def test_the_packaged_bert_with_an_adapter_equals_pefts(batch):
    ours, theirs = pair(offline_model(), 8, ["query", "value"])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_peft_loads_what_we_save(bert, batch, tmp_path, targets):
    ours, _ = pair(bert, 4, targets)
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**batch).logits, ours(**batch).logits, atol=1e-5, rtol=1e-5)


def test_we_load_what_peft_saves(bert, batch, tmp_path):
    _, theirs = pair(bert, 4, ["query", "value"])
    theirs.save_pretrained(tmp_path)
    ours = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)
