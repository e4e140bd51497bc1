"""Faults that other people's bug reports found: what was silently wrong is refused, or right."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from conftest import ROOT, randomise
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments

from lora_lab.sources import MOVIE_PHRASES, find_model, load_sst2, packaged_checkpoint
from lora_utils import LoRABertModel, evaluate, make_loader, qLoRABertModel, wilson_interval


def model_of(bert, kind=LoRABertModel, **options):
    return randomise(kind(str(bert), dtype=torch.float32, **options)).eval()


@pytest.fixture(scope="module")
def phrases():
    return load_sst2(MOVIE_PHRASES, announce=False)["validation"].select(range(23))


# Trained, but not in the adapter's file


@pytest.mark.parametrize("kind", [LoRABertModel, qLoRABertModel])
@pytest.mark.parametrize("name", ["model.bert.pooler", "model.bert.embeddings.word_embeddings", "model"])
def test_what_is_trained_and_not_saved_is_refused_by_name(bert, tmp_path, kind, name):
    model = model_of(bert, kind)
    model.get_submodule(name).requires_grad_(True)
    with pytest.raises(ValueError, match=r"model\.bert\..* is trained.*merge_and_unload") as error:
        model.save_pretrained(tmp_path / "adapter")
    assert name == "model" or name in str(error.value)
    assert not (tmp_path / "adapter").exists()


def test_a_tensor_that_is_no_longer_the_checkpoints_is_refused_by_name_even_if_it_is_frozen(bert, tmp_path):
    def train_and_freeze(model):
        model.model.bert.pooler.dense.weight.data.mul_(1.001)

    def change_a_buffer(model):
        model.model.bert.embeddings.token_type_ids += 1

    def add_tokens(model):
        model.model.resize_token_embeddings(30600, mean_resizing=False)
        model.requires_grad_(False)

    def change_the_base_of_a_layer(model):
        model.model.bert.encoder.layer[0].attention.self.query.base.bias.data[3] = 7

    changes = {
        train_and_freeze: r"model\.bert\.pooler\.dense\.weight",
        change_a_buffer: r"model\.bert\.embeddings\.token_type_ids",
        add_tokens: r"model\.bert\.embeddings\.word_embeddings\.weight",
        change_the_base_of_a_layer: r"model\.bert\.encoder\.layer\.0\.attention\.self\.query\.bias",
    }
    for change, name in changes.items():
        model = model_of(bert)
        change(model)
        with pytest.raises(ValueError, match=rf"{name} differs from .*merge_and_unload"):
            model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("base_bits", [8, 4])
def test_a_changed_code_of_a_quantised_base_is_refused(bert, tmp_path, base_bits):
    model = model_of(bert, qLoRABertModel, base_bits=base_bits)
    model.save_pretrained(tmp_path)
    model.model.bert.pooler.dense.codes[0] += 1
    with pytest.raises(ValueError, match=r"model\.bert\.pooler\.dense\.codes differs from"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_that_is_copied_pickled_merged_or_cast_is_saved_all_the_same(bert, batch, tmp_path, stored):
    model = randomise(qLoRABertModel(str(bert), dtype=stored, bits=4))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        for layer in other.lora_layers().values():
            layer.merge()
        other.pack()
        other.save_pretrained(tmp_path)
        other.bfloat16().save_pretrained(tmp_path)
    loaded = qLoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.allclose(loaded(**batch).logits, model.eval()(**batch).logits, atol=0.3)


@pytest.mark.parametrize("base_bits", [8, 4])
def test_a_model_whose_buffers_were_moved_one_by_one_is_saved_as_a_gpu_needs_it(bert, tmp_path, base_bits):
    model = model_of(bert, qLoRABertModel, base_bits=base_bits)
    for name, buffer in dict(model.named_buffers(remove_duplicate=False)).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer.clone())  # no tensor is shared any more
    model.save_pretrained(tmp_path)


def test_what_is_trained_beside_the_bert_or_in_another_head_is_refused_too(bert, tmp_path):
    model = model_of(bert)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight is trained"):
        model.save_pretrained(tmp_path)
    model = model_of(bert)
    model.model.classifier = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"classifier\.0\.weight is trained"):
        model.save_pretrained(tmp_path)


def test_an_adapter_is_saved_with_a_warning_when_its_checkpoint_is_gone(bert, own_bert, batch, tmp_path):
    model = model_of(own_bert)
    (own_bert / "model.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.warns(UserWarning, match=r"model\.safetensors is gone"):
        model.save_pretrained(tmp_path / "adapter")
    loaded = LoRABertModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32, folder=bert)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    model.model.bert.pooler.requires_grad_(True)
    with pytest.raises(ValueError, match="is trained"), pytest.warns(UserWarning):
        model.save_pretrained(tmp_path / "adapter")


def test_an_adapter_with_frozen_parts_is_saved(bert, tmp_path):
    model = model_of(bert)
    for layer in model.lora_layers().values():
        layer.requires_grad_(False)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(model.adapter_state())


# Predictions in the order of the data


def of_sampler(loader, sampler):
    return DataLoader(loader.dataset, batch_size=4, sampler=sampler, collate_fn=loader.collate_fn)


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

    in_order = make_loader(phrases, tokenizer, batch_size=4)
    at_random = of_sampler(in_order, RandomSampler(in_order.dataset))
    for loader in (in_order, at_random, make_loader(phrases, tokenizer, 4, shuffle=True)):
        found = evaluate(model.train(), loader)
        assert model.training and found.n == 23 and found.predictions == predictions.tolist()
        assert found[:3] == (right / 23, *wilson_interval(right, 23))
        assert found.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-4)
    assert f"{right / 23:.1%}" in str(found) and "n = 23" in str(found)


def test_a_loader_that_repeats_or_leaves_out_sentences_is_refused(bert, tokenizer, phrases):
    model, loader = model_of(bert), make_loader(phrases, tokenizer, batch_size=4)
    weighted = of_sampler(loader, WeightedRandomSampler([1.0] * len(phrases), len(phrases)))
    with pytest.raises(ValueError, match=r"draws 23 of 23 sentences, not each once: use make_loader"):
        evaluate(model, weighted)
    loader.batch_sampler.set_epoch(0, start=2)
    with pytest.raises(ValueError, match=r"draws 15 of 23 sentences"):
        evaluate(model, loader)
    assert evaluate(model, loader).n == 23


def test_evaluating_draws_no_random_number(bert, tokenizer, phrases):
    model, loader = model_of(bert), make_loader(phrases, tokenizer, batch_size=4)
    state = torch.get_rng_state()
    evaluate(model, loader)
    assert torch.equal(torch.get_rng_state(), state)


# Names of labels


@pytest.fixture
def classifier_of(bert, tmp_path):
    """Return a function that writes a BERT with a head of its own and these names of labels."""

    def write(names):
        model = BertForSequenceClassification.from_pretrained(bert)
        torch.nn.init.normal_(model.classifier.weight)
        model.config.id2label = names
        model.config.label2id = {name: label for label, name in names.items()}
        model.save_pretrained(tmp_path)
        return model.eval()

    return write


def test_the_names_of_labels_are_kept_where_the_head_is_kept(classifier_of, batch, tmp_path):
    names = {0: "POSITIVE", 1: "NEGATIVE"}
    theirs = classifier_of(names)
    ours = LoRABertModel(str(tmp_path), dtype=torch.float32).eval()
    merged = ours.merge_and_unload()
    assert torch.allclose(ours(**batch).logits, theirs(**batch).logits, atol=1e-5)
    assert ours.config.id2label == merged.config.id2label == names
    assert merged.config.label2id == {"POSITIVE": 0, "NEGATIVE": 1}
    ours.save_pretrained(tmp_path / "adapter")
    assert LoRABertModel.from_pretrained(tmp_path / "adapter").config.id2label == names


@pytest.mark.parametrize("names", [{0: "LABEL_0", 1: "LABEL_1"}, {0: "NEGATIVE", 1: "POSITIVE"}], ids=str)
def test_a_head_without_names_of_its_own_gets_those_of_sst2(classifier_of, tmp_path, names):
    classifier_of(names)
    assert LoRABertModel(str(tmp_path)).config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    find_model(str(tmp_path), announce=False)


def test_a_new_head_is_named_as_sst2_whatever_the_config_says(own_bert):
    config = json.loads((own_bert / "config.json").read_text())
    (own_bert / "config.json").write_text(json.dumps(config | {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}}))
    assert LoRABertModel(str(own_bert)).config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    find_model(str(own_bert), announce=False)


@pytest.mark.parametrize("names", [{0: "POSITIVE", 1: "NEGATIVE"}, {0: "positive", 1: "neg"}], ids=str)
def test_the_lessons_refuse_a_head_whose_names_contradict_the_data(classifier_of, tmp_path, names):
    classifier_of(names)
    with pytest.raises(ValueError, match=r"labels 0 .*[pP]\w+.*in the data 0 is negative"):
        find_model(str(tmp_path))


@pytest.mark.parametrize("names", ['{"0": "POSITIVE"}', '["neg", "pos"]', '"x"', "nothing", '{"0": "possible"}'])
def test_odd_names_of_labels_are_refused_in_words_or_taken(classifier_of, tmp_path, names):
    classifier_of({0: "LABEL_0", 1: "LABEL_1"})
    (tmp_path / "config.json").write_text('{"model_type": "bert", "id2label": ' + names + "}")
    if "possible" in names:
        find_model(str(tmp_path), announce=False)
    else:
        with pytest.raises(ValueError, match=r"config\.json or .* is damaged|labels 0 POSITIVE and 1 None"):
            find_model(str(tmp_path))


# A base that is not finite


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}, {"base_bits": 8}, {"base_bits": 4}], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_a_base_that_is_not_finite_as_stored_or_as_cast_is_refused_by_name(own_bert, value, options):
    tensors = load_file(own_bert / "model.safetensors")
    name = next(name for name in tensors if name.endswith("key.weight"))
    tensors[name][3, 4] = value
    save_file(tensors, own_bert / "model.safetensors", {"format": "pt"})
    kind = qLoRABertModel if "base_bits" in options else LoRABertModel
    options = {"dtype": torch.float32, **options}
    if value == 1e30 and options["dtype"] is torch.float32:
        kind(str(own_bert), **options)
        return
    with pytest.raises(ValueError, match=r"bert\.encoder\.layer\.\d\.attention\.self\.key\.weight holds .*not finite"):
        kind(str(own_bert), **options)


# Lengths


def test_a_sentence_is_cut_at_the_smallest_of_the_limits(phrases):
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    long = phrases.select([0]).map(lambda row: {"sentence": "word " * 2000})
    for limit, longest in ((128, 128), (10**30, 512)):
        tokenizer.model_max_length = limit
        (batch,) = make_loader(long, tokenizer)
        assert batch["input_ids"].shape == (1, longest)


def test_more_tokens_than_the_base_has_are_refused_with_what_to_do(bert, batch):
    model = model_of(bert)
    with pytest.raises(ValueError, match=r"input_ids are 101 to 30522, allowed are 0 to 30521: use the tokenizer of"):
        model(torch.tensor([[101, 30522]]))
    with pytest.raises(ValueError, match=r"600 tokens, and this BERT takes at most 512.*model_max_length"):
        model(torch.ones(1, 600, dtype=torch.long))


# Labels of another shape or dtype


@pytest.mark.parametrize("labels", [[0.0, 1.0, 1.0], [[0], [1], [1]], [True, False, True], [0]], ids=str)
def test_labels_of_another_shape_or_dtype_are_refused(bert, batch, labels):
    with pytest.raises(ValueError, match=r"labels are .*: they must be whole numbers, one for each"):
        model_of(bert)(**{**batch, "labels": torch.tensor(labels)})


def test_int32_labels_give_the_same_loss(bert, batch):
    model = model_of(bert)
    assert torch.equal(model(**{**batch, "labels": batch["labels"].int()}).loss, model(**batch).loss)


@pytest.mark.parametrize("split", [[{"sentence": "good", "label": 1}], {"sentence": ["good"]}, None], ids=str)
def test_data_that_is_no_dataset_is_refused(tokenizer, split):
    with pytest.raises(ValueError, match=r"split is a \w+ with the columns None: it must be a datasets.Dataset"):
        make_loader(split, tokenizer)


def test_streamed_data_and_data_without_labels_are_refused(bert, tokenizer, phrases):
    with pytest.raises(ValueError, match=r"split is a IterableDataset"):
        make_loader(phrases.to_iterable_dataset(), tokenizer)
    with pytest.raises(ValueError, match=r"the columns \['sentence'\]"):
        make_loader(phrases.remove_columns("label"), tokenizer)
    loader = make_loader(phrases, tokenizer)
    for row in loader.dataset:
        del row["labels"]
    with pytest.raises(ValueError, match=r"a batch holds input_ids, .*but no labels"):
        evaluate(model_of(bert), loader)


# Checkpoints that are no single safetensors file, or a damaged one


def test_a_checkpoint_in_another_form_is_refused_with_the_way_to_convert_it(bert, tmp_path):
    config = (bert / "config.json").read_bytes()
    weights = load_file(bert / "model.safetensors")
    for form, file in (("bin", "pytorch_model.bin"), ("shards", "model-00001-of-00002.safetensors")):
        (tmp_path / form).mkdir()
        (tmp_path / form / "config.json").write_bytes(config)
        (tmp_path / form / file).write_bytes(b"")
        with pytest.raises(
            ValueError, match=rf"no model\.safetensors in .*{file}.*BertForSequenceClassification\.from_pretrained"
        ):
            LoRABertModel(str(tmp_path / form))
    (tmp_path / "config.json").write_bytes(config)
    without_pooler = {name: tensor for name, tensor in weights.items() if "pooler" not in name}
    save_file(without_pooler, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 2 .*pooler.*BertForSequenceClassification\.from_pretrained"):
        LoRABertModel(str(tmp_path))
    BertForSequenceClassification.from_pretrained(tmp_path).save_pretrained(tmp_path / "converted")
    LoRABertModel(str(tmp_path / "converted"))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", None], ids=str)
def test_a_damaged_checkpoint_is_refused_by_the_name_of_its_file(own_bert, content):
    file = own_bert / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file.*download it again"):
        LoRABertModel(str(own_bert))


def test_an_adapter_whose_base_has_moved_says_which_argument_takes_another(bert, tmp_path):
    model_of(bert).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace(str(bert), str(tmp_path / "gone")))
    with pytest.raises(ValueError, match=r"gone.*base_model_name_or_path: give from_pretrained another by model_name="):
        LoRABertModel.from_pretrained(tmp_path)
    LoRABertModel.from_pretrained(tmp_path, model_name=str(bert))


# Other libraries


@pytest.mark.parametrize("options", [{}, {"base_bits": 4}], ids=str)
def test_transformers_own_forward_works_with_a_base_in_16_bits(bert, batch, options):
    kind = qLoRABertModel if options else LoRABertModel
    model = randomise(kind(str(bert), dtype=torch.bfloat16, **options)).eval()
    theirs, ours = model.model(**batch), model(**batch)
    assert theirs.logits.dtype == torch.float32
    assert torch.allclose(theirs.logits, ours.logits, atol=0.1)


@pytest.mark.parametrize("kind", [LoRABertModel, qLoRABertModel])
def test_accelerate_can_offload_the_weights(bert, batch, kind):
    options = {"base_bits": 4} if kind is qLoRABertModel else {}
    model = model_of(bert, kind, **options)
    expected = model(**batch).logits
    offloaded = cpu_offload(copy.deepcopy(model), execution_device="cpu")
    assert offloaded.model.bert.pooler.dense.bias.is_meta
    assert torch.allclose(offloaded(**batch).logits, expected, atol=1e-5)


@pytest.mark.parametrize("kind", [LoRABertModel, qLoRABertModel])
@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"activation_checkpointing": True}, {}], ids=str)
def test_trainer_trains_it(bert, tokenizer, phrases, tmp_path, kind, options):
    model = model_of(bert, kind)
    assert model.config is model.model.config
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **options
    )
    loader = make_loader(phrases, tokenizer)
    trainer = Trainer(model, arguments, train_dataset=loader.dataset, data_collator=loader.collate_fn)
    trainer.train()
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert changed == {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.save_pretrained(tmp_path)


# Another default dtype


@pytest.mark.slow
def test_the_module_computes_the_same_whatever_the_default_dtype_is():
    code = """if True:
        import torch
        {before}
        import lora_utils
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        x = torch.randn(8, 128, dtype=torch.float32)
        linear = torch.nn.Linear(128, 8, dtype=torch.float32)
        linear.weight.data.copy_(x)
        q, scale = lora_utils.quantize(x, 3)
        decoded = [lora_utils.QuantizedLinear(linear, bits).dequantize() for bits in (4, 8)]
        print(q.sum().item(), scale.dtype, scale.sum().item(), [(d.dtype, d.double().sum().item()) for d in decoded])
    """
    printed = []
    for before in ("", "torch.set_default_dtype(torch.float64)"):
        command = [sys.executable, "-c", code.format(before=before)]
        printed.append(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert printed[0] == printed[1] and "torch.float32" in printed[0] and "float64" not in printed[0]


# Two writers of one folder


def test_two_writers_of_one_folder_leave_a_whole_adapter_and_no_other_file(bert, batch, tmp_path, monkeypatch):
    first, second = model_of(bert, rank=2), model_of(bert, rank=3)
    sync, written = os.fsync, []

    def write_in_between(descriptor):
        sync(descriptor)
        if not written:
            written.append(True)
            second.save_pretrained(tmp_path)

    monkeypatch.setattr(os, "fsync", write_in_between)
    first.save_pretrained(tmp_path)
    loaded = LoRABertModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded(**batch).logits, first(**batch).logits)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
