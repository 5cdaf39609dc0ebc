"""A checkpoint that is read, hashed and loaded once each, for whatever benchmarks and strategies it is then used."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from dylo_moe.decoder import PeftMoEDecoder
from dylo_moe.formats import Checkpoint, read_checkpoint
from dylo_moe.formats.base import resolve_base
from dylo_moe.identity import checkpoint_identity, local_directory

# What decides which model is loaded, and how.
_LOADING = (
    "name",
    "adapter_path",
    "base_model",
    "dtype",
    "device_map",
    "attn_implementation",
    "trust_remote_code",
    "assume",
    "autocast_adapter_dtype",
)


class Opened:
    """A checkpoint and its base model. Nothing is done before it is needed, and nothing twice.

    So the hashes stay those of the model in memory, also where a file changes between two benchmarks.

    Args:
        options: keyword arguments of PeftMoEDecoder, without routing_strategy.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)
        self._model: nn.Module | None = None

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """As it is on disk. Raises CheckpointError."""
        place = self._options["adapter_path"] or self._options["name"]
        return read_checkpoint(Path(place), **(self._options["assume"] or {}))

    @cached_property
    def hashes(self) -> dict[str, str | None]:
        """As `checkpoint_identity`. Loads a base model that is not on this machine yet, because it cannot be hashed before.

        Raises:
            CheckpointError: as `resolve_base`.
        """
        base = self._base()
        if base is not None and local_directory(base) is None:
            self.decoder(self._options, "router" if self.checkpoint.router is not None else "base")
        return checkpoint_identity(self.checkpoint, base)

    def fits(self, options: Mapping[str, Any]) -> bool:
        """Whether a decoder with these options would be one of this model."""
        return not self._differing(options)

    def decoder(self, options: Mapping[str, Any], strategy: str) -> PeftMoEDecoder:
        """A decoder on the one model.

        Args:
            options: of this one; those that decide which model it is are the same for all.

        Raises:
            ValueError: they are not. Else as PeftMoEDecoder.
        """
        if other := self._differing(options):
            raise ValueError(f"{', '.join(other)}: a decoder of another model than the one that was opened")
        decoder = PeftMoEDecoder(**options, routing_strategy=strategy, model=self._model)
        self._model = decoder.model
        return decoder

    def _differing(self, options: Mapping[str, Any]) -> list[str]:
        return [name for name in _LOADING if options[name] != self._options[name]]

    def _base(self) -> str | Path | None:
        """The base model's place, or None where the checkpoint holds all weights; a merged checkpoint is its own base."""
        checkpoint, given = self.checkpoint, self._options["base_model"]
        if not checkpoint.experts:
            return checkpoint.path
        if checkpoint.base_state is not None and given is None:
            return None
        return resolve_base(checkpoint.base_model, given, checkpoint=checkpoint.path)
