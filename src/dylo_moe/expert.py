"""ExpertManager: create LoRA experts on one frozen base and choose which of them run."""

from __future__ import annotations

import re

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from dylo_moe.errors import RoutingError
from dylo_moe.mixture import Mixture
from dylo_moe.replaced import ExpertBias, RoutedModule
from dylo_moe.routed import RoutedLinear

# The attention projections of the model families in use; a model has those that its modules' names end in.
ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "query_key_value", "c_attn", "Wqkv")


class ExpertManager:
    """The experts of one model, by index.

    Args:
        model: a transformers model (wrapped when the first expert is created), a PeftModel, or the PeftModel of a
            routed model.
        lora_r, lora_alpha, lora_dropout: defaults of `create_expert`.
        target_modules: names or name endings; None takes the attention projections that the model has.

    Attributes:
        model: the PeftModel once there is an expert.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        lora_r: int = 16,
        lora_alpha: float = 32,
        lora_dropout: float = 0.0,
        *,
        target_modules: list[str] | None = None,
    ) -> None:
        self.model = model
        self.lora_r = lora_r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        self.target_modules = target_modules

    @property
    def expert_names(self) -> list[str]:
        mixture = self._mixture()
        if mixture is not None:
            return mixture.expert_names
        return expert_order(list(self.model.peft_config)) if isinstance(self.model, PeftModel) else []

    @property
    def num_experts(self) -> int:
        return len(self.expert_names)

    @property
    def current_expert_id(self) -> int | None:
        """The expert that `set_active_expert` chose; None while all of them are active."""
        mixture = self._mixture()
        if mixture is not None:
            return mixture.active_expert
        active = self.model.active_adapters if self.num_experts else []
        return self.expert_names.index(active[0]) if len(active) == 1 else None

    def create_expert(self, r: int | None = None, lora_alpha: float | None = None, lora_dropout: float | None = None) -> int:
        """Adds an expert that starts as a zero delta (B = 0) and returns its index.

        Raises:
            RoutingError: the model is routed: its router has no output for another expert.
        """
        if self._mixture() is not None:
            raise RoutingError("the router has no output for another expert; call detach_router before create_expert")
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r if r is None else r,
            lora_alpha=self.lora_alpha if lora_alpha is None else lora_alpha,
            lora_dropout=self.lora_dropout if lora_dropout is None else lora_dropout,
            target_modules=self.target_modules or attention_targets(self.model),
        )
        name = f"expert_{self.num_experts}"
        if isinstance(self.model, PeftModel):
            self.model.add_adapter(name, config)
        else:
            self.model = get_peft_model(self.model, config, adapter_name=name)
        return self.num_experts - 1

    def set_active_expert(self, expert_id: int) -> None:
        """Only this expert runs and trains, in a routed model whatever the router says, until `activate_all_experts`.

        Raises:
            UnknownExpert: not in range(num_experts).
        """
        mixture = self._mixture()
        names = self.expert_names
        Mixture(names).check_expert(expert_id)
        if mixture is None:
            self.model.set_adapter(names[expert_id])
            return
        mixture.active_expert = expert_id
        self._set_trainable([names[expert_id]])

    def activate_all_experts(self) -> None:
        """All experts run and train: mixed by the router in a routed model, summed in a plain PeftModel."""
        mixture = self._mixture()
        if mixture is None:
            self.model.base_model.set_adapter(self.expert_names)
            return
        mixture.active_expert = None
        self._set_trainable(self.expert_names)
        if mixture.shared is not None:
            self._set_trainable([mixture.shared], of=[mixture.shared])

    def _mixture(self) -> Mixture | None:
        return next((m.mixture for m in self.model.modules() if isinstance(m, RoutedLinear)), None)

    def _set_trainable(self, names: list[str], of: list[str] | None = None) -> None:
        """These adapters train, the others of `of` (all experts) do not."""
        for module in self.model.modules():
            if isinstance(module, (RoutedLinear, RoutedModule, ExpertBias)):
                for name in self.expert_names if of is None else of:
                    for parameter in module.expert_parameters(name):
                        parameter.requires_grad_(name in names)


def expert_order(names: list[str]) -> list[str]:
    """Adapter names in the order of the router's columns.

    Names that are one prefix and a number are ordered by the number, because ordering them as text puts expert_10
    before expert_2; any other names keep the order in which they were added.
    """
    numbered = [re.fullmatch(r"(.*?)(\d+)", name) for name in names]
    if all(numbered) and len({match.group(1) for match in numbered}) == 1:
        return sorted(names, key=lambda name: int(re.fullmatch(r".*?(\d+)", name).group(1)))
    return names


def attention_targets(model: PreTrainedModel) -> list[str]:
    """The attention projections that the model has. Raises RoutingError when it has none of the known ones."""
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    found = [target for target in ATTENTION_PROJECTIONS if target in endings]
    if not found:
        raise RoutingError(f"no module ends in {', '.join(ATTENTION_PROJECTIONS)}; give target_modules")
    return found
