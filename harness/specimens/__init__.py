"""Specimens: tiny checkpoints with known properties, written on the fly."""

from harness.specimens.arrow import write_arrow_checkpoint
from harness.specimens.bases import FAMILIES, write_base
from harness.specimens.checkpoints import write_checkpoint
from harness.specimens.xlora import XLoraChoices, write_xlora_checkpoint

__all__ = ["FAMILIES", "XLoraChoices", "write_arrow_checkpoint", "write_base", "write_checkpoint", "write_xlora_checkpoint"]
