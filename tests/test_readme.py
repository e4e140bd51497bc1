"""Check that the commands, links and code of the READMEs exist, and that their sentences are short."""

import ast
import re
import subprocess
from pathlib import Path

import check_lesson
import pytest

import lora_utils

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TABLES = (ROOT / "benchmarks" / "README.md").read_text()
NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]


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
    assert len(README.splitlines()) <= check_lesson.README_LINES
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
