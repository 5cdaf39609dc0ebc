"""What an error looks like where memory could not be had. Imports nothing heavy: command lines ask too."""

from __future__ import annotations

# torch's allocator on a CPU; on a GPU ("CUDA out of memory", also "HIP ..."); cuBLAS and cuDNN there (..._STATUS_ALLOC_FAILED);
# C++ and the system; and Python, whose threads need memory of their own.
_EXHAUSTED = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "_ALLOC_FAILED",
    "std::bad_alloc",
    "Cannot allocate memory",
    "can't start new thread",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory could not be had: a MemoryError, or a RuntimeError (as torch's are) whose text says so."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
