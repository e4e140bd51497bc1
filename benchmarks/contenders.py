"""Build what the benchmarks of speed and memory compare: a training step or a prediction, ours and the peers'.

A `Way` says how, and `Contender` builds it. `sentences` draws the sentences, the same for all, and `batches` puts them
into batches in the order of each way. `alternate` times the contenders in turn.
"""

import contextlib
import itertools
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from machine import DEVICE
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel, BitsAndBytesConfig

import lora_utils
from lora_lab.sources import load_sst2, packaged_checkpoint

# How many of SST-2's training phrases have 0, 1, 2, ... tokens, for where SST-2 is not at hand.
SST2_LENGTHS = [0, 0, 0, 1978, 5323, 6064, 5345, 4749, 4155, 3713, 3267, 2947, 2650, 2413, 2138, 1950, 1777]
SST2_LENGTHS += [1661, 1515, 1373, 1285, 1132, 1106, 1046, 909, 820, 806, 733, 692, 628, 538, 491, 442, 448, 400]
SST2_LENGTHS += [337, 304, 286, 242, 195, 203, 192, 155, 148, 130, 89, 82, 85, 73, 55, 42, 50, 40, 36, 19, 21]
SST2_LENGTHS += [22, 15, 8, 6, 3, 2, 5, 5, 1, 2, 2]


@dataclass(frozen=True)
class Way:
    """One way to train or predict.

    who: "ours", "PEFT", "transformers" (full fine-tuning, or a plain prediction), or "torch.ao" (its dynamic int8).
    batches: "similar length", "random" (each padded to its longest), or "to 128" (random, padded to 128 tokens).
    base: of the frozen weights None (as they are), 8 or 4 bits: bitsandbytes' for PEFT, ours for ours.
    bits: of A and B, ours; None is unquantised LoRA.
    stored: "float32", or "native": bfloat16 where the machine computes in it.
    autocast: to bfloat16 where the machine computes in it.
    """

    who: str
    batches: str = "similar length"
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


class Contender:
    """Hold a model that was built in one `Way`: `step(batch)` trains it once, `predict(batch)` asks it for logits."""

    def __init__(self, way, folder, training=True):
        self.way, self.native = way, lora_utils.detect_compute_format().dtype
        self.dtype = self.native if way.stored == "native" else torch.float32
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = (self._ours if way.who == "ours" else self._peers)(folder).to(DEVICE)
        self.model.train(training)
        self.call = torch.compile(self.model) if way.compiled else self.model
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=way.fused) if training else None

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
            bits = {"load_in_8bit": True}
            if self.way.base == 4:
                bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
                bits["bnb_4bit_compute_dtype"] = self.native
            config = BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **bits)
            options |= {"quantization_config": config, "device_map": {"": DEVICE}}
        model = BertForSequenceClassification.from_pretrained(folder, **options)
        if self.way.who == "torch.ao":
            model = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear}, dtype=torch.qint8)
        if self.way.who != "PEFT":
            return model
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        if self.way.base:  # without checkpointing, which would make it slower still
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        options = {"r": self.way.rank, "lora_alpha": 2 * self.way.rank, "target_modules": ["query", "value"]}
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options))

    def step(self, batch):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.way.autocast and self.native == torch.bfloat16):
            output = self.call(**batch)
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.inference_mode()
    def predict(self, batch):
        self.call(**{name: tensor for name, tensor in batch.items() if name != "labels"})


# The sentences ------------------------------------------------------------------------------------


def sentences(data, number=32 * lora_utils.LengthGroupedBatches.WINDOW, seed=0):
    """Draw from SST-2's training phrases, or from movie_phrases. Return (lists of token ids, the name of the data).

    movie_phrases' own phrases are all short. Their words are cut into pieces as long as SST-2's phrases are.
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


def batches(ids, way, number):
    """Draw `number` of the batches that a way makes of the sentences, as long on the mean as all of them.

    All ways start from the same sentences, but a few batches cannot hold the same ones in every way. So the
    batches are cut into `number` parts, and one of each is drawn. We take the one of a thousand draws whose mean
    length is nearest to that of all.
    """
    generator = torch.Generator().manual_seed(0)
    if way == "similar length":
        ordered = sorted(ids, key=len)
    else:
        ordered = [ids[i] for i in torch.randperm(len(ids), generator=generator).tolist()]
    cut = [ordered[i : i + 32] for i in range(0, len(ordered), 32)]
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


@contextlib.contextmanager
def checkpoint(model):
    """Return (folder, name) of "packaged", the 6-layer BERT, or of "bert-base", its shape with random weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if model == "packaged":
        yield packaged_checkpoint(), "all-MiniLM-L6-v2, 6 layers"
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        BertModel(BertConfig()).save_pretrained(folder)
        yield Path(folder), "the shape of BERT-base"


def alternate(contenders, calls, rounds, size=32):
    """Time {name: (a function of a batch, its batches)} in turn, and in the opposite order with the next batch.

    Returns {name: [sentences per second, round by round]}. One with fewer batches is called less often.
    """
    rates = {name: [] for name in contenders}
    for call, its_batches in contenders.values():  # warm up
        call(its_batches[-1])
    for done in range(rounds):
        spent = dict.fromkeys(contenders, 0.0)
        for i in range(calls):
            forward = (done * calls + i) % 2 == 0
            for name in list(contenders) if forward else reversed(contenders):
                call, its_batches = contenders[name]
                if i < len(its_batches):
                    start = time.perf_counter()
                    call(its_batches[i])
                    if DEVICE.type == "cuda":
                        torch.cuda.synchronize()
                    spent[name] += time.perf_counter() - start
        for name, (_, its_batches) in contenders.items():
            rates[name].append(size * len(its_batches[:calls]) / spent[name])
        print(".", end="" if done + 1 < rounds else "\n", flush=True, file=sys.stderr)
    return rates
