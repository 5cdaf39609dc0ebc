"""W&B artifacts: downloaded by the real client in a child process, verified, and kept in a cache.

A download goes into a fresh private directory and becomes visible by one rename, after every file has been compared with the
manifest and the manifest with the artifact's digest. The client itself compares neither.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

from dylo_moe.errors import ArtifactError, UnknownFormat
from dylo_moe.worker import Worker, WorkerGone

CACHE_VARIABLE = "DYLO_MOE_CACHE"
DOWNLOAD_SECONDS = 3600.0
_PART = r"[^/\\:?#%.\s][^/\\:?#%\x00-\x1f]{0,127}"
_NAME = re.compile(rf"({_PART})/({_PART})/({_PART}):({_PART})")
_PARTIAL = ".partial-"
# What the client needs besides WANDB_*: the way to the server, and whom to trust.
_NETWORK = ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir", "requests_ca_bundle")
# Of the user's own run, whose service and directories this download must not touch.
_OTHER_RUN = ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_ARTIFACT_DIR")


def download_artifact(name: str, root: str | Path | None = None, *, timeout: float = DOWNLOAD_SECONDS) -> Path:
    """The checkpoint in a W&B artifact, as a directory on this machine.

    The server is always asked what the name stands for. Files that are here already are compared with its manifest again, and
    not downloaded again. WANDB_API_KEY (or a netrc file) and WANDB_BASE_URL count as they do for the client.

    Args:
        name: "entity/project/name:version"; a version is a number as in v3, or an alias as latest.
        root: the cache; None for $DYLO_MOE_CACHE, or else ~/.cache/dylo_moe.
        timeout: seconds for everything, including the wait for another process that downloads the same artifact.

    Returns:
        The artifact's directory, or `best_model` in it where the artifact is the output directory of a training run.

    Raises:
        ArtifactError: one line that names the artifact and says what to do. Nothing is left of an incomplete download.
    """
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ArtifactError(name, "not the name of an artifact", "write entity/project/name:version, as in team/moe/output:v3")
    if not timeout > 0:
        raise ArtifactError(name, f"a timeout of {timeout} s", "give the seconds that the download may take")
    home = _cache(root).joinpath("artifacts", *parts.groups()[:3])
    try:
        home.mkdir(parents=True, exist_ok=True)
        place = _locked_download(name, home, timeout)
    except Timeout:
        raise ArtifactError(name, f"another process has been downloading it for {timeout:g} s", "wait for it") from None
    except OSError as error:
        advice = f"set {CACHE_VARIABLE} to a directory on a disk with room that you can write to"
        raise ArtifactError(name, f"{error.filename or home}: {error.strerror}", advice) from None
    return checkpoint_in(place)


def _cache(root: str | Path | None) -> Path:
    return Path(root or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "dylo_moe").expanduser().absolute()


def _locked_download(name: str, home: Path, timeout: float) -> Path:
    """home/<digest>, complete. The lock ends with the process that holds it, so what is partial here belongs to nobody."""
    deadline = time.monotonic() + timeout
    with FileLock(home / ".lock", timeout=timeout):
        for leftover in home.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=home))
        try:
            files = partial / "files"
            files.mkdir()
            answer = _ask(name, {"home": str(home), "files": str(files)}, max(deadline - time.monotonic(), 0.1))
            place = home / answer["digest"]
            if not answer["was_here"]:
                files.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return place


def _ask(name: str, places: dict[str, str], seconds: float) -> dict:
    """The child's answer: {"digest", "was_here"}. ArtifactError where there is none."""
    question = {"name": name, "seconds": seconds, "settings": str(_settings_file()), **places}
    try:
        with Worker("dylo_moe.artifact_worker", environment=_environment()) as worker:
            answer = worker.ask(question, seconds)
    except WorkerGone as gone:
        if not gone.late:
            raise ArtifactError(name, str(gone), "see whether `python -c 'import wandb'` works") from None
        have = sum(path.stat().st_size for path in Path(places["files"]).rglob("*") if path.is_file())
        found = f"no complete download within {seconds:.0f} s, after {have:,} bytes"
        raise ArtifactError(name, found, "try again, or give it a longer timeout") from None
    if "problem" in answer:
        raise ArtifactError(name, answer["problem"], answer["advice"])
    return answer


def _environment() -> dict[str, str]:
    """What the child gets of the environment. Its home is private, so it is told where the netrc file is."""
    kept = {key: value for key, value in os.environ.items() if key.startswith("WANDB_") or key.lower() in _NETWORK}
    netrc = os.environ.get("NETRC") or next(filter(os.path.isfile, map(os.path.expanduser, ("~/.netrc", "~/_netrc"))), None)
    return {key: kept[key] for key in kept if key not in _OTHER_RUN} | ({"NETRC": os.path.abspath(netrc)} if netrc else {})


def _settings_file() -> Path:
    """Where `wandb login --host` notes the server."""
    return Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser().absolute() / "settings"


def checkpoint_in(place: Path) -> Path:
    """The directory itself, or its best_model. The adapters of an output directory are versions of one, not a bag of LoRAs."""
    best = place / "best_model"
    if not best.is_dir():
        return place
    from dylo_moe.formats import detect_model_format  # takes seconds: it imports torch

    try:
        kind = detect_model_format(place)
    except UnknownFormat:
        return best
    return best if kind == "lora-bag" else place
