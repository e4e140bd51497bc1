"""Check that `lora_utils.py` works alone, what the README tells to run, and that adapters of older code load."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from lora_utils import LoRABertModel, qLoRABertModel

OLD_ADAPTERS = ROOT / "tests" / "adapters_of_b0ed9ae"


def test_lora_utils_works_when_only_its_file_is_copied_and_does_not_import_datasets(tmp_path):
    shutil.copy(ROOT / "lora_utils.py", tmp_path)
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import lora_utils, torch
        layer = lora_utils.LoRALayer(torch.nn.Linear(8, 6), rank=2)
        print(lora_utils.__file__)
        print(tuple(layer(torch.ones(3, 8)).shape), "datasets" in sys.modules)
    """
    command = [sys.executable, "-I", "-c", code, str(tmp_path)]  # sees neither this folder nor PYTHONPATH
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(tmp_path / "lora_utils.py"), "(3, 6) False"]


def test_the_readme_runs_and_calls_only_what_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z-]+)", readme)) - {"address"}:
        assert re.search(rf"(?m)^{target}:", makefile), target
    for file in re.findall(r"(?:python |-r |nproc-per-node=2 )([\w./-]+\.(?:py|txt))", readme):
        assert (ROOT / file).is_file(), file
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    calls = [
        node.func.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and "attr" in dir(node.func)
    ]
    assert len(calls) >= 6 and all(hasattr(qLoRABertModel, call) for call in calls), calls


# Adapters that commit b0ed9ae saved, of the BERT in conftest.py under the name "a-small-bert" ----------


def decode_by_hand(codes, scales, bits, width):
    """Decode packed integers, (rank, width), bit by bit, with nothing of `lora_utils`."""
    ones = "".join(f"{byte:08b}" for byte in codes.tolist())
    rank = len(scales)
    q = [int(ones[i * bits : (i + 1) * bits], 2) - 2 ** (bits - 1) for i in range(rank * width)]
    return scales[:, None] * (torch.tensor(q).view(rank, width) + 0.5)


def read_by_hand(tensors, name):
    """Return a layer's A and B of an old adapter, float or packed in 3 bits."""
    if f"{name}.A_codes" in tensors:
        A = decode_by_hand(tensors[f"{name}.A_codes"], tensors[f"{name}.A_scales"], 3, 64)
        return A, decode_by_hand(tensors[f"{name}.B_codes"], tensors[f"{name}.B_scales"], 3, 64).T
    name = f"base_model.model.{name}"
    return tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]


@pytest.mark.parametrize(
    "model_class, kind, use_rslora", [(LoRABertModel, "plain", True), (qLoRABertModel, "packed", False)]
)
@torch.no_grad()
def test_an_adapter_of_b0ed9ae_gives_the_bits_of_its_file(bert, batch, tmp_path, model_class, kind, use_rslora):
    """Its record holds another kind of fingerprint, and the scaling, which the config gives."""
    folder = OLD_ADAPTERS / kind
    with pytest.warns(UserWarning, match=f"{folder}: an older version .* base could not be verified"):
        model = model_class.from_pretrained(folder, dtype=torch.float32, folder=bert)
    assert model.model_name == "a-small-bert"
    tensors = load_file(folder / model.FILES[1])
    by_hand = LoRABertModel(str(bert), rank=2, alpha=6, use_rslora=use_rslora, dtype=torch.float32).eval()
    assert len(by_hand.lora_layers()) == 4
    for name, layer in by_hand.lora_layers().items():
        A, B = read_by_hand(tensors, name)
        assert all(map(torch.equal, model.lora_layers()[name].low_rank(), (A, B)))
        layer.lora_A = torch.nn.Parameter(A)
        layer.lora_B = torch.nn.Parameter(B)  # as the model has it in memory, because the order changes the last bit
    for name, parameter in by_hand.model.classifier.named_parameters():
        (saved,) = (tensor for key, tensor in tensors.items() if key.endswith(f"classifier.{name}"))
        parameter.copy_(saved)
    assert torch.equal(model(**batch).logits, by_hand(**batch).logits)

    model.save_pretrained(tmp_path)  # now with the SHA-256 of the base
    again = load_file(tmp_path / model.FILES[1])
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    old, new = (json.loads((place / model.FILES[0]).read_text(encoding="utf-8")) for place in (folder, tmp_path))
    assert old == new
    model_class.from_pretrained(tmp_path, dtype=torch.float32, folder=bert).load_adapter(tmp_path)
