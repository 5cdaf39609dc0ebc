"""Specimens: tiny checkpoints with known properties, written on the fly."""

from harness.specimens.bases import FAMILIES, write_base
from harness.specimens.checkpoints import write_checkpoint

__all__ = ["FAMILIES", "write_base", "write_checkpoint"]
