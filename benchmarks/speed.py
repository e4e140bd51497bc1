"""Time training and predictions, ours and the peers' in turn, and measure the peak memory of training.

    python benchmarks/speed.py training               full fine-tuning, PEFT, PEFT with bitsandbytes, ours
    python benchmarks/speed.py ablation               from PEFT as documented to ours, one technique at a time
    python benchmarks/speed.py rank                   training at ranks 1 to 64
    python benchmarks/speed.py inference              one sentence, and batches of 32
    python benchmarks/speed.py integers               q-LoRA on an int8 base beside LoRA and torch.ao, all three
    python benchmarks/speed.py memory                 the peak of training, beside what the ledger counts

    --model packaged          the 6-layer BERT instead of the shape of BERT-base with random weights
    --data folder             SST-2 (a folder); without it phrases of movie_phrases, cut to SST-2's lengths
    --held-to AVX2            the CPU held to an instruction set: AVX2, AVX2_VNNI, AVX512_CORE_VNNI or _BF16

Batches of 32 from the same 1,600 sentences, rank 8, query and value. The contenders take turns batch by batch, each
time in the opposite order. A ratio is taken round by round. It is printed with its quartiles, and all rounds are saved.
Where the machine computes in bfloat16, PEFT runs under autocast to it. Elsewhere all is float32.

The peak of memory is the largest resident set of a fresh process (Linux), less what it holds after importing the
libraries. On a GPU it is the most that was allocated. A few batches in the order of each way are trained, and then one
of the longest sentences, the same for all, because some batch holds the longest sentence in every order.
"""

import argparse
import concurrent.futures
import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
from contenders import Contender, Way, alternate, batches, checkpoint, padded, sentences
from machine import DEVICE, HELD, SPEED, commit, filed_under, hold, save
from tables_of_speed import RANKS, quartiles, ratio, spread

import lora_utils
from lora_lab.ledger import memory_ledger

OLDER = Way("transformers", "to 128", "sdpa", 0.1, stored="float32", fused=False)
PEFT_STOCK = Way("PEFT", "random", "sdpa", 0.1, stored="float32", autocast=True, fused=False)
PEFT_TUNED = Way("PEFT", "similar length", "eager", 0.1, stored="float32", autocast=True, fused=False)
OURS = Way("ours")
TRAINING = {
    "full fine-tuning, padded to 128": OLDER,
    "full fine-tuning, in our batches": replace(PEFT_TUNED, who="transformers", dropout=0.0, fused=True),
    "PEFT": PEFT_STOCK,
    "PEFT, tuned": PEFT_TUNED,
    "PEFT, NF4 base": replace(PEFT_STOCK, base=4),
    "PEFT, NF4 base, tuned": replace(PEFT_TUNED, base=4),
    "PEFT, int8 base": replace(PEFT_STOCK, base=8),
    "PEFT, int8 base, tuned": replace(PEFT_TUNED, base=8),
    "LoRA": OURS,
    "q-LoRA": replace(OURS, bits=8),
    "q-LoRA, int8 base": replace(OURS, bits=8, base=8),
    "q-LoRA, 4 bits, int8 base": replace(OURS, bits=4, base=8),
    "q-LoRA, NF4 base": replace(OURS, bits=8, base=4),
}
# Each row has one thing more than the row before.
ABLATION = {
    "PEFT as documented": PEFT_STOCK,
    "batches of similar length": replace(PEFT_STOCK, batches="similar length"),
    "plain attention": PEFT_TUNED,
    "the backbone's dropout off": replace(PEFT_TUNED, dropout=0.0),
    "frozen weights in bfloat16, no autocast": replace(PEFT_TUNED, dropout=0.0, stored="native", autocast=False),
    "our layers: one step of autograd each": replace(OURS, all_rows=True, fused=False),
    "only the first row of the last block": replace(OURS, fused=False),
    "fused AdamW": OURS,
}
OF_RANKS = {f"LoRA, rank {rank}": replace(OURS, rank=rank) for rank in RANKS}
OF_RANKS |= {f"PEFT, tuned, rank {rank}": replace(PEFT_TUNED, rank=rank) for rank in RANKS}
INFERENCE = {
    "transformers, float32": Way("transformers", stored="float32", attention="sdpa"),
    "transformers, bfloat16": Way("transformers", attention="sdpa"),
    "torch.ao, dynamic int8": Way("torch.ao", stored="float32", attention="sdpa"),
    "LoRA": OURS,
    "LoRA, merged": replace(OURS, state="merged"),
    "q-LoRA, packed": replace(OURS, bits=8, state="packed"),
    "q-LoRA, int8 base": replace(OURS, bits=8, base=8, state="packed"),
    "q-LoRA, 4 bits, int8 base": replace(OURS, bits=4, base=8, state="packed"),
    "q-LoRA, NF4 base": replace(OURS, bits=8, base=4, state="packed"),
}
PARTS = {"training": {"training": TRAINING}, "ablation": {"ablation": ABLATION}, "rank": {"rank": OF_RANKS}}
PARTS["inference"] = {"inference, batches of 32": INFERENCE, "inference, one sentence": INFERENCE}
INTEGERS = ["LoRA", "q-LoRA, int8 base", "q-LoRA, 4 bits, int8 base", "torch.ao, dynamic int8"]
PARTS["integers"] = {
    f"integers, {part}": {name: way for name, way in ways.items() if name in INTEGERS}
    for part, ways in (PARTS["training"] | PARTS["inference"]).items()
}
PARTS["memory"] = {"memory": {name: way for name, way in TRAINING.items() if "base, tuned" not in name}}


def time_all(part, ways, ids, folder, args):
    """Time every way of a part: {name: [sentences per second, round by round]}."""
    one, by_length = part.endswith("one sentence"), sorted(ids, key=len)
    twenty = [padded([sentence], len(sentence)) for sentence in by_length[len(ids) // 40 :: len(ids) // 20]]
    contenders = {}
    for name, way in ways.items():
        if "bfloat16" in name and lora_utils.detect_compute_format().dtype != torch.bfloat16:
            continue
        if way.who == "torch.ao" and DEVICE.type != "cpu":
            continue
        of_way = twenty if one else batches(ids, way.batches, 1 if way == OLDER else args.batches)
        contender = Contender(way, folder, training="inference" not in part)
        contenders[name] = (contender.predict if "inference" in part else contender.step, of_way)
    calls = max(len(of_way) for _, of_way in contenders.values())
    rates = alternate(contenders, calls, args.rounds, size=1 if one else 32)
    return {name: [round(rate, 3) for rate in values] for name, values in rates.items()}


def print_rates(part, rates):
    """Print each speed, and its ratio to LoRA's, or in the ablation to the row above."""
    for before, name in zip([None, *rates], rates):
        under = before if part == "ablation" else "LoRA"
        words = f"÷ {under} {spread(ratio({'sentences_a_second': rates}, name, under))}" if under in rates else ""
        print(f"  {name:44}{spread(quartiles(rates[name])):28}{words}")


def peak_of(way, folder, ids, number):
    """Train, and return the peak in bytes above what the libraries take, and what the ledger counts for ours."""
    import peft  # noqa: F401  (what the peers import is no part of the peak either)

    def resident(which):  # VmRSS: now, VmHWM: the peak
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))

    longest = sorted(ids, key=len)[-32:]
    given = [*batches(ids, way.batches, number), padded(longest, len(longest[-1]))]
    if way == OLDER:  # all are as long
        given = [padded(longest, 128)]
    before = resident("VmRSS")
    # A process inherits its peak from its parent: start a new one.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    contender = Contender(way, folder)
    for batch in [*given, given[-1]]:
        contender.step(batch)
    result = {"peak": resident("VmHWM") - before if DEVICE.type == "cpu" else torch.cuda.max_memory_allocated()}
    if way.who == "ours":
        contender.model(**given[-1]).loss.backward()  # for the gradients
        result["ledger"] = memory_ledger(contender.model, contender.optimizer, given[-1]).total_bytes()
    return result


def peaks(ways, ids, folder, number):
    """Measure the peak of every way, each in a fresh process."""
    found, spawn = {}, multiprocessing.get_context("spawn")
    for name, way in ways.items():
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as fresh:
            found[name] = fresh.submit(peak_of, way, folder, ids, number).result()
        print(f"  {name:44}", *(f"{what} {value / 1e6:.1f} MB" for what, value in found[name].items()), flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--model", choices=["bert-base", "packaged"], default="bert-base")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--held-to", choices=HELD)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=5, help="per round, from short to long sentences")
    parser.add_argument("--out", type=Path, default=SPEED, help="the folder of the results")
    parser.add_argument("--compile", action="store_true", help="ablation: ours through torch.compile as well")
    args = parser.parse_args()
    hold(args.held_to)
    ids, data = sentences(args.data)
    commit()
    with checkpoint(args.model) as (folder, model):
        for part, ways in PARTS[args.part].items():
            if part == "ablation" and args.compile:
                ways = ways | {"torch.compile": replace(OURS, compiled=True)}
            print(f"\n{model}, {data}, {filed_under()}, {part}: median (quartiles)", flush=True)
            result = {"part": part, "model": model, "data": data, "batch": 1 if "one" in part else 32}
            if part == "memory":
                result["bytes"] = peaks(ways, ids, folder, args.batches)
            else:
                rates = time_all(part, ways, ids, folder, args)
                result |= {"rounds": args.rounds, "sentences_a_second": rates}
                print_rates(part, rates)
            name = f"{part.replace(', ', '-').replace(' ', '-')}-{args.model}-{filed_under().lower()}.json"
            save(args.out / name, result)


if __name__ == "__main__":
    main()
