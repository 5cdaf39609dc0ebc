"""Program of the child process that reads pickles, started by pickle_reader.py. Imports nothing of the package.

A request is a line of JSON, [scratch, file, ...]; the answer is an empty line, when everything is written: for file number n
scratch/n.json, either {"refused": text} or {"tree": ..., "sha256": ...}, and scratch/n.safetensors.
Each request is answered by a fork of its own, which has read nothing before; so torch is imported once.
A tree node is [kind, value] with kind "dict", "list", "tensor" (value: a key of the safetensors file) or "plain".
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import pickle
import resource
import select
import struct
import sys
import zipfile
from pathlib import Path

import torch

# How long a reader that is asked nothing stays.
IDLE_SECONDS = 60.0
# Besides three times the file: buffers of the reader and of the allocator.
SPARE_BYTES = 256 * 2**20
MAX_DEPTH = 16
MAX_NODES = 200_000
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Refused(Exception):
    """The file holds something that is not a tree of tensors and plain values."""


def serve() -> None:
    """Answers requests until there are none any more."""
    torch.set_num_threads(1)
    requests = os.fdopen(0, "rb", buffering=0)  # unbuffered: what is not read yet can be waited for
    while select.select([requests], [], [], IDLE_SECONDS)[0]:
        line = requests.readline()
        if not line:
            break
        scratch, *files = map(Path, json.loads(line))
        _apart(scratch, files)
        os.write(1, b"\n")


def _apart(scratch: Path, files: list[Path]) -> None:
    """In a fork without the pipes. Where torch does not survive a fork, which is certain on Linux only, the last request of this
    process."""
    if sys.platform != "linux":
        main(scratch, files)
        os.write(1, b"\n")
        sys.exit()
    child = os.fork()
    if child == 0:
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for pipe in (0, 1):
                os.dup2(nowhere, pipe)
            main(scratch, files)
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def main(scratch: Path, files: list[Path]) -> None:
    before = _address_space()
    for number, file in enumerate(files):
        limit = before + 3 * file.stat().st_size + SPARE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        answer = _answer(file, scratch / f"{number}.safetensors")
        (scratch / f"{number}.json").write_text(json.dumps(answer))


def _answer(file: Path, target: Path) -> dict:
    try:
        return _convert(file, target)
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": "a file that needs far more memory than its size"}
    except (pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        return {"refused": f"a pickle that torch.load refuses ({_first_line(error)})"}
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, AssertionError) as error:
        return {"refused": f"a file that torch.load cannot read ({_first_line(error)})"}
    except (RecursionError, ImportError, OverflowError, UnicodeError, struct.error) as error:
        return {"refused": f"a file that torch.load cannot read ({_first_line(error)})"}


def _convert(file: Path, target: Path) -> dict:
    data = file.read_bytes()
    loaded = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    tensors: list[torch.Tensor] = []
    tree = _tree(loaded, tensors, [0], depth=0)
    if tree[0] != "dict":
        raise Refused(f"a {type(loaded).__name__}, not a dict")
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if needed > 4 * len(data) + 2**20:
        raise Refused(f"{len(data):,} bytes that stand for {needed:,} bytes of tensors")
    _write(target, tensors)
    return {"tree": tree, "sha256": hashlib.sha256(data).hexdigest()}


def _tree(value: object, tensors: list[torch.Tensor], count: list[int], *, depth: int) -> list:
    count[0] += 1
    if depth > MAX_DEPTH or count[0] > MAX_NODES:
        raise Refused("too many nested values")
    if isinstance(value, torch.Tensor):
        tensors.append(_dense(value))
        return ["tensor", str(len(tensors) - 1)]
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise Refused("a dict whose keys are not text")
        return ["dict", {key: _tree(child, tensors, count, depth=depth + 1) for key, child in value.items()}]
    if isinstance(value, list | tuple):
        return ["list", [_tree(child, tensors, count, depth=depth + 1) for child in value]]
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    raise Refused(f"a value of type {type(value).__name__}")


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype not in NAMES:
        raise Refused(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}")
    if tensor.device.type != "cpu":
        raise Refused(f"a tensor without data, on device {tensor.device.type}")
    return tensor.detach()


def _write(target: Path, tensors: list[torch.Tensor]) -> None:
    header, position = {}, 0
    for number, tensor in enumerate(tensors):
        size = math.prod(tensor.shape) * tensor.element_size()
        offsets = [position, position + size]
        header[str(number)] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        position += size
    raw = json.dumps(header).encode()
    with target.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _address_space() -> int:
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 16 * 2**30


def _first_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


if __name__ == "__main__":
    serve()
