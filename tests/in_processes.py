"""Train in two processes for tests/test_running.py: torchrun in_processes.py model-folder output-folder."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from transformers import AutoTokenizer, BertForSequenceClassification

from lora_lab import training
from lora_lab.sources import MOVIE_PHRASES, load_sst2, packaged_checkpoint
from lora_utils import LoRABertModel, make_loader, qLoRABertModel

MODELS = {"LoRA": LoRABertModel, "q-LoRA": qLoRABertModel}
FULL = "full fine-tuning"


def new_run(bert, loader, accelerator, name="LoRA", seed=0, dropout=0.0, **options):
    """Prepare a run of two epochs with a checkpoint every 3 steps. The seed is that of the weights."""
    torch.manual_seed(seed)
    if name == FULL:
        model = BertForSequenceClassification.from_pretrained(bert, hidden_dropout_prob=dropout)
    else:
        model = MODELS[name](str(bert), dtype=torch.float32, dropout=dropout)
    options = {"epochs": 2, "checkpoint_every": 3, **options}
    return training.new_run(name, model, loader, accelerator, 1e-3, **options)


def load_training_sentences(number):
    """Return a shuffled loader of so many training sentences in batches of 8."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    data = load_sst2(str(MOVIE_PHRASES), announce=False)
    return make_loader(data["train"].select(range(number)), tokenizer, batch_size=8, shuffle=True)


def load_validation_sentences(number):
    """Return a loader of so many validation sentences in batches of 8."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    data = load_sst2(str(MOVIE_PHRASES), announce=False)
    return make_loader(data["validation"].select(range(number)), tokenizer, batch_size=8)


def train_and_evaluate(bert, accelerator):
    """Return losses, trained values and evaluations of both models. The last batch holds one sentence of 41."""
    loader = load_training_sentences(41)
    results = {}
    for name in MODELS:
        run = new_run(bert, loader, accelerator, name)
        training.train(run)
        trained = {n: p.detach() for n, p in run.model.named_parameters() if p.requires_grad}
        results[name] = {
            "losses": run.losses,
            "trained": {n: values.flatten().tolist() for n, values in trained.items()},
            "evaluation": training.evaluate_together(run.model, load_validation_sentences(37), accelerator),
            "one batch": training.evaluate_together(run.model, load_validation_sentences(5), accelerator),
            "in training": run.model.training,
        }
    torch.manual_seed(4)  # these weights give both labels
    model = LoRABertModel(str(bert), dtype=torch.float32).train()
    before = torch.get_rng_state()
    evaluation = training.evaluate_together(model, load_validation_sentences(37), accelerator)
    results["both labels"] = {"evaluation": evaluation, "in training": model.training}
    results["random state kept"] = torch.equal(torch.get_rng_state(), before)
    return results


def interrupt(run, at):
    """Interrupt the run in forward pass number `at`. Call what this returns to stop that."""
    calls = []

    def forward(model, arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    return run.model.register_forward_pre_hook(forward).remove


def stop_and_resume(bert, accelerator):
    """Return the losses of a run in one go and of one that was resumed. Each process draws its own dropout."""
    loader = load_training_sentences(41)
    whole = new_run(bert, loader, accelerator, dropout=0.3)
    training.train(whole)
    stopped = new_run(bert, loader, accelerator, dropout=0.3)
    interrupt(stopped, at=8)
    training.train(stopped)
    # The checkpoint replaces what seed 99 drew.
    resumed = new_run(bert, loader, accelerator, seed=99, dropout=0.3)
    training.train(resumed)
    random_state = torch.rand(1).item()
    return {"whole": whole.losses, "resumed": resumed.losses, "random": random_state}


def refuse_another_number_of_processes(bert, accelerator, out):
    """Return the message for a checkpoint of one process, and whether the run stayed as it was."""
    run = new_run(bert, load_training_sentences(41), accelerator)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    file = Path(out, "another.pt")
    training.save_checkpoint(file, run)
    if accelerator.is_main_process:
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["required"]["processes"] = "1"
        torch.save(checkpoint, file)
    accelerator.wait_for_everyone()
    try:
        training.load_checkpoint(file, run)
    except ValueError as error:
        return str(error), all(map(torch.equal, before, run.model.parameters()))


def main(bert, out, accelerator):
    written = []
    replace = os.replace
    os.replace = lambda *files: written.append(files) or replace(*files)
    results = train_and_evaluate(bert, accelerator)
    results |= stop_and_resume(bert, accelerator)
    results["written"] = len(written)
    results["processes"] = accelerator.num_processes
    results["refused"] = refuse_another_number_of_processes(bert, accelerator, out)
    Path(out, f"{accelerator.process_index}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    main(*sys.argv[1:], accelerator)
    # The wrapped models must be freed before the group of processes ends. If they were the last to hold it, they
    # would end it while they hold Python's lock. A thread of the group may wait for that lock, and neither would end.
    accelerator.free_memory()
    accelerator.end_training()
