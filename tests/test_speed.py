"""Check that the benchmarks compare like with like, and that they run."""

import itertools
import json
import re
import statistics
import subprocess
import sys
from types import SimpleNamespace

import contenders
import nbformat
import pytest
import report
import speed
from conftest import ROOT

from lora_lab.sources import packaged_checkpoint

IDS = [[101, *range(1000, 1000 + n), 102] for n in itertools.islice(itertools.cycle(range(1, 60)), 1600)]


@pytest.mark.parametrize("name", report.FILES)
def test_one_changed_digit_in_any_table_or_number_is_seen(name):
    texts = [(ROOT / name).read_text(encoding="utf-8")]
    if name.endswith(".ipynb"):
        cells = nbformat.read(ROOT / name, as_version=4).cells
        texts = [cell.source for cell in cells if cell.cell_type == "markdown" and "<!-- /" in cell.source]
    for text in texts:
        assert report.filled(text) == text
        for block in re.finditer(r"<!-- ([^/].*?) -->(.*?)<!-- /\1 -->", text, re.DOTALL):
            digits = [place for place in range(*block.span(2)) if text[place].isdigit()]
            for place in (digits[0], digits[-1]):
                changed = f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}"
                assert report.filled(changed) == text, block[1]


def test_every_way_starts_from_the_same_sentences():
    def rows(way):
        of_way = contenders.batches(IDS, way, 50)
        assert len(of_way) == 50 and all(len(batch["input_ids"]) == 32 for batch in of_way)
        return sorted(
            tuple(ids[mask.bool()].tolist())
            for batch in of_way
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        )

    assert rows("similar length") == rows("random") == rows("to 128") == sorted(map(tuple, IDS))


def test_a_few_batches_are_as_long_on_the_mean_as_all_and_as_sst_2s():
    ids, name = contenders.sentences("auto")
    assert len(ids) == 1600 and name == "movie_phrases, cut to SST-2's lengths"
    assert 12.5 < statistics.fmean(map(len, ids)) < 14.7 and max(map(len, ids)) <= 66
    tokens = {}
    for way in ("similar length", "random", "to 128"):
        for number in (50, 4, 5, 10):
            lengths = [batch["input_ids"].shape[1] for batch in contenders.batches(ids, way, number)]
            every = tokens.setdefault(way, statistics.fmean(lengths))
            assert statistics.fmean(lengths) == pytest.approx(every, rel=0.005)
    assert 2 * tokens["similar length"] < tokens["random"] < tokens["to 128"] / 2


def test_contenders_take_turns_in_alternating_order(capsys):
    calls = []
    rivals = {name: (lambda _, name=name: calls.append(name), [0, 1]) for name in "ABC"}
    rates = contenders.alternate(rivals, 2, rounds=2)
    assert "".join(calls) == "ABC" + "ABC" + "CBA" + "ABC" + "CBA"
    assert all(len(values) == 2 for values in rates.values())


@pytest.mark.slow
@pytest.mark.parametrize("part", ["training", "ablation", "rank", "inference"])
def test_every_contender_can_be_built_and_timed(bert, part):
    for name, ways in speed.PARTS[part].items():
        rates = speed.time_all(name, ways, IDS[:64], bert, SimpleNamespace(batches=1, rounds=2))
        assert all(re.search("bfloat16|torch.ao", way) for way in ways.keys() - rates.keys())  # not for each machine
        assert all(len(of_way) == 2 and min(of_way) > 0 for of_way in rates.values())


@pytest.mark.slow
def test_the_benchmark_of_speed_saves_what_it_prints(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "integers", "--model", "packaged", "--rounds", "2"]
    done = subprocess.run([*command, "--batches", "1", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(file.read_text()) for file in tmp_path.iterdir()]
    assert {result["part"] for result in results} == speed.PARTS["integers"].keys()
    for result in results:
        for name, rates in result["sentences_a_second"].items():
            assert min(rates) > 0 and re.search(rf"\b{name} .*÷ LoRA", done.stdout)


@pytest.mark.slow
def test_a_smaller_base_takes_less_memory_in_training_and_the_ledger_less_than_the_peak():
    full, ours, nf4 = "full fine-tuning, padded to 128", "LoRA", "q-LoRA, NF4 base"
    ids, _ = contenders.sentences("auto")
    found = speed.peaks({name: speed.TRAINING[name] for name in (full, ours, nf4)}, ids, packaged_checkpoint(), 1)
    assert found[nf4]["peak"] < found[ours]["peak"] < found[full]["peak"]
    assert found[nf4]["ledger"] < found[ours]["ledger"] < found[ours]["peak"]
