"""What the command judges without arguments covers every law, and a specimen is the same whenever it is written."""

from __future__ import annotations

from harness.builtin import BUILT_IN
from harness.catalogue import read_laws
from harness.identity import checkpoint_hash
from harness.specimens import write_base, write_checkpoint


def test_every_law_is_judged_on_some_exhibit():
    missed = [law.id for law in read_laws() if not any(exhibit.wants(law.id) for exhibit in BUILT_IN)]
    assert missed == []


def test_every_exhibit_is_judged_by_some_law_and_names_are_different():
    assert all(any(exhibit.wants(law.id) for law in read_laws()) for exhibit in BUILT_IN)
    assert len({exhibit.name for exhibit in BUILT_IN}) == len(BUILT_IN)


def test_hash_does_not_depend_on_where_a_checkpoint_lies(tmp_path):
    first, second = (write_checkpoint(tmp_path / n / "moe", write_base(tmp_path / n / "base", "llama")) for n in ("a", "b"))
    assert checkpoint_hash(first) == checkpoint_hash(second)


def test_hash_changes_with_one_byte_of_an_expert_and_with_one_field(tmp_path):
    made = write_checkpoint(tmp_path / "moe", write_base(tmp_path / "base", "llama"))
    before = checkpoint_hash(made)
    weights = made / "experts" / "expert_1" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert checkpoint_hash(made) != before
    weights.write_bytes(content)
    assert checkpoint_hash(made) == before
    config = made / "moe_config.json"
    config.write_text(config.read_text().replace('"top_k": 1', '"top_k": 2'))
    assert checkpoint_hash(made) != before
