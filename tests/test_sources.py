"""Check that `load_sst2` takes a folder for what it is, and refuses by name what is no data."""

import ast
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from lora_lab.sources import SST2_SIZES, find_model, load_sst2

ROWS = [{"sentence": "a fine film", "label": 1}, {"sentence": "dull, and long", "label": 0}]
EXPECTED = [("a fine film", 1), ("dull, and long", 0)]
OTHER = [{"sentence": "another film", "label": 0}]
CSV = 'sentence,label\na fine film,1\n"dull, and long",0\n'


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files by name: rows as JSON lines, strings as UTF-8 text, or bytes.

    A validation file is there, unless one is given.
    """

    def write(files, name="reviews"):
        place = tmp_path / name
        place.mkdir(parents=True, exist_ok=True)
        if not any(file.startswith(("validation", "dev")) for file in files):
            files = {**files, "validation.jsonl": ROWS}
        for file, contents in files.items():
            if isinstance(contents, list):
                contents = "".join(json.dumps(row) + "\n" for row in contents)
            if isinstance(contents, str):
                contents = contents.encode()
            (place / file).write_bytes(contents)
        return place

    return write


def pairs(split):
    return list(zip(split["sentence"], split["label"], strict=True))


# What is read --------------------------------------------------------------------------------------

STRAYS = ["train (1).csv", "training_args.json", "train_old.jsonl", "train.csv.bak", "._train.csv", "train-00000.csv"]
STRAYS += ["mytrain-00000-of-00001.csv", "validation_1.json", "dev.csv"]
READ = {
    "CSV with a BOM": {"train.csv": "\ufeff" + CSV},
    "CSV with CRLF": {"train.csv": CSV.replace("\n", "\r\n")},
    "CSV with blank lines": {"train.csv": CSV.replace("\n", "\n\n")},
    "CSV with quoted numbers": {"train.csv": CSV.replace(",1", ',"1"').replace(",0", ", 0")},
    "CSV with more columns": {
        "train.csv": CSV.replace("label", "label,,").replace(",1", ",1,7,").replace(",0", ",0,,")
    },
    "CSV without a last newline": {"train.csv": CSV.rstrip()},
    "a list in .json": {"train.json": json.dumps(ROWS, indent=2)},
    "a list in .jsonl": {"train.jsonl": json.dumps(ROWS)},
    "lines in .json": {"train.json": "\ufeff" + "\r\n\r\n".join(map(json.dumps, ROWS))},
    **{f"beside {stray}": {"train.csv": CSV, "validation.jsonl": ROWS, stray: OTHER} for stray in STRAYS},
}


@pytest.mark.parametrize("files", READ.values(), ids=READ)
def test_a_folder_of_many_hands_is_read_without_its_stray_files(folder, files):
    assert [pairs(split) for split in load_sst2(folder(files)).values()] == [EXPECTED, EXPECTED]


def test_folders_named_like_files_are_not_read_and_links_are(folder):
    place = folder({"rows.csv": CSV})
    (place / "train.csv").mkdir()
    (place / "train").mkdir()
    with pytest.raises(ValueError, match=r"no train file .*train\.csv/, train/, validation\.jsonl"):
        load_sst2(place)
    (place / "train.csv").rmdir()
    (place / "train.csv").symlink_to(place / "rows.csv")
    assert pairs(load_sst2(place)["train"]) == EXPECTED


@pytest.mark.parametrize("end", ["", "-b42a775f407cee45"])
def test_shards_are_read_in_the_order_of_their_numbers(folder, end):
    names = [f"train-{i:05}-of-00012{end}.jsonl" for i in range(12)]
    rows = [{"sentence": f"film {i}", "label": 0} for i in range(12)]
    place = folder({name: [row] for name, row in zip(names, rows)})
    assert load_sst2(place)["train"]["sentence"] == [row["sentence"] for row in rows]


def test_words_that_other_readers_take_for_gaps_or_numbers_are_text(folder):
    words = ["N/A", "NA", "null", "nan", "None", "1984", "007", "3.0", "1e3", "True", "2001-01-01", " x ", "\u2028x"]
    lines = "".join(f"{word},1\n" for word in words)
    rows = "".join(json.dumps({"sentence": word, "label": 1}, ensure_ascii=False) + "\n" for word in words)
    tabs = "sentence\tlabel\n" + lines.replace(",", "\t")
    for file, text in {"train.csv": "sentence,label\n" + lines, "train.tsv": tabs, "train.jsonl": rows}.items():
        assert load_sst2(folder({file: text}, file))["train"]["sentence"] == words


@pytest.mark.parametrize("label", [0, 1, "0", "1", 0.0, 1.0, " 1 ", "1.0", True, False], ids=repr)
def test_a_label_may_be_a_number_a_truth_value_or_the_text_of_a_number(folder, label):
    place = folder({"train.jsonl": [{"sentence": "a film", "label": label}, {"sentence": "a film", "label": 1}]})
    assert load_sst2(place)["train"]["label"] == [int(float(label)), 1]


# What is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, message",
    [
        (["train (1).csv", "training_args.json"], r"no train file .*train \(1\)\.csv, training_args\.json"),
        (["train.csv", "train.jsonl"], r"several train files, keep one of train\.csv, train\.jsonl"),
        (["train.csv", "train-00000-of-00001.csv"], "several train files"),
        (["train-00000-of-00002.csv", "train-00000-of-00001.csv"], "several train files"),
        (["train-00000-of-00001.csv", "train-00000-of-00001.json"], "several train files"),
        (["train.csv", "dev.tsv", "validation.csv"], r"several validation files, keep one of dev\.tsv, validation"),
        (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "not every shard .*train-00002-of-00003"),
        (["train-00000-of-00001-aa.csv", "train-00000-of-00001-bb.csv"], "not every shard of .* is there once"),
        (["train-00001-of-00001.csv"], "not every shard"),
        (["Train.txt"], r"no train file .*Train\.txt"),
    ],
    ids=str,
)
def test_a_split_that_is_not_there_once_and_whole_is_refused_with_what_was_found(folder, files, message):
    with pytest.raises(ValueError, match=message):
        load_sst2(folder(dict.fromkeys(files, CSV)))


def test_an_empty_folder_half_a_folder_and_a_file_in_its_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no train file .*\(it holds nothing\)"):
        load_sst2(tmp_path)
    (tmp_path / "train.csv").write_text(CSV, encoding="utf-8")
    with pytest.raises(ValueError, match=r"no validation file .*train\.csv"):
        load_sst2(tmp_path)
    with pytest.raises(ValueError, match="no data folder"):
        load_sst2(tmp_path / "train.csv")


NO_SENTENCES = ["", " ", "\n", "\u00a0", "\u200b", "\ufeff", "\0", "half \ud83d", None, 1984, 1.5, True, ["a"], {}]
NO_LABELS = [2, -1, "2", "-1", 0.5, "0.5", None, "yes", "", "positive", "01", [1], float("nan"), float("inf")]
NO_ROWS = [({"sentence": value, "label": 1}, "sentence", value, "text") for value in NO_SENTENCES]
NO_ROWS += [({"sentence": "a film", "label": value}, "label", value, "0 (negative) and 1") for value in NO_LABELS]


@pytest.mark.parametrize("row, column, value, allowed", NO_ROWS, ids=repr)
def test_what_is_no_sentence_or_no_label_is_refused_by_value_type_file_and_row(folder, row, column, value, allowed):
    place = folder({"train.jsonl": [*ROWS, row]})
    found = re.escape(f"has the {column} {value!r} ({type(value).__name__}): allowed")
    with pytest.raises(ValueError, match=rf"row 3 of .*train\.jsonl' {found} (is|are) {re.escape(allowed)}"):
        load_sst2(place)


def test_an_empty_sentence_is_refused_in_every_format_and_in_its_own_shard(folder):
    rows = [*ROWS, {"sentence": " ", "label": 0}]
    datasets.Dataset.from_list(rows).to_parquet(folder({}, "parquet") / "train.parquet")
    table = pyarrow.table({"sentence": [1, 2], "label": [0, 1]})
    pyarrow.parquet.write_table(table, folder({}, "numbers") / "train.parquet")
    folder({"train.csv": CSV + ",1\n"}, "csv")
    folder({"train.tsv": "sentence\tlabel\na\t1\n\t1\n"}, "tsv")
    folder({"train-00000-of-00002.jsonl": ROWS, "train-00001-of-00002.jsonl": rows}, "shards")
    for name, row, file in (
        ("parquet", 3, "train.parquet"),
        ("numbers", 1, "train.parquet"),
        ("csv", 3, "train.csv"),
        ("tsv", 2, "train.tsv"),
        ("shards", 3, "train-00001-of-00002.jsonl"),
    ):
        with pytest.raises(ValueError, match=rf"row {row} of .*{name}.{file}' has the sentence"):
            load_sst2(folder({}, name))


COLUMNS = {name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ("sentence", "label")}
REFUSED = {
    "Latin-1": ("train.csv", "sentence,label\nsüß,1\n".encode("latin-1"), "no UTF-8 text, save it as UTF-8"),
    "UTF-16": ("train.csv", CSV.encode("utf-16"), "no UTF-8 text"),
    "UTF-16 without a BOM": ("train.csv", CSV.encode("utf-16-le"), r"cells, the first line names 2: \['s\\x00e"),
    "broken line": ("train.jsonl", json.dumps(ROWS[0]) + '\n{"sentence": "x", "la', "line 2 is no JSON"),
    "broken list": ("train.json", json.dumps(ROWS)[:-5], "cannot be read"),
    "a bottomless list": ("train.json", "[" * 100_000, "cannot be read, maximum recursion"),
    "numbers as lines": ("train.jsonl", "1\n2\n", "row 1 of .* is 1, no object"),
    "null": ("train.json", "null", "is None, no object"),
    "pandas' columns": ("train.json", json.dumps(COLUMNS), r"row 1 of .* \(dict\).* one sentence per row"),
    "pandas' split": ("train.json", '{"columns": ["sentence"], "data": [["x"]]}', "has the columns 'columns', 'data'"),
    "a missing key": ("train.jsonl", [*ROWS, {"sentence": "x"}], "row 3 of .* has the columns 'sentence': .* label"),
    "header only": ("train.csv", "sentence,label\n", "train split .* holds no sentence"),
    "an empty list": ("train.json", "[]", "train split .* holds no sentence"),
    "no byte": ("train.csv", "", "train split .* holds no sentence"),
    "no header": ("train.csv", "a film,1\nb film,0\n", "row 1 of .* has the columns 'a film', '1'"),
    "semicolons": ("train.csv", "sentence;label\na film;1\n", "has the columns 'sentence;label'"),
    "commas without quotes": ("train.csv", "label,sentence\n1,a\n0,b, but c\n", "line 3 has 3 cells, .* names 2: "),
    "a cell too few": ("train.csv", CSV + "x\n", "line 4 has 1 cells"),
    "an open quote": ("train.csv", CSV + '"x,1\ny,0\n', "unexpected end of data"),
    "text behind a quote": ("train.csv", CSV + '"Great" film,1\n', "line 4: ',' expected"),
    "a column twice": ("train.csv", "sentence,label,label\nx,0,1\n", "two columns have one name"),
    "text as parquet": ("train.parquet", CSV, "cannot be read"),
    "text as arrow": ("train.arrow", CSV, "cannot be read"),
}


@pytest.mark.parametrize("file, contents, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_with_its_file_and_what_is_allowed(folder, file, contents, message):
    place = folder({file: contents})
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        load_sst2(place)
    assert str(place / file) in str(error.value)
    assert re.search("must hold one train and one validation file|allowed is text", str(error.value))


# What other tools write --------------------------------------------------------------------------


def saved(place, names, labels, write):
    """Write both splits with named labels, one sentence per label."""
    rows = {"sentence": [f"film {i}" for i in range(len(labels))], "label": labels}
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    split = datasets.Dataset.from_dict(rows, features=features)
    if write == "save_to_disk":
        datasets.DatasetDict(train=split, validation=split).save_to_disk(place)
    else:
        place.mkdir()
        for name in SST2_SIZES:
            split.to_parquet(place / f"{name}.parquet")
    return place


@pytest.mark.parametrize("write", ["save_to_disk", "to_parquet"])
def test_a_label_with_a_name_counts_by_its_name(tmp_path, write):
    for names, expected in (
        (["negative", "positive"], [0, 1]),
        (["NEGATIVE", "POSITIVE"], [0, 1]),
        (["Positive", "Negative"], [1, 0]),
        (["1", "0"], [1, 0]),
    ):
        splits = load_sst2(saved(tmp_path / "-".join(names), names, [0, 1], write))
        assert splits["train"]["label"] == splits["validation"]["label"] == expected
        assert splits["train"].features["label"].names == ["negative", "positive"]
    for names, labels, message in (
        (["ham", "spam"], [0, 1], r"row 1 of .*label 'ham' \(str\)"),
        (["negative", "neutral", "positive"], [0, 2, 1], r"row 3 of .*label 'neutral' \(str\)"),
        (["negative", "positive"], [0, -1], r"row 2 of .*label -1 \(int\)"),
        (["negative", "positive"], [0, None], r"row 2 of .*label None"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sst2(saved(tmp_path / f"{names} {labels}", names, labels, write))


def test_parquet_of_other_tools_is_read(tmp_path):
    sentence = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    label = pyarrow.array([0, 1, 0], pyarrow.int8()).dictionary_encode()
    for name in SST2_SIZES:
        table = pyarrow.table({"sentence": sentence, "label": label, "kind": sentence})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert pairs(load_sst2(tmp_path)["train"]) == [("a", 0), ("b", 1), ("a", 0)]


def test_glues_own_files_are_taken(folder):
    lines = ["sentence\tlabel\n", "hide new secretions from the units \t0\n", '"quirky" and "funny \t1\n', '"\t0\n']
    test = "index\tsentence\n0\tno label here\n"
    splits = load_sst2(folder({"train.tsv": "".join(lines), "dev.tsv": "".join(lines), "test.tsv": test}))
    expected = [("hide new secretions from the units ", 0), ('"quirky" and "funny ', 1), ('"', 0)]
    assert pairs(splits["train"]) == pairs(splits["validation"]) == expected


def test_folders_of_save_to_disk_are_taken_and_stay_as_they_are(tmp_path):
    rows = datasets.Dataset.from_list([{"idx": i, "sentence": f"film {i}", "label": i % 2} for i in range(9)])
    test = datasets.Dataset.from_list([{"idx": 0, "sentence": "film", "label": -1}])
    splits = datasets.DatasetDict(train=rows.select(range(8, 1, -1)), validation=rows.with_format("torch"), test=test)
    splits.save_to_disk(tmp_path / "all", num_shards={"train": 3, "validation": 1, "test": 1})
    before = sorted(tmp_path.rglob("*"))
    taken = load_sst2(tmp_path / "all")
    assert list(taken) == ["train", "validation"] and taken["train"].info.dataset_name == "all"
    assert pairs(taken["train"]) == [(f"film {i}", i % 2) for i in range(8, 1, -1)]
    assert len(taken["validation"]) == 9 and sorted(tmp_path.rglob("*")) == before
    next((tmp_path / "all" / "train").glob("data-00001*")).unlink()
    with pytest.raises(ValueError, match="not every shard"):
        load_sst2(tmp_path / "all")
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=r"no train file .*state\.json.*DatasetDict\.save_to_disk"):
        load_sst2(tmp_path / "one")


# Paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a süß", "[a-z]*", "what?", "{x,y}", "50%20#1", "a::b", "label=1", "'quoted'", "~", "train"]
)
@pytest.mark.parametrize("write", ["save_to_disk", "to_parquet", "csv"])
def test_a_path_is_taken_literally(tmp_path, folder, name, write):
    for other in ("a", "x", "whatx"):
        folder({"train.csv": "sentence,label\nanother,0\n"}, other)
    if write == "csv":
        place = folder({"train.csv": "sentence,label\nfilm 0,0\nfilm 1,1\n"}, name)
    else:
        # Written elsewhere, because datasets itself does not write to each of these paths.
        place = saved(tmp_path / "elsewhere", ["negative", "positive"], [0, 1], write).rename(tmp_path / name)
    splits = load_sst2(place)
    assert pairs(splits["train"]) == [("film 0", 0), ("film 1", 1)]
    assert splits["train"].info.dataset_name == name


def test_the_home_folder_may_be_written_as_a_tilde(folder, bert, tmp_path, monkeypatch):
    place = folder({"train.jsonl": ROWS}, "home/plain")
    (tmp_path / "home" / "bert").symlink_to(bert)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    for dataset in ("~/plain", Path("~/plain")):
        assert load_sst2(dataset)["train"].info.dataset_name == "plain"
    monkeypatch.setenv("SST2_DIR", "~/plain")
    assert pairs(load_sst2("auto")["train"]) == EXPECTED
    assert find_model("~/bert", announce=False)[:2] == (str(tmp_path / "home" / "bert"), tmp_path / "home" / "bert")
    for search in (load_sst2, find_model):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "home" / "nothing"))):
            search("~/nothing")
        with pytest.raises(ValueError, match="~nobody-of-this-name/x"):
            search("~nobody-of-this-name/x")
    assert place.is_dir()


@pytest.mark.parametrize("dataset", [".", "inner/.."])
def test_a_relative_path_names_its_folder(folder, dataset, monkeypatch, capsys):
    place = folder({"train.jsonl": ROWS})
    (place / "inner").mkdir()
    monkeypatch.chdir(place)
    assert load_sst2(dataset)["validation"].info.dataset_name == "reviews"
    assert capsys.readouterr().out == "Data: reviews, 2 training and 2 validation sentences (a folder)\n"


def test_an_empty_name_is_no_model():
    with pytest.raises(ValueError, match="no model ''"):
        find_model("")


# Caches and time -----------------------------------------------------------------------------------


def test_a_folder_leaves_no_trace_in_a_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    split = load_sst2(folder({"train.csv": CSV}))["train"]
    assert not split.cache_files and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_as_many_rows_as_sst2_has_load_fast(folder):
    rows = [{"sentence": f"film {i} is a film of films", "label": i % 2} for i in range(SST2_SIZES["train"])]
    place = folder({f"{name}.jsonl": rows[:size] for name, size in SST2_SIZES.items()})
    start = time.perf_counter()
    splits = load_sst2(place)
    assert time.perf_counter() - start < 5  # a second on a machine with nothing else to do
    assert splits["train"].info.dataset_name == "SST-2"


# Text is UTF-8, whatever the machine prefers -------------------------------------------------------


@pytest.mark.parametrize("folder", ["lora_lab", "tools", "benchmarks"])
def test_text_is_read_and_written_with_an_encoding(folder):
    for file in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("read_text", "write_text", "open")):
                call = ast.unparse(node)
                others = ("b'", "Image.open", "ipc.open", "safe_open")  # these read and write bytes
                assert "encoding='utf-8" in call or any(other in call for other in others), (file, call)


def test_a_notebook_may_print_any_letter_on_a_machine_with_another_encoding():
    code = """if True:
        import sys
        import run_notebook
        run_notebook.execute = lambda source, target, core: ["α ▇ half \\ud83d"]
        sys.argv[1:] = ["some.ipynb"]
        run_notebook.main()
    """
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT / "tools")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.returncode == 0 and "α ▇ half ?" in run.stdout.decode("utf-8"), run
