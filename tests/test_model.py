"""Check `LoRABertModel`: what is trained, what is computed, how it merges, and which arguments it refuses."""

import copy
import json

import pytest
import torch
from conftest import randomise, train
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_utils import LoRABertModel, QuantizedLoRALayer, detect_compute_format, match_targets, qLoRABertModel


def float32(bert, **options):
    return LoRABertModel(str(bert), dtype=torch.float32, **options)


NAMES = [f"layer.{i}.{part}" for i in (0, 1) for part in ("self.query", "output.dense", "dense")]
NAMES += ["pooler.dense", "query", "subquery"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["query"], [0, 3, 7]),  # whole names only
        (["output.dense"], [1, 4]),
        (["layer.1.self.query"], [3]),
        (["dense", "output.dense", "1.self.query"], [1, 2, 3, 4, 5, 6]),  # in the model's order, and once
        (r"layer\.1\.(self\.query|dense)", [3, 5]),
        ("all-linear", range(9)),
    ],
    ids=str,
)
def test_targets_match_the_ends_of_paths_or_a_whole_path(targets, expected):
    assert match_targets(NAMES, targets) == [NAMES[number] for number in expected]


def test_the_backbones_dropout_is_off_and_loras_is_the_argument(bert, batch):
    model = randomise(float32(bert)).train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model = randomise(float32(bert, dropout=0.5)).train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)


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
        (SERVER, "AVX2", "", torch.float32, "onednn"),  # only PyTorch is capped, not oneDNN
        (SERVER, "AVX2", "AVX2_VNNI", torch.float32, "fbgemm"),  # which this CPU does not have
        (SERVER | {"avx_vnni": True}, "AVX2", "AVX2_VNNI", torch.float32, "onednn"),
        (SERVER | {"avx512_bf16": False}, "AVX512", "", torch.float32, "onednn"),
        (LAPTOP, "AVX2", "", torch.float32, "onednn"),
        (LAPTOP | {"avx_vnni": False}, "AVX2", "", torch.float32, "fbgemm"),
        ({"architecture": "aarch64", "bf16": True, "i8mm": True}, "DEFAULT", "", torch.float32, None),  # in doubt
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
    "bf16, capability, dtype",
    [(True, (8, 0), torch.bfloat16), (False, (7, 0), torch.float16), (False, (6, 1), torch.float32)],
)
def test_a_gpu_without_bf16_takes_float16_if_it_has_tensor_cores(monkeypatch, bf16, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert detect_compute_format() == (dtype, "sdpa", None)


QUANTISED = [{"bits": bits, "base_bits": base_bits} for bits, base_bits in ((2, None), (3, 8), (8, 4))]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, *QUANTISED], ids=str)
def test_merge_and_unload_gives_a_plain_float32_bert_with_the_same_logits(bert, batch, tmp_path, options, prepared):
    model_class = qLoRABertModel if "bits" in options else LoRABertModel
    model = model_class(str(bert), **{"dtype": torch.float32, "target_modules": "all-linear", **options})
    assert len(model.lora_layers()) == 2 * 6 + 1 and "bert.pooler.dense" in model.lora_layers()
    train(model, batch)
    in_float32 = copy.deepcopy(model).float().eval()
    for layer in model.lora_layers().values() if prepared else ():
        layer.pack() if isinstance(layer, QuantizedLoRALayer) else layer.merge()
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


def test_trained_parameters_are_counted_and_quantised_weights_by_the_numbers_they_stand_for(bert, capsys):
    plain = BertForSequenceClassification(BertConfig.from_pretrained(bert))
    total = sum(p.numel() for p in plain.parameters()) + 4 * 8 * (64 + 64)
    for model in (float32(bert), *(qLoRABertModel(str(bert), base_bits=base_bits) for base_bits in (None, 8, 4))):
        model.print_trainable_parameters()
        expected = f"trainable params: 4,226 || all params: {total:,} || trainable%: {100 * 4226 / total:.4f}"
        assert capsys.readouterr().out.strip() == expected
    assert LoRABertModel(str(bert)).dtype == detect_compute_format().dtype


WRONG = [
    *({"rank": 65}, {"alpha": 0}, {"dropout": 1.0}, {"dtype": torch.int8}),
    *({"target_modules": targets} for targets in ([], None, "", ["query", "qery"], "no_such_.*", ["classifier"])),
    *({"num_labels": labels} for labels in (1, 2.0)),
    *({"bits": 9}, *({"base_bits": bits} for bits in (3, 4.0, "4", True))),
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_wrong_argument_is_refused_before_any_weights_are_loaded(bert, tmp_path, wrong):
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=name) as error:
        (qLoRABertModel if "bits" in name else LoRABertModel)(str(tmp_path), **wrong)
    assert repr(value[-1] if isinstance(value, list) and value else value) in str(error.value)
    assert any(words in str(error.value) for words in ("allowed", "must be", "at most"))


def test_what_is_no_folder_of_a_bert_and_no_model_of_the_hub_is_refused(bert, tmp_path):
    for name in (str(tmp_path / "nothing"), "nobody/no-such-model", "not a name", "auto"):
        with pytest.raises(ValueError, match=f"{name}.*allowed are"):
            LoRABertModel(name)
    for options in ({"model_name": str(tmp_path)}, {"model_name": str(bert), "folder": tmp_path}):
        with pytest.raises(ValueError, match=rf"no config\.json in {tmp_path}"):
            LoRABertModel(**options)
    for config, found in (
        ({"model_type": "distilbert"}, "distilbert"),
        ({"model_type": "bert", "is_decoder": True}, "is a decoder"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=found):
            LoRABertModel(str(tmp_path))


def test_forward_returns_transformers_output_and_refuses_a_label_out_of_range(bert, batch):
    model = float32(bert)
    labels = batch.pop("labels")
    assert isinstance(model(**batch), SequenceClassifierOutput) and model(**batch).loss is None
    for wrong in (-100, 2):
        labels[1] = wrong
        with pytest.raises(ValueError, match=f"{wrong}.*: allowed are 0 to 1"):
            model(**batch, labels=labels)
