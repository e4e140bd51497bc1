"""Draw the figures of both notebooks.

Every function draws what its arguments hold, and shows the figure with an alternative text. None reads a
file. `runs` are the runs of the sweep, `own` are runs of your own, drawn as stars, and the legend calls them
`label`. The title of a figure is computed from what is drawn. The argument `title` says where the numbers come
from, and is written small below the figure. Each method has one colour and one marker in all figures. Call
`set_style()` once before the first figure.
"""

import functools
import inspect
import io
import itertools
import math
import re
import statistics
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import PIL.Image
import torch
from IPython.display import Image, display

from lora_lab.compare import (
    DEFAULT,
    accuracies,
    compare_seeds,
    describe,
    full_fine_tuning,
    mean_accuracy,
    methods,
    round_after_training,
    round_to_float16,
    select,
)
from lora_utils import Evaluation, LoRABertModel, QuantizedLoRALayer, dequantize, match_targets, quantize

# Style: one colour and one marker per method ------------------------------------------------------

LORA = "#0072b2"
QLORA = "#d55e00"
QBASE = "#009e73"  # q-LoRA on a quantised base
HEAD = "#e69f00"
FULL = "#cc79a7"
REFERENCE = "#888888"  # what is not trained, and what the others are compared with
INK = "#222222"

MARKER = {LORA: "o", QLORA: "^", QBASE: "s", HEAD: "D", FULL: "v", REFERENCE: "s", INK: "*"}

FROZEN_FILL = "#dddddd"
TRAINED_FILL = "#9ecae1"

# How a label begins, and its colour.
COLOUR_OF_LABEL = {"before training": REFERENCE, "head": HEAD, "LoRA": LORA, "q-LoRA": QLORA, "full": FULL}

# Method in the settings of a run, and how the figures call it. A results file may hold one of them only.
HEADS = {"head": "head alone, pooled output", "head on mean of tokens": "head alone, mean of tokens"}

LEGEND_BELOW = {"ncols": 3, "loc": "upper center", "bbox_to_anchor": (0.48, -0.16)}  # where it hides nothing
DPI = 192  # two dots per pixel of the page, so that letters are sharp on any screen


def set_style() -> None:
    """Set size, fonts and axes of all figures that are drawn from here on."""
    plt.rc("figure", figsize=(7.5, 3))
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("axes", titlesize=10, axisbelow=True)
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("legend", fontsize=9, title_fontsize=9, frameon=False)


def _colour_of(label):
    """Return the colour of a method by its label, such as "q-LoRA, 4 bits"."""
    matching = [colour for start, colour in COLOUR_OF_LABEL.items() if label.startswith(start)]
    return QBASE if " base" in label else (*matching, INK)[0]


# Pieces that several figures use ------------------------------------------------------------------


def _shown(draw):
    """Make a function that returns a figure, its title and its source show the figure, or write it to a file.

    The alternative text is the first line of the function's docstring, and the title. It is kept as metadata of the
    notebook's output.
    """

    @functools.wraps(draw)
    def draw_and_show(*args, file=None, metadata=None, **options):
        fig, title, source = draw(*args, **options)
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        fig.supxlabel(source, x=0.99, ha="right", fontsize=8.5, color="#555555")
        png = io.BytesIO()
        fig.savefig(file or png, format="png", dpi=DPI, metadata=metadata)
        plt.close(fig)
        if file is None:
            small = io.BytesIO()  # 256 colours are enough, and take a third of the bytes
            PIL.Image.open(png).convert("RGB").quantize().save(small, "png", optimize=True)
            what = inspect.getdoc(draw).partition("\n")[0].removeprefix("Draw ")
            alt = f"{what[0].upper()}{what[1:]} {title}."
            display(Image(small.getvalue(), width=round(96 * fig.get_figwidth()), alt=alt))

    return draw_and_show


def _draw_seeds(ax, x, values, colour, label=None):
    """Draw each seed as a small mark at x, and the mean of the seeds as a large one."""
    marker = MARKER[colour]
    ax.plot([x] * len(values), values, marker, color=colour, markersize=5, alpha=0.6, markeredgewidth=0)
    mean = statistics.fmean(values)
    ax.plot(x, mean, marker, color=colour, markersize=9, markeredgecolor="white", linestyle="", label=label)


def _annotate(ax, text, point, offset, **options):
    """Write a small text some points right of and above a point."""
    ax.annotate(text, point, offset, textcoords="offset points", **{"ha": "center", "fontsize": 9} | options)


def _interval(result):
    """Return how far the 95 % interval of an `Evaluation` reaches below and above its accuracy, in points."""
    below = 100 * (result.accuracy - result.low)
    above = 100 * (result.high - result.accuracy)
    return [[below], [above]]


def _heads(runs):
    """Return {name: runs} of the baselines that train the classifier alone."""
    groups = {name: [run for run in runs if run["settings"]["method"] == method] for method, name in HEADS.items()}
    return {name: group for name, group in groups.items() if group}


# What LoRA is -------------------------------------------------------------------------------------

# The linear layers of one block and the pooler, from below: name, (left, bottom, width) in the drawing, text.
_BERT_LAYERS = [
    ("encoder.layer.0.attention.self.query", (0, 1.4, 1.9), "query"),
    ("encoder.layer.0.attention.self.key", (2.05, 1.4, 1.9), "key"),
    ("encoder.layer.0.attention.self.value", (4.1, 1.4, 1.9), "value"),
    ("encoder.layer.0.attention.output.dense", (0, 3.2, 6), "attention output"),
    ("encoder.layer.0.intermediate.dense", (0, 5.1, 6), "feed-forward, up"),
    ("encoder.layer.0.output.dense", (0, 6.0, 6), "feed-forward, down"),
    ("pooler.dense", (0, 8.4, 6), "pooler"),
]


@_shown
def draw_lora(targets: str | Iterable[str], rank: int = 8, width: int = 384):
    """Draw BERT with its adapted layers, and beside it one adapted layer, with W, A and B to scale.

    Args:
        targets: which layers are adapted, as `LoRABertModel` takes it in `target_modules`.
        rank: rows of A and columns of B.
        width: rows and columns of W.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 4.3), width_ratios=[1, 1.6])
    _draw_bert(left, targets)
    _draw_layer(right, rank / width)
    left.axis("off")
    right.axis("off")
    finding = f"At rank {rank}, A and B together have {2 * rank / width:.1%} of the numbers of W"
    return fig, finding, f"W, A and B are to scale for in = out = {width}. Grey is frozen, blue is trained."


def _draw_bert(ax, targets):
    """Draw one block of BERT and what is around it, from below, with a pair A, B in each adapted layer."""
    in_every_block = {f"bert.{name}".replace(".0.", f".{i}.") for name, _, _ in _BERT_LAYERS for i in range(24)}
    adapted = {re.sub(r"\d+", "0", name.removeprefix("bert.")) for name in match_targets(in_every_block, targets)}
    for name, (x, y, width), text in _BERT_LAYERS:
        _draw_arrow(ax, (x + width / 2, y - 0.3), (x + width / 2, y))
        if name in adapted:
            _draw_box(ax, x + width - 0.75, y, 0.75, 0.6, TRAINED_FILL, "A, B")
            width -= 0.75
        _draw_box(ax, x, y, width, 0.6, FROZEN_FILL, text)
    for y, text in ((2.3, "attention"), (4.1, "add, LayerNorm"), (6.9, "add, LayerNorm")):
        _draw_arrow(ax, (3, y - 0.3), (3, y))
        _draw_box(ax, 0, y, 6, 0.6, "white", text)
    _draw_arrow(ax, (3, 0.5), (3, 1.4))
    ax.plot([0.95, 5.05], [1.1, 1.1], color=INK, linewidth=1)
    ax.plot([3, 3], [7.5, 8.1], color=INK, linewidth=1)
    for start, end in ((0.9, 4.4), (4.9, 7.2)):  # the residual paths
        ax.plot([3, -0.4, -0.4], [start, start, end], color=INK, linewidth=1)
        _draw_arrow(ax, (-0.4, end), (0, end))
    ax.add_patch(plt.Rectangle((-0.7, 0.7), 7, 7.1, fill=False, edgecolor=INK, linestyle=":"))
    _write(ax, 3, 0.25, "embeddings of the words")
    ax.text(6.45, 4.2, "each block", rotation=90, va="center", fontsize=9, color=INK)
    _draw_arrow(ax, (3, 9.0), (3, 9.3))
    _draw_box(ax, 0, 9.3, 6, 0.6, TRAINED_FILL, "head: negative or positive")
    ax.set(xlim=(-0.8, 7.1), ylim=(0, 10), aspect="equal")


def _draw_layer(ax, thinness):
    """Draw one adapted layer: x passes through W, and through A, B and the scaling."""
    thin = 2.2 * thinness
    _draw_box(ax, 1.3, 2.7, 2.2, 2.2, FROZEN_FILL, "$W$\n(out × in)", fontsize=11)
    ax.add_patch(plt.Rectangle((1.3, 1 - thin / 2), 2.2, thin, color=LORA, linewidth=0))
    ax.add_patch(plt.Rectangle((4.8 - thin / 2, -0.1), thin, 2.2, color=LORA, linewidth=0))
    _write(ax, 2.4, 0.65, "$A$  (r × in)", fontsize=11)
    _write(ax, 4.8, -0.4, "$B$  (out × r)", fontsize=11)
    _draw_box(ax, 5.3, 0.7, 0.8, 0.6, "white", r"$\alpha\,/\,r$", fontsize=10)
    _write(ax, 0.2, 3.8, "$x$", fontsize=14)
    _write(ax, 7.4, 3.8, "$y$", fontsize=14)
    _write(ax, 4.1, 1.25, "r numbers")
    ax.plot([0.8, 0.8], [3.8, 1], color=INK, linewidth=1)  # from x down to A
    ax.plot([6.1, 6.6], [1, 1], color=INK, linewidth=1)  # from the scaling up to the sum
    through_W = [((0.4, 3.8), (1.3, 3.8)), ((3.5, 3.8), (6.4, 3.8)), ((6.8, 3.8), (7.2, 3.8))]
    through_A_and_B = [((0.8, 1), (1.3, 1)), ((3.5, 1), (4.75, 1)), ((4.85, 1), (5.3, 1)), ((6.6, 1), (6.6, 3.6))]
    for start, end in through_W + through_A_and_B:
        _draw_arrow(ax, start, end)
    ax.add_patch(plt.Circle((6.6, 3.8), 0.2, facecolor="white", edgecolor=INK))
    _write(ax, 6.6, 3.8, "+", fontsize=11)
    ax.set(xlim=(0, 7.6), ylim=(-0.6, 5), aspect="equal")


def _draw_box(ax, x, y, width, height, colour, text, fontsize=9):
    """Draw a filled box whose lower left corner is (x, y), with a text in its middle."""
    ax.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK))
    _write(ax, x + width / 2, y + height / 2, text, fontsize)


def _draw_arrow(ax, start, end):
    """Draw an arrow between two points."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})


def _write(ax, x, y, text, fontsize=9):
    """Write a text around the point (x, y)."""
    ax.text(x, y, text, ha="center", va="center", color=INK, fontsize=fontsize)


def update_layers(runs: list[dict]) -> list[str]:
    """Return the names of the layers that `draw_update` can draw: all linear layers but the head."""
    return list(full_fine_tuning(runs)[0]["update"]["share"])


@_shown
def draw_update(runs: list[dict], layer: str | None = None):
    """Draw how near the update of full fine-tuning, ΔW, is to a matrix of low rank.

    Left: for each seed, the share of the squared norm of one layer's ΔW in its first r singular values.
    Right: the accuracy that is left when the ΔW of every linear layer is cut to rank r, beside LoRA of rank r.

    Args:
        layer: one of `update_layers(runs)`. None takes the value layer in the middle of the model.
    """
    full = full_fine_tuning(runs)
    updates = [run["update"] for run in full]
    if layer is None:
        value_layers = [name for name in update_layers(runs) if name.endswith("self.value")]
        layer = value_layers[len(value_layers) // 2]
    kind, block = _kind_and_block(layer)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4))

    style = {"marker": "v", "markersize": 4, "linewidth": 1, "color": FULL}
    for update in updates:
        shares = [100 * share for share in update["share"][layer]]
        left.plot(update["ranks"][: len(shares)], shares, **style)
    random = torch.randn(updates[0]["shape"][layer], generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.svdvals(random).square()
    ranks = range(1, len(squares) + 1)
    left.plot(ranks, 100 * squares.cumsum(0) / squares.sum(), "--", color=REFERENCE, label="a random matrix")
    left.set_title(f"block {block}, {kind}: ‖ΔW‖ is {updates[0]['size'][layer]:.1%} of ‖W‖")
    left.set_xscale("log", base=2)
    ticks = [1, 4, 16, 64, len(squares)]
    left.set(xticks=ticks, xticklabels=ticks, xlabel="first r singular values")
    left.set(ylim=(0, 102), ylabel="share of the squared norm, %")
    left.legend(loc="lower right", framealpha=1)

    cuts = list(updates[0]["kept"])
    rows = []  # the accuracies of each seed, and uncut at the end
    for run, uncut in zip(full, accuracies(full), strict=True):
        rows.append([100 * run["update"]["kept"][rank] for rank in cuts] + [uncut])
        right.plot(range(len(cuts) + 1), rows[-1], **style, label=None if len(rows) > 1 else "full fine-tuning, cut")
    trained = {column: select(runs, rank=int(rank)) for column, rank in enumerate(cuts)}
    means = {column: mean_accuracy(group) for column, group in trained.items() if group}
    right.plot(means.keys(), means.values(), "o--", color=LORA, label="LoRA, trained at rank r")
    right.set(xticks=range(len(cuts) + 1), xticklabels=[*cuts, "all"], xlabel="rank r")
    right.set(ylabel="validation accuracy, %", title="all linear layers")
    right.legend(loc="lower right", framealpha=1)
    at_4, uncut = (statistics.fmean(row[column] for row in rows) for column in (cuts.index("4"), -1))
    finding = f"Cut to rank 4, the updates of full fine-tuning give {at_4:.1f} of {uncut:.1f} % accuracy"
    return fig, finding, describe(runs)


# One training run ---------------------------------------------------------------------------------


@_shown
def draw_padding(lengths: torch.Tensor, tokens_by_way: dict[str, int], title: str):
    """Draw how long the sentences are, and how many tokens are computed per sentence.

    Args:
        lengths: the number of tokens of each sentence, a tensor of integers.
        tokens_by_way: {a way of making batches: tokens computed in one epoch, padding included}.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
    mean = lengths.float().mean().item()
    left.hist(lengths.tolist(), bins=range(2, int(lengths.max()) + 3), color=REFERENCE)
    left.axvline(mean, color=INK, linestyle="--", label=f"mean: {mean:.1f}")
    left.set(xlabel="tokens in a sentence", ylabel="training sentences")
    left.legend()
    per_sentence = {way: tokens / len(lengths) for way, tokens in tokens_by_way.items()}
    bars = right.barh(list(per_sentence), list(per_sentence.values()), color=REFERENCE)
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.axvline(mean, color=INK, linestyle="--")
    right.set(xlabel="tokens computed per sentence", xlim=(0, 1.17 * max(per_sentence.values())))
    right.invert_yaxis()
    padded = {value: way for way, value in per_sentence.items() if value > mean}
    most, least = max(padded), min(padded)
    return fig, f"Tokens of {padded[most]}: {most / least:.1f} times those of {padded[least]}", title


@_shown
def draw_losses(losses: dict[str, list[float]], title: str, window: int = 20):
    """Draw the training loss of one or more runs against the step, and its running mean.

    Args:
        losses: {label: the loss of every step, in nats}.
        window: how many steps are averaged.
    """
    fig, ax = plt.subplots(figsize=(7.5, 3.2))
    ends = []
    for (label, values), style in zip(losses.items(), itertools.cycle(("-", "--", ":"))):
        width = min(window, len(values))
        means = [statistics.fmean(values[end - width : end]) for end in range(width, len(values) + 1)]
        colour = _colour_of(label)
        ax.plot(values, color=colour, linewidth=0.7, alpha=0.3)
        ax.plot(range(width - 1, len(values)), means, style, color=colour, linewidth=2, label=label)
        ends.append(f"{label} {means[-1]:.3f}")
    ax.set(xlabel="step", ylabel="training loss\n(−ln p of the right label)")
    ax.legend(title=f"mean of {window} steps")
    return fig, f"Loss of the last {window} steps: {', '.join(ends)}", title


@_shown
def draw_results(results: dict[str, Evaluation], title: str, chance: float | None = None):
    """Draw the validation accuracy of several models, with 95 % intervals.

    Args:
        results: {label: `Evaluation`}, from above.
        chance: the share of the most frequent label, from 0 to 1, drawn as a line.
    """
    fig, ax = plt.subplots(figsize=(7.5, 1.3 + 0.4 * len(results)))
    for row, (label, result) in enumerate(results.items()):
        colour = _colour_of(label)
        accuracy = 100 * result.accuracy
        ax.errorbar(accuracy, row, xerr=_interval(result), fmt=MARKER[colour], color=colour, capsize=4, markersize=8)
        _annotate(ax, f"{accuracy:.1f}", (accuracy, row), (0, 7))
    if chance is not None:
        ax.axvline(100 * chance, color=REFERENCE, linestyle=":", label="always the most frequent label")
        ax.legend(loc="upper right")
    ax.set(yticks=range(len(results)), yticklabels=list(results), ylim=(len(results) - 0.5, -0.7))
    ax.set(xlabel="validation accuracy, % (95 % interval)")
    ax.grid(axis="x", alpha=0.3)
    finding = "; ".join(f"{label}: {result.accuracy:.1%}" for label, result in list(results.items())[-2:])
    return fig, finding, title


@_shown
def draw_changes(model: LoRABertModel, title: str, runs: Sequence[dict] = ()):
    """Draw the size of each layer's update in % of its weight against the block, one line per kind of layer.

    The size is ‖scaling · B A‖ / ‖W‖, with Frobenius norms.

    Args:
        model: a trained `LoRABertModel` on a base that is not quantised.
        runs: the runs of the sweep. Of layers with the same names, the mean of full fine-tuning is drawn too.
    """
    full = [run["update"]["size"] for run in (full_fine_tuning(runs) if runs else ())]
    lines = {}  # {kind of layer: [(block, size in %, size in % after full fine-tuning)]}
    for name, layer in model.lora_layers().items():
        kind, block = _kind_and_block(name)
        size = layer.delta_weight().norm().item() / layer.base.weight.float().norm().item()
        of_full = [sizes.get(name.removeprefix("bert."), math.nan) for sizes in full] or [math.nan]
        lines.setdefault(kind, []).append((block, 100 * size, 100 * statistics.fmean(of_full)))

    blocks = list(dict.fromkeys(block for line in lines.values() for block, _, _ in line))
    fig, ax = plt.subplots(figsize=(7.5, 3))
    for (kind, line), style in zip(lines.items(), ("o-", "s--", "^:", "v-.", "D-", "P--", "X"), strict=False):
        columns = [blocks.index(block) for block, _, _ in line]
        ax.plot(columns, [size for _, size, _ in line], style, color=LORA, label=f"LoRA, {kind}")
        if full:
            of_full = {"color": FULL, "markerfacecolor": "white", "label": f"full fine-tuning, {kind}"}
            ax.plot(columns, [size for _, _, size in line], style, **of_full)
    ax.set(xticks=range(len(blocks)), xticklabels=blocks, xlabel="block", ylim=(0, None))
    ax.set(ylabel="size of the update,\n% of the weight's norm")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    size, block, kind = max((size, block, kind) for kind, line in lines.items() for block, size, _ in line)
    return fig, f"The largest update: {kind} in block {block}, {size:.1f} % of the weight", title


def _kind_and_block(name):
    """Split "bert.encoder.layer.3.output.dense" into ("output.dense", "3"). The pooler is its own block."""
    _, found, rest = name.partition(".layer.")
    if not found:
        return "pooler.dense", "pooler"
    block, _, kind = rest.partition(".")
    return kind.removeprefix("attention.self."), block


# What the sweep found about LoRA ------------------------------------------------------------------


@_shown
def draw_ranks(runs: list[dict], own: tuple[int, Evaluation] | None = None, label: str = "your run"):
    """Draw validation accuracy against the number of trained parameters.

    Drawn are LoRA by rank, full fine-tuning, and the head alone as a line. The band is the range of the seeds of
    full fine-tuning.

    Args:
        own: (trained parameters, `Evaluation`) of one more run, drawn as a star with its 95 % interval.
    """
    fig, ax = plt.subplots(figsize=(8.5, 4))
    full = full_fine_tuning(runs)
    values = accuracies(full)
    ax.axhspan(min(values), max(values), color=FULL, alpha=0.2, linewidth=0)
    _draw_seeds(ax, full[0]["trained_parameters"], values, FULL, label="full fine-tuning")

    ranks = sorted({run["settings"]["rank"] for run in runs if run["settings"]["method"] == "lora"})
    groups = [select(runs, rank=rank) for rank in ranks]
    parameters = [group[0]["trained_parameters"] for group in groups]
    means = [mean_accuracy(group) for group in groups]
    for rank, x, group in zip(ranks, parameters, groups, strict=True):
        _draw_seeds(ax, x, accuracies(group), LORA, label="LoRA, by rank" if rank == ranks[0] else None)
        _annotate(ax, f"r = {rank}", (x, max(accuracies(group))), (0, 7))
    for seed in zip(*map(accuracies, groups), strict=True):
        ax.plot(parameters, seed, color=LORA, linewidth=0.8, alpha=0.5)
    ax.plot(parameters, means, color=LORA, linewidth=2)

    for (name, group), style in zip(_heads(runs).items(), ("--", "-."), strict=False):
        mean = mean_accuracy(group)
        ax.axhline(mean, color=HEAD, linestyle=style, zorder=0)
        _annotate(ax, f"{name}: {mean:.1f} %", (parameters[-1], mean), (20, 4), ha="left")
    if own is not None:
        x, result = own
        options = {"fmt": "*", "color": INK, "markersize": 12, "capsize": 3, "markerfacecolor": "white"}
        ax.errorbar(1.3 * x, 100 * result.accuracy, _interval(result), label=label, **options)
    ax.set(xscale="log", xlabel="trained parameters", ylabel="validation accuracy, %")
    ax.margins(y=0.1)
    ax.legend(**LEGEND_BELOW)
    high = [mean for rank, mean in zip(ranks, means, strict=True) if rank >= 4]
    finding = f"From rank 4 on, the means differ by {max(high) - min(high):.1f} points"
    return fig, finding, describe(runs)


@_shown
def draw_scaling_and_rate(runs: list[dict]):
    """Draw accuracy by scaling α / r and learning rate, mean and standard deviation of the seeds.

    Left on the held-out phrases, where settings are chosen, right on the validation sentences.
    """
    cells = {}  # {(scaling, learning rate): runs}
    for run in runs:
        cell = {key: run["settings"][key] for key in ("scaling", "learning_rate")}
        if run["settings"] == DEFAULT | cell:
            cells.setdefault(tuple(cell.values()), []).append(run)
    scalings = sorted({scaling for scaling, _ in cells})
    rates = sorted({rate for _, rate in cells})
    learned = {}  # without the cells in which a run gives all sentences one label
    for cell, group in cells.items():
        if all(len(set(run["results"]["validation"]["labels"])) > 1 for run in group):
            learned[cell] = group

    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.3), sharey=True)
    for ax, where in zip(axes, ("held-out", "validation"), strict=True):
        means = {cell: mean_accuracy(group, where) for cell, group in learned.items()}
        low, high = min(means.values(), default=0), max(means.values(), default=0)
        grid = [[means.get((scaling, rate), math.nan) for rate in rates] for scaling in scalings]
        ax.imshow(grid, cmap="Blues", aspect="auto", origin="lower", vmin=low - 1, vmax=high + 1)
        for cell, group in cells.items():
            values = accuracies(group, where)
            text = f"{statistics.fmean(values):.1f}"
            text += f"\n±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
            text += "" if cell in learned else "\nalways one label"
            colour = "white" if means.get(cell, low) > (low + 2 * high) / 3 else INK
            place = (rates.index(cell[1]), scalings.index(cell[0]))
            ax.text(*place, text, ha="center", va="center", color=colour, fontsize=9)
        ax.set(xticks=range(len(rates)), xticklabels=[f"{rate:g}" for rate in rates], xlabel="learning rate")
        ax.set_title(f"accuracy on {where}, %")
        ax.spines[:].set_visible(False)
    axes[0].set(yticks=range(len(scalings)), yticklabels=[f"{scaling:g}" for scaling in scalings], ylabel="α / r")
    if not learned:
        return fig, "With every setting, a run gave all sentences one label", describe(runs)
    scaling, rate = max(learned, key=lambda cell: mean_accuracy(learned[cell], "held-out"))
    finding = f"The highest mean on held-out: α / r = {scaling:g} and learning rate {rate:g}"
    return fig, finding, describe(runs)


@_shown
def draw_targets(runs: list[dict]):
    """Draw validation accuracy by the layers that are adapted, with each seed joined by a line.

    On the right stand the parameters, and McNemar's p against the default for each seed.
    """
    groups = {}  # {label: runs}
    for run in runs:
        targets = run["settings"]["targets"]
        if run["settings"] == DEFAULT | {"targets": targets}:
            groups.setdefault(targets if isinstance(targets, str) else ", ".join(targets), []).append(run)
    labels = sorted(groups, key=lambda label: groups[label][0]["trained_parameters"])
    default = select(runs)

    fig, ax = plt.subplots(figsize=(8.5, 4))
    place = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 9}
    ax.text(1.02, -0.8, "McNemar's p by seed\n(* below 0.05)", **place)
    for row, label in enumerate(labels):
        group = groups[label]
        ax.plot(mean_accuracy(group), row, "o", color=LORA, markersize=10, markeredgecolor="white", zorder=3)
        tests = [f"{test.p:.2g}{'*' * (test.p < 0.05)}" for test in compare_seeds(group, default)]
        ax.text(1.02, row, "(compared with)" if group == default else ", ".join(tests), **place)
    for index, style in zip(range(len(default)), itertools.cycle(("s-", "^--", "D:"))):
        values = [accuracies(groups[label])[index] for label in labels]
        line = {"color": LORA, "markersize": 4, "linewidth": 1, "alpha": 0.6}
        ax.plot(values, range(len(labels)), style, **line, label=f"seed {default[index]['seed']}")
    ticks = [f"{label}\n{groups[label][0]['trained_parameters']:,} parameters" for label in labels]
    ax.set(yticks=range(len(labels)), yticklabels=ticks, ylim=(len(labels) - 0.5, -0.5))
    ax.set(xlabel="validation accuracy, % (large marks: means)")
    ax.grid(axis="x", alpha=0.3)
    ax.legend(**LEGEND_BELOW)
    best = max(labels, key=lambda label: mean_accuracy(groups[label]))
    finding = f"The highest mean: {best}, {mean_accuracy(groups[best]):.1f} %"
    return fig, f"{finding} (default: {mean_accuracy(default):.1f} %)", f"rank {DEFAULT['rank']}; {describe(runs)}"


# Rounding -----------------------------------------------------------------------------------------


@_shown
def draw_staircase(bits: int):
    """Draw what `quantize` makes of 400 numbers from -1 to 1, and its levels at the left edge."""
    x = torch.linspace(-1, 1, 400)[None]  # (1, 400): one row, so one scale
    rounded = dequantize(*quantize(x, bits))[0]
    levels = rounded.unique()
    fig, ax = plt.subplots(figsize=(6, 3.6))
    ax.plot(x[0], x[0], "--", color=REFERENCE, label="x itself")
    ax.plot(x[0], rounded, color=QLORA, label="x rounded")
    ax.plot([-1.12] * len(levels), levels, "_", color=INK, markersize=14, markeredgewidth=0.8, label="levels")
    ticks = [-1, -0.5, 0, 0.5, 1]
    ax.set(xlabel="x", ylabel="s (q + ½)", xlim=(-1.2, 1.1), ylim=(-1.1, 1.1), xticks=ticks, yticks=ticks)
    ax.legend()
    return fig, f"{bits} bits give {len(levels)} levels. The largest error is {(rounded - x[0]).abs().max():.3f}", ""


@_shown
def draw_rounding_errors(weight: torch.Tensor, curves: dict[str, list[float]], nf4: float, int8: float, title: str):
    """Draw the histogram of a weight matrix, and the relative error of rounding it against the bits.

    Args:
        curves: {label: the relative error at 2, 3, ... 8 bits}, with one scale per matrix, row, and block of 64.
        nf4, int8: the relative errors of the two codes for frozen weights.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3))
    largest = weight.abs().max().item()
    left.hist(weight.flatten().tolist(), bins=120, color=REFERENCE)
    left.set(xlabel="weight", ylabel="number of weights", xlim=(-largest, largest))
    bits_of_scales = (32 / weight.numel(), 32 / weight.shape[1], 32 / 64)
    for (label, errors), style, scales in zip(curves.items(), (":", "--", "-"), bits_of_scales, strict=True):
        right.plot([bits + scales for bits in range(2, 9)], errors, style, marker=".", color=INK, label=label)
    right.plot(4.127, nf4, "*", color=QBASE, markersize=12, label="NF4")
    right.plot(8 + 32 / weight.shape[1], int8, "P", color=QBASE, markersize=9, label="int8, one scale per row")
    right.set(yscale="log", xlabel="bits per weight, scales included", ylabel="relative error")
    right.legend()
    label, errors = next(iter(curves.items()))
    return fig, f"Relative error at 4 bits: {errors[2]:.1%} with {label}, {nf4:.1%} with NF4", title


@_shown
def draw_rounded(weight: torch.Tensor, bits: int):
    """Draw the first row of a weight matrix before and after rounding with one scale per row.

    Left: the histogram of the row, and the levels. Right: 40 of its weights.
    """
    rounded = dequantize(*quantize(weight, bits))
    error = ((rounded - weight).norm() / weight.norm()).item()
    levels = rounded[0].unique()
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
    left.hist(weight[0].tolist(), bins=40, color=REFERENCE, label="as it is")
    for level in levels:
        left.axvline(
            level, ymax=0.12, color=QLORA, linewidth=1.5, label="levels in use" if level == levels[0] else None
        )
    left.set(xlabel="weights of the first row", ylabel="number of weights")
    left.legend()
    right.plot(weight[0, :40], drawstyle="steps-mid", color=REFERENCE, linewidth=2, label="as it is")
    right.plot(rounded[0, :40], "--", drawstyle="steps-mid", color=QLORA, linewidth=1.2, label="rounded")
    right.set(xlabel="the first 40 weights of the row", ylabel="weight")
    right.margins(y=0.2)
    right.legend(ncols=2, loc="upper right")
    return fig, f"{bits} bits: the relative error of the matrix is {error:.1%}", ""


@_shown
def draw_adapter(layer: QuantizedLoRALayer, A_at_start: torch.Tensor, bits: int, title: str):
    """Draw A before and after training, and how often B uses each of its integers.

    The layer is trained and not packed.
    """
    A = layer.lora_A.detach()
    B = layer.lora_B.detach().T.cpu()  # (rank, out): one scale per rank
    q, scales = quantize(B, bits)
    beyond = B.abs() > scales.view(-1, 1) * 2 ** (bits - 1)  # by more than half a step outside the outermost level
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2))
    span = A.abs().max().item()
    bins = {"bins": 60, "range": (-span, span)}
    left.hist(A_at_start.flatten().tolist(), color=REFERENCE, alpha=0.6, label="at the start", **bins)
    left.hist(A.flatten().tolist(), color=QLORA, histtype="step", linewidth=1.5, label="trained", **bins)
    left.set(xlabel="numbers of A (float32 masters)", ylabel="count")
    left.legend()
    integers = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    inside = [((q == integer) & ~beyond).sum().item() for integer in integers]
    clipped = [((q == end) & beyond).sum().item() for end in (integers[0], integers[-1])]
    hatched = {"color": "white", "edgecolor": QLORA, "hatch": "////", "label": "clipped"}
    right.bar(integers, inside, color=QLORA, label="rounded")
    right.bar([integers[0], integers[-1]], clipped, bottom=[inside[0], inside[-1]], **hatched)
    every = max(1, len(integers) // 8)  # at most eight numbers at the axis
    right.set(xlabel=f"integers of B, trained ({bits} bits)", ylabel="count", xticks=integers[::every])
    right.legend()
    share = beyond.float().mean().item()
    return fig, f"{share:.1%} of B's numbers lie beyond the grid and are clipped to its ends", title


# How A and B are rounded after training: name in the results, label, colour, marker.
_WAYS_OF_ROUNDING = [
    ("absmax", "after training: absmax", REFERENCE, "s"),
    ("half steps", "after training: half steps", INK, "x"),
    ("together", "after training: A and B jointly", INK, "D"),
]


@_shown
def draw_bits(runs: list[dict], own: Sequence | None = None, label: str = "your run"):
    """Draw the difference in validation accuracy from unquantised LoRA against the bits of A and B, by seed.

    Drawn are training through the rounding and three ways of rounding afterwards.

    Args:
        own: (bits, `Evaluation`) or (bits, `Evaluation`, `Evaluation` of your unquantised LoRA) of one more run. It
            is compared with your LoRA, or with the mean LoRA of the sweep. Only 8, 4, 3 or 2 bits are drawn.
    """
    widths = [8, 4, 3, 2]
    plain = select(runs)
    reference = accuracies(plain)
    fig, ax = plt.subplots(figsize=(8.5, 4.2))
    curves = [("in training (q-LoRA)", QLORA, "^", {b: select(runs, method="qlora", bits=b) for b in widths})]
    for way, name, colour, marker in _WAYS_OF_ROUNDING:
        curves.append((name, colour, marker, {b: round_after_training(plain, way, b) for b in widths}))

    ax.axhline(0, color=LORA, linewidth=1.5, label="LoRA, not quantised")
    means = []
    for index, (name, colour, marker, groups) in enumerate(curves):
        for column, bits in enumerate(widths):
            x = column + 0.17 * (index - 1.5)  # beside each other, so that no way hides another
            values = [value - base for value, base in zip(accuracies(groups[bits]), reference, strict=True)]
            means.append(statistics.fmean(values))
            ax.plot([x] * len(values), values, marker, color=colour, markersize=4.5, alpha=0.6)
            ax.plot(x, means[-1], marker, color=colour, markersize=10, label=name if column == 0 else None)
    if own is not None and own[0] in widths:
        bits, result, *twin = own
        base = 100 * twin[0].accuracy if twin else statistics.fmean(reference)
        place = (widths.index(bits) - 0.4, 100 * result.accuracy - base)
        ax.plot(*place, "*", color=INK, markerfacecolor="white", markersize=12, linestyle="", label=label)
    for column in range(len(widths) - 1):
        ax.axvline(column + 0.5, color=REFERENCE, linewidth=0.5)
    ax.set(xticks=range(len(widths)), xticklabels=[f"{bits} bits" for bits in widths], xlabel="A and B")
    ax.set(ylabel="difference from LoRA, points")
    ax.legend(**LEGEND_BELOW)
    finding = f"The means differ from LoRA by {min(means):+.1f} to {max(means):+.1f} points"
    return fig, finding, f"rank {DEFAULT['rank']}; {describe(runs)}"


@_shown
def draw_budgets(runs: list[dict], budgets: Sequence[int] = (16, 64)):
    """Draw validation accuracy where the same bytes are spent on ranks or on bits, one panel per budget.

    A budget is a product of rank and bits.
    """
    fig, axes = plt.subplots(1, len(budgets), figsize=(8.5, 3.6), sharey=True, squeeze=False)
    spread = []
    for ax, budget in zip(axes[0], budgets, strict=True):
        ways = _ways_to_spend(runs, budget)
        values = [accuracies(group) for _, _, group in ways]
        for seed in zip(*values, strict=True):
            ax.plot(range(len(ways)), seed, color=REFERENCE, linewidth=0.8, alpha=0.5)
        for column, (_, bits, _) in enumerate(ways):
            _draw_seeds(ax, column, values[column], LORA if bits == 16 else QLORA)
        labels = [f"rank {rank}\n{bits} bits\n{group[0]['bytes'] / 1000:.1f} KB" for rank, bits, group in ways]
        ax.set(xticks=range(len(ways)), xticklabels=labels, xlim=(-0.6, len(ways) - 0.4))
        ax.set_title(f"rank · bits = {budget}")
        means = [statistics.fmean(of_way) for of_way in values]
        spread.append(max(means) - min(means))
    for colour, label in ((LORA, "LoRA, rounded to float16"), (QLORA, "q-LoRA")):
        axes[0, -1].plot([], [], MARKER[colour], color=colour, label=label)
    axes[0, -1].legend()
    axes[0, 0].set_ylabel("validation accuracy, %")
    finding = f"For the same bytes, the means differ by {' and '.join(f'{points:.1f}' for points in spread)} points"
    return fig, finding, describe(runs)


def _ways_to_spend(runs, budget):
    """Return [(rank, bits, runs)] with rank · bits = budget. 16 bits are LoRA, rounded to float16."""
    ways = []
    for rank in (1, 2, 4, 8, 16, 32):
        bits = budget // rank
        if 2 <= bits <= 8:
            ways.append((rank, bits, select(runs, method="qlora", rank=rank, bits=bits)))
        if bits == 16:
            ways.append((rank, bits, round_to_float16(select(runs, rank=rank))))
    return ways


# Bytes --------------------------------------------------------------------------------------------

# The parts of a bar: label, the ledger's rows in it, colour, hatching.
_PARTS_OF_A_LEDGER = [
    ("weights, with scales", ("frozen weights", "position ids", "scales and code tables"), "#bbbbbb", ""),
    ("8-bit copy for backward", ("frozen weights, for backward",), "#bbbbbb", "//"),
    ("embeddings", ("embeddings",), "#777777", ""),
    ("A, B and head", ("A and B", "scales of A and B", "head"), "#08306b", ""),
    ("gradients and optimiser", ("gradients", "optimizer states"), "#6baed6", ""),
    ("saved for backward", ("saved for backward",), "#e3eef9", ".."),
]


@_shown
def draw_ledgers(ledgers: dict, title: str):
    """Draw what is held in training as one bar per model, in megabytes.

    `ledgers` is {label: `Ledger`}, from above.
    """
    fig, ax = plt.subplots(figsize=(8.5, 2.3 + 0.32 * len(ledgers)))
    totals = [0] * len(ledgers)
    for label, what, colour, hatch in _PARTS_OF_A_LEDGER:
        widths = [ledger.total_bytes(*what) / 1e6 for ledger in ledgers.values()]
        if any(widths):
            options = {"color": colour, "hatch": hatch, "edgecolor": "#555555", "linewidth": 0.5}
            ax.barh(range(len(ledgers)), widths, left=totals, label=label, **options)
        totals = [total + width for total, width in zip(totals, widths, strict=True)]
    for row, total in enumerate(totals):
        ax.text(total, row, f" {total:.1f} MB", va="center")
    ax.set(yticks=range(len(ledgers)), yticklabels=list(ledgers), ylim=(len(ledgers) - 0.4, -0.6))
    ax.set(xlabel="megabytes held in training", xlim=(0, 1.15 * max(totals)))
    ax.legend(ncols=2, loc="lower right", framealpha=1)
    ends = [f"{label}: {total:.0f} MB" for total, label in (max(zip(totals, ledgers)), min(zip(totals, ledgers)))]
    return fig, "; ".join(ends), title


@_shown
def draw_merging(curves: dict[str, list[tuple]], trained_share: float, title: str):
    """Draw what becomes of an update that is merged into a quantised base, against the size of the update.

    Left: the share of the update that survives. Right: the relative error of the sum of weight and update.

    Args:
        curves: {way of merging: [(size, share, error)]}, two of them, all numbers from 0 to 1. The size is the norm
            of the update over the norm of the weight.
        trained_share: the size of the update as it was trained.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.3))
    at_trained = []
    for (way, points), colour, style in zip(curves.items(), (LORA, QBASE), ("o-", "s--"), strict=True):
        sizes = [100 * size for size, _, _ in points]
        left.plot(sizes, [100 * share for _, share, _ in points], style, color=colour)
        right.plot(sizes, [100 * error for _, _, error in points], style, color=colour, label=way)
        nearest = min(points, key=lambda point: abs(math.log(point[0] / trained_share)))
        at_trained.append(f"{nearest[1]:.0%}")
    ticks = [1, 2, 5, 10, 20, 40]
    for ax in (left, right):
        ax.axvline(100 * trained_share, color=REFERENCE, linestyle=":", label="the update as trained")
        ax.set(xscale="log", xlabel="size of the update, % of the weight's norm", ylim=(0, None))
        ax.set_xticks(ticks, ticks, minor=False)
        ax.minorticks_off()
    left.set_ylabel("share of the update\nthat survives, %")
    right.set_ylabel("error of the sum, % of its norm")
    left.annotate("as trained", (100 * trained_share, 3), (4, 0), textcoords="offset points", fontsize=9)
    right.legend(loc="lower left", frameon=True, framealpha=1, edgecolor="white")
    return fig, f"Of an update of {nearest[0]:.1%} of the weight, {' or '.join(at_trained)} survive", title


# The methods in the left and in the right panel of `draw_whole`: name in `methods`, text above the axes, colour, and
# where the text stands.
_SHIPPED = [
    ("q-LoRA, 2 bits", "2 bits", QLORA, "right", 1.02),
    ("q-LoRA, 4 bits", "q-LoRA, 4 bits", QLORA, "center", 1.09),
    ("q-LoRA, 8 bits", "8 bits", QLORA, "left", 1.02),
    ("LoRA", "LoRA", LORA, "left", 1.09),
    ("full fine-tuning", "full fine-tuning", FULL, "right", 1.02),
]
_HELD = [
    ("q-LoRA, 4 bits, NF4 base", "NF4 base", QBASE, "center", 1.02),
    ("q-LoRA, 4 bits, int8 base", "q-LoRA, int8 base", QBASE, "left", 1.09),
    ("LoRA", "LoRA", LORA, "center", 1.02),
]


@_shown
def draw_whole(runs: list[dict], own: Sequence[tuple[int, int, Evaluation]] = (), label: str = "your runs"):
    """Draw validation accuracy against bytes, for the methods of both lessons.

    Left: the bytes that are shipped, A, B and head.
    Right: the bytes that the whole model holds when it predicts.

    Args:
        own: (bytes shipped, bytes held, `Evaluation`) of each of some more runs, drawn as stars.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True)
    groups = methods(runs)
    lora = groups["LoRA"]
    heads = _heads(runs)
    head = 4 * next(iter(heads.values()))[0]["trained_parameters"]  # bytes, in float32
    for name, *how in _SHIPPED:
        _draw_method(left, (groups[name][0]["bytes"] + head) / 1e6, groups[name], *how)
    for name, *how in _HELD:
        _draw_method(right, groups[name][0]["held"] / 1e6, groups[name], *how)
    for name, group in heads.items():
        for ax, x, side, ha in ((left, head / 1e6, 10, "left"), (right, lora[0]["held"] / 1e6, -10, "right")):
            _draw_seeds(ax, x, accuracies(group), HEAD)
            _annotate(ax, name, (x, mean_accuracy(group)), (side, -3), ha=ha)
    star = {"color": INK, "markerfacecolor": "none", "markersize": 12, "linestyle": ""}
    for ships, holds, result in own:
        left.plot(ships / 1e6, 100 * result.accuracy, "*", **star)
        right.plot(holds / 1e6, 100 * result.accuracy, "*", **star, label=label)
        label = None  # one entry in the legend is enough
    if own:
        right.legend(loc="lower left")
    left.set(xscale="log", xlabel="megabytes to ship: A, B and head", ylabel="validation accuracy, %")
    right.set(xlim=(0, None), xlabel="megabytes held: the whole model, ready to predict")
    left.margins(y=0.08)
    nf4 = groups["q-LoRA, 4 bits, NF4 base"]
    finding = f"On an NF4 base, q-LoRA holds {lora[0]['held'] / nf4[0]['held']:.1f} times fewer bytes than LoRA, "
    finding += f"at {mean_accuracy(nf4) - mean_accuracy(lora):+.1f} points"
    return fig, finding, describe(runs)


def _draw_method(ax, megabytes, runs, text, colour, place, height):
    """Draw the seeds of one method, and a line from the highest mark to its name above the axes."""
    values = accuracies(runs)
    _draw_seeds(ax, megabytes, values, colour)
    line = {"arrowstyle": "-", "color": REFERENCE, "linewidth": 0.8, "shrinkA": 0}
    where = {"xytext": (megabytes, height), "textcoords": ax.get_xaxis_transform(), "ha": place}
    ax.annotate(
        text,
        (megabytes, max(values)),
        **where,
        fontsize=9,
        arrowprops=line | {"relpos": ({"left": 0, "center": 0.5, "right": 1}[place], 0)},
    )
