"""Every error that dylo_moe raises on purpose.

DyloMoeError
├── CheckpointError (ValueError)        something on disk is not what it should be
│   ├── UnknownFormat                   no rule recognises the directory
│   ├── MissingFile                     a file that the layout needs is absent, or is not a regular file inside it
│   ├── UnreadableFile                  truncated safetensors, invalid JSON, refused pickle
│   ├── InvalidField                    a configuration field has a wrong type or an impossible value
│   ├── ExpertMissing                   an expert that the configuration names has no files
│   ├── ExpertEmpty                     an expert has no tensors
│   ├── ExpertCountMismatch             configuration, files and router disagree about the number of experts
│   ├── ForeignTensor                   a tensor that does not belong to this file (base weight, other expert)
│   ├── IncompletePair                  a LoRA A without its B, or the reverse
│   ├── ShapeMismatch                   a tensor's shape contradicts the configuration, the base or its partner
│   ├── GateMissing                     a router without its gate tensor
│   ├── DtypeUnsupported                an integer or otherwise unusable dtype in an expert or router
│   ├── NonFiniteTensor                 NaN or infinity in a tensor or field
│   ├── BaseModelUnknown                the base model is neither recorded nor given, or not available locally
│   └── HashMismatch                    a file's SHA-256 is not the expected one
├── RoutingError (ValueError)           the request cannot be routed as asked
│   ├── UnknownExpert (IndexError)      an expert id outside the range
│   ├── UnknownStrategy                 a routing strategy that does not exist, or that this model cannot run
│   └── CacheWithoutFeatures            a non-empty KV cache that lacks the router's own half
├── OptionError (ValueError)            an option, or a combination of options, that cannot be used
├── ConversionError (ValueError)        a checkpoint that the wanted format, or fewer experts, cannot express
├── PromptError (ValueError)            a prompt cannot be made or does not fit: chat template, positions
├── TaskSetError (ValueError)           a task file that cannot be used, or tasks without samples
├── OutOfMemory                         one completion alone needs more memory than there is
├── ArtifactError                       a W&B artifact cannot be downloaded, or is not what its manifest says
├── ClusterError                        a Ray cluster cannot be used, or a machine of it cannot do its part
├── ScoringError                        a process that cleans or runs generated code cannot do its work
├── OutputError (OSError)               a file cannot be written: no room, no permission
└── SampleFileError (ValueError)        an existing sample or result file belongs to another run, or is damaged
"""

from __future__ import annotations

import errno
from pathlib import Path


class DyloMoeError(Exception):
    """Base of every error raised on purpose; its text is one line meant for the user."""


class CheckpointError(DyloMoeError, ValueError):
    """A checkpoint cannot be used. The message is one line: file, field, what was found, what was expected.

    Args:
        file: the file or directory at fault.
        field: the JSON field, tensor or part of it; empty when the file as a whole is at fault.
        found: what is there.
        expected: what should be there, and, where it helps, what to do.
    """

    def __init__(self, file: str | Path, field: str, *, found: object, expected: object) -> None:
        self.file = Path(file)
        self.field = field
        self.found = str(found)
        self.expected = str(expected)
        where = f"{self.file}: {field}" if field else f"{self.file}"
        super().__init__(one_line(f"{where}: found {self.found}, expected {self.expected}"))

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), str(self.file), self.field, self.found, self.expected)


def _rebuild(kind: type[CheckpointError], file: str, field: str, found: str, expected: str) -> CheckpointError:
    return kind(file, field, found=found, expected=expected)


def one_line(text: str, limit: int = 600) -> str:
    """Fit for a terminal: no line breaks, no control characters or lone surrogates of a hostile file, not endless."""
    flat = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in " ".join(text.split()))
    return flat if len(flat) <= limit else f"{flat[: limit - 3]}..."


class UnknownFormat(CheckpointError):
    pass


class MissingFile(CheckpointError):
    pass


class UnreadableFile(CheckpointError):
    pass


class InvalidField(CheckpointError):
    pass


class ExpertMissing(CheckpointError):
    pass


class ExpertEmpty(CheckpointError):
    pass


class ExpertCountMismatch(CheckpointError):
    pass


class ForeignTensor(CheckpointError):
    pass


class IncompletePair(CheckpointError):
    pass


class ShapeMismatch(CheckpointError):
    pass


class GateMissing(CheckpointError):
    pass


class DtypeUnsupported(CheckpointError):
    pass


class NonFiniteTensor(CheckpointError):
    pass


class BaseModelUnknown(CheckpointError):
    pass


class HashMismatch(CheckpointError):
    pass


class RoutingError(DyloMoeError, ValueError):
    """A forward pass or generation cannot be routed as asked."""


class UnknownExpert(RoutingError, IndexError):
    """An expert id is not in range(num_experts)."""


class UnknownStrategy(RoutingError):
    """The routing strategy does not exist, or this model cannot run it. The message names the legal ones."""


class CacheWithoutFeatures(RoutingError):
    """A KV cache holds tokens but not the router's features of them, so decoding from it could not be exact."""


class OptionError(DyloMoeError, ValueError):
    """An option, or a combination of options, cannot be used. The message says what can."""


class ConversionError(DyloMoeError, ValueError):
    """A checkpoint cannot be expressed as wanted without computing something else. The message is one line with the reason."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class PromptError(DyloMoeError, ValueError):
    """A prompt cannot be built (chat template) or does not fit the model."""


class TaskSetError(DyloMoeError, ValueError):
    """A task file is unusable, or tasks that must be scored have no samples."""


class OutOfMemory(DyloMoeError):
    """One completion alone needs more memory than there is; batches of several are split before that."""


class ArtifactError(DyloMoeError):
    """A W&B artifact cannot be had. The message is one line: its name, what is wrong, what to do."""

    def __init__(self, artifact: str, problem: str, advice: str) -> None:
        self.artifact, self.problem, self.advice = artifact, problem, advice
        super().__init__(one_line(f"W&B artifact {artifact}: {problem}; {advice}"))

    def __reduce__(self) -> tuple:
        return type(self), (self.artifact, self.problem, self.advice)


class ClusterError(DyloMoeError):
    """A Ray cluster cannot be used, or a machine of it cannot do its part. The message is one line."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class ScoringError(DyloMoeError):
    """A process that sanitizes or runs generated code, or canonical solutions, cannot do its work."""


class OutputError(DyloMoeError, OSError):
    """A file or directory cannot be written; what was there is as it was. The message is one line: which, why, what to do."""

    def __init__(self, path: str | Path, cause: OSError) -> None:
        self.path, self.cause = Path(path), cause
        no_room = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        advice = "make room" if no_room else "see that you can write there, or name another directory"
        super().__init__(one_line(f"{path}: {cause.strerror or cause}; {advice}, then run the same command again"))

    def __reduce__(self) -> tuple:
        return type(self), (str(self.path), self.cause)


class SampleFileError(DyloMoeError, ValueError):
    """An existing sample or result file belongs to another run, or is damaged beyond its last line."""
