"""Print the size of the module by part, and its public names, beside their limits.

python tools/check_layout.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULE_LIMIT = 1_100  # lines
BUDGETS = {1: 140, 2: 170, 3: 270, 4: 285, 5: 85, 6: 130}  # lines of each part, about


def sizes(source: str) -> dict[str, int]:
    """Count the lines of a Python file: all, docstrings, comments, blank lines, and code."""
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    counts = {"lines": 0, "docstrings": len(documented), "comments": 0, "blank": 0, "code": 0}
    for number, line in enumerate(source.splitlines(), 1):
        counts["lines"] += 1
        if number in documented:
            continue
        kind = "blank" if not line.strip() else "comments" if line.strip().startswith("#") else "code"
        counts[kind] += 1
    return counts


def parts(source: str) -> dict[str, int]:
    """Return {heading: lines} of each numbered part of the module."""
    lines = source.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"# \d\. .* -{4}", line)]
    ends = [*starts[1:], len(lines)]
    return {lines[start].strip("# -"): end - start for start, end in zip(starts, ends, strict=True)}


def print_module() -> None:
    source = (ROOT / "lora_utils.py").read_text(encoding="utf-8")
    counts = sizes(source)
    print(f"lora_utils.py: {counts['lines']:,} lines, limit {MODULE_LIMIT:,}; {counts}")
    for heading, lines in parts(source).items():
        print(f"    {heading[:60]:60} {lines:4} lines, about {BUDGETS[int(heading[0])]} planned")
    body = ast.parse(source).body
    names = [node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    public = [name for name in names if not name.startswith("_")]
    print(f"    {len(public)} public classes and functions of {len(names)}: {', '.join(public)}")


if __name__ == "__main__":
    print_module()
