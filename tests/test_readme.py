"""Check that the commands and the code of the READMEs exist. `tools/check_lesson.py` checks their links and length."""

import ast
import re

from conftest import ROOT

import lora_utils

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_in_the_readmes_exists():
    texts = README + (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    commands = "\n".join(re.findall(r"`([^`\n]+)`", texts) + re.findall(r"```sh\n(.*?)```", texts, re.DOTALL))
    targets = set(re.findall(r"\bmake ([a-z-]+)", commands))
    assert "run" in targets
    assert targets <= set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    files = set(re.findall(r"(?:python |-r |nproc-per-node=2 )([\w./-]+\.(?:py|txt))", commands))
    assert {"requirements.txt", "benchmarks/speed.py", "tools/several_processes.py"} <= files
    assert all((ROOT / file).is_file() for file in files)
    parameters = re.findall(r"-p (\w+)", commands)
    notebook = (ROOT / "LoRA_implementation.ipynb").read_text(encoding="utf-8")
    assert parameters and all(f"{name} = " in notebook for name in parameters)


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
