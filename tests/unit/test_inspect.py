"""What a checkpoint holds, as JSON with known numbers and as a table of 80 columns; one line for what cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from dylo_moe import cli
from dylo_moe.errors import BaseModelUnknown, CheckpointError
from dylo_moe.formats import GATE_RULES, LoraPair, combined_hash, read_checkpoint, write_native
from dylo_moe.inventory import delta_norm, print_inventory, take_inventory
from harness.specimens import write_base, write_checkpoint
from tests.unit.formats import written
from tests.unit.formats.states import MLPS, classifier, draw, expert, gates, hybrid, mixture


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def native(base, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("native") / "checkpoint", base, num_experts=3, top_k=2)


def shown(inventory, width=80):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))
    print_inventory(inventory, console)
    return console.export_text()


@pytest.mark.parametrize(("rank", "dtype"), [(1, torch.float32), (4, torch.bfloat16), (7, torch.float64)])
def test_norm_is_that_of_the_whole_matrix(rank, dtype):
    pair = LoraPair(draw(rank, 12, dtype=dtype), draw(20, rank, dtype=dtype), 3.0, use_rslora=rank == 4)
    whole = pair.scaling * pair.lora_B.double() @ pair.lora_A.double()
    assert delta_norm(pair) == pytest.approx(whole.norm().item(), rel=1e-12)
    assert delta_norm(replace(pair, alpha=-3.0)) == pytest.approx(whole.norm().item(), rel=1e-12)


def test_norm_of_nothing_is_zero():
    assert delta_norm(LoraPair(torch.zeros(2, 8), draw(8, 2), 4.0)) == 0


def test_experts_are_described_by_their_tensors(tmp_path):
    pairs = {
        module: LoraPair(draw(rank, 8), draw(8, rank), 8.0) for module, rank in zip(written.MODULES, (2, 4, 4, 4), strict=True)
    }
    source = mixture(None, experts=(replace(expert("a"), modules=pairs), expert("b", written.MODULES[:1])))
    first, second = take_inventory(read_checkpoint(write_native(tmp_path / "x", source)))["experts"]
    assert (first["name"], second["name"]) == ("a", "b")
    assert (first["ranks"], first["alphas"], first["scalings"]) == ([2, 4], [8.0], [4.0, 2.0])
    assert (first["modules"], first["targets"]) == (4, ["q_proj", "v_proj"])
    assert first["parameters"] == 14 * 16 and second["parameters"] == 4 * 16
    assert (first["dtypes"], first["dora"], first["beside"]) == (["float32"], False, [])
    stacked = torch.cat([pair.scaling * pair.lora_B.double() @ pair.lora_A.double() for pair in pairs.values()])
    assert first["norm"] == pytest.approx(stacked.norm().item(), rel=1e-12)


def test_what_an_expert_has_beside_its_pairs_is_counted():
    bare = expert("a")
    own = replace(bare, replaced={"model.norm": {"weight": draw(8)}}, biases={"lm_head": draw(5)})
    plain, whole = take_inventory(mixture(None, experts=(bare, own)))["experts"]
    assert whole["parameters"] == plain["parameters"] + 8 + 5
    assert whole["beside"] == ["model.norm", "lm_head.bias"] and whole["norm"] == plain["norm"]


def test_json_has_the_documented_keys_and_the_hashes_of_the_files(base, native):
    checkpoint = read_checkpoint(native)
    inventory = json.loads(json.dumps(take_inventory(checkpoint)))
    keys = ("path", "format", "hash", "base", "experts", "shared", "router", "assumptions", "warnings", "files")
    assert tuple(inventory) == keys and all(key in take_inventory.__doc__ for key in keys)
    assert all(key in take_inventory.__doc__ for part in ("experts", "base") for key in flat_keys(inventory[part]))
    assert inventory["files"] == checkpoint.hashes and inventory["hash"] == combined_hash(checkpoint.hashes)
    assert inventory["base"] == {"recorded": str(base), "in_checkpoint": False, "resolved": str(base)}
    assert inventory["path"] == str(native) and inventory["format"] == "dylo-moe"


def flat_keys(value):
    return value[0].keys() if isinstance(value, list) else value.keys()


def described():
    yield hybrid(top_k=2), {"kind": "dynamic_hybrid", "features": "base", "top_k": 2, "temperature": 0.7, "parameters": 18}
    wanted = {"kind": "xlora", "layerwise": True, "depth": 3, "temperature": 0.3, "top_k": 1, "parameters": 6 * 15 + 6 + 7 * 8}
    yield classifier(layerwise=True, softmax_temperature=0.3, top_k=1), wanted
    for rule in (rule for rule in GATE_RULES if rule != "switch"):
        yield gates(rule), {"kind": "gates", "rule": rule, "level": "linear", "units": 4, "features": "layer", "temperature": 0.5}


@pytest.mark.parametrize(("state", "wanted"), list(described()))
def test_router_of_every_kind_is_described(tmp_path, state, wanted):
    inventory = take_inventory(read_checkpoint(write_native(tmp_path / "x", mixture(state))))
    assert wanted.items() <= inventory["router"].items()
    assert inventory["router"]["experts"] == 2
    text = shown(inventory)
    assert wanted["kind"] in text and (state.features in text)


def test_no_router_and_a_shared_adapter_are_said(tmp_path):
    modules = [f"{mlp}.up_proj" for mlp in MLPS]
    source = mixture(None, experts=(expert("a", modules),), shared=expert("attention", rank=3))
    inventory = take_inventory(read_checkpoint(write_native(tmp_path / "x", source)))
    assert inventory["router"] is None and inventory["shared"]["ranks"] == [3]
    text = shown(inventory)
    assert "attention (always)" in text.replace("\n", " ") or "attention" in text
    assert "router     none" in text


def test_table_fits_80_columns_and_names_every_expert(native):
    inventory = take_inventory(read_checkpoint(native))
    lines = shown(inventory).splitlines()
    table = [line for line in lines if line.startswith("expert") or line.startswith(" ")]
    assert all(len(line) <= 80 for line in table)
    assert [line.split()[0] for line in table if line.startswith("expert")] == ["expert", "expert_0", "expert_1", "expert_2"]
    assert inventory["hash"] in "".join(lines)


def test_dora_and_modules_of_an_experts_own_are_said(tmp_path):
    whole = expert("a")
    pairs = {module: replace(pair, magnitude=draw(8).abs()) for module, pair in whole.modules.items()}
    own = replace(whole, modules=pairs, replaced={"lm_head": {"weight": draw(16, 8)}})
    (found,) = take_inventory(read_checkpoint(write_native(tmp_path / "x", mixture(None, experts=(own,)))))["experts"]
    assert found["dora"] and found["beside"] == ["lm_head"]
    assert found["parameters"] == 4 * (4 * 16 + 8) + 16 * 8
    assert "DoRA" in shown({**take_inventory(mixture(None, path=tmp_path, experts=(own,))), "files": {}})


def test_base_that_is_nowhere_is_a_warning_unless_it_was_named(tmp_path):
    checkpoint = read_checkpoint(write_native(tmp_path / "x", mixture(None, base_model="no/such-base")))
    inventory = take_inventory(checkpoint)
    assert inventory["base"] == {"recorded": "no/such-base", "in_checkpoint": False, "resolved": None}
    assert any("no/such-base" in line for line in inventory["warnings"])
    with pytest.raises(BaseModelUnknown, match="/no/base"):
        take_inventory(checkpoint, "/no/base")


def test_base_that_does_not_fit_is_refused(native, tmp_path):
    with pytest.raises(CheckpointError, match="other"):
        take_inventory(read_checkpoint(native), str(write_base(tmp_path / "other", "gpt2")))


def test_merged_model_holds_its_own_weights(base):
    inventory = take_inventory(read_checkpoint(base))
    assert inventory["base"]["in_checkpoint"] and inventory["experts"] == []
    assert "weights are in the checkpoint" in shown(inventory)


def test_base_weights_are_not_opened(base, native, tmp_path):
    """The header of the base's weights is read, its data are not: they could be anything."""
    copy = tmp_path / "llama"
    copy.mkdir()
    for path in base.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1000:] = b"\xff" * 1000
    weights.write_bytes(bytes(data))
    assert take_inventory(read_checkpoint(native), str(copy))["base"]["resolved"] == str(copy)


def run(*words):
    done = subprocess.run([sys.executable, "-m", "dylo_moe.cli", *words], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("dylo-moe:")]


def test_command_prints_json_with_what_was_stated(native):
    code, out, _ = run("inspect", str(native), "--json", "--assume", "top_k=3")
    assert code == 0 and json.loads(out)["router"]["top_k"] == 3


def test_command_prints_a_table(native, capsys):
    assert cli.main(["inspect", str(native)]) == 0
    assert "expert_2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["/no/where"], "/no/where"),
        (["NATIVE", "--assume", "top_k=9"], "top_k"),
        (["NATIVE", "--assume", "colour=red"], "colour"),
        (["NATIVE", "--expect_hash", "0" * 64], "sha256"),
        (["NATIVE", "--base-model", "/no/base"], "/no/base"),
        ([], "DIR"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(native, capsys, words, said):
    try:
        code = cli.main(["inspect", *(str(native) if word == "NATIVE" else word for word in words)])
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and said in error


def test_expected_hash_is_the_printed_one(native):
    digest = take_inventory(read_checkpoint(native))["hash"]
    assert cli.main(["inspect", str(native), "--expect-hash", digest, "--json"]) == 0
