"""What a verdict was made with: versions, machine, commit. A ratio of one machine says little about another."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("dylo-moe", "torch", "transformers", "peft", "safetensors", "tokenizers", "evalplus", "numpy", "pytest")
# Two verdicts can be compared number by number only where these agree.
KEY_FIELDS = ("device", "processor", "architecture", "python", "torch", "transformers", "peft")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_machine(device: str) -> dict[str, str | int]:
    """device: "cpu" or "cuda"."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "architecture": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }


def environment_key(found_versions: dict[str, str], machine: dict[str, str | int]) -> dict[str, str]:
    """What two verdicts must share to be compared; patch releases of Python do not matter."""
    everything = {**found_versions, **machine, "python": ".".join(found_versions["python"].split(".")[:2])}
    return {name: str(everything[name]) for name in KEY_FIELDS}


def describe_commit(directory: Path) -> dict[str, str | bool | None]:
    """The git commit that `directory` is at: its id, the tag on it, whether the tree is clean; all None outside a repository."""
    commit = _git(directory, "rev-parse", "HEAD")
    if commit is None:
        return {"id": None, "tag": None, "clean": None}
    status = _git(directory, "status", "--porcelain")
    return {"id": commit, "tag": _git(directory, "describe", "--exact-match", "--tags", "HEAD"), "clean": status == ""}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
