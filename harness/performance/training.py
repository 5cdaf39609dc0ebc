"""Cells of a training step and of memory, beside one adapter, the base and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from harness.measure import peak_bytes
from harness.performance.cells import Cell
from harness.performance.shapes import Models, Shape, write_models
from harness.subjects import find_subject

STEP_GOALS = {("attention", 4): 1.10, ("all-linear", 8): 1.30}
STEP_MEMORY = 1.5
LOOP_MEMORY = 0.25
FORWARD_MEMORY = 1.10
TOKENS = 256


def steps(quick: bool) -> Iterator[Cell]:
    """Forward and backward of experts and router / of one PEFT adapter; counted peak bytes beside the base's and the loop's."""
    for (targets, experts), goal in STEP_GOALS.items():
        shape = Shape(512, targets, experts)
        if quick and targets != "attention":
            continue
        with TemporaryDirectory() as directory:
            models = write_models(Path(directory), shape)
            ids, ours, one = models.ids(TOKENS), _trainable(models.routed), _one_adapter(models, trainable=True)
            work = {"ours": lambda m=ours, i=ids: _step(m, i), "one": lambda m=one, i=ids: _step(m, i)}
            name = f"{shape.label} T={TOKENS}"
            yield Cell("training step / one adapter's", name, goal, ours=work["ours"], other=work["one"], tags=shape.tags)
            yield from _step_memory(models, work["ours"], name)


def _step_memory(models: Models, ours: Callable[[], None], name: str) -> Iterator[Cell]:
    ids, loop = models.ids(TOKENS), _trainable(find_subject("naive-loop").load(models.checkpoint))
    base = models.base.requires_grad_(False)

    def base_step() -> None:
        embeddings = base.get_input_embeddings()(ids).requires_grad_()
        base(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()

    tags = models.shape.tags
    yield Cell("step's peak bytes / base's", name, STEP_MEMORY, count=lambda: peak_bytes(ours) / peak_bytes(base_step), tags=tags)
    yield Cell(
        "step's peak bytes / the loop's",
        name,
        LOOP_MEMORY,
        count=lambda: peak_bytes(ours) / peak_bytes(lambda: _step(loop, ids)),
        tags=tags,
    )


def _trainable(model: nn.Module) -> nn.Module:
    """The experts and the router learn, the base does not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "router" in name)
    return model.train()


def _step(model: nn.Module, ids: Tensor) -> None:
    for parameter in _learning(model):
        parameter.grad = None
    model(ids, labels=ids).loss.backward()


def _one_adapter(models: Models, *, trainable: bool = False) -> nn.Module:
    base = AutoModelForCausalLM.from_pretrained(models.base_path)
    peft = PeftModel.from_pretrained(base, models.checkpoint / "experts" / "expert_0", is_trainable=trainable)
    return peft.train(trainable)


def memory(quick: bool) -> Iterator[Cell]:
    """Counted peak bytes of the routed forward / of one adapter's."""
    for experts in (8,) if quick else (2, 8, 32):
        shape = Shape(512, "all-linear", experts)
        with TemporaryDirectory() as directory:
            models = write_models(Path(directory), shape)
            ids, one = models.ids(1024), _one_adapter(models)

            def ratio(models: Models = models, ids: Tensor = ids, one: nn.Module = one) -> float:
                alone = Models(models.shape, models.base_path, models.checkpoint)
                alone.__dict__["base"] = one
                return peak_bytes(lambda: models.routed_pass(ids)) / peak_bytes(lambda: alone.base_pass(ids))

            yield Cell("forward's peak bytes / one adapter's", shape.label, FORWARD_MEMORY, count=ratio, tags=shape.tags)
