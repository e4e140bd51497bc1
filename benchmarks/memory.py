"""Peak memory of a training run, each in a fresh process, beside what the ledger counts.

    python benchmarks/memory.py [--model packaged] [--data folder]

The peak is the largest resident set of the process (Linux), less what it holds after importing the libraries: weights,
loading them, gradients, optimiser, activations, and what a step allocates and frees. On a GPU it is the most that was
allocated there. A few batches in the order of each way are trained, and then one of the longest sentences, the same for
all, since some batch holds the longest sentence whatever the order. The ledger counts what is held with that batch.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from contenders import DEVICE, OLDER, RESULTS, Contender, Way, about, batches, checkpoint, padded, save, sentences
from speed import TRAINING

from lora_lab.ledger import memory_ledger

LEFT_OUT = {"the frozen products alone", "PEFT, NF4 base, tuned", "PEFT, int8 base, tuned"}
WAYS = {name: way for name, way in TRAINING.items() if name not in LEFT_OUT}


def in_this_process(spec):
    """Train as the spec says, and print what it took as JSON."""
    import peft  # noqa: F401  (what the peers import is no part of the peak either)

    way = Way(**spec["way"])
    if "tokens" in spec:
        ids = [[101, *range(2000, 2000 + spec["tokens"] - 2), 102]] * 32
        given = [padded(ids, spec["tokens"])]
    else:
        longest = sorted(spec["ids"], key=len)[-32:]
        given = [*batches(spec["ids"], way.batches, spec["batches"]), padded(longest, len(longest[-1]))]
        if way == OLDER:  # all as long
            given = [padded(longest, 128)]
    before = resident("VmRSS")
    # The peak starts anew: a process inherits it from its parent.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    contender = Contender(way, spec["folder"])
    for batch in [*given, given[-1]]:
        contender.step(batch)
    result = {"peak": resident("VmHWM") - before}
    if DEVICE.type == "cuda":
        result = {"peak": torch.cuda.max_memory_allocated()}
    if way.who == "ours":
        contender.model(**given[-1]).loss.backward()  # for the gradients
        result["ledger"] = memory_ledger(contender.model, contender.optimizer, given[-1]).total_bytes()
    print(json.dumps(result))


def resident(which):
    """The resident set of this process in bytes, as Linux tells it: VmRSS now, VmHWM its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def measure(way, folder, **spec):
    """What `in_this_process` prints, from a fresh process."""
    spec = json.dumps({"way": asdict(way), "folder": str(folder), **spec})
    command = [sys.executable, __file__, "--spec-on-stdin"]
    done = subprocess.run(command, input=spec, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["bert-base", "packaged"], default="bert-base")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--batches", type=int, default=4, help="of 32 sentences, before the longest")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--spec-on-stdin", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.spec_on_stdin:
        return in_this_process(json.load(sys.stdin))
    ids, data = sentences(args.data)
    with checkpoint(args.model) as (folder, model):
        found = {name: measure(way, folder, ids=ids, batches=args.batches) for name, way in WAYS.items()}
    print(f"\n{model}, {data}: megabytes above the libraries")
    for name, result in found.items():
        ledger = f", ledger {result['ledger'] / 1e6:7.1f}" if "ledger" in result else ""
        share = result["peak"] / found["PEFT"]["peak"]
        print(f"  {name:34}peak {result['peak'] / 1e6:7.1f}, of PEFT's {share:.2f}{ledger}")
    known = about()
    name = f"memory-{args.model}-{known['arithmetic'].lower()}.json"
    result = {"part": "memory", "model": model, "data": data, "batch": 32, "rank": 8}
    save(args.out / name, result | {"bytes": found} | known)


if __name__ == "__main__":
    main()
