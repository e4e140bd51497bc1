"""Check the size and the prose of the lessons: cells, words, code, sentences, links, figures and tables.

python tools/check_lesson.py             # prints the counts, and fails where one is over its limit
python tools/check_lesson.py --long      # prints every sentence of more than 25 words as well
"""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
# cells, words and lines of code in the core; the cells before which training and accuracy must come
LIMITS = {
    "LoRA_implementation.ipynb": {"cells": 60, "words": 2_000, "code": 240, "training": 45, "accuracy": 50},
    "qLoRA_implementation.ipynb": {"cells": 52, "words": 1_800, "code": 240, "training": 32},
}
FIRST = {
    "LoRA_implementation.ipynb": {"training": r"lora_model.* = build_model\(", "accuracy": "Validation accuracy, LoRA"},
    "qLoRA_implementation.ipynb": {"training": r"q_losses = train\("},
}
README_LINES = 220
LONG, LONGEST = 30, 45  # words of a sentence
SHARE = 0.08  # of the sentences may be longer than LONG
FIGURE_BYTES = 100_000
GOING_FURTHER = "# Going further"


def prose(markdown):
    """Return Markdown's paragraphs and list items as plain text, without code, tables, headings and formulas."""
    text = re.sub(r"```.*?```|<!--.*?-->|\$\$.*?\$\$", "\n", markdown, flags=re.DOTALL)
    text = re.sub(r"\$[^$\n]+\$", "x", text)
    text = re.sub(r"!\[[^]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"[*_]{1,2}", "", text)
    paragraphs, lines = [], []
    for line in [*text.splitlines(), ""]:
        line = line.strip().removeprefix(">").strip()
        item = re.match(r"([-+]|\d+\.)\s+", line)
        if not line or line[0] in "|#" or item:
            paragraphs.append(" ".join(lines))
            lines = []
        if line and line[0] not in "|#":
            lines.append(line[item.end() :] if item else line)
    return [paragraph for paragraph in paragraphs if paragraph]


def sentences(markdown):
    """Return the sentences of Markdown text."""
    found = []
    for paragraph in prose(markdown):
        found += re.split(r"(?<=[.!?])[)\"”]*\s+(?=[A-Z0-9\"“(αΔ]|code)", paragraph)
    return [sentence for sentence in found if re.search(r"\w", sentence)]


def words(text):
    """Count the words of a text. A number or a formula is a word."""
    return len(re.findall(r"[\w%][\w.,'’%/-]*", text))


def anchors(page):
    """Return what links can lead to in a file: its headings, as Jupyter or GitHub names them."""
    headings = re.findall(r"^#+ (.*)", text_of(page), flags=re.MULTILINE)
    if page.suffix == ".ipynb":
        return {heading.replace(" ", "-") for heading in headings}
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def check_links(name, markdown):
    """Return a complaint for every link of a file that leads to no file or to no heading."""
    complaints = []
    for target in re.findall(r"\]\(([^)\s]+)\)", markdown):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name
        if not page.exists():
            complaints.append(f"{name}: {target} leads to no file")
        elif anchor and anchor not in anchors(page):
            complaints.append(f"{name}: {target} leads to no heading")
    return complaints


def text_of(page):
    """Return the Markdown of a file: of a notebook, that of its Markdown cells."""
    if page.suffix != ".ipynb":
        return page.read_text(encoding="utf-8")
    cells = nbformat.read(page, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def check_sentences(name, markdown):
    """Print how long the sentences are, and return a complaint where too many are too long."""
    found = sentences(markdown)
    lengths = [words(sentence) for sentence in found]
    share = sum(length > LONG for length in lengths) / len(found)
    print(f"{name}: {len(found)} sentences, {share:.1%} over {LONG} words, the longest has {max(lengths)}")
    if "--long" in sys.argv:
        for length, sentence in zip(lengths, found, strict=True):
            if length > 25:
                print(f"    {length}: {sentence}")
    complaints = [f"{name}: {share:.1%} of the sentences have over {LONG} words"] if share > SHARE else []
    for length, sentence in zip(lengths, found, strict=True):
        if length > LONGEST:
            complaints.append(f"{name}: {length} words: {sentence}")
    return complaints


def check_core(name, cells):
    """Print the counts of a core, and return a complaint for every one that is over its limit."""
    core = cells[: next(i for i, cell in enumerate(cells) if cell.source.startswith(GOING_FURTHER))]
    markdown = "\n\n".join(cell.source for cell in core if cell.cell_type == "markdown")
    code = [cell.source for cell in core if cell.cell_type == "code"]
    counts = {
        "cells": len(core),
        "words": sum(words(paragraph) for paragraph in prose(markdown)),
        "code": sum(bool(line.strip()) for source in code for line in source.splitlines()),
    }
    for what, pattern in FIRST[name].items():
        places = [i for i, cell in enumerate(core) if cell.cell_type == "code" and re.search(pattern, cell.source)]
        counts[what] = places[0] if places else len(core)
    print(f"{name}: {len(cells)} cells; core: {counts}")
    return [
        f"{name}: {what} {counts[what]}, limit {most}" for what, most in LIMITS[name].items() if counts[what] > most
    ]


def check_figures(name, cells):
    """Return a complaint for every figure that is too large, has no alternative text or no caption."""
    complaints = []
    for number, cell in enumerate(cells):
        images = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        for image in images:
            size = len(image.data["image/png"]) * 3 // 4
            if size > FIGURE_BYTES:
                complaints.append(f"{name}, cell {number}: a figure of {size:,} bytes")
            if not image.metadata.get("image/png", {}).get("alt"):
                complaints.append(f"{name}, cell {number}: a figure without alternative text")
        following = cells[number + 1].source if number + 1 < len(cells) else ""
        if (images or cell.source.startswith("figures.draw_")) and not following.startswith("*Figure "):
            complaints.append(f"{name}, cell {number}: a figure without a caption after it")
    return complaints


def main():
    """Check everything, print what is wrong, and return the number of complaints."""
    complaints = []
    for name in LIMITS:
        cells = nbformat.read(ROOT / name, as_version=4).cells
        markdown = text_of(ROOT / name)
        complaints += check_core(name, cells)
        complaints += check_sentences(name, markdown)
        complaints += check_figures(name, cells)
        complaints += check_links(name, markdown)
    for name in ("README.md", "benchmarks/README.md"):
        if (ROOT / name).exists():
            markdown = text_of(ROOT / name)
            complaints += check_sentences(name, markdown)
            complaints += check_links(name, markdown)
    lines = len(text_of(ROOT / "README.md").splitlines())
    print(f"README.md: {lines} lines, limit {README_LINES}")
    if lines > README_LINES:
        complaints.append(f"README.md: {lines} lines, limit {README_LINES}")
    if subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", "--check"]).returncode:
        complaints.append("a table does not show the committed results: run benchmarks/report.py")
    print("\n".join(complaints))
    return len(complaints)


if __name__ == "__main__":
    sys.exit(bool(main()))
