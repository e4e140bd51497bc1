"""The READMEs hold the numbers of the results files, their commands exist, and the results keep what is promised."""

import ast
import json
import re
import statistics
import subprocess
from pathlib import Path

import accuracy
import check_lesson
import pytest
import sweep

import lora_utils
from lora_lab import compare

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "benchmarks" / "README.md").read_text()
NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]


def lines_of(name):
    return list(map(json.loads, (ROOT / "benchmarks" / "results" / name).read_text().splitlines()))


def results():
    """{(method, targets, rank, learning rate, epochs): accuracies on the validation sentences, in percent}."""
    groups = {}
    for line in lines_of("accuracy.jsonl"):
        if line["evaluated_on"] == "validation":
            s = line["settings"]
            key = (s["method"], str(s["targets"]), s["rank"], s["learning_rate"], s["epochs"])
            groups.setdefault(key, []).append(100 * line["accuracy"])
    return groups


def test_the_tables_have_the_mean_and_range_of_every_benchmarked_method():
    for key, scores in results().items():
        row = f"| {statistics.fmean(scores):.1f} | {min(scores):.1f} to {max(scores):.1f} |"
        if key[0].startswith("head"):
            row = f"| 770 |  | {scores[0]:.1f} | one run |"  # it draws nothing, so that all seeds give the same
        assert len(scores) >= 3 or row.endswith("one run |")
        assert row in TABLES, (key, row)


def test_every_result_holds_one_prediction_a_sentence_and_its_accuracy():
    for line in lines_of("accuracy.jsonl") + lines_of("quantised.jsonl"):
        assert len(line["predictions"]) == line["n"] and set(line["predictions"]) <= {"0", "1"}
        assert line["evaluated_on"] != "validation" or not line["commit"].endswith("+changes")
        assert line["data"] == "SST-2" and line["low"] < line["accuracy"] < line["high"]


def test_lora_beats_the_head_alone_by_what_the_lesson_claims():
    scores = {key[:3]: statistics.fmean(values) for key, values in results().items()}
    best_head = max(scores["head", "None", None], scores["head on mean of tokens", "None", None])
    lora = scores["lora", "['query', 'value']", 8]
    assert lora >= 86.5 and lora > best_head + 5 and scores["lora", "all-linear", 32] >= 88.5


@pytest.mark.parametrize(
    "bits, base_bits, least",
    [(8, None, -0.5), (4, None, -0.8), (3, None, -1.2), (2, None, -1.2), (8, 8, -0.8), (8, 4, -1.2)],
)
@pytest.mark.parametrize("where", ["validation", "held-out training phrases"])
def test_quantised_lora_keeps_its_accuracy_over_five_paired_seeds(where, bits, base_bits, least):
    differences = accuracy.paired_differences(lines_of("quantised.jsonl"))[where, bits, base_bits]
    mean, low, high = accuracy.interval(list(differences.values()))
    assert len(differences) == 5 and mean >= least
    assert f"{mean:+.2f} ({low:+.2f} to {high:+.2f})" in TABLES


def test_rounding_after_training_loses_what_the_tables_say():
    lines = lines_of("after_training.jsonl")
    errors = {(line["seed"], line["bits"], line["way"]): line["error"] for line in lines}
    for bits in (8, 4, 3, 2):
        for way in ("absmax", "half steps", "together"):
            group = [line for line in lines if (line["bits"], line["way"]) == (bits, way)]
            error, score = (statistics.fmean(line[key] for line in group) for key in ("error", "accuracy"))
            assert len(group) == 5 and f"{error:.3f}, {100 * score:.1f} %" in TABLES
    for seed in {line["seed"] for line in lines}:
        assert errors[seed, 8, "together"] <= 0.012 and errors[seed, 8, "half steps"] <= 0.012
        for bits, share in ((4, 0.85), (3, 0.65), (2, 0.45)):
            assert errors[seed, bits, "together"] <= share * errors[seed, bits, "absmax"]


def test_the_sweep_holds_three_seeds_a_setting_each_with_what_it_said_of_every_sentence():
    lines = lines_of("sweep.jsonl")
    wanted = {json.dumps(sweep.DEFAULT | varied) for part in sweep.PARTS.values() for varied in part}
    seeds = {}
    for line in lines:
        seeds.setdefault(json.dumps(line["settings"]), []).append(line["seed"])
        assert not line["commit"].endswith("+changes") and line["data"] == "SST-2" and line["trained_on"] == 6_000
        for result in line["results"].values():
            assert len(result["labels"]) == len(result["right"]) == result["n"]
            assert result["right"].count("1") / result["n"] == result["accuracy"]
            assert set(result["labels"]) <= {"0", "1"}
    assert set(seeds) == wanted and all(of_one == [0, 1, 2] for of_one in seeds.values())


def test_the_sweep_shows_what_the_lessons_say_of_it():
    lines = lines_of("sweep.jsonl")

    def score(where="validation", **changed):
        chosen = [line for line in lines if line["settings"] == sweep.DEFAULT | changed]
        return 100 * statistics.fmean(line["results"][where]["accuracy"] for line in chosen)

    pooled, mean = (score(**varied) for varied in sweep.HEAD)
    lora = score()
    assert mean > pooled + 3 and lora > mean + 3 and score(rank=1) > pooled + 5
    runs = compare.read_runs(ROOT / "benchmarks" / "results" / "sweep.jsonl")
    for where in ("validation", "held-out"):
        tests = compare.compare_seeds(compare.select(runs), compare.head_only(runs, "mean of tokens"), where)
        assert all(test.p < 0.05 and test.first_only > test.second_only for test in tests)
    for bits in (8, 4, 3, 2):
        assert abs(score(method="qlora", bits=bits) - lora) < 1
    for base_bits in (8, 4):
        assert abs(score(method="qlora", bits=4, base_bits=base_bits) - lora) < 1
    assert score(scaling=8.0, learning_rate=8e-3) < 60  # training that came apart
    assert score("held-out") >= max(score("held-out", learning_rate=rate) for rate in (5e-4, 8e-3))


def test_nothing_stray_lies_at_the_top():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {file.partition("/")[0] for file in files if file and not file.startswith(".")}
    fixed = {"lora_utils.py", "requirements.txt", "README.md", "LICENSE", "Makefile", "pyproject.toml"}
    notebooks = {"LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"}
    assert fixed <= top <= fixed | notebooks | {"lora_lab", "data", "tests", "tools", "benchmarks"}


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md", *NOTEBOOKS])
def test_every_file_and_heading_that_is_linked_is_there(name):
    text = check_lesson.text_of(ROOT / name)
    assert check_lesson.check_links(name, text) == []
    assert not re.search(r"@[A-Z]+@", text)


@pytest.mark.parametrize("name", ["README.md", "benchmarks/README.md"])
def test_the_sentences_of_the_readmes_are_short(name):
    assert check_lesson.check_sentences(name, check_lesson.text_of(ROOT / name)) == []


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 220
    rows = [line for line in README.splitlines() if line.startswith("|")]
    assert max(row.replace("\\|", "").count("|") - 1 for row in rows) <= 6
    headings = re.findall(r"(?m)^## (.*)$", README)
    for heading in ("Run it", "Overview", "What the notebooks do", "Where things are", "Prerequisites", "Limits"):
        assert heading in headings
    assert headings[-3:] == ["Carry on", "Acknowledgements", "License"]


def test_every_command_in_the_readmes_exists():
    commands = re.findall(r"`([^`\n]+)`", README + TABLES)
    commands += [
        line.partition(" #")[0]
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
        for line in block.splitlines()
    ]
    makefile = (ROOT / "Makefile").read_text()
    seen = set()
    for command in commands:
        for target in re.findall(r"\bmake ([a-z-]+)", command):
            assert re.search(rf"(?m)^{target}:", makefile), command
            seen.add("make")
        for file in re.findall(r"(?:python |-r |nproc-per-node=2 )([\w./-]+\.(?:py|txt))", command):
            assert (ROOT / file).is_file(), command
            seen.add(file)
        if "papermill" in command:
            parameters = re.findall(r"-p (\w+)", command)
            assert parameters and all(f"{name} = " in (ROOT / NOTEBOOKS[0]).read_text() for name in parameters)
            seen.add("papermill")
    assert {"make", "papermill", "requirements.txt", "benchmarks/speed.py", "tools/several_processes.py"} <= seen


def test_the_code_in_the_readme_calls_what_is_there():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    called = 0
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            assert node.module == "lora_utils" and all(hasattr(lora_utils, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert hasattr(lora_utils.qLoRABertModel, node.func.attr), node.func.attr
            called += 1
    assert called >= 6
