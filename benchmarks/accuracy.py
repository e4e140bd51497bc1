"""Accuracy on SST-2 after training: one run a seed, one JSON line a run.

    python benchmarks/accuracy.py --data folder --targets query value --seeds 0 1 2

trains on all training phrases and evaluates on the 872 validation sentences. With --held-out it evaluates on 2,000
whole training sentences instead, and trains on what is left without them and without any phrase of theirs: settings
are chosen there, never on the 872. With --both it holds out 2,000 training phrases, those of some two hundred whole
sentences, trains on all others, and evaluates on the 872 and on the 2,000, one line each.
With --method qlora A and B are quantised, and with --base-bits the frozen weights too. With --method head the head
alone is trained to its end (`lora_lab/baseline.py`). Nothing is drawn then, so one seed is enough: --seeds 0.
Each line holds seed, settings, commit and the label given to every sentence.
`--summary` prints the lines of a results file, one row a setting, and draws them; quantised runs as differences from
unquantised LoRA under the same seed, with the 95 % interval of their mean.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import lora_utils  # noqa: E402  (the project is a folder, not a package)
from lora_lab import baseline, training  # noqa: E402
from lora_lab.compare import HEAD_METHODS  # noqa: E402
from lora_lab.sources import find_model, load_sst2  # noqa: E402

HELD_OUT = 2_000
FEATURES_OF = {method: features for features, method in HEAD_METHODS.items()}  # of the head alone
SETTINGS = {
    *("method", "rank", "alpha", "dropout", "backbone_dropout", "targets"),
    *("learning_rate", "epochs", "batch_size", "warmup", "bits", "base_bits"),
}


def hold_out(train, sentences=HELD_OUT, phrases=None, seed=0):
    """Split training phrases: (the rest, whole sentences of which no phrase is left in the rest).

    A whole sentence is a phrase that is part of no other. SST-2's training phrases are parts of its training
    sentences, so phrases drawn at random would have been seen, in other cuts, in training.
    With `phrases`, as many sentences are drawn as make that many phrases, and the phrases are held out, not the
    sentences alone: then almost all of the training set is left.
    """
    words = [tuple(sentence.split()) for sentence in train["sentence"]]
    longest_first = sorted(range(len(words)), key=lambda i: -len(words[i]))
    parts, whole = set(), []
    for i in longest_first:
        if words[i] not in parts:
            whole.append(i)
            parts.update(parts_of(words[i]))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    copies, seen, number = Counter(words), set(), 0
    for drawn, i in enumerate(order):
        if number >= phrases if phrases else drawn == sentences:
            break
        new = parts_of(words[whole[i]]) - seen
        seen |= new
        number += sum(copies[part] for part in new)
    held_out = [i for i in range(len(words)) if words[i] in seen] if phrases else [whole[i] for i in order[:drawn]]
    rest = [i for i in range(len(words)) if words[i] not in seen]
    return train.select(rest), train.select(held_out[: phrases or sentences])


def parts_of(words):
    return {words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def build_model(args, seed):
    """The model to train, its new weights drawn under the seed. A method is a choice of what is trained."""
    checkpoint = find_model(args.model, announce=False)
    options = {"rank": args.rank, "alpha": args.alpha, "dropout": args.dropout, "target_modules": args.targets}
    options["folder"] = checkpoint.folder
    torch.manual_seed(seed)
    if args.method == "qlora":
        model = lora_utils.qLoRABertModel(checkpoint.name, bits=args.bits, base_bits=args.base_bits, **options)
    else:
        model = lora_utils.LoRABertModel(checkpoint.name, **options)
    if args.method.startswith("head"):  # A and B stay as they start, which is the model without them
        for layer in model.lora_layers().values():
            layer.requires_grad_(False)
    if args.backbone_dropout:
        of_lora = [layer.dropout for layer in model.lora_layers().values()]
        for module in model.model.bert.modules():
            if isinstance(module, torch.nn.Dropout) and module not in of_lora:
                module.p = args.backbone_dropout
    return model


def train(model, loader, epochs, learning_rate, warmup):
    """Train as the notebooks do, but without checkpoints. Return the mean loss of the last hundred steps."""
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    options = {"epochs": epochs, "warmup": warmup, "checkpoint_every": None}
    with torch.random.fork_rng():  # dropout goes on from the caller's seed, not from the run's
        run = training.new_run("benchmark", model, loader, accelerator, learning_rate, **options)
    training.train(run, progress=False)
    return statistics.fmean(run.losses[-100:])


def load_adapter(model_class, folder, dtype=None):
    """Load an adapter that `--adapters` saved. Return the model and its tokenizer."""
    config = json.loads((Path(folder) / model_class.FILES[0]).read_text(encoding="utf-8"))
    base = find_model(config["base_model_name_or_path"], announce=False)
    model = model_class.from_pretrained(folder, dtype=dtype, folder=base.folder)
    return model, AutoTokenizer.from_pretrained(base.folder)


def split(args, data):
    """(what to train on, {its name: what to evaluate on})."""
    if args.held_out:
        rest, held_out = hold_out(data["train"])
        return rest, {"held-out training sentences": held_out}
    if args.both:
        rest, held_out = hold_out(data["train"], phrases=HELD_OUT)
        return rest, {"validation": data["validation"], "held-out training phrases": held_out}
    return data["train"], {"validation": data["validation"]}


def run(args, train_split, tests, seed):
    """Train once and evaluate; yields what becomes a JSON line for each set of sentences."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(args.model, announce=False).folder)
    model = build_model(args, seed)
    for module in model.modules():
        if isinstance(module, lora_utils.QuantizedLinear):
            module.int8_arithmetic = args.int8_arithmetic
    loader = lora_utils.make_loader(train_split, tokenizer, args.batch_size, shuffle=True, seed=seed)
    settings = {key: value for key, value in vars(args).items() if key in SETTINGS}
    start = time.perf_counter()
    if args.method in FEATURES_OF:
        settings = dict.fromkeys(settings) | {"method": args.method}  # the others do not apply
        head, loss = baseline.train_head(model, loader, FEATURES_OF[args.method]), None
        evaluate = functools.partial(baseline.evaluate_head, head=head, features=FEATURES_OF[args.method])
    else:
        loss = round(train(model, loader, args.epochs, args.learning_rate, args.warmup), 4)
        evaluate = lora_utils.evaluate
    seconds = time.perf_counter() - start
    if args.adapters:
        model.save_pretrained(Path(args.adapters) / str(seed))
    for evaluated_on, test_split in tests.items():
        result = evaluate(model, lora_utils.make_loader(test_split, tokenizer, batch_size=64))
        yield {
            "model": model.model_name,
            "data": train_split.info.dataset_name,
            "evaluated_on": evaluated_on,
            "settings": settings,
            "seed": seed,
            "int8_arithmetic": args.int8_arithmetic,
            "trained_on": len(train_split),
            "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "train_loss": loss,
            "accuracy": result.accuracy,
            "low": result.low,
            "high": result.high,
            "n": result.n,
            "loss": round(result.loss, 4),
            "train_seconds": round(seconds, 1),
            "machine": machine(next(model.model.bert.parameters()).dtype),
            "predictions": "".join(map(str, result.predictions)),
        }


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def machine(frozen_dtype):
    """The machine class and the versions that made a number."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {
        "device": device,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "frozen_dtype": str(frozen_dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def name_of(settings):
    """What a run trained, in words."""
    if settings["method"] in FEATURES_OF:
        return "head alone, " + FEATURES_OF[settings["method"]].replace("pooled", "pooled output")
    targets = settings["targets"] if isinstance(settings["targets"], str) else " and ".join(settings["targets"])
    if settings["method"] == "qlora":
        base = f", base in {settings['base_bits']} bits" if settings["base_bits"] else ""
        return f"q-LoRA, {settings['bits']} bits{base}, {targets}, rank {settings['rank']}"
    return f"LoRA, {targets}, rank {settings['rank']}"


def summarise(file):
    """Print one row a setting: mean accuracy over the seeds, and each seed's. Draw the results file.

    Quantised runs are compared with unquantised LoRA under the same seed; without any, the runs on the validation
    sentences are drawn as they are.
    """
    lines = list(map(json.loads, Path(file).read_text(encoding="utf-8").splitlines()))
    groups = {}
    for line in lines:
        settings = {"bits": None, "base_bits": None} | line["settings"]
        groups.setdefault((line["evaluated_on"], json.dumps(settings, sort_keys=True)), []).append(line)
    drawn = []
    for (where, settings), group in sorted(groups.items()):
        s, scores = json.loads(settings), [100 * line["accuracy"] for line in group]
        knobs = ("alpha", "dropout", "backbone_dropout", "learning_rate", "epochs", "batch_size")
        rest = ", ".join(f"{key} {s[key]:g}" for key in knobs if s[key] is not None)
        print(f"{where}: {name_of(s)} ({group[0]['trained_parameters']:,} trained; {rest or 'until it has converged'})")
        print(f"    mean {statistics.fmean(scores):.2f}, seeds {' '.join(f'{score:.2f}' for score in scores)}")
        if where == "validation":
            drawn.append((f"{name_of(s)}\n{group[0]['trained_parameters']:,} trained", scores, s["method"]))
    if any(line["settings"]["method"] == "qlora" for line in lines):
        draw_differences(paired_differences(lines), lines[0], Path(file).with_suffix(".png"))
    elif drawn:
        draw(sorted(drawn, key=lambda row: statistics.fmean(row[1])), lines[0], Path(file).with_suffix(".png"))


def paired_differences(lines):
    """{(evaluated_on, bits, base_bits): {seed: points of accuracy above unquantised LoRA under the same seed}}."""
    float_lora = {(x["evaluated_on"], x["seed"]): x for x in lines if x["settings"]["method"] == "lora"}
    differences = {}
    for line in lines:
        s, pair = line["settings"], float_lora.get((line["evaluated_on"], line["seed"]))
        if s["method"] == "qlora" and pair:
            assert all(s[key] == pair["settings"][key] for key in SETTINGS - {"method", "bits", "base_bits"})
            seeds = differences.setdefault((line["evaluated_on"], s["bits"], s["base_bits"]), {})
            seeds[line["seed"]] = 100 * (line["accuracy"] - pair["accuracy"])
    return dict(sorted(differences.items(), key=lambda item: (item[0][0], item[0][2] or 99, item[0][1]), reverse=True))


def interval(values):
    """(mean, low, high): the 95 % interval of a mean of few values, by Student's t."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return mean, mean - half, mean + half


def draw_differences(differences, line, file):
    """A panel for each set of sentences, a row for each setting: each seed's difference, their mean and interval."""
    import matplotlib.pyplot as plt

    plt.rc("figure.constrained_layout", use=True)
    sets = sorted({where for where, *_ in differences}, reverse=True)
    fig, axes = plt.subplots(1, len(sets), figsize=(8.5, 3.4), sharex=True, sharey=True, squeeze=False)
    intervals = []
    for ax, where in zip(axes[0], sets):
        rows = {key[1:]: list(seeds.values()) for key, seeds in differences.items() if key[0] == where}
        labels = [f"{bits} bits" + (f", base in {base_bits}" if base_bits else "") for bits, base_bits in rows]
        for y, ((bits, base_bits), values) in enumerate(rows.items()):
            mean, low, high = interval(values)
            intervals.append((mean, low, high))
            colour, marker = ("#009e73", "s") if base_bits else ("#d55e00", "o")
            print(f"{where}: A and B in {bits} bits, base {base_bits}: {mean:+.2f} points ({low:+.2f} to {high:+.2f})")
            ax.plot(values, [y] * len(values), marker, color=colour, alpha=0.5, markersize=5)
            ax.errorbar(mean, y - 0.22, xerr=[[mean - low], [high - mean]], fmt=marker, color=colour, capsize=3)
        ax.axvline(0, color="#0072b2", linewidth=1)
        ax.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.6, -0.6), title=where)
        ax.set_xlabel("difference from LoRA, points (95 % interval)")
        ax.grid(axis="x", alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    count = max(map(len, differences.values()))
    means = [mean for mean, _, _ in intervals]
    clear = sum(not low <= 0 <= high for _, low, high in intervals)
    title = f"Mean differences: {min(means):+.2f} to {max(means):+.2f} points; {clear} of {len(means)} intervals"
    title += " exclude 0"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    source = f"{line['model']}, {line['data']}, rank {line['settings']['rank']}, {count} paired seeds"
    fig.supxlabel(source, x=0.99, ha="right", fontsize=8.5, color="#555555")
    fig.savefig(file, dpi=192)


def draw(rows, line, file):
    """One row a method, one mark a seed."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7.5, 0.6 + 0.55 * len(rows)), dpi=192, layout="constrained")
    for y, (_, scores, method) in enumerate(rows):
        colour, marker = ("#0072b2", "o") if method == "lora" else ("#e69f00", "D")
        mean = statistics.fmean(scores)
        ax.plot(scores, [y] * len(scores), marker, color=colour, alpha=0.6, markersize=6)
        ax.plot([mean] * 2, [y - 0.25, y + 0.25], color=colour)
        ax.text(mean, y + 0.28, f"{mean:.1f}", ha="center", va="bottom", fontsize=9)
    ax.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], ylim=(-0.5, len(rows) - 0.3))
    label, scores, _ = max(rows, key=lambda row: statistics.fmean(row[1]))
    title = f"The highest mean: {label.partition(chr(10))[0]}, {statistics.fmean(scores):.1f} %"
    fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    ax.set_xlabel(f"accuracy on the 872 validation sentences, %, by seed and mean\n{line['model']}, {line['data']}")
    ax.grid(axis="x", alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--method", choices=["lora", "qlora", *FEATURES_OF], default="lora")
    parser.add_argument("--bits", type=int, help="of A and B, with --method qlora")
    parser.add_argument("--base-bits", type=int, help="of the frozen weights, with --method qlora")
    parser.add_argument("--int8-arithmetic", choices=["onednn", "fbgemm"], help="else the exact products")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--backbone-dropout", type=float, default=0.0, help="dropout in the frozen weights' layers")
    parser.add_argument("--targets", nargs="+", default=["query", "value"])
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--phrases", type=int, help="train on that many of the phrases, drawn under seed 0")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--warmup", type=float, default=0.06, help="share of the steps with a rising learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", action="store_true", help="evaluate on held-out training sentences")
    parser.add_argument("--both", action="store_true", help="evaluate on validation and on held-out training phrases")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "accuracy.jsonl"))
    parser.add_argument("--adapters", help="a folder to save what was trained into, by seed")
    parser.add_argument("--summary", action="store_true", help="print the results file and run nothing")
    args = parser.parse_args()
    if args.targets == ["all-linear"]:
        args.targets = "all-linear"
    if args.summary:
        return summarise(args.out)
    train_split, tests = split(args, load_sst2(args.data))
    if args.phrases:
        train_split = train_split.shuffle(seed=0).select(range(args.phrases))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    at_commit = commit()
    for seed in args.seeds:
        for line in run(args, train_split, tests, seed):
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line | {"commit": at_commit}) + "\n")
            print(json.dumps({key: value for key, value in line.items() if key != "predictions"}), flush=True)


if __name__ == "__main__":
    main()
