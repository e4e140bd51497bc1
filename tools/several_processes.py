"""Train LoRA in several processes and evaluate it: torchrun --nproc-per-node=2 tools/several_processes.py"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from transformers import AutoTokenizer

from lora_lab.sources import find_model, load_sst2
from lora_lab.training import evaluate_together, new_run, train
from lora_utils import LoRABertModel, make_loader


def main(accelerator, options):
    """Train for one epoch. Each process takes some rows of each batch, and the gradients are averaged."""
    checkpoint = find_model(options.model, announce=accelerator.is_main_process)
    data = load_sst2(options.data, announce=accelerator.is_main_process)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    sentences = data["train"].select(range(min(options.sentences, len(data["train"]))))
    loader = make_loader(sentences, tokenizer, shuffle=True, seed=options.seed)

    torch.manual_seed(options.seed)
    model = LoRABertModel(checkpoint.name, folder=checkpoint.folder)
    settings = {"data": options.data}
    run = new_run("several", model, loader, accelerator, 2e-3, seed=options.seed, settings=settings)
    train(run)
    latest = run.losses[-50:]
    mean = sum(latest) / len(latest)
    accelerator.print(f"loss: {run.losses[0]:.4f} in the first step, {mean:.4f} in the last {len(latest)}")
    result = evaluate_together(model, make_loader(data["validation"], tokenizer), accelerator)
    accelerator.print(f"Validation accuracy, LoRA: {result}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="auto", help="a hub id, a folder, or auto")
    parser.add_argument("--data", default="auto", help="a folder, sst2, or auto")
    parser.add_argument("--sentences", default=320, type=int)
    parser.add_argument("--seed", default=0, type=int)
    options = parser.parse_args()
    too_few = torch.accelerator.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=too_few, kwargs_handlers=[handler])
    main(accelerator, options)
    accelerator.free_memory()  # the wrapped models must be gone before the group of processes ends
    accelerator.end_training()
