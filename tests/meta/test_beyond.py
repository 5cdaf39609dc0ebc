"""The judge on experts that are more than sums of low-rank deltas: planted faults are caught, correct subjects raise no alarm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.beyond import KINDS, NATIVE, write_beyond
from fixtures.faults import FaultySubject
from fixtures.laws import judge
from harness import outcome
from harness.artifact import Artifact, Expert
from harness.bench import Bench
from harness.loop import LoopLinear
from harness.loop_versions import LoopVersions
from harness.oracles import mixture
from harness.readings import OWN_READING, foreign, read_artifact
from harness.specimens import write_base
from harness.subjects import find_subject

LAWS = (
    *("layer.equals_oracle", "model.routing_is_applied", "formats.loaded_logits_equal_reference"),
    "speed.single_pass_work",
)


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """beyond(kind) -> directory, written once."""
    base = write_base(tmp_path_factory.mktemp("base"), "qwen")
    root = tmp_path_factory.mktemp("beyond")
    return lambda kind: root / kind if (root / kind).is_dir() else write_beyond(root / kind, base, kind)


def changed(**fields: object) -> Callable[[Artifact], Artifact]:
    """The same, with these fields of every adapter."""

    def read(artifact: Artifact) -> Artifact:
        return replace(artifact, experts=tuple(_changed(expert, fields) for expert in artifact.experts))

    return read


def _changed(expert: Expert, fields: dict[str, object]) -> Expert:
    return Expert({m: replace(adapter, **fields) for m, adapter in expert.items()}, expert.replaced, expert.biases)


def norm_of_base_alone(model: nn.Module) -> None:
    """The norm without the scaled delta."""

    def with_magnitude(layer: LoopLinear, name: str, x: torch.Tensor, low_rank: torch.Tensor) -> torch.Tensor:
        weight = layer.base_layer.weight
        scale = layer.magnitudes[name] / weight.norm(dim=1)
        return (scale - 1) * nn.functional.linear(x, weight) + scale * low_rank

    for layer in model.routed_layers().values():
        layer.with_magnitude = with_magnitude.__get__(layer)


def version_mixed(mix: Callable) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        for module in [m for m in model.modules() if isinstance(m, LoopVersions)]:
            module.mix = mix.__get__(module)

    return change


def added(self: LoopVersions, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The expert's module beside the base's, not in its place."""
    parts = zip(self.experts, self.versions, strict=True)
    return y + sum(weights[..., e, None].to(y.dtype) * self.version(own, x) for e, own in parts)


def no_versions(artifact: Artifact) -> Artifact:
    return replace(artifact, experts=tuple(Expert(expert) for expert in artifact.experts))


def bias_twice(artifact: Artifact) -> Artifact:
    """Every expert's bias is as far again from the base's."""
    base = foreign_base(artifact)
    experts = []
    for expert in artifact.experts:
        doubled = {module: 2 * bias - base[f"{module}.bias"] for module, bias in expert.biases.items()}
        experts.append(Expert(expert, expert.replaced, doubled))
    return replace(artifact, experts=tuple(experts))


def computed_twice(self: LoopVersions, x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Right, and each expert's module runs once more than it needs to."""
    for own in self.versions:
        self.version(own, x)
    return LoopVersions.mix(self, x, y, weights)


def foreign_base(artifact: Artifact) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(Path(artifact.base) / "model.safetensors")


FAULTS = {
    "magnitude ignored": ("dora", "layer.equals_oracle", FaultySubject(read=changed(magnitude=None))),
    "magnitude ignored, natively": (
        "routed-dora",
        "model.routed_logits_equal_reference",
        FaultySubject(read=changed(magnitude=None)),
    ),
    "norm without the scaled delta": ("dora", "layer.equals_oracle", FaultySubject(norm_of_base_alone)),
    "lora_bias dropped": ("lora-bias", "layer.equals_oracle", FaultySubject(read=changed(bias=None))),
    "saved module dropped": ("saved", "formats.loaded_logits_equal_reference", FaultySubject(read=no_versions)),
    "saved module added": ("saved", "model.routing_is_applied", FaultySubject(version_mixed(added))),
    "saved module computed twice": ("saved", "speed.single_pass_work", FaultySubject(version_mixed(computed_twice))),
    "bias delta twice": ("bias", "model.routing_is_applied", FaultySubject(read=bias_twice)),
    "AdaLoRA's scaling not divided by the ranks": (
        "adalora",
        "layer.one_hot_equals_stock_peft",
        FaultySubject(read=changed(scaling=6.0)),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_fails_the_check_that_must_catch_it(name: str, beyond: Callable[[str], Path]) -> None:
    kind, check, subject = FAULTS[name]
    found, message = judge(Bench(beyond(kind), subject), check)
    assert found == outcome.FAIL, message


@pytest.mark.parametrize("kind", [*KINDS, *NATIVE])
def test_correct_subject_raises_no_alarm(kind: str, beyond: Callable[[str], Path]) -> None:
    bench = Bench(beyond(kind), find_subject("dylo-moe"))
    more = () if kind not in NATIVE else ("model.routed_logits_equal_reference", "training.gradients_reach_router_and_experts")
    if kind in ("saved", "bias", "adalora"):
        more = ("model.detach_restores_base", "model.one_expert_equals_peft")
    for check in (*LAWS, *more):
        found, message = judge(bench, check)
        assert found in (outcome.PASS, outcome.NOT_APPLICABLE), f"{check}: {message}"
        assert found == outcome.PASS or check not in LAWS, message


@pytest.mark.parametrize("kind", KINDS)
def test_own_reading_equals_the_judged_one(kind: str, beyond: Callable[[str], Path]) -> None:
    own, theirs = read_artifact(beyond(kind)), foreign.read(beyond(kind), None, {})
    assert (own.reader, own.names, own.base) == (OWN_READING, theirs.names, theirs.base)
    for mine, other in zip(own.experts, theirs.experts, strict=True):
        assert (mine.keys(), mine.biases.keys()) == (other.keys(), other.biases.keys())
        for module, adapter in mine.items():
            for part in ("lora_A", "lora_B", "scaling", "magnitude", "bias"):
                want = getattr(other[module], part)
                if want is None:
                    assert getattr(adapter, part) is None
                else:
                    np.testing.assert_allclose(getattr(adapter, part), want, rtol=1e-6)  # E is folded in float32 there
        for module, bias in mine.biases.items():
            np.testing.assert_array_equal(bias, other.biases[module])
        assert {m: set(p) for m, p in mine.replaced.items()} == {m: set(p) for m, p in other.replaced.items()}


def test_magnitude_by_hand() -> None:
    a, b = np.array([[1.0, 0.0]]), np.array([[0.0], [2.0]])
    layer = mixture.Layer(np.eye(2), None, (a,), (b,), (2.0,), (np.array([3.0, 5.0]),))
    # W + sBA = [[1, 0], [4, 1]], rows of norm 1 and sqrt(17); x = (10, 20): W' x = (10, 60); W x = (10, 20).
    wanted = [10 + 0.5 * (3 * 10 - 10), 20 + 0.5 * (5 / 17**0.5 * 60 - 20)]
    np.testing.assert_allclose(mixture.mix(layer, np.array([[10.0, 20.0]]), np.array([[0.5]]))[0], wanted, rtol=1e-15)


def test_bias_of_b_by_hand() -> None:
    layer = mixture.Layer(np.eye(1), None, (np.ones((1, 1)),), (np.ones((1, 1)),), (2.0,), (), (np.array([7.0]),))
    assert mixture.mix(layer, np.array([[1.0]]), np.array([[0.5]])).tolist() == [[1 + 0.5 * 2 * (1 + 7)]]
