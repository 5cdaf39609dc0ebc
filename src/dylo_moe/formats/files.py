"""The only door to a checkpoint's files: each is checked to be a regular file inside the checkpoint, hashed, and remembered."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dylo_moe.errors import HashMismatch, MissingFile, UnreadableFile, one_line
from dylo_moe.formats.jsonfile import parse_json
from dylo_moe.formats.pickle_file import PickleTree, convert_pickles
from dylo_moe.formats.safetensors_file import TensorInfo, load_tensors, read_header

# Configurations are a few kB. A list of full module names for a 1,000-layer model is about 400 kB.
MAX_JSON_BYTES = 4_000_000
# A snapshot of the hub cache holds links to ../../blobs; those are the only links out of a directory that are followed.
_SNAPSHOT = re.compile(r"(?P<repository>.*/models--[^/]+)/snapshots/[^/]+(/.*)?")


class CheckpointFiles:
    """What has been read of one checkpoint.

    Args:
        root: the directory that the user named, or the directory of the file that the user named.
        expected: SHA-256 by relative path; a file that is read and listed here must have that hash.

    `hashes`, `warnings` and `assumptions` fill up while a format is read and end in the Checkpoint.
    """

    def __init__(self, root: Path, expected: Mapping[str, str] | None = None) -> None:
        self.root = root
        self.hashes: dict[str, str] = {}
        self.warnings: list[str] = []
        self.assumptions: dict[str, Any] = {}
        self._expected = dict(expected or {})
        self._also: list[Path] = []
        self._pickles: dict[Path, PickleTree] = {}

    def exists(self, path: Path) -> bool:
        """Whether something has this name, a broken link included."""
        return os.path.lexists(path)

    def require(self, path: Path, field: str = "") -> Path:
        """The real path of a regular file inside the checkpoint.

        Raises:
            MissingFile: absent, a FIFO, device or directory, or a link that leaves the checkpoint.
        """
        root = next((directory for directory in self._also if path.is_relative_to(directory)), self.root)
        return regular_file(path, root, field)

    def also_open(self, directory: Path) -> None:
        """From now on, files of this directory may be read too: the user named it beside the checkpoint."""
        self._also.append(directory)

    def read_json(self, path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
        """The JSON object in `path`; see parse_json for what is refused."""
        data = read_bytes(self.require(path), limit)
        self._record(path, hashlib.sha256(data).hexdigest())
        return parse_json(data, path)

    def header(self, path: Path) -> dict[str, TensorInfo]:
        """Name, dtype and shape of every tensor of a safetensors file, in file order; no tensor is read."""
        return read_header(self.require(path), path)

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """Every tensor of a safetensors file, on the CPU, each in its own memory; the file is hashed while it is read."""
        tensors, digest = load_tensors(self.require(path), path)
        self._record(path, digest)
        return tensors

    def convert(self, paths: Iterable[Path]) -> None:
        """Read these pickles in one child process, so that `pickle` finds them without starting one each."""
        wanted = {path: self.require(path) for path in paths if path not in self._pickles}
        if not wanted:
            return
        for path, (tree, digest) in convert_pickles(wanted).items():
            self._record(path, digest)
            self._pickles[path] = tree

    def pickle(self, path: Path) -> PickleTree:
        """The nested dict in a `.pt` or `.bin` file, read with weights_only in a child process with a memory limit."""
        self.convert([path])
        return self._pickles.pop(path)

    def pickle_keys(self, path: Path) -> list[str]:
        """The top keys of a pickle, which is read as `pickle` reads it and kept for that call."""
        self.convert([path])
        return [str(key) for key in self._pickles[path]]

    def warn(self, text: str) -> None:
        line = one_line(text)
        if line not in self.warnings:
            self.warnings.append(line)

    def relative(self, path: Path) -> str:
        return os.path.relpath(path, self.root)

    def _record(self, path: Path, digest: str) -> None:
        name = self.relative(path)
        wanted = self._expected.get(name)
        if wanted is not None and wanted.lower() != digest:
            raise HashMismatch(path, "sha256", found=digest, expected=wanted)
        self.hashes[name] = digest

    def check_all_expected_read(self) -> None:
        """Raises HashMismatch when a pinned file was not read: the checkpoint is then not the one that was pinned."""
        for name in sorted(set(self._expected) - set(self.hashes)):
            raise HashMismatch(self.root / name, "sha256", found="a file that is not read", expected=self._expected[name])


def regular_file(path: Path, root: Path, field: str = "") -> Path:
    """`path` with its links resolved, once it is known to be a regular file below `root`; see CheckpointFiles.require."""
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise MissingFile(path, field, found="no such file", expected="a regular file") from error
    except ValueError as error:
        raise MissingFile(root, field, found=f"an impossible name, {str(path)!r}", expected="a file name") from error
    if not stat.S_ISREG(mode):
        raise MissingFile(path, field, found=f"a {_kind(mode)}", expected="a regular file")
    if not _is_inside(real, root.resolve()):
        raise MissingFile(path, field, found=f"a link to {real}", expected="a file inside the checkpoint")
    return real


def entries(directory: Path) -> list[Path]:
    """What is in a directory, sorted by name."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise UnreadableFile(directory, "", found=f"error {error.strerror}", expected="a readable directory") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most `limit` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # never blocks, should a FIFO take the file's place
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise UnreadableFile(path, "", found=f"error {error.strerror}", expected="a readable file") from error
    if len(data) > limit:
        raise UnreadableFile(path, "", found=f"more than {limit:,} bytes", expected=f"at most {limit:,} bytes")
    return data


def _is_inside(real: Path, root: Path) -> bool:
    if real.is_relative_to(root):
        return True
    snapshot = _SNAPSHOT.fullmatch(root.as_posix())
    return snapshot is not None and real.is_relative_to(Path(snapshot["repository"]) / "blobs")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
