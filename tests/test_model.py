"""Check `LoRABertModel`: what is trained, what is computed, how it merges, and which arguments it refuses."""

import copy
import json
import math

import pytest
import torch
from conftest import randomise
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_utils import LoRABertModel, detect_compute_format, match_targets, qLoRABertModel

TARGETS = [("query", "value"), ["dense"], "all-linear", r".*\.1\.attention\.self\.(query|key)"]


def float32(bert, **options):
    return LoRABertModel(str(bert), dtype=torch.float32, **options)


def a_few_steps(model, batch, steps=3, learning_rate=1e-2):
    """Train on one batch and return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def test_everything_is_frozen_but_a_b_and_the_head(bert):
    model = float32(bert)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or "classifier" in name), name


def test_the_head_is_trained_and_not_wrapped(bert):
    model = float32(bert, target_modules="all-linear")
    assert type(model.model.classifier) is torch.nn.Linear
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.model.classifier.parameters())


def test_the_pooler_is_one_of_all_linear_and_of_dense(bert):
    for targets in ("all-linear", ["dense"]):
        assert "bert.pooler.dense" in float32(bert, target_modules=targets).lora_layers()
    assert len(float32(bert, target_modules="all-linear").lora_layers()) == 2 * 6 + 1


@pytest.mark.parametrize(
    "targets, count",
    [(["query"], 2), (["attention.output.dense"], 2), (["output.dense"], 4), (["layer.1.attention.self.query"], 1)],
)
def test_a_target_matches_the_end_of_a_path(bert, targets, count):
    assert len(float32(bert, target_modules=targets).lora_layers()) == count


def test_a_fresh_model_gives_the_logits_of_the_checkpoint(bert, batch):
    torch.manual_seed(3)
    model = float32(bert).eval()
    plain = BertForSequenceClassification.from_pretrained(bert).eval()
    plain.classifier.load_state_dict(model.model.classifier.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, atol=1e-6, rtol=1e-6)


def test_forward_returns_transformers_output_with_the_mean_cross_entropy(bert, batch):
    model = randomise(float32(bert))
    output = model(**batch)
    assert isinstance(output, SequenceClassifierOutput) and output.logits.dtype == torch.float32
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, batch["labels"]))
    assert model(batch["input_ids"], batch["attention_mask"]).loss is None


def test_padding_does_not_change_the_logits(bert, batch):
    model = randomise(float32(bert)).eval()
    without_padding = model(batch["input_ids"][1:2, :4]).logits
    torch.testing.assert_close(model(**batch).logits[1:2], without_padding, atol=1e-5, rtol=1e-5)


def test_three_steps_move_a_b_and_the_head_and_not_one_bit_of_anything_else(bert, batch):
    torch.manual_seed(0)
    model = LoRABertModel(str(bert))
    before = copy.deepcopy(model.state_dict())
    a_few_steps(model, batch)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name or "classifier" in name), name


def test_the_same_seed_gives_the_same_losses(bert, batch):
    def losses():
        torch.manual_seed(7)
        return a_few_steps(LoRABertModel(str(bert), dropout=0.3), batch, steps=4)

    assert losses() == losses()


def test_the_backbones_dropout_is_off_and_loras_is_the_argument(bert, batch):
    model = randomise(float32(bert)).train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model = randomise(float32(bert, dropout=0.5)).train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


def test_frozen_weights_are_stored_in_the_machines_dtype_or_the_one_asked_for(bert):
    for asked, stored in ((None, detect_compute_format().dtype), (torch.bfloat16, torch.bfloat16)):
        model = LoRABertModel(str(bert), dtype=asked)
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {stored}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


SERVER = {"avx2": True, "avx512_vnni": True, "avx512_bf16": True, "l2_cache_size": 1}
LAPTOP = {"avx2": True, "avx_vnni": True}


@pytest.mark.parametrize(
    "able, aten, held_to, dtype, int8",
    [
        (SERVER, "AVX512", "", torch.bfloat16, "onednn"),
        (SERVER | {"avx512_bf16": False, "amx_bf16": True}, "AVX512", "", torch.bfloat16, None),
        (SERVER | {"amx_bf16": True}, "AVX512", "AVX512_CORE_BF16", torch.bfloat16, "onednn"),
        (SERVER, "AVX512", "avx512_core_vnni", torch.float32, "onednn"),
        (SERVER, "AVX512", "AVX512_CORE", torch.float32, "fbgemm"),
        (SERVER, "AVX2", "AVX2", torch.float32, "fbgemm"),
        (SERVER, "AVX2", "", torch.float32, "onednn"),  # only PyTorch is capped, not oneDNN
        (SERVER, "AVX2", "AVX2_VNNI", torch.float32, "fbgemm"),  # which this CPU does not have
        (SERVER | {"avx_vnni": True}, "AVX2", "AVX2_VNNI", torch.float32, "onednn"),
        (SERVER | {"avx512_bf16": False}, "AVX512", "", torch.float32, "onednn"),
        (LAPTOP, "AVX2", "", torch.float32, "onednn"),
        (LAPTOP | {"avx_vnni": False}, "AVX2", "", torch.float32, "fbgemm"),
        (LAPTOP, "AVX2", "SSE41", torch.float32, "fbgemm"),
        ({"architecture": "aarch64", "bf16": True, "i8mm": True}, "DEFAULT", "", torch.float32, None),  # in doubt
        ({}, "DEFAULT", "", torch.float32, None),
    ],
)
def test_the_machine_decides_on_bf16_and_on_int8_arithmetic(monkeypatch, able, aten, held_to, dtype, int8):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: aten)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", held_to)
    found = detect_compute_format()
    assert found == (dtype, "eager", int8) and found._fields == ("dtype", "attention", "int8")


@pytest.mark.parametrize(
    ("bf16", "capability", "dtype"),
    [
        *[(True, (9, 0), torch.bfloat16), (True, (8, 0), torch.bfloat16)],
        *[(False, (7, 5), torch.float16), (False, (7, 0), torch.float16), (False, (6, 1), torch.float32)],
    ],
)
def test_a_gpu_without_bf16_takes_float16_if_it_has_tensor_cores(monkeypatch, bf16, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert detect_compute_format() == (dtype, "sdpa", None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_trained_merges_and_unmerges(bert, batch, dtype):
    model = LoRABertModel(str(bert), dtype=dtype, target_modules="all-linear")
    a_few_steps(model, batch)
    before = model(**batch).logits
    state = copy.deepcopy(model.state_dict())
    for layer in model.lora_layers().values():
        layer.merge()
    tolerance = 1e-5 if dtype is torch.float32 else 5e-2
    torch.testing.assert_close(model(**batch).logits, before, atol=tolerance, rtol=tolerance)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for layer in model.lora_layers().values():
        layer.unmerge()
    assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", [False, True])
def test_merge_and_unload_gives_a_plain_float32_bert_with_the_same_logits(bert, batch, tmp_path, dtype, merged):
    model = LoRABertModel(str(bert), dtype=dtype, target_modules="all-linear")
    a_few_steps(model, batch)
    in_float32 = copy.deepcopy(model).float().eval()
    if merged:
        for layer in model.lora_layers().values():
            layer.merge()
    state = copy.deepcopy(model.state_dict())
    plain = model.merge_and_unload()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert type(plain) is BertForSequenceClassification and {p.dtype for p in plain.parameters()} == {torch.float32}
    assert plain.config.hidden_dropout_prob == plain.config.attention_probs_dropout_prob == 0.1
    assert plain.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}

    plain.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = in_float32(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(loaded(**batch).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_small_update_survives_merge_and_unload_from_bf16(bert):
    model = LoRABertModel(str(bert), dtype=torch.bfloat16)
    name, layer = next(iter(model.lora_layers().items()))
    torch.nn.init.normal_(layer.lora_B, std=1e-4)
    merged = model.merge_and_unload().get_submodule(name).weight
    update = layer.delta_weight()
    kept = merged - layer.base.weight.float()
    assert (kept - update).norm() < 1e-3 * update.norm()


def test_state_dict_deepcopy_autocast_and_to_work(bert, batch):
    model = randomise(float32(bert)).eval()
    expected = model(**batch).logits
    other = float32(bert).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**batch).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).logits, expected, atol=0.1, rtol=0.1)
    double = model.to(torch.float64)
    torch.testing.assert_close(double(**batch).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_a_saved_adapter_loads_with_the_same_logits(bert, batch, tmp_path, targets):
    model = randomise(float32(bert, rank=3, alpha=5, target_modules=targets, use_rslora=True, num_labels=3)).eval()
    model.save_pretrained(tmp_path / "new" / "adapter")
    loaded = LoRABertModel.from_pretrained(tmp_path / "new" / "adapter", dtype=torch.float32).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert sorted(file.name for file in (tmp_path / "new" / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_bert_base_trains_as_many_parameters_as_predicted(tmp_path, capsys):
    with torch.device("meta"):
        base = BertForSequenceClassification(BertConfig(vocab_size=100))
    base = base.to_empty(device="cpu").requires_grad_(False)
    for parameter in base.parameters():
        parameter.zero_()
    base.bert.save_pretrained(tmp_path)
    model = LoRABertModel(str(tmp_path), rank=8)
    assert sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) == 294_912
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 296_450
    total = sum(p.numel() for p in BertForSequenceClassification(model.model.config).parameters()) + 294_912
    model.print_trainable_parameters()
    expected = f"trainable params: 296,450 || all params: {total:,} || trainable%: {100 * 296450 / total:.4f}"
    assert capsys.readouterr().out.strip() == expected


@pytest.fixture
def no_weights(bert, tmp_path):
    """Return a checkpoint that holds only its configuration, so that loading its weights fails otherwise."""
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    return str(tmp_path)


WRONG = [
    *({"rank": rank} for rank in (0, -1, 1.5, "8", True, 65)),
    *({"alpha": alpha} for alpha in (0, -2, math.nan)),
    *({"dropout": dropout} for dropout in (1.0, -0.1)),
    *({"target_modules": targets} for targets in ([], None, "", ["query", "qery"], "no_such_.*", ["classifier"])),
    *({"num_labels": labels} for labels in (0, 1, 2.0)),
    {"dtype": torch.int8},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_argument_is_refused_before_any_weights_are_loaded(no_weights, wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        LoRABertModel(no_weights, **wrong)
    shown = {"['query', 'qery']": "'qery'", "65": "65", "['classifier']": "'classifier'"}.get(str(value), repr(value))
    assert shown in str(error.value)
    assert "allowed" in str(error.value) or "must be" in str(error.value) or "at most" in str(error.value)


@pytest.mark.parametrize("model_class", [LoRABertModel, qLoRABertModel])
def test_all_options_are_given_by_name(no_weights, model_class):
    with pytest.raises(TypeError, match="positional argument"):
        model_class(no_weights, 8)


def test_a_model_that_is_not_there_is_refused(bert, tmp_path):
    for name in (str(tmp_path / "nothing"), "nobody/no-such-model", "not a name", "auto"):
        with pytest.raises(ValueError, match="allowed are") as error:
            LoRABertModel(name)
        assert name in str(error.value)
    for options in ({"model_name": str(tmp_path)}, {"model_name": str(bert), "folder": tmp_path}):
        with pytest.raises(ValueError, match=r"no config\.json") as error:
            LoRABertModel(**options)
        assert str(tmp_path) in str(error.value)


def test_the_base_is_loaded_from_the_folder_and_named_by_its_name(bert, batch, tmp_path):
    """The name may be a hub id that is not there, or another folder."""
    models = []
    for name, folder in ((str(bert), None), ("nobody/no-such-model", bert), (str(tmp_path), str(bert))):
        torch.manual_seed(0)
        models.append(float32(name, folder=folder).eval())
        assert models[-1].model_name == name
    for model in models[1:]:
        assert model.fingerprint == models[0].fingerprint
        assert torch.equal(model(**batch).logits, models[0](**batch).logits)


def test_a_checkpoint_that_is_not_a_bert_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
    with pytest.raises(ValueError, match="distilbert"):
        LoRABertModel(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True}))
    with pytest.raises(ValueError, match="is a decoder"):
        LoRABertModel(str(tmp_path))


@pytest.mark.parametrize("labels", [[0, 1, 2], [-1, 0, 1], [0, 0, -100]])
def test_a_label_out_of_range_is_refused(bert, batch, labels):
    with pytest.raises(ValueError, match="allowed are 0 to 1") as error:
        float32(bert)(**{**batch, "labels": torch.tensor(labels)})
    assert str(min(labels) if min(labels) < 0 else max(labels)) in str(error.value)


def test_a_layer_that_several_targets_name_is_adapted_once_in_the_models_order(bert):
    names = [f"layer.{i}.{part}" for i in (0, 1) for part in ("query", "value", "output.dense")]
    targets = ["dense", "output.dense", "1.query", "query", "layer.0.query"]
    assert match_targets(names, targets) == [name for name in names if not name.endswith("value")]
    model = float32(bert, target_modules=targets[:2])
    once = float32(bert, target_modules=targets[:1])
    assert list(model.lora_layers()) == list(once.lora_layers())
    assert {type(layer.base) for layer in model.lora_layers().values()} == {torch.nn.Linear}
