"""The tests are tested: each breakage of a copy of lora_utils.py must be caught by the test that is named beside it."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from forked import fork

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
        "return self.base(x) + self.scaling",
        "return self.base(self.dropout(x)) + self.scaling",
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
        "nn.Parameter(tensor, requires_grad=False)",
        "nn.Parameter(tensor)",
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
        "state |= dict(self.model.classifier.named_parameters(HEAD))",
        "pass",
        "model",
        "a_saved_adapter_loads_with_the_same_logits",
    ),
    (
        "the update is added in the dtype of the base",
        'weights[f"{name}.weight"] + layer.delta_weight()',
        "(layer.base.weight + layer.delta_weight().to(layer.base.weight.dtype)).float()",
        "model",
        "a_small_update_survives_merge_and_unload_from_bf16",
    ),
    (
        "padding is attended to",
        "masked_fill(attention_mask == 0,",
        "masked_fill(attention_mask == 2,",
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
        "a row of zeros divides by zero",
        "unit = x / largest.where(largest > 0, 1)",
        "unit = x / largest",
        "qlora",
        "while_b_is_zero_the_layer_computes_exactly_what_its_base_computes",
    ),
    (
        "nothing passes through the rounding",
        "    def backward(ctx, gradient):\n        return gradient, None",
        "    def backward(ctx, gradient):\n        return torch.zeros_like(gradient), None",
        "qlora",
        "gradients_reach_b_from_the_first_step",
    ),
    (
        "scales have more digits than the integers leave room for",
        ".add(0x80).bitwise_and(~0xFF)",
        "",
        "quantization",
        "rounding_what_was_rounded_changes_nothing",
    ),
    (
        "every integer takes a byte",
        "ones = F.pad(ones.flatten(), (0, -ones.numel() % 8)).view(-1, 8)",
        "ones = F.pad(ones, (8 - bits, 0)).view(-1, 8)",
        "quantization",
        "packing_takes_no_gaps",
    ),
    (
        "ties go to the upper code",
        "out_int32=True)",
        "out_int32=True, right=True)",
        "quantization",
        "the_nearest_code_of_a_tie_is_the_lower",
    ),
    (
        "the nibbles are swapped",
        "code[:, 0] << 4 | code[:, 1]",
        "code[:, 1] << 4 | code[:, 0]",
        "quantization",
        "nf4_bytes_and_values_are_those_of_bitsandbytes",
    ),
    (
        "the scales are not quantised around their mean",
        "offset = scales.mean()",
        "offset = scales.mean() * 0",
        "quantization",
        "nf4_bytes_and_values_are_those_of_bitsandbytes",
    ),
    (
        "the decoded weight is kept for backward",
        "        ctx.layer = layer\n",
        "        ctx.layer = layer\n        ctx.save_for_backward(layer.dequantize(x.dtype))\n",
        "quantization",
        "nothing_decoded_is_kept_for_backward",
    ),
    (
        "ranks do not make up for one another",
        "rows[to_come] += inverse",
        "rows[to_come] += 0 * inverse",
        "quantization",
        "rounded_together_the_product_keeps_more",
    ),
    (
        "packing keeps the float matrices",
        "        self.lora_A = self.lora_B = None\n",
        "        pass\n",
        "qlora",
        "packed_it_computes_the_same_to_the_last_bit_from_fewer_bytes",
    ),
    (
        "the head is quantised",
        "isinstance(module, (nn.Linear, nn.Embedding)) and name != HEAD",
        "isinstance(module, (nn.Linear, nn.Embedding))",
        "qlora",
        "every_frozen_linear_layer_and_embedding_is_quantised_and_the_head_is_not",
    ),
    (
        "a storage is counted twice",
        "if storage.data_ptr() not in storages:",
        "if True:",
        "qlora",
        "the_ledger_counts_what_the_storages_hold",
    ),
    (
        "the gradient of A is not scaled",
        "to_h = ctx.scaling * (g @ B)",
        "to_h = g @ B",
        "fast_paths",
        "an_adapted_layer_and_its_gradients_are_those_of_the_formula",
    ),
    (
        "no gradient passes down through the update",
        "to_x.addmm_(to_h, A)",
        "pass",
        "fast_paths",
        "an_adapted_layer_and_its_gradients_are_those_of_the_formula",
    ),
    (
        "the gradient of an 8-bit weight is not scaled",
        "(gradient * self._scale_by_row(gradient.dtype)) @",
        "gradient @",
        "fast_paths",
        "a_quantised_layer_computes_and_differentiates_with_its_decoded_weight",
    ),
    (
        "rows rounded to integers are not scaled back",
        ".to(x.dtype).mul_(t.to(x.dtype))",
        ".to(x.dtype)",
        "fast_paths",
        "int8_arithmetic_is_the_product_of_the_rounded_numbers",
    ),
    (
        "integers beyond 8 bits wrap around",
        "(x * (1 / t)).round_()",
        "(x * (1.02 / t)).round_()",
        "fast_paths",
        "int8_arithmetic_does_not_overflow_where_everything_is_as_large_as_can_be",
    ),
    (
        "int8 arithmetic is taken without instructions for it",
        "self.int8_arithmetic = bits == 8 and native_arithmetic().int8",
        "self.int8_arithmetic = bits == 8",
        "fast_paths",
        "a_layer_takes_int8_arithmetic_where_the_machine_does",
    ),
    (
        "the last block attends to padding",
        "(scores if mask is None else scores + mask)",
        "scores",
        "fast_paths",
        "the_first_row_alone_gives_the_logits_and_gradients_of_all_rows",
    ),
    (
        "the last block computes every row",
        "hidden[:, :1].contiguous()",
        "hidden.contiguous()",
        "fast_paths",
        "the_last_block_computes_no_row_that_is_not_read",
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
        "in sorted(found)]",
        "in found]",
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
    (
        "a config need not be the one that its tensors were written with",
        'differences(config | movable, (record["config"] if record else config) | movable)',
        "()",
        "saving",
        "a_damaged_or_mismatched_folder_is_refused",
    ),
    (
        "values that are not finite are loaded",
        "if len(bad):",
        "if bad is None:",
        "saving",
        "a_damaged_or_mismatched_folder_is_refused",
    ),
    (
        "what PEFT has and we have not is passed over",
        "field not in PEFT_ASIDE and value not in allowed",
        "field not in PEFT_ASIDE and value is allowed",
        "saving",
        "what_peft_has_and_we_have_not_is_refused",
    ),
    (
        "a refused adapter stays in",
        "self.exchange(layers_before, head_before)",
        "pass",
        "saving",
        "a_damaged_or_mismatched_folder_is_refused",
    ),
    (
        "the base is not compared",
        '{"base": model.fingerprint, "scaling": scaling}',
        '{"scaling": scaling}',
        "saving",
        "an_adapter_on_another_base_is_refused",
    ),
    (
        "an adapter is exchanged while the old one is merged",
        "layer.unmerge()  # the base that it shared with its successor",
        "pass",
        "saving",
        "load_adapter_unmerges_first",
    ),
    (
        "a resumed run draws other random numbers",
        "        module.set_rng_state(",
        "        str(",
        "running",
        "a_run_that_was_given_up_is_taken_up",
    ),
    (
        "batches take from the random numbers of the model",
        "collate_fn=DataCollatorWithPadding(tokenizer), generator=generator)",
        "collate_fn=DataCollatorWithPadding(tokenizer))",
        "running",
        "a_run_that_was_given_up_is_taken_up",
    ),
    (
        "processes take the same rows",
        "slice(number, None, count)",
        "slice(0, None, count)",
        "running",
        "the_rows_of_all_processes_are_those_of_the_batch",
    ),
]


def run_pytest(folder, arguments):
    """In a process of its own: pytest on the copy in the folder, which alone may be imported, its output in a file."""
    os.chdir(folder)
    real = (ROOT, ROOT / "tests", ROOT / "benchmarks")
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in real]
    with open("output", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.exit(pytest.main(arguments))


def run_one_test(folder, file, name):
    """Exit code and output of pytest on one test of the copy in a folder."""
    # a fork skips the exit handlers by which pytest gives temporary folders free, so they are named and removed here
    arguments = ["-q", "-p", "no:cacheprovider", "--basetemp=temporary", f"tests/test_{file}.py", "-k", name]
    process = fork(run_pytest, folder, arguments)
    process.join(timeout=300)
    process.kill()  # does nothing to a process that has ended
    process.join()
    shutil.rmtree(folder / "temporary", ignore_errors=True)
    return process.exitcode, (folder / "output").read_text()


def test_every_breakage_has_its_place_in_the_code():
    source = (ROOT / "lora_utils.py").read_text()
    assert [code for _, code, *_ in BREAKAGES if source.count(code) != 1] == []


@pytest.fixture
def a_copy(tmp_path):
    for name in ("lora_utils.py", "pyproject.toml", "LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"):
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
    status, output = run_one_test(a_copy, file, name)
    assert status == 1 and "failed" in output, output


@pytest.mark.slow
def test_the_unbroken_copy_passes_the_same_tests(a_copy):
    for file in dict.fromkeys(file for *_, file, _ in BREAKAGES):
        names = " or ".join(name for _, _, _, of_file, name in BREAKAGES if of_file == file)
        status, output = run_one_test(a_copy, file, names)
        assert status == 0, output
