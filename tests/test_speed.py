"""The benchmarks of speed compare like with like, and their results keep what is promised for the machines measured."""

import itertools
import json
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import contenders
import nbformat
import pytest
import report
import tables_of_accuracy
import tables_of_speed

ROOT = Path(__file__).resolve().parents[1]
IDS = [[101, *range(1000, 1000 + n), 102] for n in itertools.islice(itertools.cycle(range(1, 60)), 1600)]

# What a ratio of sentences a second must reach: (part, machine): {(over, under): at least}
# What is promised in bfloat16 was set on a CPU with AMX. With AVX512_BF16 alone products take longer, what is saved
# around them counts for less, and what is promised beside others, and of the NF4 base, was measured and is missed.
MUST = {
    ("training", "amx_bf16"): {
        ("LoRA", "full fine-tuning, padded to 128"): 42,
        ("LoRA", "PEFT"): 4.2,
        ("LoRA", "PEFT, tuned"): 1.5,
        ("LoRA", "the frozen products alone"): 0.52,
        ("q-LoRA", "LoRA"): 0.95,
        ("q-LoRA, NF4 base", "PEFT, NF4 base"): 4.2,
        ("q-LoRA, NF4 base", "PEFT, NF4 base, tuned"): 1.6,
        ("q-LoRA, NF4 base", "LoRA"): 0.77,
    },
    ("training", "avx512_bf16"): {
        ("LoRA", "the frozen products alone"): 0.52,
        ("q-LoRA", "LoRA"): 0.95,
    },
    ("training", "avx2"): {("LoRA", "PEFT"): 3.0, ("LoRA", "PEFT, tuned"): 1.05},
    # Wanted and missed: with AVX2 1.40, 1.45 and, for one sentence, 1.4; with VNNI 2.6 in batches and 2.0 for one.
    ("integers-training", "avx2"): {("q-LoRA, int8 base", "LoRA"): 1.3},
    ("integers-training", "avx2_vnni"): {("q-LoRA, int8 base", "LoRA"): 1.6},
    ("integers-training", "avx512_core_vnni"): {("q-LoRA, int8 base", "LoRA"): 1.6},
    ("integers-training", "avx512_core_bf16"): {("q-LoRA, int8 base", "LoRA"): 1.1},
    ("integers-inference-batches-of-32", "avx2"): {("q-LoRA, int8 base", "torch.ao, dynamic int8"): 0.85},
    ("integers-inference-batches-of-32", "avx2_vnni"): {("q-LoRA, int8 base", "LoRA"): 1.8},
    ("integers-inference-batches-of-32", "avx512_core_bf16"): {("q-LoRA, int8 base", "LoRA"): 1.3},
}


def test_the_tables_in_readme_and_notebooks_are_those_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def texts():
    """Return {name: text} of README, benchmarks/README.md and every markdown cell that holds a table or number."""
    found = {}
    for name in report.FILES:
        if name.endswith(".md"):
            found[name] = (ROOT / name).read_text()
        else:
            cells = nbformat.read(ROOT / name, as_version=4).cells
            sources = [cell.source for cell in cells if cell.cell_type == "markdown" and "<!-- /" in cell.source]
            found |= {f"{name}, {number}": source for number, source in enumerate(sources)}
    return found


def change_a_digit(text, seed):
    """Change one digit of a text, drawn under a seed."""
    places = [place for place, character in enumerate(text) if character.isdigit()]
    place = random.Random(seed).choice(places)
    return f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"


@pytest.mark.parametrize("name", texts())
def test_the_check_sees_one_changed_digit_in_every_table_and_number(name):
    text = texts()[name]
    assert report.filled(text) == text
    blocks = re.findall(r"<!-- ([^/].*?) -->(.*?)<!-- /\1 -->", text, re.DOTALL)
    assert len(blocks) == text.count("<!-- /")
    for of_block, inside in blocks:
        for seed in range(3):
            changed = text.replace(inside, change_a_digit(inside, seed), 1)
            assert changed != text and report.filled(changed) == text, of_block


def test_no_table_has_a_measured_number_that_is_typed_in_by_hand():
    for name in ("README.md", "benchmarks/README.md"):
        outside = re.sub(r"<!-- ([^/].*?) -->(.*?)<!-- /\1 -->", "", (ROOT / name).read_text(), flags=re.DOTALL)
        for row in outside.splitlines():
            if row.startswith("|"):
                assert not re.search(r"\d\.\d|\d\s*%|\d,\d{3}|\d MB", row), row


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_stands_once_in_a_readme(name):
    places = [text for text in ("README.md", "benchmarks/README.md") if f"<!-- {name} -->" in (ROOT / text).read_text()]
    assert len(places) == 1


def test_the_report_complains_of_a_table_without_a_place(monkeypatch, capsys):
    monkeypatch.setitem(report.TABLES, "a new table", lambda: "| 1 |")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    assert report.main() and "a new table: has no place" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["<!-- no such table --><!-- /no such table -->", "<!-- training speed -->"])
def test_the_report_refuses_an_unknown_name_and_half_a_pair_of_marks(text):
    with pytest.raises(ValueError, match=r"no such table|needs one"):
        report.filled(text)


def test_the_ratios_are_what_was_promised_for_the_machines_that_were_measured():
    measured = 0
    for (part, machine), promised in MUST.items():
        for _, result in tables_of_speed.results(part, ["bert-base"]).items():
            if result["arithmetic"].lower() == machine:
                found = {(entry["over"], entry["under"]): entry["ratio"][0] for entry in result["ratios"]}
                assert {pair: found[pair] for pair in promised if found[pair] < promised[pair]} == {}
                measured += 1
    assert measured


def test_a_step_grows_by_15_percent_at_most_from_rank_1_to_64():
    measured = tables_of_speed.results("growth").values()
    assert measured and all(result["rank 64 over rank 1"][0] <= 1.15 for result in measured)


def test_training_through_integer_products_costs_half_a_point_at_most_on_held_out_phrases():
    found = tables_of_accuracy.int8_runs()
    assert len(found) == 4  # two kernels, each evaluated on two sets of sentences
    for (_, where), runs in found.items():
        mean, low, _ = tables_of_accuracy.interval([100 * (integers - exact) for exact, integers, *_ in runs])
        assert len(runs) >= 5
        if where != "validation":
            assert mean >= -0.5 and low > -1


def test_every_way_starts_from_the_same_sentences():
    def rows(way):
        of_way = contenders.batches(IDS, way, 50)
        assert len(of_way) == 50 and all(len(batch["input_ids"]) == 32 for batch in of_way)
        return sorted(
            tuple(ids[mask.bool()].tolist())
            for batch in of_way
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )

    assert rows("like length") == rows("random") == rows("to 128") == sorted(map(tuple, IDS))


@pytest.mark.parametrize("number", [4, 5, 10])
def test_a_few_batches_are_as_long_on_the_mean_as_all(number):
    ids, _ = contenders.sentences("auto")
    tokens = {}
    for way in ("like length", "random", "to 128"):
        few, every = (
            statistics.fmean(batch["input_ids"].shape[1] for batch in contenders.batches(ids, way, n))
            for n in (number, 50)
        )
        assert few == pytest.approx(every, rel=0.005)
        tokens[way] = few
    assert 2 * tokens["like length"] < tokens["random"] < tokens["to 128"] / 2


def test_contenders_take_turns_in_alternating_order(capsys):
    calls = []
    rivals = {name: (lambda _, name=name: calls.append(name), [0, 1]) for name in "ABC"}
    rates = contenders.alternate(rivals, 2, rounds=2)
    assert "".join(calls) == "ABC" + "ABC" + "CBA" + "ABC" + "CBA"
    assert all(len(values) == 2 for values in rates.values())


def test_without_sst_2_the_phrases_are_as_long_as_its_own():
    ids, name = contenders.sentences("auto")
    assert len(ids) == 1600 and name == "movie_phrases, cut to SST-2's lengths"
    assert 12.5 < statistics.fmean(map(len, ids)) < 14.7 and max(map(len, ids)) <= 66


def test_a_cpu_is_not_held_to_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(contenders.torch.cpu, "get_capabilities", dict)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    with pytest.raises(SystemExit):
        contenders.hold("AVX512_CORE_VNNI")
    assert "this CPU lacks avx512_vnni" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "ablation", "inference"])
def test_the_benchmark_of_speed_runs(tmp_path, part):
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", part, "--model", "packaged", "--rounds", "2"]
    done = subprocess.run([*command, "--batches", "1", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in tmp_path.iterdir():
        result = json.loads(file.read_text())
        assert all(rate > 0 for rates in result["sentences_a_second"].values() for rate in rates)


@pytest.mark.slow
def test_the_benchmark_of_memory_runs_and_a_smaller_base_takes_less(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--model", "packaged", "--batches", "2"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["bytes"]
    assert found["q-LoRA, NF4 base"]["peak"] < found["LoRA"]["peak"] < found["full fine-tuning, padded to 128"]["peak"]
    assert found["q-LoRA, NF4 base"]["ledger"] < found["LoRA"]["ledger"] < found["LoRA"]["peak"]
