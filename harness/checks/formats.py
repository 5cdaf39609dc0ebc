"""Laws of reading and writing checkpoints."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from harness.artifact import load_base
from harness.bench import Bench
from harness.compare import assert_bitwise, assert_equal
from harness.outcome import NotApplicable
from harness.readings.layouts import NATIVE, layout_of
from harness.workings import Workings, workings


def check_detected(bench: Bench) -> None:
    """The checkpoint's format is recognised as what its files say it is.

    Reason: upstream's readers disagree: some fall through to the base model, silently, and score that.
    Tolerance: none.
    """
    detect = workings(bench).need_method(bench.subject, "detect")
    assert_equal(detect(bench.checkpoint), layout_of(bench.checkpoint), what="format")


def check_loaded_logits_equal_reference(bench: Bench) -> None:
    """What was loaded computes what the files say: every expert alone, and none, give the reference's logits.

    Reason: state dicts loaded with strict=False, transposed gates, experts of the wrong file: all load without an error.
    Tolerance: twice the naive loop's error.
    """
    w = workings(bench)
    if w.experts == 0:
        _compare_merged(w)
        return
    bench.evidence(reference_read_by=w.reference.artifact.reader)
    nothing = torch.zeros_like(w.dense)
    w.same_logits(w.ask(w.model, routing_weights=nothing), w.reference.logits(w.ids, w.mask, weights=nothing), "no expert")
    for expert in range(w.experts):
        want = w.reference.logits(w.ids, w.mask, expert_id=expert)
        w.same_logits(w.ask(w.model, expert_id=expert), want, f"expert {expert}")


def check_expert_saved_loads_in_stock_peft(bench: Bench) -> None:
    """Every expert that the subject saves loads in stock PEFT and is there, bitwise, what it was before.

    Reason: experts are shared one by one; upstream's expert files held other experts' tensors, or none.
    Tolerance: none for the tensors.
    """
    w = workings(bench)
    w.need_experts()
    save = w.need_method(w.model, "save_pretrained")
    layers = w.need_method(w.model, "routed_layers")()
    with tempfile.TemporaryDirectory(prefix="saved-") as directory:
        save(directory)
        for name in w.model.expert_names:
            _compare_saved(w, Path(directory) / "experts" / name, name, layers)


def check_directory_untouched(bench: Bench) -> None:
    """Loading and running a checkpoint changes no file of it and adds none.

    Reason: upstream's benchmark.py rewrote config.json in place, after which the checkpoint was another one.
    Tolerance: none.
    """
    before = _hashes(bench.checkpoint)
    w = workings(bench)
    model = w.load()
    w.ask(model)
    assert_equal(_hashes(bench.checkpoint), before, what="files of the checkpoint")


def check_bad_weights_refused(bench: Bench) -> None:
    """A copy with one defect, a NaN, a missing expert, a missing gate, a foreign tensor, is refused in one line.

    Reason: a checkpoint that loads in part runs, and is scored, as another model.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts()
    if layout_of(bench.checkpoint) != NATIVE:
        raise NotApplicable("defects are planted in the native layout only")
    defects = {"a NaN": _plant_nan, "a missing expert": _drop_expert, "a foreign tensor": _add_foreign_tensor}
    if w.reference.router is not None:
        defects["a missing gate"] = _drop_gate
    for name, plant in defects.items():
        with tempfile.TemporaryDirectory(prefix="defect-") as directory:
            copy = Path(directory) / "checkpoint"
            shutil.copytree(bench.checkpoint, copy)
            plant(copy)
            _expect_refusal(w, copy, name)


def _compare_merged(w: Workings) -> None:
    __tracebackhide__ = True
    base = load_base(w.reference.artifact, w.dtype).to(w.bench.device)
    got, want = w.ask(w.model), w.ask(base)
    assert_bitwise(got[w.mask.bool()], want[w.mask.bool()], what="logits of the merged model")


def _compare_saved(w: Workings, directory: Path, name: str, layers: dict) -> None:
    __tracebackhide__ = True
    base = load_base(w.reference.artifact, w.dtype)
    peft = PeftModel.from_pretrained(base, directory).get_base_model()
    for module, layer in layers.items():
        if name in layer.lora_A:
            stored = peft.get_submodule(module)
            for part in ("lora_A", "lora_B"):
                want = getattr(layer, part)[name].weight.cpu()
                assert_bitwise(getattr(stored, part)["default"].weight, want, what=f"{module} {part} of {name}")
            assert_equal(stored.scaling["default"], layer.scaling[name], what=f"{module} scaling of {name}")


def _expect_refusal(w: Workings, path: Path, defect: str) -> None:
    __tracebackhide__ = True
    try:
        w.load(path)
    except (ValueError, OSError, KeyError) as refusal:
        lines = str(refusal).strip().splitlines()
        assert_equal(len(lines), 1, what=f"lines in the refusal of {defect}")
        return
    raise AssertionError(f"a checkpoint with {defect} was loaded without an error")


def _hashes(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _an_expert(copy: Path) -> Path:
    name = json.loads((copy / "moe_config.json").read_text(encoding="utf-8"))["experts"][-1]["name"]
    return copy / "experts" / name / "adapter_model.safetensors"


def _plant_nan(copy: Path) -> None:
    tensors = load_file(_an_expert(copy))
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, _an_expert(copy), metadata={"format": "pt"})


def _drop_expert(copy: Path) -> None:
    shutil.rmtree(_an_expert(copy).parent)


def _add_foreign_tensor(copy: Path) -> None:
    tensors = load_file(_an_expert(copy))
    key = next(iter(tensors)).replace(".lora_A.weight", ".base_layer.weight").replace(".lora_B.weight", ".base_layer.weight")
    save_file({**tensors, key: torch.zeros(2, 2)}, _an_expert(copy), metadata={"format": "pt"})


def _drop_gate(copy: Path) -> None:
    tensors = load_file(copy / "router.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name != "gate.weight"}
    save_file(kept, copy / "router.safetensors", metadata={"format": "pt"})
