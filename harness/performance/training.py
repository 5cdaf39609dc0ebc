"""Cells of a training step and of memory, beside one adapter, the base and the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from harness.measure import counted_flops, peak_bytes
from harness.performance.cells import Cell
from harness.performance.shapes import Models, Shape, write_models
from harness.subjects import find_subject

STEP_GOALS = {("attention", 4): 1.10, ("all-linear", 8): 1.30}
STEP_SIZES = ((512, 256), (512, 1024), (1024, 256), (1024, 1024))  # hidden size, tokens; the first for a quick look
STEP_MEMORY = 1.5
LOOP_MEMORY = 0.25
FORWARD_MEMORY = 1.10


def steps(quick: bool) -> Iterator[Cell]:
    """Forward and backward of experts and router / of one PEFT adapter; counted peak bytes beside the base's and the loop's."""
    for hidden, tokens in STEP_SIZES[:1] if quick else STEP_SIZES:
        for (targets, experts), goal in STEP_GOALS.items():
            with TemporaryDirectory() as directory:
                models = write_models(Path(directory), Shape(hidden, targets, experts))
                yield from _step_cells(models, tokens, goal)


def _step_cells(models: Models, tokens: int, goal: float) -> Iterator[Cell]:
    ids, tags, name = models.ids(tokens), models.shape.tags, f"{models.shape.label} T={tokens}"
    ours, one = _step(_trainable(models.routed), ids), _step(_one_adapter(models, trainable=True), ids)
    base = models.base.requires_grad_(False)

    def base_step() -> None:
        embeddings = base.get_input_embeddings()(ids).requires_grad_()
        base(inputs_embeds=embeddings, labels=ids, use_cache=False).loss.backward()

    flops, of_one = counted_flops(base_step), 3 * 2 * tokens * models.expert_weights  # forward, and twice that backward
    limit = (flops + models.shape.experts * of_one) / (flops + of_one)
    yield Cell("training step / one adapter's", name, goal, limit, ours=ours, other=one, tags=tags)
    peak, of_base = peak_bytes(ours), peak_bytes(base_step)
    yield Cell("step's peak bytes / base's", name, STEP_MEMORY, count=lambda: peak / of_base, tags=tags)
    of_loop = peak_bytes(_step(_trainable(find_subject("naive-loop").load(models.checkpoint)), ids))
    # What the base's own step needs is needed by every step.
    yield Cell("step's peak bytes / the loop's", name, LOOP_MEMORY, of_base / of_loop, count=lambda: peak / of_loop, tags=tags)


def _trainable(model: nn.Module) -> nn.Module:
    """The experts and the router learn, the base does not."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or "router" in name)
    return model.train()


def _step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """Forward and backward; its gradients are let go as an optimizer does, without a walk through the model."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        for parameter in learning:
            parameter.grad = None

    return step


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
