"""data/runtime/device.py: what we run on: device, precision (each with its reason), versions, memory.

fp32 is fp32: on CUDA, too, products round to 10 bits (TF32) only where --dtype tf32 asks for it.

Public: MICRO, pick_device, pick_dtype, compiles, machine, peak_memory_mb
"""
import contextlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import torch

from data.runtime.files import UserError

# Padded tokens of one forward. A GPU wants many; on a CPU 1024 fill the cores, and more only fill memory.
MICRO = 4096 if torch.cuda.is_available() or torch.backends.mps.is_available() else 1024
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def pick_device(asked):
    """(device, why)."""
    if asked != "auto":
        try:
            torch.empty(0, device=asked)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {asked} is not there: {str(e).splitlines()[0]}") from None
        return begun(torch.device(asked)), "asked for"
    if torch.cuda.is_available():
        return begun(torch.device("cuda")), "a CUDA device is there"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple's GPU is there"
    return torch.device("cpu"), "no GPU here"


def begun(device):
    """The device, made the current one where there are several, and its peak of memory forgotten."""
    if device.type == "cuda":
        torch.empty(0, device=device)               # before its first tensor CUDA has no statistics
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    return device


def pick_dtype(asked, device, width):
    """The compute dtype, and why: bf16 where the hardware has it and it pays, on a CPU from width 512 on."""
    ampere = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "tf32" and not ampere:
        raise UserError(f"--dtype tf32 is a way of CUDA devices from Ampere on, not of {device}; use fp32")
    torch.set_float32_matmul_precision("high" if asked == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = asked == "tf32"           # an LSTM's products; torch's default is True
    if asked != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(asked, torch.float32), "asked for"
    if ampere:
        return torch.bfloat16, "this GPU computes in bf16"
    with contextlib.suppress(OSError):
        flags = pathlib.Path("/proc/cpuinfo").read_text() if device.type == "cpu" and width >= 512 else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16, f"this CPU computes in bf16, which pays from width 512 on; this is {width}"
    return torch.float32, f"on {device.type} at width {width} bf16 would not be faster"


def compiles(device):
    """--compile needs a compiler, which torch looks for when it is too late: try it on one sum."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as e:                          # no g++, no Python.h, no triton: as many kinds
        why = str(e).strip().splitlines()[0][:120]
        raise UserError(f"--compile does not work on this machine ({why}); leave it out") from None


def machine():
    """Commit, versions and threads: what a number needs beside it."""
    def git(*args):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            return subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True,
                                  timeout=10).stdout.strip()
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno")),
            "python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "threads": torch.get_num_threads(), "processes": int(os.environ.get("WORLD_SIZE", 1))}


def peak_memory_mb(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource                             # POSIX only
    except ImportError:
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
