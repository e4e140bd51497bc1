"""Check that a saved adapter loads whole or is refused, and that adapters can be exchanged in place."""

import hashlib
import json
import os
import warnings

import pytest
import torch
from conftest import ROOT, full_disk, randomise, refused
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, pipeline

from lora_utils import LoRABertModel, LoRALayer, QuantizedLoRALayer, qLoRABertModel

CONFIG, TENSORS = LoRABertModel.FILES
A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.bias"


def lora(bert, **options):
    return randomise(LoRABertModel(str(bert), dtype=torch.float32, **options)).eval()


def qlora(bert, **options):
    return randomise(qLoRABertModel(str(bert), dtype=torch.float32, **{"bits": 4, **options})).eval()


def configured(**changes):
    """Return a damage that changes fields of the config. None removes a field."""

    def damage(folder):
        file = next(folder.glob("*_config.json"))
        config = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({n: value for n, value in config.items() if n not in changes or value is not None}))

    return damage


def read_record(folder):
    """Return what the tensors' metadata say of an adapter in a folder."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as opened:
        return json.loads(opened.metadata().get("lora_utils", "null"))


def stored(change=lambda tensors: None, record=lambda record: record):
    """Return a damage that changes the tensors, and their record, by functions."""

    def damage(folder):
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        change(tensors)
        new = record(read_record(folder))
        save_file(tensors, file, {"format": "pt"} | ({"lora_utils": json.dumps(new)} if new else {}))

    return damage


without_record = stored(record=lambda record: None)


def of_peft(**changes):
    """Return a damage that changes fields of the config and removes our record, so that the folder is as PEFT's."""

    def damage(folder):
        without_record(folder)
        configured(**changes)(folder)

    return damage


def as_pickle(folder):
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


# What is wrong, how it is made, what our message says, what PEFT does with the same folder.
DAMAGES = [
    ("no config", lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json", "refuses"),
    ("no tensors", lambda folder: (folder / TENSORS).unlink(), "no adapter_model.safetensors", "refuses"),
    ("a pickle for tensors", as_pickle, "no adapter_model.safetensors", "loads"),
    ("a config cut short", lambda folder: (folder / CONFIG).write_text('{"r": 8, '), "no JSON object", "refuses"),
    ("a config that is a list", lambda folder: (folder / CONFIG).write_text("[1]"), "no JSON object", "refuses"),
    ("tensors cut short", lambda folder: os.truncate(folder / TENSORS, 99), "no whole safetensors file", "refuses"),
    ("another alpha", configured(lora_alpha=99), "lora_alpha=99.*16", "loads"),
    ("another scaling", configured(use_rslora=True), "use_rslora=True.*False", "loads"),
    ("another rank", configured(r=4), "r=4.*8", "refuses"),
    ("fewer targets", configured(target_modules=["query"]), "target_modules=.*'value'", "loads"),
    ("another base", stored(record=lambda r: r | {"base_sha256": "000"}), "the SHA-256 000, .*load it into", "loads"),
    ("a tensor missing", stored(lambda t: t.pop(A)), f"{A}=nothing, but 'float32 .8, 64.' is expected", "loads"),
    ("a tensor too many", stored(lambda t: t.update(x=t[A] + 1)), "x='float32 .8, 64.', but nothing is", "loads"),
    ("the head missing", stored(lambda t: t.pop(HEAD)), f"{HEAD}=nothing, but 'float32 .2,.' is expected", "refuses"),
    ("another shape", stored(lambda t: t.update({A: t[A][:, :-1].clone()})), r"\(8, 63\).*\(8, 64\)", "refuses"),
    ("integers for floats", stored(lambda t: t.update({A: t[A].char()})), "int8", "loads"),
    ("a NaN", stored(lambda t: t[A].view(-1)[3].fill_(float("nan"))), "not finite", "loads"),
    ("an infinity", stored(lambda t: t[HEAD].fill_(float("inf"))), "not finite", "loads"),
    ("16 bits where 32 were written", stored(lambda t: t.update({A: t[A].half()})), "float16", "loads"),
    ("a training run", stored(record=lambda record: {"settings": {}}), "record of something else", "loads"),
    # What PEFT has and we have not.
    ("not LoRA", of_peft(peft_type="IA3"), "peft_type='IA3'; allowed is 'LORA'", "loads"),
    ("DoRA", of_peft(use_dora=True), "use_dora=True; allowed is to leave it out", "loads"),
    ("trained biases", of_peft(bias="lora_only"), "bias='lora_only'; allowed is 'none'", "loads"),
    ("ranks by layer", of_peft(rank_pattern={"query": 2}), "rank_pattern=.*; allowed is", "refuses"),
    ("another task", of_peft(task_type="TOKEN_CLS"), "task_type='TOKEN_CLS'; allowed is", "loads"),
    ("a base changed by its start", of_peft(init_lora_weights="pissa"), "'pissa'; allowed is", "loads"),
    ("an option of tomorrow", of_peft(use_magic=True), "use_magic=True; allowed is", "loads"),
]
REFUSALS = [(lora, damage, message) for _, damage, message, _ in DAMAGES]
REFUSALS += [
    (qlora, without_record, "no record"),
    (qlora, configured(bits=8), "bits=8.*4"),
    (qlora, configured(shift=1), "shift=1.*nothing"),
    (qlora, stored(lambda t: next(t[n] for n in t if "scales" in n).fill_(float("inf"))), "not finite"),
    (qlora, stored(lambda t: t.update({n: t[n].float() for n in t if "codes" in n})), "float32"),
]


@pytest.mark.parametrize("make, damage, message", REFUSALS, ids=[message for *_, message in REFUSALS])
def test_a_damaged_or_foreign_folder_is_refused_and_the_model_stays(bert, batch, tmp_path, make, damage, message):
    make(bert).save_pretrained(tmp_path)
    damage(tmp_path)
    model = make(bert, rank=2)
    before = model(**batch).logits
    layers = model.lora_layers()
    for load in (type(model).from_pretrained, model.load_adapter):
        with pytest.raises(ValueError, match=message) as refusal:
            load(tmp_path)
        assert str(tmp_path) in str(refusal.value)
    assert torch.equal(model(**batch).logits, before) and model.lora_layers() == layers


@pytest.mark.slow
def test_peft_does_with_the_same_folders_what_the_table_and_the_readme_say(bert, tmp_path):
    """Show why we check: PEFT loads silently much of what we refuse. Its format is not at fault."""
    found = {}
    for what, damage, *_ in DAMAGES:
        lora(bert).save_pretrained(tmp_path / what)
        damage(tmp_path / what)
        with warnings.catch_warnings(action="ignore"):
            try:
                PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path / what)
                found[what] = "loads"
            except Exception:  # of many kinds
                found[what] = "refuses"
    assert found == {what: peft for what, *_, peft in DAMAGES}
    refused = list(found.values()).count("refuses")
    claim = f"of its {len(DAMAGES)} kinds of damage PEFT refuses {refused} and loads {len(DAMAGES) - refused}."
    assert claim in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_a_folder_of_pefts_gets_pefts_defaults_and_a_warning_of_what_could_not_be_verified(bert, batch, tmp_path):
    other = lora(bert)
    other.save_pretrained(tmp_path)
    of_peft(base_model_name_or_path="a-small-bert", use_rslora=None, lora_dropout=None)(tmp_path)
    model = lora(bert, use_rslora=True, dropout=0.5)
    with pytest.warns(UserWarning, match="could not be verified") as caught:
        model.load_adapter(tmp_path)
        LoRABertModel.from_pretrained(tmp_path, model_name=str(bert))
    assert torch.equal(model.train()(**batch).logits, other(**batch).logits)
    assert len(caught) == 2
    for warning in caught:
        for part in (str(tmp_path), "PEFT", "a-small-bert", "scaling", model.model_name):
            assert part in str(warning.message)

    of_peft(target_modules="(")(tmp_path)
    refused(r"target_modules is '\(', no regular expression", model.load_adapter, tmp_path)


@pytest.mark.parametrize("make", [lora, qlora])
def test_an_adapter_of_ours_loads_in_silence_by_its_record_of_the_config_and_the_base(bert, tmp_path, make, capsys):
    with warnings.catch_warnings(action="error"):
        model = make(bert)
        model.save_pretrained(tmp_path)
        type(model).from_pretrained(tmp_path).load_adapter(tmp_path)
    assert capsys.readouterr().out == ""
    expected = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    config = json.loads((tmp_path / model.FILES[0]).read_text())
    assert read_record(tmp_path) == {"config": config, "base_sha256": expected} and model.fingerprint == expected


def test_each_class_refuses_the_others_folder_and_says_what_is_there(bert, tmp_path):
    lora(bert).save_pretrained(tmp_path / "float")
    qlora(bert).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"no quantized_config\.json.*holds adapter_config\.json"):
        qLoRABertModel.from_pretrained(tmp_path / "float")
    for load in (PeftModel.from_pretrained, LoRABertModel.load_adapter):
        refused("adapter_config", load, lora(bert), tmp_path / "packed")
    refused(r"base_bits=None.*4", qlora(bert, base_bits=4).load_adapter, tmp_path / "packed")


def test_an_adapter_on_another_base_is_refused_and_one_on_a_base_that_was_moved_is_not(bert, own_bert, batch, tmp_path):
    model = lora(bert)
    model.save_pretrained(tmp_path / "adapter")
    for where in ({"model_name": str(own_bert)}, {"folder": own_bert}):
        loaded = LoRABertModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32, **where)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    stored(lambda tensors: next(iter(tensors.values())).view(-1)[7].add_(1e-3))(own_bert)
    for where in ({"model_name": str(own_bert)}, {"folder": own_bert}):
        with pytest.raises(ValueError, match=f"trained on a base with the SHA-256 {model.fingerprint}"):
            LoRABertModel.from_pretrained(tmp_path / "adapter", **where)


@pytest.mark.parametrize("make", [lora, qlora])
def test_an_adapter_names_its_base_but_not_its_folder_and_asks_for_one_that_is_gone(bert, batch, tmp_path, make):
    model = make("a/bert", folder=bert)
    model.save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert b"a/bert" in file.read_bytes() and bytes(bert) not in file.read_bytes()
    refused(r"'a/bert'.* another by model_name=", type(model).from_pretrained, tmp_path)
    configured(base_model_name_or_path=None)(tmp_path)
    refused("as model_name", type(model).from_pretrained, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch.float32, model_name="a/bert", folder=bert)
    assert loaded.model_name == "a/bert" and torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("make", [lora, qlora])
def test_a_save_that_fails_leaves_the_old_adapter_as_it_was(bert, batch, tmp_path, make):
    old = make(bert)
    old.save_pretrained(tmp_path)
    other = make(bert, rank=3)
    with full_disk(room=2000), pytest.raises(OSError, match="large"):  # the config still fits
        other.save_pretrained(tmp_path)
    other.model.classifier.bias.data[0] = float("nan")
    refused(r"classifier\.bias holds nan, which is not finite", other.save_pretrained, tmp_path)
    loaded = type(old).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, old(**batch).logits)
    assert {file.name for file in tmp_path.iterdir()} == set(old.FILES)  # the disk is not left full


@pytest.mark.parametrize("make, layer", [(lora, LoRALayer), (qlora, QuantizedLoRALayer)])
def test_load_adapter_exchanges_layers_and_head_and_keeps_the_base(bert, batch, tmp_path, make, layer):
    wide = {"rank": 16, "alpha": 3, "target_modules": ["key", "dense"], "num_labels": 3, "use_rslora": True}
    others = {"wide": make(bert, dropout=0.5, **wide), "thin": make(bert, rank=1)}
    for name, other in others.items():
        other.save_pretrained(tmp_path / name)
    model = make(bert)
    for name in ("wide", "thin", "wide"):
        for old in model.lora_layers().values():
            old.merge()
        model.load_adapter(tmp_path / name)
        number = 3 if name == "wide" else 2
        inputs = batch | {"labels": batch["labels"] + number - 2}
        assert torch.equal(model(**inputs).logits, others[name](**inputs).logits)
        assert model.config.num_labels == model.merge_and_unload().config.num_labels == number
        assert not any(module.training for module in model.modules())
        assert model.lora_layers().keys() == others[name].lora_layers().keys()
        for found in model.lora_layers().values():
            assert type(found) is layer and found.rank == others[name].options["rank"]
    model.save_pretrained(tmp_path / "again")  # this refuses a base that has changed
    again = type(model).from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    if make is qlora:
        again.unpack()
    again(**batch).loss.backward()
    for name, parameter in again.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name or "classifier" in name), name


def test_merged_and_saved_a_pipeline_gives_the_same_labels_and_scores(bert, tokenizer, tmp_path):
    model = lora(bert)
    model.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)
    for sentence in ("a film to remember", "a film to forget, and soon", "holes"):
        expected = model(**tokenizer([sentence], return_tensors="pt")).logits.softmax(-1)[0].tolist()
        found = {answer["label"]: answer["score"] for answer in classify([sentence])[0]}
        assert found == pytest.approx(dict(zip(["NEGATIVE", "POSITIVE"], expected, strict=True)), abs=1e-5)
