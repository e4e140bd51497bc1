"""Training runs that are stopped, killed, resumed, and shared by processes.

Two processes run this file itself: torchrun test_running.py model-folder output-folder.
"""

import argparse
import copy
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several_processes
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from conftest import before_next_fsync, full_disk, refused
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, BertForSequenceClassification, get_linear_schedule_with_warmup

from lora_lab import training
from lora_lab.sources import MOVIE_PHRASES, load_sst2, packaged_checkpoint
from lora_lab.training import evaluate_together, load_checkpoint, save_checkpoint, train
from lora_utils import LoRABertModel, make_loader, qLoRABertModel

MODELS = {"LoRA": LoRABertModel, "q-LoRA": qLoRABertModel}
FULL = "full fine-tuning"
PLUS = "LoRA+"  # B has a learning rate of its own
# It imports the libraries once, because that takes long. It computes nothing, so a fork loses no thread of PyTorch.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["accelerate", "datasets", "pytest", "torch", "transformers"])


def load_sentences(number, split="train", batch_size=8):
    """Return a loader of so many sentences. Training sentences are shuffled."""
    tokenizer = AutoTokenizer.from_pretrained(packaged_checkpoint())
    data = load_sst2(str(MOVIE_PHRASES), announce=False)[split].select(range(number))
    return make_loader(data, tokenizer, batch_size, shuffle=split == "train")


def new_run(bert, loader, accelerator, name="LoRA", seed=0, dropout=0.0, **options):
    """Prepare a run of two epochs with a checkpoint every 3 steps. The seed is that of the weights."""
    torch.manual_seed(seed)
    if name == FULL:
        model = BertForSequenceClassification.from_pretrained(bert, hidden_dropout_prob=dropout)
    else:
        model = MODELS.get(name, LoRABertModel)(str(bert), dtype=torch.float32, dropout=dropout)
    options = {"epochs": 2, "checkpoint_every": 3, **options}
    if name == PLUS:
        layers = model.lora_layers().values()
        options["groups"] = [{"params": [layer.lora_B for layer in layers], "lr": 4e-3}]
        options["groups"].append({"params": [layer.lora_A for layer in layers]})
    return training.new_run(name, model, loader, accelerator, 1e-3, **options)


def interrupt(run, at):
    """Interrupt the run in forward pass number `at`."""
    passes = itertools.count(1)

    def forward(model, arguments):
        if next(passes) == at:
            raise KeyboardInterrupt

    run.model.register_forward_pre_hook(forward)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def make_run(bert, accelerator, tmp_path, monkeypatch):
    """Return a function that makes a run of ten steps over 40 sentences. Checkpoints are in the test's folder."""
    monkeypatch.chdir(tmp_path)
    loader = load_sentences(40)
    return lambda name="LoRA", **options: new_run(bert, loader, accelerator, name, **options)


def save_after_a_step(run, file=None):
    training.training_step(run, next(iter(run.loader)))
    save_checkpoint(file or run.file, run)


def head_of(run):
    return run.model.model.classifier


def trained(run):
    return {name: p.detach() for name, p in run.model.named_parameters() if p.requires_grad}


def state_of(run):
    """Return a copy of all that a training changes."""
    rates = [group["lr"] for group in run.optimizer.param_groups]
    numbers = [run.losses, run.rates, rates, [run.schedule.last_epoch]]
    return copy.deepcopy([trained(run), run.optimizer.state_dict()["state"], torch.get_rng_state(), numbers])


def check_state(run, expected):
    assert_close(state_of(run), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_one_process_trains_with_the_bits_of_a_plain_loop(make_run, name):
    run = make_run(name, dropout=0.3)
    model = make_run(name, dropout=0.3).model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 10)  # 6 % of 10 steps are none
    losses, rates = [], []
    model.train()
    for epoch in range(2):
        run.loader.batch_sampler.set_epoch(epoch)
        for batch in run.loader:
            loss = model(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()

    torch.manual_seed(0)  # as new_run does
    train(run)
    assert run.losses == losses and run.rates == rates
    assert all(map(torch.equal, trained(run).values(), parameters))


@pytest.mark.parametrize("name", [*MODELS, PLUS, FULL])
def test_a_stopped_run_ends_with_the_same_bits_in_its_process_or_from_its_checkpoint_or_anew(make_run, name, capsys):
    whole = make_run(name, dropout=0.3)
    train(whole)
    end = state_of(whole)
    stopped = make_run(name, dropout=0.3)
    interrupt(stopped, at=8)
    train(stopped)
    assert len(stopped.losses) == 7 and [*Path("checkpoints").iterdir()] == [stopped.file]
    assert "stopped after 7 of 10 steps; run this again to go on" in capsys.readouterr().out
    rates = [group["lr"] for group in stopped.optimizer.param_groups]
    assert rates[0] == (4 if name == PLUS else 1) * rates[-1] > 0
    checkpoint = stopped.file.read_bytes()
    train(stopped)
    check_state(stopped, end)
    train(stopped)
    assert len(stopped.losses) == 10 and capsys.readouterr()

    stopped.file.write_bytes(checkpoint)
    anew = make_run(name, dropout=0.3, checkpoint_every=None)  # it reads and writes no checkpoint
    train(anew, progress=False)
    check_state(anew, end)
    assert capsys.readouterr().out == "" and stopped.file.read_bytes() == checkpoint
    resumed = make_run(name, seed=99, dropout=0.3)  # the checkpoint replaces what seed 99 drew
    train(resumed)
    check_state(resumed, end)
    assert "resumes after 6 steps" in capsys.readouterr().out
    assert [*Path("checkpoints").iterdir()] == []  # the run has come to its end


def test_a_checkpoint_is_small_and_found_by_settings_of_every_kind_and_by_no_others(make_run, tmp_path):
    settings = {"folder": tmp_path, "pair": (1, 2), "tensor": torch.tensor(0.1), "dtype": torch.float32}
    run = make_run(settings=settings)
    save_after_a_step(run)
    values = sum(tensor.numel() for tensor in trained(run).values())
    headers = 4 * 500 * len(trained(run)) + 20_000  # a value and three states of AdamW for each parameter
    assert run.file.stat().st_size < 3 * 4 * values + headers
    again = make_run(settings=settings)
    assert again.file == run.file and load_checkpoint(again.file, again)

    others = [{}, {"dropout": 0.1}, {"epochs": 3}, {"warmup": 0.5}, {"settings": {"data": "others"}}]
    files = {make_run(**options).file for options in others}
    assert len(files | {run.file}) == len(others) + 1


def checkpoint_refused(file, run, message):
    """Check that the run refuses the file with this message that names it, and stays as it was."""
    before = state_of(run)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(file, run)
    assert str(file) in str(error.value) and "delete it" in str(error.value)
    check_state(run, before)


# How a run is changed, and what then differs from the checkpoint's run.
CHANGES = {
    "base='.*', and this run has '000'": lambda run: setattr(run.model, "fingerprint", "000"),
    "trained model.classifier.bias=.*, and this run has None": lambda run: head_of(run).bias.requires_grad_(False),
    "weight_decay of group 0=0.01": lambda run: run.optimizer.param_groups[0].update(weight_decay=0.5),
    "parameters in group 0=10, and this run has 9": lambda run: run.optimizer.param_groups[0]["params"].pop(),
    "'AdamW', .* has 'SGD'": lambda run: setattr(run.optimizer, "optimizer", torch.optim.SGD([head_of(run).bias])),
}


def test_a_checkpoint_of_another_run_is_refused_and_the_run_stays_as_it_was(make_run, tmp_path):
    saved = make_run()
    file = tmp_path / "run.pt"
    assert not load_checkpoint(file, saved)
    save_after_a_step(saved, file)
    for options, message in [
        ({"settings": {"alpha": 32}}, "alpha=16.0, and this run has 32"),
        ({"settings": {"colour": "red"}}, "colour=None, and this run has 'red'"),
        ({"epochs": 3}, "epochs=2, and this run has 3"),
    ]:
        checkpoint_refused(file, make_run(**options), message)
    for message, change in CHANGES.items():
        run = make_run()
        change(run)
        checkpoint_refused(file, run, message)
    for name, value in {"device": "'cuda'", "processes": "2", "random states": "['torch', 'torch.cuda']"}.items():
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["required"][name] = value
        torch.save(checkpoint, tmp_path / "other.pt")
        checkpoint_refused(tmp_path / "other.pt", saved, f"{name}=")


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("made",)


def test_a_file_that_is_damaged_or_something_else_is_refused_and_runs_no_code(make_run, tmp_path):
    run = make_run()
    file = tmp_path / "run.pt"
    save_after_a_step(run, file)
    contents = file.read_bytes()
    position = contents.index(head_of(run).bias.detach().numpy().tobytes())
    flipped = contents[:position] + bytes([contents[position] ^ 1]) + contents[position + 1 :]
    for damaged in (contents[:-5], contents[: len(contents) // 2], flipped, b"", b"some text"):
        file.write_bytes(damaged)
        checkpoint_refused(file, run, "is damaged")

    run.model.save_pretrained(tmp_path)
    checkpoint_refused(tmp_path / "adapter_model.safetensors", run, "is damaged")
    for other in (run.model.adapter_state(), torch.zeros(1), {"required": Path("run")}, {"required": Harmful()}):
        torch.save(other, file)
        checkpoint_refused(file, run, "is damaged")
    assert not Path("made").exists()


def test_two_writers_of_one_checkpoint_do_not_disturb_each_other(make_run, monkeypatch):
    one, other = make_run(), make_run()
    assert one.file == other.file
    before_next_fsync(monkeypatch, lambda: save_checkpoint(other.file, other))
    save_after_a_step(one)
    assert [*Path("checkpoints").iterdir()] == [one.file]
    assert load_checkpoint(other.file, other) and other.losses == one.losses


def test_on_a_full_disk_the_training_goes_on_with_a_warning_and_the_last_checkpoint_stays(make_run):
    run = make_run()
    save_after_a_step(run)
    before = run.file.read_bytes()
    interrupt(run, at=8)
    with full_disk(room=10_000), pytest.warns(UserWarning, match="no checkpoint could be written .*large"):
        train(run, progress=False)
    assert len(run.losses) == 8
    assert [*Path("checkpoints").iterdir()] == [run.file] and run.file.read_bytes() == before


def test_wrong_numbers_are_refused_by_name(make_run):
    for name, value in itertools.product(("epochs", "checkpoint_every"), (0, 2.0)):
        refused(f"{name} is {value}: it must be a whole number of 1 or more", make_run, **{name: value})


def train_and_evaluate(bert, accelerator):
    """Return what is trained and evaluated. Of 43 sentences in batches of 7, one is left for the last batch."""
    results = {}
    for name in MODELS:
        run = new_run(bert, load_sentences(43, batch_size=7), accelerator, name)
        train(run)
        values = {parameter: tensor.flatten().tolist() for parameter, tensor in trained(run).items()}
        results[name] = {"losses": run.losses} | values
    torch.manual_seed(4)  # these weights give both labels
    model = LoRABertModel(str(bert), dtype=torch.float32).train()
    before = torch.get_rng_state()
    results["evaluations"] = [evaluate_together(model, load_sentences(n, "validation"), accelerator) for n in (37, 5)]
    results["unchanged"] = model.training and torch.equal(torch.get_rng_state(), before)
    return results


def main(bert, out, accelerator):
    """Train, evaluate, and compare a run in one go with one that was resumed. Each process draws its own dropout."""
    written = []
    replace = os.replace
    os.replace = lambda *files: written.append(files) or replace(*files)
    results = train_and_evaluate(bert, accelerator)
    for name, seed in {"whole": 0, "stopped": 0, "resumed": 99}.items():  # the checkpoint replaces what seed 99 drew
        run = new_run(bert, load_sentences(41), accelerator, seed=seed, dropout=0.3)
        if name == "stopped":
            interrupt(run, at=8)
        train(run)
        results[name] = run.losses
    results |= {"random": torch.rand(1).item(), "written": len(written), "processes": accelerator.num_processes}
    Path(out, f"{accelerator.process_index}.json").write_text(json.dumps(results), encoding="utf-8")


def in_two_processes(folder, script, *options):
    """Run a Python script in this folder with torchrun. Return what it prints."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launch, *map(str, (script, *options))]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_two_processes_train_evaluate_and_resume_as_one_does(bert, accelerator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = train_and_evaluate(bert, accelerator)
    out = in_two_processes(tmp_path, __file__, bert, tmp_path)
    first, second = (json.loads(Path(f"{index}.json").read_text(encoding="utf-8")) for index in range(2))
    for name in MODELS:
        assert first[name] == second[name]
        assert_close(first[name], expected[name], atol=1e-4, rtol=1e-3)
        assert_close(first[name]["losses"], expected[name]["losses"], atol=1e-5, rtol=1e-5)
    many, few = expected["evaluations"]  # few make one batch, so the second process has none
    assert len(many.predictions) == 37 and set(many.predictions) == {0, 1} and few.n == 5
    for results in (expected, first, second):
        assert results["unchanged"]
        assert_close(results["evaluations"], [many, few], atol=1e-5, rtol=0)

    assert first["written"] > 0 and second["written"] == 0
    assert out.count("stopped after 7 of 12 steps") == 1 and out.count("resumes after 6 steps") == 1
    assert first["random"] != second["random"]  # each process has its own random state
    for results in (first, second):
        assert results["processes"] == 2 and len(results["whole"]) == 12 and results["resumed"] == results["whole"]


@pytest.mark.slow
def test_the_script_for_several_processes_says_once_in_two_what_it_says_in_one(
    bert, tokenizer, accelerator, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bert, "bert")
    tokenizer.save_pretrained("bert")
    options = {"model": "bert", "data": str(MOVIE_PHRASES), "sentences": 65}
    several_processes.main(accelerator, argparse.Namespace(**options, seed=0))
    arguments = [f"--{name}={value}" for name, value in options.items()]
    numbers = []
    for out in (capsys.readouterr().out, in_two_processes(tmp_path, several_processes.__file__, *arguments)):
        assert out.count("Model:") == out.count("Data:") == 1
        [loss] = re.findall(r"^loss: (0\.\d+) in the first step, (0\.\d+) in the last 3$", out, re.MULTILINE)
        [accuracy] = re.findall(r"^Validation accuracy, LoRA: ([\d.]+)% \(.* n = 706\)$", out, re.MULTILINE)
        numbers.append([*map(float, loss), float(accuracy) / 100])
    assert numbers[0] == pytest.approx(numbers[1], abs=0.01)  # not the same bits, most of all in bfloat16


def train_and_save(bert, folder):
    """Train with checkpoints, and save an adapter in every step. This is what the test kills."""
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    run = new_run(bert, load_sentences(320), Accelerator(cpu=True), dropout=0.2)
    run.model.register_forward_pre_hook(lambda model, arguments: run.model.save_pretrained("adapter"))
    Path("started").touch()
    train(run)
    run.model.save_pretrained("adapter")
    Path("losses.json").write_text(json.dumps(run.losses))


@pytest.mark.slow
def test_killed_at_8_random_moments_a_run_ends_with_the_bits_of_one_that_was_not(bert, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    process = FORKSERVER.Process(target=train_and_save, args=(bert, whole))
    process.start()
    process.join()
    seconds = (whole / "losses.json").stat().st_mtime - (whole / "started").stat().st_mtime

    chance = random.Random(0)
    kills = 0
    found = set()
    while not (folder / "losses.json").exists():
        process = FORKSERVER.Process(target=train_and_save, args=(bert, folder))
        process.start()
        if kills < 8:
            while process.is_alive() and not (folder / "started").exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, seconds / 12))
            process.kill()
            kills += 1
            (folder / "started").unlink(missing_ok=True)
        process.join()
        assert process.exitcode in (0, -9)
        for file in folder.glob("checkpoints/*.pt"):
            torch.load(file, weights_only=True)
            found.add(file)
        if (folder / "adapter").exists():
            LoRABertModel.from_pretrained(folder / "adapter")
            found.add(folder / "adapter")
    assert kills == 8 and len(found) == 2  # there was a checkpoint to resume from, and an adapter
    assert (folder / "losses.json").read_text() == (whole / "losses.json").read_text()
    adapters = [load_file(end / "adapter" / "adapter_model.safetensors") for end in (folder, whole)]
    assert_close(*adapters, rtol=0, atol=0)


if __name__ == "__main__":
    handler = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    main(*sys.argv[1:], accelerator)
    # The wrapped models must be freed before the group of processes ends. If they were the last to hold it, they
    # would end it while they hold Python's lock. A thread of the group may wait for that lock, and neither would end.
    accelerator.free_memory()
    accelerator.end_training()
