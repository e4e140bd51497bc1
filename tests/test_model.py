"""Check `LoRABertModel`: its targets, the machine's format, and which arguments it refuses."""

import json

import pytest
import torch

from lora_utils import LoRABertModel, detect_compute_format, match_targets, qLoRABertModel

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
        (LAPTOP, "AVX2", "", torch.float32, "onednn"),
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


@pytest.mark.parametrize("major, dtype", [(8, torch.bfloat16), (7, torch.float16), (6, torch.float32)])
def test_a_gpu_without_bf16_takes_float16_if_it_has_tensor_cores(monkeypatch, major, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or major >= 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    assert detect_compute_format() == (dtype, "sdpa", None)


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
    for config in ({"model_type": "distilbert"}, {"model_type": "bert", "is_decoder": True}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"is a (checkpoint of type 'distilbert'|decoder of type 'bert'): allowed"):
            LoRABertModel(str(tmp_path))


def test_forward_returns_transformers_output_and_refuses_a_label_out_of_range(bert, batch):
    model = LoRABertModel(str(bert))
    labels = batch.pop("labels")
    assert list(model(**batch)) == ["logits"] and list(model(**batch, labels=labels)) == ["loss", "logits"]
    for wrong in (-100, 2):
        labels[1] = wrong
        with pytest.raises(ValueError, match=f"{wrong}.*: allowed are 0 to 1"):
            model(**batch, labels=labels)
