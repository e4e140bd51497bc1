"""Tell notebooks and README where the project is published, so that Colab can fetch it, and add its badges.

python tools/publish.py https://github.com/owner/name
"""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ("LoRA_implementation.ipynb", "qLoRA_implementation.ipynb")
BADGE = re.compile(r"\n\n\[!\[[^]]*in Colab\].*")


def badge(address, name):
    page = (
        f"https://colab.research.google.com/{address.removeprefix('https://').replace('.com', '', 1)}/blob/main/{name}"
    )
    return f"[![{name} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({page})"


def with_badges(text, address, *names):
    """The text with the badges, and none of an earlier address, under its title."""
    title, rest = BADGE.sub("", text).split("\n\n", 1)
    return "\n\n".join([title, " ".join(badge(address, name) for name in names), rest])


def publish(address, root=ROOT):
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+(?<!\.git)", address):
        raise ValueError(f"{address!r} is no address: it must be like https://github.com/owner/name")
    readme = root / "README.md"
    readme.write_text(with_badges(readme.read_text(), address, *NOTEBOOKS))
    for name in NOTEBOOKS:
        notebook = nbformat.read(root / name, as_version=4)
        notebook.cells[0].source = with_badges(notebook.cells[0].source, address, name)
        for cell in notebook.cells:
            cell.source = re.sub(r'(?m)^REPOSITORY = ".*?"', f'REPOSITORY = "{address}"', cell.source)
        nbformat.write(notebook, root / name)


if __name__ == "__main__":
    publish("".join(sys.argv[1:]))
