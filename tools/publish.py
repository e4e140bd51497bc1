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
FETCH = '    subprocess.run("git init -q && git pull -q --depth=1 {}", shell=True, check=True)\n'
COLAB = '"google.colab" in sys.modules:\n'  # what the line in front of FETCH ends with


def badge(address, name):
    """Return a Colab badge in Markdown that opens a notebook of the repository at `address`."""
    repository = address.removeprefix("https://github.com/")
    page = f"https://colab.research.google.com/github/{repository}/blob/main/{name}"
    return f"[![{name} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({page})"


def with_badges(text, address, *names):
    """Return the text with new badges below its title, which replace earlier ones."""
    title, rest = BADGE.sub("", text).split("\n\n", 1)
    return "\n\n".join([title, " ".join(badge(address, name) for name in names), rest])


def publish(address, root=ROOT):
    """Write the repository's address into README and notebooks. Raise ValueError for an address that is none."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+(?<!\.git)", address):
        raise ValueError(f"{address!r} is no address: it must be like https://github.com/owner/name")
    readme = root / "README.md"
    readme.write_text(with_badges(readme.read_text(encoding="utf-8"), address, *NOTEBOOKS), encoding="utf-8")
    for name in NOTEBOOKS:
        notebook = nbformat.read(root / name, as_version=4)
        notebook.cells[0].source = with_badges(notebook.cells[0].source, address, name)
        for cell in notebook.cells:
            unpublished = re.sub(re.escape(FETCH).replace(r"\{\}", ".*"), "", cell.source)
            cell.source = unpublished.replace(COLAB, COLAB + FETCH.format(address))
        nbformat.write(notebook, root / name)


if __name__ == "__main__":
    publish(sys.argv[1] if len(sys.argv) == 2 else "")
