"""The runs that both notebooks draw: each setting under several seeds, one JSON line a run.

    python benchmarks/sweep.py --data folder                     all parts, three seeds; an hour or two on two cores
    python benchmarks/sweep.py --data folder --parts rank bits   these parts alone

A run trains on 6,000 phrases for one epoch, the preset of the notebooks, drawn under the seed from the training phrases
that are not held out, and is evaluated on the 872 validation sentences and on the 2,000 held-out training phrases
(`accuracy.py`, `hold_out`): settings are chosen on these, never on the 872. The head alone is trained to its end
(`lora_lab/baseline.py`). Every line holds seed, settings, commit, machine and the label given to every sentence. What
the results file holds already is not run again, so the sweep goes on where it was stopped; runs of one setting that
belong to several parts are run once. --summary prints the means.
"""

import argparse
import concurrent.futures
import copy
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accuracy import FEATURES_OF, HELD_OUT, ROOT, build_model, commit, hold_out, machine, train
from transformers import AutoTokenizer, BertForSequenceClassification

sys.path.insert(0, str(ROOT))

import lora_utils
from lora_lab.baseline import evaluate_head, train_head
from lora_lab.compare import DEFAULT, HEAD_ALONE, HEAD_METHODS, read_runs
from lora_lab.ledger import memory_ledger
from lora_lab.rounding import WAYS, round_adapter
from lora_lab.sources import find_model, load_sst2

HEAD = [HEAD_ALONE | {"method": method} for method in HEAD_METHODS.values()]
QUANTISED = {"method": "qlora", "bits": 4}
# The default's learning rate is the best of its row in "scaling" on the held-out phrases.
PARTS = {
    "rank": HEAD + [{"rank": rank} for rank in (1, 2, 4, 8, 16, 64)],
    "bits": [{}] + [QUANTISED | {"bits": bits} for bits in (8, 4, 3, 2)],
    "base": [{}] + [QUANTISED | {"base_bits": base_bits} for base_bits in (None, 8, 4)],
    "full": [{"method": "full", "rank": None, "scaling": None, "learning_rate": rate} for rate in (1e-4, 3e-4)],
    "bytes": [{"rank": 1}, {"rank": 4}]
    + [QUANTISED | {"rank": rank, "bits": bits} for rank, bits in ((2, 8), (4, 4), (8, 2), (8, 8), (16, 4), (32, 2))],
    "targets": [
        {"targets": targets}
        for targets in (["query"], ["value"], ["query", "value"], ["query", "key", "value"], "all-linear")
    ],
    "scaling": [
        {"scaling": scaling, "learning_rate": rate} for scaling in (0.5, 2.0, 8.0) for rate in (5e-4, 2e-3, 8e-3)
    ],
}


@functools.cache
def data_of(data):
    """(phrases to train on, what to evaluate on), by the argument of `load_sst2`."""
    splits = load_sst2(data)
    few = min(HELD_OUT, len(splits["train"]) // 10)
    rest, held_out = hold_out(splits["train"], phrases=few)
    return rest, {"validation": splits["validation"], "held-out": held_out}


def measured(model, loaders, evaluate=lora_utils.evaluate):
    """{what it was evaluated on: accuracy, loss, and for every sentence its label and whether that is right}."""
    results = {}
    for name, loader in loaders.items():
        result = evaluate(model, loader)
        truth = [row["labels"] for row in loader.dataset]
        right = "".join(str(int(a == b)) for a, b in zip(result.predictions, truth, strict=True))
        labels = "".join(map(str, result.predictions))
        results[name] = {"accuracy": result.accuracy, "n": result.n, "loss": round(result.loss, 4)}
        results[name] |= {"labels": labels, "right": right}
    return results


def run(settings, seed, model, data, phrases, threads):
    """Train and evaluate one setting under one seed: a line of the results file, without the commit."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    train_split, tests = data_of(data)
    train_split = train_split.shuffle(seed=seed)
    train_split = train_split.select(range(min(phrases, len(train_split))))
    features = FEATURES_OF.get(settings["method"])  # None, except for the head alone
    folder = find_model(model, announce=False).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader = lora_utils.make_loader(train_split, tokenizer, batch_size=32, shuffle=True, seed=seed)
    loaders = {name: lora_utils.make_loader(split, tokenizer, batch_size=64) for name, split in tests.items()}
    if settings["method"] == "full":
        torch.manual_seed(seed)
        trained = BertForSequenceClassification.from_pretrained(folder, attn_implementation="eager", num_labels=2)
        start = copy.deepcopy(trained)
    else:
        options = {"dropout": 0.0, "backbone_dropout": 0.0}
        if features:
            options |= {"rank": 1, "alpha": 1.0}  # A and B are frozen at their start, where they change nothing
        else:
            options |= {"alpha": settings["scaling"] * settings["rank"]}
        trained = build_model(SimpleNamespace(model=model, **settings | options), seed)
    began = time.perf_counter()
    if features:
        head, loss = train_head(trained, loader, features), None
        evaluate = functools.partial(evaluate_head, head=head, features=features)
    else:
        loss = round(train(trained, loader, 1, settings["learning_rate"], warmup=0.06), 4)
        evaluate = lora_utils.evaluate
    line = {"settings": settings, "seed": seed, "model": model, "data": train_split.info.dataset_name}
    line |= {"trained_on": len(train_split), "seconds": round(time.perf_counter() - began, 1)}
    line |= {"trained_parameters": sum(p.numel() for p in trained.parameters() if p.requires_grad)}
    line |= {"train_loss": loss, "results": measured(trained, loaders, evaluate)}
    line |= {"machine": machine(next(getattr(trained, "model", trained).bert.parameters()).dtype)}
    line |= bytes_of(trained, settings["method"])
    if settings["method"] == "full":
        line["update"] = low_rank_part(start.to(trained.device), trained, loaders["validation"])
    if settings == DEFAULT:
        line["rounded"] = rounded_afterwards(trained, loaders["validation"])
    if settings in (DEFAULT | {"rank": 1}, DEFAULT | {"rank": 4}):
        line["float16"] = in_float16(trained, loaders["validation"])
    return line


def bytes_of(model, method):
    """bytes: of what was trained, as it is saved, but for the head; held: of the whole model, ready to predict."""
    if method == "full":
        held = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
        return {"bytes": held - sum(p.nbytes for p in model.classifier.parameters()), "held": held}
    if method == "qlora":
        model = copy.deepcopy(model)
        model.pack()
    ledger = memory_ledger(model)
    adapter = ledger.total_bytes("A and B", "scales of A and B")
    if method in FEATURES_OF:
        return {"bytes": 0, "held": ledger.total_bytes() - adapter}
    return {"bytes": adapter, "held": ledger.total_bytes()}


def rounded_afterwards(model, loader):
    """{way: {bits: error, accuracy, labels}} of the trained A and B, rounded when the training is over."""
    ways = {}
    for way, bits in itertools.product(WAYS, (8, 4, 3, 2)):
        copied, error = round_adapter(model, way, bits)
        ways.setdefault(way, {})[bits] = {"error": round(error, 4)} | measured(copied, {"": loader})[""]
    return ways


def in_float16(model, loader):
    """Accuracy and labels with A and B rounded to float16."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for matrix in itertools.chain(*(layer.low_rank() for layer in copied.lora_layers().values())):
            matrix.copy_(matrix.half())
    return measured(copied, {"": loader})[""]


RANKS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384]


@torch.no_grad()
def low_rank_part(start, trained, loader):
    """How near to low rank the update W1 - W0 of full fine-tuning is.

    share: {layer: share of its squared norm that its first 1, 2, 3, ... (RANKS) singular values hold}
    size: {layer: its norm over that of W0}; shape: {layer: (out, in)}
    kept: {rank: accuracy left when the update of every linear layer is cut to that rank; the rest as trained}
    """
    before = dict(start.bert.named_modules())
    layers = {name: m for name, m in trained.bert.named_modules() if isinstance(m, torch.nn.Linear)}
    shares, sizes, factors = {}, {}, {}
    for name, layer in layers.items():
        update = layer.weight - before[name].weight
        U, S, V = torch.linalg.svd(update, full_matrices=False)
        factors[name] = (U, S, V)
        share = S.square().cumsum(0) / S.square().sum()
        shares[name] = [round(share[rank - 1].item(), 4) for rank in RANKS if rank <= len(S)]
        sizes[name] = round((update.norm() / before[name].weight.norm()).item(), 4)
    kept = {}
    for rank in (0, 1, 4, 16, 64):
        for name, (U, S, V) in factors.items():
            layers[name].weight.copy_(before[name].weight + (U[:, :rank] * S[:rank]) @ V[:rank])
        kept[rank] = lora_utils.evaluate(trained, loader).accuracy
    shapes = {name: list(layer.weight.shape) for name, layer in layers.items()}
    return {"ranks": RANKS, "share": shares, "size": sizes, "shape": shapes, "kept": kept}


def key_of(line):
    return json.dumps([line[name] for name in ("settings", "seed", "model", "data", "trained_on")], sort_keys=True)


def read(file):
    return read_runs(file) if Path(file).is_file() else []


def summarise(lines):
    """A row for each setting: the mean of the seeds on the held-out phrases and on the validation sentences."""
    groups = {}
    for line in lines:
        groups.setdefault(json.dumps(line["settings"]), []).append(line)
    for settings, group in groups.items():
        changed = {k: v for k, v in json.loads(settings).items() if v != DEFAULT[k]} or "the default"
        columns = []
        for name in ("held-out", "validation"):
            scores = [100 * line["results"][name]["accuracy"] for line in group]
            columns.append(f"{name} {statistics.fmean(scores):.2f} ({min(scores):.1f} to {max(scores):.1f})")
        print(f"{'   '.join(columns)}   n={len(group)}   {changed}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--phrases", type=int, default=6_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, with one thread each")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "sweep.jsonl"))
    parser.add_argument("--summary", action="store_true", help="print the results file and run nothing")
    args = parser.parse_args()
    if args.summary:
        return summarise(read(args.out))
    rest, _ = data_of(args.data)
    about = {"model": find_model(args.model).name, "data": rest.info.dataset_name}
    about["trained_on"] = min(args.phrases, len(rest))
    done, wanted = set(map(key_of, read(args.out))), {}
    for part, seed in itertools.product(args.parts, args.seeds):
        for varied in PARTS[part]:
            wanted[key_of(about | {"settings": DEFAULT | varied, "seed": seed})] = (DEFAULT | varied, seed)
    missing = [job for key, job in wanted.items() if key not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)
    at_commit = commit()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // args.processes)
    spawn = multiprocessing.get_context("spawn")  # forked, a run could wait for a thread that it has not
    with concurrent.futures.ProcessPoolExecutor(args.processes, spawn) as pool:
        jobs = [pool.submit(run, *job, about["model"], args.data, args.phrases, threads) for job in missing]
        for number, job in enumerate(jobs, 1):  # in their order, so that the seeds of two settings can be paired
            line = job.result() | {"commit": at_commit}
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            accuracy = line["results"]["validation"]["accuracy"]
            print(
                f"{number}/{len(jobs)} {line['seconds']:.0f} s  {accuracy:.1%}  seed {line['seed']}  {line['settings']}"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
