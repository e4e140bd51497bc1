"""The numbers in the README are those of the results files."""

import json
import re
import statistics
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def results():
    """{(method, targets, rank, learning rate, epochs): accuracies on the validation sentences, in percent}."""
    groups = {}
    for line in map(json.loads, (ROOT / "benchmarks" / "results" / "accuracy.jsonl").read_text().splitlines()):
        if line["evaluated_on"] == "validation":
            s = line["settings"]
            key = (s["method"], str(s["targets"]), s["rank"], s["learning_rate"], s["epochs"])
            groups.setdefault(key, []).append(100 * line["accuracy"])
    return groups


def test_the_readme_has_the_mean_and_spread_of_every_benchmarked_method():
    for key, scores in results().items():
        row = f"{statistics.fmean(scores):.1f} | {min(scores):.1f} to {max(scores):.1f}"
        assert len(scores) >= 3 and row in README, (key, row)


def test_every_result_holds_one_prediction_a_sentence_and_its_accuracy():
    for line in map(json.loads, (ROOT / "benchmarks" / "results" / "accuracy.jsonl").read_text().splitlines()):
        assert len(line["predictions"]) == line["n"] and set(line["predictions"]) <= {"0", "1"}
        assert line["evaluated_on"] != "validation" or not line["commit"].endswith("+changes")
        assert line["data"] == "SST-2" and line["low"] < line["accuracy"] < line["high"]


def test_lora_beats_the_head_alone_by_what_the_lesson_claims():
    scores = {key[:3]: statistics.fmean(values) for key, values in results().items()}
    head, lora = scores["head", "['query', 'value']", 8], scores["lora", "['query', 'value']", 8]
    assert lora >= 86.5 and lora > head + 10 and scores["lora", "all-linear", 32] >= 88.5


def test_nothing_stray_lies_at_the_top():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    top = {file.partition("/")[0] for file in files if file and not file.startswith(".")}
    fixed = {"lora_utils.py", "requirements.txt", "README.md", "LICENSE", "Makefile", "pyproject.toml"}
    notebooks = {"LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"}
    assert fixed <= top <= fixed | notebooks | {"data", "tests", "benchmarks"}


def test_every_file_that_the_readme_links_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
    assert not re.search(r"@[A-Z]+@", README)
