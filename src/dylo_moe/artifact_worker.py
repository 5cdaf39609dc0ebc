"""The child process that runs the wandb client: it hangs for minutes on servers that fail, and writes into home and directory."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

import psutil

from dylo_moe.worker import serve

_SERVER_SECONDS = 20.0  # for one question to the server, with the client's own retries in it
_HEX_DIGEST = re.compile(r"[0-9a-f]{32}")
_AGAIN = "try again later, or ask whoever runs the server"


class Refused(Exception):
    """What is wrong, and what to do about it."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.answer = {"problem": _without_secrets(problem), "advice": advice}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """{"digest", "was_here"}, or {"problem", "advice"}. question: name, home, files, settings, seconds."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _stay_private(Path(question["settings"]))
    try:
        import wandb
    except ImportError as error:
        found = "the package wandb is not installed" if error.name in (None, "wandb") else f"wandb cannot be imported: {error}"
        return Refused(found, "pip install 'dylo-moe[wandb]'").answer
    try:
        return _fetch(wandb, question)
    except Refused as refused:
        return refused.answer
    finally:
        for child in psutil.Process().children(recursive=True):  # the client's service, which outlives it by seconds
            child.kill()


def _end_with(parent: int) -> None:
    """Ends this process when nobody is left to end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _stay_private(settings: Path) -> None:
    """Every place that the client writes to is in the working directory, and it sends no telemetry."""
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
        place = Path.cwd() / name.lower()
        place.mkdir()
        os.environ[f"WANDB_{name}"] = str(place)
    os.environ |= {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true", "WANDB_DEBUG": "false"}
    if settings.is_file():
        shutil.copyfile(settings, Path.cwd() / "config_dir" / "settings")


def _fetch(wandb: ModuleType, question: dict[str, Any]) -> dict[str, Any]:
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    api = _log_in(wandb, max(1, int(min(_SERVER_SECONDS, question["seconds"] / 4))))
    try:
        artifact = api.artifact(question["name"])
        digest = artifact.digest  # read before the manifest: afterwards the client computes it from the manifest
        manifest = artifact.manifest
        computed = manifest.digest()
    except wandb.errors.CommError as error:
        raise _unreachable(error) or Refused(str(error), "check its name and version, and that your key may read it") from None
    except (WandbApiFailedError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreachable(error) or Refused(f"its manifest cannot be read: {error}", _AGAIN) from None
    if computed != digest or not _HEX_DIGEST.fullmatch(digest):
        raise Refused(f"its manifest has the digest {computed}, not the artifact's {digest}", "do not use it: it was changed")
    check_entries(manifest.entries)
    place = Path(question["home"]) / digest
    if place.exists():
        _verify(artifact, place, f"the copy in {place}: ", "delete it and try again")
        return {"digest": digest, "was_here": True}
    check_room(manifest.entries, Path(question["files"]))
    try:
        artifact.download(root=question["files"], skip_cache=True)
    except (WandbApiFailedError, wandb.errors.Error, OSError, ValueError, KeyError) as error:
        raise _not_downloaded(error) from None
    _verify(artifact, Path(question["files"]), "", "try again; if it stays so, the server's copy is damaged")
    return {"digest": digest, "was_here": False}


def _log_in(wandb: ModuleType, seconds: int) -> Any:
    try:
        return wandb.Api(timeout=seconds)
    except wandb.errors.UsageError:
        raise Refused("no W&B API key", "set WANDB_API_KEY, or run `wandb login`") from None
    except wandb.errors.AuthenticationError as error:
        raise _unreachable(error) or Refused(str(error), "check WANDB_API_KEY and WANDB_BASE_URL") from None
    except ValueError as error:
        found = f"a setting that the client refuses: {str(error).partition('[type=')[0]}"
        raise Refused(found, "check WANDB_BASE_URL and the other WANDB_ variables") from None


def _unreachable(error: BaseException) -> Refused | None:
    """The client answers "busy" for refused connections, overloaded servers and errors on the server alike: a TimeoutError."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, TimeoutError):
            found = f"{os.environ.get('WANDB_BASE_URL', 'the W&B server')} does not answer, or only with errors"
            return Refused(found, "check WANDB_BASE_URL and the network, or try later")
        link = link.__cause__ or link.__context__
    return None


def check_entries(entries: dict[str, Any]) -> None:
    """Only files that lie on the server, with names that stay inside the artifact: a reference would make the client copy any
    local file or ask any address."""
    if not entries:
        raise Refused("it holds no files", "name an artifact with a checkpoint in it")
    for name, entry in entries.items():
        if not _is_inside(name) or any(str(parent) in entries for parent in PurePosixPath(name).parents):
            raise Refused(f"its manifest has the file name {name!r}, which is no place of its own inside it", "do not use it")
        if entry.ref is not None:
            found = f"its file {name!r} is a reference to {entry.ref!r}, not a file on the server"
            raise Refused(found, "log the files themselves, or download it yourself and name the directory")


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return str(path) == name and name != "." and not path.is_absolute() and ".." not in path.parts and "\\" not in name


def check_room(entries: dict[str, Any], target: Path) -> None:
    needed = sum(entry.size or 0 for entry in entries.values())
    room = shutil.disk_usage(target).free
    if needed > room:
        found = f"it has {needed:,} bytes, but the disk of {target.parents[1]} has room for {room:,}"
        raise Refused(found, "set DYLO_MOE_CACHE to a directory on another disk")


def _not_downloaded(error: Exception) -> Refused:
    if isinstance(error, OSError) and error.strerror:  # of this machine; those of requests have none
        return Refused(f"{error.filename or 'the disk'}: {error.strerror}", "set DYLO_MOE_CACHE to a directory with room")
    return Refused(f"a file cannot be downloaded: {error}", _AGAIN)


def _verify(artifact: Any, root: Path, where: str, advice: str) -> None:
    """Compares every file with the manifest, both ways: the client does so only when asked."""
    try:
        artifact.verify(root=str(root))
    except ValueError as error:  # the client's message names the file
        raise Refused(where + str(error).replace(f"{root}/", ""), advice) from None
    except OSError as error:
        raise Refused(f"{where}{str(error.filename).removeprefix(f'{root}/')}: {error.strerror}", advice) from None


def _without_secrets(text: str) -> str:
    """Without what may be an API key (40 characters and more), a password in an address, or an address's signed query."""
    text = re.sub(r"://[^/@\s]*@", "://", text)
    text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
    return re.sub(r"[\w-]{40,}", "***", text)


if __name__ == "__main__":
    serve(answer)
