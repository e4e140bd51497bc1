"""Execute notebooks from top to bottom, show their progress, and print the accuracy they reached.

python tools/run_notebook.py LoRA_implementation.ipynb             into outputs/; the notebook stays as it is
python tools/run_notebook.py --in-place LoRA_implementation.ipynb  over the notebook itself, to commit it
python tools/run_notebook.py --core LoRA_implementation.ipynb      only the cells above "Going further"
"""

import argparse
import asyncio
import math
import shutil
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client.channels import AsyncZMQSocketChannel
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"


def look_for_messages_every_second() -> None:
    """Make Jupyter clients in this process look for a kernel's message every second, and not only when woken.

    A wake-up can get lost (seen with pyzmq 27.3). The client then waits for a message that is there, until its time
    limit or for ever. papermill's client receives its messages in this way too.
    """
    receive = AsyncZMQSocketChannel.get_msg
    if receive.__name__ == "get_msg_by_polling":
        return

    async def get_msg_by_polling(channel, timeout=None):
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (seconds := deadline - time.monotonic()) > 0:
            if await channel.socket.poll(1000 * min(seconds, 1)):
                break
        return await receive(channel, 0)

    AsyncZMQSocketChannel.get_msg = get_msg_by_polling


class Narrator(NotebookClient):
    """Print each heading when the notebook gets there, what the cells print, and that a silent cell still runs."""

    SILENCE = 5  # seconds

    def output(self, outs, msg, display_id, cell_index):
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
            self.printed_at, self.line_end = time.monotonic(), msg["content"]["text"][-1:]
        return super().output(outs, msg, display_id, cell_index)

    async def async_execute_cell(self, cell, cell_index, **options):
        heading = cell.source.partition("\n")[0]
        if cell.cell_type == "markdown" and heading.startswith("#"):
            print(f"\n[cell {cell_index + 1} of {len(self.nb.cells)}] {heading.lstrip('# ')}", flush=True)
        report = asyncio.create_task(self.report_silence(cell_index))
        try:
            return await super().async_execute_cell(cell, cell_index, **options)
        finally:
            report.cancel()

    async def report_silence(self, cell_index):
        start = self.printed_at = time.monotonic()
        self.line_end = "\n"
        while True:
            await asyncio.sleep(max(0, self.printed_at + self.SILENCE - time.monotonic()))
            if time.monotonic() - self.printed_at >= self.SILENCE:
                seconds = time.monotonic() - start
                print("" if self.line_end == "\n" else "\n", end="")
                print(f"[cell {cell_index + 1} has been running for {seconds:.0f} s]", flush=True)
                self.printed_at, self.line_end = time.monotonic(), "\n"


def tidy(notebook) -> None:
    """Keep of a progress bar only what a screen shows at the end, and nothing of a slider, which needs a kernel."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines = [line.rstrip("\r").rpartition("\r")[2] for line in output.text.split("\n")]
                output.text = "\n".join(lines)


def printed_lines(notebook) -> list[str]:
    """Return every line that the notebook's cells printed."""
    lines = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                lines += output.text.split("\n")
    return lines


def execute(source: Path, target: Path, core: bool = False) -> list[str]:
    """Execute the notebook at `source`, write it to `target`, and return the lines that tell its accuracy.

    With `core`, stop before the heading "Going further".
    """
    notebook = nbformat.read(source, as_version=4)
    if core:
        headings = [cell.source.partition("\n")[0] for cell in notebook.cells]
        notebook.cells = notebook.cells[: headings.index("# Going further")]
    folder = {"metadata": {"path": str(ROOT)}}
    client = Narrator(notebook, timeout=None, record_timing=False, coalesce_streams=True, resources=folder)
    try:
        client.execute()
    finally:  # write a notebook that failed too: it shows where
        tidy(notebook)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    return [line for line in printed_lines(notebook) if line.startswith("Validation accuracy")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="+", type=Path)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--in-place", action="store_true")
    how.add_argument("--core", action="store_true")
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # a notebook prints α and bars, also on Windows
    look_for_messages_every_second()
    report = []
    for notebook in args.notebooks:
        target = ROOT / "outputs" / notebook.name
        report += [f"\n{notebook}", *execute(notebook, target, args.core), f"executed notebook: {target}"]
        if args.in_place:  # only one that ran to its end replaces the old one
            shutil.copy(target, notebook)
    print("\n".join(report))


if __name__ == "__main__":
    sys.exit(main())
