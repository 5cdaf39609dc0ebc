"""Routers with known weights give exactly known numbers and warnings."""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from dylo_moe.routes.texts import Text
from dylo_moe.routes.tokens import encode
from tests.unit.routes.planted import TEXTS, E, analysis_of, by_token, fixed, planted_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    return planted_decoder(tmp_path_factory.mktemp("planted"))


def about(document):
    return {(finding["kind"], finding["about"]) for finding in document["findings"]}


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_fixed_weights_have_the_balance_confidence_and_entropy_of_their_definitions(decoder):
    document = analysis_of(decoder, fixed(0.5, 0.25, 0.25)).document
    close(document["balance"]["share"], [0.5, 0.25, 0.25])
    close(document["balance"]["mean_weight"], [0.5, 0.25, 0.25])
    close(document["balance"]["first"], [1, 0, 0])
    entropy = 1.5 * math.log(2)
    close(document["balance"]["effective_experts"], math.exp(entropy))
    close(document["balance"]["coefficient_of_variation"], np.std([0.5, 0.25, 0.25]) * 3)
    close(document["balance"]["load_balancing_loss"]["mse"], ((1 / 6) ** 2 + 2 * (1 / 12) ** 2) / 3)
    close(document["balance"]["load_balancing_loss"]["switch"], 1.5)
    close(document["decision"]["confidence"]["mean"], 0.5)
    close(document["decision"]["entropy"]["mean"], entropy / math.log(E))
    assert (
        document["decision"]["confidence"]["counts"][10] == document["tokens"] == sum(document["decision"]["entropy"]["counts"])
    )
    close(document["task_information_bits"], 0)
    close(document["positions"]["share"], [[0.5, 0.25, 0.25]] * len(document["positions"]["share"]))
    assert about(document) == {("warning", "constant")} | ({("note", "few")} if document["tokens"] < 100 else set())


def test_router_that_looks_at_the_token_is_counted_token_by_token(decoder):
    document = analysis_of(decoder, by_token).document
    tokens = encode(decoder, TEXTS, ["strings", "numbers"]).tokens
    counts = Counter(number % E for text in tokens for number in text.ids)
    total = sum(counts.values())
    assert document["tokens"] == total
    close(document["balance"]["share"], [counts[e] / total for e in range(E)])
    close(document["balance"]["first"], document["balance"]["share"])
    assert document["decision"]["confidence"]["mean"] == 1.0 and document["decision"]["entropy"]["mean"] == 0.0
    for number, task in enumerate(document["tasks"]):
        ids = [i for text in tokens if text.task == number for i in text.ids]
        close(task["share"], [sum(i % E == e for i in ids) / len(ids) for e in range(E)])
        assert task["tokens"] == len(ids) and task["texts"] == (2, 1)[number]
        assert task["dominant"] == max(range(E), key=task["share"].__getitem__)
    prompt = [i for text in tokens for i in text.ids[: text.prompt_length]]
    close(document["parts"]["prompt"], [sum(i % E == e for i in prompt) / len(prompt) for e in range(E)])
    assert len(prompt) == sum(len(decoder.tokenizer(text.prompt)["input_ids"]) for text in TEXTS)
    assert document["prompt_tokens"] == len(prompt) and document["completion_tokens"] == total - len(prompt)
    first = [text.ids[0] for text in tokens]  # one position per place: the texts are short
    assert document["positions"]["width"] == 1 and document["positions"]["tokens"][0] == len(first)
    close(document["positions"]["share"][0], [sum(i % E == e for i in first) / len(first) for e in range(E)])
    assert not {kind for kind, _ in about(document)} & {"bad", "warning"}


def test_information_of_the_task_is_that_of_its_expert(decoder):
    ids = [text.ids for text in encode(decoder, TEXTS[1:], ["strings", "numbers"]).tokens]
    numbers = torch.tensor(sorted(set(ids[0]) - set(ids[1])))
    document = analysis_of(decoder, lambda found: by_token(torch.isin(found, numbers).long()), texts=TEXTS[1:]).document
    part = np.array([[task["share"], [task["tokens"]] * E] for task in document["tasks"]])
    joint = part[:, 0] * part[:, 1] / document["tokens"]
    product = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    known = joint > 0
    close(document["task_information_bits"], (joint[known] * np.log2(joint[known] / product[known])).sum())
    assert document["task_information_bits"] > 0.1


def test_one_expert_for_everything_is_a_collapse_and_the_others_are_unused(decoder):
    document = analysis_of(decoder, fixed(0.0, 1.0, 0.0)).document
    assert {("bad", "collapsed"), ("warning", "unused"), ("warning", "constant")} <= about(document)
    texts = [finding["text"] for finding in document["findings"]]
    assert texts[0].startswith("the router has collapsed: expert 1 (expert_1) takes 100.0%")
    assert sum("is never used" in text for text in texts) == 2
    close(document["balance"]["effective_experts"], 1)
    close(document["balance"]["coefficient_of_variation"], math.sqrt(E - 1))


def test_equal_weights_are_an_undecided_router_and_nobody_dominates(decoder):
    document = analysis_of(decoder, fixed(1 / 3, 1 / 3, 1 / 3)).document
    assert {("bad", "undecided"), ("warning", "constant")} <= about(document)
    assert [task["dominant"] for task in document["tasks"]] == [None, None]
    close(document["balance"]["first"], [1 / 3] * 3)
    close(document["decision"]["entropy"]["mean"], 1)
    close(document["balance"]["effective_experts"], 3)


def test_weights_that_do_not_add_up_to_one_are_compared_as_shares(decoder):
    document = analysis_of(decoder, fixed(-2.0, 1.0, 1.0)).document
    close(document["balance"]["share"], [0.5, 0.25, 0.25])
    close(document["balance"]["mean_weight"], [-2, 1, 1])


def test_tokens_without_expert_and_without_number_are_counted_apart(decoder):
    def choose(ids):
        weights = by_token(ids).float()
        weights[ids % E == 1] = 0.0
        weights[..., 0][ids % E == 2] = math.nan
        return weights

    document = analysis_of(decoder, choose).document
    counts = Counter(number % E for text in encode(decoder, TEXTS, ["strings", "numbers"]).tokens for number in text.ids)
    assert (document["without_expert"], document["not_finite"]) == (counts[1], counts[2])
    close(document["balance"]["share"], [1, 0, 0])
    assert {("bad", "broken"), ("warning", "unrouted")} <= about(document)
    json.dumps(document, allow_nan=False)


def test_an_expert_that_is_used_less_than_half_is_said_to_be_idle(decoder):
    def choose(ids):
        weights = torch.zeros(*ids.shape, E)
        weights[..., 0] = torch.where(ids % 17 == 0, 0.8, 0.95)
        weights[..., 1] = 1 - weights[..., 0]
        return weights

    found = about(analysis_of(decoder, choose).document)
    assert ("warning", "uneven") in found and ("bad", "collapsed") not in found


def test_batches_and_their_padding_change_nothing(decoder):
    def choose(ids):
        return torch.softmax(torch.stack([torch.cos(ids * k / 7.0) for k in range(1, E + 1)], dim=-1), dim=-1)

    alone, together = (analysis_of(decoder, choose, batch_size=size) for size in (1, 3))
    for name in ("balance", "decision", "tasks", "positions", "parts", "layers", "tokens"):
        assert json.dumps(alone.document[name]) == json.dumps(together.document[name])
    for one, other in zip(alone.shown, together.shown, strict=True):
        assert one.pieces == other.pieces and (one.shares == other.shares).all()


def test_shown_texts_are_the_first_ones_with_the_shares_of_their_tokens(decoder):
    shown = analysis_of(decoder, by_token, shown_texts=2).shown
    assert [text.name for text in shown] == ["strings, sample 0", "numbers"]
    tokens = encode(decoder, TEXTS, ["strings", "numbers"]).tokens
    for text, own in zip(shown, tokens, strict=False):
        assert text.shares.argmax(axis=1).tolist() == [number % E for number in own.ids]
        assert len(text.pieces) == len(own.ids) and text.prompt_length == own.prompt_length
    assert shown[0].pieces[0].is_special and "".join(p.text for p in shown[0].pieces[1:]).startswith("def·halves")


def test_text_is_cut_where_the_model_ends_and_left_out_where_it_is_empty(decoder):
    longest = decoder.model.config.max_position_embeddings
    texts = [Text("long", "a " * longest, "b"), Text("long", "a", "b " * longest), Text("nothing", ""), Text("short", "a", "b")]
    plain = decoder.tokenizer("")["input_ids"]
    encoded = encode(decoder, texts, ["long", "nothing", "short"])
    assert [len(tokens.ids) for tokens in encoded.tokens[:2]] == [longest, longest] and encoded.cut == 2
    assert encoded.tokens[0].prompt_length == longest and encoded.tokens[1].prompt_length == len(plain) + 1
    assert encoded.kept == ([0, 1, 2, 3] if plain else [0, 1, 3])
