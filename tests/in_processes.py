"""What tests/test_running.py runs in two processes with torchrun: python in_processes.py model-folder output-folder."""

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from conftest import loop_of
from transformers import AutoTokenizer

import lora_utils
from lora_utils import LoRABertModel, evaluate, load_sst2, make_loader, offline_model, qLoRABertModel

MODELS = {"LoRA": LoRABertModel, "q-LoRA": qLoRABertModel}


def a_run(loop, bert, name, seed=0, dropout=0.0):
    torch.manual_seed(seed)
    model = MODELS[name](str(bert), dtype=torch.float32, dropout=dropout)
    return loop.new_run(name, model, 1e-3)


def train_and_evaluate(bert, accelerator, notebook="LoRA_implementation.ipynb"):
    """Losses and evaluations of both models: 41 sentences in batches of 8, so that the last batch holds one."""
    tokenizer = AutoTokenizer.from_pretrained(offline_model())
    data = load_sst2(str(lora_utils.MOVIE_PHRASES))
    loader = make_loader(data["train"].select(range(41)), tokenizer, batch_size=8, shuffle=True)
    validation = make_loader(data["validation"].select(range(37)), tokenizer, batch_size=8)
    loop = loop_of(notebook, accelerator=accelerator, train_loader=loader, print=accelerator.print)
    found = {}
    for name in MODELS:
        run = a_run(loop, bert, name)
        loop.train(run)
        trained = {n: p.detach().flatten().tolist() for n, p in run.model.named_parameters() if p.requires_grad}
        found[name] = {"losses": run.losses, "evaluation": list(evaluate(run.model, validation)), "trained": trained}
    return found, loop, run


def interrupt(run, at):
    """Interrupt a run's forward pass number `at`; call what comes back to stop that."""
    calls = []

    def forward(model, arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    return run.model.register_forward_pre_hook(forward).remove


def killed_and_resumed(loop, bert):
    """Losses of a run in one go, and of one that was given up and taken up again, each process with its own dropout."""
    whole = a_run(loop, bert, "LoRA", dropout=0.3)
    loop.train(whole)
    given_up = a_run(loop, bert, "LoRA", dropout=0.3)
    interrupt(given_up, at=8)
    loop.train(given_up)
    resumed = a_run(loop, bert, "LoRA", seed=99, dropout=0.3)  # what another seed gave it is replaced
    loop.train(resumed)
    return whole.losses, resumed.losses


def default_shards(accelerator):
    """What Accelerate's own shards of 5 things in batches of 2 hold, all processes together."""
    loader = accelerator.prepare(torch.utils.data.DataLoader(range(5), batch_size=2))
    return gather_object([int(thing) for batch in loader for thing in batch])


def steps_of_a_prepared_schedule(accelerator):
    """How often a schedule steps that is prepared, in a training of 6 steps."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer, prepared = accelerator.prepare(optimizer, schedule)
    for _ in range(6):
        weight.grad = torch.zeros(1)
        optimizer.step()
        prepared.step()
    return schedule.last_epoch


def main(bert, out):
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    written, write_whole = [], lora_utils.write_whole
    lora_utils.write_whole = lambda contents: written.extend(contents) or write_whole(contents)
    found, loop, run = train_and_evaluate(bert, accelerator)
    found["whole"], found["resumed"] = killed_and_resumed(loop, bert)
    found["random"] = torch.rand(1).item()
    found |= {"written": len(written), "shards": default_shards(accelerator), "processes": accelerator.num_processes}
    found["schedules"] = run.schedule.last_epoch, steps_of_a_prepared_schedule(accelerator)
    Path(out, f"{accelerator.process_index}.json").write_text(json.dumps(found))
    # What PyTorch wraps models in must not be the last to hold the group of processes: it would end it while it holds
    # Python's lock, which the group's own thread may be waiting for, and neither would ever end.
    del loop, run
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
