"""machine.py: what we run on: device, precision (each with its reason), versions, memory.

Public: MICRO, pick_device, pick_dtype, machine, peak_memory_mb
"""
import contextlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import torch

from data.files import UserError

# Padded tokens of one forward. A GPU wants many; on a CPU 1024 fill the cores, and more only fill memory.
MICRO = 4096 if torch.cuda.is_available() or torch.backends.mps.is_available() else 1024
ROOT = pathlib.Path(__file__).resolve().parent.parent


def pick_device(asked):
    """(device, why)."""
    if asked != "auto":
        try:
            torch.empty(0, device=asked)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {asked} is not there: {str(e).splitlines()[0]}") from None
        return torch.device(asked), "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda"), "a CUDA device is there"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple's GPU is there"
    return torch.device("cpu"), "no GPU here"


def pick_dtype(asked, device, width):
    """The compute dtype, and why: bf16 where the hardware has it and it pays, on a CPU from width 512 on."""
    if asked != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[asked], "asked for"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU computes in bf16"
    with contextlib.suppress(OSError):
        flags = pathlib.Path("/proc/cpuinfo").read_text() if device.type == "cpu" and width >= 512 else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16, f"this CPU computes in bf16, which pays from width 512 on; this is {width}"
    return torch.float32, f"on {device.type} at width {width} bf16 would not be faster"


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
