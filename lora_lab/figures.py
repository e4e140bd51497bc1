"""Draw the figures of both notebooks.

Every function draws what its arguments hold, and ends with `plt.show()`. None reads a file. Each method has one
colour and one marker in all figures. Call `set_style()` once before the first figure.
"""

import math
import statistics
from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import torch

from lora_lab.compare import (
    DEFAULT,
    accuracies,
    compare_seeds,
    describe,
    full_fine_tuning,
    head_bytes,
    head_only,
    mean_accuracy,
    methods,
    round_after_training,
    round_to_float16,
    select,
)
from lora_utils import (
    Evaluation,
    LoRABertModel,
    QuantizedLoRALayer,
    dequantize,
    match_targets,
    quantize,
)

# --------------------------------------------------------------------------------------------------
# Style: one colour and one marker per method
# --------------------------------------------------------------------------------------------------

LORA = "#0072b2"
QLORA = "#d55e00"
QBASE = "#009e73"  # q-LoRA on a quantised base
HEAD_ONLY = "#e69f00"
FULL = "#cc79a7"
UNTOUCHED = "#999999"  # what is not trained, and what the others are compared with
INK = "#222222"

MARKER = {LORA: "o", QLORA: "^", QBASE: "s", HEAD_ONLY: "D", FULL: "v", UNTOUCHED: "s", INK: "*"}

FROZEN_FILL = "#dddddd"
TRAINED_FILL = "#9ecae1"

# How a label begins, and its colour.
COLOUR_OF_LABEL = {
    "untouched": UNTOUCHED,
    "before training": UNTOUCHED,
    "head only": HEAD_ONLY,
    "LoRA": LORA,
    "q-LoRA": QLORA,
    "full fine-tuning": FULL,
}


def set_style() -> None:
    """Set size, fonts and axes of all figures that are drawn from here on."""
    plt.rcParams.update(
        {
            "figure.dpi": 96,
            "figure.figsize": (7.5, 3),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "font.size": 10,
        }
    )


def _colour_of(label):
    """Return the colour of a method by its label, such as "q-LoRA, 4 bits"."""
    if " base" in label:
        return QBASE
    for start, colour in COLOUR_OF_LABEL.items():
        if label.startswith(start):
            return colour
    return INK


# --------------------------------------------------------------------------------------------------
# Pieces that several figures use
# --------------------------------------------------------------------------------------------------


def _draw_seeds(ax, x, values, colour, label=None):
    """Draw each seed as a small mark at x, and the mean of the seeds as a large one."""
    marker = MARKER[colour]
    ax.plot([x] * len(values), values, marker, color=colour, markersize=4, alpha=0.45)
    mean = statistics.fmean(values)
    ax.plot(x, mean, marker, color=colour, markersize=9, markeredgecolor="white", linestyle="", label=label)


def _write_below(ax, x, y, text):
    """Write a small text below the point (x, y)."""
    ax.annotate(text, (x, y), (0, -14), textcoords="offset points", ha="center", fontsize=8)


def _interval(result):
    """Return how far the 95 % interval of an `Evaluation` reaches below and above its accuracy, in points."""
    below = 100 * (result.accuracy - result.low)
    above = 100 * (result.high - result.accuracy)
    return [[below], [above]]


def _draw_heat_map(ax, grid, texts, dark_above, **options):
    """Draw a table of numbers as colours, and write a text into each cell.

    Args:
        grid: rows of numbers. NaN leaves a cell white.
        texts: what each cell says, in the same shape.
        dark_above: from 0 to 1, where between the ends of the colour scale the writing turns white.
        options: for `ax.imshow`.
    """
    image = ax.imshow(grid, cmap="Blues", aspect="auto", **options)
    lightest = image.norm.vmin
    darkest = image.norm.vmax
    limit = lightest + dark_above * (darkest - lightest)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            colour = "white" if value > limit else INK
            ax.text(column, row, texts[row][column], ha="center", va="center", color=colour, fontsize=9)
    ax.spines[:].set_visible(False)


# --------------------------------------------------------------------------------------------------
# What LoRA is
# --------------------------------------------------------------------------------------------------

# The linear layers of one block and the pooler, from below: name, (left, bottom, width) in the drawing, text.
_BERT_LAYERS = [
    ("encoder.layer.0.attention.self.query", (0, 0.9, 1.9), "query"),
    ("encoder.layer.0.attention.self.key", (2.05, 0.9, 1.9), "key"),
    ("encoder.layer.0.attention.self.value", (4.1, 0.9, 1.9), "value"),
    ("encoder.layer.0.attention.output.dense", (0, 2.3, 6), "attention output"),
    ("encoder.layer.0.intermediate.dense", (0, 3.2, 6), "feed-forward, up"),
    ("encoder.layer.0.output.dense", (0, 4.1, 6), "feed-forward, down"),
    ("pooler.dense", (0, 5.6, 6), "pooler"),
]


def draw_lora(targets: str | Iterable[str]) -> None:
    """Draw BERT with its adapted layers, and beside it one adapted layer from inside.

    Args:
        targets: which layers are adapted, as `LoRABertModel` takes it in `target_modules`.
    """
    _, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), width_ratios=[1, 1.5])
    _draw_bert(left, targets)
    _draw_layer(right)
    left.axis("off")
    right.axis("off")
    plt.show()


def _draw_bert(ax, targets):
    """Draw one block of BERT and what is around it, with a pair A, B at each adapted layer."""
    names = [name for name, _, _ in _BERT_LAYERS]
    adapted = match_targets(names, targets)
    for name, (x, y, width), text in _BERT_LAYERS:
        _draw_box(ax, x, y, width, 0.6, FROZEN_FILL, text)
        if name in adapted:
            _draw_box(ax, x + width - 0.7, y - 0.2, 0.75, 0.36, TRAINED_FILL, "A, B", fontsize=7)
    block = plt.Rectangle((-0.4, 0.6), 6.9, 4.4, fill=False, edgecolor=INK, linestyle=":")
    ax.add_patch(block)
    _write(ax, 3, 0.3, "embeddings of the words")
    _write(ax, 3, 1.9, "attention")
    _write(ax, 3, 5.2, "× number of blocks")
    _draw_box(ax, 0, 6.5, 6, 0.6, TRAINED_FILL, "head: negative or positive")
    ax.set(xlim=(-0.6, 6.9), ylim=(0, 7.3), aspect="equal")


def _draw_layer(ax):
    """Draw one adapted layer: x passes through W, and through A, B and the scaling."""
    _draw_box(ax, 2.0, 1.7, 3.2, 1.5, FROZEN_FILL, "$W$  (out × in)\nfrozen")
    _draw_box(ax, 2.0, 0.15, 0.9, 1.1, TRAINED_FILL, "$A$\n(r × in)", fontsize=8)
    _draw_box(ax, 4.3, 0.15, 0.9, 1.1, TRAINED_FILL, "$B$\n(out × r)", fontsize=7.5)
    _draw_box(ax, 6.1, 0.45, 0.8, 0.5, "white", r"$\alpha\,/\,r$")
    _write(ax, 0.45, 2.4, "$x$", fontsize=13)
    _write(ax, 9.05, 2.4, "$y$", fontsize=13)
    ax.text(3.6, 0.95, "r numbers", ha="center", fontsize=8)
    # through W
    _draw_arrow(ax, (0.7, 2.45), (2.0, 2.45))
    _draw_arrow(ax, (5.2, 2.45), (7.6, 2.45))
    _draw_arrow(ax, (8.0, 2.45), (8.8, 2.45))
    # through A, B and the scaling
    _draw_arrow(ax, (1.2, 2.45), (2.0, 0.7))
    _draw_arrow(ax, (2.9, 0.7), (4.3, 0.7))
    _draw_arrow(ax, (5.2, 0.7), (6.1, 0.7))
    _draw_arrow(ax, (6.9, 0.7), (7.75, 2.25))
    # the sum of both
    ax.add_patch(plt.Circle((7.8, 2.45), 0.2, facecolor="white", edgecolor=INK))
    ax.text(7.8, 2.45, "+", ha="center", va="center")
    ax.set(xlim=(0, 9.4), ylim=(0, 3.4), aspect="equal")


def _draw_box(ax, x, y, width, height, colour, text, fontsize=9):
    """Draw a filled box whose lower left corner is (x, y), with a text in its middle."""
    ax.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK))
    _write(ax, x + width / 2, y + height / 2, text, fontsize)


def _draw_arrow(ax, start, end):
    """Draw an arrow between two points."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK})


def _write(ax, x, y, text, fontsize=9):
    """Write a text around the point (x, y)."""
    ax.text(x, y, text, ha="center", va="center", color=INK, fontsize=fontsize)


def update_layers(runs: list[dict]) -> list[str]:
    """Return the names of the layers that `draw_update` can draw: all linear layers but the head."""
    first = full_fine_tuning(runs)[0]
    return list(first["update"]["share"])


def random_share(shape: Sequence[int]) -> list[float]:
    """Return how much of a random matrix's squared norm its first 1, 2, 3, ... singular values hold.

    The shares are numbers from 0 to 1. The matrix has independent normal entries. The seed is fixed.
    """
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    squares = torch.linalg.svdvals(matrix).square()
    shares = squares.cumsum(0) / squares.sum()
    return shares.tolist()


def draw_update(runs: list[dict], layer: str | None = None) -> None:
    """Draw how near the update of full fine-tuning, ΔW, is to a matrix of low rank.

    Left: for each seed, the share of the squared norm of one layer's ΔW in its first r singular values.
    Right: the accuracy that is left when the ΔW of every linear layer is cut to rank r.

    Args:
        runs: the runs of the sweep.
        layer: one of `update_layers(runs)`. None takes the value layer in the middle of the model.
    """
    full = full_fine_tuning(runs)
    updates = [run["update"] for run in full]
    if layer is None:
        value_layers = [name for name in update_layers(runs) if name.endswith("self.value")]
        layer = value_layers[len(value_layers) // 2]
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.2), width_ratios=[1.2, 1])

    label = "full fine-tuning"
    for update in updates:
        shares = [100 * share for share in update["share"][layer]]
        ranks = update["ranks"][: len(shares)]
        left.plot(ranks, shares, "v-", color=FULL, markersize=4, label=label)
        label = None  # one entry in the legend is enough
    random_shares = [100 * share for share in random_share(updates[0]["shape"][layer])]
    random_ranks = range(1, len(random_shares) + 1)
    left.plot(random_ranks, random_shares, "--", color=UNTOUCHED, label="a random matrix")
    size = 100 * updates[0]["size"][layer]
    left.set_title(f"{layer}, size {size:.1f} % of the weight", fontsize=9)
    left.set(xscale="log", xlabel="first r singular values")
    left.set(ylim=(0, 102), ylabel="share of the squared norm, %")
    left.legend(frameon=False, fontsize=8)

    cut_ranks = list(updates[0]["kept"])
    columns = range(len(cut_ranks))
    for update in updates:
        kept = [100 * update["kept"][rank] for rank in cut_ranks]
        right.plot(columns, kept, "v-", color=FULL, markersize=5)
    right.plot(len(cut_ranks), mean_accuracy(full), "v", color=FULL, markersize=9)
    right.set(xticks=range(len(cut_ranks) + 1), xticklabels=[*cut_ranks, "all"])
    right.set(xlabel="rank that every update is cut to", ylabel="validation accuracy, %")
    fig.suptitle(describe(runs), fontsize=10)
    plt.show()


# --------------------------------------------------------------------------------------------------
# One training run
# --------------------------------------------------------------------------------------------------


def draw_padding(lengths: torch.Tensor, tokens_by_way: dict[str, int], title: str) -> None:
    """Draw how long the sentences are, and how many tokens are computed per sentence.

    Args:
        lengths: the number of tokens of each sentence, a tensor of integers.
        tokens_by_way: {a way of making batches: tokens computed in one epoch, padding included}.
        title: what stands above both panels.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
    longest = int(lengths.max())
    left.hist(lengths.tolist(), bins=range(2, longest + 3), color=UNTOUCHED)
    left.set(xlabel="tokens in a sentence", ylabel="training sentences")
    per_sentence = [tokens / len(lengths) for tokens in tokens_by_way.values()]
    bars = right.barh(list(tokens_by_way), per_sentence, color=UNTOUCHED)
    right.bar_label(bars, fmt="%.1f", padding=3)
    right.set(xlabel="tokens computed per sentence", xlim=(0, 1.17 * max(per_sentence)))
    right.invert_yaxis()
    fig.suptitle(title, fontsize=10)
    plt.show()


def draw_losses(losses: dict[str, list[float]], title: str, window: int = 50) -> None:
    """Draw the training loss of one or more runs against the step, as a running mean.

    Args:
        losses: {label: the loss of every step, in nats}.
        title: what stands above the figure.
        window: how many steps are averaged.
    """
    _, ax = plt.subplots(figsize=(7.5, 2.8))
    for label, values in losses.items():
        colour = _colour_of(label)
        style = "--"
        width = 1.5
        if colour == LORA:  # drawn broad, so that a line over it does not hide it
            style = "-"
            width = 2.5
        ax.plot(_running_mean(values, window), style, color=colour, linewidth=width, label=label)
    ax.set(xlabel="step", ylabel=f"training loss, nats\n(mean of {window} steps)")
    ax.legend(frameon=False)
    ax.set_title(title, fontsize=10)
    plt.show()


def _running_mean(values, window):
    """Average each value with up to `window` - 1 values before it."""
    means = []
    for end in range(1, len(values) + 1):
        start = max(0, end - window)
        means.append(statistics.fmean(values[start:end]))
    return means


def draw_results(results: dict[str, Evaluation], title: str) -> None:
    """Draw the validation accuracy of several models, with 95 % intervals.

    Args:
        results: {label: `Evaluation`}, from above.
        title: what stands above the figure.
    """
    _, ax = plt.subplots(figsize=(7.5, 1 + 0.4 * len(results)))
    for row, (label, result) in enumerate(results.items()):
        colour = _colour_of(label)
        accuracy = 100 * result.accuracy
        ax.errorbar(accuracy, row, xerr=_interval(result), fmt=MARKER[colour], color=colour, capsize=4)
    ax.set(yticks=range(len(results)), yticklabels=list(results), ylim=(len(results) - 0.5, -0.5))
    ax.set(xlabel="validation accuracy, % (95 % interval)")
    ax.set_title(title, fontsize=10)
    ax.grid(axis="x", alpha=0.3)
    plt.show()


def draw_changes(model: LoRABertModel, title: str) -> None:
    """Draw the size of each layer's update in % of its weight: a row per kind of layer, a column per block.

    The size is ‖scaling · B A‖ / ‖W‖, with Frobenius norms.

    Args:
        model: a trained `LoRABertModel` on a base that is not quantised.
        title: the second line above the figure. The first says what is drawn.
    """
    sizes = {}  # {(kind of layer, block): size in %}
    for name, layer in model.lora_layers().items():
        update = layer.delta_weight().norm().item()
        weight = layer.base.weight.float().norm().item()
        sizes[_kind_and_block(name)] = 100 * update / weight
    kinds = list(dict.fromkeys(kind for kind, _ in sizes))  # each once, in the model's order
    blocks = list(dict.fromkeys(block for _, block in sizes))

    grid = []
    texts = []
    for kind in kinds:
        row = []
        row_texts = []
        for block in blocks:
            size = sizes.get((kind, block), math.nan)  # not every block has every kind
            row.append(size)
            row_texts.append("" if math.isnan(size) else f"{size:.1f}")
        grid.append(row)
        texts.append(row_texts)

    _, ax = plt.subplots(figsize=(7.5, 1.2 + 0.45 * len(kinds)))
    _draw_heat_map(ax, grid, texts, dark_above=0.6, vmin=0)
    ax.set(xticks=range(len(blocks)), xticklabels=blocks, xlabel="block")
    ax.set(yticks=range(len(kinds)), yticklabels=kinds)
    ax.set_title(f"size of the update, % of the weight's norm\n{title}", fontsize=10)
    plt.show()


def _kind_and_block(name):
    """Split "bert.encoder.layer.3.output.dense" into ("output.dense", "3"). The pooler is its own block."""
    _, found, rest = name.partition(".layer.")
    if not found:
        return "pooler.dense", "pooler"
    block, _, kind = rest.partition(".")
    return kind, block


# --------------------------------------------------------------------------------------------------
# What the sweep found about LoRA
# --------------------------------------------------------------------------------------------------


def draw_ranks(runs: list[dict], own: tuple[int, Evaluation] | None = None, label: str = "your run") -> None:
    """Draw validation accuracy against the number of trained parameters.

    Drawn are head only, LoRA by rank and full fine-tuning. The band is the range of full fine-tuning.

    Args:
        runs: the runs of the sweep.
        own: (trained parameters, `Evaluation`) of one more run, drawn as a star with its 95 % interval.
        label: what the legend calls that run.
    """
    _, ax = plt.subplots(figsize=(8, 3.6))
    head = head_only(runs)
    _draw_seeds(ax, head[0]["trained_parameters"], accuracies(head), HEAD_ONLY, label="head only")

    ranks = {run["settings"]["rank"] for run in runs if run["settings"]["method"] == "lora"}
    parameters = []
    means = []
    for rank in sorted(ranks):
        group = select(runs, rank=rank)
        values = accuracies(group)
        x = group[0]["trained_parameters"]
        name = "LoRA, by rank" if not parameters else None  # one entry in the legend is enough
        _draw_seeds(ax, x, values, LORA, label=name)
        _write_below(ax, x, min(values), f"r = {rank}")
        parameters.append(x)
        means.append(mean_accuracy(group))
    ax.plot(parameters, means, color=LORA, linewidth=1)

    full = full_fine_tuning(runs)
    values = accuracies(full)
    ax.axhspan(min(values), max(values), color=FULL, alpha=0.2, linewidth=0)
    _draw_seeds(ax, full[0]["trained_parameters"], values, FULL, label="full fine-tuning")

    if own is not None:
        x, result = own
        y = 100 * result.accuracy
        ax.errorbar(x, y, _interval(result), fmt="*", color=INK, markersize=11, label=label)
    ax.set(xscale="log", xlabel="trained parameters", ylabel="validation accuracy, %")
    ax.set_title(describe(runs), fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    plt.show()


def draw_scaling_and_rate(runs: list[dict]) -> None:
    """Draw accuracy by scaling α / r and learning rate, mean and standard deviation of the seeds.

    Left on the held-out phrases, where settings are chosen, right on the validation sentences.

    Args:
        runs: the runs of the sweep.
    """
    scalings = set()
    rates = set()
    for run in runs:
        settings = run["settings"]
        varied = {"scaling": settings["scaling"], "learning_rate": settings["learning_rate"]}
        if settings == DEFAULT | varied:
            scalings.add(settings["scaling"])
            rates.add(settings["learning_rate"])
    scalings = sorted(scalings)
    rates = sorted(rates)

    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.7))
    for ax, where in ((left, "held-out"), (right, "validation")):
        grid = []
        texts = []
        for scaling in scalings:
            groups = [select(runs, scaling=scaling, learning_rate=rate) for rate in rates]
            grid.append([mean_accuracy(group, where) for group in groups])
            texts.append([_mean_and_deviation(accuracies(group, where)) for group in groups])
        lowest = min(min(row) for row in grid)
        _draw_heat_map(ax, grid, texts, dark_above=0.5, vmin=lowest - 2)
        rate_labels = [f"{rate:g}" for rate in rates]
        scaling_labels = [f"{scaling:g}" for scaling in scalings]
        ax.set(xticks=range(len(rates)), xticklabels=rate_labels, xlabel="learning rate")
        ax.set(yticks=range(len(scalings)), yticklabels=scaling_labels, ylabel="α / r")
        ax.set_title(f"{where}, %", fontsize=10)
    fig.suptitle(describe(runs), fontsize=10)
    plt.show()


def _mean_and_deviation(values):
    """Write the mean of some values, and below it their standard deviation if there are several."""
    mean = f"{statistics.fmean(values):.1f}"
    if len(values) == 1:
        return mean
    return f"{mean}\n±{statistics.stdev(values):.1f}"


def draw_targets(runs: list[dict]) -> None:
    """Draw validation accuracy by the layers that are adapted.

    On the right stands McNemar's p against the default for each seed.

    Args:
        runs: the runs of the sweep.
    """
    groups = {}  # {label: runs}
    for run in runs:
        targets = run["settings"]["targets"]
        if run["settings"] == DEFAULT | {"targets": targets}:
            names = targets if isinstance(targets, str) else ", ".join(targets)
            label = f"{names}\n{run['trained_parameters']:,}"
            groups.setdefault(label, []).append(run)
    labels = sorted(groups, key=lambda label: groups[label][0]["trained_parameters"])

    _, ax = plt.subplots(figsize=(8, 2.8))
    right_of_the_axes = {"transform": ax.get_yaxis_transform(), "va": "center", "fontsize": 8}
    ax.text(1.01, -0.75, "McNemar's p by seed", **right_of_the_axes)
    for row, label in enumerate(labels):
        group = groups[label]
        ax.plot(accuracies(group), [row] * len(group), "o", color=LORA, markersize=5, alpha=0.45)
        ax.plot(mean_accuracy(group), row, "o", color=LORA, markersize=9, markeredgecolor="white")
        if group[0]["settings"] == DEFAULT:
            text = "the default"
        else:
            text = ", ".join(f"{test.p:.2g}" for test in compare_seeds(group, select(runs)))
        ax.text(1.01, row, text, **right_of_the_axes)
    ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    ax.set(xlabel="validation accuracy, %")
    ax.set_title(f"rank {DEFAULT['rank']}; {describe(runs)}", fontsize=10)
    ax.grid(axis="x", alpha=0.3)
    plt.show()


# --------------------------------------------------------------------------------------------------
# Rounding
# --------------------------------------------------------------------------------------------------


def draw_staircase(bits: int) -> None:
    """Draw what `quantize` makes of 400 numbers from -1 to 1: its levels, and each rounded number."""
    x = torch.linspace(-1, 1, 400)[None]  # (1, 400): one row, so one scale
    rounded = dequantize(*quantize(x, bits))[0]
    levels = rounded.unique()
    _, (line, stairs) = plt.subplots(1, 2, figsize=(7.5, 2.9), width_ratios=[1, 1.3])
    line.plot(levels, torch.zeros_like(levels), "|", color=QLORA, markersize=26, markeredgewidth=1.5)
    line.axhline(0, color=UNTOUCHED, linewidth=0.8, zorder=0)
    line.set(yticks=[], xlim=(-1.1, 1.1), xlabel="x", title=f"{bits} bits: {len(levels)} levels")
    line.spines["left"].set_visible(False)
    stairs.plot(x[0], x[0], "--", color=UNTOUCHED, linewidth=1, label="x itself")
    stairs.plot(x[0], rounded, color=QLORA, label="x rounded")
    stairs.set(xlabel="x", ylabel="s (q + ½)", xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    stairs.legend(frameon=False)
    plt.show()


def draw_rounding_errors(
    weight: torch.Tensor, curves: dict[str, list[float]], nf4: float, int8: float, title: str
) -> None:
    """Draw the histogram of a weight matrix, and the relative error of rounding it against the bits.

    Args:
        weight: the matrix.
        curves: {what shares one scale: the relative error at 2, 3, ... 8 bits}, three of them.
        nf4, int8: the relative errors of the two codes for frozen weights.
        title: what stands above both panels.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3))
    largest = weight.abs().max().item()
    left.hist(weight.flatten().tolist(), bins=120, color=UNTOUCHED)
    left.set(xlabel="weight", ylabel="how many", xlim=(-largest, largest))
    styles = (":", "--", "-")
    for (label, errors), style in zip(curves.items(), styles, strict=True):
        right.plot(range(2, 9), errors, style, marker=".", color=INK, label=label)
    right.plot(4, nf4, "*", color=QBASE, markersize=12, label="NF4 (4.127 bits with its scales)")
    right.plot(8, int8, "P", color=QBASE, markersize=8, label="int8, one scale per row")
    right.set(yscale="log", xlabel="bits", ylabel="relative error")
    right.legend(frameon=False, fontsize=8)
    fig.suptitle(title, fontsize=10)
    plt.show()


def draw_rounded(weight: torch.Tensor, bits: int) -> None:
    """Draw a weight matrix before and after rounding with one scale per row.

    Left: the histograms of all weights. Right: 40 weights of the first row.

    Args:
        weight: the matrix, float32 on the CPU.
        bits: 2 to 8.
    """
    rounded = dequantize(*quantize(weight, bits))
    error = ((rounded - weight).norm() / weight.norm()).item()
    _, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.6))
    span = 3 * weight.std().item()
    bins = {"bins": 200, "range": (-span, span)}
    left.hist(weight.flatten().tolist(), color=UNTOUCHED, label="as it is", **bins)
    left.hist(rounded.flatten().tolist(), color=QLORA, alpha=0.6, label="rounded", **bins)
    left.set(xlabel="weight", ylabel="how many", title=f"{bits} bits: relative error {error:.3f}")
    left.legend(frameon=False, fontsize=8)
    right.plot(weight[0, :40], drawstyle="steps-mid", color=UNTOUCHED)
    right.plot(rounded[0, :40], drawstyle="steps-mid", color=QLORA, linewidth=1)
    right.set(xlabel="the first 40 weights of the first row", ylabel="weight")
    plt.show()


def draw_adapter(layer: QuantizedLoRALayer, A_at_start: torch.Tensor, bits: int, title: str) -> None:
    """Draw A before and after training, and how often B uses each of its integers.

    Args:
        layer: a trained `QuantizedLoRALayer` that is not packed.
        A_at_start: its A before training.
        bits: its bits.
        title: what stands above both panels.
    """
    A = layer.lora_A.detach()
    q, _ = quantize(layer.lora_B.detach().T.cpu(), bits)  # (rank, out): one scale per rank
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
    span = A.abs().max().item()
    bins = {"bins": 60, "range": (-span, span)}
    left.hist(A_at_start.flatten().tolist(), color=UNTOUCHED, alpha=0.6, label="at the start", **bins)
    left.hist(A.flatten().tolist(), color=QLORA, alpha=0.6, label="trained", **bins)
    left.set(xlabel="numbers of A (float32 masters)", ylabel="how many")
    left.legend(frameon=False, fontsize=8)
    integers = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    counts = [(q == integer).sum().item() for integer in integers]
    right.bar(integers, counts, color=QLORA)
    every = max(1, len(integers) // 8)  # at most eight numbers at the axis
    right.set(xlabel=f"integers of B, trained ({bits} bits)", ylabel="how many", xticks=integers[::every])
    fig.suptitle(title, fontsize=10)
    plt.show()


# How A and B can be rounded after training: name in the results, label, colour, marker, style of the line.
_WAYS_OF_ROUNDING = [
    ("absmax", "to the largest", UNTOUCHED, "s", ":"),
    ("half steps", "half steps", INK, "x", ":"),
    ("together", "A and B together", INK, "D", "--"),
]


def draw_bits(runs: list[dict], own: tuple[int, Evaluation] | None = None, label: str = "your run") -> None:
    """Draw validation accuracy against the bits of A and B.

    Drawn are training through the rounding and three ways of rounding afterwards.

    Args:
        runs: the runs of the sweep.
        own: (bits, `Evaluation`) of one more run, drawn as a star. Other bits than 8, 4, 3 or 2 are left out.
        label: what the legend calls that run.
    """
    widths = [8, 4, 3, 2]
    plain = select(runs)
    fig, ax = plt.subplots(figsize=(8, 4))

    through = [accuracies(select(runs, method="qlora", bits=bits)) for bits in widths]
    _draw_curve(ax, -0.135, through, QLORA, "^", "-", "trained through")
    shift = -0.045  # beside each other, so that no curve hides another
    for way, name, colour, marker, line in _WAYS_OF_ROUNDING:
        after = [accuracies(round_after_training(plain, way, bits)) for bits in widths]
        _draw_curve(ax, shift, after, colour, marker, line, f"afterwards, {name}")
        shift += 0.09

    values = accuracies(plain)
    ax.axhspan(min(values), max(values), color=LORA, alpha=0.2, label="LoRA, not quantised")
    if own is not None and own[0] in widths:
        bits, result = own
        ax.plot(widths.index(bits) - 0.3, 100 * result.accuracy, "*", color=INK, markersize=11, label=label)
    ax.set(xticks=range(len(widths)), xticklabels=widths)
    ax.set(xlabel="bits of A and B", ylabel="validation accuracy, %")
    rank = DEFAULT["rank"]
    ax.set_title(f"rank {rank}; {describe(runs)}", fontsize=10)
    fig.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    plt.show()


def _draw_curve(ax, shift, groups, colour, marker, line, label):
    """Draw one group of values per column: values as small marks, means as a line of large ones."""
    columns = []
    means = []
    for column, values in enumerate(groups):
        x = column + shift
        ax.plot([x] * len(values), values, marker, color=colour, markersize=3.5, alpha=0.45)
        columns.append(x)
        means.append(statistics.fmean(values))
    ax.plot(columns, means, marker + line, color=colour, label=label)


def draw_budgets(runs: list[dict], budgets: Sequence[int] = (16, 64)) -> None:
    """Draw validation accuracy where the same bytes are spent on ranks or on bits, one panel per budget.

    Args:
        runs: the runs of the sweep.
        budgets: each a product of rank and bits.
    """
    fig, axes = plt.subplots(1, len(budgets), figsize=(8.5, 3), sharey=True, squeeze=False)
    for ax, budget in zip(axes[0], budgets, strict=True):
        ways = _ways_to_spend(runs, budget)
        for column, (_, bits, group) in enumerate(ways):
            values = accuracies(group)
            colour = LORA if bits == 16 else QLORA
            _draw_seeds(ax, column, values, colour)
            _write_below(ax, column, min(values), f"{group[0]['bytes']:,} B")
        labels = [f"rank {rank}\n{bits} bits" for rank, bits, _ in ways]
        ax.set(xticks=range(len(ways)), xticklabels=labels, xlim=(-0.6, len(ways) - 0.4))
        ax.set_title(f"rank · bits = {budget}", fontsize=10)
        ax.margins(y=0.25)
    axes[0, 0].set_ylabel("validation accuracy, %")
    fig.suptitle(describe(runs), fontsize=10)
    plt.show()


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


# --------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------

# The parts of a bar: label, the ledger's rows in it, colour, hatching.
_PARTS_OF_A_LEDGER = [
    ("frozen weights", ("frozen weights", "position ids"), "#bbbbbb", ""),
    ("8-bit copy for backward", ("frozen weights, for backward",), "#bbbbbb", "//"),
    ("embeddings", ("embeddings",), "#777777", ""),
    ("scales and code tables", ("scales and code tables",), QBASE, ""),
    ("A, B and head", ("A and B", "head"), QLORA, "//"),
    ("gradients and optimiser", ("gradients", "optimizer states"), HEAD_ONLY, ".."),
    ("saved for backward", ("saved for backward",), "#56b4e9", "xx"),
]


def draw_ledgers(ledgers: dict, title: str) -> None:
    """Draw what is held in training as one bar per model, in megabytes.

    Args:
        ledgers: {label: `Ledger`}, from above.
        title: what stands above the figure.
    """
    _, ax = plt.subplots(figsize=(8.5, 2.9))
    largest = 0
    for row, ledger in enumerate(ledgers.values()):
        left = 0
        for label, what, colour, hatch in _PARTS_OF_A_LEDGER:
            width = ledger.total_bytes(*what) / 1e6
            name = label if row == 0 else None  # one entry in the legend is enough
            ax.barh(row, width, left=left, color=colour, hatch=hatch, edgecolor="white", label=name)
            left += width
        ax.text(left, row, f" {left:.1f} MB", va="center")
        largest = max(largest, left)
    ax.set(yticks=range(len(ledgers)), yticklabels=list(ledgers), ylim=(len(ledgers) - 0.4, -0.6))
    ax.set(xlabel="megabytes held in training", xlim=(0, 1.15 * largest))
    ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.45, -0.25))
    ax.set_title(title, fontsize=10)
    plt.show()


def draw_merging(curves: dict[str, list[tuple]], trained_share: float, title: str) -> None:
    """Draw what becomes of an update that is merged into a quantised base, against the size of the update.

    Left: how much of the update arrives. Right: the relative error of the sum of weight and update.

    Args:
        curves: {way of merging: [(size, share, error)]}, two of them, all numbers from 0 to 1.
            size: the norm of the update over the norm of the weight.
            share: how much of the update arrives.
            error: the relative error of the sum.
        trained_share: the size of the update as it was trained.
        title: what stands above both panels.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.9))
    styles = ((LORA, "o-"), (QBASE, "s--"))
    for (way, points), (colour, style) in zip(curves.items(), styles, strict=True):
        sizes = [100 * size for size, _, _ in points]
        arrived = [100 * share for _, share, _ in points]
        errors = [100 * error for _, _, error in points]
        left.plot(sizes, arrived, style, color=colour, label=way)
        right.plot(sizes, errors, style, color=colour, label=way)
    ticks = [1, 2, 5, 10, 20, 40]
    for ax in (left, right):
        ax.axvline(100 * trained_share, color=UNTOUCHED, linewidth=1, label="the update as trained")
        ax.set(xscale="log", xlabel="size of the update, % of the weight's norm", ylim=(0, None))
        ax.set(xticks=ticks, xticklabels=ticks)
    left.set_ylabel("of it arrives, %")
    right.set_ylabel("error of the sum,\n% of its norm")
    right.legend(frameon=False, fontsize=8, loc="lower left")
    fig.suptitle(title, fontsize=10)
    plt.show()


# The methods of `draw_whole`: name in `methods`, text, colour, in which panels, where the text stands.
_METHODS_IN_WHOLE = [
    ("head only", "head only", HEAD_ONLY, ("ships", "holds"), "beside"),
    ("LoRA", "LoRA", LORA, ("ships", "holds"), "beside, lower"),
    ("q-LoRA, 8 bits", "8 bits", QLORA, ("ships",), "below"),
    ("q-LoRA, 4 bits", "4", QLORA, ("ships",), "below"),  # there is no room for "4 bits"
    ("q-LoRA, 2 bits", "2 bits", QLORA, ("ships",), "below"),
    ("q-LoRA, 4 bits, int8 base", "int8 base", QBASE, ("holds",), "below"),
    ("q-LoRA, 4 bits, NF4 base", "NF4 base", QBASE, ("holds",), "below"),
    ("full fine-tuning", "full fine-tuning", FULL, ("ships", "holds"), "beside, higher"),
]


def draw_whole(
    runs: list[dict],
    own: Sequence[tuple[int, int, Evaluation]] = (),
    label: str = "your runs",
) -> None:
    """Draw validation accuracy against bytes, for the methods of both lessons.

    Left: the bytes that are shipped, A, B and head.
    Right: the bytes that the whole model holds when it predicts.

    Args:
        runs: the runs of the sweep.
        own: (bytes shipped, bytes held, `Evaluation`) of each of some more runs, drawn as stars.
        label: what the legend calls them.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
    groups = methods(runs)
    head = head_bytes(runs)
    for name, text, colour, panels, place in _METHODS_IN_WHOLE:
        group = groups[name]
        if "ships" in panels:
            _draw_method(left, (group[0]["bytes"] + head) / 1e6, accuracies(group), colour, text, place)
        if "holds" in panels:
            _draw_method(right, group[0]["held"] / 1e6, accuracies(group), colour, text, place)
    for ships, holds, result in own:
        accuracy = 100 * result.accuracy
        left.plot(ships / 1e6, accuracy, "*", color=INK, markersize=10)
        right.plot(holds / 1e6, accuracy, "*", color=INK, markersize=10, label=label)
        label = None  # one entry in the legend is enough
    if own:
        right.legend(frameon=False, fontsize=8, loc="lower left")
    left.set(xscale="log", xlabel="megabytes to ship: A, B and head", ylabel="validation accuracy, %")
    right.set(xlim=(0, None), xlabel="megabytes held: the whole model, ready to predict")
    left.margins(y=0.08)
    fig.suptitle(describe(runs), fontsize=10)
    plt.show()


def _draw_method(ax, megabytes, values, colour, text, place):
    """Draw the seeds of one method, and write its name below the lowest mark or beside the mean."""
    _draw_seeds(ax, megabytes, values, colour)
    style = {"textcoords": "offset points", "va": "center", "fontsize": 8}
    mean = statistics.fmean(values)
    if place == "below":
        ax.annotate(text, (megabytes, min(values)), (0, -14), ha="center", **style)
    elif megabytes <= 50:
        ax.annotate(text, (megabytes, mean), (9, 0), ha="left", **style)
    else:  # near the right end, where several methods lie close together
        up = {"beside": 0, "beside, lower": -7, "beside, higher": 7}[place]
        ax.annotate(text, (megabytes, mean), (-9, up), ha="right", **style)
