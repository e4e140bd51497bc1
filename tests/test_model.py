"""Check `LoRABertModel`: what is trained, what is computed, how it merges, and which arguments it refuses."""

import copy
import json

import pytest
import torch
from conftest import randomise
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_utils import LoRABertModel, detect_compute_format, match_targets


def float32(bert, **options):
    return LoRABertModel(str(bert), dtype=torch.float32, **options)


def train_three_steps(model, batch):
    """Train on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


NAMES = [f"layer.{i}.{part}" for i in (0, 1) for part in ("self.query", "output.dense", "dense")] + ["pooler.dense"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["query"], [0, 3]),
        (["output.dense"], [1, 4]),
        (["layer.1.self.query"], [3]),
        (["dense", "output.dense", "1.self.query"], [1, 2, 3, 4, 5, 6]),  # in the model's order, and once
        (r"layer\.1\.(self\.query|dense)", [3, 5]),
        ("all-linear", range(7)),
    ],
    ids=str,
)
def test_targets_match_the_ends_of_paths_or_a_whole_path(targets, expected):
    assert match_targets(NAMES, targets) == [NAMES[number] for number in expected]


def test_all_linear_has_the_pooler_and_not_the_head_and_no_layer_is_adapted_twice(bert):
    model = float32(bert, target_modules="all-linear")
    assert len(model.lora_layers()) == 2 * 6 + 1 and "bert.pooler.dense" in model.lora_layers()
    assert type(model.model.classifier) is torch.nn.Linear
    twice = float32(bert, target_modules=["dense", "output.dense"])
    assert {type(layer.base) for layer in twice.lora_layers().values()} == {torch.nn.Linear}


def test_forward_returns_transformers_output_with_the_mean_cross_entropy(bert, batch):
    model = randomise(float32(bert))
    output = model(**batch)
    assert isinstance(output, SequenceClassifierOutput) and output.logits.dtype == torch.float32
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, batch["labels"]))
    assert model(batch["input_ids"], batch["attention_mask"]).loss is None


def test_three_steps_move_a_b_and_the_head_and_not_one_bit_of_anything_else(bert, batch):
    torch.manual_seed(0)
    model = LoRABertModel(str(bert))
    before = copy.deepcopy(model.state_dict())
    train_three_steps(model, batch)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != ("lora_" in name or "classifier" in name), name


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
@pytest.mark.parametrize("merged", [False, True])
def test_merge_and_unload_gives_a_plain_float32_bert_with_the_same_logits(bert, batch, tmp_path, dtype, merged):
    model = LoRABertModel(str(bert), dtype=dtype, target_modules="all-linear")
    train_three_steps(model, batch)
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
    *({"rank": 65}, {"alpha": 0}, {"dropout": 1.0}, {"dtype": torch.int8}),
    *({"target_modules": targets} for targets in ([], None, "", ["query", "qery"], "no_such_.*", ["classifier"])),
    *({"num_labels": labels} for labels in (1, 2.0)),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_argument_is_refused_before_any_weights_are_loaded(no_weights, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        LoRABertModel(no_weights, **wrong)
    assert repr(value[-1] if isinstance(value, list) and value else value) in str(error.value)
    assert "allowed" in str(error.value) or "must be" in str(error.value) or "at most" in str(error.value)


def test_a_model_that_is_not_there_is_refused(bert, tmp_path):
    for name in (str(tmp_path / "nothing"), "nobody/no-such-model", "not a name", "auto"):
        with pytest.raises(ValueError, match="allowed are") as error:
            LoRABertModel(name)
        assert name in str(error.value)
    for options in ({"model_name": str(tmp_path)}, {"model_name": str(bert), "folder": tmp_path}):
        with pytest.raises(ValueError, match=r"no config\.json") as error:
            LoRABertModel(**options)
        assert str(tmp_path) in str(error.value)


def test_a_checkpoint_that_is_not_a_bert_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "distilbert"}))
    with pytest.raises(ValueError, match="distilbert"):
        LoRABertModel(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "is_decoder": True}))
    with pytest.raises(ValueError, match="is a decoder"):
        LoRABertModel(str(tmp_path))


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, -100]])
def test_a_label_out_of_range_is_refused(bert, batch, labels):
    with pytest.raises(ValueError, match="allowed are 0 to 1") as error:
        float32(bert)(**{**batch, "labels": torch.tensor(labels)})
    assert str(min(labels) if min(labels) < 0 else max(labels)) in str(error.value)


def test_a_target_is_a_whole_name_at_the_end_of_a_path():
    assert match_targets(["block.query", "block.subquery", "query"], ["query"]) == ["block.query", "query"]
