"""Check how the project is laid out, and that adapters saved by its older code still load."""

import ast
import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

import lora_utils
from lora_utils import LoRABertModel, qLoRABertModel

MODULE = ROOT / "lora_utils.py"
LAB = sorted((ROOT / "lora_lab").glob("*.py"))
OLD_ADAPTERS = ROOT / "tests" / "adapters_of_b0ed9ae"


def imported_names(file):
    """Return the full names of everything that a file imports, wherever in the file."""
    package = file.parent.name
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = [package] if node.level else []
            parts += [node.module] if node.module else []
            module = ".".join(parts)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def top_level_names(file):
    """Return the names that a module defines itself, without those that it imports."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def run_isolated(code, folder):
    """Run code in a new process that sees neither this project's folder nor PYTHONPATH."""
    command = [sys.executable, "-I", "-c", code, str(folder)]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout


def test_lora_utils_works_when_only_its_file_is_copied(tmp_path):
    shutil.copy(MODULE, tmp_path)
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import lora_utils, torch
        layer = lora_utils.LoRALayer(torch.nn.Linear(8, 6), rank=2)
        print(lora_utils.__file__)
        print(tuple(layer(torch.ones(3, 8)).shape))
    """
    assert run_isolated(code, tmp_path).splitlines() == [str(tmp_path / "lora_utils.py"), "(3, 6)"]


def test_importing_lora_utils_imports_neither_datasets_nor_the_rest_of_the_project():
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        import lora_utils
        print(sorted(name for name in ("datasets", "lora_lab", "accelerate", "peft") if name in sys.modules))
    """
    found = ast.literal_eval(run_isolated(code, ROOT))
    assert "datasets" not in found and "lora_lab" not in found


def test_lora_utils_imports_nothing_of_this_project():
    ours = {"lora_lab", *(file.stem for file in ROOT.glob("*/*.py")), *(file.name for file in ROOT.iterdir())}
    assert not {name.partition(".")[0] for name in imported_names(MODULE)} & ours


@pytest.mark.parametrize("file", LAB, ids=lambda file: file.stem)
def test_a_module_of_lora_lab_imports_only_lora_utils_of_this_project(file):
    ours = {other.stem for folder in ("benchmarks", "tests", "tools") for other in (ROOT / folder).glob("*.py")}
    ours |= {"lora_lab", "benchmarks", "tests", "tools", *(other.stem for other in LAB)}
    allowed = {"lora_lab.compare", "lora_lab.rounding"} if file.stem == "figures" else set()
    for name in imported_names(file):
        if name.partition(".")[0] in ours:
            module = ".".join(name.split(".")[:2])  # lora_lab.compare of lora_lab.compare.mcnemar
            assert module in allowed, f"{file.name} imports {name}"


def test_the_package_itself_exports_nothing():
    (docstring,) = ast.parse((ROOT / "lora_lab" / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str)


def test_every_name_of_lora_utils_is_public_or_starts_with_an_underscore():
    names = top_level_names(MODULE)
    private = [name for name in names if name not in lora_utils.__all__ and name != "__all__"]
    assert len(private) > 10 and all(name.startswith("_") for name in private), private
    assert set(lora_utils.__all__) <= set(names)
    assert len(lora_utils.__all__) == len(set(lora_utils.__all__)) <= 19
    assert not any(name.startswith("_") for name in lora_utils.__all__)
    classes = [node.name for node in ast.parse(MODULE.read_text()).body if isinstance(node, ast.ClassDef)]
    assert classes[0] == "LoRALayer"


def test_lora_utils_does_not_grow():
    """The limit is 1,100 lines, and the file exceeds it: `tools/check_layout.py` prints by how much, part by part."""
    assert len(MODULE.read_text().splitlines()) <= 1_480


def public_callables():
    """Return {name: function} of the public functions, and of the constructors and public methods of our classes.

    `forward` and `backward` of an autograd function are left out: PyTorch gives them their form.
    """
    found = {}
    for name in lora_utils.__all__:
        value = getattr(lora_utils, name)
        if inspect.isfunction(value):
            found[name] = value
        elif not issubclass(value, torch.autograd.Function):
            methods = ["__init__", *(method for method in dir(value) if not method.startswith("_"))]
            for method in methods:
                function = inspect.unwrap(getattr(value, method))
                function = getattr(function, "__func__", function)  # of a class method
                if inspect.isfunction(function) and function.__module__ == "lora_utils":
                    found[f"{name}.{method}"] = function
    return found


@pytest.mark.parametrize("name", public_callables())
def test_every_parameter_of_a_public_function_has_a_type_hint(name):
    bare = {"self", "cls", "split", "tokenizer"} if name == "make_loader" else {"self", "cls"}
    parameters = inspect.signature(public_callables()[name]).parameters.values()
    without = [p.name for p in parameters if p.annotation is p.empty and p.name not in bare]
    assert not without, f"{name} has no hint for {', '.join(without)}"


def test_public_callables_holds_what_a_reader_calls():
    expected = {"quantize", "evaluate", "LoRALayer.__init__", "LoRALayer.forward", "qLoRABertModel.from_pretrained"}
    expected |= {"LengthGroupedBatches.set_epoch", "QuantizedLinear.__init__", "QuantizedEmbedding.dequantize"}
    assert expected <= public_callables().keys()


# Adapters that commit b0ed9ae saved, of the BERT in conftest.py under the name "a-small-bert" ----------


def decode_by_hand(codes, scales, bits, width):
    """Decode packed integers, (rank, width), bit by bit, with nothing of `lora_utils`."""
    ones = "".join(f"{byte:08b}" for byte in codes.tolist())
    rank = len(scales)
    q = [int(ones[i * bits : (i + 1) * bits], 2) - 2 ** (bits - 1) for i in range(rank * width)]
    return scales[:, None] * (torch.tensor(q).view(rank, width) + 0.5)


def load_old(model_class, kind, bert):
    """Load an adapter of b0ed9ae, which warns. Return the model, the file's tensors and the config."""
    folder = OLD_ADAPTERS / kind
    with pytest.warns(UserWarning, match="could not be verified"):
        model = model_class.from_pretrained(folder, dtype=torch.float32, folder=bert)
    config, tensors = (folder / name for name in model_class.FILES)
    return model, load_file(tensors), json.loads(config.read_text())


@torch.no_grad()
def test_a_plain_adapter_of_b0ed9ae_gives_the_bits_of_its_file(bert, batch):
    model, tensors, config = load_old(LoRABertModel, "plain", bert)
    by_hand = LoRABertModel(str(bert), rank=2, alpha=6, use_rslora=True, dtype=torch.float32).eval()
    assert config["r"] == 2 and config["lora_alpha"] == 6 and config["use_rslora"]
    assert len(by_hand.lora_layers()) == 4 and len(tensors) == 4 * 2 + 2
    for name, layer in by_hand.lora_layers().items():
        layer.lora_A.copy_(tensors[f"base_model.model.{name}.lora_A.weight"])
        layer.lora_B.copy_(tensors[f"base_model.model.{name}.lora_B.weight"])
        assert layer.scaling == 6 / 2**0.5
    by_hand.model.classifier.weight.copy_(tensors["base_model.model.classifier.weight"])
    by_hand.model.classifier.bias.copy_(tensors["base_model.model.classifier.bias"])
    assert torch.equal(model(**batch).logits, by_hand(**batch).logits)


@torch.no_grad()
def test_a_packed_adapter_of_b0ed9ae_gives_the_bits_of_its_file(bert, batch):
    model, tensors, config = load_old(qLoRABertModel, "packed", bert)
    assert config["bits"] == 3 and config["rank"] == 2 and config["alpha"] == 6
    by_hand = LoRABertModel(str(bert), rank=2, alpha=6, dtype=torch.float32).eval()
    assert len(by_hand.lora_layers()) == 4 and len(tensors) == 4 * 4 + 2
    for name, layer in by_hand.lora_layers().items():
        A = decode_by_hand(tensors[f"{name}.A_codes"], tensors[f"{name}.A_scales"], 3, 64)
        B = decode_by_hand(tensors[f"{name}.B_codes"], tensors[f"{name}.B_scales"], 3, 64).T
        packed = model.lora_layers()[name]
        assert packed.packed and all(map(torch.equal, packed.low_rank(), (A, B)))
        layer.lora_A = torch.nn.Parameter(A)
        layer.lora_B = torch.nn.Parameter(B)
        assert layer.scaling == 3
    by_hand.model.classifier.weight.copy_(tensors["classifier.weight"])
    by_hand.model.classifier.bias.copy_(tensors["classifier.bias"])
    assert torch.equal(model(**batch).logits, by_hand(**batch).logits)


@pytest.mark.parametrize("model_class, kind", [(LoRABertModel, "plain"), (qLoRABertModel, "packed")])
def test_the_adapters_of_b0ed9ae_have_the_old_record_and_name_no_path(bert, tmp_path, model_class, kind):
    folder = OLD_ADAPTERS / kind
    config, tensors = (folder / name for name in model_class.FILES)
    assert sorted(file.name for file in folder.iterdir()) == sorted(model_class.FILES)
    with safe_open(tensors, "pt") as opened:
        record = json.loads(opened.metadata()["lora_utils"])
    assert record.keys() == {"config", "scaling", "base"}
    assert record["config"] == json.loads(config.read_text())
    assert record["config"]["base_model_name_or_path"] == "a-small-bert"
    assert config.stat().st_size + tensors.stat().st_size < 10_000

    with pytest.warns(UserWarning, match="could not be verified"):
        model = model_class.from_pretrained(folder, folder=bert)
    assert model.model_name == "a-small-bert"
    model.save_pretrained(tmp_path)  # now with the SHA-256 of the base
    with safe_open(tmp_path / model_class.FILES[1], "pt") as opened:
        assert json.loads(opened.metadata()["lora_utils"])["base_sha256"] == model.fingerprint
    again = load_file(tmp_path / model_class.FILES[1])
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(tensors).items())
