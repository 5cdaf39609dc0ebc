"""dylo_moe, through its public names only."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from dylo_moe import detach_router, detect_model_format, load_checkpoint


class DyloMoeSubject:
    name = "dylo-moe"
    formats = ("dylo-moe", "peft-xlora", "peft-arrow")

    def load(
        self,
        checkpoint: Path,
        *,
        base_model: str | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        assume: Mapping[str, object] | None = None,
    ) -> nn.Module:
        return load_checkpoint(checkpoint, base_model, dtype=dtype, **(assume or {})).to(device)

    def detach(self, model: nn.Module) -> PreTrainedModel:
        return detach_router(model).unload()

    def detect(self, checkpoint: Path) -> str:
        return detect_model_format(checkpoint)

    def decoder(self, checkpoint: Path, **options: object) -> object:
        from dylo_moe import PeftMoEDecoder

        return PeftMoEDecoder(str(checkpoint), **options)

    def run_codegen(self, checkpoint: Path, dataset: str, **options: object) -> str:
        from dylo_moe.evalplus import run_codegen

        return run_codegen(str(checkpoint), dataset, backend="peft_moe", **options)


def make() -> DyloMoeSubject:
    return DyloMoeSubject()
