"""Training runs that are stopped, killed, taken up again, and shared by processes: the notebooks' own loop."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, loop_of
from forked import fork
from in_processes import MODELS, a_run, interrupt, train_and_evaluate
from safetensors.torch import load_file
from transformers import AutoTokenizer

import lora_utils
from lora_utils import LoRABertModel, load_run, load_sst2, make_loader, my_rows, save_run

NOTEBOOKS = ["LoRA_implementation.ipynb", "qLoRA_implementation.ipynb"]


@pytest.fixture
def loop(tokenizer, tmp_path, monkeypatch, request):
    """The loop of a notebook over 40 sentences in batches of 8, two epochs; checkpoints lie in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    loader = make_loader(load_sst2(lora_utils.MOVIE_PHRASES)["train"].select(range(40)), tokenizer, 8, shuffle=True)
    notebook = getattr(request, "param", NOTEBOOKS[0])
    return loop_of(notebook, accelerator=Accelerator(cpu=True), train_loader=loader)


def bits_of(run):
    trained = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    states = run.optimizer.state_dict()["state"]
    trained |= {(number, name): tensor for number, found in states.items() for name, tensor in found.items()}
    return trained, run.losses, run.rates


def same(one, other):
    (tensors, *lists), (others, *other_lists) = one, other
    names = tensors.keys() | others.keys()
    return lists == other_lists and all(torch.equal(tensors[name], others[name]) for name in names)


@pytest.mark.parametrize("loop", NOTEBOOKS, indirect=True)
def test_a_training_loop_that_is_interrupted_goes_on_where_it_stopped(loop, bert, capsys):
    whole, stopped = a_run(loop, bert, "LoRA"), a_run(loop, bert, "LoRA")
    loop.train(whole)
    undo = interrupt(stopped, at=8)
    loop.train(stopped)
    assert len(stopped.losses) == 7 and "run this cell again" in capsys.readouterr().out
    undo()
    loop.train(stopped)
    assert len(whole.losses) == 10 and same(bits_of(stopped), bits_of(whole))
    loop.train(stopped)
    assert len(stopped.losses) == 10


@pytest.mark.parametrize("loop", NOTEBOOKS, indirect=True)
@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_was_given_up_is_taken_up_from_its_checkpoint_with_the_same_bits(loop, bert, name, capsys):
    whole = a_run(loop, bert, name, dropout=0.3)
    loop.train(whole)
    stopped = a_run(loop, bert, name, dropout=0.3)
    interrupt(stopped, at=8)
    loop.train(stopped)
    assert [file.name for file in Path("checkpoints").iterdir()] == [stopped.file.name]

    resumed = a_run(loop, bert, name, seed=99, dropout=0.3)  # what another seed gave it is replaced
    loop.train(resumed)
    assert "goes on after 6 steps" in capsys.readouterr().out
    assert same(bits_of(resumed), bits_of(whole))
    assert list(Path("checkpoints").iterdir()) == []  # it has come to its end


def test_a_checkpoint_is_small_and_does_not_hold_the_base(loop, bert):
    run = a_run(loop, bert, "LoRA")
    loop.training_step(run, next(iter(run.loader)))
    save_run(run.file, run, run.settings)
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert run.file.stat().st_size < 4 * 3 * trained + 20_000  # values and AdamW's two states, and a header


def test_another_setting_is_another_run(loop, bert):
    one, other = a_run(loop, bert, "LoRA"), a_run(loop, bert, "LoRA", dropout=0.1)
    assert one.file != other.file and a_run(loop, bert, "LoRA").file == one.file


def test_a_checkpoint_that_does_not_belong_to_the_run_is_refused_and_the_run_stays_as_it_was(loop, bert, tmp_path):
    run, file = a_run(loop, bert, "LoRA"), tmp_path / "run.safetensors"
    assert not load_run(file, run, {})
    save_run(file, run, {"rank": 8})
    loop.training_step(run, next(iter(run.loader)))
    before = bits_of(run)
    with pytest.raises(ValueError, match="rank=8, and this run has 16: delete it"):
        load_run(file, run, {"rank": 16})
    other = a_run(loop, bert, "LoRA")
    other.model.fingerprint = "0" * 64
    with pytest.raises(ValueError, match=f"base='{run.model.fingerprint}', and this run has '000"):
        load_run(file, other, {"rank": 8})
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_run(file, run, {"rank": 8})
    run.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no training run"):
        load_run(tmp_path / "adapter_model.safetensors", run, {"rank": 8})
    assert same(bits_of(run), before)


def test_a_learning_rate_of_its_own_for_b_survives_a_checkpoint(loop, bert):
    run = a_run(loop, bert, "LoRA")
    B = [p for name, p in run.model.named_parameters() if name.endswith("lora_B")]
    rest = [p for name, p in run.model.named_parameters() if p.requires_grad and not name.endswith("lora_B")]
    plus, again = (loop.new_run("plus", run.model, 1e-3, [{"params": B, "lr": 4e-3}, {"params": rest}]) for _ in "ab")
    loop.training_step(plus, next(iter(plus.loader)))
    save_run(plus.file, plus, plus.settings)
    assert load_run(again.file, again, again.settings)
    rates = [group["lr"] for group in again.optimizer.param_groups]
    assert rates == [group["lr"] for group in plus.optimizer.param_groups] and rates[0] == 4 * rates[1] > 0


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_rows_of_all_processes_are_those_of_the_batch_and_their_weighted_mean_its_mean(monkeypatch, rows, count):
    losses = torch.rand(rows)
    taken, means = [], []
    for number in range(count):
        monkeypatch.setattr(lora_utils, "processes", lambda number=number: (number, count))
        mine, weight = my_rows({"labels": losses}, "cpu")
        taken += mine["labels"].tolist() if weight else []
        means.append(weight * mine["labels"].mean())
        assert len(mine["labels"])  # every process has something to compute
    assert sorted(taken) == sorted(losses.tolist())
    torch.testing.assert_close(sum(means) / count, losses.mean())


@pytest.fixture(scope="module")
def two_processes(bert, tmp_path_factory):
    """What both of two processes found, and what they printed."""
    folder = tmp_path_factory.mktemp("processes")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "tests" / "in_processes.py"]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, launch), str(bert), str(folder)]
    run = subprocess.run(command, env=os.environ | environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)], run.stdout


@pytest.fixture(scope="module")
def one_process(bert, tmp_path_factory):
    os.chdir(tmp_path_factory.mktemp("process"))
    yield train_and_evaluate(bert, Accelerator(cpu=True))[0]
    os.chdir(ROOT)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one_does(two_processes, one_process, name):
    (first, second), _ = two_processes
    assert first["processes"] == 2 and first[name] == second[name]
    torch.testing.assert_close(first[name]["losses"], one_process[name]["losses"], atol=1e-5, rtol=1e-5)
    for parameter, values in one_process[name]["trained"].items():
        torch.testing.assert_close(first[name]["trained"][parameter], values, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_two_processes_count_every_validation_sentence_once_also_when_they_are_odd(two_processes, one_process, name):
    *numbers, loss, predictions = two_processes[0][0][name]["evaluation"]
    *expected, expected_loss, expected_predictions = one_process[name]["evaluation"]
    assert numbers == expected and numbers[-1] == 37 and predictions == expected_predictions
    assert loss == pytest.approx(expected_loss, abs=1e-5)


def test_one_process_prints_and_writes(two_processes):
    (first, second), out = two_processes
    assert first["written"] > 0 and second["written"] == 0
    assert out.count("Data: movie_phrases") == 1 and out.count("stopped after 7 of 12 steps") == 1


def test_two_processes_take_up_what_they_left_each_with_its_own_random_state(two_processes):
    assert two_processes[0][0]["random"] != two_processes[0][1]["random"]
    for found in two_processes[0]:
        assert len(found["whole"]) == 12 and found["resumed"] == found["whole"]


def test_a_prepared_schedule_steps_once_a_process_and_ours_once_a_step(two_processes):
    assert two_processes[0][0]["schedules"] == [12, 12]  # ours after 12 steps, a prepared one after 6


def test_the_default_shards_repeat_what_evens_them_out(two_processes):
    shards = two_processes[0][0]["shards"]
    assert set(shards) == set(range(5)) and len(shards) > 5


def train_and_save(bert, folder):
    """What is killed: a training with checkpoints, and an adapter saved in every step."""
    os.chdir(folder)
    tokenizer = AutoTokenizer.from_pretrained(lora_utils.offline_model())
    data = load_sst2(lora_utils.MOVIE_PHRASES)["train"].select(range(320))
    loader = make_loader(data, tokenizer, batch_size=8, shuffle=True)
    loop = loop_of(NOTEBOOKS[0], accelerator=Accelerator(cpu=True), train_loader=loader, EPOCHS=6)
    run = a_run(loop, bert, "LoRA", dropout=0.2)
    run.model.register_forward_pre_hook(lambda model, arguments: run.model.save_pretrained("adapter"))
    Path("started").touch()
    loop.train(run)
    run.model.save_pretrained("adapter")
    Path("losses.json").write_text(json.dumps(run.losses))


@pytest.mark.slow
def test_killed_at_20_random_moments_a_run_ends_with_the_bits_of_one_that_was_not(bert, tmp_path):
    chance, kills, left = random.Random(0), 0, []
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    start = time.perf_counter()
    fork(train_and_save, bert, tmp_path / "whole").join()
    seconds = time.perf_counter() - start
    folder = tmp_path / "killed"
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
        assert kills < 20 or process.exitcode in (0, -9)
        for file in [*folder.glob("checkpoints/*.safetensors"), *folder.glob("adapter/*.safetensors")]:
            lora_utils.read_tensors(file)
            left.append(file)
        if (folder / "adapter").exists():
            LoRABertModel.from_pretrained(folder / "adapter")
    assert kills == 20 and len(set(left)) == 2  # both kinds of files were there to be read
    assert (folder / "losses.json").read_text() == (tmp_path / "whole" / "losses.json").read_text()
    ends = [load_file(end / "adapter" / "adapter_model.safetensors") for end in (folder, tmp_path / "whole")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(t, ends[1][name]) for name, t in ends[0].items())
