"""Sentences a second: ours and the peers in turn, on the same sentences.

    python benchmarks/speed.py training               full fine-tuning, PEFT, PEFT with bitsandbytes, ours
    python benchmarks/speed.py ablation               from PEFT as documented to ours, one technique at a time
    python benchmarks/speed.py inference              one sentence, and batches of 32

    --model packaged          the 6-layer BERT instead of the shape of BERT-base with random weights
    --data folder             SST-2 (a folder); without it phrases of movie_phrases, cut to SST-2's lengths
    --held-to AVX2            the CPU held to an instruction set: AVX2, AVX2_VNNI, AVX512_CORE_VNNI or _BF16

Batches of 32 from the same 1,600 sentences, rank 8, query and value. The contenders take turns batch by batch, every
time in the other order. A ratio is taken round by round; its median and its quartiles are printed, and saved with all
rounds in benchmarks/results.
Where the machine computes in bfloat16, PEFT runs under autocast to it; elsewhere all is float32.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from contenders import (
    DEVICE,
    HELD,
    OLDER,
    OURS,
    PEFT_STOCK,
    PEFT_TUNED,
    RESULTS,
    Contender,
    Way,
    about,
    alternate,
    batches,
    checkpoint,
    hold,
    ratio,
    save,
    sentences,
)

import lora_utils

TRAINING = {
    "full fine-tuning, padded to 128": OLDER,
    "full fine-tuning, in our batches": replace(PEFT_TUNED, who="transformers", dropout=0.0, fused=True),
    "PEFT": PEFT_STOCK,
    "PEFT, tuned": PEFT_TUNED,
    "PEFT, NF4 base": replace(PEFT_STOCK, base=4),
    "PEFT, NF4 base, tuned": replace(PEFT_TUNED, base=4),
    "PEFT, int8 base": replace(PEFT_STOCK, base=8),
    "PEFT, int8 base, tuned": replace(PEFT_TUNED, base=8),
    "the frozen products alone": Way("products"),
    "LoRA": OURS,
    "q-LoRA": replace(OURS, bits=8),
    "q-LoRA, int8 base": replace(OURS, bits=8, base=8),
    "q-LoRA, 4 bits, int8 base": replace(OURS, bits=4, base=8),
    "q-LoRA, NF4 base": replace(OURS, bits=8, base=4),
}
TRAINING_RATIOS = [
    ("LoRA", "full fine-tuning, padded to 128"),
    ("LoRA", "full fine-tuning, in our batches"),
    ("LoRA", "PEFT"),
    ("LoRA", "PEFT, tuned"),
    ("LoRA", "the frozen products alone"),
    ("q-LoRA", "LoRA"),
    ("q-LoRA, NF4 base", "PEFT, NF4 base"),
    ("q-LoRA, NF4 base", "PEFT, NF4 base, tuned"),
    ("q-LoRA, int8 base", "PEFT, int8 base"),
    ("q-LoRA, int8 base", "PEFT, int8 base, tuned"),
    ("q-LoRA, int8 base", "LoRA"),
    ("q-LoRA, 4 bits, int8 base", "LoRA"),
    ("q-LoRA, NF4 base", "LoRA"),
]

# Each row has one thing more than the row before.
ABLATION = {
    "PEFT as documented": PEFT_STOCK,
    "batches of like length": replace(PEFT_STOCK, batches="like length"),
    "plain attention": PEFT_TUNED,
    "the backbone's dropout off": replace(PEFT_TUNED, dropout=0.0),
    "frozen weights in bfloat16, no autocast": replace(PEFT_TUNED, dropout=0.0, stored="native", autocast=False),
    "our layers: one step of autograd each": replace(OURS, all_rows=True, fused=False),
    "of the last block the first row alone": replace(OURS, fused=False),
    "fused AdamW": OURS,
}

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
# What integer products are compared with: our own LoRA, and PyTorch's dynamic int8 where nothing is trained.
INTEGERS = ["LoRA", "q-LoRA, int8 base", "q-LoRA, 4 bits, int8 base", "torch.ao, dynamic int8"]

INFERENCE_RATIOS = [(name, "transformers, float32") for name in list(INFERENCE)[1:]]
INFERENCE_RATIOS += [
    ("q-LoRA, int8 base", "LoRA"),
    ("q-LoRA, 4 bits, int8 base", "LoRA"),
    ("q-LoRA, int8 base", "torch.ao, dynamic int8"),
]


def run(part, ways, ids, folder, args):
    """Sentences a second of every way, round by round."""
    if lora_utils.detect_compute_format().dtype != torch.bfloat16:
        ways = {name: way for name, way in ways.items() if "bfloat16" not in name}
    contenders = {}
    for name, way in ways.items():
        if way.who == "torch.ao" and DEVICE.type != "cpu":
            continue
        contender = Contender(way, folder, training="inference" not in part)
        if part.endswith("one sentence"):
            by_length = sorted(ids, key=len)
            one = [[by_length[int((i + 0.5) * len(ids) / 20)]] for i in range(20)]
            its_batches = [batches(sentence, "like length", 1)[0] for sentence in one]
        else:
            its_batches = batches(ids, way.batches, 1 if way == OLDER else args.batches)
        contenders[name] = (contender.predict if "inference" in part else contender.step, its_batches)
    calls = max(len(its_batches) for _, its_batches in contenders.values())
    return alternate(contenders, calls, args.rounds, size=1 if part.endswith("one sentence") else 32)


def report(part, rates, ratios):
    print(f"\n{part}: sentences a second, median (quartiles)")
    for name, values in rates.items():
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        print(f"  {name:44}{median:9.2f}  ({low:.2f} to {high:.2f})")
    print("ratios, median (quartiles)")
    for over, under in ratios:
        print("  {:44}{:9.3f}  ({:.3f} to {:.3f})".format(f"{over} ÷ {under}", *ratio(rates, over, under)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["training", "ablation", "inference", "integers"])
    parser.add_argument("--model", choices=["bert-base", "packaged"], default="bert-base")
    parser.add_argument("--data", default="auto")
    parser.add_argument("--held-to", choices=list(HELD))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batches", type=int, default=5, help="a round, from short to long sentences")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the results")
    parser.add_argument("--compile", action="store_true", help="ablation: ours through torch.compile as well")
    args = parser.parse_args()
    hold(args.held_to)
    ids, data = sentences(args.data)
    known = about()
    parts = ["inference, one sentence", "inference, batches of 32"] if args.part == "inference" else [args.part]
    if args.part == "integers":
        parts = ["integers, training", "integers, inference, batches of 32", "integers, inference, one sentence"]
    with checkpoint(args.model) as (folder, model):
        for part in parts:
            ways = {"training": TRAINING, "integers, training": TRAINING, "ablation": ABLATION}.get(part, INFERENCE)
            if part.startswith("integers"):
                ways = {name: way for name, way in ways.items() if name in INTEGERS}
            if part == "ablation" and args.compile:
                ways = ways | {"torch.compile": replace(OURS, compiled=True)}
            rates = run(part, ways, ids, folder, args)
            names = list(rates)
            ratios = {
                "training": TRAINING_RATIOS,
                "integers, training": TRAINING_RATIOS,
                "ablation": [*zip(names[1:], names[:-1], strict=True), (names[-1], names[0])],
            }.get(part, INFERENCE_RATIOS)
            ratios = [(over, under) for over, under in ratios if over in rates and under in rates]
            machine = known["machine"]
            print(f"\n{model}, {data}, {machine['device']}, {known['arithmetic']}, {machine['frozen_dtype']}")
            report(part, rates, ratios)
            name = f"{part.replace(', ', '-').replace(' ', '-')}-{args.model}-{known['arithmetic'].lower()}.json"
            named = [{"over": o, "under": u, "ratio": [round(r, 4) for r in ratio(rates, o, u)]} for o, u in ratios]
            rounded = {name: [round(rate, 3) for rate in values] for name, values in rates.items()}
            size = 1 if part.endswith("one sentence") else 32
            result = {"part": part, "model": model, "data": data, "batch": size, "rank": 8, "rounds": args.rounds}
            save(args.out / name, result | {"sentences_a_second": rounded, "ratios": named} | known)


if __name__ == "__main__":
    main()
