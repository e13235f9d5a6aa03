"""data/checkpoints/safetensors.py: tensors on disk, without pickle.

Format: 8 bytes little-endian N; N bytes of UTF-8 JSON; then raw data up to the end of the file:

    {"__metadata__": {"format": "pt"}, "x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Offsets count from the first data byte. The ranges must cover the data exactly: no gap, no overlap, no byte
left. Checks are as strict as the reference library's; duplicate names, of which it keeps the last, are also
errors. Tensors are views of one private copy-on-write memory map: nothing is read until a page is used,
writing into a tensor never changes the file, and replacing the file (atomically) does not affect tensors in
use. A pickle (.bin, .pt) is recognised by its first bytes and refused; nothing that is read can be
executed.

Deviation from the reference writer: non-contiguous tensors are copied, not refused.

Public: read_tensors, write_tensors
"""
import json
import math
import mmap
import os

import torch

from data.runtime.files import DataError, atomic, unique_keys

# From narrow to wide, in the reference library's order: it writes the widest first, which keeps all aligned.
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
          "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
          "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
          "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000                                        # bytes, as in the reference library
OTHER_FORMATS = {b"PK": "a zip archive (PyTorch's .bin and .pt are zips with a pickle inside)",
                 b"\x80": "a pickle",
                 b"version https://git-lfs": "a Git LFS pointer, not the file itself", b"<": "a web page"}


def read_tensors(path):
    """{name: tensor} of a safetensors file, memory-mapped. Raises DataError for a file that is not sound."""
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
    """The tensors of a file's bytes. Raises ValueError with the reason, as do the functions below."""
    header, data_start = _read_header(buffer, size)
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise ValueError("__metadata__ must map strings to strings")
    ranges = sorted((_data_range(name, entry), name) for name, entry in header.items())
    previous_end = 0
    for (begin, end), name in ranges:
        if begin != previous_end:
            raise ValueError(f'tensor "{name}" begins at byte {begin}, but the one before it ends at '
                             f"{previous_end}")
        previous_end = end
    data_size = size - data_start
    if previous_end != data_size:
        raise ValueError(f"its tensors need {previous_end} bytes and the file has {data_size}: truncated or "
                         "padded")
    return {name: _view(buffer, data_start, name, entry) for name, entry in header.items()}


def _read_header(buffer, size):
    """(the header's JSON object, the position of the first data byte)."""
    if size < 8:
        raise ValueError(f"it has {size} bytes, and the header alone needs more")
    header_size = int.from_bytes(buffer[:8], "little")
    if header_size > min(size - 8, MAX_HEADER) or buffer[8:9] != b"{":
        # Only now: a sound file with a header of 640 bytes begins with 80 02, as a pickle does.
        for first_bytes, description in OTHER_FORMATS.items():
            if buffer[:len(first_bytes)] == first_bytes:
                raise ValueError(f"it is {description}; only safetensors are read, because a pickle can run "
                                 "code")
        raise ValueError(f"its header claims {header_size} bytes, the file has {size}: truncated, or another "
                         "format")
    data_start = 8 + header_size
    return json.loads(buffer[8:data_start].decode(), object_pairs_hook=unique_keys), data_start


def _is_list_of_counts(value):
    return type(value) is list and all(type(i) is int and i >= 0 for i in value)    # type(): True is no count


def _data_range(name, entry):
    """[begin, end] of a header entry, after checking that its dtype, shape and range agree."""
    if type(entry) is not dict or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f'tensor "{name}" lacks one of dtype, shape, data_offsets')
    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise ValueError(f'tensor "{name}" has dtype {dtype!r}; known are {" ".join(DTYPES)}')
    sound = _is_list_of_counts(shape) and _is_list_of_counts(offsets) and len(offsets) == 2
    if not sound or math.prod(max(d, 1) for d in shape) >> 60:
        raise ValueError(f'tensor "{name}" has shape {shape} and data_offsets {offsets}, which cannot be')
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f'tensor "{name}" has {end - begin} bytes, which is not {shape} of {dtype}')
    return offsets


def _view(buffer, data_start, name, entry):
    """One tensor of the memory map; a copy where a header without padding leaves its data misaligned."""
    dtype = DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    count = end - begin
    if count == 0:                                              # frombuffer cannot view nothing
        return torch.empty(entry["shape"], dtype=dtype)
    offset = data_start + begin
    if offset % dtype.itemsize:
        buffer = bytearray(buffer[offset:offset + count])
        offset = 0
    raw = torch.frombuffer(buffer, dtype=torch.uint8, count=count, offset=offset)
    if dtype is torch.bool and raw.max() > 1:                   # undefined behaviour in torch
        raise ValueError(f'tensor "{name}" is BOOL and holds bytes other than 0 and 1')
    return raw.view(dtype).reshape(entry["shape"])


def write_tensors(path, tensors):
    """Write {name: tensor} as safetensors, atomically; memory holds one extra copy of a tensor at a time.

    Tied weights are stored once, under one name, and tied again by the code that reads them. Raises
    ValueError for two names of one memory, UserError for a disk that cannot be written.
    """
    widest_first = sorted(tensors, key=lambda name: (-list(NAMES).index(tensors[name].dtype), name))
    header = {"__metadata__": {"format": "pt"}}
    owner = {}                                                  # (device, address) -> name
    end = 0
    for name in widest_first:
        t = tensors[name]
        if t.numel():
            first = owner.setdefault((t.device, t.data_ptr()), name)
            if first != name:
                raise ValueError(f'{path}: "{name}" and "{first}" are the same memory; write one of them')
        begin = end
        end += t.numel() * t.itemsize
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    header_bytes = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)             # aligns the data
    with atomic(path) as f:
        f.write(len(header_bytes).to_bytes(8, "little"))
        f.write(header_bytes)
        for name in widest_first:
            f.write(tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
