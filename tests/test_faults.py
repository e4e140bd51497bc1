"""Faults that other people's bug reports found: what was silently wrong is refused, or right."""

import copy
import pickle
import runpy

import pytest
import torch
from accelerate import cpu_offload
from conftest import ROOT, before_next_fsync, randomise, refused
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments

from lora_lab.sources import MOVIE_PHRASES, find_model, load_sst2, packaged_checkpoint
from lora_utils import LoRABertModel, evaluate, make_loader, qLoRABertModel, wilson_interval

KINDS = [LoRABertModel, qLoRABertModel]


def model_of(bert, kind=LoRABertModel, **options):
    return randomise(kind(str(bert), **{"dtype": torch.float32, **options})).eval()


@pytest.fixture(scope="module")
def phrases():
    return load_sst2(MOVIE_PHRASES, announce=False)["validation"].select(range(23))


# What the refusal says, and how a model is changed in what the adapter's file does not hold.
UNSAVED = {
    r"bert\.pooler\.dense\.\w+ is trained": lambda model: model.model.bert.pooler.requires_grad_(True),
    r"model\.bert\.\S+ is trained": lambda model: model.model.requires_grad_(True),
    r"extra\.weight is trained": lambda model: model.add_module("extra", nn.Linear(2, 2)),
    r"classifier\.new\.weight is trained": lambda model: model.model.classifier.add_module("new", nn.Linear(2, 2)),
    r"pooler\.dense\.weight differs": lambda model: model.model.bert.pooler.dense.weight.data.mul_(1.001),
    r"token_type_ids differs": lambda model: model.model.bert.embeddings.token_type_ids.add_(1),
    r"query\.bias differs": lambda model: next(iter(model.lora_layers().values())).base.bias.data.add_(1),
    r"word_embeddings\.weight differs": lambda model: model.model.resize_token_embeddings(30600).requires_grad_(False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("message", UNSAVED)
def test_what_the_file_does_not_hold_is_refused_by_name_if_trained_or_changed(bert, tmp_path, kind, message):
    model = model_of(bert, kind)
    UNSAVED[message](model)
    refused(f"{message}.*merge_and_unload", model.save_pretrained, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("base_bits", [8, 4])
def test_a_quantised_base_is_saved_where_no_tensor_is_shared_and_refused_with_a_changed_code(bert, tmp_path, base_bits):
    model = model_of(bert, qLoRABertModel, base_bits=base_bits)
    for name, buffer in dict(model.named_buffers(remove_duplicate=False)).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())  # as moving to a GPU does
    model.save_pretrained(tmp_path)
    model.model.bert.pooler.dense.codes[0] += 1
    refused(r"model\.bert\.pooler\.dense\.codes differs from", model.save_pretrained, tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_that_is_copied_pickled_merged_cast_or_frozen_is_saved_all_the_same(bert, batch, tmp_path, stored):
    model = model_of(bert, qLoRABertModel, dtype=stored, bits=4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        for layer in other.lora_layers().values():
            layer.merge()
        other.pack()
        other.save_pretrained(tmp_path)
        other.bfloat16().requires_grad_(False).save_pretrained(tmp_path)
    loaded = qLoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(loaded(**batch).logits, model(**batch).logits, atol=0.3)


def test_an_adapter_is_saved_with_a_warning_when_its_checkpoint_is_gone(bert, own_bert, batch, tmp_path):
    model = model_of(own_bert)
    (own_bert / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"model\.safetensors is gone"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = LoRABertModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32, folder=bert)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    model.model.bert.pooler.requires_grad_(True)
    with pytest.warns(UserWarning):
        refused("is trained", model.save_pretrained, tmp_path / "adapter")


def test_evaluate_counts_each_sentence_in_the_datas_order_whatever_order_the_loader_draws(bert, tokenizer, phrases):
    model = model_of(bert)
    labels = torch.tensor(phrases["label"])
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(row["sentence"], return_tensors="pt")).logits for row in phrases])
        shift = (logits[:, 1] - logits[:, 0]).median() + 1e-3  # about half of the labels become 1, so their order shows
        model.model.classifier.bias[0] += shift
        logits[:, 0] += shift
    predictions = logits.argmax(1)
    right = (predictions == labels).sum().item()
    assert 0 < right < 23 and 0 < predictions.sum() < 23

    in_order, shuffled = (make_loader(phrases, tokenizer, batch_size=4, shuffle=shuffle) for shuffle in (False, True))
    options = {"batch_size": 4, "collate_fn": in_order.collate_fn}
    for loader in (in_order, shuffled, DataLoader(in_order.dataset, shuffle=True, **options)):
        state = torch.get_rng_state()
        found = evaluate(model.train(), loader)
        assert model.training and found.n == 23 and found.predictions == predictions.tolist()
        assert found[:3] == (right / 23, *wilson_interval(right, 23))
        assert found.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
        assert f"{right / 23:.1%}" in str(found) and "n = 23" in str(found)
        assert torch.equal(torch.get_rng_state(), state) or loader.generator is None  # that loader draws its order

    sampler = WeightedRandomSampler([1.0] * 23, 23)
    with pytest.raises(ValueError, match=r"draws 23 of 23 sentences, not each once: use make_loader"):
        evaluate(model, DataLoader(in_order.dataset, sampler=sampler, **options))
    in_order.batch_sampler.set_epoch(0, start=2)
    refused(r"draws 15 of 23 sentences", evaluate, model, in_order)


# Names of labels

SST2 = {0: "NEGATIVE", 1: "POSITIVE"}
# The names in a checkpoint with a head, those in our model, and what is wrong with them in a lesson.
NAMES = [
    ({0: "LABEL_0", 1: "LABEL_1"}, SST2, None),
    (SST2, SST2, None),
    ({0: "possible", 1: "sure"}, {0: "possible", 1: "sure"}, None),
    ({0: "POSITIVE", 1: "NEGATIVE"}, {0: "POSITIVE", 1: "NEGATIVE"}, "labels 0 POSITIVE .*in the data 0 is negative"),
    ({0: "bad", 1: "neg"}, {0: "bad", 1: "neg"}, "labels 0 bad and 1 neg, .*in the data 0 is negative"),
]


@pytest.mark.parametrize("names, expected, wrong", NAMES, ids=str)
def test_a_head_keeps_its_names_of_labels_and_lessons_refuse_turned_ones(bert, batch, tmp_path, names, expected, wrong):
    theirs = BertForSequenceClassification.from_pretrained(bert, id2label=names).eval()
    nn.init.normal_(theirs.classifier.weight)
    theirs.save_pretrained(tmp_path)
    ours = LoRABertModel(str(tmp_path), dtype=torch.float32).eval()
    assert torch.allclose(ours(**batch).logits, theirs(**batch).logits, atol=1e-5)
    ours.save_pretrained(tmp_path / "adapter")
    for model in (ours, ours.merge_and_unload(), LoRABertModel.from_pretrained(tmp_path / "adapter")):
        assert model.config.id2label == expected
        assert model.config.label2id == {name: label for label, name in expected.items()}
    if wrong:
        refused(wrong, find_model, str(tmp_path))
    else:
        find_model(str(tmp_path), announce=False)

    theirs.bert.save_pretrained(tmp_path)  # the names stay in the config, but there is no head
    assert LoRABertModel(str(tmp_path)).config.id2label == SST2
    find_model(str(tmp_path), announce=False)


@pytest.mark.parametrize("names", ['{"0": "POSITIVE"}', '["neg", "pos"]', "nothing"])
def test_odd_names_of_labels_are_refused_in_words(tmp_path, names):
    save_file({"classifier.weight": torch.zeros(2, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert", "id2label": ' + names + "}")
    refused(r"config\.json or .* is damaged|labels 0 POSITIVE and 1 None", find_model, str(tmp_path))


# Checkpoints that are damaged or of another form


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"base_bits": 8}, {"base_bits": 4}], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_base_that_is_not_finite_as_stored_or_as_cast_is_refused_by_name(own_bert, value, options):
    tensors = load_file(own_bert / "model.safetensors")
    name = next(name for name in tensors if name.endswith("key.weight"))
    tensors[name][3, 4] = value
    save_file(tensors, own_bert / "model.safetensors", {"format": "pt"})
    kind = qLoRABertModel if "base_bits" in options else LoRABertModel
    if value == 1e30 and "dtype" not in options:
        model_of(own_bert, kind, **options)
    else:
        refused(r"layer\.\d\.attention\.self\.key\.weight holds .*not finite", model_of, own_bert, kind, **options)


def test_a_checkpoint_that_is_damaged_or_of_another_form_is_refused_with_what_to_do(bert, own_bert):
    file = own_bert / "model.safetensors"
    tensors = load_file(bert / "model.safetensors")
    for damaged in (file.read_bytes()[:-100], b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        file.write_bytes(damaged)
        refused(r"model\.safetensors is no whole safetensors file.*download it again", LoRABertModel, str(own_bert))
    convert = r"BertForSequenceClassification\.from_pretrained"
    file.rename(own_bert / "pytorch_model.bin")
    refused(rf"no model\.safetensors in .*pytorch_model\.bin.*{convert}", LoRABertModel, str(own_bert))
    save_file({name: tensors[name] for name in tensors if "pooler" not in name}, file, {"format": "pt"})
    refused(rf"lacks 2 .*pooler.*{convert}", LoRABertModel, str(own_bert))
    BertForSequenceClassification.from_pretrained(own_bert).save_pretrained(own_bert / "converted")
    LoRABertModel(str(own_bert / "converted"))


# Lengths, tokens and labels that do not fit


def test_a_sentence_is_cut_at_the_smallest_of_the_limits(phrases):
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    long = phrases.select([0]).map(lambda row: {"sentence": "word " * 2000})
    for limit, longest in ((128, 128), (10**30, 512)):
        tokenizer.model_max_length = limit
        (batch,) = make_loader(long, tokenizer)
        assert batch["input_ids"].shape == (1, longest)


def test_tokens_and_labels_that_the_model_cannot_take_are_refused_with_what_to_do(bert, batch):
    model = model_of(bert)
    with pytest.raises(ValueError, match=r"input_ids are 101 to 30522, allowed are 0 to 30521: use the tokenizer of"):
        model(torch.tensor([[101, 30522]]))
    with pytest.raises(ValueError, match=r"600 tokens, and this BERT takes at most 512.*model_max_length"):
        model(torch.ones(1, 600, dtype=torch.long))
    for labels in ([0.0, 1.0, 1.0], [[0], [1], [1]], [True, False, True], [0]):
        with pytest.raises(ValueError, match=r"labels are .*: they must be whole numbers, one for each"):
            model(**{**batch, "labels": torch.tensor(labels)})
    assert torch.equal(model(**{**batch, "labels": batch["labels"].int()}).loss, model(**batch).loss)


def test_data_that_is_no_dataset_or_has_no_labels_is_refused(bert, tokenizer, phrases):
    for split, found in (
        ([{"sentence": "good", "label": 1}], "list with the columns None"),
        (phrases.to_iterable_dataset(), "IterableDataset with"),
        (phrases.remove_columns("label"), r"Dataset with the columns \['sentence'\]"),
    ):
        refused(rf"split is a {found}.*: it must be a datasets\.Dataset", make_loader, split, tokenizer)
    loader = make_loader(phrases, tokenizer)
    for row in loader.dataset:
        del row["labels"]
    refused(r"a batch holds input_ids, .*but no labels", evaluate, model_of(bert), loader)


# Other libraries


@pytest.mark.parametrize("kind, options", [(LoRABertModel, {}), (qLoRABertModel, {"base_bits": 4})], ids=str)
def test_transformers_own_forward_works_in_16_bits_and_accelerate_can_offload_the_weights(bert, batch, kind, options):
    model = model_of(bert, kind, dtype=torch.bfloat16, **options)
    theirs, ours = model.model(**batch), model(**batch)
    assert theirs.logits.dtype == torch.float32
    assert torch.allclose(theirs.logits, ours.logits, atol=0.1)

    model = model_of(bert, kind, **options)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.model.bert.pooler.dense.bias.is_meta
    assert torch.allclose(offloaded(**batch).logits, model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"activation_checkpointing": True}, {}], ids=str)
def test_trainer_trains_it(bert, tokenizer, phrases, tmp_path, kind, options):
    model = model_of(bert, kind)
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    options |= {"max_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    loader = make_loader(phrases, tokenizer)
    data = {"train_dataset": loader.dataset, "data_collator": loader.collate_fn}
    Trainer(model, TrainingArguments(str(tmp_path), **options), **data).train()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.save_pretrained(tmp_path)


def test_the_module_computes_the_same_whatever_the_default_dtype_is():
    linear = nn.Linear(128, 8)
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            module = runpy.run_path(str(ROOT / "lora_utils.py"))  # its tables are computed again
            decoded = [module["QuantizedLinear"](linear, bits).dequantize() for bits in (4, 8)]
            results.append([*module["quantize"](linear.weight, 3), *decoded])
        finally:
            torch.set_default_dtype(torch.float32)
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_two_writers_of_one_folder_leave_a_whole_adapter_and_no_other_file(bert, batch, tmp_path, monkeypatch):
    first, second = model_of(bert, rank=2), model_of(bert, rank=3)
    before_next_fsync(monkeypatch, lambda: second.save_pretrained(tmp_path))
    first.save_pretrained(tmp_path)
    loaded = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, first(**batch).logits)
    assert {file.name for file in tmp_path.iterdir()} == set(LoRABertModel.FILES)
