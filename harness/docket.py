"""What is judged, and how: the settings of a run, and one docket per exhibit with what is known of it before any check runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylo_moe import detect_model_format, read_checkpoint
from dylo_moe.errors import CheckpointError, DyloMoeError, UnknownFormat
from harness.bench import Bench
from harness.builtin import BUILT_IN, Exhibit
from harness.catalogue import Law
from harness.gate import Gate
from harness.identity import checkpoint_hash
from harness.outcome import Unusable


@dataclass(frozen=True)
class Settings:
    """What to judge and how; the command line's options, checked."""

    subject_name: str
    subject: object
    laws: Sequence[Law]
    gate: Gate
    exhibits: Sequence[Exhibit] = BUILT_IN
    base_model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    assume: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    keep: Path | None = None
    expect_hash: str | None = None
    baseline: Path | None = None
    command: Sequence[str] = ()
    options: str = ""


@dataclass(frozen=True)
class Docket:
    """One exhibit on its bench, the laws that apply to it, and what is recorded of it whatever the outcome."""

    exhibit: Exhibit
    bench: Bench
    laws: Sequence[Law]
    facts: dict[str, Any]


def open_docket(settings: Settings, exhibit: Exhibit, laws: Sequence[Law], directory: Path) -> Docket:
    """Writes the exhibit where it is a specimen, and finds out what it is.

    Raises CheckpointError or Unusable when the user's checkpoint cannot be judged: its hash is another, or it cannot be loaded.
    """
    directory.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        checkpoint=exhibit.write(directory),
        subject=settings.subject,
        base_model=settings.base_model,
        device=settings.device,
        load_dtype=settings.dtype,
        assume=settings.assume,
        seed=settings.seed,
        gate=settings.gate,
    )
    found = checkpoint_hash(bench.checkpoint)
    if settings.expect_hash is not None and found != settings.expect_hash:
        raise Unusable(f"{bench.checkpoint}: hash: found {found}, expected {settings.expect_hash}")
    facts = {
        "name": exhibit.name,
        "path": str(bench.checkpoint),
        "format": _format(settings.subject, bench.checkpoint),
        "hash": found,
        "device": settings.device,
        "dtype": settings.dtype or "as stored",
    }
    if exhibit.is_users:
        facts |= _preflight(bench)
    return Docket(exhibit, bench, laws, facts)


def _format(subject: object, checkpoint: Path) -> str:
    detect = getattr(subject, "detect", detect_model_format)
    try:
        return detect(checkpoint)
    except CheckpointError:
        return "unknown"


def _preflight(bench: Bench) -> dict[str, Any]:
    """Reads and loads the user's checkpoint once, so that an unusable one is one line and not a list of failed checks.

    A format that dylo_moe does not know may still be one that the subject reads. In every format that it does know, a checkpoint
    that it refuses is defective, whatever the subject makes of it. Any other failure to load is left to the checks to report.
    """
    try:
        checkpoint = read_checkpoint(bench.checkpoint, **bench.assume)
    except UnknownFormat:
        checkpoint = None
    try:
        bench.model  # noqa: B018  (loaded here, kept for the checks)
    except DyloMoeError:
        raise
    except Exception:  # noqa: BLE001  (whatever a subject raises: the checks will tell)
        if checkpoint is None:
            read_checkpoint(bench.checkpoint, **bench.assume)
    if checkpoint is None:
        return {}
    return {"warnings": list(checkpoint.warnings), "assumptions": dict(checkpoint.assumptions)}
