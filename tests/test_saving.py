"""Check that a saved adapter loads whole or is refused, and that adapters can be exchanged in place."""

import hashlib
import json
import re
import warnings

import pytest
import torch
from conftest import ROOT, full_disk, randomise
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, pipeline

from lora_lab.sources import PACKAGED_MODEL, find_model
from lora_utils import LoRABertModel, LoRALayer, QuantizedLoRALayer, qLoRABertModel

CONFIG, TENSORS = LoRABertModel.FILES
A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
HEAD = "base_model.model.classifier.bias"
# Loading what PEFT wrote warns. The tests of the warning itself are below.
UNVERIFIED = "ignore:.*could not be verified:UserWarning"


def lora(bert, **options):
    return randomise(LoRABertModel(str(bert), dtype=torch.float32, **options)).eval()


def qlora(bert, **options):
    return randomise(qLoRABertModel(str(bert), dtype=torch.float32, **{"bits": 4, **options})).eval()


def configured(**changes):
    """Return a damage that changes fields of the config. None removes a field."""

    def damage(folder):
        file = next(folder.glob("*_config.json"))
        config = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))

    return damage


def stored(change, record=True):
    """Return a damage that changes the tensors by a function. Without their record they are as PEFT writes them."""

    def damage(folder):
        file = next(folder.glob("*.safetensors"))
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        change(tensors)
        save_file(tensors, file, metadata if record else {"format": "pt"})

    return damage


def save_as_peft(model, folder):
    """Save an adapter with no record of ours."""
    model.save_pretrained(folder)
    stored(lambda tensors: None, record=False)(folder)


def cut(folder):
    file = folder / TENSORS
    file.write_bytes(file.read_bytes()[:-100])


def as_pickle(folder):
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def read_record(folder):
    """Return what the tensors' metadata say of an adapter in a folder."""
    with safe_open(next(folder.glob("*.safetensors")), "pt") as opened:
        return json.loads(opened.metadata()["lora_utils"])


def write_record(folder, record):
    """Replace what the tensors' metadata say of an adapter in a folder."""
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file), file, {"format": "pt", "lora_utils": json.dumps(record)})


def of_another_base(folder):
    write_record(folder, read_record(folder) | {"base_sha256": "0" * 64})


def of_a_run(folder):
    write_record(folder, {"settings": {}})


ANOTHER_BASE = "was trained on a base with the SHA-256 000.*load it into a model of its base"
# What is wrong, how it is made, what our message says, what PEFT does with the same folder.
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
    ("another base", of_another_base, ANOTHER_BASE, "loads"),
    ("a tensor missing", stored(lambda t: t.pop(A)), f"{A}=nothing, but 'float32 .8, 64.' is expected", "loads"),
    (
        "a tensor too many",
        stored(lambda t: t.update({A + "x": t[A] + 1})),
        f"{A}x='float32 .8, 64.', but nothing is expected",
        "loads",
    ),
    ("the head missing", stored(lambda t: t.pop(HEAD)), f"{HEAD}=nothing, but 'float32 .2,.' is expected", "refuses"),
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
    ("a training run for an adapter", of_a_run, "record of something else", "loads"),
    ("an option of tomorrow", configured(use_magic=True), "use_magic=True", "loads"),
]
QUANTISED = [
    ("a tensor missing", stored(lambda t: t.pop("classifier.bias")), "classifier.bias=nothing, but 'float32 .2,.' is"),
    ("no record", stored(lambda t: None, record=False), "no record"),
    ("another base", of_another_base, ANOTHER_BASE),
    ("other bits", configured(bits=8), "bits=8.*4"),
    ("another base_bits", configured(base_bits=4), "base_bits=4.*None"),
    ("a field too many", configured(shift=1), "shift=1.*nothing"),
    ("an infinite scale", stored(lambda t: t[next(n for n in t if "A_scales" in n)].fill_(float("inf"))), "not finite"),
    ("floats for codes", stored(lambda t: t.update({n: t[n].float() for n in t if "A_codes" in n})), "float32"),
]
REFUSALS = [pytest.param(lora, damage, message, id=what) for what, damage, message, _ in DAMAGES]
REFUSALS += [pytest.param(qlora, damage, message, id=f"{what}, quantised") for what, damage, message in QUANTISED]


@pytest.mark.parametrize("make, damage, message", REFUSALS)
def test_a_damaged_or_mismatched_folder_is_refused_and_the_model_stays_as_it_was(
    bert, batch, tmp_path, make, damage, message
):
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


FEATURES = {"not LoRA", "DoRA", "trained biases", "ranks by layer", "another task", "a base changed by its start"}
FEATURES |= {"an option of tomorrow"}
OPTIONS = [damage for damage in DAMAGES if damage[0] in FEATURES]


@pytest.mark.parametrize("what, damage, message, peft", OPTIONS, ids=[what for what, *_ in OPTIONS])
@pytest.mark.filterwarnings(UNVERIFIED)
def test_what_peft_has_and_we_have_not_is_refused_in_a_folder_of_pefts(bert, tmp_path, what, damage, message, peft):
    save_as_peft(lora(bert), tmp_path)
    LoRABertModel.from_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*allowed is"):
        LoRABertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [5, {"a": 1}, "(", []], ids=str)
def test_targets_that_are_none_are_refused_in_a_folder_of_pefts(bert, tmp_path, targets):
    save_as_peft(lora(bert), tmp_path)
    configured(target_modules=targets)(tmp_path)
    with pytest.raises(ValueError, match="target_modules is"):
        LoRABertModel.from_pretrained(tmp_path)


@pytest.mark.filterwarnings(UNVERIFIED)
def test_what_peft_leaves_out_has_pefts_default_whatever_the_model_had(bert, batch, tmp_path):
    other = lora(bert)
    save_as_peft(other, tmp_path)
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


def test_each_class_refuses_the_others_folder_and_says_what_is_there(bert, tmp_path):
    lora(bert).save_pretrained(tmp_path / "float")
    qlora(bert).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=r"no quantized_config\.json.*holds adapter_config\.json"):
        qLoRABertModel.from_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"no adapter_config\.json.*holds adapter_quantized\.safetensors"):
        LoRABertModel.from_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match="adapter_config"):
        PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained(bert), tmp_path / "packed")
    with pytest.raises(ValueError, match=r"base_bits=None.*4"):
        qlora(bert, base_bits=4).load_adapter(tmp_path / "packed")


def test_a_folder_of_pefts_loads_with_a_warning_that_says_what_could_not_be_verified(bert, tmp_path, capsys):
    save_as_peft(lora(bert, alpha=4), tmp_path)
    configured(base_model_name_or_path="a-small-bert")(tmp_path)
    with pytest.warns(UserWarning, match="could not be verified") as caught:
        model = LoRABertModel.from_pretrained(tmp_path, folder=bert)
        model.load_adapter(tmp_path)
    assert len(caught) == 2 and capsys.readouterr().out == ""
    for warning in caught:
        message = str(warning.message)
        assert str(tmp_path) in message and "a-small-bert" in message and "scaling" in message
        assert "PEFT" in message and model.model_name in message


@pytest.mark.parametrize("make", [lora, qlora])
def test_an_adapter_of_ours_is_saved_and_loaded_without_a_warning_or_a_line(bert, tmp_path, make, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = make(bert)
        model.save_pretrained(tmp_path)
        type(model).from_pretrained(tmp_path).load_adapter(tmp_path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("make", [lora, qlora])
def test_the_record_holds_the_config_and_the_sha_256_of_the_base(bert, tmp_path, make):
    model = make(bert)
    model.save_pretrained(tmp_path)
    record = read_record(tmp_path)
    assert record.keys() == {"config", "base_sha256"}
    assert record["config"] == json.loads((tmp_path / model.FILES[0]).read_text())
    expected = hashlib.sha256((bert / "model.safetensors").read_bytes()).hexdigest()
    assert record["base_sha256"] == model.fingerprint == expected


def test_an_adapter_on_another_base_is_refused_and_one_on_a_base_that_was_moved_is_not(bert, own_bert, batch, tmp_path):
    model = lora(bert)
    model.save_pretrained(tmp_path / "adapter")
    for where in ({"model_name": str(own_bert)}, {"folder": own_bert}):
        loaded = LoRABertModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32, **where)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    tensors = load_file(own_bert / "model.safetensors")
    name = next(name for name in tensors if name.endswith("key.weight"))
    tensors[name].view(-1)[7] += 1e-3
    save_file(tensors, own_bert / "model.safetensors", {"format": "pt"})
    for where in ({"model_name": str(own_bert)}, {"folder": own_bert}):
        with pytest.raises(ValueError, match=f"trained on a base with the SHA-256 {model.fingerprint}"):
            LoRABertModel.from_pretrained(tmp_path / "adapter", **where)


def test_a_config_without_a_base_asks_for_its_name(bert, tmp_path):
    lora(bert).save_pretrained(tmp_path)
    configured(base_model_name_or_path=None)(tmp_path)
    with pytest.raises(ValueError, match="as model_name"):
        LoRABertModel.from_pretrained(tmp_path)
    assert LoRABertModel.from_pretrained(tmp_path, model_name=str(bert)).model_name == str(bert)


def test_a_save_that_fails_leaves_the_old_adapter_as_it_was(bert, batch, tmp_path):
    old = lora(bert)
    old.save_pretrained(tmp_path)
    other = lora(bert, rank=3)
    with full_disk(room=2000), pytest.raises(OSError, match="large"):  # the config still fits
        other.save_pretrained(tmp_path)
    loaded = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, old(**batch).logits)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]  # the disk is not left full


@pytest.mark.parametrize("model_class", [LoRABertModel, qLoRABertModel])
def test_an_adapter_names_its_base_by_the_hub_id_and_loads_from_a_folder(batch, tmp_path, model_class):
    """The packaged checkpoint lies in an installed package. No adapter may hold that path."""
    checkpoint = find_model("auto", announce=False)
    model = model_class(checkpoint.name, folder=checkpoint.folder, dtype=torch.float32)
    randomise(model).eval().save_pretrained(tmp_path)
    config = json.loads((tmp_path / model_class.FILES[0]).read_text())
    assert config["base_model_name_or_path"] == checkpoint.name == PACKAGED_MODEL
    for file in tmp_path.iterdir():
        content = file.read_bytes().decode(errors="ignore")
        assert "site-packages" not in content and str(checkpoint.folder) not in content
    loaded = model_class.from_pretrained(tmp_path, dtype=torch.float32, folder=checkpoint.folder)
    assert loaded.model_name == PACKAGED_MODEL
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    with pytest.raises(ValueError, match=PACKAGED_MODEL):  # the tests have no hub and an empty cache
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("make, layer", [(lora, LoRALayer), (qlora, QuantizedLoRALayer)])
def test_load_adapter_exchanges_layers_and_head_whatever_the_rank_and_keeps_the_base(
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
        for old in model.lora_layers().values():
            old.merge()
        model.load_adapter(tmp_path / name)
        labels = {"labels": batch["labels"]} if name == "thin" else {"labels": batch["labels"] + 1}
        assert torch.equal(model(**{**batch, **labels}).logits, others[name](**{**batch, **labels}).logits)
        number = 3 if name == "wide" else 2
        assert model.config.num_labels == model.merge_and_unload().config.num_labels == number
        for found in model.lora_layers().values():
            assert type(found) is layer and found.rank == others[name].options["rank"]
        assert model.lora_layers().keys() == others[name].lora_layers().keys()
    assert all(t.data_ptr() == base[n][0] and torch.equal(t, base[n][1]) for n, t in plain_state(model).items())
    model.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def plain_state(model):
    """Return {name: tensor} of a model's frozen weights, under the names that they have in a plain BERT."""
    state = {name.replace(".base.", "."): tensor for name, tensor in model.state_dict().items()}
    return {n: t for n, t in state.items() if not re.search(r"lora_|_codes|_scales|classifier", n)}


@pytest.mark.parametrize("make", [lora, qlora])
def test_an_adapter_with_dropout_that_an_evaluated_model_loads_is_evaluated_too(bert, batch, tmp_path, make):
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


@pytest.mark.parametrize("make", [lora, qlora])
def test_a_loaded_adapter_can_be_trained_on(bert, batch, tmp_path, make):
    make(bert).save_pretrained(tmp_path)
    model = qLoRABertModel.from_pretrained(tmp_path) if make is qlora else LoRABertModel.from_pretrained(tmp_path)
    if make is qlora:
        model.unpack()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model.train()(**batch).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora_" in name or "classifier" in name), name


def test_merged_and_saved_a_pipeline_gives_the_same_labels_and_scores(bert, tokenizer, tmp_path):
    model = lora(bert)
    model.merge_and_unload().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sentences = ["a film to remember", "a film to forget, and soon", "holes"]
    answers = pipeline("text-classification", model=str(tmp_path), device="cpu")(sentences, top_k=None)
    for sentence, scores in zip(sentences, answers, strict=True):
        expected = model(**tokenizer([sentence], return_tensors="pt")).logits.softmax(-1)[0]
        scores = {score["label"]: score["score"] for score in scores}
        assert scores.keys() == {"NEGATIVE", "POSITIVE"}
        found = torch.tensor([scores["NEGATIVE"], scores["POSITIVE"]])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
