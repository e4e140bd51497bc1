"""Execute notebooks from top to bottom, with their progress on the screen, and print the accuracy they reached.

python tests/run_notebook.py LoRA_implementation.ipynb             into outputs/, the notebook is left as it is
python tests/run_notebook.py --in-place LoRA_implementation.ipynb  over the notebook itself, to commit it
"""

import argparse
import shutil
import sys
from pathlib import Path

import nbformat
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"


async def get_msg(channel, timeout=None, get_msg=AsyncZMQSocketChannel.get_msg):
    """The next message of a kernel. On a crowded machine its coming can go unnoticed: so look again every second.

    Seen once, with pyzmq 27.3: the reply was there to be read, and the client slept for ever.
    """
    while timeout is None and not await channel.socket.poll(1000):
        pass
    return await get_msg(channel, timeout)


AsyncZMQSocketChannel.get_msg = get_msg  # papermill's client receives through it, too


class Narrator(NotebookClient):
    """A notebook client that prints each heading as it gets there, and what the cells print as they print it."""

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        return super().output(outs, msg, display_id, cell_index)

    async def async_execute_cell(self, cell, cell_index, **options):
        heading = cell.source.partition("\n")[0]
        if cell.cell_type == "markdown" and heading.startswith("#"):
            print(f"\n[cell {cell_index + 1} of {len(self.nb.cells)}] {heading.lstrip('# ')}", flush=True)
        return await super().async_execute_cell(cell, cell_index, **options)


def printed(output):
    return output.get("text", "") if output.output_type == "stream" else ""


def tidy(notebook):
    """Leave of a progress bar what a screen would show at the end, and nothing of a slider, which needs a kernel."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
                output.text = "\n".join(lines)


def execute(source, target):
    """Execute the notebook at `source`, write it to `target`, and return the lines that tell its accuracy."""
    notebook = nbformat.read(source, as_version=4)
    client = Narrator(
        notebook, timeout=None, record_timing=False, coalesce_streams=True, resources={"metadata": {"path": str(ROOT)}}
    )
    try:
        client.execute()
    finally:  # of a notebook that failed, too: it shows where
        tidy(notebook)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    lines = [
        line for cell in notebook.cells for output in cell.get("outputs", []) for line in printed(output).split("\n")
    ]
    return [line for line in lines if line.startswith("Validation accuracy")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--in-place", action="store_true")
    args = parser.parse_args()
    report = []
    for notebook in args.notebooks:
        target = ROOT / "outputs" / notebook.name
        report += [f"\n{notebook}", *execute(notebook, target), f"executed notebook: {target}"]
        if args.in_place:  # only one that ran to its end replaces the old one
            shutil.copy(target, notebook)
    print("\n".join(report))


if __name__ == "__main__":
    sys.exit(main())
