"""What is saved comes back whole, or is refused; adapters are exchanged in place; a training run goes on."""

import json
import os
import re
import shutil
import time
import warnings

import pytest
import torch
from conftest import ROOT, randomise
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, pipeline

import lora_utils
from lora_utils import LoRABertModel, LoRALayer, QuantizedLoRALayer, qLoRABertModel

CONFIG, TENSORS = LoRABertModel.FILES
A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.bias"


def lora(bert, **options):
    return randomise(LoRABertModel(str(bert), dtype=torch.float32, **options)).eval()


def qlora(bert, **options):
    return randomise(qLoRABertModel(str(bert), dtype=torch.float32, **{"bits": 4, **options})).eval()


def configured(**changes):
    """A damage: fields of the config are changed; None takes one away."""

    def damage(folder):
        file = next(folder.glob("*_config.json"))
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return damage


def stored(change, record=True):
    """A damage: the tensors are changed by a function; without their record, as PEFT writes them, unless it is kept."""

    def damage(folder):
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        change(tensors)
        save_file(tensors, file, metadata if record else {"format": "pt"})

    return damage


def cut(folder):
    file = folder / TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def as_pickle(folder):
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def of_another_base(folder):
    file = folder / TENSORS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    record = json.loads(metadata["lora_utils"]) | {"base": "0" * 64}
    save_file(load_file(file), file, metadata | {"lora_utils": json.dumps(record)})


def of_another_kind(folder):
    file = folder / TENSORS
    save_file(load_file(file), file, {"format": "pt", "lora_utils": json.dumps({"settings": {}})})


# what is wrong, how it is made, what our message says, what PEFT does with the same folder
DAMAGES = [
    ("no config", lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json", "refuses"),
    ("no tensors", lambda folder: (folder / TENSORS).unlink(), "no adapter_model.safetensors", "refuses"),
    ("a pickle for tensors", as_pickle, "no adapter_model.safetensors", "loads"),
    ("a config cut short", lambda folder: (folder / CONFIG).write_text('{"r": 8, '), "no JSON object", "refuses"),
    ("a config that is a list", lambda folder: (folder / CONFIG).write_text("[1]"), "no JSON object", "refuses"),
    ("tensors cut short", cut, "no whole safetensors file", "refuses"),
    ("another alpha", configured(lora_alpha=99), "lora_alpha=99.*16", "loads"),
    ("another scaling", configured(use_rslora=True), "use_rslora=True.*False", "loads"),
    ("another rank", configured(r=4), "r=4.*8", "refuses"),
    ("fewer targets", configured(target_modules=["query"]), "target_modules=.*'value'", "loads"),
    ("another base", of_another_base, "trained with base 000", "loads"),
    ("a tensor missing", stored(lambda t: t.pop(A)), f"{A} is not there", "loads"),
    ("a tensor too many", stored(lambda t: t.update({A + "x": t[A] + 1})), f"{A}x is float32", "loads"),
    ("the head missing", stored(lambda t: t.pop(HEAD)), f"{HEAD} is not there", "refuses"),
    ("another shape", stored(lambda t: t.update({A: t[A][:, :-1].clone()})), r"\(8, 63\).*\(8, 64\)", "refuses"),
    ("integers for floats", stored(lambda t: t.update({A: t[A].char()})), "int8", "loads"),
    ("a NaN", stored(lambda t: t[A].view(-1)[3].fill_(float("nan"))), "not finite", "loads"),
    ("an infinity", stored(lambda t: t[HEAD].fill_(float("inf"))), "not finite", "loads"),
    ("16 bits where 32 were written", stored(lambda t: t.update({A: t[A].half()})), "float16", "loads"),
    ("not LoRA", configured(peft_type="IA3"), "peft_type='IA3'", "loads"),
    ("DoRA", configured(use_dora=True), "use_dora=True", "loads"),
    ("trained biases", configured(bias="lora_only"), "bias='lora_only'", "loads"),
    ("ranks by layer", configured(rank_pattern={"query": 2}), "rank_pattern", "refuses"),
    ("another task", configured(task_type="TOKEN_CLS"), "task_type='TOKEN_CLS'", "loads"),
    ("a base changed by its start", configured(init_lora_weights="pissa"), "init_lora_weights='pissa'", "loads"),
    ("a training run for an adapter", of_another_kind, "record of something else", "loads"),
    ("an option of tomorrow", configured(use_magic=True), "use_magic=True", "loads"),
]


@pytest.mark.parametrize("what, damage, message, peft", DAMAGES, ids=[what for what, *_ in DAMAGES])
def test_a_damaged_or_mismatched_folder_is_refused_and_the_model_stays_as_it_was(
    bert, batch, tmp_path, what, damage, message, peft
):
    lora(bert).save_pretrained(tmp_path)
    damage(tmp_path)
    model = randomise(LoRABertModel(str(bert), dtype=torch.float32, rank=2), seed=5).eval()
    before, layers = model(**batch).logits, model.lora_layers()
    for load in (LoRABertModel.from_pretrained, model.load_adapter):
        with pytest.raises(ValueError, match=message) as refusal:
            load(tmp_path)
        assert str(tmp_path) in str(refusal.value)
    assert torch.equal(model(**batch).logits, before) and model.lora_layers() == layers


@pytest.mark.parametrize("what, damage, message, peft", DAMAGES, ids=[what for what, *_ in DAMAGES])
def test_what_peft_does_with_the_same_folder(bert, tmp_path, what, damage, message, peft):
    """Silence where we refuse is no fault of PEFT's format, but a reason to check."""
    lora(bert).save_pretrained(tmp_path)
    damage(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path)
            found = "loads"
        except Exception:  # of many kinds
            found = "refuses"
    assert found == peft


OPTIONS = [
    damage for damage in DAMAGES if "=" in damage[2] and not damage[0].startswith(("another alpha", "another sc"))
]
OPTIONS = [damage for damage in OPTIONS if damage[0] not in ("another rank", "fewer targets")]


@pytest.mark.parametrize("what, damage, message, peft", OPTIONS, ids=[what for what, *_ in OPTIONS])
def test_what_peft_has_and_we_have_not_is_refused_in_a_folder_of_pefts(bert, tmp_path, what, damage, message, peft):
    lora(bert).save_pretrained(tmp_path)
    stored(lambda tensors: None, record=False)(tmp_path)
    LoRABertModel.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*allowed is"):
        LoRABertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [5, {"a": 1}, "(", []], ids=str)
def test_targets_that_are_none_are_refused_in_a_folder_of_pefts(bert, tmp_path, targets):
    lora(bert).save_pretrained(tmp_path)
    stored(lambda tensors: None, record=False)(tmp_path)
    configured(target_modules=targets)(tmp_path)
    with pytest.raises(ValueError, match="target_modules is"):
        LoRABertModel.from_pretrained(tmp_path)


def test_what_peft_leaves_out_has_pefts_default_whatever_the_model_had(bert, batch, tmp_path):
    other = lora(bert)
    other.save_pretrained(tmp_path)
    stored(lambda tensors: None, record=False)(tmp_path)
    configured(use_rslora=None, lora_dropout=None)(tmp_path)
    model = lora(bert, use_rslora=True, dropout=0.5)
    model.load_adapter(tmp_path)
    assert torch.equal(model.train()(**batch).logits, other(**batch).logits)


@pytest.mark.parametrize("make", [lora, qlora])
def test_an_adapter_that_diverged_does_not_take_the_place_of_a_good_one(bert, batch, tmp_path, make):
    model = make(bert)
    model.save_pretrained(tmp_path)
    expected = model(**batch).logits
    with torch.no_grad():
        model.model.classifier.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"classifier\.bias holds nan, which is not finite"):
        model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path, dtype=torch.float32)(**batch).logits, expected)


QUANTISED = [
    ("a tensor missing", stored(lambda t: t.pop("classifier.bias"), record=True), "classifier.bias is not there"),
    ("no record", stored(lambda t: None, record=False), "no record"),
    ("other bits", configured(bits=8), "bits=8.*4"),
    ("another base_bits", configured(base_bits=4), "base_bits=4.*None"),
    ("a field too many", configured(shift=1), "shift=1.*None"),
    ("an infinite scale", stored(lambda t: t[next(n for n in t if "A_scales" in n)].fill_(float("inf"))), "not finite"),
    ("floats for codes", stored(lambda t: t.update({n: t[n].float() for n in t if "A_codes" in n})), "float32"),
]


@pytest.mark.parametrize("what, damage, message", QUANTISED, ids=[what for what, *_ in QUANTISED])
def test_a_damaged_quantised_folder_is_refused_and_the_model_stays_as_it_was(
    bert, batch, tmp_path, what, damage, message
):
    qlora(bert).save_pretrained(tmp_path)
    damage(tmp_path)
    model = qlora(bert, rank=2)
    before = model(**batch).logits
    for load in (qLoRABertModel.from_pretrained, model.load_adapter):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    assert torch.equal(model(**batch).logits, before) and not any(x.packed for x in model.lora_layers().values())


def test_each_class_refuses_the_others_folder_and_says_what_is_there(bert, tmp_path):
    lora(bert).save_pretrained(tmp_path / "float")
    qlora(bert).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"no quantized_config\.json.*holds adapter_config\.json"):
        qLoRABertModel.from_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"no adapter_config\.json.*holds adapter_quantized\.safetensors"):
        LoRABertModel.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"base_bits=None.*4"):
        qlora(bert, base_bits=4).load_adapter(tmp_path / "packed")


def test_a_folder_of_pefts_loads_with_a_line_that_says_what_could_not_be_verified(bert, tmp_path, capsys):
    lora(bert, alpha=4).save_pretrained(tmp_path)
    stored(lambda tensors: None, record=False)(tmp_path)
    LoRABertModel.from_pretrained(tmp_path)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "scaling 0.5 could not be verified" in out and str(bert) in out


def test_an_adapter_on_another_base_is_refused_and_one_on_a_base_that_was_moved_is_not(bert, batch, tmp_path):
    model = lora(bert)
    model.save_pretrained(tmp_path / "adapter")
    moved = shutil.copytree(bert, tmp_path / "moved")
    loaded = LoRABertModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32, model_name=str(moved))
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    tensors = load_file(moved / "model.safetensors")
    name = next(name for name in tensors if name.endswith("key.weight"))
    tensors[name].view(-1)[7] += 1e-3
    save_file(tensors, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"trained with base {model.fingerprint}"):
        LoRABertModel.from_pretrained(tmp_path / "adapter", model_name=str(moved))


def test_a_config_without_a_base_asks_for_its_name(bert, tmp_path):
    lora(bert).save_pretrained(tmp_path)
    configured(base_model_name_or_path=None)(tmp_path)
    with pytest.raises(ValueError, match="as model_name"):
        LoRABertModel.from_pretrained(tmp_path)
    assert LoRABertModel.from_pretrained(tmp_path, model_name=str(bert)).model_name == str(bert)


def test_a_save_that_fails_leaves_the_old_adapter_as_it_was(bert, batch, tmp_path, monkeypatch):
    old, fsync = lora(bert), os.fsync
    old.save_pretrained(tmp_path)

    def disk_full(descriptor):
        fsync(descriptor)
        if os.fstat(descriptor).st_size > 1000:  # the config still fitted
            raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="no space"):
        lora(bert, rank=3).save_pretrained(tmp_path)
    loaded = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, old(**batch).logits)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]  # the disk is not left full


def test_a_save_names_its_tensors_last(bert, tmp_path, monkeypatch):
    named = []
    replace = type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", lambda part, file: named.append(file.name) or replace(part, file))
    lora(bert).save_pretrained(tmp_path)
    assert named == [CONFIG, TENSORS]


def test_an_adapter_is_never_named_by_a_path_into_an_installed_package(tmp_path):
    LoRABertModel("auto").save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == lora_utils.OFFLINE_MODEL
    assert "site-packages" not in (tmp_path / TENSORS).read_bytes().decode(errors="ignore")


@pytest.mark.parametrize("make, layer", [(lora, LoRALayer), (qlora, QuantizedLoRALayer)])
def test_load_adapter_exchanges_layers_and_head_whatever_the_rank_and_leaves_the_base_alone(
    bert, batch, tmp_path, make, layer
):
    others = {
        "wide": make(bert, rank=16, alpha=3, target_modules=["key", "dense"], num_labels=3, use_rslora=True),
        "thin": make(bert, rank=1),
    }
    for name, other in others.items():
        other.save_pretrained(tmp_path / name)
    model = make(bert)
    base = {name: (t.data_ptr(), t.clone()) for name, t in plain_state(model).items()}
    for name in ("wide", "thin", "wide"):
        model.load_adapter(tmp_path / name)
        labels = {"labels": batch["labels"]} if name == "thin" else {"labels": batch["labels"] + 1}
        assert torch.equal(model(**{**batch, **labels}).logits, others[name](**{**batch, **labels}).logits)
        assert (
            model.model.config.num_labels == model.merge_and_unload().config.num_labels == (3 if name == "wide" else 2)
        )
        assert all(
            type(found) is layer and found.rank == others[name].arguments["rank"]
            for found in model.lora_layers().values()
        )
        assert model.lora_layers().keys() == others[name].lora_layers().keys()
    assert all(t.data_ptr() == base[n][0] and torch.equal(t, base[n][1]) for n, t in plain_state(model).items())
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def plain_state(model):
    """{name: tensor} of a model's frozen weights, under the names they have without any layer around them."""
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    return {n: t for n, t in state.items() if not re.search(r"lora_|_codes|_scales|classifier", n)}


@pytest.mark.parametrize("make", [lora, qlora])
def test_an_adapter_with_dropout_that_an_evaluated_model_takes_in_is_evaluated_too(bert, batch, tmp_path, make):
    model = make(bert, dropout=0.5)
    model.save_pretrained(tmp_path)
    before = model(**batch).logits
    model.load_adapter(tmp_path)
    assert torch.equal(model(**batch).logits, before) and not any(m.training for m in model.modules())


def test_a_model_in_another_dtype_saves_float32(bert, tmp_path):
    for make, folder in ((lora, tmp_path / "float"), (qlora, tmp_path / "packed")):
        make(bert).to(torch.bfloat16).save_pretrained(folder)
        tensors = load_file(folder / make(bert).FILES[1])
        assert {t.dtype for t in tensors.values()} <= {torch.float32, torch.uint8}


def test_load_adapter_unmerges_first(bert, batch, tmp_path):
    other, model = lora(bert, rank=3), randomise(lora(bert), seed=9)
    other.save_pretrained(tmp_path)
    for layer in model.lora_layers().values():
        layer.merge()
    model.load_adapter(tmp_path)
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_load_adapter_takes_milliseconds(tmp_path):
    model = LoRABertModel("auto", rank=16)
    model.save_pretrained(tmp_path)
    start = time.perf_counter()
    model.load_adapter(tmp_path)
    assert time.perf_counter() - start < 0.2


def test_a_loaded_adapter_can_be_trained_on(bert, batch, tmp_path):
    lora(bert).save_pretrained(tmp_path)
    for kind, folder in ((LoRABertModel, tmp_path), (qLoRABertModel, tmp_path / "packed")):
        if kind is qLoRABertModel:
            qlora(bert).save_pretrained(folder)
        model = kind.from_pretrained(folder)
        if kind is qLoRABertModel:
            model.unpack()
        model.train()(**batch).loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or "classifier" in name}


def test_merged_and_saved_a_pipeline_gives_the_same_labels_and_scores(bert, tokenizer, tmp_path):
    model = lora(bert)
    model.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sentences = ["a film to remember", "a film to forget, and soon", "holes"]
    found = pipeline("text-classification", model=str(tmp_path), device="cpu")(sentences, top_k=None)
    for sentence, scores in zip(sentences, found, strict=True):
        expected = model(**tokenizer([sentence], return_tensors="pt")).logits.softmax(-1)[0]
        scores = {score["label"]: score["score"] for score in scores}
        assert scores.keys() == {"NEGATIVE", "POSITIVE"}
        assert (
            abs(scores["NEGATIVE"] - expected[0].item()) < 1e-5 and abs(scores["POSITIVE"] - expected[1].item()) < 1e-5
        )


def test_the_readme_says_how_many_kinds_of_damage_peft_loads():
    refused = sum(peft == "refuses" for *_, peft in DAMAGES)
    claim = f"of its {len(DAMAGES)} kinds of damage PEFT refuses {refused} and loads {len(DAMAGES) - refused}."
    assert claim in " ".join((ROOT / "README.md").read_text().split())
