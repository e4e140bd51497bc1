"""Say which machine, versions and commit made a result, and hold a CPU to an older instruction set."""

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SPEED = RESULTS / "speed"
sys.path.insert(0, str(ROOT))

import lora_utils  # noqa: E402  (the project is a folder, not a package)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# The kinds of machine. What results are filed under: (name in the tables, format of the frozen weights, variables
# that hold PyTorch's libraries to this instruction set). What a CPU needs for it, `lora_utils._ISA_FEATURES` says.
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
AVX512 = {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX512_E1"}
MACHINES = {
    "cuda": ("GPU (Hopper)", "bfloat16", None),
    "amx_bf16": ("AMX", "bfloat16", None),
    "avx512_bf16": ("AVX512_BF16", "bfloat16", None),
    "avx512_core_bf16": ("AVX512_BF16", "bfloat16", AVX512),
    "avx512_core_vnni": ("AVX512_VNNI", "float32", AVX512),
    "avx2_vnni": ("AVX2_VNNI", "float32", AVX2),
    "avx2": ("AVX2", "float32", AVX2),
}
HELD = [name.upper() for name, (*_, variables) in MACHINES.items() if variables]


def filed_under():
    """Return the kind of this machine: what its CPU is held to, or what it computes in."""
    native, able = lora_utils.detect_compute_format(), torch.cpu.get_capabilities()
    if DEVICE.type == "cuda":
        return "CUDA"
    if held := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        return held
    if native.dtype == torch.bfloat16:
        return "AMX_BF16" if able.get("amx_bf16") else "AVX512_BF16"
    if native.int8 == "onednn":
        return "AVX512_CORE_VNNI" if able.get("avx512_vnni") else "AVX2_VNNI"
    return torch.backends.cpu.get_cpu_capability()


def hold(to):
    """Start this script again with the CPU held to an instruction set, if that is asked for and not so yet."""
    if to and os.environ.get("ONEDNN_MAX_CPU_ISA") != to:
        able = torch.cpu.get_capabilities()
        lacking = [name for name in ("avx2", *lora_utils._ISA_FEATURES[to]) if not able.get(name)]
        if lacking or filed_under() == to:
            print(f"left out: {f'this CPU lacks {lacking[0]}' if lacking else 'this is what the CPU is'} ({to})")
            raise SystemExit
        variables = MACHINES[to.lower()][2] | {"ONEDNN_MAX_CPU_ISA": to}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | variables)


def versions(frozen_dtype):
    """Return the device and the versions that made a number."""
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    kind = {"device": device, "isa": torch.backends.cpu.get_cpu_capability()}
    kind |= {"frozen_dtype": str(frozen_dtype).removeprefix("torch."), "python": platform.python_version()}
    return kind | {"torch": torch.__version__, "transformers": transformers.__version__}


@functools.cache
def commit():
    """Return the commit at the first call, marked if a file has changed since. Call it before measuring."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, encoding="utf-8").stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def save(file, result):
    """Write a result of speed or memory as JSON, with all that made it."""
    peers = {name: importlib.metadata.version(name) for name in ("peft", "bitsandbytes")}
    peers["cpu"] = torch.cpu.get_capabilities().get("cpu_name", "?")
    about = {"arithmetic": filed_under(), "held_to": os.environ.get("ONEDNN_MAX_CPU_ISA")}
    about["machine"] = versions(lora_utils.detect_compute_format().dtype) | peers
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result | about | {"commit": commit()}, indent=1) + "\n", encoding="utf-8")
    print(f"saved {file}")
