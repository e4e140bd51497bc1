"""What the benchmarks of speed and memory compare: a training step or a prediction, ours and the peers', one class.

A `Way` says how, and `Contender` builds it. `sentences` draws the sentences, the same for all, and `batches` makes them
up into batches in the order of each way.
"""

import contextlib
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from accuracy import ROOT, commit, machine
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel

sys.path.insert(0, str(ROOT))

import lora_utils
from lora_lab.sources import load_sst2, packaged_checkpoint

RESULTS = ROOT / "benchmarks" / "results" / "speed"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# How many of SST-2's training phrases have 0, 1, 2, ... tokens, for where SST-2 is not at hand.
SST2_LENGTHS = [0, 0, 0, 1978, 5323, 6064, 5345, 4749, 4155, 3713, 3267, 2947, 2650, 2413, 2138, 1950, 1777]
SST2_LENGTHS += [1661, 1515, 1373, 1285, 1132, 1106, 1046, 909, 820, 806, 733, 692, 628, 538, 491, 442, 448, 400]
SST2_LENGTHS += [337, 304, 286, 242, 195, 203, 192, 155, 148, 130, 89, 82, 85, 73, 55, 42, 50, 40, 36, 19, 21]
SST2_LENGTHS += [22, 15, 8, 6, 3, 2, 5, 5, 1, 2, 2]

# How the environment holds PyTorch's libraries to an instruction set, and what the CPU must have for it.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
HELD = {
    "AVX2": (AVX2, "avx2"),
    "AVX2_VNNI": (AVX2, "avx_vnni"),
    "AVX512_CORE_VNNI": ({"FBGEMM_ENABLE_INSTRUCTIONS": "AVX512_E1"}, "avx512_vnni"),
    "AVX512_CORE_BF16": ({"FBGEMM_ENABLE_INSTRUCTIONS": "AVX512_E1"}, "avx512_bf16"),
}


@dataclass(frozen=True)
class Way:
    """One way to train or predict.

    who: "ours", "PEFT", "transformers" (full fine-tuning, or a plain prediction), "torch.ao" (its dynamic int8), or
        "products" (the frozen matrix products alone).
    batches: "like length", "random" (each padded to its longest), or "to 128" (random, padded to 128 tokens).
    base: of the frozen weights None (as they are), 8 or 4 bits: bitsandbytes' for PEFT, ours for ours.
    bits: of A and B, ours; None is unquantised LoRA.
    stored: "float32", or "native": bfloat16 where the machine computes in it.
    autocast: to bfloat16 where the machine computes in it.
    """

    who: str
    batches: str = "like length"
    attention: str = "eager"
    dropout: float = 0.0
    base: int | None = None
    bits: int | None = None
    rank: int = 8
    stored: str = "native"
    autocast: bool = False
    all_rows: bool = False  # ours without the first-row path
    fused: bool = True  # AdamW
    compiled: bool = False
    state: str = "unmerged"  # ours, for predictions: or "merged", "packed"


OLDER = Way("transformers", "to 128", "sdpa", 0.1, stored="float32", fused=False)
PEFT_STOCK = Way("PEFT", "random", "sdpa", 0.1, stored="float32", autocast=True, fused=False)
PEFT_TUNED = Way("PEFT", "like length", "eager", 0.1, stored="float32", autocast=True, fused=False)
OURS = Way("ours")


class Contender:
    """A model that was built in one `Way`: `step(batch)` trains it once, `predict(batch)` asks it for logits."""

    def __init__(self, way, folder, training=True):
        self.way, self.native = way, lora_utils.detect_compute_format().dtype
        self.dtype = self.native if way.stored == "native" else torch.float32
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = {"ours": self._ours, "products": Products}.get(way.who, self._peers)(folder).to(DEVICE)
        self.model.train(training)
        self.call = torch.compile(self.model) if way.compiled else self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=way.fused) if trained else None

    def _ours(self, folder):
        options = {"rank": self.way.rank, "dtype": self.dtype}
        if self.way.bits:
            options |= {"bits": self.way.bits, "base_bits": self.way.base}
        model = (lora_utils.qLoRABertModel if self.way.bits else lora_utils.LoRABertModel)(str(folder), **options)
        for layer in model.lora_layers().values() if self.way.state == "merged" else ():
            layer.merge()
        if self.way.state == "packed":
            model.pack()
        if not self.way.all_rows:
            return model
        model = model.model  # transformers' own forward, and its head in the dtype of the head
        model.classifier.register_forward_pre_hook(lambda head, args: (args[0].to(head.weight.dtype),))
        return model

    def _peers(self, folder):
        options = {"attn_implementation": self.way.attention, "dtype": self.dtype}
        options |= {"hidden_dropout_prob": self.way.dropout, "attention_probs_dropout_prob": self.way.dropout}
        if self.way.base:
            options |= {
                "quantization_config": bitsandbytes_config(self.way.base, self.native),
                "device_map": {"": DEVICE},
            }
        model = BertForSequenceClassification.from_pretrained(folder, **options)
        if self.way.who == "torch.ao":
            model = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
        if self.way.who != "PEFT":
            return model
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if self.way.base:  # without checkpointing, which would make it slower still
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        config = LoraConfig(
            task_type="SEQ_CLS", r=self.way.rank, lora_alpha=2 * self.way.rank, target_modules=["query", "value"]
        )
        return get_peft_model(model, config)

    def autocast(self):
        if self.way.autocast and self.native == torch.bfloat16:
            return torch.autocast(DEVICE.type, torch.bfloat16)
        return contextlib.nullcontext()

    def step(self, batch):
        with self.autocast():
            output = self.call(**batch)
        output.loss.backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.inference_mode()
    def predict(self, batch):
        self.call(**{name: tensor for name, tensor in batch.items() if name != "labels"})


def bitsandbytes_config(bits, dtype):
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["classifier"],
    )


class Products(nn.Module):
    """The frozen products of an encoder alone, forward and by the input: what a step cannot do without, nearly."""

    def __init__(self, folder):
        super().__init__()
        bert = BertModel.from_pretrained(folder, dtype=lora_utils.detect_compute_format().dtype)
        linear = [module for module in bert.encoder.modules() if isinstance(module, nn.Linear)]
        self.weights = [module.weight.data.to(DEVICE) for module in linear]
        widths = {weight.shape[1] for weight in self.weights}
        self.inputs = {width: torch.randn(32 * 128, width).to(self.weights[0]) for width in widths}

    def forward(self, input_ids, **_):
        self.gradients = [F.linear(self.inputs[w.shape[1]][: input_ids.numel()], w) for w in self.weights]
        return SimpleNamespace(loss=SimpleNamespace(backward=self.backward))

    def backward(self):
        for weight in reversed(self.weights):
            self.gradients.pop() @ weight


# The sentences ------------------------------------------------------------------------------------


def sentences(data, number=32 * lora_utils.LengthGroupedBatches.WINDOW, seed=0):
    """(lists of token ids, the name of the data): a draw from SST-2's training phrases, or from movie_phrases.

    movie_phrases' own phrases are all short: their words are cut into pieces as long as SST-2's phrases are.
    """
    splits = load_sst2(data)
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    generator = torch.Generator().manual_seed(seed)
    name, phrases = splits["train"].info.dataset_name, splits["train"]["sentence"]
    if name == "SST-2":
        drawn = torch.randperm(len(phrases), generator=generator)[:number].tolist()
        return tokenizer([phrases[i] for i in drawn])["input_ids"], name
    words = itertools.cycle(tokenizer(" ".join(phrases), add_special_tokens=False, verbose=False)["input_ids"])
    counts = torch.tensor(SST2_LENGTHS, dtype=torch.float)
    lengths = counts.multinomial(number, replacement=True, generator=generator).tolist()
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [[cls, *itertools.islice(words, n - 2), sep] for n in lengths], f"{name}, cut to SST-2's lengths"


def batches(ids, way, number, size=32):
    """`number` of the batches that a way makes of the sentences, as long on the mean as all of them.

    All ways start from the same sentences, but short and long ones cannot be in the same few batches of every way. So
    the batches are cut into `number` parts, and one of each is drawn: the draw, of a thousand, whose mean length is
    nearest to that of all.
    """
    generator = torch.Generator().manual_seed(0)
    if way == "like length":
        ordered = sorted(ids, key=len)
    else:
        ordered = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
    cut = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    lengths = torch.tensor([128 if way == "to 128" else max(map(len, batch)) for batch in cut])
    draws = (torch.arange(number) + torch.rand(1000, number, generator=generator)) * len(cut) / number
    draws = draws.long().clamp(max=len(cut) - 1)
    nearest = (lengths[draws].double().mean(1) - lengths.double().mean()).abs().argmin()
    return [padded(cut[i], lengths[i].item()) for i in draws[nearest].tolist()]


def padded(batch, length):
    ids = torch.tensor([row + [0] * (length - len(row)) for row in batch])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in batch])
    labels = torch.arange(len(batch)) % 2
    return {name: t.to(DEVICE) for name, t in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


# The models ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkpoint(model, layers=12):
    """(the folder, the name) of "packaged", the 6-layer BERT, or of "bert-base", its shape with random weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if model == "packaged":
        yield packaged_checkpoint(), "all-MiniLM-L6-v2, 6 layers"
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertModel(BertConfig(num_hidden_layers=layers)).save_pretrained(folder)
        yield Path(folder), "the shape of BERT-base" + (f" with {layers} layers" if layers != 12 else "")


# Measuring ----------------------------------------------------------------------------------------


def alternate(contenders, calls, rounds, size=32):
    """{name: [sentences a second, round by round]}: batch by batch all in turn, and in the other order the next time.

    Args:
        contenders: {name: (a function of a batch, its batches)}. One with fewer batches is called less often.
    """
    seconds = {name: [] for name in contenders}
    for call, its_batches in contenders.values():  # warm up
        call(its_batches[-1])
    forward = True
    for _ in range(rounds):
        spent = dict.fromkeys(contenders, 0.0)
        for i in range(calls):
            for name in list(contenders) if forward else reversed(contenders):
                call, its_batches = contenders[name]
                if i < len(its_batches):
                    start = time.perf_counter()
                    call(its_batches[i])
                    if DEVICE.type == "cuda":
                        torch.cuda.synchronize()
                    spent[name] += time.perf_counter() - start
            forward = not forward
        for name, (_, its_batches) in contenders.items():
            seconds[name].append(spent[name] / len(its_batches[:calls]))
        print(".", end="", flush=True, file=sys.stderr)
    print(file=sys.stderr)
    return {name: [size / each for each in values] for name, values in seconds.items()}


def ratio(rates, over, under):
    """(median, lower quartile, upper quartile) of a ratio, round by round."""
    low, median, high = statistics.quantiles(
        [a / b for a, b in zip(rates[over], rates[under], strict=True)], n=4, method="inclusive"
    )
    return median, low, high


def arithmetic():
    """What results are filed under: the set that the CPU is held to, or what the machine computes in."""
    native, held = lora_utils.detect_compute_format(), os.environ.get("ONEDNN_MAX_CPU_ISA")
    if DEVICE.type == "cuda":
        return "CUDA"
    able = torch.cpu.get_capabilities()
    if held:
        return held
    if native.dtype == torch.bfloat16:
        return "AMX_BF16" if able.get("amx_bf16") else "AVX512_BF16"
    if native.int8 == "onednn":
        return "AVX512_CORE_VNNI" if able.get("avx512_vnni") else "AVX2_VNNI"
    return torch.backends.cpu.get_cpu_capability()


def hold(to):
    """Start this script again with the CPU held to an instruction set, if that is asked for and not so yet."""
    if to and os.environ.get("ONEDNN_MAX_CPU_ISA") != to:
        variables, needed = HELD[to]
        able = torch.cpu.get_capabilities().get(needed)
        if not able or arithmetic() == to:
            print(f"left out: {f'this CPU is {to} as it is' if able else f'this CPU lacks {needed}, and so {to}'}")
            raise SystemExit
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables | {"ONEDNN_MAX_CPU_ISA": to})


def about():
    """The machine class, versions and commit that go with every result."""
    versions = {name: importlib.metadata.version(name) for name in ("peft", "bitsandbytes")}
    versions["cpu"] = torch.cpu.get_capabilities().get("cpu_name", "?")
    machine_class = machine(lora_utils.detect_compute_format().dtype) | versions
    held = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return {"arithmetic": arithmetic(), "held_to": held, "machine": machine_class, "commit": commit()}


def save(file, result):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"saved {file}")
