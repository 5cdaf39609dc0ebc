"""The reference and the naive loop against the definitions, and the ways to name a subject."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from harness.oracles import mixture, router
from harness.readings import OWN_READING, read_artifact
from harness.reference import Reference, load_reference
from harness.specimens import write_base, write_checkpoint
from harness.subjects import BUILT_IN, find_subject
from harness.variants import write_variant

IDS = torch.tensor([[9, 41, 77, 100, 23, 54, 61]])


class Stub:
    """What a third party's factory may return."""

    name = "stub"

    def load(self, checkpoint: Path, **options: object) -> None:
        raise NotImplementedError


class Nameless:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), "qwen")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), base, num_experts=3, top_k=2, use_rslora=True)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return load_reference(checkpoint)


def test_reference_reads_native_files_itself(reference: Reference) -> None:
    assert reference.artifact.reader == OWN_READING
    assert [len(expert) for expert in reference.experts] == [12, 12, 12]


def test_reference_layer_equals_oracle(reference: Reference) -> None:
    rng = np.random.default_rng(0)
    for name in reference.module_names[:4]:
        oracle, layer = reference.layer(name), reference.model.routed_layers()[name]
        x, weights = rng.standard_normal((1, 5, oracle.weight.shape[1])), rng.random((1, 5, 3))
        with torch.no_grad():
            got = layer.mix(torch.from_numpy(x), torch.from_numpy(weights))[0].numpy()
        np.testing.assert_allclose(got, mixture.mix(oracle, x[0], weights[0]), rtol=1e-12, atol=1e-12)


def test_reference_router_equals_oracle_on_base_features(reference: Reference) -> None:
    with torch.no_grad():
        zero = torch.zeros(*IDS.shape, 3, dtype=torch.float64)
        with reference.model._routing(zero):
            hidden = reference.model.base.base_model(IDS).last_hidden_state
    logits = router.router_logits(hidden.numpy(), reference.router.weight, reference.router.bias)
    np.testing.assert_allclose(reference.routing_weights(IDS), router.evaluation_weights(logits, 2), rtol=1e-12, atol=1e-12)


def test_reference_answers_do_not_depend_on_padding(reference: Reference) -> None:
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    np.testing.assert_array_equal(reference.logits(padded, mask)[:, 3:], reference.logits(IDS))
    assert not reference.logits(padded, mask)[:, :3].any()


def test_reference_keeps_answers_to_different_questions_apart(reference: Reference) -> None:
    one, two = reference.logits(IDS, expert_id=0), reference.logits(IDS, expert_id=1)
    assert np.abs(one - two).max() > 0.1
    np.testing.assert_array_equal(reference.logits(IDS, expert_id=0), one)


def test_greedy_reference_takes_the_largest_logit_each_time(reference: Reference) -> None:
    tokens, scores = reference.greedy(IDS[0], 3)
    whole = torch.cat([IDS[0], torch.tensor(tokens)])[None]
    assert tokens == reference.logits(whole)[0, 6:9].argmax(axis=-1).tolist() == scores.argmax(axis=-1).tolist()


def test_multi_pass_differs_from_single_pass_in_general(reference: Reference) -> None:
    weights = np.full((*IDS.shape, 3), 1 / 3)
    single = reference.logits(IDS, weights=torch.from_numpy(weights))
    assert np.abs(single - reference.multi_pass_logits(IDS, torch.ones_like(IDS), weights)).max() > 0.1


def test_variant_of_everything_computes_the_same(reference: Reference, tmp_path: Path) -> None:
    artifact = reference.artifact
    write_variant(tmp_path, artifact, experts=artifact.experts, router=artifact.router, transposed=False)
    np.testing.assert_allclose(load_reference(tmp_path).logits(IDS), reference.logits(IDS), rtol=1e-9, atol=1e-9)


def test_naive_loop_writes_the_greedy_text_of_the_reference(checkpoint: Path, reference: Reference) -> None:
    model = find_subject("naive-loop").load(checkpoint, base_model=None, device="cpu", dtype=None)
    rows = model.generate(IDS, torch.ones_like(IDS), max_new_tokens=4)
    assert rows[0, 7:].tolist() == reference.greedy(IDS[0], 4)[0]


def test_artifact_refuses_a_tensor_that_is_not_finite(checkpoint: Path, reference: Reference, tmp_path: Path) -> None:
    experts = [dict(expert) for expert in reference.experts]
    module, adapter = next(iter(experts[0].items()))
    adapter.lora_A[0, 0], kept = np.nan, adapter.lora_A[0, 0]
    write_variant(tmp_path, reference.artifact, experts=experts, router=None, transposed=False)
    adapter.lora_A[0, 0] = kept
    with pytest.raises(ValueError, match=f"{module}.*NaN"):
        read_artifact(tmp_path)


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_subject_is_found_by_its_name(name: str) -> None:
    assert find_subject(name).name == name


def test_third_party_subject_is_found_by_module_and_factory() -> None:
    assert find_subject(f"{__name__}:Stub").name == "stub"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dylo", "expected package.module:factory or one of dylo-moe, naive-loop"),
        ("", "unknown subject ''"),
        ("no_such_package_of_mine:make", "No module named"),
        ("json:nothing", "json has no function 'nothing'"),
        (f"{__name__}:Nameless", "no name and no load"),
    ],
)
def test_unknown_subject_is_refused_in_one_line(name: str, message: str) -> None:
    with pytest.raises(ValueError, match="subject") as refusal:
        find_subject(name)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
