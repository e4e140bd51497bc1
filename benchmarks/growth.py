"""How a training step's time and memory grow with rank, tokens in a batch and layers: ours and PEFT, as a figure.

    python benchmarks/growth.py

The shape of BERT-base with random weights, 32 sentences of 16 tokens, rank 8, query and value, one of them changed at a
time. PEFT is the tuned one: same batches, plain attention. Times are taken in turn in one process, peaks of memory in a
fresh process each. `--draw` draws the saved results again.
"""

import argparse
import json
import statistics
from contextlib import ExitStack
from dataclasses import replace

from contenders import (
    OURS,
    PEFT_TUNED,
    RESULTS,
    Contender,
    about,
    alternate,
    arithmetic,
    checkpoint,
    padded,
    ratio,
    save,
)
from memory import measure

RANKS, TOKENS, LAYERS = (1, 4, 16, 64), (8, 32, 128), (6, 12, 24)
LINES = {"LoRA": OURS, "PEFT, tuned": PEFT_TUNED}
STYLE = {"LoRA": ("#0072b2", "o", "-"), "PEFT, tuned": ("#cc79a7", "^", "--")}


def batch_of(tokens):
    return padded([[101, *range(2000, 2000 + tokens - 2), 102]] * 32, tokens)


def grow(rounds):
    """{what grows: {line: {its value: {"seconds": by round, "peak": bytes}}}}."""
    found = {}
    with ExitStack() as stack:
        folders = {layers: stack.enter_context(checkpoint("bert-base", layers))[0] for layers in LAYERS}
        points = {
            "rank": {rank: (rank, 12, 16) for rank in RANKS},
            "tokens in a sentence": {tokens: (8, 12, tokens) for tokens in TOKENS},
            "layers": {layers: (8, layers, 16) for layers in LAYERS},
        }
        for what, values in points.items():
            built, contenders = {}, {}
            for name, way in LINES.items():
                for value, (rank, layers, tokens) in values.items():
                    key = (name, rank, layers)
                    if key not in built:
                        built[key] = Contender(replace(way, rank=rank), folders[layers])
                    contenders[name, value] = (built[key].step, [batch_of(tokens)])
            rates = alternate(contenders, 1, rounds if what == "rank" else max(2, rounds // 3))
            found[what] = {name: {} for name in LINES}
            for name, way in LINES.items():
                for value, (rank, layers, tokens) in values.items():
                    peak = measure(replace(way, rank=rank), folders[layers], tokens=tokens)["peak"]
                    seconds = [round(32 / rate, 4) for rate in rates[name, value]]
                    found[what][name][value] = {"seconds": seconds, "peak": peak}
            if what == "rank":
                low, high = ("LoRA", RANKS[0]), ("LoRA", RANKS[-1])
                growth = [round(r, 4) for r in ratio(rates, low, high)]  # of rates: the other way round of times
                print("a step at rank 64 ÷ at rank 1: {:.3f} ({:.3f} to {:.3f})".format(*growth))
    return found, growth


def draw(result, file):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 3, figsize=(8.5, 4.6), dpi=160, layout="constrained", sharex="col")
    for column, (what, lines) in enumerate(result["growth"].items()):
        for name, points in lines.items():
            colour, marker, style = STYLE[name]
            at = [int(value) for value in points]
            seconds = [statistics.median(point["seconds"]) for point in points.values()]
            axes[0, column].plot(at, seconds, marker + style, color=colour, label=name)
            axes[1, column].plot(
                at, [point["peak"] / 1e6 for point in points.values()], marker + style, color=colour, label=name
            )
        for ax in axes[:, column]:
            ax.set_xscale("log", base=2)
            ax.set_xticks(at, at)
            ax.set_ylim(0)
            ax.grid(alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
        axes[1, column].set_xlabel(what)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak, MB above\nthe libraries")
    axes[0, 0].legend(frameon=False, loc="lower left")
    ours, theirs = lines  # of the last column
    ends = [lines[name][str(at[-1])] for name in (ours, theirs)]
    time = statistics.median(ends[0]["seconds"]) / statistics.median(ends[1]["seconds"])
    memory = ends[0]["peak"] / ends[1]["peak"]
    title = f"At {at[-1]} {what}, {ours} takes {time:.2f} of the time of {theirs}, and {memory:.2f} of its memory"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    machine = result["machine"]
    source = f"{result['model']}, 32 sentences, {machine['device']}, {result['arithmetic']}, {machine['frozen_dtype']}"
    fig.supxlabel(source, x=0.99, ha="right", fontsize=8.5, color="#555555")
    fig.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of the ranks; a third of it for tokens and layers")
    parser.add_argument("--draw", action="store_true")
    args = parser.parse_args()
    name = f"growth-bert-base-{arithmetic().lower()}"
    if not args.draw:
        known = about()
        found, growth = grow(args.rounds)
        result = {"part": "growth", "model": "the shape of BERT-base", "batch": 32, "growth": found}
        save(RESULTS / f"{name}.json", result | {"rank 64 over rank 1": growth} | known)
    draw(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")), RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
