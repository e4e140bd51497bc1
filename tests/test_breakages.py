"""The tests are tested: each breakage of a copy of lora_utils.py must be caught by the test that is named beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# what breaks, the code, the broken code, the file and the test that must fail
BREAKAGES = [
    (
        "the update is not divided by the rank",
        "self.alpha / (math.sqrt(rank) if use_rslora else rank)",
        "self.alpha",
        "layer",
        "a_layer_computes_its_equation",
    ),
    (
        "the update is transposed",
        "(B.float() @ A.float())",
        "(B.float() @ A.float()).T",
        "layer",
        "a_merged_layer_computes_what_it_computed_before",
    ),
    (
        "B starts at random",
        "torch.zeros(base.out_features",
        "torch.randn(base.out_features",
        "layer",
        "a_fresh_lora_layer_computes_what_its_base_computes",
    ),
    (
        "A and B are stored in the dtype of the base",
        '{"dtype": torch.float32,',
        '{"dtype": base.weight.dtype,',
        "layer",
        "a_and_b_have_pefts_shapes_dtype_and_start",
    ),
    (
        "dropout reaches the base",
        "y = self.base(x)",
        "y = self.base(self.dropout(x))",
        "layer",
        "dropout_touches_the_update_only",
    ),
    (
        "unmerging subtracts",
        "self.base.weight.copy_(self.unmerged_weight)",
        "self.base.weight.sub_(self.delta_weight())",
        "layer",
        "unmerge_restores_the_weight_to_the_bit",
    ),
    (
        "freezing is forgotten",
        "return model.requires_grad_(False)",
        "return model",
        "model",
        "three_steps_move_a_b_and_the_head_and_not_one_bit",
    ),
    (
        "the head is not trained",
        "self.model.classifier.float().requires_grad_(True)",
        "self.model.classifier.float()",
        "model",
        "everything_is_frozen_but_a_b_and_the_head",
    ),
    (
        "the head is not saved",
        "for name, tensor in self.model.classifier.named_parameters(HEAD):",
        "for name, tensor in ():",
        "model",
        "a_saved_adapter_loads_with_the_same_logits",
    ),
    (
        "the update is added in the dtype of the base",
        'state[f"{name}.weight"] + layer.delta_weight()',
        "(layer.base.weight + layer.delta_weight().to(layer.base.weight.dtype)).float()",
        "model",
        "a_small_update_survives_merge_and_unload_from_bf16",
    ),
    (
        "padding is attended to",
        "attention_mask=attention_mask, token_type_ids",
        "token_type_ids",
        "model",
        "padding_does_not_change_the_logits",
    ),
    (
        "the backbone's dropout stays on",
        "config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0",
        "pass",
        "model",
        "the_backbones_dropout_is_off",
    ),
    (
        "the labels are in the other order",
        'names=["negative", "positive"]',
        'names=["positive", "negative"]',
        "data",
        "label_0_is_negative_and_label_1_is_positive",
    ),
    (
        "a batch is dropped",
        "in turns[start:]",
        "in turns[start:-1]",
        "data",
        "an_epoch_holds_every_sentence_once",
    ),
    (
        "predictions come in the order of the batches",
        "sorted(zip(indices, predictions, strict=True))",
        "zip(indices, predictions, strict=True)",
        "data",
        "evaluate_counts_every_sentence_and_keeps_the_order_of_the_data",
    ),
    (
        "every epoch has the same order",
        "self.seed * 1_000_003 + self.epoch",
        "self.seed",
        "data",
        "batches_reproduce_under_a_seed_and_change_with_seed_and_epoch",
    ),
]


def run_one_test(folder, file, name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/test_{file}.py", "-k", name]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def a_copy(tmp_path):
    for name in ("lora_utils.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("tests", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage[0])
def test_a_breakage_is_caught_by_the_test_that_is_named_for_it(a_copy, breakage):
    _, code, broken, file, name = breakage
    module = a_copy / "lora_utils.py"
    source = module.read_text()
    assert source.count(code) == 1, f"{code!r} stands {source.count(code)} times in lora_utils.py"
    module.write_text(source.replace(code, broken))
    result = run_one_test(a_copy, file, name)
    assert result.returncode == 1 and "failed" in result.stdout, result.stdout


@pytest.mark.slow
def test_the_unbroken_copy_passes_the_same_tests(a_copy):
    for file in ("layer", "model", "data"):
        names = " or ".join(name for _, _, _, of_file, name in BREAKAGES if of_file == file)
        result = run_one_test(a_copy, file, names)
        assert result.returncode == 0, result.stdout
