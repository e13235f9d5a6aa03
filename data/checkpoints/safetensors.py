"""data/checkpoints/safetensors.py: weights that are never code.

safetensors.  8 bytes little-endian N; N bytes of UTF-8 JSON; then raw data up to the end of the file:

    {"__metadata__": {"format": "pt"}, "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Offsets count from the first data byte.  The ranges must tile the data exactly: no gap, overlap or spare byte.
We are as strict as the reference library, and also refuse duplicate names (it keeps the last in silence).
Tensors are views of one private copy-on-write mapping: reading costs nothing until a page is touched, writing
into a tensor never reaches the file, and replacing the file (atomically) does not disturb the tensors.
A pickle (.bin, .pt) is recognised by its bytes and refused; nothing here can execute what it reads.

Deviation from the reference writer: non-contiguous tensors are copied, not refused.

Public: read_tensors, write_tensors
"""
import json
import math
import mmap
import os

import torch

from data.runtime.files import DataError, atomic, unique_keys

# In the reference library's order, narrow to wide: it writes the widest first, so every tensor stays aligned.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
          "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
          "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
          "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000                                        # bytes; the reference library's limit, too
FOREIGN = {b"PK": "a zip archive (PyTorch's .bin and .pt are zips with a pickle inside)", b"\x80": "a pickle",
           b"version https://git-lfs": "a Git LFS pointer, not the file itself", b"<": "a web page"}


def read_tensors(path):
    """The tensors of a safetensors file by name: memory-mapped, checked to the last byte, private to us."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            buffer = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) if size else b""
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror or e})") from e
    try:
        return _parse(buffer, size)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not a sound safetensors file: {e}") from e


def _parse(buffer, size):
    if size < 8:
        raise ValueError(f"it holds {size} bytes, and the header alone takes more")
    n = int.from_bytes(buffer[:8], "little")
    if n > min(size - 8, MAX_HEADER) or buffer[8:9] != b"{":
        # Foreign magic counts only now: a sound file with a header of 640 bytes begins like a pickle (80 02).
        for magic, what in FOREIGN.items():
            if buffer[:len(magic)] == magic:
                raise ValueError(f"it is {what}; only safetensors are read, because a pickle can run code")
        raise ValueError(f"its header claims {n} bytes, the file has {size}: truncated, or another format")
    header = json.loads(buffer[8:8 + n].decode(), object_pairs_hook=unique_keys)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    end = 0
    for (begin, stop), name in sorted((_span(name, entry), name) for name, entry in header.items()):
        if begin != end:
            raise ValueError(f'tensor "{name}" begins at byte {begin}, but the one before it ends at {end}')
        end = stop
    if end != size - 8 - n:
        raise ValueError(f"its tensors need {end} bytes and the file has {size - 8 - n}: truncated or padded")
    return {name: _view(buffer, 8 + n, name, entry) for name, entry in header.items()}


def _span(name, entry):
    """[begin, end] of a header entry whose dtype, shape and range agree."""
    def whole(x):
        return type(x) is list and all(type(i) is int and i >= 0 for i in x)        # True is no number here

    if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f'tensor "{name}" lacks one of dtype, shape, data_offsets')
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f'tensor "{name}" has dtype {dtype!r}; known are {" ".join(DTYPES)}')
    if not whole(shape) or not whole(span) or len(span) != 2 or math.prod(max(d, 1) for d in shape) >> 60:
        raise ValueError(f'tensor "{name}" has shape {shape} and data_offsets {span}, which cannot be')
    if span[1] - span[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f'tensor "{name}" has {span[1] - span[0]} bytes, which is not {shape} of {dtype}')
    return span


def _view(buffer, start, name, entry):
    """One tensor of the mapping; a copy where a (legal) unpadded header leaves its data misaligned."""
    dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
    if begin == end:                                            # frombuffer refuses to view nothing
        return torch.empty(entry["shape"], dtype=dtype)
    begin, end = start + begin, start + end
    if begin % dtype.itemsize:
        buffer, begin, end = bytearray(buffer[begin:end]), 0, end - begin
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=end - begin, offset=begin)
    if dtype is torch.bool and raw.max() > 1:                   # torch leaves such a bool undefined
        raise ValueError(f'tensor "{name}" is BOOL and holds bytes other than 0 and 1')
    return raw.view(dtype).reshape(entry["shape"])


def write_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors, atomically, one copy in memory at a time. Two names for one memory
    are refused: tied weights are stored once, under one name, and tied again by whoever reads them."""
    owner, header, end = {}, {"__metadata__": metadata or {"format": "pt"}}, 0
    order = sorted(tensors, key=lambda name: (-list(NAMES).index(tensors[name].dtype), name))
    for name in order:
        t = tensors[name]
        if t.numel() and (first := owner.setdefault((t.device, t.data_ptr()), name)) != name:
            raise ValueError(f'{path}: "{name}" and "{first}" are the same memory; write one of them')
        begin, end = end, end + t.numel() * t.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)                             # so that the data is aligned
    with atomic(path) as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            f.write(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
