"""Check that `load_sst2` takes a folder for what it is, and refuses by name what is no data."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from lora_lab.sources import find_model, load_sst2

ROWS = [{"sentence": "a fine film", "label": 1}, {"sentence": "dull, and long", "label": 0}]
EXPECTED = [("a fine film", 1), ("dull, and long", 0)]
CSV = 'sentence,label\na fine film,1\n"dull, and long",0\n'


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes files by name: rows as JSON lines, text, or bytes. It adds a validation file."""

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


STRAYS = ["train (1).csv", "train_old.jsonl", "train.csv.bak", "._train.csv", "mytrain-00000-of-00001.csv", "dev.csv"]
READ = {
    "CSV with a BOM": {"train.csv": "\ufeff" + CSV},
    "CSV with CRLF": {"train.csv": CSV.replace("\n", "\r\n")},
    "CSV with blank lines": {"train.csv": CSV.replace("\n", "\n\n")},
    "CSV with quoted numbers": {"train.csv": CSV.replace(",1", ',"1"').replace(",0", ", 0")},
    "CSV with more columns": {"train.csv": CSV.replace("label", "label,").replace(",1", ",1,7").replace(",0", ",0,")},
    "a list in .json": {"train.json": json.dumps(ROWS, indent=2)},
    "a list in .jsonl": {"train.jsonl": json.dumps(ROWS)},
    "lines in .json": {"train.json": "\ufeff" + "\r\n\r\n".join(map(json.dumps, ROWS))},
    "beside strays": {"train.csv": CSV, "validation.jsonl": ROWS, **dict.fromkeys(STRAYS, ROWS[:1])},
}


@pytest.mark.parametrize("files", READ.values(), ids=READ)
def test_a_folder_of_many_hands_is_read_without_its_stray_files(folder, files):
    assert [pairs(split) for split in load_sst2(folder(files)).values()] == [EXPECTED, EXPECTED]


@pytest.mark.parametrize("end", ["", "-b42a775f407cee45"])
def test_shards_are_read_in_the_order_of_their_numbers(folder, end):
    rows = [{"sentence": f"film {i}", "label": 0} for i in range(12)]
    place = folder({f"train-{i:05}-of-00012{end}.jsonl": [row] for i, row in enumerate(rows)})
    assert load_sst2(place)["train"]["sentence"] == [row["sentence"] for row in rows]


def test_words_that_other_readers_take_for_gaps_or_numbers_are_text(folder):
    words = ["N/A", "NA", "null", "nan", "None", "1984", "007", "3.0", "1e3", "True", "2001-01-01", " x ", "\u2028x"]
    lines = "".join(f"{word},1\n" for word in words)
    rows = "".join(json.dumps({"sentence": word, "label": 1}, ensure_ascii=False) + "\n" for word in words)
    tabs = "sentence\tlabel\n" + lines.replace(",", "\t")
    for file, text in {"train.csv": "sentence,label\n" + lines, "train.tsv": tabs, "train.jsonl": rows}.items():
        assert load_sst2(folder({file: text}, file))["train"]["sentence"] == words


def test_a_label_may_be_a_number_a_truth_value_or_the_text_of_a_number(folder):
    labels = [0, 1, "0", "1", 0.0, 1.0, " 1 ", "1.0", True, False]
    place = folder({"train.jsonl": [{"sentence": "a film", "label": label} for label in labels]})
    assert load_sst2(place)["train"]["label"] == [int(float(label)) for label in labels]


@pytest.mark.parametrize(
    "files, message",
    [
        ([], r"no train file .*it holds validation\.jsonl"),
        (["train (1).csv", "training_args.json"], r"no train file .*train \(1\)\.csv, training_args\.json"),
        (["train.csv", "train.jsonl"], r"several train files, keep one of train\.csv, train\.jsonl"),
        (["train-00000-of-00002.csv", "train-00000-of-00001.csv"], "several train files"),
        (["train.csv", "dev.tsv", "validation.csv"], r"several validation files, keep one of dev\.tsv, validation"),
        (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], "not every shard .*train-00002-of-00003"),
        (["train-00000-of-00001-aa.csv", "train-00000-of-00001-bb.csv"], "not every shard of .* is there once"),
    ],
    ids=str,
)
def test_a_split_that_is_not_there_once_and_whole_is_refused_with_what_was_found(folder, files, message):
    with pytest.raises(ValueError, match=message):
        load_sst2(folder(dict.fromkeys(files, CSV)))


NO_SENTENCES = ["", "\n", "\u00a0", "\u200b", "\0", "half \ud83d", None, 1984, True, ["a"], {}]
NO_LABELS = [2, "-1", 0.5, None, "yes", "", "01", [1], float("nan")]
NO_VALUES = [("sentence", value) for value in NO_SENTENCES] + [("label", value) for value in NO_LABELS]


@pytest.mark.parametrize("column, value", NO_VALUES, ids=repr)
def test_what_is_no_sentence_or_no_label_is_refused_by_value_type_file_and_row(folder, column, value):
    place = folder({"train.jsonl": [*ROWS, {"sentence": "a film", "label": 1, column: value}]})
    found = re.escape(f"has the {column} {value!r} ({type(value).__name__}): allowed")
    with pytest.raises(ValueError, match=rf"row 3 of .*train\.jsonl' {found} (is text|are 0 \(negative\) and 1)"):
        load_sst2(place)


def parquet(table):
    """Return the bytes of a Parquet file."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def test_a_wrong_row_is_counted_in_every_format_and_in_its_own_shard(folder):
    rows = [*ROWS, {"sentence": " ", "label": 0}]
    numbers = pyarrow.table({"sentence": [1, 2], "label": [0, 1]})
    for row, files in (
        (3, {"train.csv": CSV + ",1\n"}),
        (2, {"train.tsv": "sentence\tlabel\na\t1\n\t1\n"}),
        (3, {"train-00000-of-00002.jsonl": ROWS, "train-00001-of-00002.jsonl": rows}),
        (3, {"train.parquet": parquet(pyarrow.Table.from_pylist(rows))}),
        (1, {"train.parquet": parquet(numbers)}),
    ):
        with pytest.raises(ValueError, match=rf"row {row} of .*{max(files)}' has the sentence"):
            load_sst2(folder(files, f"{row} {max(files)}"))


REFUSED = {
    "Latin-1": ("train.csv", "sentence,label\nsüß,1\n".encode("latin-1"), "no UTF-8 text, save it as UTF-8"),
    "broken line": ("train.jsonl", json.dumps(ROWS[0]) + '\n{"sentence": "x", "la', "line 2 is no JSON"),
    "broken list": ("train.json", json.dumps(ROWS)[:-5], "cannot be read"),
    "a bottomless list": ("train.json", "[" * 100_000, "cannot be read, maximum recursion"),
    "null": ("train.json", "null", "is None, no object"),
    "header only": ("train.csv", "sentence,label\n", "train split .* holds no sentence"),
    "semicolons": ("train.csv", "sentence;label\na film;1\n", "has the columns 'sentence;label'"),
    "commas without quotes": ("train.csv", "label,sentence\n1,a\n0,b, but c\n", "line 3 has 3 cells, .* names 2: "),
    "an open quote": ("train.csv", CSV + '"x,1\ny,0\n', "unexpected end of data"),
    "a column twice": ("train.csv", "sentence,label,label\nx,0,1\n", "two columns have one name"),
    "no byte": ("train.csv", "", "train split .* holds no sentence"),
    "text as parquet": ("train.parquet", CSV, "cannot be read"),
    "text as arrow": ("train.arrow", CSV, "cannot be read"),
}


@pytest.mark.parametrize("file, contents, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_with_its_file_and_what_is_allowed(folder, file, contents, message):
    place = folder({file: contents})
    with pytest.raises(ValueError, match=f"(?s){message}.*must hold one train and one validation file") as error:
        load_sst2(place)
    assert str(place / file) in str(error.value)


def saved(place, names, labels, write):
    """Write both splits with named labels, one sentence per label."""
    rows = {"sentence": [f"film {i}" for i in range(len(labels))], "label": labels}
    features = datasets.Features(sentence=datasets.Value("string"), label=datasets.ClassLabel(names=names))
    split = datasets.Dataset.from_dict(rows, features=features)
    if write == "save_to_disk":
        datasets.DatasetDict(train=split, validation=split).save_to_disk(place)
    else:
        place.mkdir()
        for name in ("train", "validation"):
            split.to_parquet(place / f"{name}.parquet")
    return place


@pytest.mark.parametrize("write", ["save_to_disk", "to_parquet"])
def test_a_label_with_a_name_counts_by_its_name(tmp_path, write):
    for names, expected in ("negative positive", [0, 1]), ("Positive Negative", [1, 0]), ("1 0", [1, 0]):
        splits = load_sst2(saved(tmp_path / names, names.split(), [0, 1], write))
        assert splits["train"]["label"] == splits["validation"]["label"] == expected
        assert splits["train"].features["label"].names == ["negative", "positive"]
    for names, labels, message in (
        ("negative neutral positive", [0, 2, 1], r"row 3 of .*label 'neutral' \(str\)"),
        ("negative positive", [0, -1], r"row 2 of .*label -1 \(int\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sst2(saved(tmp_path / f"refused {names}", names.split(), labels, write))


def test_glues_own_files_are_taken(folder):
    lines = ["sentence\tlabel\n", "hide new secretions from the units \t0\n", '"quirky" and "funny \t1\n', '"\t0\n']
    files = {"train.tsv": "".join(lines), "dev.tsv": "".join(lines), "test.tsv": "index\tsentence\n0\tno label\n"}
    splits = load_sst2(folder(files))
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


@pytest.mark.parametrize("name", ["a süß", "[a-z]*", "what?", "{x,y}", "50%20#1", "a::b", "~", "train"])
@pytest.mark.parametrize("write", ["save_to_disk", "to_parquet"])
def test_a_path_is_taken_literally(tmp_path, folder, name, write):
    for other in ("a", "x", "whatx"):
        folder({"train.csv": "sentence,label\nanother,0\n"}, other)
    # Written elsewhere, because datasets itself does not write to each of these paths.
    place = saved(tmp_path / "elsewhere", ["negative", "positive"], [0, 1], write).rename(tmp_path / name)
    split = load_sst2(place)["train"]
    assert pairs(split) == [("film 0", 0), ("film 1", 1)]
    assert split.info.dataset_name == name and not split.cache_files


def test_a_path_may_start_at_home_or_be_relative(folder, bert, tmp_path, monkeypatch, capsys):
    place, home = folder({"train.jsonl": ROWS}, "home/plain"), tmp_path / "home"
    (home / "bert").symlink_to(bert)
    for variable, value in {"HOME": str(home), "USERPROFILE": str(home), "SST2_DIR": "~/plain"}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(place)
    for dataset in ("~/plain", Path("~/plain"), "auto", ".", "../plain"):
        assert pairs(load_sst2(dataset)["train"]) == EXPECTED
        assert capsys.readouterr().out.startswith("Data: plain, 2 training and 2 validation sentences (")
    assert find_model("~/bert", announce=False)[:2] == (str(home / "bert"), home / "bert")
    for search in (load_sst2, find_model):
        for path, named in ("~/nothing", str(home / "nothing")), ("~no-such-user/x", "~no-such-user/x"):
            with pytest.raises(ValueError, match=f"no (data folder|model) {re.escape(repr(named))}"):
                search(path)


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
