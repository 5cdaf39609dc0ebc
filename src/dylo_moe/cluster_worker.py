"""What runs on the machines of a Ray cluster: generates tasks into a journal of its own, and hands out what is new in it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from dylo_moe.generating import Generation, generate_samples

ANSWER_SECONDS = 1.0


class ShardWorker:
    """An actor. The journals that it writes lie in a directory of its own and go with it; nobody else sees them."""

    def __init__(self) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="dylo-moe-shard-", ignore_cleanup_errors=True)
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def start(self, generation: Generation, journals: Mapping[str, bytes]) -> str:
        """Begins to complete these journals (name -> content) in the background. Returns this machine's name."""
        for name, content in journals.items():
            (Path(self._place.name) / name).write_bytes(content)
        self._run = self._pool.submit(generate_samples, dataclasses.replace(generation, resume=True), Path(self._place.name))
        return socket.gethostname()

    def news(self, taken: Mapping[str, int]) -> tuple[dict[str, bytes], bool]:
        """Waits a moment for more.

        Args:
            taken: journal name -> how many of its bytes are known already.

        Returns:
            The whole lines behind those, of each journal that has any; and whether that was all.

        Raises:
            What `generate_samples` raises.
        """
        concurrent.futures.wait([self._run], timeout=ANSWER_SECONDS)
        done = self._run.done()
        found = {path.name: _lines(path, taken.get(path.name, 0)) for path in Path(self._place.name).glob("*.journal")}
        found = {name: lines for name, lines in found.items() if lines}
        if done and not found:
            self._run.result()
            return {}, True
        return found, False


def _lines(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    return content[: content.rfind(b"\n") + 1]
