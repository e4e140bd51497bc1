"""Compare with PEFT: the same base, the same A, B and head, the same batch, float32."""

import pytest
import torch
from conftest import randomise
from peft import AutoPeftModelForSequenceClassification, LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import BertForSequenceClassification

from lora_lab.sources import packaged_checkpoint
from lora_utils import LoRABertModel

TARGETS = [["query", "value"], ["query", "dense"], "all-linear", r".*\.1\.attention\.self\.(query|key)"]
TRIPS = [(targets, rank, False) for targets in TARGETS for rank in (1, 8, 64)]
TRIPS += [(["query", "value"], rank, True) for rank in (1, 8, 64)]


def pair(folder, rank, targets, use_rslora=False):
    """Return our model and PEFT's with the same random A, B and head."""
    options = {"target_modules": targets, "use_rslora": use_rslora}
    ours = LoRABertModel(str(folder), rank=rank, alpha=12, dtype=torch.float32, **options)
    randomise(ours, seed=rank).eval()
    base = BertForSequenceClassification.from_pretrained(folder)
    theirs = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=rank, lora_alpha=12, **options)).eval()
    loaded = set_peft_model_state_dict(theirs, ours.adapter_state())
    assert not loaded.unexpected_keys
    return ours, theirs


def their_parameter(theirs, name):
    """Return PEFT's live parameter for a name in its file format."""
    name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
    return theirs.get_parameter(name.replace(".classifier.", ".classifier.modules_to_save.default."))


@pytest.mark.parametrize("targets", [*TARGETS[:3], "packaged"], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 64])
def test_logits_and_gradients_equal_pefts(bert, batch, rank, targets):
    folder, targets = (packaged_checkpoint(), TARGETS[0]) if targets == "packaged" else (bert, targets)
    ours, theirs = pair(folder, rank, targets)
    our_output = ours(**batch)
    their_output = theirs(**batch)
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


@pytest.mark.parametrize("targets, rank, use_rslora", TRIPS, ids=str)
@torch.no_grad()
def test_each_loads_what_the_other_saves_and_merges_it_to_the_same(bert, batch, tmp_path, targets, rank, use_rslora):
    ours, theirs = pair(bert, rank, targets, use_rslora)
    expected = ours(**batch).logits
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    their_copy = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    with pytest.warns(UserWarning, match="could not be verified"):
        our_copy = LoRABertModel.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    assert our_copy.options | {"target_modules": None} == ours.options | {"target_modules": None}
    for model in (their_copy, our_copy, our_copy.merge_and_unload(), their_copy.merge_and_unload()):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_adapter_that_peft_stored_in_16_bits_is_read(bert, tmp_path):
    _, theirs = pair(bert, 4, ["query", "value"])
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="could not be verified"):
        ours = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in ours.adapter_state().items():
        assert torch.equal(tensor, their_parameter(theirs, name).float())
