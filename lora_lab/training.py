"""Train in a way that survives a kill, with one process or several.

A run writes a checkpoint now and then. If it is killed and started again, it resumes from there. On a CPU it
ends with the same bits as a run that was never stopped. With several processes, Accelerate averages the gradients.
"""

import io
import os
import sys
import uuid
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup

from lora_utils import Evaluation, evaluate, wilson_interval


@dataclass
class Run:
    """Hold all that a training needs in order to stop and to resume."""

    model: torch.nn.Module  # to evaluate and to save
    prepared: torch.nn.Module  # the same model, as Accelerate wraps it for training
    loader: DataLoader
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps: int  # of the whole training
    settings: dict  # {name: value} that a checkpoint must agree with
    file: Path  # the checkpoint
    checkpoint_every: int | None  # in steps
    losses: list[float] = field(default_factory=list)  # of every step so far
    rates: list[float] = field(default_factory=list)


def new_run(
    name: str, model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator, learning_rate: float, *,
    epochs: int = 1, warmup: float = 0.06, seed: int = 0, groups: list[dict] | None = None,
    settings: dict | None = None, checkpoint_every: int | None = 50, folder: str | Path = "checkpoints",
) -> Run:  # fmt: skip
    """Prepare a training with AdamW and a learning rate that warms up and then falls linearly to zero.

    Args:
        name: the first part of the checkpoint's file name.
        model: a `LoRABertModel`, a `qLoRABertModel`, or a transformers model that returns a loss.
        loader: training batches, made by `make_loader`.
        warmup: the share of the steps in which the learning rate rises.
        seed: of random numbers in training, such as dropout. Each process adds its index.
        groups: parameter groups for AdamW. None takes every parameter that requires a gradient.
        settings: further {name: value} that a checkpoint must agree with, such as the name of the data.
        checkpoint_every: steps between two checkpoints. None neither writes nor reads one.
        folder: where the checkpoint is written.

    Raises ValueError for epochs or checkpoint_every that are not whole numbers of 1 or more.
    """
    if type(epochs) is not int or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}: it must be a whole number of 1 or more")
    if checkpoint_every is not None and (type(checkpoint_every) is not int or checkpoint_every < 1):
        allowed = "it must be a whole number of 1 or more, or None"
        raise ValueError(f"checkpoint_every is {checkpoint_every!r}: {allowed}")
    accelerator.free_memory()  # otherwise it would keep every model that it has prepared
    trained = groups or [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True)
    steps = epochs * len(loader)
    schedule = get_linear_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    # The schedule is not prepared: a prepared one would step once per process.
    prepared, optimizer = accelerator.prepare(model, optimizer)
    torch.manual_seed(seed + accelerator.process_index)  # each process draws a dropout of its own

    batches = loader.batch_sampler
    required = {
        "run": name,
        "sentences": zlib.crc32(repr(batches.lengths.tolist()).encode()),
        "batch size": batches.batch_size,
        "seed of the batches": batches.seed,
        "epochs": epochs,
        "warmup": warmup,
        "learning rates": [group["initial_lr"] for group in optimizer.param_groups],
        "seed": seed,
        "device": accelerator.device.type,
        "dtype": getattr(model, "model", model).dtype,
        **getattr(model, "options", {}),
        **(settings or {}),
    }
    file = Path(folder) / f"{name}-{zlib.crc32(repr(required).encode()):08x}.pt"
    return Run(model, prepared, loader, accelerator, optimizer, schedule, steps, required, file, checkpoint_every)


def train(run: Run, progress: bool = True):
    """Train to the last step. After an interrupt or a kill, the same call continues where the run stopped.

    A new run resumes from its checkpoint, if there is one. At the end the checkpoint is deleted.
    If a checkpoint cannot be written, a warning says so and the training continues.
    Raises ValueError as `load_checkpoint` does.
    """
    first = run.accelerator.is_main_process
    if run.checkpoint_every and not run.losses and load_checkpoint(run.file, run):
        where = f"{len(run.losses)} steps from {run.file}"
        run.accelerator.print(f"resumes after {where}: delete it to start again")
    run.model.train()
    options = {"desc": "step", "ncols": 80, "file": sys.stdout, "disable": not (progress and first)}
    bar = tqdm(total=run.steps, initial=len(run.losses), **options)
    try:
        with bar:
            while len(run.losses) < run.steps:
                epoch, done = divmod(len(run.losses), len(run.loader))
                run.loader.batch_sampler.set_epoch(epoch, start=done)
                for batch in run.loader:
                    training_step(run, batch)
                    _save_if_due(run)
                    latest = run.losses[-50:]
                    bar.set_postfix(loss=f"{sum(latest) / len(latest):.3f}", refresh=False)
                    bar.update()
        run.optimizer.zero_grad()  # a trained model holds no gradients
        if run.checkpoint_every and first and run.file.is_file():
            run.file.unlink()
    except KeyboardInterrupt:
        where = f"{len(run.losses)} of {run.steps} steps"
        run.accelerator.print(f"stopped after {where}; run this again to go on")


def training_step(run: Run, batch: dict):
    """Do one step: gradients of the mean loss of the whole batch, AdamW's update, the next learning rate."""
    rows, weight = shard_batch(batch, run.accelerator)
    loss = weight * run.prepared(**rows).loss
    run.optimizer.zero_grad()
    run.accelerator.backward(loss)
    # .item() waits for the gradients, so that an interrupt falls before the update.
    mean = run.accelerator.reduce(loss.detach(), "mean").item()
    run.optimizer.step()
    run.losses.append(mean)
    run.rates.append(run.schedule.get_last_lr()[0])
    run.schedule.step()


def shard_batch(batch: dict, accelerator: Accelerator) -> tuple[dict, float]:
    """Return this process's rows of a batch, on its device, and the weight of their mean loss.

        weight = processes · own rows / all rows

    The mean over the processes of (weight · mean of own rows) is then the mean of all rows. Process i of n takes
    the rows i, i + n, ... A process without a row takes the first one with weight 0, because every process must
    take part in each step.
    """
    processes = accelerator.num_processes
    number = len(batch["labels"])
    own = range(number)[accelerator.process_index :: processes]
    weight = processes * len(own) / number
    rows = slice(own.start, None, processes) if own else slice(1)
    return {name: tensor[rows].to(accelerator.device) for name, tensor in batch.items()}, weight


def evaluate_together(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> Evaluation:
    """Evaluate with all processes: each takes some of the batches, and all get the result for all sentences.

    Every sentence is counted once. With one process this is `lora_utils.evaluate`. Give it the model itself, not
    the prepared one, and a loader without shuffling.
    """
    if accelerator.num_processes == 1:
        return evaluate(model, loader)
    batches = list(loader.batch_sampler)[accelerator.process_index :: accelerator.num_processes]
    parts = []  # stays empty if no batch is left for this process
    if batches:
        order = sorted(index for batch in batches for index in batch)
        position = {index: number for number, index in enumerate(order)}  # in this process's part of the data
        own_batches = [[position[index] for index in batch] for batch in batches]
        options = {"collate_fn": loader.collate_fn, "generator": loader.generator}
        part = evaluate(model, DataLoader(Subset(loader.dataset, order), batch_sampler=own_batches, **options))
        parts.append((part, dict(zip(order, part.predictions, strict=True))))
    parts = gather_object(parts)
    n = sum(part.n for part, _ in parts)
    right = sum(round(part.accuracy * part.n) for part, _ in parts)
    loss = sum(part.loss * part.n for part, _ in parts) / n
    predictions = {}
    for _, own in parts:
        predictions.update(own)
    in_order = [predictions[index] for index in sorted(predictions)]
    return Evaluation(right / n, *wilson_interval(right, n), n, loss, in_order)


def save_checkpoint(file: str | Path, run: Run):
    """Write all that a run needs to resume with the same bits. The file is replaced as a whole or not at all.

    It holds the trained parameters, the state of optimizer and schedule, the losses, and the random states of
    all processes, but not the frozen base. All processes must call this. Only the first one writes.
    """
    random_states = gather_object([[module.get_rng_state() for module in _random_modules()]])
    if not run.accelerator.is_main_process:
        return
    checkpoint = {
        "required": _required(run),
        "trained": {name: parameter.detach() for name, parameter in _trained(run).items()},
        "optimizer": run.optimizer.state_dict(),
        "schedule": run.schedule.state_dict(),
        "losses": run.losses,
        "rates": run.rates,
        "random states": random_states,  # [process][module]
    }
    contents = io.BytesIO()
    torch.save(checkpoint, contents)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")  # no other writer has this name
    try:
        with open(temporary, "wb") as opened:
            opened.write(contents.getbuffer())
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)  # still there only after a failure


def load_checkpoint(file: str | Path, run: Run) -> bool:
    """Resume a run from its checkpoint, and return whether there is one.

    All processes must see the same file. Raises ValueError for a file that is damaged or no checkpoint, and for a
    checkpoint with other settings: another base, device, number of processes, optimizer or parameter group. The
    run is then as it was.
    """
    file = Path(file)
    if not file.is_file():
        return False
    saved, checkpoint = _read(file)
    own = _required(run)
    names = saved | own  # in the order of the settings
    for name in names:
        if saved.get(name) != own.get(name):
            values = f"{name}={saved.get(name)}, and this run has {own.get(name)}"
            raise ValueError(f"{file} has {values}: delete it to start again")
    with torch.no_grad():
        for name, parameter in _trained(run).items():
            parameter.copy_(checkpoint["trained"][name])
    run.optimizer.load_state_dict(checkpoint["optimizer"])
    run.schedule.load_state_dict(checkpoint["schedule"])
    run.losses[:] = checkpoint["losses"]
    run.rates[:] = checkpoint["rates"]
    states = checkpoint["random states"][run.accelerator.process_index]
    for module, state in zip(_random_modules(), states, strict=True):
        module.set_rng_state(state)
    return True


def _read(file):
    """Read a checkpoint and compare its checksums, which PyTorch does not."""
    contents = io.BytesIO(file.read_bytes())
    try:
        damaged = zipfile.ZipFile(contents).testzip()
        contents.seek(0)
        checkpoint = torch.load(contents, map_location="cpu", weights_only=True)
        required = checkpoint.pop("required")
    except Exception as error:  # a damaged file can fail in many ways
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{file} is damaged, or no checkpoint of a run ({reason}): delete it to start again") from None
    if damaged:
        raise ValueError(f"{file} is damaged (the checksum of {damaged} is wrong): delete it to start again")
    return required, checkpoint


def _required(run):
    """Return {name: value as text} of all that a run and its checkpoint must have in common."""
    required = dict(run.settings)
    required["base"] = getattr(run.model, "fingerprint", None)
    required["processes"] = run.accelerator.num_processes
    required["random states"] = [module.__name__ for module in _random_modules()]
    required["optimizer"] = type(run.optimizer.optimizer).__name__
    for number, group in enumerate(run.optimizer.param_groups):
        required[f"parameters in group {number}"] = len(group["params"])
        for option in sorted(group.keys() - {"params", "lr"}):  # the schedule changes lr
            required[f"{option} of group {number}"] = group[option]
    for name, parameter in _trained(run).items():
        required[f"trained {name}"] = (parameter.dtype, tuple(parameter.shape))
    return {name: repr(value) for name, value in required.items()}


def _trained(run):
    return {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}


def _random_modules():
    """Return the modules of PyTorch that hold a random state: torch, and the accelerator's module if any."""
    accelerators = [torch.get_device_module()] if torch.accelerator.is_available() else []
    return [torch, *accelerators]


def _save_if_due(run):
    steps = len(run.losses)
    if run.checkpoint_every and steps % run.checkpoint_every == 0 and steps < run.steps:
        try:
            save_checkpoint(run.file, run)
        except OSError as error:  # such as a full disk
            warnings.warn(f"no checkpoint could be written ({error}): the training goes on", stacklevel=3)
