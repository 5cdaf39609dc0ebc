"""The judge reads the layouts that it knows by itself; its reading and dylo_moe's must give the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.gated import draw
from fixtures.loramoe import write_hydralora, write_loramoe
from fixtures.mergoo import write_mergoo
from fixtures.moe_peft import Recipe, write_moe_peft
from fixtures.router_specimens import ALL_KINDS, write
from harness.artifact import Artifact
from harness.readings import OWN_READING, SUBJECTS_READER, foreign, read_artifact
from harness.readings.layouts import layout_of
from harness.reference import Reference
from harness.routers import Classifier, Router, in_order
from harness.specimens import write_base

IDS = torch.tensor([[9, 41, 77, 100, 23, 54, 61]])
ATTENTION = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "llama")


OTHERS: dict[str, Callable[[Path, Path], Path]] = {
    "mergoo": lambda path, base: write_mergoo(path, draw(base, ATTENTION)),
    "hydralora": lambda path, base: write_hydralora(path, draw(base, ATTENTION, shared_a=True)),
    "hydralora, safetensors": lambda path, base: write_hydralora(path, draw(base, ATTENTION, shared_a=True), pickled=False),
}


@pytest.mark.parametrize("kind", [*ALL_KINDS, *OTHERS])
def test_own_reading_equals_the_judged_one(kind: str, base: Path, tmp_path: Path) -> None:
    make = OTHERS.get(kind)
    checkpoint = make(tmp_path / "moe", base) if make else write(tmp_path / "moe", base, kind)
    own, theirs = read_artifact(checkpoint), foreign.read(checkpoint, None, {})
    assert own.reader == OWN_READING
    assert (own.base, own.feed_forwards) == (theirs.base, theirs.feed_forwards)
    units = list(own.feed_forwards or own.modules)
    _assert_same_adapters(own, theirs)
    _assert_same_router(in_order(own.router, units), in_order(theirs.router, units))


def _assert_same_adapters(own: Artifact, theirs: Artifact) -> None:
    for mine, other in zip((*own.experts, own.shared), (*theirs.experts, theirs.shared), strict=True):
        assert mine.keys() == other.keys()
        for module, adapter in mine.items():
            np.testing.assert_array_equal(adapter.lora_A, other[module].lora_A)
            np.testing.assert_array_equal(adapter.lora_B, other[module].lora_B)
            assert adapter.scaling == pytest.approx(other[module].scaling, rel=1e-15)


def _assert_same_router(own: Router, theirs: Router) -> None:
    assert type(own) is type(theirs)
    if isinstance(own, Classifier):
        assert own.scaling == theirs.scaling
        assert (own.relu, own.dropout, len(own.layers)) == (theirs.relu, theirs.dropout, len(theirs.layers))
        for mine, other in zip(own.layers, theirs.layers, strict=True):
            np.testing.assert_array_equal(mine[0], other[0])
            np.testing.assert_array_equal(mine[1], other[1])
        return
    assert (own.trained, list(own.gates)) == (theirs.trained, list(theirs.gates))
    for path, gate in own.gates.items():
        other = theirs.gates[path]
        assert (gate.rule, gate.num_experts) == (other.rule, other.num_experts)
        # Arrow's are computed: here in float64, there in float32 as PEFT does.
        np.testing.assert_allclose(gate.weight, other.weight, atol=0 if gate.published is None else 1e-5)


def test_settings_compared_are_all_there_are() -> None:
    """A field that is added to these must be compared above, too."""
    assert {field.name for field in fields(Classifier)} == {"layers", "scaling", "relu", "dropout"}


@pytest.mark.parametrize(
    ("write_it", "layout"),
    [
        (lambda path, base: write_loramoe(path, draw(base, ATTENTION)), "loramoe"),
        (lambda path, base: write_moe_peft(path, base, Recipe("mixlora")), "mixlora"),
        (lambda path, base: write_moe_peft(path, base, Recipe("mola")), "moe-peft-mola"),
    ],
)
def test_other_layouts_are_read_by_the_judged_and_that_is_said(
    write_it: Callable, layout: str, base: Path, tmp_path: Path
) -> None:
    checkpoint = write_it(tmp_path / "moe", base)
    assert layout_of(checkpoint) == layout
    artifact = read_artifact(checkpoint)
    assert artifact.reader == SUBJECTS_READER
    reference = Reference(artifact)
    assert np.abs(reference.logits(IDS) - reference.base_logits(IDS)).max() > 0.05


def test_experts_of_xlora_are_in_the_order_of_numbers(base: Path, tmp_path: Path) -> None:
    assert read_artifact(write(tmp_path / "moe", base, "peft-xlora", num_experts=12)).names == tuple(map(str, range(12)))


def test_experts_of_xlora_are_found_where_the_checkpoint_was_moved_to(base: Path, tmp_path: Path) -> None:
    first = write(tmp_path / "moe", base, "peft-xlora")
    before = read_artifact(first)
    moved = first.rename(tmp_path / "elsewhere")
    assert before.num_experts == read_artifact(moved).num_experts == 4


def test_classifier_without_one_of_its_layers_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = write(tmp_path / "moe", base, "peft-xlora")
    file = checkpoint / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if ".layers.0." not in name}, file)
    with pytest.raises(ValueError, match="found 1 Linears"):
        read_artifact(checkpoint)
