"""Training runs that are stopped, killed, resumed, and shared by processes."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, full_disk
from forked import fork
from in_processes import (
    FULL,
    MODELS,
    interrupt,
    load_training_sentences,
    new_run,
    train_and_evaluate,
)
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

from lora_lab import training
from lora_lab.sources import MOVIE_PHRASES
from lora_lab.training import load_checkpoint, save_checkpoint, shard_batch, train, training_step
from lora_utils import LoRABertModel


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def make_run(bert, accelerator, tmp_path, monkeypatch):
    """Return a function that makes a run of ten steps over 40 sentences. Checkpoints are in the test's folder."""
    monkeypatch.chdir(tmp_path)
    loader = load_training_sentences(40)
    return lambda name="LoRA", **options: new_run(bert, loader, accelerator, name, **options)


def take_a_step(run):
    training_step(run, next(iter(run.loader)))


def state_of(run):
    """Return copies of all tensors that a training changes, and the lists of the run."""
    tensors = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    for number, state in run.optimizer.state_dict()["state"].items():
        for name, tensor in state.items():
            tensors[number, name] = tensor.clone()
    tensors["random state"] = torch.get_rng_state()
    rates = [group["lr"] for group in run.optimizer.param_groups]
    return tensors, [list(run.losses), list(run.rates), rates, run.schedule.last_epoch]


def same(one, other):
    (tensors, lists), (other_tensors, other_lists) = one, other
    names = tensors.keys() | other_tensors.keys()
    return lists == other_lists and all(torch.equal(tensors[name], other_tensors[name]) for name in names)


@pytest.mark.parametrize("name", MODELS)
def test_one_process_trains_with_the_bits_of_a_plain_loop(make_run, name):
    run = make_run(name, dropout=0.3)
    model = make_run(name, dropout=0.3).model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, 10)  # 6 % of 10 steps are none
    losses = []
    rates = []
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
    own = run.optimizer.param_groups[0]["params"]
    assert len(own) == len(trained) and all(map(torch.equal, own, trained))


def test_an_interrupted_run_goes_on_where_it_stopped(make_run, capsys):
    whole = make_run()
    train(whole)
    end = state_of(whole)
    stopped = make_run()
    undo = interrupt(stopped, at=8)
    train(stopped)
    assert len(stopped.losses) == 7
    assert "stopped after 7 of 10 steps; run this again to go on" in capsys.readouterr().out
    undo()
    train(stopped)
    assert len(whole.losses) == 10
    assert same(state_of(stopped), end)
    train(stopped)
    assert len(stopped.losses) == 10


@pytest.mark.parametrize("name", [*MODELS, FULL])
def test_a_run_that_was_given_up_is_resumed_from_its_checkpoint_with_the_same_bits(make_run, name, capsys):
    whole = make_run(name, dropout=0.3)
    train(whole)
    end = state_of(whole)
    stopped = make_run(name, dropout=0.3)
    interrupt(stopped, at=8)
    train(stopped)
    assert [file.name for file in Path("checkpoints").iterdir()] == [stopped.file.name]

    resumed = make_run(name, seed=99, dropout=0.3)  # the checkpoint replaces what seed 99 drew
    train(resumed)
    assert "resumes after 6 steps" in capsys.readouterr().out
    assert len(resumed.losses) == 10 and same(state_of(resumed), end)
    assert list(Path("checkpoints").iterdir()) == []  # the run has come to its end


def test_without_checkpoints_no_file_is_written_or_read_and_nothing_is_printed(make_run, capsys):
    stopped = make_run()
    interrupt(stopped, at=8)
    train(stopped)
    assert stopped.file.exists()
    capsys.readouterr()
    run = make_run(checkpoint_every=None)
    train(run, progress=False)
    assert capsys.readouterr().out == ""
    assert len(run.losses) == 10 and [*Path("checkpoints").iterdir()] == [stopped.file]


def test_a_checkpoint_is_small_and_does_not_hold_the_base(make_run):
    run = make_run()
    take_a_step(run)
    save_checkpoint(run.file, run)
    trained = [p for p in run.model.parameters() if p.requires_grad]
    values = sum(p.numel() for p in trained)
    headers = 4 * 500 * len(trained) + 20_000  # a value and three states of AdamW for each parameter
    assert run.file.stat().st_size < 3 * 4 * values + headers


def test_another_setting_is_another_run(make_run):
    files = [
        make_run().file,
        make_run(dropout=0.1).file,
        make_run(epochs=3).file,
        make_run(warmup=0.5).file,
        make_run(settings={"data": "others"}).file,
    ]
    assert len(set(files)) == len(files)
    assert make_run().file == files[0]


def refused(file, run, message):
    """Check that the run refuses the file with this message that names it, and stays as it was."""
    before = state_of(run)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(file, run)
    assert str(file) in str(error.value) and "delete it" in str(error.value)
    assert same(state_of(run), before)


def of_another_base(run):
    run.model.fingerprint = "0" * 64


def with_less_trained(run):
    run.model.model.classifier.bias.requires_grad_(False)


def with_another_decay(run):
    run.optimizer.param_groups[0]["weight_decay"] = 0.5


def with_another_group(run):
    run.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3})


def with_another_optimizer(run):
    run.optimizer.optimizer = torch.optim.SGD(run.model.model.classifier.parameters())


def test_a_checkpoint_of_another_run_is_refused_and_the_run_stays_as_it_was(make_run, tmp_path):
    saved = make_run()
    file = tmp_path / "run.pt"
    assert not load_checkpoint(file, saved)
    take_a_step(saved)
    save_checkpoint(file, saved)

    for options, message in [
        ({"settings": {"alpha": 32}}, "alpha=16.0, and this run has 32"),
        ({"settings": {"colour": "red"}}, "colour=None, and this run has 'red'"),
        ({"epochs": 3}, "epochs=2, and this run has 3"),
    ]:
        run = make_run(**options)
        take_a_step(run)
        refused(file, run, message)
    for change, message in [
        (of_another_base, f"base='{saved.model.fingerprint}', and this run has '000"),
        (with_less_trained, r"trained model.classifier.bias=\(torch.float32, \(2,\)\), and this run has None"),
        (with_another_decay, "weight_decay of group 0=0.01, and this run has 0.5"),
        (with_another_group, "parameters in group 1=None, and this run has 1"),
        (with_another_optimizer, "optimizer='AdamW', and this run has 'SGD'"),
    ]:
        run = make_run()
        change(run)
        refused(file, run, message)
    changes = {"device": "'cuda'", "processes": "2", "random states": "['torch', 'torch.cuda']"}
    for name, value in changes.items():
        checkpoint = torch.load(file, weights_only=True)
        checkpoint["required"][name] = value
        torch.save(checkpoint, tmp_path / "other.pt")
        refused(tmp_path / "other.pt", make_run(), f"{name}=")


def test_a_file_that_is_damaged_or_something_else_is_refused_and_the_run_stays_as_it_was(make_run, tmp_path):
    run = make_run()
    take_a_step(run)
    file = tmp_path / "run.pt"
    save_checkpoint(file, run)
    contents = file.read_bytes()

    position = contents.index(run.model.model.classifier.bias.detach().numpy().tobytes())
    flipped = contents[:position] + bytes([contents[position] ^ 1]) + contents[position + 1 :]
    for damaged in (contents[:-5], contents[: len(contents) // 2], flipped, b"", b"some text"):
        file.write_bytes(damaged)
        refused(file, run, "is damaged.*delete it")

    run.model.save_pretrained(tmp_path)
    refused(tmp_path / "adapter_model.safetensors", run, "is damaged.*delete it")
    for other in (run.model.adapter_state(), torch.zeros(1), {"required": Path("run")}):
        torch.save(other, file)
        refused(file, run, "is damaged.*delete it")


def test_a_checkpoint_runs_no_code(make_run, tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    file = tmp_path / "run.pt"
    torch.save({"required": Harmful()}, file)
    refused(file, make_run(), "is damaged.*delete it")
    assert not (tmp_path / "made").exists()


def test_settings_of_every_kind_are_found_again(make_run, tmp_path):
    settings = {"folder": tmp_path, "pair": (1, 2), "tensor": torch.tensor(0.1), "dtype": torch.float32}
    run = make_run(settings=settings)
    take_a_step(run)
    save_checkpoint(run.file, run)
    again = make_run(settings=settings)
    assert again.file == run.file and load_checkpoint(again.file, again)


def test_two_writers_of_one_checkpoint_do_not_disturb_each_other(make_run, monkeypatch):
    one = make_run()
    other = make_run()
    take_a_step(one)
    assert one.file == other.file
    fsync = os.fsync

    def save_the_other_meanwhile(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        save_checkpoint(other.file, other)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", save_the_other_meanwhile)
    save_checkpoint(one.file, one)
    assert [*Path("checkpoints").iterdir()] == [one.file]
    assert load_checkpoint(other.file, other) and other.losses == one.losses


def test_on_a_full_disk_the_training_goes_on_with_a_warning_and_the_last_checkpoint_stays(make_run):
    run = make_run()
    save_checkpoint(run.file, run)
    before = run.file.read_bytes()
    take_a_step(run)
    interrupt(run, at=8)
    with full_disk(room=10_000), pytest.warns(UserWarning, match="no checkpoint could be written .*large"):
        train(run, progress=False)
    assert len(run.losses) == 8
    assert [*Path("checkpoints").iterdir()] == [run.file] and run.file.read_bytes() == before


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"epochs": 0.5}, {"checkpoint_every": 0}, {"checkpoint_every": 2.0}]
)
def test_wrong_numbers_are_refused_by_name(make_run, options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}: it must be a whole number of 1 or more"):
        make_run(**options)


def test_a_learning_rate_of_its_own_for_b_survives_a_checkpoint(make_run, accelerator):
    def loraplus():
        model = make_run().model
        B = [p for name, p in model.named_parameters() if name.endswith("lora_B")]
        rest = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith("lora_B")]
        groups = [{"params": B, "lr": 4e-3}, {"params": rest}]
        return training.new_run("plus", model, make_run().loader, accelerator, 1e-3, groups=groups)

    run = loraplus()
    take_a_step(run)
    save_checkpoint(run.file, run)
    again = loraplus()
    assert load_checkpoint(again.file, again)
    rates = [group["lr"] for group in again.optimizer.param_groups]
    assert rates == [group["lr"] for group in run.optimizer.param_groups]
    assert rates[0] == 4 * rates[1] > 0


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_take_each_row_once_and_their_weighted_mean_is_that_of_the_batch(rows, processes):
    losses = torch.rand(rows)
    taken = []
    means = []
    for index in range(processes):
        process = SimpleNamespace(process_index=index, num_processes=processes, device="cpu")
        own, weight = shard_batch({"labels": losses}, process)
        assert len(own["labels"])  # every process has something to compute
        if weight:
            taken += own["labels"].tolist()
        means.append(weight * own["labels"].mean())
    assert sorted(taken) == sorted(losses.tolist())
    torch.testing.assert_close(sum(means) / processes, losses.mean())


def run_script(folder, script, *options, processes=1, **environment):
    """Run a Python script in this folder, with torchrun for several processes. Return what it prints."""
    launch = []
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, *map(str, (script, *options))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def two_processes(bert, tmp_path_factory):
    """What both of two processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("processes")
    script = ROOT / "tests" / "in_processes.py"
    out = run_script(folder, script, bert, folder, processes=2, PYTHONPATH=str(ROOT))
    return [json.loads((folder / f"{index}.json").read_text(encoding="utf-8")) for index in range(2)], out


@pytest.fixture(scope="module")
def one_process(bert, accelerator, tmp_path_factory):
    os.chdir(tmp_path_factory.mktemp("process"))
    yield train_and_evaluate(bert, accelerator)
    os.chdir(ROOT)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one_does(two_processes, one_process, name):
    (first, second), _ = two_processes
    assert first["processes"] == 2 and first[name] == second[name]
    torch.testing.assert_close(first[name]["losses"], one_process[name]["losses"], atol=1e-5, rtol=1e-5)
    for parameter, values in one_process[name]["trained"].items():
        torch.testing.assert_close(first[name]["trained"][parameter], values, atol=1e-4, rtol=1e-3)


SENTENCES = {"evaluation": 37, "one batch": 5}  # with one batch, the second process has none
EVALUATIONS = [(name, what) for name in MODELS for what in SENTENCES] + [("both labels", "evaluation")]


@pytest.mark.parametrize("name, what", EVALUATIONS)
def test_two_processes_count_every_sentence_once_in_the_order_of_the_data(two_processes, one_process, name, what):
    *numbers, expected_loss, predictions = one_process[name][what]
    assert numbers[-1] == len(predictions) == SENTENCES[what] and (name in MODELS or set(predictions) == {0, 1})
    for results in two_processes[0]:
        *found, loss, found_predictions = results[name][what]
        assert found == numbers and found_predictions == predictions
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        assert results[name]["in training"] and results["random state kept"]


def test_one_process_prints_and_writes(two_processes):
    (first, second), out = two_processes
    assert first["written"] > 0 and second["written"] == 0
    assert out.count("stopped after 7 of 12 steps") == 1 and out.count("resumes after 6 steps") == 1


def test_two_processes_resume_each_with_its_own_random_state(two_processes):
    first, second = two_processes[0]
    assert first["random"] != second["random"]
    for results in (first, second):
        assert len(results["whole"]) == 12 and results["resumed"] == results["whole"]


def test_two_processes_refuse_the_checkpoint_of_one(two_processes):
    for results in two_processes[0]:
        message, unchanged = results["refused"]
        assert "processes=1, and this run has 2: delete it" in message and unchanged


@pytest.mark.slow
def test_the_script_for_several_processes_says_once_in_two_what_it_says_in_one(bert, tokenizer, tmp_path):
    shutil.copytree(bert, tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    options = ["--model", tmp_path / "bert", "--data", MOVIE_PHRASES, "--sentences", "65"]
    numbers = []
    for processes in (1, 2):
        out = run_script(tmp_path, ROOT / "tools" / "several_processes.py", *options, processes=processes)
        assert out.count("Model:") == out.count("Data:") == 1
        [loss] = re.findall(r"^loss: (0\.\d+) in the first step, (0\.\d+) in the last 3$", out, re.MULTILINE)
        [accuracy] = re.findall(r"^Validation accuracy, LoRA: ([\d.]+)% \(.* n = 706\)$", out, re.MULTILINE)
        numbers.append([*map(float, loss), float(accuracy) / 100])
    assert numbers[0] == pytest.approx(numbers[1], abs=0.01)  # not the same bits, most of all in bfloat16


def train_and_save(bert, folder):
    """Train with checkpoints, and save an adapter in every step. This is what the test kills."""
    os.chdir(folder)
    run = new_run(bert, load_training_sentences(320), Accelerator(cpu=True), dropout=0.2, epochs=6)
    run.model.register_forward_pre_hook(lambda model, arguments: run.model.save_pretrained("adapter"))
    Path("started").touch()
    train(run)
    run.model.save_pretrained("adapter")
    Path("losses.json").write_text(json.dumps(run.losses))


@pytest.mark.slow
def test_killed_at_20_random_moments_a_run_ends_with_the_bits_of_one_that_was_not(bert, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.perf_counter()
    fork(train_and_save, bert, whole).join()
    seconds = time.perf_counter() - start

    folder = tmp_path / "killed"
    folder.mkdir()
    chance = random.Random(0)
    kills = 0
    found = set()
    while not (folder / "losses.json").exists():
        process = fork(train_and_save, bert, folder)
        if kills < 20:
            while process.is_alive() and not (folder / "started").exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, seconds / 60))
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
    assert kills == 20 and len(found) == 2  # there was a checkpoint to resume from, and an adapter
    assert (folder / "losses.json").read_text() == (whole / "losses.json").read_text()
    adapter, expected = (load_file(end / "adapter" / "adapter_model.safetensors") for end in (folder, whole))
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], expected[name]) for name in adapter)
