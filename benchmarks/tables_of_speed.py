"""Make the tables of speed and memory from the files in benchmarks/results/speed. `report.py` writes them."""

import functools
import json
import math
import statistics
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import lora_utils

RESULTS = Path(__file__).resolve().parent / "results" / "speed"

# The kinds of machine that results are filed under, and how a reader knows them.
MACHINES = {
    "cuda": "GPU (H100), bfloat16",
    "amx_bf16": "AMX, bfloat16",
    "avx512_bf16": "AVX512_BF16, bfloat16",
    "avx512_core_bf16": "AVX512_CORE_BF16, bfloat16",
    "avx512_core_vnni": "AVX512_CORE_VNNI, float32",
    "avx2_vnni": "AVX2_VNNI, float32",
    "avx2": "AVX2, float32",
}
MODELS = {"bert-base": "BERT-base's shape", "packaged": "the 6-layer BERT"}


PARTS = {
    "training": "training step",
    "inference-batches-of-32": "predictions, batches of 32",
    "inference-one-sentence": "predictions, one sentence",
}
# The columns of the short tables. A class of machines may be filed under two names.
CLASSES = {
    "AVX2": ["avx2"],
    "AVX512_VNNI": ["avx512_core_vnni"],
    "AVX512_BF16": ["avx512_bf16", "avx512_core_bf16"],
    "AMX": ["amx_bf16"],
    "GPU (H100)": ["cuda"],
}
INT8_BASE = "q-LoRA, 4 bits, int8 base"
FULL = "full fine-tuning, in our batches"


# Reading and printing ------------------------------------------------------------------------------


def results(part, models=MODELS):
    """Read the results of a part: {(model, machine): result}, known machines first, in their order."""
    found = {}
    for model in models:
        names = [file.stem.removeprefix(f"{part}-{model}-") for file in RESULTS.glob(f"{part}-{model}-*.json")]
        for machine in sorted(names, key=[*MACHINES, *sorted(names)].index):
            found[model, machine] = json.loads((RESULTS / f"{part}-{model}-{machine}.json").read_text(encoding="utf-8"))
    return found


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value):
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values):
    median, low, high = values
    return f"{number(median)} ({number(low)} to {number(high)})"


def made_on(found):
    """Say on which machines and data results were made, with which versions, in how many rounds."""
    words = "Made on {device} ({cpu}), torch {torch}, transformers {transformers}, "
    words += "peft {peft}, bitsandbytes {bitsandbytes}"
    said = []
    for result in found.values():
        device = result["machine"]["device"].replace("1 CPU threads", "1 CPU thread")
        said.append(f"{words.format(**result['machine'] | {'device': device})}, {result['data']}.")
    rounds = sorted({result["rounds"] for result in found.values() if "rounds" in result})
    if rounds:
        said.append(f"{' or '.join(map(str, rounds))} rounds.")
    return " ".join(dict.fromkeys(said))


def missing(found):
    measured = {machine for _, machine in found}
    names = [name.partition(",")[0] for key, name in MACHINES.items() if key not in measured | {"avx512_core_bf16"}]
    if not names:
        return ""
    return f" Not in this table: {', '.join(names)}. `make bench` measures what it runs on."


def of_model(found, model):
    """Select the results of one model: {machine: result}."""
    return {machine: result for (name, machine), result in found.items() if name == model}


def columns(of_machines):
    """Name the machine of each result, and say where a CPU was held to an older instruction set."""
    held = " (CPU held to it)"
    return [
        f"{MACHINES.get(machine, machine)}{held if result.get('held_to') else ''}"
        for machine, result in of_machines.items()
    ]


def per_model(found, make):
    """Print one table per model, each below its model's name. `make(model, {machine: result})` returns them."""
    parts = []
    for model, name in MODELS.items():
        if chosen := of_model(found, model):
            parts.append(f"**{name[0].upper()}{name[1:]}**\n\n{table(*make(model, chosen))}")
    return "\n\n".join([*parts, f"{made_on(found)}{missing(found)}"])


def shown(name):
    """Name the bits of A and B. A name without bits means 8."""
    return name if "bits" in name else name.replace("q-LoRA", "q-LoRA, 8 bits")


def of_rounds(result, over, under):
    """Divide the speeds of two contenders round by round: (median, low quartile, high quartile), or None."""
    rates = result["sentences_a_second"] if result else {}
    over = over if over in rates else f"{over}, packed"
    if over not in rates or under not in rates:
        return None
    quotients = [a / b for a, b in zip(rates[over], rates[under], strict=True)]
    low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return median, low, high


def relative(part, model, machines, over, under="LoRA"):
    """Find how many times as fast one contender is as another: (`of_rounds`, held to), or None if not measured."""
    for prefix in ("", "integers-"):
        found = of_model(results(f"{prefix}{part}", [model]), model)
        for machine in machines:
            if machine in found and (ratio := of_rounds(found[machine], over, under)):
                return ratio, found[machine].get("held_to")
    return None


# Speed ---------------------------------------------------------------------------------------------


def ratios(part):
    """Tabulate the speed ratios of a part, one row per ratio and one column per machine."""

    def make(model, of_machines):
        cells = {}
        for machine, result in of_machines.items():
            for entry in result["ratios"]:
                name = f"{shown(entry['over'])} ÷ {shown(entry['under'])}"
                cells.setdefault(name, {})[machine] = spread(entry["ratio"])
        rows = [[name, *(of_row.get(machine, "") for machine in of_machines)] for name, of_row in cells.items()]
        return ["sentences per second, median (quartiles)", *columns(of_machines)], rows

    return per_model(results(part), make)


PLAINER = {
    "batches of like length": "batches of similar length",
    "of the last block the first row alone": "only the first row of the last block",
}


def ablation():
    """Tabulate what each technique gives on top of the row above, and what all give so far."""

    def make(model, of_machines):
        names = dict.fromkeys(name for result in of_machines.values() for name in result["sentences_a_second"])
        rows = []
        for name in names:
            row = [PLAINER.get(name, name)]
            for result in of_machines.values():
                first = next(iter(result["sentences_a_second"]))
                gain = {entry["over"]: spread(entry["ratio"]) for entry in result["ratios"][:-1]}.get(name, "")
                so_far = of_rounds(result, name, first) if name in result["sentences_a_second"] else None
                row += [gain, number(so_far[0]) if so_far else ""]
            rows.append(row)
        header = ["one more technique per row"]
        for column in columns(of_machines):
            header += [f"{column}: gain", "so far"]
        return header, rows

    return per_model(results("ablation"), make)


def where_q_lora_is_faster():
    """Tabulate q-LoRA over LoRA without an int8 base: faster, slower, or no difference seen."""
    found = {part: results(part) for part in PARTS}

    def make(model, of_machines):
        rows = []
        for over in ("q-LoRA", "q-LoRA, NF4 base"):
            for part, title in PARTS.items():
                cells = []
                for machine in of_machines:
                    ratio = of_rounds(found[part].get((model, machine)), over, "LoRA")
                    cells.append(f"{spread(ratio)}, {verdict(ratio)}" if ratio else "")
                rows.append([shown(over), title, *cells])
        return ["÷ LoRA", "of what", *columns(of_machines)], rows

    return per_model(found["training"], make)


def verdict(ratio):
    """Say whether the quartiles, to the digits that are shown, lie on one side of 1."""
    _, low, high = ratio
    if round(low, 2) > 1:
        return "**faster**"
    return "**slower**" if round(high, 2) < 1 else "no difference seen"


def integer_products():
    """Tabulate q-LoRA on an int8 base over LoRA, one row per machine and bits of A and B."""
    found = {part: results(f"integers-{part}") for part in PARTS}
    tables = []
    for model, name in MODELS.items():
        rows = []
        of_machines = of_model(found["training"], model)
        for machine, label in zip(of_machines, columns(of_machines), strict=True):
            for over, bits in (("q-LoRA, int8 base", "8 bits"), (INT8_BASE, "4 bits")):
                cells = [of_rounds(found[part].get((model, machine)), over, "LoRA") for part in PARTS]
                rows.append([label, bits, *(spread(cell) if cell else "" for cell in cells)])
        header = ["int8 base ÷ LoRA", "A and B", *PARTS.values()]
        tables.append(f"**{name[0].upper()}{name[1:]}**\n\n{table(header, rows)}")
    return "\n\n".join([*tables, made_on(found["training"])])


def integer_products_beside_torch_ao():
    """Tabulate predictions of q-LoRA on an int8 base over those of PyTorch's own dynamic int8, one row per machine."""
    cases = {}  # {column: {machine's name: ratio}}
    for model, name in MODELS.items():
        for part in list(PARTS)[1:]:
            of_machines = of_model(results(f"integers-{part}"), model)
            of_case = cases.setdefault(f"{name}, {PARTS[part].removeprefix('predictions, ')}", {})
            for result, label in zip(of_machines.values(), columns(of_machines), strict=True):
                of_case[label] = spread(of_rounds(result, "q-LoRA, int8 base", "torch.ao, dynamic int8"))
    labels = dict.fromkeys(label for of_case in cases.values() for label in of_case)
    rows = [[label, *(of_case.get(label, "") for of_case in cases.values())] for label in labels]
    found = results(f"integers-{part}")
    return f"{table(['int8 base ÷ `torch.ao`', *cases], rows)}\n\n{made_on(found)}"


def speed_in_short():
    """Tabulate q-LoRA on an int8 base over LoRA by model, part and class of machine. Faster is bold."""
    rows, held = [], {name: [] for name in CLASSES}
    for model, model_name in MODELS.items():
        for part, title in PARTS.items():
            cells = []
            for name, machines in CLASSES.items():
                ratio, held_to = relative(part, model, machines, INT8_BASE) or (None, None)
                held[name].append(held_to)
                text = number(ratio[0]) if ratio else ""
                cells.append(f"**{text}**" if ratio and verdict(ratio) == "**faster**" else text)
            rows.append([f"{model_name}: {title}", *cells])
    header = ["q-LoRA on an int8 base ÷ LoRA"]
    header += [f"{name} (CPU held to it)" if all(held[name]) else name for name in CLASSES]
    return f"{table(header, rows)}\n\nMedians of sentences per second. Bold: faster. A and B have 4 bits."


def speed_and_memory_in_short():
    """Tabulate every way to train BERT-base's shape: speed by class of machine and peak memory, relative to LoRA."""
    names = {
        "full fine-tuning, in our batches": "full fine-tuning",
        "PEFT": "PEFT as documented",
        "PEFT, tuned": "PEFT, tuned",
        "LoRA": "**LoRA**",
        "q-LoRA": "q-LoRA, A and B in 8 bits",
        "q-LoRA, int8 base": "q-LoRA, int8 base",
        "q-LoRA, NF4 base": "q-LoRA, NF4 base",
    }
    classes = {name: machines for name, machines in CLASSES.items() if name != "AMX"}
    peaks = results("memory")["bert-base", "amx_bf16"]["bytes"]
    found = {
        over: [relative("training", "bert-base", machines, over) for machines in classes.values()] for over in names
    }
    all_held = [all(cells[i] and cells[i][1] for cells in found.values()) for i in range(len(classes))]
    rows = []
    for over, name in names.items():
        cells = []
        for cell, column_held in zip(found[over], all_held, strict=True):
            held = " (held)" if cell and cell[1] and not column_held else ""
            cells.append(number(cell[0][0]) + held if cell else "")
        peak = number(peaks[over]["peak"] / peaks["LoRA"]["peak"]) if over in peaks else ""
        rows.append([name, *cells, peak])
    header = ["training, BERT-base's shape"]
    for name, held in zip(classes, all_held, strict=True):
        header.append(f"speed, {name}{' (CPU held to it)' if held else ''}")
    words = (
        "Sentences per second and peak memory relative to LoRA, medians. "
        "(held): a newer CPU was held to this instruction set."
    )
    return f"{table([*header, 'peak memory, AMX'], rows)}\n\n{words}"


def integer_products_on_a_gpu():
    """Tabulate the speed of both integer products over bfloat16's, one row per size."""
    result = json.loads((RESULTS / "int8-gpu.json").read_text(encoding="utf-8"))
    ways = ["int8, products only", "int8, fused", "int8"]
    rows = []
    for size in result["found"]:
        if size["launched"] == "as a graph":
            speeds = [spread(size["times as fast as bfloat16"][way]) for way in ways]
            rows.append([f"{size['out']} x {size['in']}, {size['rows']:,} rows", *speeds])
    header = ["weight", "products only", "with rounding, compiled", "with rounding"]
    words = "Made on {device}, torch {torch}; {rounds} rounds, as CUDA graphs (`benchmarks/int8_gpu.py`)."
    return f"{table(header, rows)}\n\n{words.format(**result['machine'], rounds=result['rounds'])}"


# Memory --------------------------------------------------------------------------------------------


def memory():
    """Tabulate the peak of a training run, one row per way to train and one column per machine."""

    def make(model, of_machines):
        names = dict.fromkeys(name for result in of_machines.values() for name in result["bytes"])
        rows = []
        for name in names:
            row = [shown(name)]
            for result in of_machines.values():
                peaks = result["bytes"]
                shares = f"{peaks[name]['peak'] / peaks['PEFT']['peak']:.2f}" if name in peaks else ""
                row.append(f"{peaks[name]['peak'] / 1e6:,.0f} ({shares})" if name in peaks else "")
            rows.append(row)
        return ["peak in MB (÷ PEFT's)", *columns(of_machines)], rows

    return per_model(results("memory"), make)


def memory_by_ledger():
    """Tabulate what `memory_ledger` counts at a training step, and its share of the measured peak."""

    def make(model, of_machines):
        names = dict.fromkeys(name for result in of_machines.values() for name in result["bytes"])
        rows = []
        for name in names:
            cells = []
            for result in of_machines.values():
                of_name = result["bytes"].get(name, {})
                share = f"{100 * of_name['ledger'] / of_name['peak']:.0f} %" if "ledger" in of_name else ""
                cells.append(f"{of_name['ledger'] / 1e6:,.0f} ({share})" if "ledger" in of_name else "")
            if any(cells):
                rows.append([shown(name), *cells])
        return ["counted in MB (of the peak)", *columns(of_machines)], rows

    return per_model(results("memory"), make)


def memory_in_short():
    """Tabulate the peak of training BERT-base's shape, relative to full fine-tuning padded to 128 tokens."""
    names = {
        "full fine-tuning, padded to 128": "full fine-tuning, padded to 128 tokens",
        "full fine-tuning, in our batches": "full fine-tuning, in our batches",
        "PEFT": "PEFT as documented",
        "LoRA": "LoRA",
        "q-LoRA, 4 bits, int8 base": "q-LoRA on an int8 base",
        "q-LoRA, NF4 base": "q-LoRA on an NF4 base",
    }
    of_machines = of_model(results("memory"), "bert-base")
    rows = []
    for name, title in names.items():
        cells = []
        for result in of_machines.values():
            of_name, full = result["bytes"].get(name), result["bytes"]["full fine-tuning, padded to 128"]
            cells.append(f"{100 * of_name['peak'] / full['peak']:.0f} %" if of_name else "")
        if any(cells):
            rows.append([title, *cells])
    return table(["peak of training BERT-base's shape", *columns(of_machines)], rows)


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

    weights = [
        module.weight for module in model.bert.modules() if isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
    ]
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


def growth():
    alt = "Seconds per step and peak memory against rank, tokens in a sentence and layers: LoRA and PEFT"
    lines = []
    for (model, machine), result in results("growth").items():
        figure = f"![{alt}](results/speed/growth-{model}-{machine}.png)"
        times = f"A step at rank 64 takes {spread(result['rank 64 over rank 1'])} times as long as one at rank 1"
        rounds = len(result["growth"]["rank"]["LoRA"]["64"]["seconds"])
        about = f"{MODELS[model]}, 32 sentences of 16 tokens, {result['machine']['device']}"
        lines.append(f"{figure}\n\n{times} ({about}, {MACHINES.get(machine, machine)}, {rounds} rounds).")
    return "\n\n".join(lines)


# Numbers in sentences ------------------------------------------------------------------------------


def span(part, over, under="LoRA", classes=("AVX2", "AVX2_VNNI", "AVX512_VNNI", "AVX512_BF16")):
    """Print the smallest and the largest median ratio of two contenders: on all CPUs without AMX, if not told."""
    found = []
    for model in MODELS:
        for name in classes:
            if ratio := relative(part, model, CLASSES.get(name, [name.lower()]), over, under):
                found.append(ratio[0][0])
    low, high = number(min(found)), number(max(found))
    return low if low == high else f"{low} to {high}"


def torch_ao_is_faster():
    found = [result for part in list(PARTS)[1:] for result in results(f"integers-{part}").values()]
    ratios = [of_rounds(result, "q-LoRA, int8 base", "torch.ao, dynamic int8")[0] for result in found]
    return f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"


def parameters_of_bert_base():
    count, trained, *_ = sizes_of_bert_base()
    total = count + trained - 2 * (BertConfig().hidden_size + 1)  # the head is in both
    return f"{trained:,} of {total:,} for BERT-base ({100 * trained / total:.2f} %)"


def share_of_peak(name, of, machine):
    peaks = results("memory")["bert-base", machine]["bytes"]
    return f"{100 * peaks[name]['peak'] / peaks[of]['peak']:.0f} %"
