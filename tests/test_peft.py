"""Compare with PEFT: the same base, the same A, B and head, the same batch, float32."""

import subprocess
import sys

import pytest
import torch
from conftest import randomise
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from lora_lab.sources import find_model
from lora_utils import LoRABertModel

TARGETS = [["query", "value"], ["query", "dense"], "all-linear", r".*\.1\.attention\.self\.(query|key)"]
TRIPS = [(targets, rank, False) for targets in TARGETS for rank in (1, 8, 64)]
TRIPS += [(["query", "value"], rank, True) for rank in (1, 8, 64)]
UNVERIFIED = "could not be verified"


def pair(folder, rank, targets, use_rslora=False):
    """Return our model and PEFT's with the same random A, B and head."""
    ours = LoRABertModel(
        str(folder), rank=rank, alpha=12, target_modules=targets, dtype=torch.float32, use_rslora=use_rslora
    )
    randomise(ours, seed=rank).eval()
    base = BertForSequenceClassification.from_pretrained(folder)
    options = {"r": rank, "lora_alpha": 12, "target_modules": targets, "use_rslora": use_rslora}
    theirs = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", lora_dropout=0.0, **options)).eval()
    loaded = set_peft_model_state_dict(theirs, ours.adapter_state())
    assert not loaded.unexpected_keys
    return ours, theirs


def their_parameter(theirs, name):
    """Return PEFT's live parameter for a name in its file format."""
    name = name.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default.")
    return theirs.get_parameter(name.replace(".classifier.", ".classifier.modules_to_save.default."))


@pytest.mark.parametrize("targets", TARGETS[:3], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8, 64])
def test_logits_and_gradients_equal_pefts(bert, batch, rank, targets):
    ours, theirs = pair(bert, rank, targets)
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


def test_the_packaged_bert_with_an_adapter_equals_pefts(batch):
    ours, theirs = pair(find_model("auto").folder, 8, ["query", "value"])
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets, rank, use_rslora", TRIPS, ids=str)
@torch.no_grad()
def test_peft_loads_what_we_save_and_merges_it_to_the_same(bert, batch, tmp_path, targets, rank, use_rslora):
    ours, _ = pair(bert, rank, targets, use_rslora)
    ours.save_pretrained(tmp_path)
    theirs = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path).eval()
    expected = ours(**batch).logits
    for model in (theirs, ours.merge_and_unload(), theirs.merge_and_unload()):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets, rank, use_rslora", TRIPS, ids=str)
@torch.no_grad()
def test_we_load_what_peft_saves_and_merge_it_to_the_same(bert, batch, tmp_path, targets, rank, use_rslora):
    _, theirs = pair(bert, rank, targets, use_rslora)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=UNVERIFIED):
        ours = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert ours.options["rank"] == rank and ours.options["use_rslora"] == use_rslora
    assert ours.options["alpha"] == 12
    expected = theirs(**batch).logits
    for model in (ours, ours.merge_and_unload(), theirs.merge_and_unload()):
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_adapter_that_peft_stored_in_16_bits_is_read(bert, batch, tmp_path):
    _, theirs = pair(bert, 4, ["query", "value"])
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=UNVERIFIED):
        ours = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    state = {name: their_parameter(theirs, name) for name in ours.adapter_state()}
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in ours.adapter_state().items())


@pytest.mark.slow
def test_an_exported_folder_loads_with_peft_where_our_module_is_not(bert, batch, tmp_path):
    ours, _ = pair(bert, 8, "all-linear")
    ours.save_pretrained(tmp_path / "adapter")
    save_file(batch, tmp_path / "batch.safetensors")
    code = """if True:
        import importlib.util
        from peft import AutoPeftModelForSequenceClassification
        from safetensors.torch import load_file, save_file
        assert importlib.util.find_spec("lora_utils") is None
        model = AutoPeftModelForSequenceClassification.from_pretrained("adapter").eval()
        save_file({"logits": model(**load_file("batch.safetensors")).logits.detach()}, "logits.safetensors")
    """
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, capture_output=True)
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, ours(**batch).logits.detach(), atol=1e-5, rtol=1e-5)
