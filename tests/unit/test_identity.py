"""The identity of a run: everything that decides its samples changes it, and nothing else does."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest

from dylo_moe.evalplus import plan_generation, run_codegen
from dylo_moe.formats import read_checkpoint
from dylo_moe.generating import run_identity
from dylo_moe.identity import PACKAGES, checkpoint_identity, difference, identity_hash, versions
from dylo_moe.opened import Opened
from harness.specimens import write_base, write_checkpoint
from harness.specimens.tasks import TASKS, write_task_set


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base", "llama")


@pytest.fixture
def checkpoint(tmp_path, base):
    return write_checkpoint(tmp_path / "checkpoint", base, num_experts=2)


def identity(checkpoint, base):
    return identity_hash(checkpoint_identity(read_checkpoint(checkpoint), base))


def test_one_bit_of_any_file_of_checkpoint_or_base_is_another_run(checkpoint, base):
    before = identity(checkpoint, base)
    files = [path for place in (checkpoint, base) for path in sorted(place.rglob("*")) if path.is_file()]
    assert {path.name for path in files} >= {"adapter_model.safetensors", "model.safetensors", "config.json", "tokenizer.json"}
    seen = {before}
    for path in files:
        content = path.read_bytes()
        tensors = path.suffix == ".safetensors"
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:] if tensors else content + b"\n")
        seen.add(identity(checkpoint, base))
        path.write_bytes(content)
    assert len(seen) == len(files) + 1
    assert identity(checkpoint, base) == before


@pytest.mark.parametrize(
    "name", ["modeling_custom.py", "chat_template.jinja", "model-00001-of-00002.safetensors", "quantize_config.json"]
)
def test_file_that_comes_to_a_base_is_another_run(checkpoint, base, name):
    before = identity(checkpoint, base)
    (base / name).write_text("")
    assert identity(checkpoint, base) != before


def test_what_does_not_decide_samples_is_the_same_run(checkpoint, base, tmp_path):
    before = identity(checkpoint, base)
    (base / "README.md").write_text("about")
    (checkpoint / "training.log").write_text("about")
    base.rename(tmp_path / "elsewhere")
    assert identity(checkpoint, tmp_path / "elsewhere") == before


# Options of run_codegen that say where, how many, or in what portions, or that the hashes stand for.
NOT_IDENTITY = {
    *(
        "root",
        "bs",
        "n_samples",
        "resume",
        "id_range",
        "shard",
        "ray",
        "model",
        "dataset",
        "version",
        "base_model",
        "adapter_path",
    ),
    *("wandb_artifact", "backend", "base_url", "tp", "evalperf_type", "jsonl_fmt", "routing_strategy"),
}
OTHER = {
    "temperature": 0.7,
    "greedy": True,
    "force_base_prompt": True,
    "attn_implementation": "sdpa",
    "trust_remote_code": True,
    "dtype": "float16",
    "max_new_tokens": 5,
    "seed": 1,
    "device_map": "cpu",
    "assume": {"top_k": 1},
    "autocast_adapter_dtype": False,
}


LOADING = ("attn_implementation", "trust_remote_code", "dtype", "device_map", "assume", "autocast_adapter_dtype")


@pytest.mark.parametrize("name", LOADING)
def test_model_that_was_loaded_with_other_options_is_not_used(checkpoint, tmp_path, monkeypatch, name):
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:1])))
    options = {"model": str(checkpoint), "dataset": "humaneval", "greedy": True}
    opened = Opened(plan_generation(options, ["router"]).decoder)
    assert opened.fits(plan_generation({**options, "seed": 5}, ["router"]).decoder)
    assert not opened.fits(plan_generation({**options, name: OTHER[name]}, ["router"]).decoder)


def test_every_option_decides_the_identity_or_is_known_not_to(checkpoint, base, tmp_path, monkeypatch):
    assert set(inspect.signature(run_codegen).parameters) == NOT_IDENTITY | set(OTHER)
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:2])))

    def of(strategy="router", **options):
        options = {"model": str(checkpoint), "dataset": "humaneval", "temperature": 0.8, **options}
        planned = plan_generation(options, [strategy])
        return identity_hash(run_identity(planned, strategy, Opened(planned.decoder).hashes))

    ways = [of(), of("best"), *(of(**{name: value}) for name, value in OTHER.items())]
    assert len(set(ways)) == len(ways)
    same = {"root": "elsewhere", "bs": 3, "n_samples": 5, "resume": False, "id_range": [0, 1], "shard": "1/2", "ray": "auto"}
    assert {of(**{name: value}) for name, value in same.items()} == {of()}
    monkeypatch.setenv("HUMANEVAL_OVERRIDE_PATH", str(write_task_set(tmp_path, "humaneval", TASKS[:3])))
    assert of() not in ways


def test_versions_name_the_code_that_generates():
    found = versions()
    assert {name: found[name] for name in PACKAGES} == {name: importlib.metadata.version(name) for name in PACKAGES}
    assert len(found["dylo-moe source"]) == 16 and "python" in found


def test_first_difference_is_named_with_both_values():
    assert difference({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}}) == "b.d 3, here 4"
    assert difference({"a": 1}, {"a": 1, "b": 2}) == "b None, here 2"


def test_order_of_keys_does_not_matter_and_values_do():
    assert identity_hash({"a": 1, "b": [2]}) == identity_hash({"b": [2], "a": 1}) != identity_hash({"a": 1, "b": [3]})
