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

# Where a layout keeps its router's tensors; None where they are computed from the experts.
ROUTER_FILES = {NATIVE: "router.safetensors", "peft-xlora": "adapter_model.safetensors", "peft-arrow": None}


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
    w.need_native()
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
    """A copy with one defect, a NaN, a missing expert, a missing tensor, a foreign tensor, is refused in one line.

    Reason: a checkpoint that loads in part runs, and is scored, as another model.
    Tolerance: none.
    """
    w = workings(bench)
    w.need_experts()
    layout = layout_of(bench.checkpoint)
    if layout not in ROUTER_FILES:
        raise NotApplicable(f"defects are planted in the layouts {', '.join(ROUTER_FILES)} only")
    defects = {"a NaN": _plant_nan, "a missing expert": _drop_expert, "a foreign tensor": _add_foreign_tensor}
    defects["an expert without one of its tensors"] = _drop_expert_tensor
    if w.reference.router is not None and ROUTER_FILES[layout] is not None:
        defects |= {"a router without one of its tensors": _drop_router_tensor, "a NaN in its router": _plant_nan_in_router}
    for name, plant in defects.items():
        with tempfile.TemporaryDirectory(prefix="defect-") as directory:
            copy = Path(directory) / "checkpoint"
            plant(*_copied(w, copy))
            _expect_refusal(w, copy, name)


def _copied(w: Workings, copy: Path) -> tuple[Path, Path | None]:
    """Copies the checkpoint; returns the file of its last expert and that of its router, where a file holds one."""
    original, expert = w.bench.checkpoint, w.reference.artifact.adapter_directories[-1]
    if expert is None:
        raise NotApplicable("no directory holds an expert as it is run")
    shutil.copytree(original, copy)
    layout = layout_of(copy)
    if layout == "peft-xlora":  # its configuration names the experts' directories, absolute, and those would be read
        config = json.loads((copy / "adapter_config.json").read_text(encoding="utf-8"))
        places = {name: copy / Path(place).relative_to(original.resolve()) for name, place in config["adapters"].items()}
        config["adapters"] = {name: str(place) for name, place in places.items()}
        (copy / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    directory = expert.resolve().relative_to(original.resolve())
    router = ROUTER_FILES[layout]
    return copy / directory / "adapter_model.safetensors", None if router is None else copy / router


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


def _plant_nan(expert: Path, router: Path | None) -> None:
    tensors = load_file(expert)
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, expert, metadata={"format": "pt"})


def _plant_nan_in_router(expert: Path, router: Path) -> None:
    _plant_nan(router, None)


def _drop_expert_tensor(expert: Path, router: Path | None) -> None:
    """The last layer's B: PEFT leaves what a second adapter lacks at random values."""
    tensors = load_file(expert)
    lost = [name for name in tensors if ".lora_B." in name][-1]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, expert, metadata={"format": "pt"})


def _drop_expert(expert: Path, router: Path | None) -> None:
    shutil.rmtree(expert.parent)


def _add_foreign_tensor(expert: Path, router: Path | None) -> None:
    tensors = load_file(expert)
    key = next(iter(tensors)).replace(".lora_A.weight", ".base_layer.weight").replace(".lora_B.weight", ".base_layer.weight")
    save_file({**tensors, key: torch.zeros(2, 2)}, expert, metadata={"format": "pt"})


def _drop_router_tensor(expert: Path, router: Path | None) -> None:
    """The first weight; a bias may rightly be absent."""
    tensors = load_file(router)
    lost = next(name for name in tensors if name.endswith(".weight"))
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, router, metadata={"format": "pt"})
