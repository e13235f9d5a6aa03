"""data/runtime/device.py: device and compute dtype (each with its reason), versions, peak memory.

fp32 means fp32: on CUDA matrix products round to 10 bits (TF32) only with --dtype tf32.

Threads. Two threads that wait for each other need two free cores: beside another process they are slower
than one. So small models run on one thread; large ones on every core, and train.py sets
OMP_WAIT_POLICY=PASSIVE, with which a waiting thread sleeps and does not spin. Another number of threads may
change the last bits of a result.

Public: MICRO, pick_device, pick_dtype, pick_threads, compiles, machine, peak_memory_mb
"""
import contextlib
import os
import pathlib
import subprocess
import sys

import numpy as np
import torch

from data.runtime.distributed import local_device
from data.runtime.files import UserError

# Padded tokens of one forward pass. 1024 keep the cores of a CPU busy; more would only use more memory.
MICRO = 4096 if torch.cuda.is_available() or torch.backends.mps.is_available() else 1024
WIDE = 512                                          # the width from which bf16 and threads are faster on a CPU
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def pick_device(name):
    """(torch.device, reason) of --device. Raises UserError for one that is not available.

    A process of several touches its own GPU alone: a tensor on another one takes memory there.
    """
    if name != "auto":
        try:
            known = torch.device(name).type != "meta"
        except RuntimeError:
            known = False
        if not known:
            raise UserError(f"--device {name} is none of auto, cpu, mps, cuda, cuda:0, cuda:1 and so on")
        device = local_device(torch.device(name))
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {name} is not available ({str(e).splitlines()[0]}); use auto or cpu") from None
        return prepare_device(device), "requested"
    if torch.cuda.is_available():
        return prepare_device(local_device(torch.device("cuda"))), "CUDA is available"
    if torch.backends.mps.is_available():
        return torch.device("mps"), "MPS is available"
    return torch.device("cpu"), "no GPU is available"


def prepare_device(device):
    """Make a CUDA device the current one and reset its memory statistics. Returns the device."""
    if device.type == "cuda":
        torch.empty(0, device=device)               # CUDA has no statistics before its first tensor
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    return device


def pick_dtype(name, device, width):
    """(compute dtype, reason) of --dtype: auto is bf16 where the hardware has it and it is faster, which on a
    CPU needs width 512 or more. Raises UserError for tf32 on a device without it."""
    ampere = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "tf32" and not ampere:
        raise UserError(f"--dtype tf32 needs a CUDA device from Ampere on, and this is {device}; use fp32")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"            # for LSTMs; torch's default is True
    if name != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32), "requested"
    if ampere:
        return torch.bfloat16, "this GPU has bf16"
    with contextlib.suppress(OSError):
        flags = pathlib.Path("/proc/cpuinfo").read_text() if device.type == "cpu" and width >= WIDE else ""
        if "avx512_bf16" in flags or "amx_bf16" in flags:
            return torch.bfloat16, f"this CPU has bf16, and at width {width} it is faster"
    return torch.float32, f"bf16 is not faster on {device.type} at width {width}"


def pick_threads(threads, width):
    """Set torch's threads; returns (their number, reason). threads: 0 for the rule of this file's header."""
    if threads:
        reason = "requested"
    elif "OMP_NUM_THREADS" in os.environ:
        threads = torch.get_num_threads()
        reason = "OMP_NUM_THREADS"
    elif width < WIDE:
        threads = 1
        reason = f"width {width} is below {WIDE}"
    else:
        threads = torch.get_num_threads()
        reason = "every core"
    torch.set_num_threads(threads)
    return threads, reason


def compiles(device):
    """Compile one sum, because torch finds a missing compiler only in the first step. Raises UserError."""
    try:
        torch.compile(lambda x: x * 2 + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as e:                          # no g++, no Python.h, no triton: each raises another
        why = str(e).strip().splitlines()[0][:120]
        raise UserError(f"--compile does not work on this machine ({why}); leave it out") from None


def machine():
    """Git commit (None without git), whether tracked files differ from it, versions, threads, processes."""
    def git(*args):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "--no-optional-locks", "-C", str(ROOT), *args]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno")),
            "python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
            "threads": torch.get_num_threads(), "processes": int(os.environ.get("WORLD_SIZE", 1))}


def peak_memory_mb(device):
    """Peak memory in MiB: of the device on CUDA, else of this process; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource                             # POSIX only
    except ImportError:
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
