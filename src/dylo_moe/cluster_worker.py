"""What runs on the machines of a Ray cluster: generates tasks into a journal of its own, and hands out what is new in it."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import socket
from collections.abc import Mapping
from pathlib import Path

from dylo_moe.generating import Generation, generate_samples
from dylo_moe.opened import Opened
from dylo_moe.workplace import Workplace

ANSWER_SECONDS = 1.0


class ShardWorker:
    """An actor, for one shard after the other. It loads a checkpoint once and keeps it for all shards that are of it.

    The journals of a shard lie in a directory of its own, which goes when all of them were handed out. What a worker that is
    killed leaves, the next one on its machine takes away.
    """

    def __init__(self) -> None:
        self._opened: Opened | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1)

    def machine(self) -> str:
        return socket.gethostname()

    def start(self, generation: Generation, journals: Mapping[str, bytes]) -> tuple[dict[str, bytes], bool]:
        """Begins to complete these journals (name -> content) in the background. Returns what `news` would: nothing yet."""
        if self._opened is None or not self._opened.fits(generation.decoder):
            self._opened = Opened(generation.decoder)
        self._place = Workplace()
        for name, content in journals.items():
            (self._place.path / name).write_bytes(content)
        generation = dataclasses.replace(generation, resume=True)
        self._run = self._pool.submit(generate_samples, generation, self._place.path, opened=self._opened)
        return {}, False

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
        found = {path.name: _lines(path, taken.get(path.name, 0)) for path in self._place.path.glob("*.journal")}
        found = {name: lines for name, lines in found.items() if lines}
        if done and not found:
            self._place.remove()
            self._run.result()
            return {}, True
        return found, False


def _lines(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    return content[: content.rfind(b"\n") + 1]
