"""Serve a folder as a Hugging Face hub on this machine, with faults on request.

python tests/local_hub.py FOLDER [--tiny]   writes a random BERT-base and GLUE's SST-2 into FOLDER, and serves it

The model has random weights, with the shape, the file names and the tensor names of the real one. The data come from
the folder that SST2_DIR names, or from data/movie_phrases. FOLDER/models and FOLDER/datasets hold the repositories.
"""

import argparse
import functools
import hashlib
import http.server
import json
import os
import shutil
import sys
import threading
import time
import urllib.parse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODEL, DATA = "google-bert/bert-base-uncased", "nyu-mll/glue"


@functools.cache
def etag(file: Path) -> str:
    """Return what the hub calls a file by: the SHA-256 of a large file, git's SHA-1 of any other."""
    if file.suffix in (".safetensors", ".parquet"):
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    contents = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(contents) + contents).hexdigest()


class LocalHub(http.server.ThreadingHTTPServer):
    """Serve `folder` in a thread, inside a `with` statement.

    `misbehave` sets a fault: "silent" (accept a question and never answer), a status such as 429, "cut" (close the
    connection in the middle of a file), "stall" (the same, but leave the connection open), or "wrong" (change one
    byte in the middle of a file). `where` is a part of the paths that it affects, and `times` the number of answers.
    `requests` lists the method and path of each question, and the range for a part of a file.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = Path(folder).resolve()
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests = []
        self.released = threading.Event()
        self.misbehave(None)

    def misbehave(self, fault, where="", times=10**9):
        self.fault, self.where, self.times = fault, where, times

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.released.set()  # lets silent answers end
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Say nothing about a client that went away."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *message):
        """Write nothing: `requests` of the hub keeps them."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        hub.requests.append(" ".join(filter(None, (self.command, path, self.headers.get("Range")))))
        fault = hub.fault if hub.where in path and hub.times > 0 else None
        if fault in ("cut", "stall", "wrong") and not (self.command == "GET" and "/resolve/" in path):
            fault = None  # only the bytes of a file can be spoilt so
        hub.times -= fault is not None
        if fault == "silent":
            hub.released.wait()
            self.close_connection = True
        elif isinstance(fault, int):
            self.answer(fault, {"error": "a fault, as asked for"})
        elif not path:
            self.answer(200, {})
        elif path.startswith("api/"):
            _, kind, owner, name = [*path.split("/"), *[""] * 3][:4]
            self.describe(hub.folder / kind / owner / name)
        else:
            kind, path = ("datasets", path[9:]) if path.startswith("datasets/") else ("models", path)
            owner, name, _, _, file = [*path.split("/", 4), *[""] * 5][:5]
            self.send_file(hub.folder / kind / owner / name, file, fault)

    def answer(self, status, contents, **headers):
        body = json.dumps(contents).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": len(body), **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def describe(self, repository):
        """Answer with the commit of a repository, and with the names, sizes and hashes of its files."""
        if not repository.is_dir():
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        files = []
        for file in sorted(path for path in repository.rglob("*") if path.is_file()):
            size, oid = file.stat().st_size, etag(file)
            lfs = {"sha256": oid, "size": size, "pointerSize": 134} if len(oid) == 64 else None
            name = file.relative_to(repository).as_posix()
            files.append({"rfilename": name, "size": size, "blobId": oid, "lfs": lfs})
        name = repository.relative_to(repository.parents[1]).as_posix()
        self.answer(200, {"id": name, "sha": commit(repository), "siblings": files})

    def send_file(self, repository, name, fault):
        file = repository / name
        if not (name and file.is_file()):
            code = "EntryNotFound" if repository.is_dir() else "RepoNotFound"
            self.answer(404, {"error": code}, X_Error_Code=code)
            return
        size = file.stat().st_size
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if "Range" in self.headers else 200)
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.send_header("Content-Disposition", f'inline; filename="{file.name}";')
        self.send_header("ETag", f'"{etag(file)}"')
        self.send_header("X-Repo-Commit", commit(repository))
        self.end_headers()
        if self.command == "HEAD":
            return
        with open(file, "rb") as opened:
            end = size // 2 if fault in ("cut", "stall") else size
            for place in range(start, end, 2**20):
                opened.seek(place)
                part = bytearray(opened.read(min(2**20, end - place)))
                if fault == "wrong" and place <= size // 2 < place + len(part):
                    part[size // 2 - place] ^= 1
                self.wfile.write(part)
        if fault in ("cut", "stall"):
            self.close_connection = True
        if fault == "stall":
            self.wfile.flush()
            self.server.released.wait()


def commit(repository: Path) -> str:
    """Return the commit of a repository, which changes with any of its files."""
    names = sorted(f"{path.name} {etag(path)}" for path in repository.rglob("*") if path.is_file())
    return hashlib.sha1("\n".join(names).encode()).hexdigest()


# What the stand-in serves --------------------------------------------------------------------------


def write_bert(folder: Path, tiny: bool = False) -> Path:
    """Write a BERT of random weights as the hub holds BERT-base: its files, and its tensors by their old names."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForPreTraining

    from lora_lab.sources import packaged_checkpoint

    repository = folder / "models" / MODEL
    repository.mkdir(parents=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForPreTraining(BertConfig(**shape if tiny else {}))
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "decoder" not in name and "position_ids" not in name:  # the decoder is the matrix of the embeddings
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[name] = tensor.contiguous()
    save_file(tensors, repository / "model.safetensors", {"format": "pt"})
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("id2label", "label2id")}
    write_json(repository / "config.json", {**config, "architectures": ["BertForMaskedLM"]})
    packaged = packaged_checkpoint()
    shutil.copy(packaged / "vocab.txt", repository)
    whole = json.loads((packaged / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(repository / "tokenizer.json", {**whole, "truncation": None, "padding": None})
    write_json(repository / "tokenizer_config.json", {"do_lower_case": True, "model_max_length": 512})
    (repository / "pytorch_model.bin").write_bytes(b"nobody should ask for this file")
    return repository


def write_sst2(folder: Path) -> Path:
    """Write SST-2 in GLUE's layout, from the folder that SST2_DIR names or from data/movie_phrases."""
    import datasets

    from lora_lab.sources import FEATURES, MOVIE_PHRASES, read_folder

    repository = folder / "datasets" / DATA
    (repository / "sst2").mkdir(parents=True)
    splits = read_folder(Path(os.environ.get("SST2_DIR") or MOVIE_PHRASES))
    first = splits["validation"]["sentence"][:100]
    columns = {"sentence": first, "label": [-1] * len(first)}  # GLUE keeps these labels to itself
    splits["test"] = datasets.Dataset.from_dict(columns, features=FEATURES)
    for name, split in splits.items():
        split = split.add_column("idx", range(len(split)))
        split.to_parquet(repository / "sst2" / f"{name}-00000-of-00001.parquet")
    paths = "".join(f"  - split: {name}\n    path: sst2/{name}-*\n" for name in splits)
    card = f"---\nconfigs:\n- config_name: sst2\n  data_files:\n{paths}---\nA stand-in for GLUE.\n"
    (repository / "README.md").write_text(card, encoding="utf-8")
    return repository


def write_json(file, contents):
    file.write_text(json.dumps(contents, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a BERT of 2 layers and width 64")
    parser.add_argument("--port", type=int, default=0, help="by default any that is free")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if not (args.folder / "models").exists():
        write_bert(args.folder, args.tiny)
    if not (args.folder / "datasets").exists():
        write_sst2(args.folder)
    with LocalHub(args.folder, args.port) as hub:
        print(f"HF_ENDPOINT={hub.address} HF_HOME=$(mktemp -d) make run", flush=True)
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
