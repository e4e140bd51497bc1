"""Make the tables of speed and memory from benchmarks/results/speed. `report.py` writes them."""

import functools
import itertools
import json
import math
import statistics

import torch
from machine import MACHINES, SPEED
from tables_of_accuracy import table
from transformers import BertConfig, BertForSequenceClassification

import lora_utils

MODELS = {"bert-base": "BERT-base's shape", "packaged": "the 6-layer BERT"}
PARTS = {
    "training": "training step",
    "inference-batches-of-32": "predictions, batches of 32",
    "inference-one-sentence": "predictions, one sentence",
}
CLASSES = ["AVX2", "AVX512_VNNI", "AVX512_BF16", "AMX", "GPU (Hopper)"]  # the columns of the short tables
RANKS = (1, 4, 16, 64)
INT8_BASE = "q-LoRA, 4 bits, int8 base"
FULL = "full fine-tuning, in our batches"
RATIOS_OF_TRAINING = [("LoRA", under) for under in ("full fine-tuning, padded to 128", FULL, "PEFT", "PEFT, tuned")]
RATIOS_OF_TRAINING += [("q-LoRA", "LoRA"), ("q-LoRA, NF4 base", "LoRA")]
RATIOS_OF_TRAINING += [("q-LoRA, NF4 base", "PEFT, NF4 base"), ("q-LoRA, NF4 base", "PEFT, NF4 base, tuned")]
RATIOS_OF_TRAINING += [("q-LoRA, int8 base", "PEFT, int8 base"), ("q-LoRA, int8 base", "PEFT, int8 base, tuned")]
PLAIN = "transformers, float32"
RATIOS_OF_INFERENCE = [("transformers, bfloat16", PLAIN), ("torch.ao, dynamic int8", PLAIN), ("LoRA", PLAIN)]
RATIOS_OF_INFERENCE += [("LoRA, merged", PLAIN), ("q-LoRA, packed", "LoRA"), ("q-LoRA, NF4 base", "LoRA")]


# Reading and printing ------------------------------------------------------------------------------


@functools.cache
def results(part):
    """Read the results of a part: {(model, machine): result}, in the order of MODELS and MACHINES."""
    found = {}
    for model in MODELS:
        names = [file.stem.removeprefix(f"{part}-{model}-") for file in SPEED.glob(f"{part}-{model}-*.json")]
        for machine in sorted(names, key=[*MACHINES, *sorted(names)].index):
            found[model, machine] = json.loads((SPEED / f"{part}-{model}-{machine}.json").read_text(encoding="utf-8"))
    return found


def number(value):
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def quartiles(values):
    """Return (median, lower quartile, upper quartile)."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def spread(values):
    return "{} ({} to {})".format(*map(number, values)) if values else ""


def made_on(found):
    """Say on which machines and data results were made, with which versions, in how many rounds."""
    said = []
    for result in found.values():
        about = [result["machine"][name] for name in ("device", "cpu", "torch", "transformers", "peft", "bitsandbytes")]
        words = "Made on {} ({}), torch {}, transformers {}, peft {}, bitsandbytes {}, ".format(*about)
        said.append(f"{words}{result['data']}.".replace("1 CPU threads", "1 CPU thread"))
    rounds = sorted({result["rounds"] for result in found.values() if "rounds" in result})
    return " ".join(dict.fromkeys(said)) + (f" {' or '.join(map(str, rounds))} rounds." if rounds else "")


def column(machine, result):
    """Name a machine, and say if a CPU was held to an older instruction set."""
    name = ", ".join(MACHINES[machine][:2]) if machine in MACHINES else machine
    return f"{name} (CPU held to it)" if result.get("held_to") else name


def per_model(found, make):
    """Print one table per model, each below its model's name. `make(model, {machine: result})` returns them."""
    parts = []
    for model, name in MODELS.items():
        if chosen := {machine: result for (other, machine), result in found.items() if other == model}:
            parts.append(f"**{name[0].upper()}{name[1:]}**\n\n{table(*make(model, chosen))}")
    return "\n\n".join([*parts, made_on(found)])


def shown(name):
    """Name the bits of A and B. A name without bits means 8."""
    return name if "bits" in name else name.replace("q-LoRA", "q-LoRA, 8 bits")


def ratio(result, over, under):
    """Divide the speeds of two contenders round by round: (median, low quartile, high quartile), or None."""
    rates = result["sentences_a_second"] if result else {}
    over = over if over in rates else f"{over}, packed"
    if over not in rates or under not in rates:
        return None
    return quartiles([a / b for a, b in zip(rates[over], rates[under], strict=True)])


def relative(part, model, of_class, over, under="LoRA"):
    """Find how many times as fast one contender is as another: (`ratio`, held to), or None if not measured."""
    for found in (results(part), results(f"integers-{part}")):
        for (other, machine), result in found.items():
            name = MACHINES.get(machine, [machine])[0]
            if (other, name) == (model, of_class) and (quotient := ratio(result, over, under)):
                return quotient, result.get("held_to")
    return None


# Speed ---------------------------------------------------------------------------------------------


def ratios(part):
    """Tabulate the speed ratios of a part, one row per ratio and one column per machine."""

    def make(model, of_machines):
        rows = []
        for over, under in RATIOS_OF_TRAINING if part == "training" else RATIOS_OF_INFERENCE:
            cells = [spread(ratio(result, over, under)) for result in of_machines.values()]
            rows.append([f"{shown(over)} ÷ {shown(under)}", *cells])
        return ["sentences per second, median (quartiles)", *map(column, *zip(*of_machines.items()))], rows

    return per_model(results(part), make)


def ablation():
    """Tabulate what each technique gives on top of the row above, and what all give so far."""

    def make(model, of_machines):
        rows = {name: [name] for result in of_machines.values() for name in result["sentences_a_second"]}
        for result in of_machines.values():
            names = list(result["sentences_a_second"])
            gains = {name: spread(ratio(result, name, before)) for before, name in itertools.pairwise(names)}
            for name, row in rows.items():
                so_far = ratio(result, name, names[0])
                row += [gains.get(name, ""), number(so_far[0]) if so_far else ""]
        header = ["one more technique per row"]
        for machine, result in of_machines.items():
            header += [f"{column(machine, result)}: gain", "so far"]
        return header, list(rows.values())

    return per_model(results("ablation"), make)


def growth_with_rank():
    """Tabulate the speed of a training step by rank, over that at rank 1 and over PEFT's."""

    def make(model, of_machines):
        header, rows = ["rank"], [[f"{rank}"] for rank in RANKS]
        for machine, result in of_machines.items():
            header += [f"{column(machine, result)}: LoRA ÷ LoRA at rank 1", "÷ PEFT, tuned, at the same rank"]
            for rank, row in zip(RANKS, rows):
                for under in ("LoRA, rank 1", f"PEFT, tuned, rank {rank}"):
                    row.append(spread(ratio(result, f"LoRA, rank {rank}", under)))
        return header, rows

    return per_model(results("rank"), make)


def integer_products():
    """Tabulate q-LoRA on an int8 base over LoRA and over PyTorch's own dynamic int8, by machine and bits of A and B."""
    found = {part: results(part) | results(f"integers-{part}") for part in PARTS}
    on_gpu = {key: result for key, result in results("training").items() if key[1] == "cuda"}

    def make(model, of_machines):
        rows = []
        for machine, result in of_machines.items():
            of_parts = [found[part].get((model, machine)) for part in PARTS]
            for over, bits in (("q-LoRA, int8 base", "8 bits"), (INT8_BASE, "4 bits")):
                cells = [ratio(of_part, over, "LoRA") for of_part in of_parts]
                cells += [ratio(of_part, over, "torch.ao, dynamic int8") for of_part in of_parts[1:]]
                rows.append([column(machine, result), bits, *map(spread, cells)])
        header = ["q-LoRA on an int8 base", "A and B", *(f"{title}, ÷ LoRA" for title in PARTS.values())]
        return header + [f"{title}, ÷ `torch.ao`" for title in list(PARTS.values())[1:]], rows

    return per_model(on_gpu | results("integers-training"), make)


def with_held(first, columns):
    """Tabulate {header: [(text, held to) or None]}, and say where a CPU was held to an older instruction set."""
    header, cells = [], []
    for name, column in columns.items():
        all_held = all(cell and cell[1] for cell in column)
        header.append(f"{name} (CPU held to it)" if all_held else name)
        marks = [" (held)" if cell and cell[1] and not all_held else "" for cell in column]
        cells.append([cell[0] + mark if cell else "" for cell, mark in zip(column, marks)])
    return table([first[0], *header], [list(row) for row in zip(first[1:], *cells)])


def speed_in_short():
    """Tabulate q-LoRA on an int8 base over LoRA by model, part and class of machine. Faster is bold."""
    first, columns = ["q-LoRA on an int8 base ÷ LoRA"], {name: [] for name in CLASSES}
    for model, model_name in MODELS.items():
        for part, title in PARTS.items():
            first.append(f"{model_name}: {title}")
            for name, column in columns.items():
                cell = relative(part, model, name, INT8_BASE)
                if cell:  # bold if both quartiles, to the digits that are shown, lie above 1
                    bold = "**" if round(cell[0][1], 2) > 1 else ""
                    cell = f"{bold}{number(cell[0][0])}{bold}", cell[1]
                column.append(cell)
    return f"{with_held(first, columns)}\n\nMedians of sentences per second. Bold: faster. A and B have 4 bits."


def speed_and_memory_in_short():
    """Tabulate every way to train BERT-base's shape: speed by class of machine and peak memory, relative to LoRA."""
    names = {FULL: "full fine-tuning", "PEFT": "PEFT as documented", "PEFT, tuned": "PEFT, tuned", "LoRA": "**LoRA**"}
    names["q-LoRA"] = "q-LoRA, A and B in 8 bits"
    names |= {name: name for name in ("q-LoRA, int8 base", "q-LoRA, NF4 base")}
    columns = {}
    for name in CLASSES:
        if name != "AMX":
            cells = [relative("training", "bert-base", name, over) for over in names]
            columns[f"speed, {name}"] = [cell and (number(cell[0][0]), cell[1]) for cell in cells]
    peaks = results("memory")["bert-base", "amx_bf16"]["bytes"]
    columns["peak memory, AMX"] = [(number(peaks[name]["peak"] / peaks["LoRA"]["peak"]), None) for name in names]
    words = "Sentences per second and peak memory relative to LoRA, medians. "
    words += "(held): a newer CPU was held to this instruction set."
    return with_held(["training, BERT-base's shape", *names.values()], columns) + f"\n\n{words}"


# Memory --------------------------------------------------------------------------------------------


def memory():
    """Tabulate the peak of a training run and what the ledger counts, one row per way to train."""

    def make(model, of_machines):
        rows = []
        for name in dict.fromkeys(name for result in of_machines.values() for name in result["bytes"]):
            row = [shown(name)]
            for peaks in (result["bytes"] for result in of_machines.values()):
                found, cell = peaks.get(name), ""
                if found:
                    cell = f"{found['peak'] / 1e6:,.0f} ({found['peak'] / peaks['PEFT']['peak']:.2f})"
                if found and "ledger" in found:
                    cell += f", {found['ledger'] / 1e6:,.0f} counted"
                row.append(cell)
            rows.append(row)
        return ["peak in MB (÷ PEFT's)", *map(column, *zip(*of_machines.items()))], rows

    return per_model(results("memory"), make)


@functools.cache
def sizes_of_bert_base(rank=8):
    """Compute the sizes of BERT-base with adapters on query and value.

    Returns (parameters of BERT and head, parameters trained, {bits: bytes of A and B}, {base bits: bytes of all}).
    `tests/test_qlora.py` compares the bytes with those of a model and of a file.
    """
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    config = model.config
    matrices = 2 * 2 * config.num_hidden_layers  # A and B of query and value
    adapter = matrices * rank * config.hidden_size
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    of_adapter = {bits: adapter * bits // 8 + matrices * rank * 4 for bits in (8, 4, 2)}  # one scale per rank
    of_adapter[None] = 4 * adapter
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    weights = [module.weight for module in model.bert.modules() if isinstance(module, kinds)]
    numbers = sum(weight.numel() for weight in weights)
    others = sum(parameter.numel() for parameter in model.bert.parameters()) - numbers
    rest = 4 * (adapter + head) + 2 * others + 8 * config.max_position_embeddings  # with the int64 position ids
    blocks = [math.ceil(weight.numel() / 64) for weight in weights]
    nf4 = sum(weight.numel() // 2 for weight in weights) + sum(blocks)  # an 8-bit scale per block
    nf4 += sum(4 * math.ceil(count / 256) + 4 for count in blocks)
    nf4 += lora_utils._NF4_BYTE_TABLE.nbytes + lora_utils._DYNAMIC_8BIT_CODE.nbytes
    int8 = numbers + 4 * sum(len(weight) for weight in weights)
    of_all = {None: rest + 2 * numbers, 8: rest + int8, 4: rest + nf4}
    return sum(parameter.numel() for parameter in model.parameters()), adapter + head, of_adapter, of_all


def bytes_of_bert_base():
    _, _, of_adapter, of_all = sizes_of_bert_base()
    rows = [["A and B", f"{of_adapter[None]:,} in float32", *(f"{of_adapter[b]:,} at {b} bits" for b in (8, 4, 2))]]
    base = [f"{of_all[None] / 1e6:.1f} MB in bfloat16", *(f"{of_all[b] / 1e6:.1f} MB at {b} bits" for b in (8, 4))]
    rows.append(["the whole model, by the bits of the base", *base, ""])
    return table(["bytes", "not quantised", "8 bits", "4 bits", "2 bits"], rows)


# Numbers in sentences ------------------------------------------------------------------------------


def span(part, over, under="LoRA", classes=("AVX2", "AVX2_VNNI", "AVX512_VNNI", "AVX512_BF16")):
    """Print the smallest and the largest median ratio of two contenders: on all CPUs without AMX, if not told."""
    found = [relative(part, model, name, over, under) for model in MODELS for name in classes]
    medians = [cell[0][0] for cell in found if cell]
    low, high = number(min(medians)), number(max(medians))
    return low if low == high else f"{low} to {high}"


def torch_ao_is_faster():
    found = [result for part in list(PARTS)[1:] for result in results(f"integers-{part}").values()]
    quotients = [ratio(result, "q-LoRA, int8 base", "torch.ao, dynamic int8")[0] for result in found]
    return f"{sum(quotient < 1 for quotient in quotients)} of {len(quotients)}"


def parameters_of_bert_base():
    count, trained, *_ = sizes_of_bert_base()
    total = count + trained - 2 * (BertConfig().hidden_size + 1)  # the head is in both
    return f"{trained:,} of {total:,} for BERT-base ({100 * trained / total:.2f} %)"


def share_of_peak(name, of, machine):
    peaks = results("memory")["bert-base", machine]["bytes"]
    return f"{100 * peaks[name]['peak'] / peaks[of]['peak']:.0f} %"
