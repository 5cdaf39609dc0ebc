"""safetensors files: the header is checked before anything is allocated, the data are read once, hashed, never mapped.

A mapped file that changes after loading changes the model, and one that is cut short kills the process.
The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header, the tensors back to back.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dylo_moe.errors import DtypeUnsupported, InvalidField, NonFiniteTensor, UnreadableFile
from dylo_moe.formats.jsonfile import parse_json

# 80 layers x 7 modules x 2 tensors x 32 experts = 35,840 tensors of about 200 header bytes: 7 MB. Parsing takes some 30 bytes
# of memory per header byte, so the limit also bounds that at about 300 MB.
MAX_HEADER_BYTES = 10_000_000
MAX_TENSORS = 50_000
MAX_DIMENSIONS = 8

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """One entry of a header. `start` and `end` count bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0


def read_header(path: Path, name: Path) -> dict[str, TensorInfo]:
    """Entries of the header in file order, checked against the file's size; `name` is what messages call the file.

    Raises:
        UnreadableFile: cut short, too long, holes or overlaps between tensors, malformed entries.
        DtypeUnsupported: a dtype that torch cannot hold.
    """
    with _open(path, name) as file:
        return _header(file, name)[0]


def load_tensors(path: Path, name: Path) -> tuple[dict[str, Tensor], str]:
    """Every tensor, and the SHA-256 of the whole file as it was read. Each tensor owns its memory."""
    with _open(path, name) as file:
        entries, raw = _header(file, name)
        digest = hashlib.sha256(raw)
        tensors = {}
        for key, info in sorted(entries.items(), key=lambda entry: entry[1].start):
            buffer = bytearray(info.end - info.start)
            if file.readinto(buffer) != len(buffer):
                raise UnreadableFile(name, key, found="the end of the file", expected="the tensor's data")
            digest.update(buffer)
            tensors[key] = _tensor(buffer, info)
        return {key: tensors[key] for key in entries}, digest.hexdigest()


def _tensor(buffer: bytearray, info: TensorInfo) -> Tensor:
    if not buffer:
        return torch.empty(info.shape, dtype=info.dtype)
    return torch.frombuffer(buffer, dtype=info.dtype).reshape(info.shape)


def _open(path: Path, name: Path) -> BinaryIO:
    try:
        return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    except OSError as error:
        raise UnreadableFile(name, "", found=f"error {error.strerror}", expected="a readable file") from error


def _header(file: BinaryIO, name: Path) -> tuple[dict[str, TensorInfo], bytes]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise UnreadableFile(name, "", found=f"{size} bytes", expected="a safetensors file, which has at least 8")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(MAX_HEADER_BYTES, size - 8):
        expected = f"at most {min(MAX_HEADER_BYTES, size - 8):,} bytes"
        raise UnreadableFile(name, "header", found=f"a length of {length:,} bytes", expected=expected)
    raw = file.read(length)
    fields = parse_json(raw, name)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise UnreadableFile(name, "__metadata__", found=type(metadata).__name__, expected="an object")
    if len(fields) > MAX_TENSORS:
        raise UnreadableFile(name, "header", found=f"{len(fields):,} tensors", expected=f"at most {MAX_TENSORS:,}")
    entries = {key: _entry(key, value, name) for key, value in fields.items()}
    _check_offsets(entries, size - 8 - length, name)
    return entries, prefix + raw


def _entry(key: str, value: Any, name: Path) -> TensorInfo:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise UnreadableFile(name, key, found=f"{str(value)[:80]}", expected="dtype, shape and data_offsets")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        raise DtypeUnsupported(name, key, found=str(value["dtype"])[:80], expected=f"one of {', '.join(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _is_size_list(shape) or len(shape) > MAX_DIMENSIONS:
        raise UnreadableFile(name, key, found=f"shape {str(shape)[:80]}", expected="a list of sizes")
    if not _is_size_list(offsets) or len(offsets) != 2:
        raise UnreadableFile(name, key, found=f"data_offsets {str(offsets)[:80]}", expected="two offsets")
    dtype = DTYPES[value["dtype"]]
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        found = f"{offsets[1] - offsets[0]} bytes for shape {shape}"
        raise UnreadableFile(name, key, found=found, expected=f"{math.prod(shape) * dtype.itemsize} bytes")
    return TensorInfo(dtype, tuple(shape), offsets[0], offsets[1])


def _is_size_list(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_offsets(entries: dict[str, TensorInfo], data_bytes: int, name: Path) -> None:
    position = 0
    for key, info in sorted(entries.items(), key=lambda entry: (entry[1].start, entry[1].end)):
        if info.start != position:
            raise UnreadableFile(name, key, found=f"data at {info.start}", expected=f"data at {position}, without holes")
        position = info.end
    if position != data_bytes:
        raise UnreadableFile(name, "", found=f"{data_bytes:,} bytes of data", expected=f"{position:,} bytes")


def require_float(info: TensorInfo, key: str, file: Path) -> None:
    """Raises DtypeUnsupported unless the dtype is float64, float32, float16 or bfloat16."""
    if info.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise DtypeUnsupported(file, key, found=info.dtype, expected="float64, float32, float16 or bfloat16")


def check_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises NonFiniteTensor naming the first tensor with a NaN or an infinity."""
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        finite = torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor)  # torch has no isfinite for 8 bits
        if not finite.all():
            count = int((~finite).sum())
            raise NonFiniteTensor(file, key, found=f"{count} values that are NaN or infinite", expected="finite values")


def require_integer(value: object, file: Path, field: str, *, low: int, high: int) -> int:
    """`value` as an int of [low, high]; bool, float and text are refused with InvalidField."""
    if type(value) is not int or not low <= value <= high:
        raise InvalidField(file, field, found=repr(value)[:80], expected=f"an integer from {low} to {high:,}")
    return value
