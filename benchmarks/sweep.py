"""Train with each setting under several seeds and evaluate: one JSON line per run. Every accuracy is made here.

    python benchmarks/sweep.py --data folder                     the parts that the notebooks draw, with three seeds
    python benchmarks/sweep.py --data folder --parts rank bits   only these parts

A run trains for one epoch on phrases that are drawn under its seed. 2,000 training phrases are held out, and
settings are chosen on them, never on the 872 validation sentences. `--all-phrases` holds nothing out. The head alone
is trained until it has converged. A line has the settings, seed, machine, commit and the label of every sentence.
Runs that are in the file already are not repeated, so the sweep continues where it was stopped.
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
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from machine import DEVICE, RESULTS, commit, versions
from transformers import AutoTokenizer, BertForSequenceClassification

import lora_utils
from lora_lab import training
from lora_lab.baseline import evaluate_head, train_head
from lora_lab.compare import DEFAULT, HEAD_ALONE, HEAD_METHODS, read_runs
from lora_lab.ledger import memory_ledger
from lora_lab.rounding import WAYS, round_adapter
from lora_lab.sources import find_model, load_sst2

FEATURES_OF = {method: features for features, method in HEAD_METHODS.items()}  # of the head alone
HEAD = {"head alone, pooled output": HEAD_ALONE | {"method": HEAD_METHODS["pooled"]}}
HEAD["head alone, mean of tokens"] = HEAD_ALONE | {"method": HEAD_METHODS["mean of tokens"]}
QUANTISED = {"method": "qlora", "bits": 4}
FULL = {"method": "full", "rank": None, "scaling": None}
# What a run changes in `compare.DEFAULT`, whose learning rate is the best of its row in "scaling" on held-out phrases.
PARTS = {
    "rank": [*HEAD.values(), *({"rank": rank} for rank in (1, 2, 4, 8, 16, 64))],
    "bits": [{}, *(QUANTISED | {"bits": bits} for bits in (8, 4, 3, 2))],
    "base": [{}, *(QUANTISED | {"base_bits": base_bits} for base_bits in (None, 8, 4))],
    "full": [FULL | {"learning_rate": rate} for rate in (1e-4, 3e-4)],
    "bytes": [{"rank": 1}, {"rank": 4}],
    "targets": [{"targets": names.split()} for names in ("query", "value", "query value", "query key value")],
    "scaling": [{"scaling": s, "learning_rate": rate} for s in (0.5, 2.0, 8.0) for rate in (5e-4, 2e-3, 8e-3)],
}
for rank, bits in ((2, 8), (4, 4), (8, 2), (8, 8), (16, 4), (32, 2)):
    PARTS["bytes"].append(QUANTISED | {"rank": rank, "bits": bits})
PARTS["targets"].append({"targets": "all-linear"})

# The long runs, by their names in the tables. Each part has a results file. benchmarks/README.md has the commands.
LONG = {"learning_rate": 1e-3}
ALL = {"targets": "all-linear", "rank": 32, "learning_rate": 5e-4}
INT8 = LONG | {"method": "qlora", "bits": 8, "base_bits": 8}
LONG_PARTS = {
    "all phrases": HEAD | {"LoRA on query and value, rank 8": LONG},
    "five seeds": {"LoRA, not quantised": LONG},
    "integer products": {"exact products": INT8},
}
LONG_PARTS["all phrases"] |= {"LoRA on all linear layers, rank 16": ALL | LONG | {"rank": 16}}
LONG_PARTS["all phrases"] |= {"LoRA on all linear layers, rank 32": ALL}
for bits in (8, 4, 3, 2):
    LONG_PARTS["five seeds"][f"A and B in {bits} bits"] = LONG | QUANTISED | {"bits": bits}
for bits in (8, 4):
    LONG_PARTS["five seeds"][f"A and B in 8 bits, base in {bits}"] = INT8 | {"base_bits": bits}
for name, kernel in {"8 bits with VNNI, oneDNN": "onednn", "7 bits without, FBGEMM": "fbgemm"}.items():
    LONG_PARTS["integer products"][name] = INT8 | {"int8_arithmetic": kernel}


# Data ----------------------------------------------------------------------------------------------


def hold_out(train, number, seed=0):
    """Split training phrases: (the rest, `number` phrases of which no part is left in the rest).

    SST-2's training phrases are parts of its training sentences. Phrases drawn at random would have been seen, in
    other cuts, in training. So we draw whole sentences, which are part of no other, and hold out all their parts.
    """
    words = [tuple(sentence.split()) for sentence in train["sentence"]]
    longest_first = sorted(range(len(words)), key=lambda i: -len(words[i]))
    parts, whole = set(), []
    for i in longest_first:
        if words[i] not in parts:
            whole.append(i)
            parts.update(parts_of(words[i]))
    copies, held, count = Counter(words), set(), 0
    for i in torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)):
        if count >= number:
            break
        new = parts_of(words[whole[i]]) - held
        held |= new
        count += sum(copies[part] for part in new)
    rest = [i for i in range(len(words)) if words[i] not in held]
    held_out = [i for i in range(len(words)) if words[i] in held]
    return train.select(rest), train.select(held_out[:number])


def parts_of(words):
    return {words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


@functools.cache
def data_of(data, all_phrases):
    """Return (phrases to train on, what to evaluate on), by the argument of `load_sst2`."""
    splits = load_sst2(data)
    if all_phrases:
        return splits["train"], {"validation": splits["validation"]}
    rest, held_out = hold_out(splits["train"], min(2_000, len(splits["train"]) // 10))
    return rest, {"validation": splits["validation"], "held-out": held_out}


# A run ---------------------------------------------------------------------------------------------


def build_model(settings, folder, seed):
    """Build the model to train, its new weights drawn under the seed."""
    torch.manual_seed(seed)
    if settings["method"] == "full":
        return BertForSequenceClassification.from_pretrained(folder, attn_implementation="eager", num_labels=2)
    options = {"rank": settings["rank"] or 1, "alpha": (settings["scaling"] or 1.0) * (settings["rank"] or 1)}
    options |= {"target_modules": settings["targets"], "dropout": 0.0}
    if settings["method"] == "qlora":
        options |= {"bits": settings["bits"], "base_bits": settings["base_bits"]}
    model_class = lora_utils.qLoRABertModel if settings["method"] == "qlora" else lora_utils.LoRABertModel
    model = model_class(str(folder), **options)
    for module in model.modules():
        if isinstance(module, lora_utils.QuantizedLinear):
            module.int8_arithmetic = settings.get("int8_arithmetic")  # None: exact products, on every machine
    for layer in model.lora_layers().values() if settings["method"] in FEATURES_OF else ():
        layer.requires_grad_(False)  # A and B stay as they start, where they change nothing
    return model


def train(model, loader, learning_rate, epochs=1):
    """Train as the notebooks do, but without checkpoints. Return the mean loss of the last hundred steps."""
    options = {"epochs": epochs, "checkpoint_every": None}
    with torch.random.fork_rng():  # dropout continues from the caller's seed, not from the run's
        accelerator = Accelerator(cpu=DEVICE.type == "cpu")
        run = training.new_run("benchmark", model, loader, accelerator, learning_rate, **options)
    training.train(run, progress=False)
    return round(statistics.fmean(run.losses[-100:]), 4)


def measured(model, loader, evaluate=lora_utils.evaluate):
    """Evaluate: accuracy, loss, and for every sentence its label and whether that is right."""
    result = evaluate(model, loader)
    truth = [row["labels"] for row in loader.dataset]
    right = "".join(str(int(a == b)) for a, b in zip(result.predictions, truth, strict=True))
    labels = "".join(map(str, result.predictions))
    return {"accuracy": result.accuracy, "n": result.n, "loss": round(result.loss, 4), "labels": labels, "right": right}


def run(settings, seed, args, threads):
    """Train and evaluate one setting under one seed. Return a line of the results file, without the commit."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    phrases, tests = data_of(args.data, args.all_phrases)
    phrases = phrases.shuffle(seed=seed).select(range(min(args.phrases, len(phrases))))
    folder = find_model(args.model, announce=False).folder
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loader = lora_utils.make_loader(phrases, tokenizer, batch_size=32, shuffle=True, seed=seed)
    loaders = {name: lora_utils.make_loader(split, tokenizer, batch_size=64) for name, split in tests.items()}
    model = build_model(settings, folder, seed)
    start = copy.deepcopy(model) if settings["method"] == "full" else None
    features, loss, evaluate = FEATURES_OF.get(settings["method"]), None, lora_utils.evaluate
    began = time.perf_counter()
    if features:
        head = train_head(model, loader, features)
        evaluate = functools.partial(evaluate_head, head=head, features=features)
    else:
        loss = train(model, loader, settings["learning_rate"])
    line = {"settings": settings, "seed": seed, "model": args.model, "data": phrases.info.dataset_name}
    line |= {"trained_on": len(phrases), "seconds": round(time.perf_counter() - began, 1)}
    line |= {"trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad), "train_loss": loss}
    line["results"] = {name: measured(model, test, evaluate) for name, test in loaders.items()}
    line["machine"] = versions(next(getattr(model, "model", model).bert.parameters()).dtype)
    line |= bytes_of(model, settings["method"])
    if start:
        line["update"] = low_rank_part(start.to(model.device), model, loaders["validation"])
    if settings in (DEFAULT, DEFAULT | LONG):
        line["rounded"] = rounded_afterwards(model, loaders["validation"])
    if settings in (DEFAULT | {"rank": 1}, DEFAULT | {"rank": 4}):
        line["float16"] = in_float16(model, loaders["validation"])
    return line


def bytes_of(model, method):
    """Count the bytes of what was trained, as it is saved, without the head; and those held by the whole model."""
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
    """Return {way: {bits: error, accuracy, labels}} of the trained A and B, rounded after training."""
    ways = {}
    for way, bits in itertools.product(WAYS, (8, 4, 3, 2)):
        copied, error = round_adapter(model, way, bits)
        ways.setdefault(way, {})[bits] = {"error": round(error, 4)} | measured(copied, loader)
    return ways


@torch.no_grad()
def in_float16(model, loader):
    """Evaluate with A and B rounded to float16."""
    copied = copy.deepcopy(model)
    for matrix in itertools.chain(*(layer.low_rank() for layer in copied.lora_layers().values())):
        matrix.copy_(matrix.half())
    return measured(copied, loader)


@torch.no_grad()
def low_rank_part(start, trained, loader):
    """Measure how near to low rank the update W1 - W0 of full fine-tuning is.

    share: {layer: share of its squared norm that its first 1, 2, 3, ... (ranks) singular values hold}
    size: {layer: its norm over that of W0}; shape: {layer: (out, in)}
    kept: {rank: accuracy left when the update of every linear layer is cut to that rank; the rest as trained}
    """
    ranks = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384]
    before = dict(start.bert.named_modules())
    layers = {name: m for name, m in trained.bert.named_modules() if isinstance(m, torch.nn.Linear)}
    shares, sizes, factors = {}, {}, {}
    for name, layer in layers.items():
        update = layer.weight - before[name].weight
        U, S, V = torch.linalg.svd(update, full_matrices=False)
        factors[name] = (U, S, V)
        share = S.square().cumsum(0) / S.square().sum()
        shares[name] = [round(share[rank - 1].item(), 4) for rank in ranks if rank <= len(S)]
        sizes[name] = round((update.norm() / before[name].weight.norm()).item(), 4)
    kept = {}
    for rank in (0, 1, 4, 16, 64):
        for name, (U, S, V) in factors.items():
            layers[name].weight.copy_(before[name].weight + (U[:, :rank] * S[:rank]) @ V[:rank])
        kept[rank] = lora_utils.evaluate(trained, loader).accuracy
    shapes = {name: list(layer.weight.shape) for name, layer in layers.items()}
    return {"ranks": ranks, "share": shares, "size": sizes, "shape": shapes, "kept": kept}


# All runs ------------------------------------------------------------------------------------------


def key_of(line):
    return json.dumps([line[name] for name in ("settings", "seed", "model", "data", "trained_on")], sort_keys=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--parts", nargs="+", choices=PARTS | LONG_PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--phrases", type=int, default=6_000)
    parser.add_argument("--all-phrases", action="store_true", help="hold nothing out, and train on every phrase")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs at a time, with one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS / "sweep.jsonl")
    args = parser.parse_args()
    phrases, _ = data_of(args.data, args.all_phrases)
    args.model = find_model(args.model).name
    args.phrases = len(phrases) if args.all_phrases else min(args.phrases, len(phrases))
    about = {"model": args.model, "data": phrases.info.dataset_name, "trained_on": args.phrases}
    done, wanted = set(map(key_of, read_runs(args.out))) if args.out.is_file() else set(), {}
    for part, seed in itertools.product(args.parts, args.seeds):
        for changed in PARTS.get(part) or LONG_PARTS[part].values():
            wanted[key_of(about | {"settings": DEFAULT | changed, "seed": seed})] = (DEFAULT | changed, seed)
    missing = [job for key, job in wanted.items() if key not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there", flush=True)
    commit()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, torch.get_num_threads() // args.processes)
    spawn = multiprocessing.get_context("spawn")  # forked, a run could wait for a thread that it does not have
    with concurrent.futures.ProcessPoolExecutor(args.processes, spawn) as pool:
        jobs = [pool.submit(run, *job, args, threads) for job in missing]
        for number, job in enumerate(jobs, 1):  # in their order, so that the seeds of two settings can be paired
            line = job.result() | {"commit": commit()}
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            score, of_run = line["results"]["validation"]["accuracy"], f"seed {line['seed']}  {line['settings']}"
            print(f"{number}/{len(jobs)} {line['seconds']:.0f} s  {score:.1%}  {of_run}", flush=True)


if __name__ == "__main__":
    main()
