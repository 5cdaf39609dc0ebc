"""PeftMoEDecoder: a LoRA mixture of experts as an EvalPlus decoder."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from evalplus.provider.base import DecoderBase
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dylo_moe.artifact import download_artifact
from dylo_moe.batch import Request, Setting
from dylo_moe.batching import DEFAULT_ROWS, complete
from dylo_moe.completions import Completion, Wanted, best_expert, rows_of
from dylo_moe.errors import DyloMoeError, MissingFile, OptionError, PromptError, UnknownStrategy, one_line
from dylo_moe.formats.base import resolve_base
from dylo_moe.loading import load_checkpoint
from dylo_moe.model import DyLoRA_MoE
from dylo_moe.penalties import Penalties
from dylo_moe.prompts import chat_prompt
from dylo_moe.row_cache import can_pad
from dylo_moe.sampling import warpers_from_options
from dylo_moe.stopping import Ending, cut_at_stop, stop_strings
from dylo_moe.strategies import parse_strategy

DTYPES = ("bfloat16", "float16", "float32", "float64", "auto")
TOP_P = 0.95  # EvalPlus 0.3.1, provider/hf.py
TOP_K = 50  # what transformers' generate uses where the model's generation config says nothing


class PeftMoEDecoder(DecoderBase):
    """Completes EvalPlus prompts with a checkpoint of any format that `load_checkpoint` reads.

    Args:
        name: the checkpoint's directory; only a label where `adapter_path` or `wandb_artifact` is given.
        dataset: "humaneval" or "mbpp", which decides the stop strings of base prompts.
        base_model: as in `load_checkpoint`; None takes what the checkpoint records.
        adapter_path: the checkpoint's directory.
        routing_strategy: "router", "single:<i>", "best", "ensemble", "round_robin" or "base"; a merged one has "router" only.
        wandb_artifact: "entity/project/name:version", downloaded as by `download_artifact` and used as its directory.
        force_base_prompt: give the model the bare prompt although its tokenizer has a chat template.
        attn_implementation, device_map, dtype, trust_remote_code, autocast_adapter_dtype: as in `load_checkpoint`; without a
            device_map the model goes to the first CUDA device, where there is one.
        batch_size: rows that are generated together; it does not change what is written. None for 32, on a GPU 128.
        temperature: 0 for greedy decoding, above 0 for sampling.
        max_new_tokens: the longest completion, in tokens.
        instruction_prefix, response_prefix: EvalPlus's sentences around the task in chat prompts.
        seed: sample k of a prompt depends on the seed, the prompt and k, and on nothing else.
        model: an already loaded model of this checkpoint, used instead of loading one.
        assume: what the checkpoint's files do not record, as options of `read_checkpoint`: {"lora_alpha": 32, "top_k": 2}.

    Raises:
        OptionError, UnknownStrategy, ArtifactError, CheckpointError: one line each.
    """

    def __init__(  # noqa: PLR0913  (EvalPlus's names, and ours)
        self,
        name: str,
        dataset: str,
        base_model: str | None = None,
        adapter_path: str | None = None,
        routing_strategy: str = "router",
        wandb_artifact: str | None = None,
        force_base_prompt: bool = False,
        attn_implementation: str = "eager",
        device_map: Any = None,
        batch_size: int | None = 1,
        temperature: float = 0.8,
        max_new_tokens: int = 768,
        dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        instruction_prefix: str | None = None,
        response_prefix: str | None = None,
        seed: int = 0,
        model: nn.Module | None = None,
        assume: Mapping[str, Any] | None = None,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        _check_options(dataset, dtype, temperature=temperature, counts=(1 if batch_size is None else batch_size, max_new_tokens))
        # EvalPlus announces that it initialises a model, on stdout, which is for results; and perhaps this one is loaded already.
        with contextlib.redirect_stdout(io.StringIO()):
            super().__init__(
                name=str(name),
                batch_size=batch_size or 1,
                temperature=temperature,
                max_new_tokens=max_new_tokens,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                instruction_prefix=instruction_prefix,
                response_prefix=response_prefix,
            )
        self.dataset = dataset
        self.routing_strategy = routing_strategy
        self.force_base_prompt = force_base_prompt
        self.skip_special_tokens = True
        self.seed = seed
        self.model = model
        if model is None:
            path = Path(adapter_or_artifact(adapter_path, wandb_artifact) or name)
            options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
            options |= {"autocast_adapter_dtype": autocast_adapter_dtype, **(assume or {})}
            self.model = _load(path, base_model, dtype, device_map, options)
        checkpoint = self.model.checkpoint
        self.model_format = checkpoint.format
        self.base_model_name = str(base_model or checkpoint.base_model or checkpoint.path)
        self.device = next(self.model.parameters()).device
        self.batch_size = batch_size or DEFAULT_ROWS.get(self.device.type, DEFAULT_ROWS["cpu"])
        self.tokenizer = _load_tokenizer(self.model, base_model, trust_remote_code)
        check_strategy(routing_strategy, *_experts_and_router(self.model))
        self.eos = stop_strings(dataset, direct_completion=self.is_direct_completion())

    def is_direct_completion(self) -> bool:
        """Whether the model continues the bare prompt (then the prompt is part of the solution) or answers in a chat."""
        return self.force_base_prompt or self.tokenizer.chat_template is None

    def codegen(self, prompt: str, do_sample: bool = True, num_samples: int = 200, first_sample: int = 0) -> list[str]:
        """Completions of one prompt: always `num_samples` of them, in order.

        Args:
            do_sample: False is greedy decoding, which needs temperature 0, as sampling needs a temperature above 0.
            first_sample: the index of the first one; a run that already has k samples continues with first_sample=k.

        Raises:
            OptionError: do_sample contradicts the temperature.
            PromptError: the prompt cannot be made or is longer than the model can read.
        """
        greedy_copies = not do_sample and self.routing_strategy != "round_robin"  # then all of them are the same text
        indices = range(1) if greedy_copies else range(first_sample, first_sample + num_samples)
        wanted = [Wanted(prompt, self.routing_strategy, index) for index in indices]
        texts = {done.wanted.index: done.text for done in self.complete_many(wanted, do_sample=do_sample)}
        return [texts[index] for index in indices] * (num_samples if greedy_copies else 1)

    def complete_many(
        self, wanted: Iterable[Wanted], *, do_sample: bool, tick: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[Completion]:
        """The wanted completions as they end, written in batches across prompts, strategies and samples.

        Each has the tokens that it would have alone. batch_size is the number of rows of a batch: an ensemble's completion
        takes one for each expert. Rows that end make room for others; a batch that does not fit into memory is halved.

        Args:
            tick: called now and then with the number of tokens written since the last call.

        Raises:
            OptionError: do_sample contradicts the temperature. UnknownStrategy, PromptError.
            OutOfMemory: one completion alone does not fit.
        """
        self._check_temperature(do_sample)
        requests, setting = self._requests(wanted, do_sample=do_sample), self._setting()
        # Where a router weighs a token by all rows of a pass, a text must not depend on which rows were there.
        together = 1 if setting.routing is not None and setting.routing.needs_whole_pass else self.batch_size
        for text in complete(setting, list(requests), together, tick):
            string = cut_at_stop(self._decode(text.tokens[: text.length]), self.eos).replace("\t", "    ")
            for one in requests[text.request]:
                yield Completion(one, string, len(text.tokens))

    def _check_temperature(self, do_sample: bool) -> None:
        if do_sample == (self.temperature == 0):
            asked = "sampling" if do_sample else "greedy decoding"
            needed = "a temperature above 0 (or greedy decoding)" if do_sample else "temperature 0"
            raise OptionError(f"{asked} with temperature {self.temperature:g}, but it needs {needed}")

    def _requests(self, wanted: Iterable[Wanted], *, do_sample: bool) -> dict[Request, list[Wanted]]:
        """What to write; completions that must be the same are written once."""
        num_experts, has_router = _experts_and_router(self.model)
        encoded: dict[str, Tensor] = {}
        best: dict[str, int] = {}
        requests: dict[Request, list[Wanted]] = {}

        def best_of(prompt: str) -> int:
            if prompt not in best:
                best[prompt] = best_expert(self.model, encoded[prompt])
            return best[prompt]

        for one in wanted:
            check_strategy(one.strategy, num_experts, has_router)
            if one.prompt not in encoded:
                encoded[one.prompt] = self.encode(one.prompt)
            ids = tuple(encoded[one.prompt][0].tolist())
            routes: tuple = (None,)
            if num_experts:
                strategy = parse_strategy(one.strategy, num_experts, has_router=has_router)
                routes = rows_of(strategy, num_experts, one.index, partial(best_of, one.prompt))
            seed = sample_seed(self.seed, one.prompt, one.index) if do_sample else None
            room = (_positions(self.model) or len(ids) + self.max_new_tokens) - len(ids)
            requests.setdefault(Request(ids, routes, min(self.max_new_tokens, room), seed), []).append(one)
        return requests

    def _setting(self) -> Setting:
        config, routed = self.model.generation_config, isinstance(self.model, DyLoRA_MoE)
        top_k = TOP_K if config.top_k is None else config.top_k
        options = {"temperature": self.temperature, "top_p": TOP_P, "top_k": top_k}
        causal_lm = self.model.causal_lm if routed else self.model
        return Setting(
            model=self.model,
            causal_lm=causal_lm,
            routing=self.model.routing if routed else None,
            ending=Ending(self.eos, self._end_tokens(), self._decode),
            penalties=Penalties(config),
            warpers=warpers_from_options(config, options if self.temperature else {})[0],
            inputs=frozenset(inspect.signature(causal_lm.forward).parameters),
            can_pad=can_pad(causal_lm),
        )

    def encode(self, prompt: str) -> Tensor:
        """Token ids of everything before the completion, the chat around the prompt too, (1, length), on the model's device.

        Raises:
            PromptError: the prompt cannot be made or is longer than the model can read.
        """
        direct = self.is_direct_completion()
        text = prompt
        if not direct:
            text = chat_prompt(self.tokenizer, prompt, self.instruction_prefix, self.response_prefix, name=self.name)
        # A chat template writes its own special tokens: adding the tokenizer's would give two at the start.
        ids = self.tokenizer(text, add_special_tokens=direct, return_tensors="pt")["input_ids"]
        positions = _positions(self.model)
        if positions is not None and ids.shape[1] >= positions:
            raise PromptError(f"{self.name}: a prompt of {ids.shape[1]} tokens, but the model has {positions} positions")
        if ids.shape[1] == 0:
            raise PromptError(f"{self.name}: a prompt of no tokens")
        return ids.to(self.device)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=self.skip_special_tokens)

    def _end_tokens(self) -> set[int]:
        """Token ids that end a completion: the model's, the tokenizer's, and stop strings that are single special tokens."""
        configured = self.model.generation_config.eos_token_id
        ends = set(configured if isinstance(configured, list) else [configured])
        added = self.tokenizer.get_added_vocab()
        ends |= {self.tokenizer.eos_token_id, *(added.get(stop) for stop in self.eos)}
        return ends - {None}


def check_strategy(strategy: str, num_experts: int, has_router: bool) -> None:
    """Raises UnknownStrategy unless a model with so many experts (0: a merged model) can run the strategy."""
    if num_experts:
        parse_strategy(strategy, num_experts, has_router=has_router)
    elif strategy != "router":
        raise UnknownStrategy(f"routing strategy {strategy!r}, but a merged model has no experts to choose from: only 'router'")


def _experts_and_router(model: nn.Module) -> tuple[int, bool]:
    return (model.num_experts, model.router is not None) if isinstance(model, DyLoRA_MoE) else (0, True)


def sample_seed(seed: int, prompt: str, index: int) -> int:
    """The seed of sample `index` of a prompt: 62 bits of SHA-256, so that it depends on nothing but its arguments."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{prompt}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def adapter_or_artifact(adapter_path: str | None, wandb_artifact: str | None) -> str | None:
    """The checkpoint's directory, downloaded where an artifact is named.

    Raises:
        OptionError: both are given. ArtifactError: as `download_artifact`.
    """
    if wandb_artifact is None:
        return adapter_path
    if adapter_path is not None:
        raise OptionError(f"adapter_path {adapter_path} and wandb_artifact {wandb_artifact}, but only one can be the checkpoint")
    return str(download_artifact(wandb_artifact))


def _check_options(dataset: str, dtype: str, *, temperature: float, counts: tuple[int, int]) -> None:
    if dataset not in ("humaneval", "mbpp"):
        raise OptionError(f"dataset {dataset!r}, but should be 'humaneval' or 'mbpp'")
    if dtype not in DTYPES:
        raise OptionError(f"dtype {dtype!r}, but should be one of {', '.join(DTYPES)}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise OptionError(f"temperature {temperature}, but should be 0 (greedy) or above")
    for what, count in zip(("batch_size", "max_new_tokens"), counts, strict=True):
        if count < 1:
            raise OptionError(f"{what} {count}, but should be at least 1")


def _load(path: Path, base_model: str | None, dtype: str, device_map: Any, options: dict[str, Any]) -> nn.Module:
    wanted = None if dtype == "auto" else getattr(torch, dtype)
    if str(device_map).startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(f"device_map {device_map!r}, but there is no CUDA device")
    try:
        model = load_checkpoint(path, base_model, wanted, device_map, **options)
    except DyloMoeError:
        raise
    except (ImportError, ValueError) as error:  # how transformers refuses an attention implementation or a device map
        raise OptionError(one_line(str(error))) from error
    return model.to("cuda") if device_map is None and torch.cuda.is_available() else model


def _load_tokenizer(model: nn.Module, base_model: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, or else its base model's."""
    checkpoint = model.checkpoint
    place = checkpoint.tokenizer or resolve_base(checkpoint.base_model, base_model, checkpoint=checkpoint.path)
    local = Path(place).is_dir()
    if local and not (Path(place) / "tokenizer_config.json").is_file():
        raise MissingFile(place, "tokenizer_config.json", found="no tokenizer", expected="a tokenizer beside the model")
    return AutoTokenizer.from_pretrained(place, local_files_only=local, trust_remote_code=trust_remote_code)


def _positions(model: nn.Module) -> int | None:
    """How many tokens the model can read, where its configuration says so."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)
