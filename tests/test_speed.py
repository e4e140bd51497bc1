"""Check that the benchmarks of speed and memory run, and compare like with like."""

import itertools
import json
import statistics
import subprocess
import sys

import contenders
import pytest
import report
from conftest import ROOT

IDS = [[101, *range(1000, 1000 + n), 102] for n in itertools.islice(itertools.cycle(range(1, 60)), 1600)]


def test_the_tables_in_readme_and_notebooks_are_those_of_the_results():
    command = [sys.executable, ROOT / "benchmarks" / "report.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_check_sees_a_number_that_is_not_of_the_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    mark = "<!-- training speed -->"
    changed = text.replace(mark, f"{mark}\n| 99 |")
    assert changed != text and report.filled(changed) == text


def test_every_way_starts_from_the_same_sentences():
    def rows(way):
        of_way = contenders.batches(IDS, way, 50)
        assert len(of_way) == 50 and all(len(batch["input_ids"]) == 32 for batch in of_way)
        return sorted(
            tuple(ids[mask.bool()].tolist())
            for batch in of_way
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )

    assert rows("like length") == rows("random") == rows("to 128") == sorted(map(tuple, IDS))


@pytest.mark.parametrize("number", [4, 10])
def test_a_few_batches_are_as_long_on_the_mean_as_all(number):
    ids, _ = contenders.sentences("auto")
    tokens = {}
    for way in ("like length", "random", "to 128"):
        few, every = (
            statistics.fmean(batch["input_ids"].shape[1] for batch in contenders.batches(ids, way, n))
            for n in (number, 50)
        )
        assert few == pytest.approx(every, rel=0.005)
        tokens[way] = few
    assert 2 * tokens["like length"] < tokens["random"] < tokens["to 128"] / 2


def test_contenders_take_turns_in_alternating_order(capsys):
    calls = []
    rivals = {name: (lambda _, name=name: calls.append(name), [0, 1]) for name in "ABC"}
    rates = contenders.alternate(rivals, 2, rounds=2)
    assert "".join(calls) == "ABC" + "ABC" + "CBA" + "ABC" + "CBA"
    assert all(len(values) == 2 for values in rates.values())


def test_without_sst_2_the_phrases_are_as_long_as_its_own():
    ids, name = contenders.sentences("auto")
    assert len(ids) == 1600 and name == "movie_phrases, cut to SST-2's lengths"
    assert 12.5 < statistics.fmean(map(len, ids)) < 14.7 and max(map(len, ids)) <= 66


def test_a_cpu_is_not_held_to_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(contenders.torch.cpu, "get_capabilities", dict)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    with pytest.raises(SystemExit):
        contenders.hold("AVX512_CORE_VNNI")
    assert "this CPU lacks avx512_vnni" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "ablation", "inference"])
def test_the_benchmark_of_speed_runs(tmp_path, part):
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", part, "--model", "packaged", "--rounds", "2"]
    done = subprocess.run([*command, "--batches", "1", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for file in tmp_path.iterdir():
        result = json.loads(file.read_text())
        assert all(rate > 0 for rates in result["sentences_a_second"].values() for rate in rates)


@pytest.mark.slow
def test_the_benchmark_of_memory_runs_and_a_smaller_base_takes_less(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "memory.py", "--model", "packaged", "--batches", "2"]
    done = subprocess.run([*command, "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["bytes"]
    assert found["q-LoRA, NF4 base"]["peak"] < found["LoRA"]["peak"] < found["full fine-tuning, padded to 128"]["peak"]
    assert found["q-LoRA, NF4 base"]["ledger"] < found["LoRA"]["ledger"] < found["LoRA"]["peak"]
